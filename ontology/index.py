"""A column index over the devices: counts and selections among a million of them in milliseconds.

It says nothing that the graph does not say: it is built from the graph, kept up by the writes to the graph, and saved
beside it when the store is closed, to be taken up again if nobody has opened the graph meanwhile. While it is being
built, and if the graph says of a device what the columns cannot hold (two arenas, a battery in words), the graph itself
is asked.
"""

import hashlib
import json
import logging
import re
import threading
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray

from ontology import library
from ontology.names import RDF, TF, Iri
from ontology.store import (
    Answer,
    Binding,
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
    value,
)

FORM = 1
"""Of the saved file: one of another form is built anew."""
_DEVICE = re.compile(r"urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)")
_LINE = re.compile(rb"<urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)>\t([^\n]*)\n")
_DOUBLE = re.compile(rb'"([-+.0-9eE]+)"\^\^<http://www\.w3\.org/2001/XMLSchema#double>')
MOST_CODES = 1 << 20

Numbers = NDArray[Any]
Mask = NDArray[np.bool_]
log = logging.getLogger(__name__)


class _NotHeld(Exception):
    """The graph says what a column cannot hold."""


class Range(NamedTuple):
    """Numbers from `low` to `high`, both among them."""

    low: float = -np.inf
    high: float = np.inf


class _Column:
    """What one predicate says of each device, at most one value of one kind, as a number; `nothing` if it says none."""

    dtype: type[Any]
    nothing: Any

    def __init__(self) -> None:
        self.numbers: Numbers = np.empty(0, self.dtype)

    def grow(self, size: int) -> None:
        numbers = np.full(size, self.nothing, self.dtype)
        numbers[: len(self.numbers)] = self.numbers
        self.numbers = numbers

    def encode(self, given: Value) -> Any:
        """The value as a number. Raises _NotHeld."""
        raise NotImplementedError

    def decode(self, number: Any) -> Value | None:
        """The number as a value; None for `nothing`."""
        raise NotImplementedError

    def read(self, texts: Sequence[bytes]) -> Numbers:
        """Values as SPARQL's TSV writes them, as numbers. Raises _NotHeld."""
        known = {text: self.encode(_parsed(text)) for text in set(texts)}
        return np.array([known[text] for text in texts], self.dtype)

    def put(self, row: int, given: Binding | None) -> None:
        values = list(each(given))
        if len(values) > 1:
            raise _NotHeld(f"{len(values)} values")
        self.numbers[row] = self.encode(values[0]) if values else self.nothing


def _parsed(text: bytes) -> Value:
    """A value as SPARQL's TSV writes it: as Turtle does. Raises _NotHeld."""
    try:
        (quad,) = ox.parse(b"<urn:s> <urn:p> " + text + b" .", ox.RdfFormat.TURTLE)
    except (SyntaxError, ValueError):
        raise _NotHeld(text.decode()) from None
    return _exact(quad.object)


def _exact(node: Any, predicate: Iri | None = None) -> Value:
    """The term as a value from which the same term comes again. Raises _NotHeld if none does, but of a type."""
    found = value(node)
    if predicate != RDF.type and term(found) != node:
        raise _NotHeld(f"{node}")
    return found


class _Codes(_Column):
    """Iris or texts that many devices have in common: each a number, from 0."""

    dtype = np.int32
    nothing = -1

    def __init__(self, kind: type[str]) -> None:
        super().__init__()
        self.kind = kind
        self.values: list[str] = []
        self.codes: dict[str, int] = {}

    def encode(self, given: Value) -> int:
        if type(given) is not self.kind:
            raise _NotHeld(f"{given!r}")
        code = self.codes.get(given)
        if code is None:
            if len(self.values) == MOST_CODES:
                raise _NotHeld("too many different values")
            code = self.codes[given] = len(self.values)
            self.values.append(given)
        return code

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else self.values[number]


