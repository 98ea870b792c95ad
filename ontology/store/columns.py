"""The facts about devices as columns of numbers: a row for each device, a column for each predicate."""

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

from tinyfleet.ontology.store.store import Binding, Value, each, term, value
from tinyfleet.ontology.store.text_index import TitleIndex
from tinyfleet.ontology.vocabulary.namespaces import RDF, TF, Iri

FORMAT = 3
"""Version of the saved file; a file of another version is ignored and the columns are built from the graph."""
_DOUBLE = re.compile(rb'"([-+.0-9eE]+)"\^\^<http://www\.w3\.org/2001/XMLSchema#double>')
MAX_CODES = 1 << 20

Numbers = NDArray[Any]
Mask = NDArray[np.bool_]
log = logging.getLogger(__name__)


class NotIndexable(Exception):
    """The graph has a value that a column cannot hold."""


class Range(NamedTuple):
    """Numbers from `low` to `high`, inclusive."""

    low: float = -np.inf
    high: float = np.inf


class Column:
    """The values of one predicate, at most one for each device, as numbers; `missing` where there is none."""

    dtype: type[Any]
    missing: Any

    def __init__(self) -> None:
        self.numbers: Numbers = np.empty(0, self.dtype)

    def grow(self, size: int) -> None:
        numbers = np.full(size, self.missing, self.dtype)
        numbers[: len(self.numbers)] = self.numbers
        self.numbers = numbers

    def encode(self, given: Value) -> Any:
        """The value as a number. Raises NotIndexable."""
        raise NotImplementedError

    def decode(self, number: Any) -> Value | None:
        """The number as a value; None for `missing`."""
        raise NotImplementedError

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        """Values of these devices, written as in SPARQL's TSV, as numbers. Raises NotIndexable."""
        known = {text: self.encode(_parsed(text)) for text in set(texts)}
        return np.array([known[text] for text in texts], self.dtype)

    def put(self, row: int, name: bytes, given: Binding | None) -> None:
        """Replace the value of a device. Raises NotIndexable."""
        values = list(each(given))
        if len(values) > 1:
            raise NotIndexable(f"{len(values)} values")
        self.numbers[row] = self.encode(values[0]) if values else self.missing


def _parsed(text: bytes) -> Value:
    """A value written as in SPARQL's TSV, which is Turtle's form. Raises NotIndexable."""
    try:
        (quad,) = ox.parse(b"<urn:s> <urn:p> " + text + b" .", ox.RdfFormat.TURTLE)
    except (SyntaxError, ValueError):
        raise NotIndexable(text.decode()) from None
    return exact(quad.object)


def exact(node: Any, predicate: Iri | None = None) -> Value:
    """The term as a value that converts back to it. Raises NotIndexable if there is none, except for types."""
    found = value(node)
    if predicate != RDF.type and term(found) != node:
        raise NotIndexable(f"{node}")
    return found


class Codes(Column):
    """IRIs or texts that many devices share, numbered from 0."""

    dtype = np.int32
    missing = -1

    def __init__(self, kind: type[str]) -> None:
        super().__init__()
        self.kind = kind
        self.values: list[str] = []
        self.codes: dict[str, int] = {}

    def encode(self, given: Value) -> int:
        if type(given) is not self.kind:
            raise NotIndexable(f"{given!r}")
        code = self.codes.get(given)
        if code is None:
            if len(self.values) == MAX_CODES:
                raise NotIndexable("too many different values")
            code = self.codes[given] = len(self.values)
            self.values.append(given)
        return code

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else self.values[number]


class Fleets(Codes):
    """Fleets; a device's must be the one in its name."""

    def put(self, row: int, name: bytes, given: Binding | None) -> None:
        super().put(row, name, given)
        if (fleet := self.decode(self.numbers[row])) is not None and fleet != name.partition(b":")[0].decode():
            raise NotIndexable(f"{fleet!r}")

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        for name, text in zip(names, texts, strict=True):
            if text != b'"%b"' % name.partition(b":")[0]:
                raise NotIndexable(text.decode())
        return super().parse_terms(names, texts)


