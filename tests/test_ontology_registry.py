"""The registry: what devices say becomes facts, once."""

import itertools
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cbor2
import jsonschema_rs
import pytest
from ontology_fixtures import MODEL, NOW, TD, TOPICS, description, everything, open_store, payload, status

from tinyfleet.edge.device.thing_description import VIRTUAL, Board, host_board, thing_description
from tinyfleet.edge.versions import PROGRAM_FORMAT, WIRE_VERSION
from tinyfleet.edge.wire.messages import ResetReason, Trial
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue as boards
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import EmbeddedStore, GraphChange, Store, StoreError
from tinyfleet.ontology.vocabulary.namespaces import PROPERTIES, SOSA_EXTEND, TF, board_iri, device_iri, model_iri


def about(store: Store, subject: str) -> dict[str, list[Any]]:
    facts: dict[str, list[Any]] = {}
    for row in store.query(f"SELECT ?p ?o WHERE {{ <{subject}> ?p ?o }} ORDER BY ?o"):
        facts.setdefault(str(row["p"]).removeprefix(TF.iri), []).append(row["o"])
    return facts


def test_a_description_becomes_facts_on_the_device_and_on_its_board(store: Store, registry: Registry) -> None:
    assert registry.ingest_one(TD, payload(description()))
    device = about(store, device_iri("home", "dev-1"))
    assert device["arenaBytes"] == [65_536]
    assert device["engine"] == ["mote"]
    assert device["board"] == [board_iri("nano33ble")]
    assert device["model"] == [model_iri(MODEL)]
    assert "ramBytes" not in device
    board = about(store, board_iri("nano33ble"))
    assert board["ramBytes"] == [262_144]
    assert board["sensor"] == ["hts221", "pdm-microphone"]
    assert "observes" in board and "observes" not in device
    subjects = {str(row["s"]).partition("#")[0] for row in store.query("SELECT ?s { ?s ?p ?o }")}
    about_it = {device_iri("home", "dev-1"), board_iri("nano33ble")}
    assert {s for s in subjects - about_it if not s.startswith((PROPERTIES, SOSA_EXTEND.iri))} == set()


def test_what_the_devices_of_this_project_send_is_taken(store: Store, registry: Registry) -> None:
    td = thing_description("home", "dev-1", VIRTUAL, "mote", "0.1.0", 9_936, MODEL)
    assert registry.ingest_one(TD, payload(td)), registry.last_rejection


def test_what_the_devices_of_this_project_send_is_valid_for_the_w3c() -> None:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / "ontologies/wot-td/td-json-schema-validation.json"
    if not path.is_file():
        pytest.skip("TINYFLEET_DATA has no JSON Schema of Thing Descriptions")
    schema = json.loads(path.read_text(encoding="utf-8"))
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    kinds = [VIRTUAL, host_board(), *(boards.load_board(name).board for name in boards.board_ids())]
    for board in kinds:
        td = json.loads(payload(thing_description("home", "dev-1", board, "mote", "0.1.0", 9_936, MODEL)))
        assert [error.message for error in validator.iter_errors(td)] == [], board.id
    assert list(validator.iter_errors(td | {"security": "other", "title": 5})), "the schema refuses what is wrong"


