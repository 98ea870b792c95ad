"""The questions of the library that the column index answers, in milliseconds where SPARQL reads every device.

Devices of one engine, on one board, with one arena are alike in what fits them: one kind, and kinds are few. What fits
a kind is asked of the graph, by the very text of the query, or worked out from models and boards that are read once and
kept until one of them changes. What the columns then add is which devices, or how many, are of which kind.

Each answer is that of the query on the graph, or none: then the graph is asked.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.columns import Columns, NotIndexable, alike, among, exact, id_of
from tinyfleet.ontology.store.store import Row, Rows, Value, bind, parameter_pattern, term
from tinyfleet.ontology.vocabulary.namespaces import RDF, TF, Iri

if TYPE_CHECKING:
    from tinyfleet.ontology.store.index import IndexedStore

Bound = Mapping[str, list[Value] | None]
"""What each parameter of a query is bound to; None if it is free."""
MOST_PAIRS = 400_000
"""Kinds times models, of which the graph is asked at once."""
PIECE = 10_000
_PREFIXES = "PREFIX schema: <https://schema.org/> PREFIX tf: <https://w3id.org/tinyfleet#> "


@dataclass
class Table:
    """An answer: its variables, and rows of their values, None where one is unbound. It can be read once."""

    variables: Sequence[str]
    rows: Iterator[Sequence[Value | None]]

    def as_rows(self) -> Rows:
        return Rows(
            self.variables,
            [{name: v for name, v in zip(self.variables, row, strict=True) if v is not None} for row in self.rows],
        )

    def as_solutions(self) -> ox.QuerySolutions:
        answer = ox.parse_query_results(cast("IO[bytes]", _Text(self)), ox.QueryResultsFormat.TSV)
        assert isinstance(answer, ox.QuerySolutions)
        return answer


class _Text:
    """A table as SPARQL's TSV, written as it is read."""

    def __init__(self, table: Table) -> None:
        self._rows = table.rows
        self._text = ("\t".join(f"?{v}" for v in table.variables) + "\n").encode()

    def read(self, size: int) -> bytes:
        if not self._text:
            lines = ["\t".join("" if v is None else _to_tsv(v) for v in row) for row in islice(self._rows, PIECE)]
            self._text = "".join(f"{line}\n" for line in lines).encode()
        part, self._text = self._text[:size], self._text[size:]
        return part


_SIMPLE = re.compile(r"[A-Za-z0-9 ._:-]*")


def _to_tsv(value: Value) -> str:
    kind = type(value)
    if kind is int:
        return str(value)
    if kind is str and _SIMPLE.fullmatch(cast("str", value)):
        return f'"{value}"'
    return str(term(value))


def answer_from_index(store: "IndexedStore", text: str) -> Table | None:
    """The answer of the index to a query; None if it has none."""
    name, text = _match_library_query(text)
    match = _parse_library_query(name).fullmatch(text) if name in INDEX_QUERIES else None
    if match is None:
        return None
    bound: dict[str, list[Value] | None] = {}
    for parameter, given in match.groupdict().items():
        if parameter != "LIMIT":
            values = [Iri(iri) if iri else text for text, iri in _VALUE.findall(given)]
            if len(set(values)) < len(values):
                return None
            bound[parameter] = None if given == "UNDEF" else values
    found = INDEX_QUERIES[name](store, bound)
    return (
        found
        if found is None or match["LIMIT"] is None
        else Table(found.variables, islice(found.rows, int(match["LIMIT"])))
    )


def _match_library_query(text: str) -> tuple[str, str]:
    """The name of the query of the library that begins as this one, empty if none does; and the query, trimmed. Most
    that are asked are none, and this is all that they lose."""
    text = text.strip()
    return _beginnings().get(text.partition("\n")[0], ""), text


@cache
def _beginnings() -> dict[str, str]:
    return {library.text(name).partition("\n")[0]: name for name in (*INDEX_QUERIES, *COUNT_QUERIES)}


_VALUE = re.compile(r'"([^"]*)"|<([^>]*)>')