class _Integers(_Column):
    """Whole numbers from 0."""

    dtype = np.int64
    nothing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not int or not 0 <= given < 2**63:
            raise _NotHeld(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else int(number)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        if not texts or not all(text.isdigit() and len(text) < 19 for text in texts):
            return super().read(texts)
        return np.array(texts, "S").astype(self.dtype)


class _Floats(_Column):
    """Numbers, as xsd:double."""

    dtype = np.float64
    nothing = np.nan

    def encode(self, given: Value) -> float:
        if type(given) is not float or not np.isfinite(given):
            raise _NotHeld(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number != number else float(number)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        found = [_DOUBLE.fullmatch(text) for text in texts]
        numbers = np.array([b"nan" if m is None else m[1] for m in found], "S").astype(self.dtype)
        if not np.isfinite(numbers).all():
            return super().read(texts)
        return numbers


class _Flags(_Column):
    """True or false."""

    dtype = np.int8
    nothing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not bool:
            raise _NotHeld(f"{given!r}")
        return int(given)

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else bool(number)


class _Types(_Column):
    """Whether a subject is a tf:Device; what else it is, nobody asks here."""

    dtype = np.int8
    nothing = 0

    def put(self, row: int, given: Binding | None) -> None:
        self.numbers[row] = TF.Device in each(given)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        return np.array([text == f"<{TF.Device}>".encode() for text in texts], self.dtype)


def _columns() -> dict[Iri, _Column]:
    return {
        RDF.type: _Types(),
        TF.fleet: _Codes(str),
        TF.board: _Codes(Iri),
        TF.engine: _Codes(str),
        TF.engineVersion: _Codes(str),
        TF.arenaBytes: _Integers(),
        TF.online: _Flags(),
        TF.currentModel: _Codes(Iri),
        TF.samples: _Integers(),
        TF.malformed: _Integers(),
        TF.stale: _Integers(),
        TF.battery: _Floats(),
        TF.drift: _Floats(),
    }


class Columns:
    """The devices' rows. A row is found by the device's `{fleet}:{device}`; one of a device that is gone stays, with
    nothing in it."""

    def __init__(self) -> None:
        self.columns = _columns()
        self._sorted: NDArray[np.bytes_] = np.empty(0, "S1")
        self._later: dict[bytes, int] = {}
        self.size = 0
        self.odd: set[bytes] = set()
        """Devices of which the graph says what the columns cannot hold."""

    def begin(self, names: NDArray[np.bytes_]) -> None:
        """Rows for these, sorted, each once."""
        self._sorted, self.size = names, len(names)
        for column in self.columns.values():
            column.grow(self.size)

    def rows(self, names: Sequence[bytes], make: bool) -> NDArray[np.int64]:
        """The rows of these, -1 for those that have none, unless they are to be made."""
        if not names:
            return np.empty(0, np.int64)
        wanted = np.array(names, "S")
        found = np.searchsorted(self._sorted, wanted)
        if len(self._sorted):
            found[self._sorted[np.minimum(found, len(self._sorted) - 1)] != wanted] = -1
        else:
            found[:] = -1
        for i in np.flatnonzero(found < 0).tolist():
            row = self._later.get(names[i], -1)
            if row < 0 and make:
                row = self._later[names[i]] = self.size
                self.size += 1
                if self.size > len(self.columns[RDF.type].numbers):
                    for column in self.columns.values():
                        column.grow(max(1024, self.size * 3 // 2))
            found[i] = row
        return found

    def replace(self, row: int, said: Mapping[Iri, Binding]) -> None:
        """Makes this all that is said of a device. Raises _NotHeld."""
        for column in self.columns.values():
            column.numbers[row] = column.nothing
        for predicate, given in said.items():
            self.columns[predicate].put(row, given)

    def numbers(self, predicate: Iri) -> Numbers:
        return self.columns[predicate].numbers[: self.size]

    def codes(self, predicate: Iri) -> _Codes:
        column = self.columns[predicate]
        assert isinstance(column, _Codes)
        return column

    def names(self, mask: Mask) -> list[str]:
        """`{fleet}:{device}` of the rows that are meant."""
        later = {row: name for name, row in self._later.items()}
        first = len(self._sorted)
        found = self._sorted[mask[:first]].tolist()
        found += [later[row] for row in (first + np.flatnonzero(mask[first:])).tolist()]
        return [name.decode() for name in found]

    def save(self, path: Path, mark: str) -> None:
        """Rows in the order of their names, without those of devices that are gone."""
        later = sorted(self._later.items(), key=lambda item: item[1])
        names = np.concatenate([self._sorted, np.array([name for name, _ in later], "S")]) if later else self._sorted
        used = np.zeros(self.size, np.bool_)
        for predicate, column in self.columns.items():
            numbers = self.numbers(predicate)
            used |= ~np.isnan(numbers) if isinstance(column, _Floats) else numbers != column.nothing
        order = np.flatnonzero(used)
        order = order[np.argsort(names[order], kind="stable")]
        arrays = {str(i): self.numbers(p)[order] for i, p in enumerate(self.columns)}
        values = {p: column.values for p, column in self.columns.items() if isinstance(column, _Codes)}
        head = json.dumps({"form": FORM, "mark": mark, "values": values})
        with path.open("wb") as file:
            np.savez(file, head=np.array(head), names=names[order], **arrays)

    @classmethod
    def load(cls, path: Path, mark: str) -> "Columns | None":
        """What was saved with this mark, if anything was."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                head = json.loads(str(saved["head"]))
                if head["form"] != FORM or head["mark"] != mark:
                    return None
                found = cls()
                found.begin(saved["names"])
                for i, (predicate, column) in enumerate(found.columns.items()):
                    column.numbers = saved[str(i)]
                    if isinstance(column, _Codes):
                        column.values = [column.kind(text) for text in head["values"][predicate]]
                        column.codes = {text: code for code, text in enumerate(column.values)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the index %s cannot be read (%s); it is built anew", path, error)
            return None
        return found


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
        self._reading = (
            threading.Lock()
        )  # held while the columns change or are read; within self._writing, never around
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

    def write(self, facts: Facts) -> None:
        with self._writing:
            if self._columns is None:
                super().write(facts)
                self._note(facts)
                return
            columns, patch = self._columns, Patch([], [], [])
            rest: dict[Iri, dict[Iri, Binding | None]] = {}
            puts: list[tuple[Iri, int, _Column, Binding | None]] = []
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
                    if isinstance(column, _Types):
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
            for all_, more in zip(patch, self._difference(rest), strict=True):
                all_.extend(more)
            self._apply(patch)
            with self._reading:
                for s, row, column, given in puts:
                    try:
                        column.put(row, given)
                    except _NotHeld:
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
                        columns.replace(row, {p: [_exact(o, p) for o in said] for p, said in terms.items()})
                    except _NotHeld:
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
            put = partial(_fill, columns, column)
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

    def evaluate(self, sparql: str, **bindings: Binding) -> Answer:
        text = bind(sparql, bindings)
        if self.indexed:
            for name, answer in ANSWERED.items():
                if (match := _recognised(name).fullmatch(text.strip())) is not None:
                    fleets = None if match["fleet"] == "UNDEF" else re.findall(r'"([^"]*)"', match["fleet"])
                    found = answer(self, fleets)
                    if found is not None:
                        return found
        return super().evaluate(text)

    def select(self, where: Mapping[Iri, Range | Collection[Value]]) -> list[str] | None:
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
                elif isinstance(column, _Codes):
                    mask &= _among(column, wanted)[numbers]
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
            mask = _of_fleets(columns, fleets)
            keys = (TF.currentModel, TF.engine, TF.engineVersion)
            for predicate in keys[1:]:
                mask &= columns.numbers(predicate) >= 0
            key = np.zeros(columns.size, np.int64)
            for predicate in keys:
                key = key * (len(columns.codes(predicate).values) + 1) + columns.numbers(predicate) + 1
            key, online = key[mask], columns.numbers(TF.online)[mask] == 1
            distinct, place = _distinct(key)
            counts = np.bincount(place, minlength=len(distinct))
            on = np.bincount(place[online], minlength=len(distinct))
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
            # Devices of one engine, on one board, with one arena are one kind; kinds are few, devices are many.
            of_board, engines = columns.codes(TF.board), columns.codes(TF.engine)
            ram, flash = (np.full(len(of_board.values) + 1, -1, np.int64) for _ in range(2))
            for row in boards:
                if (code := of_board.codes.get(str(row["board"]))) is not None:
                    ram[code], flash[code] = cast("int", row["ram"]), cast("int", row["flash"])
            board, engine, arena = (columns.numbers(p) for p in (TF.board, TF.engine, TF.arenaBytes))
            arena = np.where(arena < 0, ram[board], arena)
            mask = _of_fleets(columns, fleets) & (engine >= 0) & (ram[board] >= 0)
            kinds, counts = _kinds(board[mask], engine[mask], arena[mask])
            values, engine_codes = list(of_board.values), dict(engines.codes)
        found = []
        for row in models:
            need = inputs.get(row["model"], [])
            able = np.array([all((Iri(b), p) in observed for p in need) for b in values], np.bool_) if need else None
            fit = (kinds[1] == engine_codes.get(str(row["engine"]), -2)) & (kinds[2] >= row["takes"])
            fit &= flash[kinds[0]] >= row["storage"]
            if able is not None:
                fit &= able[kinds[0]]
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


def _fill(columns: Columns, column: _Column, names: Sequence[bytes], texts: Sequence[bytes]) -> None:
    """Puts values that are to be the only ones of their devices into a column."""
    found = columns.rows(names, make=True)
    try:
        numbers = column.read(texts)
    except _NotHeld:
        numbers = np.full(len(texts), column.nothing, column.dtype)
        for i, text in enumerate(texts):
            try:
                numbers[i] = column.read([text])[0]
            except _NotHeld:
                columns.odd.add(names[i])
    already = column.numbers[found]
    twice = ~np.isnan(already) if isinstance(column, _Floats) else already != column.nothing
    columns.odd |= {names[i] for i in np.flatnonzero(twice).tolist()}
    distinct, places = np.unique(found, return_index=True)
    if len(distinct) < len(found):
        columns.odd |= {names[i] for i in set(range(len(names))) - set(places.tolist())}
    column.numbers[found] = numbers


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


def _among(column: _Codes, wanted: Collection[Value]) -> Mask:
    """Of each code whether it is one of these values; the last is for -1, which is none."""
    mask = np.zeros(len(column.values) + 1, np.bool_)
    mask[[column.codes[v] for v in wanted if type(v) is column.kind and v in column.codes]] = True
    return mask


def _of_fleets(columns: Columns, fleets: Collection[str] | None) -> Mask:
    """The devices of these fleets; of None: of all."""
    fleet = columns.numbers(TF.fleet)
    mask: Mask = columns.numbers(RDF.type) == 1
    return mask & (fleet >= 0 if fleets is None else _among(columns.codes(TF.fleet), fleets)[fleet])


def _distinct(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different keys, rising, and of each key its place among them."""
    most = int(keys.max(initial=0)) + 1
    if most > 1 << 22:
        return np.unique(keys, return_inverse=True)
    distinct = np.flatnonzero(np.bincount(keys, minlength=most))
    places = np.zeros(most, np.int64)
    places[distinct] = np.arange(len(distinct))
    return distinct, places[keys]


def _kinds(
    board: NDArray[np.int32], engine: NDArray[np.int32], arena: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different (board, engine, arena), [3, kinds], and how many devices are of each."""
    arenas, place = np.unique(arena, return_inverse=True)
    engines = int(engine.max(initial=0)) + 1
    key = (board.astype(np.int64) * engines + engine) * max(1, len(arenas)) + place
    distinct, places = _distinct(key)
    rest, at = np.divmod(distinct, max(1, len(arenas)))
    return np.array([rest // engines, rest % engines, arenas[at]]), np.bincount(places, minlength=len(distinct))


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
_REMOVE = rf"DELETE WHERE \{{ {_I} \?p \?o \}}"
_PLAIN = re.compile(rf"{_WRITE}|{_DATA}|{_REMOVE}")
_SUBJECT = re.compile(rf"(?:^|\(|WHERE \{{ )<({_I[1:-1]})>", re.MULTILINE)


def _subjects(update: str) -> set[str] | None:
    """The subjects that an update changes, and perhaps others; None if it does not say so plainly."""
    return set(_SUBJECT.findall(update)) if _PLAIN.fullmatch(update) else None