class Integers(Column):
    """Whole numbers from 0."""

    dtype = np.int64
    missing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not int or not 0 <= given < 2**63:
            raise NotIndexable(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else int(number)

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        if not texts or not all(text.isdigit() and len(text) < 19 for text in texts):
            return super().parse_terms(names, texts)
        return np.array(texts, "S").astype(self.dtype)


class Floats(Column):
    """Numbers, as xsd:double."""

    dtype = np.float64
    missing = np.nan

    def encode(self, given: Value) -> float:
        if type(given) is not float or not np.isfinite(given):
            raise NotIndexable(f"{given!r}")
        return given

    def decode(self, number: Any) -> Value | None:
        return None if number != number else float(number)

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        found = [_DOUBLE.fullmatch(text) for text in texts]
        numbers = np.array([b"nan" if m is None else m[1] for m in found], "S").astype(self.dtype)
        if not np.isfinite(numbers).all():
            return super().parse_terms(names, texts)
        return numbers


class Flags(Column):
    """True or false."""

    dtype = np.int8
    missing = -1

    def encode(self, given: Value) -> int:
        if type(given) is not bool:
            raise NotIndexable(f"{given!r}")
        return int(given)

    def decode(self, number: Any) -> Value | None:
        return None if number < 0 else bool(number)


class Types(Column):
    """Whether a subject is a tf:Device. Its other types are not indexed."""

    dtype = np.int8
    missing = 0

    def put(self, row: int, name: bytes, given: Binding | None) -> None:
        self.numbers[row] = TF.Device in each(given)

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        return np.array([text == f"<{TF.Device}>".encode() for text in texts], self.dtype)


class Ids(Column):
    """Whether the graph has the device's ID, which must be the one in its name."""

    dtype = np.int8
    missing = 0

    def put(self, row: int, name: bytes, given: Binding | None) -> None:
        values = list(each(given))
        if values not in ([], [id_of(name)]):
            raise NotIndexable(f"{values!r}")
        self.numbers[row] = len(values)

    def parse_terms(self, names: Sequence[bytes], texts: Sequence[bytes]) -> Numbers:
        for name, text in zip(names, texts, strict=True):
            if text != b'"%b"' % name.partition(b":")[2]:
                raise NotIndexable(text.decode())
        return np.ones(len(texts), self.dtype)


def id_of(name: bytes) -> str:
    """The device's ID, from its `{fleet}:{device}`."""
    return name.partition(b":")[2].decode()


def _columns() -> dict[Iri, Column]:
    return {
        RDF.type: Types(),
        TF.deviceId: Ids(),
        TF.fleet: Fleets(str),
        TF.board: Codes(Iri),
        TF.engine: Codes(str),
        TF.engineVersion: Codes(str),
        TF.arenaBytes: Integers(),
        TF.online: Flags(),
        TF.currentModel: Codes(Iri),
        TF.samplesLearned: Integers(),
        TF.malformedMessages: Integers(),
        TF.staleMessages: Integers(),
        TF.refusedCommands: Integers(),
        TF.trialState: Codes(str),
        TF.boots: Integers(),
        TF.resetReason: Codes(str),
        TF.keysVersion: Integers(),
        TF.battery: Floats(),
        TF.drift: Floats(),
        TF.wireVersion: Integers(),
        TF.programFormat: Integers(),
        TF.incompatibility: Codes(str),
    }


class Groups:
    """Groups of rows with the same values in some columns. There are few groups, however many rows there are.

    A row that changes is only marked, and assigned to its group by the next query. A write therefore costs almost
    nothing, and a query pays for the changes since the last one.
    """

    BLOCK = 1 << 18
    """Rows that are grouped at a time, to limit memory."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._stale = np.empty(0, np.bool_)
        self._known: dict[tuple[int, ...], int] = {}
        self.of: NDArray[np.int32] = np.empty(0, np.int32)
        """The group of each row."""
        self.keys: NDArray[np.int64] = np.empty((len(columns), 0), np.int64)
        """[columns, groups]: the values of each group."""
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)
        """[groups]: the number of rows."""

    def grow(self, size: int) -> None:
        more = size - len(self.of)
        self.of = np.append(self.of, np.full(more, -1, np.int32))
        self._stale = np.append(self._stale, np.ones(more, np.bool_))

    def mark(self, row: int) -> None:
        """Note that the row may have changed in one of the columns."""
        self._stale[row] = True

    def refresh(self, size: int) -> None:
        """Assign the changed rows among the first `size` to their groups."""
        rows = np.flatnonzero(self._stale[:size])
        if len(rows) > size // 4:  # start over, without the groups that have become empty
            rows = np.arange(size)
            self.of[:] = -1
            self._known, self.keys, self.counts = {}, self.keys[:, :0], self.counts[:0]
        for block in (rows[i : i + self.BLOCK] for i in range(0, len(rows), self.BLOCK)):
            keys, places = unique_rows([column.numbers[block] for column in self._columns])
            found = [self._known.setdefault(key, len(self._known)) for key in zip(*keys.tolist(), strict=True)]
            now = np.array(found, np.int32)[places]
            before = self.of[block]
            if (more := len(self._known) - len(self.counts)) > 0:
                new = [i for i, group in enumerate(found) if group >= len(self.counts)]
                self.keys = np.concatenate([self.keys, keys[:, new]], axis=1)
                self.counts = np.append(self.counts, np.zeros(more, np.int64))
            self.counts += np.bincount(now, minlength=len(self.counts))
            self.counts -= np.bincount(before[before >= 0], minlength=len(self.counts))
            self.of[block] = now
            self._stale[block] = False


class Columns:
    """The rows of all devices, found by the device's `{fleet}:{device}`. The row of a removed device stays, empty."""

    def __init__(self) -> None:
        self.columns = _columns()
        self._sorted: NDArray[np.bytes_] = np.empty(0, "S1")
        self._later: dict[bytes, int] = {}
        self.size = 0
        self.titles = TitleIndex()
        by_configuration = (RDF.type, TF.fleet, TF.board, TF.engine, TF.arenaBytes)
        by_model = (RDF.type, TF.fleet, TF.currentModel, TF.engine, TF.engineVersion, TF.online)
        self.by_configuration, self.by_model = (
            Groups([self.columns[p] for p in of]) for of in (by_configuration, by_model)
        )
        self._grouped: dict[Column, list[Groups]] = {column: [] for column in self.columns.values()}
        for groups, of in ((self.by_configuration, by_configuration), (self.by_model, by_model)):
            for predicate in of:
                self._grouped[self.columns[predicate]].append(groups)
        self.odd: set[bytes] = set()
        """Devices with values in the graph that the columns cannot hold."""
        self.misnamed: set[str] = set()
        """Devices whose IRIs do not have the form of a device's."""

    def begin(self, names: NDArray[np.bytes_]) -> None:
        """Make rows for these names, which are sorted and unique."""
        self._sorted, self.size = names, len(names)
        self._grow(self.size)

    def _grow(self, size: int) -> None:
        for column in self.columns.values():
            column.grow(size)
        for groups in (self.by_configuration, self.by_model):
            groups.grow(size)

    def rows(self, names: Sequence[bytes], make: bool) -> NDArray[np.int64]:
        """The rows of these devices. Where there is none, -1, or a new one if `make` is set."""
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
                    self._grow(max(1024, self.size * 3 // 2))
            found[i] = row
        return found

    def put(self, column: Column, row: int, name: bytes, given: Binding | None) -> None:
        """Replace the value of a device in a column. Raises NotIndexable."""
        for groups in self._grouped[column]:
            groups.mark(row)
        column.put(row, name, given)

    def replace(self, row: int, name: bytes, facts: Mapping[Iri, Binding]) -> None:
        """Replace all values of a device. Raises NotIndexable."""
        for column in self.columns.values():
            column.numbers[row] = column.missing
        for groups in (self.by_configuration, self.by_model):
            groups.mark(row)
        for predicate, given in facts.items():
            self.columns[predicate].put(row, name, given)

    def numbers(self, predicate: Iri) -> Numbers:
        return self.columns[predicate].numbers[: self.size]

    def codes(self, predicate: Iri) -> Codes:
        column = self.columns[predicate]
        assert isinstance(column, Codes)
        return column

    def raw_names(self, mask: Mask) -> NDArray[np.bytes_]:
        """`{fleet}:{device}` of the rows in the mask."""
        first = len(self._sorted)
        found = [self._sorted[mask[:first]]]
        if mask[first:].any():
            later = {row: name for name, row in self._later.items()}
            found.append(np.array([later[row] for row in (first + np.flatnonzero(mask[first:])).tolist()], "S"))
        names: NDArray[np.bytes_] = np.concatenate(found)
        return names

    def select_groups(self, groups: Groups, fleets: Collection[Value] | None) -> NDArray[np.int64]:
        """The groups with devices of these fleets, or of any fleet for None. The first two keys of all groups are the
        type and the fleet."""
        groups.refresh(self.size)
        mask = (groups.keys[0] == 1) & (groups.counts > 0)
        mask &= groups.keys[1] >= 0 if fleets is None else is_in(self.codes(TF.fleet), fleets)[groups.keys[1]]
        return np.flatnonzero(mask)

    def save(self, path: Path, mark: str) -> None:
        """Save the rows in the order of their names, without those of removed devices."""
        later = sorted(self._later.items(), key=lambda item: item[1])
        text, titled = self.titles.all_lines()
        names = np.concatenate([self._sorted, np.array([name for name, _ in later], "S")]) if later else self._sorted
        used = np.zeros(self.size, np.bool_)
        used[titled] = True
        for predicate, column in self.columns.items():
            numbers = self.numbers(predicate)
            used |= ~np.isnan(numbers) if isinstance(column, Floats) else numbers != column.missing
        order = np.flatnonzero(used)
        order = order[np.argsort(names[order], kind="stable")]
        arrays = {str(i): self.numbers(p)[order] for i, p in enumerate(self.columns)}
        values = {p: column.values for p, column in self.columns.items() if isinstance(column, Codes)}
        others = {subject: text.decode() for subject, text in self.titles.others.items()}
        head = json.dumps({"format": FORMAT, "mark": mark, "values": values, "titles": others})
        place = np.empty(self.size, np.int32)
        place[order] = np.arange(len(order))
        arrays |= {"titles": np.frombuffer(text, np.uint8), "titled": place[titled]}
        with path.open("wb") as file:
            np.savez(file, head=np.array(head), names=names[order], **arrays)

    @classmethod
    def load(cls, path: Path, mark: str) -> "Columns | None":
        """Load the columns that were saved with this mark; None if there are none."""
        try:
            with np.load(path, allow_pickle=False) as saved:
                head = json.loads(str(saved["head"]))
                if head["format"] != FORMAT or head["mark"] != mark:
                    return None
                found = cls()
                found.begin(saved["names"])
                for i, (predicate, column) in enumerate(found.columns.items()):
                    column.numbers = saved[str(i)]
                    if isinstance(column, Codes):
                        column.values = [column.kind(text) for text in head["values"][predicate]]
                        column.codes = {text: code for code, text in enumerate(column.values)}
                found.titles.fill([saved["titled"]], [saved["titles"].tobytes()])
                found.titles.others = {subject: text.encode() for subject, text in head["titles"].items()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the index %s cannot be read (%s); building it from the graph", path, error)
            return None
        return found


def is_in(column: Codes, wanted: Collection[Value]) -> Mask:
    """[codes + 1]: whether each code stands for one of these values; the last element is for -1, no value."""
    mask = np.zeros(len(column.values) + 1, np.bool_)
    mask[[column.codes[v] for v in wanted if type(v) is column.kind and v in column.codes]] = True
    return mask


def distinct_of(keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct keys, ascending, and the position of each key among them."""
    most = int(keys.max(initial=0)) + 1
    if most > 1024 + 4 * len(keys):
        return np.unique(keys, return_inverse=True)
    distinct = np.flatnonzero(np.bincount(keys, minlength=most))
    places = np.zeros(most, np.int64)
    places[distinct] = np.arange(len(distinct))
    return distinct, places[keys]


def unique_rows(values: Sequence[Numbers]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[columns, distinct]: the distinct rows of these columns of whole numbers; and the position of each row there."""
    places: NDArray[np.int64] = np.zeros(len(values[0]), np.int64)
    first = places[:1]
    for numbers in values:
        least = int(numbers.min(initial=0))
        distinct, place = distinct_of(numbers.astype(np.int64) - least)
        joined, places = distinct_of(places * len(distinct) + place)
        first = np.empty(len(joined), np.int64)
        first[places] = np.arange(len(places))
    return np.array([numbers[first] for numbers in values], np.int64), places


def fill(columns: Columns, column: Column, names: Sequence[bytes], texts: Sequence[bytes]) -> None:
    """Put values, each the only one of its device, into a column."""
    found = columns.rows(names, make=True)
    try:
        numbers = column.parse_terms(names, texts)
    except NotIndexable:
        numbers = np.full(len(texts), column.missing, column.dtype)
        for i, text in enumerate(texts):
            try:
                numbers[i] = column.parse_terms([names[i]], [text])[0]
            except NotIndexable:
                columns.odd.add(names[i])
    already = column.numbers[found]
    twice = ~np.isnan(already) if isinstance(column, Floats) else already != column.missing
    columns.odd |= {names[i] for i in np.flatnonzero(twice).tolist()}
    distinct, places = np.unique(found, return_index=True)
    if len(distinct) < len(found):
        columns.odd |= {names[i] for i in set(range(len(names))) - set(places.tolist())}
    column.numbers[found] = numbers