@cache
def _parse_library_query(name: str) -> re.Pattern[str]:
    """The query of the library, its parameters free or bound to simple texts and IRIs, perhaps with a limit."""
    simple = r'UNDEF|(?:(?:[0-9]+|"[A-Za-z0-9._-]*"|<[A-Za-z][A-Za-z0-9+.-]*:[^<>"{}|^`\\\x00-\x20]*>) ?)*'
    return re.compile(parameter_pattern(library.text(name).strip(), simple) + r"(?:\s+LIMIT (?P<LIMIT>[0-9]{1,9}))?")


def _table(variables: Sequence[str], found: Sequence[Row]) -> Table:
    return Table(variables, ([row.get(v) for v in variables] for row in found))


def _select_rows(store: "IndexedStore", sparql: str) -> list[Row]:
    """The rows of a SELECT on the graph. Raises NotIndexable if a value would not come out of Python as it went in."""
    answer = store.on_graph(sparql)
    names = [variable.value for variable in answer.variables]
    return [{name: exact(node) for name in names if (node := solution[name]) is not None} for solution in answer]


# --------------------------------------------------------------------------------------- models and boards, read once


class _Model(NamedTuple):
    iri: Iri
    name: str
    engine: str
    takes: int
    storage: int
    train: int | None
    parameters: int | None
    inputs: list[Value]
    ways: list[tuple[int, int, int]]
    """Of each way to train it: bytes, how many layers, of how many the biases alone."""


class _Requirements(NamedTuple):
    models: list[_Model]
    ram: dict[Value, int]
    flash: dict[Value, int]
    observed: set[tuple[Value, Value]]


def _requirements(store: "IndexedStore") -> _Requirements | None:
    """What the models need and the boards have. None if one says two things of a kind, or no whole number."""
    try:
        models = _select_rows(store, _MODELS)
        boards = _select_rows(store, _BOARDS)
        inputs = _listed(_select_rows(store, _INPUTS), "property")
        ways = _listed(_select_rows(store, _WAYS), "bytes", "full", "bias")
        observed = {(row["board"], row["property"]) for row in _select_rows(store, _OBSERVED)}
    except NotIndexable:
        return None
    if len({row["model"] for row in models}) < len(models) or len({row["board"] for row in boards}) < len(boards):
        return None
    numbers = [v for row in (*models, *boards) for k, v in row.items() if k not in ("model", "name", "engine", "board")]
    numbers += [v for each in ways.values() for way in each for v in way]
    texts = [v for row in models for v in (row["name"], row["engine"])]
    if not all(type(v) is int and 0 <= v < 2**62 for v in numbers) or not all(type(v) is str for v in texts):
        return None
    found = []
    for row in models:
        said: list[Any] = [
            row.get(name) for name in ("model", "name", "engine", "takes", "storage", "train", "parameters")
        ]
        said += [[seen for (seen,) in inputs.get(row["model"], [])], ways.get(row["model"], [])]
        found.append(_Model(*said))
    ram = {row["board"]: cast("int", row["ram"]) for row in boards}
    return _Requirements(
        found, ram, {row["board"]: cast("int", row["flash"]) for row in boards if "flash" in row}, observed
    )


