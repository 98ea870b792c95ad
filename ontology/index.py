"""A column index over the devices: counts and selections among a million of them in milliseconds.

It says nothing that the graph does not say: it is built from the graph, kept up by the writes to the graph, and saved
beside it when the store is closed, to be taken up again if nobody has opened the graph meanwhile. While it is being
built, and if the graph says of a device what the columns cannot hold (two arenas, a battery in words), the graph itself
is asked.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray

from ontology import library
from ontology.columns import Codes, Column, Columns, NotHeld, Range, Types, among, counted, exact, fill
from ontology.names import RDF, TF, Iri
from ontology.store import (
    RECORDS,
    Answer,
    Binding,
    Dataset,
    EmbeddedStore,
    Facts,
    Patch,
    Row,
    Triple,
    Value,
    bind,
    each,
    parameter_pattern,
    rows,
    term,
)

_DEVICE = re.compile(r"urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)")
_LINE = re.compile(rb"<urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)>\t([^\n]*)\n")

log = logging.getLogger(__name__)


class IndexedStore(EmbeddedStore):
    """An EmbeddedStore with columns over its devices, from which it answers some of the library's queries (`ANSWERED`),
    whoever asks them, and those of its own methods that the graph alone would take seconds for.

    The index of a folder is the file `{path}.index`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._file = None if path is None else Path(f"{path}.index")
        self._folder = None if path is None else Path(path)
        mark = "" if self._folder is None or not self._folder.is_dir() else _mark(self._folder)
        super().__init__(path)
        self._reading = threading.Lock()  # while the columns change or are read; taken within self._writing
        self._columns: Columns | None = None
        self._changed: set[str] = set()  # devices that were written while the columns were being built
        self._lost = False  # what was built meanwhile is of no use
        self._closing = False
        self._builder: threading.Thread | None = None
        if self._file is not None and mark:
            self._columns = Columns.load(self._file, mark)
        if self._columns is None:
            if next(self._open.quads_for_pattern(None, None, None), None) is None:
                self._columns = Columns()
            else:
                self._rebuild()

    @property
    def indexed(self) -> bool:
        """Whether the columns say all that the graph does. If not, the graph is asked."""
        return self._ready is not None

    @property
    def _ready(self) -> Columns | None:
        return None if self._columns is None or self._columns.odd else self._columns

    def wait(self) -> bool:
        """Waits until the columns are built; False if they cannot hold this graph."""
        builder = self._builder
        if builder is not None:
            builder.join()
        return self.indexed

    def close(self) -> None:
        self._closing = True
        self.wait()
        with self._writing:
            columns, self._columns = self._ready, None
            if self._store is None:
                return
            super().close()
            if columns is not None and self._file is not None and self._folder is not None:
                columns.save(self._file, _mark(self._folder))

    # -------------------------------------------------------------------------------------------------------- writing

    def write(self, facts: Facts, records: Facts | None = None) -> None:
        with self._writing:
            if self._columns is None:
                super().write(facts, records)
                self._note(facts)
                return
            columns, patch = self._columns, Patch([], [], [])
            rest: dict[Iri, dict[Iri, Binding | None]] = {}
            puts: list[tuple[Iri, int, Column, Binding | None]] = []
            named = [(s, name) for s in facts if (name := _name(s)) and name not in columns.odd]
            found = columns.rows([name for _, name in named], make=True).tolist()
            row_of = dict(zip((s for s, _ in named), found, strict=True))
            for s, said in facts.items():
                row = row_of.get(s)
                for p, given in said.items():
                    column = None if row is None else columns.columns.get(p)
                    if row is None or column is None:
                        rest.setdefault(s, {})[p] = given
                        continue
                    if isinstance(column, Types):
                        rest.setdefault(s, {})[p] = given = list(each(given))
                        puts.append((s, row, column, given))
                        continue
                    there = column.decode(column.numbers[row])
                    if type(there) is type(given) and there == given and (there or type(there) is not float):
                        continue  # the common case; that 0.0 is not -0.0 is left to the terms
                    values = list(each(given))
                    wanted = {term(o) for o in values}
                    was = set() if there is None else {term(there)}
                    patch.gone.extend(f"<{s}> <{p}> {o} .\n" for o in was - wanted)
                    patch.new.extend(f"<{s}> <{p}> {o} .\n" for o in wanted - was)
                    puts.append((s, row, column, values))
            patch.extend(self._difference(rest))
            patch.extend(self._difference(records or {}, RECORDS))
            self._apply(patch)
            described = [columns.columns[p] for p in (RDF.type, TF.fleet, TF.board, TF.engine, TF.arenaBytes)]
            with self._reading:
                columns.described += any(column in described for _, _, column, _ in puts)
                for s, row, column, given in puts:
                    try:
                        column.put(row, given)
                    except NotHeld:
                        columns.odd.add(_name(s))
            self._note(s for s in facts if _name(s) in columns.odd)

    def add(self, triples: Iterable[Triple]) -> None:
        triples = list(triples)
        with self._writing:
            super().add(triples)
            self._note({s for s, _, _ in triples})

    def update(self, sparql: str) -> None:
        with self._writing:
            super().update(sparql)
            subjects = _subjects(sparql)
            if subjects is None:
                self._rebuild()
            else:
                self._note(subjects)

    def _note(self, subjects: Iterable[str]) -> None:
        """These subjects have been written. Called with self._writing."""
        devices = {s for s in subjects if _name(s)}
        if self._columns is None:
            self._changed |= devices
        else:
            self._refresh(self._columns, devices)

    def _refresh(self, columns: Columns, devices: Collection[str]) -> None:
        """Reads these devices from the graph."""
        for device in devices:
            terms: dict[Iri, list[Any]] = {}
            for quad in self._open.quads_for_pattern(ox.NamedNode(device), None, None, ox.DefaultGraph()):
                if (predicate := Iri(quad.predicate.value)) in columns.columns:
                    terms.setdefault(predicate, []).append(quad.object)
            name = _name(device)
            with self._reading:
                (row,) = columns.rows([name], make=bool(terms)).tolist()
                columns.odd.discard(name)
                if row >= 0:
                    try:
                        columns.replace(row, {p: [exact(o, p) for o in said] for p, said in terms.items()})
                    except NotHeld:
                        columns.odd.add(name)

    # ------------------------------------------------------------------------------------------------------- building

    def _rebuild(self) -> None:
        """Has the columns built anew, in the background. Called with self._writing, but at first."""
        self._columns = None
        self._lost = True
        if self._builder is None or not self._builder.is_alive():
            self._builder = threading.Thread(target=self._build, name="index", daemon=True)
            self._builder.start()

    def _build(self) -> None:
        while not self._closing:
            with self._writing:
                self._changed, self._lost = set(), False
            columns = self._read()
            while columns is not None:
                with self._writing:
                    if self._lost or self._closing:
                        break
                    changed, self._changed = self._changed, set()
                    if len(changed) <= 1000:
                        self._refresh(columns, changed)
                        self._columns, self._builder = columns, None
                        if columns.odd:
                            log.warning("%d devices are not as their columns must be: no index", len(columns.odd))
                        return
                self._refresh(columns, changed)

    def _read(self) -> Columns | None:
        """The columns from the graph, predicate by predicate; None if the store is being closed."""
        columns = Columns()
        ask = f"SELECT ?s ?o WHERE {{ VALUES ?o {{ <{TF.Device}> }} ?s a ?o }}"
        names = [np.empty(0, "S1")]
        self._each(ask, lambda some, _: names.append(np.array(some, "S")))
        columns.begin(np.unique(np.concatenate(names)))
        for predicate, column in columns.columns.items():
            put = partial(fill, columns, column)
            if not self._each(ask if predicate == RDF.type else f"SELECT ?s ?o WHERE {{ ?s <{predicate}> ?o }}", put):
                return None
        return columns

    def _each(self, query: str, take: Callable[[Sequence[bytes], Sequence[bytes]], None]) -> bool:
        """Hands over the devices of an answer, as `{fleet}:{device}`, and their values, in pieces. False if the store
        is being closed, or changes so that it is all in vain.

        As Oxigraph writes TSV faster than Python reads its solutions; a million of them need little memory so.
        """
        answer = EmbeddedStore.evaluate(self, query)
        assert isinstance(answer, ox.QuerySolutions)
        sink = _Sink(take, lambda: self._closing or self._lost)
        try:
            answer.serialize(cast("IO[bytes]", sink), ox.QueryResultsFormat.TSV)
            sink.take()
        except _Vain:
            return False
        finally:
            del answer  # an error's traceback would take it to another thread, and Oxigraph's answers may not go there
        return True

    # ---------------------------------------------------------------------------------------------------------- asked

    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> Answer:
        text = bind(sparql, bindings)
        if dataset is None and self.indexed:
            for name, answer in ANSWERED.items():
                if (match := _recognised(name).fullmatch(text.strip())) is not None:
                    fleets = None if match["fleet"] == "UNDEF" else re.findall(r'"([^"]*)"', match["fleet"])
                    found = answer(self, fleets)
                    if found is not None:
                        return found
        return super().evaluate(text, dataset)

    def values(self, subjects: Sequence[Iri], predicate: Iri) -> dict[Iri, Value]:
        with self._reading:
            column = None if self._ready is None else self._ready.columns.get(predicate)
            if self._ready is not None and column is not None and not isinstance(column, Types):
                found = self._ready.rows([_name(subject) for subject in subjects], make=False).tolist()
                numbers = column.numbers
                decoded = ((s, column.decode(numbers[row])) for s, row in zip(subjects, found, strict=True) if row >= 0)
                return {s: v for s, v in decoded if v is not None}
        return super().values(subjects, predicate)

    def select(self, where: Mapping[Iri, Range | Collection[Value]]) -> NDArray[np.str_] | None:
        """The devices, as `{fleet}:{device}`, of which the graph says all this: for each predicate a number in a range,
        or one of these values. None if there is no index now: ask the graph."""
        with self._reading:
            columns = self._ready
            if columns is None:
                return None
            mask = columns.numbers(RDF.type) == 1
            for predicate, wanted in where.items():
                column, numbers = columns.columns[predicate], columns.numbers(predicate)
                if isinstance(wanted, Range):
                    mask &= (numbers >= wanted.low) & (numbers <= wanted.high) & (numbers != column.nothing)
                elif isinstance(column, Codes):
                    mask &= among(column, wanted)[numbers]
                else:
                    mask &= np.isin(numbers, [column.encode(v) for v in wanted])
            return columns.names(mask)

    def devices_by_model(self, fleets: Collection[str] | None) -> ox.QuerySolutions | None:
        """The answer to the query `devices-by-model`."""
        named: dict[Value, list[Value]] = {}
        for said in rows(_solutions(EmbeddedStore.evaluate(self, _NAMES))):
            named.setdefault(said["model"], []).append(said["name"])
        with self._reading:
            columns = self._ready
            if columns is None:
                return None
            mask = columns.of_fleets(fleets)
            keys = (TF.currentModel, TF.engine, TF.engineVersion)
            for predicate in keys[1:]:
                mask &= columns.numbers(predicate) >= 0
            most = np.prod([len(columns.codes(predicate).values) + 1 for predicate in keys], dtype=np.float64)
            key: NDArray[Any] = np.zeros(columns.size, np.int32 if most < 2**31 else np.int64)
            for predicate in keys:
                key *= len(columns.codes(predicate).values) + 1
                key += columns.numbers(predicate)
                key += 1
            online = columns.numbers(TF.online) == 1
            if not mask.all():
                key, online = key[mask], online[mask]
            distinct, counts, on = counted(key, online)
            found: list[Row] = []
            for code, n, m in zip(distinct.tolist(), counts.tolist(), on.tolist(), strict=True):
                row: Row = {}
                for predicate, variable in zip(reversed(keys), ("version", "engine", "running"), strict=True):
                    values = columns.codes(predicate)
                    code, number = divmod(code, len(values.values) + 1)
                    if (given := values.decode(number - 1)) is not None:
                        row[variable] = given
                for name in named.get(row.get("running", ""), [None]):
                    found.append(row | {"devices": n, "online": m} | ({} if name is None else {"name": name}))
        found.sort(key=lambda r: (-cast("int", r["devices"]), str(r.get("running", "")), r["engine"], r["version"]))
        return _as_answer(("running", "name", "engine", "version", "devices", "online"), found)

    def fits(self, fleets: Collection[str] | None) -> ox.QuerySolutions | None:
        """The answer to the query `fits`."""
        models = rows(_solutions(EmbeddedStore.evaluate(self, _MODELS)))
        boards = rows(_solutions(EmbeddedStore.evaluate(self, _BOARDS)))
        observed = {
            (row["board"], row["property"]) for row in rows(_solutions(EmbeddedStore.evaluate(self, _OBSERVED)))
        }
        inputs: dict[Value, list[Value]] = {}
        for row in rows(_solutions(EmbeddedStore.evaluate(self, _INPUTS))):
            inputs.setdefault(row["model"], []).append(row["property"])
        if len(set(models.column("model"))) < len(models) or len(set(boards.column("board"))) < len(boards):
            return None  # one of them has two names or two amounts of RAM: that is for the graph to work out
        if not all(isinstance(v, int) for row in (*models, *boards) for k, v in row.items() if k in _BYTES):
            return None
        with self._reading:
            columns = self._ready
            if columns is None:
                return None
            of_board, engines = columns.codes(TF.board), columns.codes(TF.engine)
            ram, flash = (np.full(len(of_board.values) + 1, -1, np.int64) for _ in range(2))
            for row in boards:
                if (code := of_board.codes.get(str(row["board"]))) is not None:
                    ram[code], flash[code] = cast("int", row["ram"]), cast("int", row["flash"])
            kinds, counts = columns.kinds(fleets)
            kinds[2] = np.where(kinds[2] < 0, ram[kinds[0]], kinds[2])
            known = (kinds[0] >= 0) & (kinds[1] >= 0) & (ram[kinds[0]] >= 0)
            kinds, counts = kinds[:, known], counts[known]
            values, engine_codes = list(of_board.values), dict(engines.codes)
        needed = {seen for properties in inputs.values() for seen in properties}
        able = {seen: np.array([(board, seen) in observed for board in values], np.bool_) for seen in needed}
        found = []
        for row in models:
            fit = (kinds[1] == engine_codes.get(str(row["engine"]), -2)) & (kinds[2] >= row["takes"])
            fit &= flash[kinds[0]] >= row["storage"]
            for seen in inputs.get(row["model"], ()):
                fit &= able[seen][kinds[0]]
            devices = int(counts[fit].sum())
            if devices:
                training = int(counts[fit & (kinds[2] >= row["bytes"])].sum()) if "bytes" in row else 0
                found.append({k: row[k] for k in ("model", "name")} | {"devices": devices, "training": training})
        found.sort(key=lambda r: (-cast("int", r["devices"]), str(r["name"]), str(r["model"])))
        return _as_answer(("model", "name", "devices", "training"), found)


