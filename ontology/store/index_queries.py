"""The library queries that the column index answers.

Which models a device can run depends on its board, its engine and its arena alone: its configuration. A fleet has few
configurations, however many devices it has. What a configuration can run is computed from the models and boards, which
are read once and kept until one of them changes, or the graph answers it with the query's own text. The columns then
say which devices, or how many, have the configuration.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.columns import Columns, NotIndexable, exact, id_of, unique_rows
from tinyfleet.ontology.store.store import Row, Value, bind, term
from tinyfleet.ontology.store.table import BLOCK, Table
from tinyfleet.ontology.vocabulary.namespaces import RDF, TF, Iri

if TYPE_CHECKING:
    from tinyfleet.ontology.store.column_index import IndexedStore

Parameters = Mapping[str, list[Value] | None]
"""The values of each parameter of a query; None if it is not set."""
MAX_PAIRS = 400_000
"""Configurations times models that the graph is asked about in one query."""
_PREFIXES = "PREFIX schema: <https://schema.org/> PREFIX tf: <https://w3id.org/tinyfleet#> "


def _select(store: "IndexedStore", sparql: str) -> list[Row]:
    """The rows of a SELECT on the graph. Raises NotIndexable for a value that Python cannot represent exactly."""
    answer = store.on_graph(sparql)
    names = [variable.value for variable in answer.variables]
    return [{name: exact(node) for name in names if (node := solution[name]) is not None} for solution in answer]


def _by_model(rows: Sequence[Row]) -> dict[Value, list[Row]]:
    found: dict[Value, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


# Models and boards


class Configuration(NamedTuple):
    """What decides which models a device can run; arena in bytes."""

    board: Iri
    engine: str
    arena: int


class _Board(NamedTuple):
    ram: int
    flash: int | None
    observed: frozenset[Value]


class _Model(NamedTuple):
    iri: Iri
    name: str
    engine: str
    run_bytes: int
    storage: int
    train_bytes: int | None
    parameters: int | None
    inputs: list[Value]
    options: list[tuple[int, int, int]]
    """Ways to train it: bytes, number of layers with all weights, number of layers with biases only."""

    def trainable(self, arena: int) -> tuple[int, int]:
        """How many layers an arena of this size can train: with all weights, and with biases only."""
        options = [option for option in self.options if option[0] <= arena]
        return max((o[1] for o in options), default=0), max((o[2] for o in options), default=0)


class Requirements(NamedTuple):
    """What all models require and all boards have."""

    models: list[_Model]
    boards: dict[Value, _Board]

    def can_run(self, configuration: Configuration, model: _Model) -> bool:
        board = self.boards.get(configuration.board)
        return (
            board is not None
            and board.flash is not None
            and model.engine == configuration.engine
            and model.run_bytes <= configuration.arena
            and model.storage <= board.flash
            and board.observed.issuperset(model.inputs)
        )


def requirements(store: "IndexedStore") -> Requirements | None:
    """Read the models and boards; None if one has two values where one is expected, or something not a whole number."""
    try:
        return Requirements(_models(store), _boards(store))
    except NotIndexable:
        return None


def _models(store: "IndexedStore") -> list[_Model]:
    inputs, options = _by_model(_select(store, _INPUTS)), _by_model(_select(store, _OPTIONS))
    return [
        _Model(
            Iri(str(iri)),
            _text(row["name"]),
            _text(row["engine"]),
            _whole(row["run"]),
            _whole(row["storage"]),
            _whole_or_none(row.get("train")),
            _whole_or_none(row.get("parameters")),
            [row["property"] for row in inputs.get(iri, [])],
            [(_whole(row["bytes"]), _whole(row["full"]), _whole(row["bias"])) for row in options.get(iri, [])],
        )
        for iri, row in _unique(_select(store, _MODELS), "model").items()
    ]


def _boards(store: "IndexedStore") -> dict[Value, _Board]:
    observed: dict[Value, set[Value]] = {}
    for row in _select(store, _OBSERVED):
        observed.setdefault(row["board"], set()).add(row["property"])
    return {
        iri: _Board(_whole(row["ram"]), _whole_or_none(row.get("flash")), frozenset(observed.get(iri, ())))
        for iri, row in _unique(_select(store, _BOARDS), "board").items()
    }


def _unique(rows: Sequence[Row], key: str) -> dict[Value, Row]:
    found = {row[key]: row for row in rows}
    if len(found) < len(rows):
        raise NotIndexable(f"two values for one {key}")
    return found


def _whole(value: Value) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise NotIndexable(f"{value!r}")
    return value


def _whole_or_none(value: Value | None) -> int | None:
    return None if value is None else _whole(value)


def _text(value: Value) -> str:
    if type(value) is not str:
        raise NotIndexable(f"{value!r}")
    return value


_MODELS = (
    _PREFIXES
    + """SELECT ?model ?name ?engine ?run ?storage ?train ?parameters WHERE {
    ?model a tf:Model ; schema:name ?name ; tf:engine ?engine ; tf:runRamBytes ?run ; tf:storageBytes ?storage .
    OPTIONAL { ?model tf:trainRamBytes ?train } OPTIONAL { ?model tf:parameters ?parameters } }"""
)
_OPTIONS = (
    _PREFIXES
    + """SELECT ?model ?bytes ?full ?bias WHERE { ?model a tf:Model .
    { ?model tf:trainRamBytes ?bytes ; tf:trainableLayers ?full . FILTER(?full > 0) BIND(0 AS ?bias) }
    UNION
    { ?model tf:trainingOption ?way . ?way tf:trainRamBytes ?bytes ; tf:layersTrained ?last ; tf:biasOnly ?only .
      BIND(IF(?only, 0, ?last) AS ?full) BIND(IF(?only, ?last, 0) AS ?bias) } }"""
)
_INPUTS = _PREFIXES + "SELECT ?model ?property WHERE { ?model a tf:Model ; tf:inputProperty ?property }"
_BOARDS = (
    _PREFIXES + "SELECT ?board ?ram ?flash WHERE { ?board tf:ramBytes ?ram OPTIONAL { ?board tf:flashBytes ?flash } }"
)
_OBSERVED = _PREFIXES + "SELECT ?board ?property WHERE { ?board tf:observes ?property }"
_NAMES = _PREFIXES + "SELECT ?model ?name WHERE { ?model schema:name ?name }"


def _names(store: "IndexedStore") -> dict[Value, list[Row]] | None:
    try:
        return _by_model(_select(store, _NAMES))
    except NotIndexable:
        return None


# Counts


def _counted(columns: Columns, given: Parameters, by: Sequence[Iri]) -> Iterator[tuple[list[Value | None], int, int]]:
    """For each combination of values: the values, the number of devices, and the number of online devices.

    Devices without an engine or an engine version do not count.
    """
    groups = columns.by_model
    of = (RDF.type, TF.fleet, TF.currentModel, TF.engine, TF.engineVersion, TF.online)
    selected = columns.select_groups(groups, given["fleet"])
    for predicate in (TF.engine, TF.engineVersion):
        selected = selected[groups.keys[of.index(predicate), selected] >= 0]
    keys, places = unique_rows([groups.keys[of.index(predicate), selected] for predicate in by])
    counts = groups.counts[selected]
    online = counts * (groups.keys[of.index(TF.online), selected] == 1)
    values = [[*columns.codes(predicate).values, None] for predicate in by]
    sums = (np.bincount(places, n, keys.shape[1]).astype(np.int64).tolist() for n in (counts, online))
    for key, n, m in zip(keys.T.tolist(), *sums, strict=True):
        yield [of[code] for of, code in zip(values, key, strict=True)], n, m


def _devices_by_model(store: "IndexedStore", given: Parameters) -> Table | None:
    names = store.kept(_names)
    if names is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        counted = list(_counted(columns, given, (TF.currentModel, TF.engine, TF.engineVersion)))
    rows = [
        (running, name, engine, version, n, m)
        for (running, engine, version), n, m in counted
        for name in ([None] if running not in names else [row["name"] for row in names[running]])
    ]
    rows.sort(key=lambda row: (-row[4], row[0] or "", row[2], row[3]))
    return Table(("running", "name", "engine", "version", "devices", "online"), iter(rows))


def _versions(store: "IndexedStore", given: Parameters) -> Table | None:
    with store.reading() as columns:
        if columns is None:
            return None
        counted = list(_counted(columns, given, (TF.engine, TF.engineVersion)))
    counted.sort(key=lambda row: (-row[1], row[0]))
    return Table(("engine", "version", "devices", "online"), ((*values, n, m) for values, n, m in counted))


class _Configurations(NamedTuple):
    """The configurations of a fleet whose boards are known, as arrays: [configurations]."""

    boards: list[_Board | None]
    """The boards, by the numbers in `board`."""
    engines: dict[str, int]
    board: NDArray[np.int64]
    engine: NDArray[np.int64]
    arena: NDArray[np.int64]
    flash: NDArray[np.int64]
    counts: NDArray[np.int64]
    """Number of devices."""

    def observing(self, observed: Value) -> NDArray[np.bool_]:
        return np.array([*(b is not None and observed in b.observed for b in self.boards), False])[self.board]


def _configurations(columns: Columns, known: Requirements, fleets: list[Value] | None) -> _Configurations:
    groups = columns.by_configuration
    selected = columns.select_groups(groups, fleets)
    _, _, board, engine, arena = groups.keys[:, selected]
    boards = [known.boards.get(Iri(name)) for name in columns.codes(TF.board).values]
    ram = np.array([*(-1 if b is None else b.ram for b in boards), -1])[board]
    flash = np.array([*(-1 if b is None or b.flash is None else b.flash for b in boards), -1])[board]
    arena = np.where(arena < 0, ram, arena)
    usable = (engine >= 0) & (ram >= 0) & (flash >= 0)
    arrays = (of[usable] for of in (board, engine, arena, flash, groups.counts[selected]))
    return _Configurations(boards, dict(columns.codes(TF.engine).codes), *arrays)


def _fits(store: "IndexedStore", given: Parameters) -> Table | None:
    known = store.kept(requirements)
    if known is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        fleet = _configurations(columns, known, given["fleet"])
    observing = {seen: fleet.observing(seen) for seen in {seen for model in known.models for seen in model.inputs}}
    found: list[tuple[Iri, str, int, int]] = []
    for model in known.models:
        runs = fleet.engine == fleet.engines.get(model.engine, -2)
        runs &= (fleet.arena >= model.run_bytes) & (fleet.flash >= model.storage)
        for seen in model.inputs:
            runs &= observing[seen]
        if devices := int(fleet.counts[runs].sum()):
            trains = runs & (fleet.arena >= (np.inf if model.train_bytes is None else model.train_bytes))
            found.append((model.iri, model.name, devices, int(fleet.counts[trains].sum())))
    found.sort(key=lambda row: (-row[2], row[1], row[0]))
    return Table(("model", "name", "devices", "training"), iter(found))


# One device, or the clients of one model


def _models_for_device(store: "IndexedStore", given: Parameters) -> Table | None:
    ids, fleets, wanted = (given[name] for name in ("id", "fleet", "model"))
    known = store.kept(requirements)
    if known is None or ids is None or fleets is None or len(ids) != 1 or len(fleets) != 1:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        configuration = _configuration(columns, known, f"{fleets[0]}:{ids[0]}".encode())
    variables = "model", "name", "id", "observed", "layers", "biases", "required", "free", "parameters"
    if configuration is None:
        return Table(variables, iter(()))
    ranked: list[tuple[Any, Sequence[Value | None]]] = []
    for model in known.models:
        if (wanted is None or model.iri in wanted) and known.can_run(configuration, model):
            layers, biases = model.trainable(configuration.arena)
            size = -1 if model.parameters is None else model.parameters
            rank = not model.inputs, -layers, -biases, -size, model.name, model.iri
            run, left = model.run_bytes, configuration.arena - model.run_bytes
            row = model.iri, model.name, ids[0], len(model.inputs), layers, biases, run, left, model.parameters
            ranked.append((rank, row))
    return Table(variables, (row for _, row in sorted(ranked, key=lambda item: item[0])))


def _configuration(columns: Columns, known: Requirements, name: bytes) -> Configuration | None:
    """The configuration of a device `{fleet}:{id}`; None if the graph does not describe it well enough."""
    (row,) = columns.rows([name], make=False).tolist()
    if row < 0:
        return None
    if not all(columns.columns[predicate].numbers[row] == 1 for predicate in (RDF.type, TF.deviceId)):
        return None
    read = (columns.columns[predicate] for predicate in (TF.fleet, TF.board, TF.engine, TF.arenaBytes))
    fleet, board, engine, arena = (column.decode(column.numbers[row]) for column in read)
    hardware = None if board is None else known.boards.get(board)
    if hardware is None or engine is None or fleet is None:
        return None
    return Configuration(Iri(str(board)), str(engine), hardware.ram if arena is None else cast("int", arena))


def _clients(store: "IndexedStore", given: Parameters) -> Table | None:
    models = given["model"]
    if models is None:
        return None
    try:
        wanted = _select(store, bind(_TRAINABLE, {"model": models}))
        boards = _unique(_select(store, _BOARD_IDS), "board")
        requests = [(str(row["model"]), str(row["engine"]), _integer(row["required"])) for row in wanted]
    except NotIndexable:
        return None
    found: list[tuple[str, Sequence[Value | None]]] = []
    with store.reading() as columns:
        if columns is None:
            return None
        groups = columns.by_model
        selected = columns.select_groups(groups, given["fleet"])
        selected = selected[groups.keys[5, selected] == 1]
        eligible = (columns.numbers(TF.deviceId) == 1) & (columns.numbers(TF.incompatibility) < 0)
        of_model, of_engine, of_board = (columns.codes(p) for p in (TF.currentModel, TF.engine, TF.board))
        arenas, on = (columns.numbers(p) for p in (TF.arenaBytes, TF.board))
        for model, engine, required in requests:
            code, engine_code = of_model.codes.get(model, -2), of_engine.codes.get(engine, -2)
            ready = np.zeros(len(groups.counts) + 1, np.bool_)  # the last element is for rows of no group
            ready[selected[(groups.keys[2, selected] == code) & (groups.keys[3, selected] == engine_code)]] = True
            mask = ready[groups.of[: columns.size]] & eligible & (arenas >= max(0, required)) & (on >= 0)
            for name, arena, board in zip(
                columns.raw_names(mask).tolist(), arenas[mask].tolist(), on[mask].tolist(), strict=True
            ):
                if (row := boards.get(of_board.values[board])) is not None:
                    device = Iri(f"urn:tinyfleet:{name.decode()}")
                    found.append((id_of(name), (id_of(name), device, row["id"], arena, required)))
    rows = (row for _, row in sorted(found, key=lambda item: item[0]))
    return Table(("id", "device", "board", "arena", "required"), rows)


def _integer(value: Value) -> int:
    if type(value) is not int:
        raise NotIndexable(f"{value!r}")
    return value


_TRAINABLE = (
    _PREFIXES
    + """SELECT ?model ?engine ?required WHERE {
    VALUES ?model { UNDEF } ?model a tf:Model ; tf:engine ?engine ; tf:trainRamBytes ?required }"""
)
_BOARD_IDS = _PREFIXES + "SELECT ?board ?id WHERE { ?board tf:boardId ?id }"


# Queries that match configurations first, then list their devices


class _GroupedQuery(NamedTuple):
    """A library query whose inner part is about configurations."""

    variables: list[str]
    inner: str
    """The inner part as a query, with CONFIGURATIONS for the values of ?hardware, ?engine and ?arena."""
    order: list[tuple[str, bool]]
    """The variables that its rows are ordered by, each with whether the order is descending."""
    compatible: bool
    """Whether it leaves incompatible devices out."""


_GROUPED = re.compile(
    r"(?P<head>.*?)\nSELECT (?P<variables>(?:\?\w+ )+)WHERE \{\n"
    r"(?:  VALUES \?\w+ \{ UNDEF \}\n)+"
    r"  \{\n(?P<before>    SELECT .*?)"
    r"      # Devices with the same board, [^\n]*\n      \{\n"
    r"        SELECT DISTINCT \?hardware \?engine \?arena WHERE \{\n"
    r".*?\n        \}\n      \}\n(?P<after>.*?)\n  \}\n"
    r"  \?device tf:board \?hardware ; tf:engine \?engine ; a tf:Device ; tf:fleet \?fleet ; tf:deviceId \?id \.\n"
    r"  \?hardware tf:ramBytes \?ram \.\n"
    r"  OPTIONAL \{ \?device tf:arenaBytes \?said \}\n"
    r"  FILTER\(COALESCE\(\?said, \?ram\) = \?arena\)\n"
    r"(?P<compatible>  FILTER NOT EXISTS \{ \?device tf:incompatibility \?reason \}\n)?"
    r"(?:  OPTIONAL \{ \?device tf:online \?online \}\n)?"
    r"\}\nORDER BY (?P<order>[^\n]*)\n",
    re.DOTALL,
)
_ORDER = re.compile(r"DESC\(\?(?P<down>\w+)\)|\?(?P<up>\w+)")


@cache
def _parse_grouped_query(name: str) -> _GroupedQuery:
    match = _GROUPED.fullmatch(library.text(name))
    assert match is not None, f"{name}.rq does not have the form of a grouped query"
    prefixes = "\n".join(re.findall("^PREFIX .*$", match["head"], re.MULTILINE))
    values = "      VALUES (?hardware ?engine ?arena) { CONFIGURATIONS }\n"
    inner = f"{prefixes}\n{match['before']}{values}{match['after']}"
    order = [(found["down"] or found["up"], bool(found["down"])) for found in _ORDER.finditer(match["order"])]
    return _GroupedQuery(match["variables"].replace("?", "").split(), inner, order, bool(match["compatible"]))


class _Devices(NamedTuple):
    """The devices that a query is about, by configuration."""

    configurations: dict[Configuration, int]
    """Their configurations, numbered."""
    configuration: NDArray[np.int32]
    """[devices]: the number of each one's configuration."""
    names: NDArray[np.bytes_]
    """[devices]: `{fleet}:{device}`."""
    online: NDArray[np.int8]
    """[devices]: 1 or 0; -1 if unknown."""