def test_many_devices_say_their_board_once(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    one = len(everything(store))
    for i in range(2, 11):
        assert registry.ingest_one(TOPICS.td(f"dev-{i}"), payload(description(f"dev-{i}")))
    per_device = sum(map(len, about(store, device_iri("home", "dev-2")).values()))
    assert len(everything(store)) == one + 9 * per_device
    assert per_device <= 18, "with the eight of its state: 26 triples"
    assert len(store.query("SELECT ?b WHERE { ?b <https://w3id.org/tinyfleet#ramBytes> ?r }")) == 1


def test_a_device_has_the_subsystems_of_its_board_also_when_more_is_known_of_that_later(
    store: Store, registry: Registry
) -> None:
    assert registry.ingest_one(TD, payload(description()))
    query = """PREFIX ssn: <http://www.w3.org/ns/ssn/>
    SELECT ?system { VALUES ?device { UNDEF } ?device ssn:hasSubSystem ?system } ORDER BY ?system"""

    def systems() -> list[str]:
        found = store.query(query, device=device_iri("home", "dev-1")).column("system")
        return [str(one).partition("#")[2] for one in found]

    assert systems() == ["controller", "sensor-hts221", "sensor-pdm-microphone"]
    describe.put_board(
        store, Board("nano33ble", "Arduino Nano 33 BLE", "nrf52840", 64_000_000, 262_144, 983_040, ("lsm9ds1",))
    )
    assert systems() == ["controller", "sensor-lsm9ds1"]
    assert not store.ask('ASK { ?s ?p "hts221" }')


def test_a_status_becomes_state(store: Store, registry: Registry) -> None:
    received = bytes(8)
    assert registry.ingest_one(TOPICS.status("dev-1"), status(samples=5, battery=0.5))
    assert registry.ingest_one(TOPICS.status("dev-1"), status(model=received, samples=9, stale=1))
    state = about(store, device_iri("home", "dev-1"))
    assert state == {
        "online": [True],
        "currentModel": [model_iri(received)],
        "samplesLearned": [9],
        "malformedMessages": [0],
        "staleMessages": [1],
        "keysVersion": [0],
        "wireVersion": [WIRE_VERSION],
        "programFormat": [PROGRAM_FORMAT],
    }


def test_a_status_says_what_was_tried_and_why_the_device_started(store: Store, registry: Registry) -> None:
    special = {"trial": Trial.ROLLED_BACK, "boots": 4, "reset": ResetReason.FAULT, "refused": 2, "keys": 5}
    assert registry.ingest_one(TOPICS.status("dev-1"), status(**special))
    state = about(store, device_iri("home", "dev-1"))
    expected = {"trialState": "rolled back", "boots": 4, "resetReason": "fault", "refusedCommands": 2, "keysVersion": 5}
    assert {name: state[name] for name in expected} == {name: [value] for name, value in expected.items()}
    assert registry.ingest_one(TOPICS.status("dev-1"), status(trial=Trial.CONFIRMED))
    state = about(store, device_iri("home", "dev-1"))
    assert state["trialState"] == ["confirmed"] and "refusedCommands" not in state and "resetReason" not in state


def test_a_will_marks_a_device_offline_since_now_and_nothing_else(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=5))
    before = everything(store)
    assert registry.ingest_one(TOPICS.status("dev-1"), status(online=False, model=bytes(8)))
    changed = set(before) ^ set(everything(store))
    assert changed == {
        (device_iri("home", "dev-1"), TF.online, "True"),
        (device_iri("home", "dev-1"), TF.online, "False"),
        (device_iri("home", "dev-1"), TF.offlineSince, repr(NOW)),
    }


def test_repeats_and_any_order_end_in_the_same_graph() -> None:
    messages = [
        (TD, payload(description())),
        (TOPICS.status("dev-1"), status(samples=3, drift=0.75)),
        (TOPICS.td("dev-2"), payload(description("dev-2", title="The second"))),
        (TOPICS.status("dev-2"), status(online=False)),
    ]
    graphs = set()
    for order in itertools.permutations(messages):
        with EmbeddedStore() as store:
            registry = Registry(store, "home", clock=lambda: NOW)
            for topic, data in (*order, *order[::-1], order[0]):
                assert registry.ingest_one(topic, data)
            graphs.add(tuple(everything(store)))
    assert len(graphs) == 1


