"""Every query of the library on a small fleet: what it answers, in our store, over HTTP, and in another engine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import cbor2
import pytest
import rdflib
from ontology_fixtures import description, open_store, payload, status

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.wire.messages import ResetReason, Trial
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.lineage import Lineage, Participation
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import Binding, Store, Value, bind, value
from tinyfleet.ontology.vocabulary.namespaces import (
    RDF,
    SOSA,
    TF,
    Iri,
    board_iri,
    deployment_iri,
    device_iri,
    model_iri,
    version_iri,
)

DIGITS = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
WIDE = build([Dense(300), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
MODEL, LARGE, ODD = (model_iri(id) for id in (DIGITS.model_id, WIDE.model_id, bytes(8)))
RAM, MORE = DIGITS.arena_bytes, WIDE.arena_bytes
SOUND, HEAT = (Iri(f"https://w3id.org/tinyfleet/property/{name}") for name in ("sound", "temperature"))
HOUSE = Iri("https://example.org/data/house")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
NANO, PI = "nano33ble", "raspberry-pi-4"


def at(hours: float) -> datetime:
    return NOW + timedelta(hours=hours)


def fill(store: Store) -> None:
    """Six devices of `home` on two kinds of board, one elsewhere; two described models; two runs; two deployments."""
    clock = [NOW]
    topics = Topics("home")
    registry = Registry(store, "home", clock=lambda: clock[0])

    def say(device: str, hours: float = 0, **state: object) -> None:
        clock[0] = at(hours)
        assert registry.ingest_one(topics.status(device), status(**{"model": DIGITS.model_id, **state}))  # type: ignore[arg-type]

    pi = {
        "@id": board_iri(PI),
        "@type": "tf:Board",
        "title": "A computer",
        "tf:mcu": "BCM2711",
        "tf:ramBytes": 4 << 30,
        "tf:flashBytes": 16 << 30,
        "tf:sensor": ["pdm-microphone"],
    }
    joining: Mapping[str, Mapping[str, object]] = {
        "fit": {},
        "tight": {"tf__arenaBytes": RAM},
        "small": {"tf__arenaBytes": 2_000, "tf__engineVersion": "0.0.9"},
        "away": {},
        "odd": {"tf__arenaBytes": MORE - 1},
        "pi": {"tf__board": pi, "tf__engine": "litert", "tf__arenaBytes": None},
    }
    for device, td in joining.items():
        assert registry.ingest_one(topics.td(device), payload(description(device, **td))), registry.last_rejection
    say("fit", battery=0.125, drift=0.25)
    say("fit", 1, battery=0.125, drift=0.75)
    say("tight", 2, drift=0.625)
    say("tight", 30, drift=0.125, battery=0.75)
    say("small", malformed=3, stale=1, trial=Trial.ROLLED_BACK, boots=3, reset=ResetReason.FAULT)
    say("odd", model=bytes(8), stale=2, trial=Trial.ON_TRIAL)
    say("pi")
    say("away")
    say("away", 5, online=False)
    other = Registry(store, "elsewhere", clock=lambda: NOW)
    assert other.ingest_one(Topics("elsewhere").td("far"), payload(description("far", "elsewhere")))
    assert other.ingest_one(Topics("elsewhere").status("far"), status(model=DIGITS.model_id))
    assert Registry(store, "past").ingest_one(
        Topics("past").status("old"), cbor2.dumps([True, bytes(8), 0, 0, 0, None, None])
    )

    describe.put_model(store, describe.from_program(DIGITS, "digits"))
    describe.put_model(store, describe.from_program(WIDE, "wide"))
    ways = {1: (False, RAM), 2: (False, RAM + 1_000), 3: (True, RAM + 500)}
    measured = Iri("urn:tinyfleet:measurement:1")
    facts: dict[Iri, dict[Iri, Binding | None]] = {
        board_iri(NANO): {TF.observes: [SOUND, HEAT]},
        board_iri(PI): {TF.observes: SOUND},
        MODEL: {
            TF.quantizedRunRamBytes: None,
            TF.inputProperty: HEAT,
            TF.dataset: HOUSE,
            TF.trainRamBytes: RAM + 1_000,
            TF.trainingOption: [Iri(f"{MODEL}:train:{n}") for n in ways],
        },
        LARGE: {TF.quantizedRunRamBytes: 20_000, TF.quantizedStorageBytes: 9_000, TF.trainingOption: None},
        measured: {
            RDF.type: [TF.Measurement, SOSA.Observation],
            TF.ofModel: MODEL,
            TF.onBoard: board_iri(NANO),
            TF.latencySeconds: 0.25,
            TF.instructions: 12_100,
            TF.emulated: True,
        },
    }
    for n, (biases, ram) in ways.items():
        facts[Iri(f"{MODEL}:train:{n}")] = {
            RDF.type: TF.TrainingOption,
            TF.trainFrom: f"layer {n}",
            TF.layersTrained: n,
            TF.biasOnly: biases,
            TF.trainRamBytes: ram,
            TF.trainableParameters: 100 * n,
        }
    store.write(facts)

    lineage = Lineage(store, "home")
    lineage.begin(6, MODEL, "FedAvg", "6" * 64, at=at(-24))
    lineage.round(
        6, 1, [Participation("away", 2.0, None, 8, 900)], selected=1, started=at(-23), ended=at(-22), sha256="a" * 64
    )
    lineage.begin(7, MODEL, "TinyMetaFed", "a" * 64, derived_from=version_iri("home", 6, 1), at=NOW)
    for number, hash_, lost, parts in (
        (1, "1" * 64, ["small"], [Participation("fit", 0.75, 0.5, 32, 400, "sparse f16", 0),
                                  Participation("tight", 0.25, 0.75, 32, 410, "dense f32")]),
        (2, None, ["small", "tight"], []),
        (3, "3" * 64, ["gone"], [Participation("fit", 0.25, None, 16, 200, "sparse f16", 3)]),
    ):  # fmt: skip
        lineage.round(
            7, number, parts, selected=len(parts) + len(lost), started=at(number), ended=at(number + 0.5), sha256=hash_,
            bytes_up=sum(p.bytes_up or 0 for p in parts), bytes_down=9_000, lost=lost,
        )  # fmt: skip
    lineage.end(7, at(9))
    lineage.deployment(
        1, MODEL, ["fit", "odd", "tight", "away"], selected_by="runnable", started=at(10), ended=at(11),
        confirmed=["fit", "tight"], failed=["odd"],
    )  # fmt: skip
    lineage.deployment(2, MODEL, ["fit"], selected_by="drifted", started=at(12))
    lineage.deployment(3, ODD, ["odd", "small"], selected_by="all", started=at(5), ended=at(6), tried=["odd", "small"])


@pytest.fixture(scope="module", params=["memory", "remote", "rdflib"])
def ask(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Ask"]:
    """Asks the filled graph: embedded, over our endpoint, or in rdflib's own engine."""
    kind = "memory" if request.param == "rdflib" else request.param
    with open_store(kind, tmp_path_factory.mktemp("graph")) as store:
        fill(store)
        yield InRdflib(store) if request.param == "rdflib" else Ask(store)