def _answer_grouped(name: str, store: "IndexedStore", given: Parameters) -> Table | None:
    """Answer a grouped query: ask the graph about the configurations that exist, then list the devices of each."""
    known, query = store.kept(requirements), _parse_grouped_query(name)
    if known is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        devices = _select_devices(columns, known, given, query.compatible)
    models = given["model"]
    if len(devices.configurations) * len(known.models if models is None else models) > MAX_PAIRS:
        return None
    values = " ".join(f"({' '.join(str(term(v)) for v in key)})" for key in devices.configurations)
    text = query.inner.replace("CONFIGURATIONS", values)
    if models is not None:
        text = text.replace("VALUES ?model { UNDEF }", f"VALUES ?model {{ {' '.join(f'<{m}>' for m in models)} }}")
    try:
        return Table(query.variables, _device_rows(query, devices, _select(store, text)))
    except NotIndexable:
        return None


def _select_devices(columns: Columns, known: Requirements, given: Parameters, compatible: bool) -> _Devices:
    groups = columns.by_configuration
    selected = columns.select_groups(groups, given["fleet"])
    mask = columns.numbers(TF.deviceId) == 1
    if compatible:
        mask &= columns.numbers(TF.incompatibility) < 0
    if (ids := given["id"]) is not None:
        fleets = {str(v) for v in columns.codes(TF.fleet).values}
        wanted = columns.rows([f"{fleet}:{id}".encode() for fleet in fleets for id in ids], make=False)
        named = np.zeros(columns.size, np.bool_)
        named[wanted[wanted >= 0]] = True
        mask &= named
        selected = np.intersect1d(selected, groups.of[: columns.size][mask])
    configurations: dict[Configuration, int] = {}
    of_group = np.full(len(groups.counts) + 1, -1, np.int32)  # the last element is for rows of no group
    boards, engines = columns.codes(TF.board).values, columns.codes(TF.engine).values
    for group, (_, _, board, engine, arena) in zip(selected.tolist(), groups.keys[:, selected].T.tolist(), strict=True):
        hardware = known.boards.get(boards[board]) if board >= 0 and engine >= 0 else None
        if hardware is not None:
            key = Configuration(Iri(boards[board]), engines[engine], hardware.ram if arena < 0 else arena)
            of_group[group] = configurations.setdefault(key, len(configurations))
    configuration = of_group[groups.of[: columns.size]]
    mask &= configuration >= 0
    online = columns.numbers(TF.online)[mask].astype(np.int8)
    return _Devices(configurations, configuration[mask], columns.raw_names(mask), online)