def test_a_device_is_offline_since_it_was_first_heard_to_be(store: Store) -> None:
    times = iter(NOW + timedelta(hours=hour) for hour in range(9))
    registry = Registry(store, "home", clock=lambda: next(times))

    def since() -> list[Any]:
        return about(store, device_iri("home", "dev-1")).get("offlineSince", [])

    for online, expected in ((True, []), (False, [1]), (False, [1]), (True, []), (False, [4])):
        registry.ingest_one(TOPICS.status("dev-1"), status(online=online))
        assert since() == [NOW + timedelta(hours=hour) for hour in expected]


def test_a_drift_that_rises_is_one_event_until_it_has_settled(store: Store) -> None:
    times = iter(NOW + timedelta(hours=hour) for hour in range(99))
    registry = Registry(store, "home", clock=lambda: next(times))
    registry.ingest_one(TD, payload(description()))
    #         0    1     2    3    4     5    6    7     8    9
    course = (0.1, 0.45, 0.5, 0.9, 0.41, 0.6, 0.6, 0.39, 0.2, 0.8)
    for drift in course:
        assert registry.ingest_one(TOPICS.status("dev-1"), status(drift=drift))
        registry = Registry(store, "home", clock=lambda: next(times))  # what it knows is in the graph
    registry.ingest_one(TOPICS.status("dev-1"), status(online=False))
    events = store.query(library.text("drift-events"), id="dev-1", fleet="home")
    assert [dict(row) for row in events] == [
        {"id": "dev-1", "drift": pytest.approx(0.8), "model": model_iri(MODEL), "time": NOW + timedelta(hours=9)},
        {
            "id": "dev-1",
            "drift": 0.5,
            "model": model_iri(MODEL),
            "time": NOW + timedelta(hours=2),
            "ended": NOW + timedelta(hours=7),
        },
    ]
    second = f"{device_iri('home', 'dev-1')}:drift:2"
    assert {"DriftEvent", "device", "drift", "ofModel"} <= {
        name.removeprefix(TF.iri) for row in everything(store) if row[0] == second for name in (row[1], row[2][1:-1])
    }


def test_what_changes_within_one_batch_is_seen(store: Store, registry: Registry) -> None:
    states = [status(drift=drift) for drift in (0.75, 0.75, 0.25, 0.5)]
    messages = [(TD, payload(description())), *((TOPICS.status("dev-1"), s) for s in (*states, status(online=False)))]
    assert all(taken is not None and taken.rejection is None for taken in registry.ingest(messages))
    events = store.query(library.text("drift-events"), fleet="home")
    assert sorted((row["drift"], "ended" in row) for row in events) == [(0.5, False), (0.75, True)]
    assert about(store, device_iri("home", "dev-1"))["offlineSince"] == [NOW]


