"""The column index: whatever is written, and however, it says what the graph says."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.column_index import IndexedStore
from tinyfleet.ontology.store.columns import Columns, Range
from tinyfleet.ontology.store.query_rewriting import COUNT_QUERIES, INDEX_QUERIES
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, Facts, Rows, Store, parameters, rows, triples
from tinyfleet.ontology.vocabulary.namespaces import RDF, SCHEMA, TD, TF, Iri, board_iri, device_iri, model_iri

FLEETS = ("home", "away")
NAMES = ("a", "b", "c-1", "longer.name_2")
DEVICES = [device_iri(fleet, name) for fleet in FLEETS for name in NAMES]
BOARDS = [board_iri(f"board-{i}") for i in range(3)]
MODELS = [model_iri(f"{i:016x}") for i in range(3)]
SEEN = [Iri(f"https://w3id.org/tinyfleet/property/{name}") for name in ("sound", "acceleration")]
WAYS = [Iri(f"{MODELS[i % 2]}:train:{i}") for i in range(3)]
THING = Iri("urn:example:thing")
ROUND = Iri("urn:tinyfleet:home:run:1:round:1:a")  # has samples, and is no device

small = st.integers(0, 6)
TITLES = ("Lamp no. 1", "lamp", "ΛΑΜΠΑΣ", 'a "Straße"\n', "one", "two")
state = st.fixed_dictionaries(
    {},
    optional={
        RDF.type: st.sampled_from([[TD.Thing, TF.Device], [TD.Thing, TF.Device], [TD.Thing], None]),
        TF.board: st.sampled_from([*BOARDS, None]),
        TF.engine: st.sampled_from(["mote", "litert", None]),
        TF.engineVersion: st.sampled_from(["0.1.0", "0.2.0", 'odd "\n\t', None]),
        TF.arenaBytes: small | st.none(),
        TF.online: st.booleans() | st.none(),
        TF.currentModel: st.sampled_from([*MODELS, None]),
        TF.samplesLearned: small,
        TF.battery: st.sampled_from([0.0, -0.0, 0.5, 1.0, None]),
        TF.drift: st.floats(allow_nan=False, allow_infinity=False, width=32) | st.none(),
        TD.title: st.sampled_from(TITLES) | st.sets(st.sampled_from(TITLES)).map(sorted) | st.none(),
    },
)


def as_named(device: Iri) -> dict[Iri, Any]:
    fleet, name = device.split(":")[2:]
    return {TF.fleet: fleet, TF.deviceId: name}


device_facts = st.dictionaries(st.sampled_from(DEVICES), st.tuples(state, st.booleans()), max_size=6).map(
    lambda given: {device: (as_named(device) if named else {}) | said for device, (said, named) in given.items()}
)
model_facts = st.fixed_dictionaries(
    {RDF.type: st.just(TF.Model), SCHEMA.name: st.sampled_from(["m", "n"]), TF.engine: st.just("mote")},
    optional={
        TF.runRamBytes: small,
        TF.trainRamBytes: small,
        TF.trainableLayers: st.integers(0, 2),
        TF.storageBytes: small,
        TF.format: st.just("mote"),
        TF.quantizedRunRamBytes: small,
        TF.quantizedStorageBytes: small,
        TF.parameters: small | st.none(),
        TF.inputProperty: st.sets(st.sampled_from(SEEN)).map(list),
        TF.trainingOption: st.sets(st.sampled_from(WAYS)).map(list),
    },
)
way_facts = st.fixed_dictionaries({TF.trainRamBytes: small, TF.layersTrained: small, TF.biasOnly: st.booleans()})
board_facts = st.fixed_dictionaries(
    {TF.ramBytes: small, TF.flashBytes: small | st.none()},
    optional={
        TF.observes: st.sets(st.sampled_from(SEEN)).map(list),
        RDF.type: st.just(TF.Board),
        TF.boardId: st.sampled_from(["b", "c"]),
        TF.sensor: st.sets(st.sampled_from(["BME280", "mic"])).map(list),
        TD.title: st.sampled_from(TITLES),
    },
)
subjects = st.one_of(
    device_facts,
    device_facts,
    st.dictionaries(st.sampled_from(MODELS), model_facts, max_size=3),
    st.dictionaries(st.sampled_from(BOARDS), board_facts, max_size=3),
    st.dictionaries(st.sampled_from(WAYS), way_facts, max_size=3),
    st.dictionaries(st.just(ROUND), st.fixed_dictionaries({TF.samplesLearned: small}), max_size=1),
    st.dictionaries(st.just(THING), st.fixed_dictionaries({TD.title: st.sampled_from(TITLES)}), max_size=1),
)
OTHERWISE = (
    f"DELETE {{ ?d <{TF.online}> ?o }} INSERT {{ ?d <{TF.online}> false }} WHERE {{ ?d <{TF.online}> ?o }}",
    f"DELETE WHERE {{ ?d <{TF.battery}> ?o }}",
    f'INSERT DATA {{ <{DEVICES[1]}> <{TF.engine}> "mote" }}',  # perhaps its second one
    f"DELETE WHERE {{ <{DEVICES[1]}> <{TF.engine}> ?o }}",
    f'INSERT DATA {{ <{DEVICES[2]}> <{TF.arenaBytes}> "many" }}',
    f"DELETE WHERE {{ <{DEVICES[2]}> <{TF.arenaBytes}> ?o }}",
    f'INSERT DATA {{ <{DEVICES[0]}> <{TF.fleet}> "away" }}',  # in its name is another
    f"DELETE WHERE {{ <{DEVICES[0]}> <{TF.fleet}> ?o }}",
    f"INSERT DATA {{ <{THING}> a <{TF.Device}> }}",  # not named as a device is
    f"DELETE WHERE {{ <{THING}> a ?o }}",
    f'INSERT DATA {{ <{MODELS[1]}> <{SCHEMA.name}> "a second" }}',
    f"INSERT DATA {{ <{BOARDS[1]}> <{TF.ramBytes}> 2.5 }}",
    "CLEAR ALL",
)
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "write over HTTP", "add"]), subjects),
        st.tuples(st.sampled_from(["remove", "remove over HTTP"]), st.sampled_from(DEVICES)),
        st.tuples(st.just("update"), st.sampled_from(OTHERWISE)),
    ),
    max_size=8,
)


class Sends(Store):
    """What RemoteStore sends, handed to a store's update as the endpoint does."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def evaluate(self, sparql: str, **bindings: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def update(self, sparql: str) -> None:
        self._store.update(sparql)