def _device_rows(query: _GroupedQuery, devices: _Devices, found: list[Row]) -> Iterator[Sequence[Value | None]]:
    """Rows for devices, in the query's order, from rows for their configurations."""
    device, row = _pairs(devices, found)
    keys = [
        -rank if down else rank
        for variable, down in query.order
        for rank in [_id_ranks(devices)[device] if variable == "id" else _value_ranks(found, variable)[row]]
    ]
    order = np.lexsort(keys[::-1]) if keys else np.arange(len(device))
    device, row = device[order], row[order]
    values = {name: [r.get(name) for r in found] for name in query.variables}
    for i in range(0, len(row), BLOCK):
        some, rows = device[i : i + BLOCK], row[i : i + BLOCK].tolist()
        yield from zip(*(_column(v, devices, some, values[v], rows) for v in query.variables), strict=True)


def _pairs(devices: _Devices, found: list[Row]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of a device and a row of its configuration, as two arrays of their numbers."""
    keys = (Configuration(Iri(str(r["hardware"])), str(r["engine"]), cast("int", r["arena"])) for r in found)
    of_row = np.fromiter((devices.configurations[key] for key in keys), np.int64, len(found))
    by_configuration = np.argsort(of_row, kind="stable")
    start = np.searchsorted(of_row[by_configuration], np.arange(len(devices.configurations) + 1))
    times = np.diff(start)[devices.configuration]
    device = np.repeat(np.arange(len(devices.configuration)), times)
    within = np.arange(len(device)) - np.repeat(np.cumsum(times) - times, times)
    return device, by_configuration[start[devices.configuration[device]] + within]


def _id_ranks(devices: _Devices) -> NDArray[np.int64]:
    """[devices]: where each stands in the order of IDs."""
    ids = np.array([name.partition(b":")[2] for name in devices.names.tolist()], "S")
    ranks: NDArray[np.int64] = np.unique(ids, return_inverse=True)[1]
    return ranks


def _value_ranks(found: list[Row], variable: str) -> NDArray[np.int64]:
    """[rows]: where each row's value stands in SPARQL's order."""
    values = [_sparql_order(row.get(variable)) for row in found]
    ranks = {value: i for i, value in enumerate(sorted(set(values)))}
    return np.array([ranks[value] for value in values], np.int64)


def _sparql_order(value: Value | None) -> tuple[int, Any]:
    if value is None:
        return 0, 0
    return (1, value) if isinstance(value, Iri) else (2, value) if isinstance(value, (int, float)) else (3, value)


def _column(
    variable: str, devices: _Devices, some: NDArray[np.int64], values: list[Value | None], rows: list[int]
) -> list[Value | None]:
    """The values of a variable in some of the result's rows."""
    if variable == "id":
        return [id_of(name) for name in devices.names[some].tolist()]
    if variable == "online":
        return [None if n < 0 else n == 1 for n in devices.online[some].tolist()]
    return [values[row] for row in rows]


IndexQuery = Callable[["IndexedStore", Parameters], Table | None]
GROUPED = ("fits-after-quantisation", "runnable", "trainable", "unmet-requirements")
INDEX_QUERIES: dict[str, IndexQuery] = {
    "clients": _clients,
    "devices-by-model": _devices_by_model,
    "fits": _fits,
    "models-for-device": _models_for_device,
    "versions": _versions,
    **{name: partial(_answer_grouped, name) for name in GROUPED},
}
"""The library queries that the index answers."""