class Ask:
    def __init__(self, store: Store) -> None:
        self.store = store

    def rows(self, sparql: str, **bindings: Binding) -> list[dict[str, Value]]:
        return list(self.store.query(sparql, **bindings))


class InRdflib(Ask):
    """An engine that shares nothing with Oxigraph but the standard."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        text = "".join(f"{triple} .\n" for triple in store.construct("CONSTRUCT WHERE { ?s ?p ?o }"))
        self.graph = rdflib.Graph().parse(data=text, format="nt")

    def rows(self, sparql: str, **bindings: Binding) -> list[dict[str, Value]]:
        import pyoxigraph as ox

        answer = self.graph.query(bind(sparql, bindings)).serialize(format="json") or b""
        solutions = ox.parse_query_results(answer, ox.QueryResultsFormat.JSON)
        assert isinstance(solutions, ox.QuerySolutions)
        names = [variable.value for variable in solutions.variables]
        return [{n: value(s[n]) for n in names if s[n] is not None} for s in solutions]  # type: ignore[misc,arg-type]


# For each query: what is asked for, which columns are compared, and the rows; None where a row has no value. Queries of
# which the other tests of the graph show more have one entry here.
Case = tuple[Mapping[str, Binding], Sequence[str], Sequence[Sequence[object]]]
HOME = {"fleet": "home"}
DIG = {"fleet": "home", "model": MODEL}
BIG = {"fleet": "home", "model": LARGE}
CASES: Mapping[str, Sequence[Case]] = {
    "battery-low": [
        (HOME, ("id", "battery", "online"), [("fit", 0.125, True)]),
        ({"fleet": "home", "limit": 0.75}, ("id",), [("fit",), ("tight",)]),
        ({"limit": 0.1}, ("id",), []),
    ],
    "boards": [
        (HOME, ("board", "ram", "clock", "devices"), [(PI, 4 << 30, None, 1), (NANO, 262_144, 64_000_000, 5)]),
        ({"fleet": "elsewhere", "least": 1 << 20}, ("board", "devices"), [(PI, 0)]),
    ],
    "clients": [(DIG, ("id",), [("fit",)])],
    "coverage": [
        (HOME, ("property", "boards", "devices", "online"), [(SOUND, 2, 6, 5), (HEAT, 1, 5, 4)]),
    ],
    "deployment-targets": [
        (
            {"deployment": deployment_iri("home", 1)},
            ("id", "outcome", "model", "running"),
            [
                ("fit", "confirmed", MODEL, MODEL),
                ("tight", "confirmed", MODEL, MODEL),
                ("odd", "failed", MODEL, ODD),
                ("away", "no answer", MODEL, MODEL),
            ],
        ),
        (
            {"deployment": deployment_iri("home", 3)},
            ("id", "outcome", "model", "running"),
            [("odd", "on trial", ODD, ODD), ("small", "rolled back", ODD, MODEL)],
        ),
    ],
    "deployments": [
        (
            HOME,
            ("deployment", "targets", "confirmed", "tried", "failed", "silent", "began", "ended", "selected"),
            [
                (deployment_iri("home", 2), 1, 0, 0, 0, 1, at(12), None, "drifted"),
                (deployment_iri("home", 1), 4, 2, 0, 1, 1, at(10), at(11), "runnable"),
                (deployment_iri("home", 3), 2, 0, 2, 0, 0, at(5), at(6), "all"),
            ],
        ),
    ],
    "devices": [
        (
            HOME,
            ("id", "online", "running", "board", "arena"),
            [
                ("away", False, MODEL, NANO, 65_536),
                ("fit", True, MODEL, NANO, 65_536),
                ("odd", True, ODD, NANO, MORE - 1),
                ("pi", True, MODEL, PI, None),
                ("small", True, MODEL, NANO, 2_000),
                ("tight", True, MODEL, NANO, RAM),
            ],
        ),
    ],
    "devices-by-model": [
        (
            HOME,
            ("running", "name", "engine", "version", "devices", "online"),
            [
                (MODEL, "digits", "mote", "0.1.0", 3, 2),
                (ODD, None, "mote", "0.1.0", 1, 1),
                (MODEL, "digits", "litert", "0.1.0", 1, 1),
                (MODEL, "digits", "mote", "0.0.9", 1, 1),
            ],
        )
    ],
    "drift-by-day": [
        (HOME, ("day", "events", "devices", "mean", "highest"), [("2026-01-01", 2, 2, 0.6875, 0.75)]),
        ({"fleet": "elsewhere"}, ("day",), []),
    ],
    "drift-events": [
        (
            HOME,
            ("id", "drift", "model", "time", "ended"),
            [("tight", 0.625, MODEL, at(2), at(30)), ("fit", 0.75, MODEL, at(1), None)],
        ),
        ({"after": at(1)}, ("id",), [("tight",)]),
        ({"id": "fit"}, ("id",), [("fit",)]),
    ],
    "drifted": [
        (HOME, ("id", "drift", "running", "since", "online"), [("fit", 0.75, MODEL, at(1), True)]),
        ({"limit": 0.125, "running": MODEL}, ("id", "drift", "since"), [("fit", 0.75, at(1)), ("tight", 0.125, None)]),
        ({"running": ODD}, ("id",), []),
    ],
    "fits-after-quantisation": [
        (
            BIG,
            ("id", "arena", "required", "quantised", "storage", "quantisedStorage"),
            [
                ("away", 65_536, MORE, 20_000, len(WIDE.data), 9_000),
                ("fit", 65_536, MORE, 20_000, len(WIDE.data), 9_000),
                ("odd", MORE - 1, MORE, 20_000, len(WIDE.data), 9_000),
            ],
        ),
        (DIG, ("id",), []),
    ],
    "fits": [
        (
            HOME,
            ("model", "name", "devices", "training"),
            [(MODEL, "digits", 4, 3)],
        ),
    ],
    "last-round": [(HOME, ("id", "loss", "samples", "number", "run"), [("fit", 0.25, 16, 3, 7)])],
    "lineage": [
        (
            {"run": 7, "fleet": "home"},
            ("version", "devices", "loss", "from"),
            [(3, 1, 0.25, "1" * 12), (1, 2, 0.5, "a" * 12), (0, 0, None, "a" * 12)],
        )
    ],
    "measurements": [
        (
            {"model": MODEL},
            ("name", "board", "latency", "energy", "instructions", "emulated"),
            [("digits", NANO, 0.25, None, 12_100, True)],
        ),
        ({"model": LARGE}, ("name",), []),
    ],
    "models": [
        (
            HOME,
            ("model", "made", "format", "parameters", "run", "train", "devices"),
            [(MODEL, "mote", "mote", 2_410, RAM, RAM + 1_000, 5), (LARGE, "mote", "mote", 22_510, MORE, MORE, 0)],
        ),
        ({"engine": "litert"}, ("model",), []),
    ],
    "models-for-device": [
        (
            {"fleet": "home", "id": "fit"},
            ("name", "observed", "layers", "biases", "required", "free"),
            [("digits", 1, 2, 3, RAM, 65_536 - RAM)],
        ),
        ({"fleet": "home", "id": "pi"}, ("name",), []),
    ],
    "offline": [
        (HOME, ("id", "since", "running", "board"), [("away", at(5), MODEL, NANO)]),
        ({"before": at(5)}, ("id",), []),
        ({"before": at(5.1)}, ("id",), [("away",)]),
    ],
    "participants": [
        (
            {"run": 7, "fleet": "home"},
            ("id", "rounds", "first", "last", "samples", "meanLoss", "bytesUp"),
            [("fit", 2, at(1.5), at(3.5), 48, 0.5, 600), ("tight", 1, at(1.5), at(1.5), 32, 0.25, 410)],
        ),
        ({"fleet": "elsewhere"}, ("id",), []),
    ],
    "rounds": [
        (
            {"run": 7, "fleet": "home"},
            ("round", "selected", "devices", "loss", "bytesUp", "bytesDown", "began", "ended"),
            [
                (1, 3, 2, 0.5, 810, 9_000, at(1), at(1.5)),
                (2, 2, 0, None, 0, 9_000, at(2), at(2.5)),
                (3, 2, 1, 0.25, 200, 9_000, at(3), at(3.5)),
            ],
        )
    ],
    "runnable": [
        (
            DIG,
            ("id", "arena", "required", "online"),
            [
                ("odd", MORE - 1, RAM, True),
                ("away", 65_536, RAM, False),
                ("fit", 65_536, RAM, True),
                ("tight", RAM, RAM, True),
            ],
        ),
        (BIG, ("id",), []),
    ],
    "sensors": [
        (HOME, ("sensor", "devices"), [("pdm-microphone", 6), ("hts221", 5)]),
        ({"fleet": "elsewhere"}, ("sensor", "boards", "devices"), [("hts221", NANO, 1), ("pdm-microphone", NANO, 1)]),
    ],
    "stale-models": [
        (
            HOME,
            ("id", "running", "given", "since", "confirmed"),
            [
                ("odd", ODD, MODEL, at(10), False),
                ("small", MODEL, ODD, at(5), False),
            ],
        )
    ],
    "stale-versions": [
        (
            HOME,
            ("id", "had", "newest", "run", "behind", "last"),
            [
                ("away", None, 1, 7, None, None),
                ("pi", None, 1, 7, None, None),
                ("small", None, 1, 7, None, None),
                ("tight", 0, 1, 7, 1, at(1.5)),
            ],
        ),
        ({"running": ODD}, ("id",), []),
    ],
    "stragglers": [
        (
            {"run": 7, "fleet": "home"},
            ("id", "missed", "replied", "last"),
            [("small", 2, 0, at(2.5)), ("gone", 1, 0, at(3.5)), ("tight", 1, 1, at(2.5))],
        ),
        ({"run": 6}, ("id",), []),
    ],
    "trainable": [
        (
            DIG,
            ("id", "layers", "biases", "required", "free"),
            [
                ("odd", 2, 3, RAM, MORE - 1 - RAM),
                ("away", 2, 3, RAM, 65_536 - RAM),
                ("fit", 2, 3, RAM, 65_536 - RAM),
                ("tight", 1, 0, RAM, 0),
            ],
        ),
    ],
    "trained-on": [
        (
            {"hash": "3" * 64},
            ("version", "source", "kind", "rounds", "samples", "first", "last"),
            [
                (version_iri("home", 7, 3), device_iri("home", "away"), "device", 1, 8, at(-22), at(-22)),
                (version_iri("home", 7, 3), device_iri("home", "fit"), "device", 2, 48, at(1.5), at(3.5)),
                (version_iri("home", 7, 3), device_iri("home", "tight"), "device", 1, 32, at(1.5), at(1.5)),
                (version_iri("home", 7, 3), HOUSE, "data set", 0, 0, None, None),
            ],
        ),
        (
            {"version": version_iri("home", 7, 0)},
            ("source", "samples"),
            [(device_iri("home", "away"), 8), (HOUSE, 0)],
        ),
    ],
    "training-options": [
        (
            DIG,
            ("name", "from", "layers", "biasOnly", "parameters", "required", "devices"),
            [
                ("digits", "layer 1", 1, False, 100, RAM, 4),
                ("digits", "layer 2", 2, False, 200, RAM + 1_000, 3),
                ("digits", "layer 3", 3, True, 300, RAM + 500, 3),
            ],
        ),
        ({"model": MODEL, "fleet": "nowhere"}, ("layers", "devices"), [(1, 0), (2, 0), (3, 0)]),
    ],
    "incompatible": [
        (
            {"fleet": "past"},
            ("id", "reason", "wire", "format"),
            [("old", "speaks wire version 1, this server speaks 3; update its firmware", 1, None)],
        ),
        (HOME, ("id",), []),
    ],
    "trials": [
        (
            HOME,
            ("id", "state", "running", "boots", "reset"),
            [("odd", "on trial", ODD, None, None), ("small", "rolled back", MODEL, 3, "fault")],
        ),
        ({"state": "rolled back"}, ("id",), [("small",)]),
    ],
    "troubled": [
        (HOME, ("id", "malformed", "stale", "engineVersion"), [("small", 3, 1, "0.0.9"), ("odd", 0, 2, "0.1.0")]),
    ],
    "unknown-models": [(HOME, ("id", "running", "board"), [("odd", ODD, NANO)])],
    "versions": [
        (
            HOME,
            ("engine", "version", "devices", "online"),
            [("mote", "0.1.0", 4, 3), ("litert", "0.1.0", 1, 1), ("mote", "0.0.9", 1, 1)],
        )
    ],
    "updates": [
        (
            {"run": 7, "fleet": "home"},
            ("encoding", "updates", "devices", "total", "mean", "most", "stalest"),
            [("dense f32", 1, 1, 410, 410, 410, None), ("sparse f16", 2, 1, 600, 300, 400, 3)],
        ),
        ({"run": 6}, ("encoding", "total"), [(None, 900)]),
    ],
    "unmet-requirements": [
        (
            {"fleet": "home", "id": "small", "model": MODEL},
            ("requirement", "required", "has", "shortfall"),
            [("RAM to run", RAM, 2_000, RAM - 2_000), ("RAM to train", RAM, 2_000, RAM - 2_000)],
        ),
        (
            {"fleet": "home", "id": "pi", "model": MODEL},
            ("requirement", "required", "has", "shortfall"),
            [("engine", "mote", "litert", None), ("sensor", HEAT, None, None)],
        ),
        ({"fleet": "home", "id": "fit", "model": MODEL}, ("requirement",), []),
    ],
}


# Where rdflib departs from the standard: with a parameter bound, it loses solutions of an OPTIONAL without a match, and
# an aggregate over nothing gives a solution without a group.
RDFLIB_DEPARTS = {("boards", 1), ("training-options", 1), ("stale-versions", 1)}


CONSTRUCTS = {"s3n"}
"""Queries that answer with a graph; tests/test_ontology_describe.py and their like show what is in it."""


def test_the_library_is_complete_and_tested() -> None:
    assert set(CASES) | CONSTRUCTS == set(library.names()) and len(CASES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_a_query_answers(ask: Ask, name: str) -> None:
    sparql = library.text(name)
    for i, (bindings, columns, expected) in enumerate(CASES[name]):
        found = ask.rows(sparql, **bindings)
        if isinstance(ask, InRdflib):
            if (name, i) in RDFLIB_DEPARTS:
                continue
            found = [row for row in found if any(column in row for column in columns)]
        assert [tuple(row.get(column) for column in columns) for row in found] == list(expected), bindings


@pytest.mark.parametrize("name", CASES)
def test_a_query_answers_with_its_parameters_free(ask: Ask, name: str) -> None:
    rows = ask.rows(library.text(name))
    assert rows
    assert not any(isinstance(v, Iri) and "_:" in v for row in rows for v in row.values()), "no blank nodes"


@pytest.mark.parametrize("name", CASES)
def test_a_query_says_what_it_answers_and_what_it_takes(name: str) -> None:
    query = library.query(name)
    assert query.about.endswith(".") and len(query.about) > 40
    assert all(query.parameters.values())
    every = {p for case in CASES[name] for p in case[0]}
    assert every <= query.parameters.keys()
    assert json.dumps(query.parameters)