def test_a_newer_description_takes_the_place_of_the_older(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    assert registry.ingest_one(
        TD, payload(description(tf__arenaBytes=None, tf__engineVersion="0.2.0", title="Renamed"))
    )
    device = about(store, device_iri("home", "dev-1"))
    assert device["engineVersion"] == ["0.2.0"]
    assert "arenaBytes" not in device


def test_a_cleared_description_takes_the_device_away(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    registry.ingest_one(TOPICS.status("dev-1"), status())
    assert registry.ingest_one(TD, b"")
    assert about(store, device_iri("home", "dev-1")) == {}
    assert about(store, board_iri("nano33ble")) != {}


def test_a_known_board_stays_as_it_is_known(store: Store, registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    registry.ingest_one(TD, payload(description()))
    board = about(store, board_iri("nano33ble"))
    other = description("dev-2")
    other["tf:board"] |= {"tf:ramBytes": 1 << 20}
    assert registry.ingest_one(TOPICS.td("dev-2"), payload(other))
    assert about(store, board_iri("nano33ble")) == board
    assert "ramBytes of its board is 1048576" in caplog.text and "keeps 262144" in caplog.text
    linked = description("dev-3", tf__board={"@id": board_iri("nano33ble")})
    assert registry.ingest_one(TOPICS.td("dev-3"), payload(linked))


def test_messages_taken_together_end_as_taken_one_by_one() -> None:
    messages = [
        (TD, payload(description())),
        (TOPICS.status("dev-1"), status(samples=1, battery=0.5)),
        (TOPICS.td("dev-2"), payload(description("dev-2", tf__board={"@id": board_iri("nano33ble")}))),
        (TOPICS.status("dev-2"), b"damaged"),
        (TOPICS.td("dev-3"), payload(description("dev-4"))),
        (TOPICS.status("dev-1"), status(samples=2)),
        ("tinyfleet/away/devices/x/td", b""),
        (TOPICS.td("dev-2"), b""),
        (TOPICS.status("dev-1"), status(online=False)),
        (TOPICS.status("dev-2"), status(samples=9)),
    ]
    with EmbeddedStore() as together, EmbeddedStore() as apart:
        one, many = (
            Registry(store, "home", clock=lambda: datetime(2026, 1, 1, tzinfo=UTC)) for store in (apart, together)
        )
        alone = [one.ingest([message])[0] for message in messages]
        assert many.ingest(messages) == alone
        assert everything(together) == everything(apart)
        assert (many.accepted, many.rejected) == (one.accepted, one.rejected) == (7, 2)
    assert [taken and (taken.kind, taken.device, taken.online, taken.rejection is None) for taken in alone] == [
        ("td", "dev-1", True, True),
        ("status", "dev-1", True, True),
        ("td", "dev-2", True, True),
        ("status", "dev-2", False, False),
        ("td", "dev-3", False, False),
        ("status", "dev-1", True, True),
        None,
        ("td", "dev-2", False, True),
        ("status", "dev-1", False, True),
        ("status", "dev-2", True, True),
    ]


def test_a_status_writes_only_what_has_changed(store: Store, registry: Registry, tmp_path: Path) -> None:
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=5, battery=0.5))
    if not isinstance(store, EmbeddedStore):
        pytest.skip("a remote server keeps no account of it")
    written: list[GraphChange] = []
    apply = store._apply
    store._apply = lambda patch: (written.append(patch), apply(patch))[1]  # type: ignore[method-assign]
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=5, battery=0.5))
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=6, battery=0.5))
    device, samples = device_iri("home", "dev-1"), TF.samplesLearned
    integer = "<http://www.w3.org/2001/XMLSchema#integer>"
    assert written == [
        GraphChange([], [], []),
        GraphChange([], [f'<{device}> <{samples}> "5"^^{integer} .\n'], [f'<{device}> <{samples}> "6"^^{integer} .\n']),
    ]


def test_nobody_is_online_until_it_says_so(store: Store, registry: Registry) -> None:
    away = Registry(store, "away")
    for i in range(3):
        registry.ingest_one(TOPICS.td(f"dev-{i}"), payload(description(f"dev-{i}")))
        registry.ingest_one(TOPICS.status(f"dev-{i}"), status(online=i > 0))
    away.ingest_one(Topics("away").td("dev-1"), payload(description("dev-1", "away")))
    away.ingest_one(Topics("away").status("dev-1"), status())
    registry.mark_unknown()
    online = f"SELECT ?d WHERE {{ ?d <{TF.online}> true }}"
    offline = f"SELECT ?d WHERE {{ ?d <{TF.online}> false ; <{TF.offlineSince}> ?at }} ORDER BY ?d"
    assert store.query(online).column("d") == [device_iri("away", "dev-1")]
    assert store.query(offline).column("d") == [device_iri("home", "dev-0")]
    registry.ingest_one(TOPICS.status("dev-1"), status())
    registry.ingest_one(TOPICS.td("dev-3"), payload(description("dev-3")))  # it has never been there
    registry.mark_missing_offline()
    assert store.query(offline).column("d") == [device_iri("home", "dev-0"), device_iri("home", "dev-2")]
    assert sorted(store.query(online).column("d")) == [device_iri("away", "dev-1"), device_iri("home", "dev-1")]
    registry.ingest_one(TOPICS.status("dev-2"), status())
    assert store.query(offline).column("d") == [device_iri("home", "dev-0")]


