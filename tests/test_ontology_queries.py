"""The fleet asked: who can train, who ran the last round, where a version comes from; in memory, on disk, over HTTP."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cbor2
import pytest
from ontology_fixtures import description, everything, open_store, payload, status

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.versions import PROGRAM_FORMAT, WIRE_VERSION
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.lineage import Lineage, Participation
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library, matching
from tinyfleet.ontology.store.store import Store, Value
from tinyfleet.ontology.vocabulary.namespaces import PROV, Iri, model_iri, run_iri, version_iri
from tinyfleet.ontology.vocabulary.shapes import ShapeError

PROGRAM = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
MODEL = model_iri(PROGRAM.model_id)
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture(params=["memory", "disk", "indexed", "remote", "oxigraph"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with open_store(request.param, tmp_path) as opened:
        yield opened


def join(store: Store, device: str, fleet: str = "home", *, online: bool = True, model: bytes = PROGRAM.model_id,
         **td: object) -> None:  # fmt: skip
    registry, topics = Registry(store, fleet), Topics(fleet)
    assert registry.ingest_one(topics.td(device), payload(description(device, fleet, **td))), registry.last_rejection
    assert registry.ingest_one(topics.status(device), status(model=model))
    if not online:
        assert registry.ingest_one(topics.status(device), status(online=False))


def fleet(store: Store) -> None:
    describe.put_model(store, describe.from_program(PROGRAM, "digits"))
    join(store, "fit")
    join(store, "tight", tf__arenaBytes=PROGRAM.arena_bytes)
    join(store, "small", tf__arenaBytes=PROGRAM.arena_bytes - 1)
    join(store, "away", online=False)
    join(store, "other-model", model=bytes(8))
    join(store, "other-engine", tf__engine="litert")
    join(store, "unknown-arena", tf__arenaBytes=None)
    join(store, "fit", "elsewhere")


def clients(store: Store, model: Iri, fleet: str) -> list[Value]:
    return store.query(library.text("clients"), model=model, fleet=fleet).column("id")


def test_the_clients_of_a_round_are_those_that_can_train_now(store: Store) -> None:
    fleet(store)
    assert clients(store, MODEL, "home") == ["fit", "tight"]
    assert clients(store, MODEL, "elsewhere") == ["fit"]
    assert clients(store, model_iri(bytes(8)), "home") == []
    Registry(store, "home").ingest_one(Topics("home").status("fit"), status(online=False))
    assert clients(store, MODEL, "home") == ["tight"]


def test_an_incompatible_device_is_left_out_until_it_is_updated(store: Store) -> None:
    fleet(store)
    registry, topics = Registry(store, "home"), Topics("home")

    def selected() -> list[bool]:
        run = {"model": MODEL, "fleet": "home"}
        found = [store.query(library.text(name), **run).column("id") for name in ("clients", "runnable", "trainable")]
        found.append(list[Value](matching.select_devices(store, library.text("devices"), MODEL, "home")))
        return ["fit" in ids for ids in found]

    assert selected() == [True] * 4
    assert registry.ingest_one(topics.status("fit"), cbor2.dumps([WIRE_VERSION + 1, True]))
    assert selected() == [False] * 4
    unmet = matching.unmet_requirements(store, "home", model=MODEL, device="fit")
    assert [str(miss) for miss in unmet["fit", MODEL]] == [
        "speaks wire version 4, this server speaks 3; update the server"
    ]
    assert registry.ingest_one(topics.status("fit"), status(model=PROGRAM.model_id, program_format=PROGRAM_FORMAT + 1))
    assert selected() == [False] * 4
    assert registry.ingest_one(topics.status("fit"), status(model=PROGRAM.model_id))
    assert selected() == [True] * 4


def test_the_devices_that_could_train_the_model(store: Store) -> None:
    fleet(store)
    rows = store.query(library.text("trainable"), model=MODEL, fleet="home")
    assert rows.column("id") == ["unknown-arena", "away", "fit", "other-model", "tight"]
    assert rows[0]["free"] == 262_144 - PROGRAM.arena_bytes, "of the board's RAM"
    assert rows[1]["free"] == 65_536 - PROGRAM.arena_bytes and rows[1]["online"] is False
    assert rows[-1] == {
        "id": "tight", "board": "nano33ble", "model": MODEL, "arena": PROGRAM.arena_bytes,
        "required": PROGRAM.arena_bytes, "free": 0, "online": True, "layers": 2, "biases": 0,
    }  # fmt: skip
    everywhere = store.query(library.text("trainable"), model=MODEL)
    assert len(everywhere) == 6
    assert store.query(library.text("runnable"), model=MODEL).column("id") == everywhere.column("id")


def train(store: Store) -> Lineage:
    lineage = Lineage(store, "home")
    lineage.begin(7, MODEL, "TinyMetaFed", "0" * 64, task="digits", at=NOW)
    for number, hash_, parts in (
        (1, "1" * 64, [Participation("fit", 0.9, 0.5, 32, 400), Participation("tight", 0.7, 0.6, 32, 410)]),
        (2, None, []),
        (3, "3" * 64, [Participation("tight", 0.4, None, 32, 200), Participation("gone", float("nan"))]),
    ):
        started = NOW + timedelta(minutes=number)
        lineage.round(
            7, number, parts, selected=2, started=started, ended=started + timedelta(seconds=5), sha256=hash_,
            bytes_up=sum(p.bytes_up or 0 for p in parts), bytes_down=9_000,
        )  # fmt: skip
    lineage.end(7, NOW + timedelta(hours=1))
    return lineage


def test_who_ran_the_last_round_and_with_what_loss(store: Store) -> None:
    fleet(store)
    assert list(store.query(library.text("last-round"))) == []
    train(store)
    rows = store.query(library.text("last-round"), fleet="home")
    assert sorted(rows, key=lambda row: str(row["id"])) == [
        {"id": "gone", "number": 3, "run": 7},
        {"id": "tight", "loss": 0.4, "samples": 32, "bytesUp": 200, "number": 3, "run": 7},
    ]
    assert len(store.query(library.text("last-round"), fleet="elsewhere")) == 0


def test_the_lineage_of_a_model(store: Store) -> None:
    fleet(store)
    train(store)
    rows = store.query(library.text("lineage"), model=MODEL, fleet="home")
    assert list(rows) == [
        {
            "version": 3,
            "run": 7,
            "strategy": "TinyMetaFed",
            "devices": 2,
            "loss": 0.4,
            "hash": "3" * 12,
            "from": "1" * 12,
        },
        {
            "version": 1,
            "run": 7,
            "strategy": "TinyMetaFed",
            "devices": 2,
            "loss": 0.8,
            "hash": "1" * 12,
            "from": "0" * 12,
        },
        {"version": 0, "run": 7, "strategy": "TinyMetaFed", "devices": 0, "hash": "0" * 12},
    ]
    path = f"SELECT ?v WHERE {{ <{version_iri('home', 7, 3)}> <{PROV.wasDerivedFrom}>* ?v }}"
    assert set(store.query(path).column("v")) == {version_iri("home", 7, n) for n in (0, 1, 3)}


def test_a_run_goes_on_from_another_runs_version(store: Store) -> None:
    train(store)
    first = version_iri("home", 7, 3)
    second = Lineage(store, "home").begin(8, MODEL, "FedAvg", "3" * 64, derived_from=first, at=NOW)
    assert store.ask(f"ASK {{ <{second}> <{PROV.wasDerivedFrom}> <{first}> }}")
    assert store.ask(f"ASK {{ <{run_iri('home', 8)}> <{PROV.used}> <{first}> }}")
    assert [row["version"] for row in store.query(library.text("lineage"), model=MODEL)] == [0, 3, 1, 0]


def test_saying_a_round_twice_changes_nothing(store: Store) -> None:
    train(store)
    before = everything(store)
    train(store)
    assert everything(store) == before


def test_what_cannot_be_right_is_not_written(store: Store) -> None:
    lineage = Lineage(store, "home")
    with pytest.raises(ShapeError, match="has not begun"):
        lineage.round(1, 1, [], selected=0, started=NOW)
    with pytest.raises(ShapeError, match="64 hexadecimal digits"):
        lineage.begin(1, MODEL, "Reptile", "no hash")
    assert everything(store) == []
    lineage.begin(1, MODEL, "Reptile", "0" * 64)
    before = everything(store)
    with pytest.raises(ShapeError, match="accuracy"):
        lineage.round(1, 1, [Participation("d", accuracy=1.5)], selected=1, started=NOW, sha256="1" * 64)
    assert everything(store) == before


def test_a_query_that_is_not_there_is_said() -> None:
    from tinyfleet.edge.errors import UserError

    with pytest.raises(UserError, match="no query 'last-rounds' in the library, did you mean 'last-round'"):
        library.text("last-rounds")