ANSWERED: dict[str, Callable[[IndexedStore, Collection[str] | None], ox.QuerySolutions | None]] = {
    "devices-by-model": IndexedStore.devices_by_model,
    "fits": IndexedStore.fits,
}
"""The queries of the library that the index answers, each with its one parameter, fleet, free or bound."""

_PREFIXES = "PREFIX schema: <https://schema.org/> PREFIX tf: <https://w3id.org/tinyfleet#> "
_NAMES = _PREFIXES + "SELECT ?model ?name WHERE { ?model a tf:Model ; schema:name ?name }"
_MODELS = (
    _PREFIXES
    + """SELECT ?model ?name ?engine ?takes ?storage ?bytes WHERE {
    ?model a tf:Model ; schema:name ?name ; tf:engine ?engine ; tf:runRamBytes ?takes ; tf:storageBytes ?storage .
    OPTIONAL { ?model tf:trainRamBytes ?bytes } }"""
)
_INPUTS = _PREFIXES + "SELECT ?model ?property WHERE { ?model a tf:Model ; tf:inputProperty ?property }"
_BOARDS = _PREFIXES + "SELECT ?board ?ram ?flash WHERE { ?board tf:ramBytes ?ram ; tf:flashBytes ?flash }"
_OBSERVED = _PREFIXES + "SELECT ?board ?property WHERE { ?board tf:observes ?property }"
_BYTES = ("takes", "storage", "bytes", "ram", "flash")