def _listed(rows: Sequence[Row], *names: str) -> dict[Value, list[tuple[Value, ...]]]:
    found: dict[Value, list[tuple[Value, ...]]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(tuple(row[name] for name in names))
    return found


_MODELS = (
    _PREFIXES
    + """SELECT ?model ?name ?engine ?takes ?storage ?train ?parameters WHERE {
    ?model a tf:Model ; schema:name ?name ; tf:engine ?engine ; tf:runRamBytes ?takes ; tf:storageBytes ?storage .
    OPTIONAL { ?model tf:trainRamBytes ?train } OPTIONAL { ?model tf:parameters ?parameters } }"""
)
_WAYS = (
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


def _names(store: "IndexedStore") -> dict[Value, list[tuple[Value, ...]]] | None:
    try:
        return _listed(_select_rows(store, _NAMES), "name")
    except NotIndexable:
        return None


# ------------------------------------------------------------------------------------------------------------- counts


def _counted(columns: Columns, bound: Bound, by: Sequence[Iri]) -> Iterator[tuple[list[Value | None], int, int]]:
    """How many devices there are of each combination of values, and how many of them are online. Of the engine and its
    version, those that say none do not count."""
    groups = columns.by_model
    of = (RDF.type, TF.fleet, TF.currentModel, TF.engine, TF.engineVersion, TF.online)
    chosen = columns.chosen(groups, bound["fleet"])
    for predicate in (TF.engine, TF.engineVersion):
        chosen = chosen[groups.keys[of.index(predicate), chosen] >= 0]
    keys, places = alike([groups.keys[of.index(predicate), chosen] for predicate in by])
    counts = groups.counts[chosen]
    on = counts * (groups.keys[of.index(TF.online), chosen] == 1)
    values = [[*columns.codes(predicate).values, None] for predicate in by]
    sums = (np.bincount(places, n, keys.shape[1]).astype(np.int64).tolist() for n in (counts, on))
    for key, n, m in zip(keys.T.tolist(), *sums, strict=True):
        yield [of[code] for of, code in zip(values, key, strict=True)], n, m


def _devices_by_model(store: "IndexedStore", bound: Bound) -> Table | None:
    named = store.kept(_names)
    if named is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        counted = list(_counted(columns, bound, (TF.currentModel, TF.engine, TF.engineVersion)))
    found = [
        (running, name, engine, version, n, m)
        for (running, engine, version), n, m in counted
        for (name,) in ([(None,)] if running is None else named.get(running, [(None,)]))
    ]
    found.sort(key=lambda row: (-row[4], row[0] or "", row[2], row[3]))
    return Table(("running", "name", "engine", "version", "devices", "online"), iter(found))


def _versions(store: "IndexedStore", bound: Bound) -> Table | None:
    with store.reading() as columns:
        if columns is None:
            return None
        counted = list(_counted(columns, bound, (TF.engine, TF.engineVersion)))
    counted.sort(key=lambda row: (-row[1], row[0]))
    return Table(("engine", "version", "devices", "online"), ((*values, n, m) for values, n, m in counted))


def _fits(store: "IndexedStore", bound: Bound) -> Table | None:
    known = store.kept(_requirements)
    if known is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        groups = columns.by_kind
        chosen = columns.chosen(groups, bound["fleet"])
        _, _, board, engine, arena = groups.keys[:, chosen]
        counts, boards, engines = groups.counts[chosen], columns.codes(TF.board).values, columns.codes(TF.engine).codes
        boards, engines = list(boards), dict(engines)
    ram, flash = (np.array([*(of.get(b, -1) for b in boards), -1]) for of in (known.ram, known.flash))
    arena = np.where(arena < 0, ram[board], arena)
    ready = (engine >= 0) & (ram[board] >= 0) & (flash[board] >= 0)
    board, engine, arena, counts = (of[ready] for of in (board, engine, arena, counts))
    flash = flash[board]
    able = {
        seen: np.array([*((b, seen) in known.observed for b in boards), False])[board]
        for seen in {seen for model in known.models for seen in model.inputs}
    }
    found: list[Row] = []
    for model in known.models:
        fit = (engine == engines.get(model.engine, -2)) & (arena >= model.takes) & (flash >= model.storage)
        for seen in model.inputs:
            fit &= able[seen]
        if devices := int(counts[fit].sum()):
            training = 0 if model.train is None else int(counts[fit & (arena >= model.train)].sum())
            found.append({"model": model.iri, "name": model.name, "devices": devices, "training": training})
    found.sort(key=lambda r: (-cast("int", r["devices"]), str(r["name"]), str(r["model"])))
    return _table(("model", "name", "devices", "training"), found)


# ------------------------------------------------------------------------------------------------------ of one device


def _models_for_device(store: "IndexedStore", bound: Bound) -> Table | None:
    ids, fleets, wanted = (bound[name] for name in ("id", "fleet", "model"))
    known = store.kept(_requirements)
    if known is None or ids is None or fleets is None or len(ids) != 1 or len(fleets) != 1:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        (row,) = columns.rows([f"{fleets[0]}:{ids[0]}".encode()], make=False).tolist()
        of = {p: columns.columns[p] for p in (TF.fleet, TF.board, TF.engine, TF.arenaBytes)}
        said = {p: None if row < 0 else column.decode(column.numbers[row]) for p, column in of.items()}
        there = row >= 0 and all(columns.columns[p].numbers[row] == 1 for p in (RDF.type, TF.deviceId))
    board, engine = said[TF.board], said[TF.engine]
    found: list[tuple[Any, Sequence[Value | None]]] = []
    if there and said[TF.fleet] is not None and board is not None and board in known.ram and board in known.flash:
        arena = cast("int", known.ram[board] if said[TF.arenaBytes] is None else said[TF.arenaBytes])
        for model in known.models:
            if wanted is not None and model.iri not in wanted:
                continue
            if model.engine != engine or arena < model.takes or known.flash[board] < model.storage:
                continue
            if not all((board, seen) in known.observed for seen in model.inputs):
                continue
            ways = [way for way in model.ways if way[0] <= arena]
            layers, biases = (max((way[i] for way in ways), default=0) for i in (1, 2))
            more = -1 if model.parameters is None else model.parameters
            place = not model.inputs, -layers, -biases, -more, model.name, model.iri
            room = arena - model.takes
            said_of = (
                model.iri,
                model.name,
                ids[0],
                len(model.inputs),
                layers,
                biases,
                model.takes,
                room,
                model.parameters,
            )
            found.append((place, said_of))
    variables = "model", "name", "id", "observed", "layers", "biases", "takes", "room", "parameters"
    return Table(variables, (said_of for _, said_of in sorted(found, key=lambda row: row[0])))


def _clients(store: "IndexedStore", bound: Bound) -> Table | None:
    models = bound["model"]
    if models is None:
        return None
    try:
        wanted = _select_rows(store, bind(_LEARNING, {"model": models}))
        boards = _select_rows(store, _BOARD_IDS)
    except NotIndexable:
        return None
    by_board = {row["board"]: row["id"] for row in boards}
    if len(by_board) < len(boards) or not all(type(row["takes"]) is int for row in wanted):
        return None
    found: list[tuple[str, Sequence[Value | None]]] = []
    with store.reading() as columns:
        if columns is None:
            return None
        groups = columns.by_model
        chosen = columns.chosen(groups, bound["fleet"])
        chosen = chosen[groups.keys[5, chosen] == 1]
        there = columns.numbers(TF.deviceId) == 1
        of_model, of_engine, of_board = (columns.codes(p) for p in (TF.currentModel, TF.engine, TF.board))
        arenas, on = (columns.numbers(p) for p in (TF.arenaBytes, TF.board))
        for row in wanted:
            code = of_model.codes.get(str(row["model"]), -2)
            engine = of_engine.codes.get(str(row["engine"]), -2)
            ready = np.zeros(len(groups.counts) + 1, np.bool_)  # the last is for rows of no group
            ready[chosen[(groups.keys[2, chosen] == code) & (groups.keys[3, chosen] == engine)]] = True
            mask = ready[groups.of[: columns.size]] & there & (arenas >= max(0, cast("int", row["takes"]))) & (on >= 0)
            for name, arena, board in zip(
                columns.raw_names(mask).tolist(), arenas[mask].tolist(), on[mask].tolist(), strict=True
            ):
                if (id := by_board.get(Iri(of_board.values[board]))) is not None:
                    about = Iri(f"urn:tinyfleet:{name.decode()}")
                    found.append((id_of(name), (id_of(name), about, id, arena, row["takes"])))
    return Table(("id", "device", "board", "arena", "takes"), (said for _, said in sorted(found, key=lambda r: r[0])))


_LEARNING = (
    _PREFIXES
    + """SELECT ?model ?engine ?takes WHERE {
    VALUES ?model { UNDEF } ?model a tf:Model ; tf:engine ?engine ; tf:trainRamBytes ?takes }"""
)
_BOARD_IDS = _PREFIXES + "SELECT ?board ?id WHERE { ?board tf:boardId ?id }"


# ---------------------------------------------------------------------------------------------------- kinds, devices


class _GroupedQuery(NamedTuple):
    """A query of the library that asks of kinds first, as text."""

    variables: list[str]
    of_kinds: str
    """What it asks of kinds, with `VALUES (?hardware ?engine ?arena) { … }` for {}."""
    order: list[tuple[str, bool]]
    """What its rows are ordered by, and whether downwards."""


_KINDS = re.compile(
    r"(?P<head>.*?)\nSELECT (?P<variables>(?:\?\w+ )+)WHERE \{\n"
    r"(?:  VALUES \?\w+ \{ UNDEF \}\n)+"
    r"  \{\n(?P<before>    SELECT .*?)"
    r"      # Devices on one board, [^\n]*\n      \{\n        SELECT DISTINCT \?hardware \?engine \?arena WHERE \{\n"
    r".*?\n        \}\n      \}\n(?P<after>.*?)\n  \}\n"
    r"  \?device tf:board \?hardware ; tf:engine \?engine ; a tf:Device ; tf:fleet \?fleet ; tf:deviceId \?id \.\n"
    r"  \?hardware tf:ramBytes \?ram \.\n"
    r"  OPTIONAL \{ \?device tf:arenaBytes \?said \}\n"
    r"  FILTER\(COALESCE\(\?said, \?ram\) = \?arena\)\n"
    r"(?:  OPTIONAL \{ \?device tf:online \?online \}\n)?"
    r"\}\nORDER BY (?P<order>[^\n]*)\n",
    re.DOTALL,
)


@cache
def _parse_grouped_query(name: str) -> _GroupedQuery:
    match = _KINDS.fullmatch(library.text(name))
    assert match is not None, f"{name}.rq has not the form of a query of kinds"
    prefixes = "\n".join(re.findall("^PREFIX .*$", match["head"], re.MULTILINE))
    order = [(found["down"] or found["up"], bool(found["down"])) for found in _ORDER.finditer(match["order"])]
    of_kinds = f"{prefixes}\n{match['before']}      VALUES (?hardware ?engine ?arena) {{ KINDS }}\n{match['after']}"
    return _GroupedQuery(match["variables"].replace("?", "").split(), of_kinds, order)


_ORDER = re.compile(r"DESC\(\?(?P<down>\w+)\)|\?(?P<up>\w+)")


def _answer_grouped(name: str, store: "IndexedStore", bound: Bound) -> Table | None:
    """The answer to a query that asks of kinds first: what fits those that there are, asked of the graph; then the
    devices of each."""
    known, query = store.kept(_requirements), _parse_grouped_query(name)
    if known is None:
        return None
    with store.reading() as columns:
        if columns is None:
            return None
        groups = columns.by_kind
        chosen = columns.chosen(groups, bound["fleet"])
        there = columns.numbers(TF.deviceId) == 1
        if (ids := bound["id"]) is not None:
            fleets = {str(v) for v in columns.codes(TF.fleet).values}
            wanted = columns.rows([f"{fleet}:{id}".encode() for fleet in fleets for id in ids], make=False)
            mask = np.zeros(columns.size, np.bool_)
            mask[wanted[wanted >= 0]] = True
            there &= mask
            chosen = np.intersect1d(chosen, groups.of[: columns.size][there])
        kinds: dict[tuple[Value, Value, Value], int] = {}
        kind_of = np.full(len(groups.counts) + 1, -1, np.int32)  # the last is for rows of no group
        boards, engines = columns.codes(TF.board).values, columns.codes(TF.engine).values
        for group, (_, _, board, engine, arena) in zip(chosen.tolist(), groups.keys[:, chosen].T.tolist(), strict=True):
            if board >= 0 and engine >= 0 and boards[board] in known.ram:
                kind = Iri(boards[board]), engines[engine], known.ram[boards[board]] if arena < 0 else arena
                kind_of[group] = kinds.setdefault(kind, len(kinds))
        if len(kinds) * (len(known.models) if bound["model"] is None else len(bound["model"])) > MOST_PAIRS:
            return None
        kind = kind_of[groups.of[: columns.size]]
        there &= kind >= 0
        kind = kind[there]
        online = columns.numbers(TF.online)[there].astype(np.int8)
        names = columns.raw_names(there)
    said = " ".join(f"({' '.join(str(term(v)) for v in kind)})" for kind in kinds)
    text = query.of_kinds.replace("KINDS", said)
    if bound["model"] is not None:
        text = text.replace(
            "VALUES ?model { UNDEF }", f"VALUES ?model {{ {' '.join(f'<{m}>' for m in bound['model'])} }}"
        )
    try:
        found = _select_rows(store, text)
    except NotIndexable:
        return None
    return Table(query.variables, _expanded(query, kinds, found, kind, names, online))


def _expanded(
    query: _GroupedQuery,
    kinds: Mapping[tuple[Value, Value, Value], int],
    found: list[Row],
    kind: NDArray[np.int32],
    names: NDArray[np.bytes_],
    online: NDArray[np.int8],
) -> Iterator[Sequence[Value | None]]:
    """Rows for devices from rows for their kinds. kind, names, online: [devices]."""
    of = np.array([kinds[row["hardware"], row["engine"], row["arena"]] for row in found], np.int64)
    by_kind = np.argsort(of, kind="stable")
    start = np.searchsorted(of[by_kind], np.arange(len(kinds) + 1))
    times = np.diff(start)[kind]
    device = np.repeat(np.arange(len(kind)), times)
    within = np.arange(len(device)) - np.repeat(np.cumsum(times) - times, times)
    row = by_kind[start[kind[device]] + within]
    keys: list[NDArray[Any]] = []
    for variable, down in query.order:
        if variable == "id":
            ids = np.array([name.partition(b":")[2] for name in names.tolist()], "S")
            rank = np.unique(ids, return_inverse=True)[1][device]
        else:
            given = [_place(r.get(variable)) for r in found]
            places = {value: i for i, value in enumerate(sorted(set(given)))}
            rank = np.array([places[value] for value in given], np.int64)[row]
        keys.append(-rank if down else rank)
    order = np.lexsort(keys[::-1]) if keys else np.arange(len(device))
    device, row = device[order], row[order]
    values = {name: [r.get(name) for r in found] for name in query.variables if name not in ("id", "online")}
    for i in range(0, len(row), PIECE):
        devices, rows = device[i : i + PIECE].tolist(), row[i : i + PIECE].tolist()
        columns: list[list[Value | None]] = []
        for variable in query.variables:
            if variable == "id":
                columns.append([id_of(name) for name in names[devices].tolist()])
            elif variable == "online":
                columns.append([None if n < 0 else n == 1 for n in online[devices].tolist()])
            else:
                columns.append([values[variable][r] for r in rows])
        yield from zip(*columns, strict=True)


def _place(value: Value | None) -> tuple[int, Any]:
    """Where a value stands in SPARQL's order."""
    if value is None:
        return 0, 0
    return (1, value) if isinstance(value, Iri) else (2, value) if isinstance(value, (int, float)) else (3, value)


Answerer = Callable[["IndexedStore", Bound], Table | None]
GROUPED = ("fits-after-quantisation", "runnable", "trainable", "why-not")
INDEX_QUERIES: dict[str, Answerer] = {
    "clients": _clients,
    "devices-by-model": _devices_by_model,
    "fits": _fits,
    "models-for-device": _models_for_device,
    "versions": _versions,
    **{name: partial(_answer_grouped, name) for name in GROUPED},
}
"""The queries of the library that the index answers."""


# ------------------------------------------------------------------------------------------- counts within a query


def with_counts(store: "IndexedStore", text: str) -> str | None:
    """A query of the library with the counts of devices that it has in a subquery, as values; None if it is none."""
    name, text = _match_library_query(text)
    if name not in COUNT_QUERIES or _parse_library_query(name).fullmatch(text) is None:
        return None
    pattern, count = COUNT_QUERIES[name]
    match = pattern.search(text)
    assert match is not None, f"{name}.rq does not count as it should"
    given = match["fleet"]
    fleets: list[Value] = [text for text, _ in _VALUE.findall(given)]
    known = store.kept(_requirements)
    with store.reading() as columns:
        if columns is None or known is None or len(set(fleets)) < len(fleets):
            return None
        values = count(columns, known, None if given == "UNDEF" else fleets)
    return text[: match.start()] + values + text[match.end() :]


def _of_boards(columns: Columns, known: _Requirements, fleets: list[Value] | None) -> str:
    boards, (counts, online) = _online(columns, TF.board, fleets)
    lines = (f"(<{b}> {n} {m})" for b, n, m in zip(boards, counts, online, strict=True) if n)
    return f"VALUES (?hardware ?alike ?ready) {{ {' '.join(lines)} }}"


def _of_models(columns: Columns, known: _Requirements, fleets: list[Value] | None) -> str:
    models, (counts, _) = _online(columns, TF.currentModel, fleets)
    lines = (f"(<{model}> {n})" for model, n in zip(models, counts, strict=True) if n)
    return f"VALUES (?model ?alike) {{ {' '.join(lines)} }}"


def _online(columns: Columns, predicate: Iri, fleets: list[Value] | None) -> tuple[list[str], list[list[int]]]:
    """How many devices have each of a predicate's values, and how many of these are online."""
    codes, values = columns.numbers(predicate), columns.codes(predicate).values
    mask = (columns.numbers(RDF.type) == 1) & (codes >= 0)
    fleet = columns.numbers(TF.fleet)
    mask &= fleet >= 0 if fleets is None else among(columns.codes(TF.fleet), fleets)[fleet]
    online = mask & (columns.numbers(TF.online) == 1)
    return values, [np.bincount(codes[chosen], minlength=len(values)).tolist() for chosen in (mask, online)]


def _of_kinds(columns: Columns, known: _Requirements, fleets: list[Value] | None) -> str:
    groups = columns.by_kind
    chosen = columns.chosen(groups, fleets)
    boards, engines = columns.codes(TF.board).values, columns.codes(TF.engine).values
    counts: dict[tuple[str, int], int] = {}
    for n, (board, engine, arena) in zip(
        groups.counts[chosen].tolist(), groups.keys[2:, chosen].T.tolist(), strict=True
    ):
        if board >= 0 and engine >= 0 and (ram := known.ram.get(Iri(boards[board]))) is not None:
            kind = engines[engine], ram if arena < 0 else arena
            counts[kind] = counts.get(kind, 0) + n
    lines = (f"({term(engine)} {arena} {n})" for (engine, arena), n in counts.items())
    return f"VALUES (?engine ?arena ?alike) {{ {' '.join(lines)} }}"


def _block(text: str) -> re.Pattern[str]:
    fleets = r'(?P<fleet>UNDEF|(?:"[A-Za-z0-9._-]*" ?)*)'
    return re.compile(r"\s+".join(re.escape(part).replace("UNDEF", fleets) for part in text.split()))


_BOARDS_COUNTED = _block(
    """SELECT ?hardware (COUNT(?device) AS ?alike) (SUM(IF(COALESCE(?on, false), 1, 0)) AS ?ready) WHERE {
    VALUES ?fleet { UNDEF } ?device a tf:Device ; tf:fleet ?fleet ; tf:board ?hardware .
    OPTIONAL { ?device tf:online ?on } } GROUP BY ?hardware"""
)
_MODELS_COUNTED = _block(
    """SELECT ?model (COUNT(?device) AS ?alike) WHERE { VALUES ?fleet { UNDEF }
    ?device a tf:Device ; tf:fleet ?fleet ; tf:currentModel ?model . } GROUP BY ?model"""
)
_KINDS_COUNTED = _block(
    """SELECT ?engine ?arena (COUNT(?device) AS ?alike) WHERE { VALUES ?fleet { UNDEF }
    ?device a tf:Device ; tf:fleet ?fleet ; tf:engine ?engine ; tf:board/tf:ramBytes ?ram .
    OPTIONAL { ?device tf:arenaBytes ?said } BIND(COALESCE(?said, ?ram) AS ?arena) } GROUP BY ?engine ?arena"""
)
COUNT_QUERIES: dict[str, tuple[re.Pattern[str], Callable[[Columns, _Requirements, list[Value] | None], str]]] = {
    "boards": (_BOARDS_COUNTED, _of_boards),
    "coverage": (_BOARDS_COUNTED, _of_boards),
    "models": (_MODELS_COUNTED, _of_models),
    "sensors": (_BOARDS_COUNTED, _of_boards),
    "training-options": (_KINDS_COUNTED, _of_kinds),
}
"""The queries of the library that count devices in a subquery, which the index does for them."""