def do(store: Store, step: tuple[str, Any]) -> None:
    match step:
        case "write", facts:
            store.write(facts)
        case "write over HTTP", facts:
            Sends(store).write(facts)
        case "add", facts:
            store.add(triples(facts))
        case "remove", device:
            store.remove(device)
        case "remove over HTTP", device:
            Sends(store).remove(device)
        case "update", text:
            store.update(text)


def key(found: Rows) -> list[tuple[Any, ...]]:
    return sorted(tuple(str(row.get(v)) + str(type(row.get(v))) for v in found.variables) for row in found)


def found(store: IndexedStore, where: dict[Iri, Any]) -> list[str]:
    names = store.select(where)
    assert names is not None
    return sorted(names.tolist())


def by_graph(store: EmbeddedStore, where: dict[Iri, Any]) -> list[str]:
    """What IndexedStore.select answers, asked of the graph."""
    lines = []
    for i, (p, wanted) in enumerate(where.items()):
        test = (
            f"FILTER(?v{i} >= {max(wanted.low, -1e300)} && ?v{i} <= {min(wanted.high, 1e300)})"
            if isinstance(wanted, Range)
            else f"FILTER(?v{i} IN ({', '.join(f'<{v}>' if isinstance(v, Iri) else repr(v).lower() for v in wanted)}))"
        )
        lines.append(f"?d <{p}> ?v{i} . {test}")
    answer = EmbeddedStore.evaluate(store, f"SELECT ?d WHERE {{ ?d a <{TF.Device}> . {' '.join(lines)} }}")
    return sorted(str(d).removeprefix("urn:tinyfleet:") for d in rows(answer).column("d"))  # type: ignore[arg-type]


SINGLE = [p for p in Columns().columns if p not in (RDF.type, TF.deviceId)]


def fits_columns(store: Store) -> bool:
    """Whether of every device one thing at most is said in each column, its fleet as in its name, its arena in
    numbers."""
    named = "^urn:tinyfleet:[A-Za-z0-9._-]+:[A-Za-z0-9._-]+$"
    return not store.ask(
        f"""ASK {{ {{ VALUES ?p {{ {" ".join(f"<{p}>" for p in SINGLE)} }} ?d ?p ?a, ?b
            FILTER(!SAMETERM(?a, ?b) && REGEX(STR(?d), "{named}") && !STRSTARTS(STR(?d), "urn:tinyfleet:model:")) }}
        UNION {{ ?d <{TF.fleet}> ?fleet . FILTER(!STRSTARTS(STR(?d), CONCAT("urn:tinyfleet:", ?fleet, ":"))) }}
        UNION {{ ?d a <{TF.Device}> FILTER(!STRSTARTS(STR(?d), "urn:tinyfleet:")) }}
        UNION {{ ?d <{TF.arenaBytes}> ?bytes . FILTER(!ISNUMERIC(?bytes)) }} }}"""
    )


