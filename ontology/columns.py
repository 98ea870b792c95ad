"""What the devices of a graph say of themselves, as columns of numbers: a row a device, a column a predicate."""

import json
import logging
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray

from ontology.names import RDF, TF, Iri
from ontology.store import Binding, Value, each, term, value

FORM = 1
"""Of the saved file: one of another form is built anew."""
_DOUBLE = re.compile(rb'"([-+.0-9eE]+)"\^\^<http://www\.w3\.org/2001/XMLSchema#double>')
MOST_CODES = 1 << 20

Numbers = NDArray[Any]
Mask = NDArray[np.bool_]
log = logging.getLogger(__name__)


class NotHeld(Exception):
    """The graph says what a column cannot hold."""


class Range(NamedTuple):
    """Numbers from `low` to `high`, both among them."""

    low: float = -np.inf
    high: float = np.inf


class Column:
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
        """The value as a number. Raises NotHeld."""
        raise NotImplementedError

    def decode(self, number: Any) -> Value | None:
        """The number as a value; None for `nothing`."""
        raise NotImplementedError

    def read(self, texts: Sequence[bytes]) -> Numbers:
        """Values as SPARQL's TSV writes them, as numbers. Raises NotHeld."""
        known = {text: self.encode(_parsed(text)) for text in set(texts)}
        return np.array([known[text] for text in texts], self.dtype)

    def put(self, row: int, given: Binding | None) -> None:
        values = list(each(given))
        if len(values) > 1:
            raise NotHeld(f"{len(values)} values")
        self.numbers[row] = self.encode(values[0]) if values else self.nothing


def _parsed(text: bytes) -> Value:
    """A value as SPARQL's TSV writes it: as Turtle does. Raises NotHeld."""
    try:
        (quad,) = ox.parse(b"<urn:s> <urn:p> " + text + b" .", ox.RdfFormat.TURTLE)
    except (SyntaxError, ValueError):
        raise NotHeld(text.decode()) from None
    return exact(quad.object)


def exact(node: Any, predicate: Iri | None = None) -> Value:
    """The term as a value from which the same term comes again. Raises NotHeld if none does, but of a type."""
    found = value(node)
    if predicate != RDF.type and term(found) != node:
        raise NotHeld(f"{node}")
    return found


class Codes(Column):
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
            raise NotHeld(f"{given!r}")
        code = self.codes.get(given)
        if code is None:
            if len(self.values) == MOST_CODES:
                raise NotHeld("too many different values")
            code = self.codes[given] = len(self.values)
            self.values.append(given)
        return code

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else self.values[number]