class _Vain(Exception):
    """What is being read is of no use any more."""


class _Sink:
    """Takes TSV as it is written, and hands over its lines in large pieces."""

    PIECE = 4 << 20

    def __init__(self, take: Callable[[Sequence[bytes], Sequence[bytes]], None], vain: Callable[[], bool]) -> None:
        self._take = take
        self._vain = vain
        self._text = bytearray()

    def write(self, part: bytes) -> int:
        self._text += part
        if len(self._text) >= self.PIECE:
            self.take()
        return len(part)

    def flush(self) -> None:
        """Nothing is held back but half lines."""

    def take(self) -> None:
        if self._vain():
            raise _Vain
        end = self._text.rfind(b"\n") + 1
        found = _LINE.findall(bytes(self._text[:end]))
        del self._text[:end]
        if found:
            names, texts = zip(*found, strict=True)
            self._take(names, texts)


def _name(subject: str) -> bytes:
    """`{fleet}:{device}` of a device's IRI; nothing if it is none."""
    match = _DEVICE.fullmatch(subject)
    return b"" if match is None else match[1].encode()


def _mark(folder: Path) -> str:
    """What a folder of RocksDB looks like from outside: whoever opens it to write changes that."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.name != "LOCK")
    return hashlib.sha256(repr(files).encode()).hexdigest()


@cache
def _recognised(name: str) -> re.Pattern[str]:
    """The query of the library, its parameters free or bound to simple texts."""
    return re.compile(parameter_pattern(library.text(name).strip(), r'UNDEF|(?:"[A-Za-z0-9._-]*" ?)*'))


def _solutions(answer: Answer) -> ox.QuerySolutions:
    assert isinstance(answer, ox.QuerySolutions)
    return answer


def _as_answer(variables: Sequence[str], found: Sequence[Row]) -> ox.QuerySolutions:
    """Rows as the answer to a SELECT."""
    lines = ["\t".join(f"?{v}" for v in variables)]
    lines += ["\t".join(str(term(row[v])) if v in row else "" for v in variables) for row in found]
    answer = ox.parse_query_results("\n".join([*lines, ""]).encode(), ox.QueryResultsFormat.TSV)
    assert isinstance(answer, ox.QuerySolutions)
    return answer


# An update that says plainly which subjects it changes: what Store.write, add and remove send, no more. No \\u in it,
# which would stand for other characters than are seen.
_I = r"<[^<>\\\s]*>"
_O = rf"(?:{_I}|\"(?:[^\"\\\n\r]|\\[^uU\n\r])*\"(?:\^\^{_I})?)"
_DATA = rf"INSERT DATA \{{\n(?:{_I} {_I} {_O} \.\n)*\}}"
_WRITE = (
    rf"DELETE \{{ \?s \?p \?o \}} WHERE \{{ VALUES \(\?s \?p\) \{{ (?:\({_I} {_I}\) ?)+ \}} \?s \?p \?o \}} ;\n{_DATA}"
)
_REMOVE = rf"DELETE WHERE \{{ {_I} \?p \?o \}} ; DELETE WHERE \{{ GRAPH <{RECORDS}> \{{ {_I} \?p \?o \}} \}}"
_PLAIN = re.compile(rf"{_WRITE}|{_DATA}|{_REMOVE}")
_SUBJECT = re.compile(rf"(?:^|\(|WHERE \{{ )<({_I[1:-1]})>", re.MULTILINE)


def _subjects(update: str) -> set[str] | None:
    """The subjects that an update changes, and perhaps others; None if it does not say so plainly."""
    return set(_SUBJECT.findall(update)) if _PLAIN.fullmatch(update) else None