UNORDERED = ("fits", "unmet-requirements", "sensors")  # what is equal to them has no order
CHOICES: dict[str, tuple[Any, ...]] = {
    "fleet": (None, "home", ["home", "away"], []),
    "model": (None, MODELS[0], MODELS[:2]),
    "least": (None, 2),
    "engine": (None, "mote"),
    "id": (None, "a", ["a", "c-1", "nobody"]),
}
P = f"PREFIX td: <{TD.iri}>\nPREFIX tf: <{TF.iri}>\n"
SEARCHES = (
    P + 'SELECT ?thing ?title WHERE { ?thing td:title ?title FILTER(CONTAINS(?title, "Lamp")) }',
    P + 'SELECT * { ?d a tf:Device ; td:title ?t . # {\n FILTER(?d != <urn:x> && CONTAINS(LCASE(?t), "lamp")) }',
    P + "SELECT (COUNT(*) AS ?n) { ?d td:title ?t ; a td:Thing FILTER REGEX(STR(?t), 'LAMP', 'i') }",
    P + 'SELECT ?d { ?d td:title ?t FILTER((CONTAINS(LCASE(?t), "λ") && CONTAINS(?t, "s"))) }',
    P + 'SELECT ?d { ?d td:title ?t FILTER CONTAINS(LCASE(?t), "straße") } ORDER BY ?d',
)
TAKEN_FOR_NONE = (
    P + 'SELECT ?d { ?t ^td:title ?d FILTER(CONTAINS(?t, "lamp")) }',
    P + 'SELECT ?d { ?d td:title ?t FILTER(CONTAINS(?t, "lamp") || CONTAINS(?t, "one")) }',
    P + 'SELECT ?d { ?d td:title ?t FILTER(!CONTAINS(?t, "lamp")) }',
    P + 'SELECT ?d { ?d td:title ?t OPTIONAL { ?d td:title ?u FILTER(CONTAINS(?u, "lamp")) } }',
    P + 'SELECT ?d { ?d td:title ?t FILTER(REGEX(?t, "l.mp")) }',
    P + 'SELECT ?d { ?d td:title ?t FILTER(CONTAINS(?t, "l\\u0061mp")) }',
    P + 'SELECT ?d { ?d td:title|td:description ?t FILTER(CONTAINS(?t, "lamp")) }',
    P + 'SELECT ?d { { ?d td:title ?t } UNION { ?d td:description ?t } FILTER(CONTAINS(?t, "lamp")) }',
)


def agrees(store: IndexedStore) -> None:
    for name in (*INDEX_QUERIES, *COUNT_QUERIES):
        text = library.text(name)
        names = parameters(text)
        choices = list(itertools.product(*(CHOICES[parameter] for parameter in names)))
        for choice in random.Random(len(store)).sample(choices, 1):
            bound = {parameter: given for parameter, given in zip(names, choice, strict=True) if given is not None}
            answer = rows(EmbeddedStore.evaluate(store, text, **bound))  # type: ignore[arg-type]
            for fast in (store.query(text, **bound), rows(store.evaluate(text, **bound))):  # type: ignore[arg-type]
                assert fast.variables == answer.variables
                assert key(fast) == key(answer)
                if name not in UNORDERED:
                    assert list(fast) == list(answer), name
    for text in SEARCHES:
        assert key(store.query(text)) == key(rows(EmbeddedStore.evaluate(store, text)))  # type: ignore[arg-type]
    for where in (
        {},
        {TF.board: BOARDS[:2], TF.arenaBytes: Range(2, 5)},
        {TF.online: [True], TF.currentModel: [MODELS[0], Iri("urn:nowhere")]},
        {TF.battery: Range(high=0.5)},
        {TF.samplesLearned: [1, 2, 3]},
    ):
        if store.indexed:
            assert found(store, where) == by_graph(store, where)


@settings(max_examples=40)
@given(steps=steps)
def test_it_says_what_the_graph_says_after_any_writes(steps: list[tuple[str, Any]]) -> None:
    with IndexedStore() as store, EmbeddedStore() as plain:
        for step in steps:
            do(store, step)
            do(plain, step)
            agrees(store)  # even while it is being rebuilt
        assert key(store.query("SELECT ?s ?p ?o { ?s ?p ?o }")) == key(plain.query("SELECT ?s ?p ?o { ?s ?p ?o }"))
        assert store.wait() is fits_columns(plain)
        agrees(store)