def incompatibility(store: Store) -> object:
    return about(store, device_iri("home", "dev-1")).get("incompatibility")


def test_a_device_of_another_wire_version_is_named_and_left_out(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=5, battery=0.5))
    reason = "speaks wire version 4, this server speaks 3; update the server"
    for _ in range(2):
        (result,) = registry.ingest([(TOPICS.status("dev-1"), cbor2.dumps([4, True, "anything"]))])
        assert result is not None and (result.online, result.rejection) == (False, None)
        assert result.incompatibility == reason
    device = about(store, device_iri("home", "dev-1"))
    assert (device["online"], device["wireVersion"], device["incompatibility"]) == ([False], [4], [reason])
    assert "battery" not in device and "samplesLearned" not in device and device["offlineSince"] == [NOW]
    for fleet in (None, "home"):
        rows = store.query(library.text("incompatible"), **({} if fleet is None else {"fleet": fleet}))
        assert [(row["id"], row["reason"], row["wire"]) for row in rows] == [("dev-1", reason, 4)]
    assert not store.query(library.text("incompatible"), fleet="away")

    (result,) = registry.ingest([(TOPICS.status("dev-1"), status())])
    assert result is not None and result.online and result.incompatibility is None
    device = about(store, device_iri("home", "dev-1"))
    assert (device["online"], device["wireVersion"]) == ([True], [WIRE_VERSION])
    assert "incompatibility" not in device and "offlineSince" not in device


def test_an_unsupported_program_format_is_named(store: Store, registry: Registry) -> None:
    registry.ingest_one(TD, payload(description()))
    (result,) = registry.ingest([(TD, payload(description(tf__wireVersion=WIRE_VERSION, tf__programFormat=1)))])
    reason = f"reads program format 1, this server sends {PROGRAM_FORMAT}; update its firmware"
    assert result is not None and result.incompatibility == reason and incompatibility(store) == [reason]
    registry.ingest_one(TD, payload(description(tf__wireVersion=WIRE_VERSION, tf__programFormat=PROGRAM_FORMAT)))
    assert incompatibility(store) is None


def test_a_description_of_another_wire_version_is_named(store: Store, registry: Registry) -> None:
    (result,) = registry.ingest([(TD, payload(description(tf__wireVersion=1)))])
    reason = "speaks wire version 1, this server speaks 3; update its firmware"
    assert result is not None and result.incompatibility == reason and incompatibility(store) == [reason]
    registry.ingest_one(TD, payload(description()))
    assert incompatibility(store) == [reason], "a description without a version says nothing about it"
    registry.ingest_one(TD, payload(description(tf__wireVersion=WIRE_VERSION)))
    assert incompatibility(store) is None


def test_a_store_that_fails_is_not_the_devices_fault() -> None:
    store = EmbeddedStore()
    registry = Registry(store, "home")
    store.close()
    with pytest.raises(StoreError):
        registry.ingest_one(TD, payload(description()))
    assert registry.rejected == 0


def test_the_registry_works_on_a_remote_store(tmp_path: Any) -> None:
    with open_store("remote", tmp_path) as remote, EmbeddedStore() as local:
        for store in (remote, local):
            registry = Registry(store, "home")
            assert registry.ingest_one(TD, payload(description()))
            assert registry.ingest_one(TOPICS.status("dev-1"), status(samples=5))
        assert everything(remote) == everything(local)


def test_boards_put_in_before_are_what_counts(store: Store, registry: Registry) -> None:
    describe.put_board(store, VIRTUAL)
    td = thing_description("home", "dev-1", VIRTUAL, "mote", "0.1.0", 9_936, MODEL)
    td["tf:board"]["tf:flashBytes"] = 5
    assert registry.ingest_one(TD, payload(td))
    assert about(store, board_iri("virtual"))["flashBytes"] == [VIRTUAL.flash_bytes]