class Integers(Column):
    """Whole numbers from 0."""

    dtype = np.int64
    nothing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not int or not 0 <= given < 2**63:
            raise NotHeld(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else int(number)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        if not texts or not all(text.isdigit() and len(text) < 19 for text in texts):
            return super().read(texts)
        return np.array(texts, "S").astype(self.dtype)


class Floats(Column):
    """Numbers, as xsd:double."""

    dtype = np.float64
    nothing = np.nan

    def encode(self, given: Value) -> float:
        if type(given) is not float or not np.isfinite(given):
            raise NotHeld(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number != number else float(number)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        found = [_DOUBLE.fullmatch(text) for text in texts]
        numbers = np.array([b"nan" if m is None else m[1] for m in found], "S").astype(self.dtype)
        if not np.isfinite(numbers).all():
            return super().read(texts)
        return numbers


class Flags(Column):
    """True or false."""

    dtype = np.int8
    nothing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not bool:
            raise NotHeld(f"{given!r}")
        return int(given)

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else bool(number)


class Types(Column):
    """Whether a subject is a tf:Device; what else it is, nobody asks here."""

    dtype = np.int8
    nothing = 0

    def put(self, row: int, given: Binding | None) -> None:
        self.numbers[row] = TF.Device in each(given)

    def read(self, texts: Sequence[bytes]) -> Numbers:
        return np.array([text == f"<{TF.Device}>".encode() for text in texts], self.dtype)


def _columns() -> dict[Iri, Column]:
    return {
        RDF.type: Types(),
        TF.fleet: Codes(str),
        TF.board: Codes(Iri),
        TF.engine: Codes(str),
        TF.engineVersion: Codes(str),
        TF.arenaBytes: Integers(),
        TF.online: Flags(),
        TF.currentModel: Codes(Iri),
        TF.samples: Integers(),
        TF.malformed: Integers(),
        TF.stale: Integers(),
        TF.battery: Floats(),
        TF.drift: Floats(),
    }


class Columns:
    """The devices' rows. A row is found by the device's `{fleet}:{device}`; one of a device that is gone stays, with
    nothing in it."""

    def __init__(self) -> None:
        self.columns = _columns()
        self._sorted: NDArray[np.bytes_] = np.empty(0, "S1")
        self._later: dict[bytes, int] = {}
        self.size = 0
        self.described = 0  # counts the changes of what kinds of devices there are
        self._kinds: tuple[Any, Any, Any] | None = None
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
        """Makes this all that is said of a device. Raises NotHeld."""
        self.described += 1
        for column in self.columns.values():
            column.numbers[row] = column.nothing
        for predicate, given in said.items():
            self.columns[predicate].put(row, given)

    def numbers(self, predicate: Iri) -> Numbers:
        return self.columns[predicate].numbers[: self.size]

    def codes(self, predicate: Iri) -> Codes:
        column = self.columns[predicate]
        assert isinstance(column, Codes)
        return column

    def names(self, mask: Mask) -> NDArray[np.str_]:
        """`{fleet}:{device}` of the rows that are meant."""
        first = len(self._sorted)
        found = [self._sorted[mask[:first]]]
        if mask[first:].any():
            later = {row: name for name, row in self._later.items()}
            found.append(np.array([later[row] for row in (first + np.flatnonzero(mask[first:])).tolist()], "S"))
        names: NDArray[np.str_] = np.concatenate(found).astype("U")
        return names

    def of_fleets(self, fleets: Collection[str] | None) -> Mask:
        """The devices of these fleets; of None: of all."""
        fleet = self.numbers(TF.fleet)
        mask: Mask = self.numbers(RDF.type) == 1
        mask &= fleet >= 0 if fleets is None else among(self.codes(TF.fleet), fleets)[fleet]
        return mask

    def kinds(self, fleets: Collection[str] | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Devices of one engine, on one board, with one arena are one kind: kinds are few where devices are many.

        [3, kinds] of codes of boards and of engines and of bytes, -1 where unknown; and how many devices each has.
        """
        asked = (self.described, None if fleets is None else tuple(fleets))
        if self._kinds is None or self._kinds[0] != asked:
            mask = self.of_fleets(fleets)
            board, engine, arena = (self.numbers(p)[mask] for p in (TF.board, TF.engine, TF.arenaBytes))
            arenas, place = np.unique(arena, return_inverse=True)
            boards, engines = (int(codes.max(initial=-1)) + 2 for codes in (board, engine))
            distinct, places = distinct_of((place * boards + board + 1) * engines + engine + 1)
            rest, engine = np.divmod(distinct, engines)
            place, board = np.divmod(rest, boards)
            found = np.array([board - 1, engine - 1, arenas[place] if len(arenas) else place])
            self._kinds = asked, found, np.bincount(places, minlength=len(distinct))
        return self._kinds[1].copy(), self._kinds[2]

    def save(self, path: Path, mark: str) -> None:
        """Rows in the order of their names, without those of devices that are gone."""
        later = sorted(self._later.items(), key=lambda item: item[1])
        names = np.concatenate([self._sorted, np.array([name for name, _ in later], "S")]) if later else self._sorted
        used = np.zeros(self.size, np.bool_)
        for predicate, column in self.columns.items():
            numbers = self.numbers(predicate)
            used |= ~np.isnan(numbers) if isinstance(column, Floats) else numbers != column.nothing
        order = np.flatnonzero(used)
        order = order[np.argsort(names[order], kind="stable")]
        arrays = {str(i): self.numbers(p)[order] for i, p in enumerate(self.columns)}
        values = {p: column.values for p, column in self.columns.items() if isinstance(column, Codes)}
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
                    if isinstance(column, Codes):
                        column.values = [column.kind(text) for text in head["values"][predicate]]
                        column.codes = {text: code for code, text in enumerate(column.values)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the index %s cannot be read (%s); it is built anew", path, error)
            return None
        return found


def among(column: Codes, wanted: Collection[Value]) -> Mask:
    """Of each code whether it is one of these values; the last is for -1, which is none."""
    mask = np.zeros(len(column.values) + 1, np.bool_)
    mask[[column.codes[v] for v in wanted if type(v) is column.kind and v in column.codes]] = True
    return mask


def distinct_of(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The different keys, rising, and of each key its place among them."""
    most = int(keys.max(initial=0)) + 1
    if most > 1 << 22:
        return np.unique(keys, return_inverse=True)
    distinct = np.flatnonzero(np.bincount(keys, minlength=most))
    places = np.zeros(most, np.int64)
    places[distinct] = np.arange(len(distinct))
    return distinct, places[keys]


def counted(keys: Numbers, among: Mask) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The different keys, rising; how many there are of each, and how many of these are among the chosen."""
    most = int(keys.max(initial=0)) + 1
    if most > 1 << 22:
        distinct, place = np.unique(keys, return_inverse=True)
        chosen = np.bincount(place[among], minlength=len(distinct))
        return distinct, np.bincount(place, minlength=len(distinct)), chosen
    counts, chosen = np.bincount(keys, minlength=most), np.bincount(keys[among], minlength=most)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct], chosen[distinct]


def fill(columns: Columns, column: Column, names: Sequence[bytes], texts: Sequence[bytes]) -> None:
    """Puts values that are to be the only ones of their devices into a column."""
    found = columns.rows(names, make=True)
    try:
        numbers = column.read(texts)
    except NotHeld:
        numbers = np.full(len(texts), column.nothing, column.dtype)
        for i, text in enumerate(texts):
            try:
                numbers[i] = column.read([text])[0]
            except NotHeld:
                columns.odd.add(names[i])
    already = column.numbers[found]
    twice = ~np.isnan(already) if isinstance(column, Floats) else already != column.nothing
    columns.odd |= {names[i] for i in np.flatnonzero(twice).tolist()}
    distinct, places = np.unique(found, return_index=True)
    if len(distinct) < len(found):
        columns.odd |= {names[i] for i in set(range(len(names))) - set(places.tolist())}
    column.numbers[found] = numbers