@settings(max_examples=25)
@given(first=steps, second=steps)
def test_it_is_saved_and_built_with_the_store(
    tmp_path_factory: pytest.TempPathFactory, first: list[tuple[str, Any]], second: list[tuple[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("index") / "graph"
    with IndexedStore(path) as store:
        for step in first:
            do(store, step)
        store.wait()
        held = fits_columns(store)
    with IndexedStore(path) as store:
        assert store.indexed or not held  # without building
        agrees(store)
        for step in second:
            do(store, step)
        agrees(store)
    with EmbeddedStore(path) as other:  # which knows of no index
        other.write(
            {DEVICES[0]: {RDF.type: [TD.Thing, TF.Device], TF.fleet: "home", TF.engine: None, TF.samplesLearned: 99}}
        )
    with IndexedStore(path) as store:
        if store.wait():
            assert "home:a" in found(store, {TF.samplesLearned: [99]})
        agrees(store)


FACTS: Facts = {
    DEVICES[0]: {
        RDF.type: [TD.Thing, TF.Device], TF.fleet: "home", TF.board: BOARDS[0], TF.engine: "mote",
        TF.engineVersion: "0.1.0", TF.arenaBytes: 5, TF.currentModel: MODELS[0], TF.online: True,
    },
    BOARDS[0]: {TF.ramBytes: 9, TF.flashBytes: 9},
    MODELS[0]: {
        RDF.type: TF.Model, SCHEMA.name: "m", TF.engine: "mote", TF.runRamBytes: 4, TF.trainRamBytes: 6,
        TF.storageBytes: 9,
    },
}  # fmt: skip


def test_whoever_asks_the_librarys_query_is_answered_by_it() -> None:
    with IndexedStore() as store, Endpoint(store, Access.of_token("token", "read")) as endpoint:
        store.write(FACTS)
        remote = RemoteStore(endpoint.url, "token")
        assert list(remote.query(library.text("fits"), fleet="home")) == [
            {"model": MODELS[0], "name": "m", "devices": 1, "training": 0}
        ]
        remote.write({DEVICES[0]: {TF.arenaBytes: 6}})
        assert store.indexed, "a write that says what it changes is no reason to rebuild"
        assert remote.query(library.text("fits"))[0]["training"] == 1
        (row,) = remote.query(library.text("devices-by-model"))
        assert (row["running"], row["devices"], row["online"]) == (MODELS[0], 1, 1)


def test_what_the_columns_cannot_hold_is_left_to_the_graph() -> None:
    with IndexedStore() as store:
        store.write(FACTS)
        store.update(f"INSERT DATA {{ <{DEVICES[0]}> <{TF.arenaBytes}> 'plenty' }}")
        assert not store.wait()
        assert store.select({}) is None
        agrees(store)


def test_two_values_are_left_to_the_graph_until_one_of_them_is_gone() -> None:
    """Of whatever column; and a title that was written meanwhile is found once."""
    with IndexedStore() as store:
        store.write(FACTS)
        store.add(triples({DEVICES[0]: {TF.samplesLearned: 1}}))
        store.add(triples({DEVICES[0]: {TF.samplesLearned: 2}}))
        assert not store.wait() and not fits_columns(store)
        store.write({DEVICES[0]: {TD.title: "Lamp no. 1"}})
        agrees(store)
        store.write({DEVICES[0]: {TF.samplesLearned: 2}})
        assert store.wait() and fits_columns(store)
        agrees(store)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_a_damaged_file_is_built_anew(tmp_path: Path, damage: bytes | None) -> None:
    with IndexedStore(tmp_path / "graph") as store:
        store.write(FACTS)
    file = tmp_path / "graph.index"
    if damage is None:
        damage = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(damage)
    with IndexedStore(tmp_path / "graph") as store:
        assert store.wait()
        assert found(store, {}) == ["home:a"]


def test_writes_while_it_is_built_are_not_missed(tmp_path: Path) -> None:
    many = {
        device_iri("home", f"d{i}"): {RDF.type: TF.Device, TF.fleet: "home", TF.samplesLearned: i} for i in range(5_000)
    }
    with EmbeddedStore(tmp_path / "graph") as plain:
        plain.write(many)
    with IndexedStore(tmp_path / "graph") as store:
        for i in range(0, 5_000, 50):
            store.write({device_iri("home", f"d{i}"): {TF.samplesLearned: 1_000_000 + i}})
        store.remove(device_iri("home", "d1"))
        assert store.wait()
        assert found(store, {TF.samplesLearned: Range(1_000_000)}) == sorted(f"home:d{i}" for i in range(0, 5_000, 50))
        assert len(found(store, {})) == 4_999
