"""A column index over the devices: counts and selections among a million of them in milliseconds.

The index is derived from the graph: built from it, updated by every write to it, and saved beside it when the store is
closed. The saved index is used again if nothing else has opened the graph since. While the index is being built, and if
a device has a value that the columns cannot hold (two arenas, a battery in words), the graph itself answers.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray

from tinyfleet.ontology.store.columns import Codes, Column, Columns, Ids, NotIndexable, Range, Types, exact, fill, is_in
from tinyfleet.ontology.store.query_rewriting import answer_from_index, with_counts
from tinyfleet.ontology.store.store import (
    RECORDS,
    Binding,
    Dataset,
    EmbeddedStore,
    Facts,
    GraphChange,
    QueryResult,
    Rows,
    Triple,
    Value,
    bind,
    each,
    term,
)
from tinyfleet.ontology.store.text_index import parse_titles_tsv, text_of, with_title_candidates
from tinyfleet.ontology.vocabulary.namespaces import RDF, SCHEMA, TD, TF, Iri

_DEVICE = re.compile(r"urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)")
_LINE = re.compile(rb"<urn:tinyfleet:(?!model:)([A-Za-z0-9._-]+:[A-Za-z0-9._-]+)>\t([^\n]*)\n")
_OTHER = re.compile(rb"<(?!urn:tinyfleet:(?!model:)[A-Za-z0-9._-]+:[A-Za-z0-9._-]+>)([^>\n]*)>\t([^\n]*)\n")
# Predicates of models and boards that index_queries.py reads.
_SHARED = {
    f"<{p}>"
    for p in (
        RDF.type, SCHEMA.name, TF.engine, TF.runRamBytes, TF.storageBytes, TF.trainRamBytes, TF.trainableLayers,
        TF.trainingOption, TF.layersTrained, TF.biasOnly, TF.inputProperty, TF.parameters, TF.ramBytes, TF.flashBytes,
        TF.observes,
    )
}  # fmt: skip
_MODEL = f"<{TF.Model}> .\n"
T = TypeVar("T")

log = logging.getLogger(__name__)


class IndexedStore(EmbeddedStore):
    """An EmbeddedStore with a column index of its devices.

    It answers some of the library's queries from the index (query_rewriting.py), finds words in titles (text_index.py),
    and speeds up its own methods that would take the graph alone seconds. The index of a folder is the file
    `{path}.index`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._file = None if path is None else Path(f"{path}.index")
        self._folder = None if path is None else Path(path)
        mark = "" if self._folder is None or not self._folder.is_dir() else _mark(self._folder)
        super().__init__(path)
        self._reading = threading.Lock()  # while the columns change or are read; taken within self._writing
        self._columns: Columns | None = None
        self._changed: set[str] = set()  # subjects written while the columns were being built
        self._lost = False  # what was built meanwhile is useless
        self._edition = 0  # of everything but the devices' own columns
        self._kept: dict[Callable[[IndexedStore], Any], tuple[int, Any]] = {}
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
        """Whether the columns are complete. If not, the graph answers."""
        return self._ready is not None

    @property
    def _ready(self) -> Columns | None:
        columns = self._columns
        return None if columns is None or columns.odd or columns.misnamed else columns

    def wait(self) -> bool:
        """Wait until the columns are built; return False if they cannot hold this graph."""
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
                try:
                    columns.save(self._file, _mark(self._folder))
                except OSError:  # a full disk; the index is built again at the next start
                    self._file.unlink(missing_ok=True)

    # Writing

    def write(self, facts: Facts, records: Facts | None = None) -> None:
        with self._writing:
            if self._columns is None:
                super().write(facts, records)
                self._note(facts)
                return
            columns = self._columns
            split = _SplitWrite(columns, facts)
            rest = self._difference(split.rest)
            shared = bool(rest.cleared) or any(_shared(line) for line in (*rest.removed, *rest.added))
            split.change.extend(rest)
            split.change.extend(self._difference(records or {}, RECORDS))
            self._apply(split.change)
            self._edition += shared
            with self._reading:
                split.put()
            self._note(subject for subject, said in facts.items() if _to_be_read(columns, subject, said))

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
        """Note that these subjects have been written. Called with self._writing."""
        written = set(subjects)
        self._edition += bool(written)
        if self._columns is None:
            self._changed |= written
        else:
            self._refresh(self._columns, written)

    def _refresh(self, columns: Columns, subjects: Collection[str]) -> None:
        """Read these subjects from the graph."""
        for subject in subjects:
            terms: dict[Iri, list[Any]] = {}
            name = _name(subject)
            for quad in self._open.quads_for_pattern(ox.NamedNode(subject), None, None, ox.DefaultGraph()):
                if (predicate := Iri(quad.predicate.value)) in columns.columns or predicate == TD.title:
                    terms.setdefault(predicate, []).append(quad.object)
            titles = [text_of(o) for o in terms.pop(TD.title, [])]
            with self._reading:
                if not name:
                    columns.titles.put_other(subject, titles)
                    columns.misnamed.discard(subject)
                    if ox.NamedNode(TF.Device) in terms.get(RDF.type, ()):
                        columns.misnamed.add(subject)
                    continue
                (row,) = columns.rows([name], make=bool(terms or titles)).tolist()
                columns.odd.discard(name)
                if row >= 0:
                    columns.titles.put(row, titles)
                    try:
                        columns.replace(row, name, {p: [exact(o, p) for o in said] for p, said in terms.items()})
                    except NotIndexable:
                        columns.odd.add(name)

    # Building

    def _rebuild(self) -> None:
        """Rebuild the columns in the background. Called with self._writing, except by __init__."""
        self._columns = None
        self._edition += 1
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
                        if odd := len(columns.odd) + len(columns.misnamed):
                            log.warning(
                                "%d devices have values that the columns cannot hold; queries go to the graph", odd
                            )
                        return
                self._refresh(columns, changed)

    def _read(self) -> Columns | None:
        """Read the columns from the graph, predicate by predicate; None if the store is being closed."""
        columns = Columns()
        ask = f"SELECT ?s ?o WHERE {{ VALUES ?o {{ <{TF.Device}> }} ?s a ?o }}"
        names = [np.empty(0, "S1")]
        self._each(ask, lambda some, _: names.append(np.array(some, "S")), lambda one, _: columns.misnamed.add(one))
        columns.begin(np.unique(np.concatenate(names)))
        for predicate, column in columns.columns.items():
            put = partial(fill, columns, column)
            if not self._each(ask if predicate == RDF.type else f"SELECT ?s ?o WHERE {{ ?s <{predicate}> ?o }}", put):
                return None
        titles: list[tuple[NDArray[np.int64], bytes]] = []
        others: dict[str, bytes] = {}
        if not self._each(
            f"SELECT ?s ?o WHERE {{ ?s <{TD.title}> ?o }}",
            lambda some, texts: titles.append((columns.rows(some, make=True), parse_titles_tsv(texts))),
            lambda other, text: others.update({other: others.get(other, b"") + parse_titles_tsv([text])}),
        ):
            return None
        columns.titles.fill([found for found, _ in titles], [text for _, text in titles])
        columns.titles.others = others
        for groups in (columns.by_configuration, columns.by_model):
            groups.refresh(columns.size)
        return columns

    def _each(
        self,
        query: str,
        take: Callable[[Sequence[bytes], Sequence[bytes]], None],
        rest: Callable[[str, bytes], None] = lambda subject, text: None,
    ) -> bool:
        """Pass the devices of an answer, as `{fleet}:{device}`, and their values to `take`, in blocks.

        Other subjects go to `rest`, one by one. False if the store is being closed, or changes so that the read is
        useless.

        The answer is read as TSV: Oxigraph writes it faster than Python reads its solutions, and in little memory.
        """
        answer = EmbeddedStore.evaluate(self, query)
        assert isinstance(answer, ox.QuerySolutions)
        sink = _Sink(take, rest, lambda: self._closing or self._lost)
        try:
            answer.serialize(cast("IO[bytes]", sink), ox.QueryResultsFormat.TSV)
            sink.take()
        except _StaleRead:
            return False
        finally:
            del answer  # an error's traceback would carry it to another thread, where an Oxigraph answer must not go
        return True

    # Querying

    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> QueryResult:
        text = bind(sparql, bindings)
        if dataset is None and self.indexed:
            found = answer_from_index(self, text)
            if found is not None:
                return found.as_solutions()
            text = with_counts(self, text) or with_title_candidates(text, self._candidates) or text
        return super().evaluate(text, dataset)

    def for_graph_alone(self, sparql: str) -> str:
        return (with_title_candidates(sparql, self._candidates) if self.indexed else None) or sparql

    def values(self, subjects: Sequence[Iri], predicate: Iri) -> dict[Iri, Value]:
        with self._reading:
            column = None if self._ready is None else self._ready.columns.get(predicate)
            if self._ready is not None and column is not None and not isinstance(column, Types):
                found = self._ready.rows([_name(subject) for subject in subjects], make=False).tolist()
                numbers = column.numbers
                decoded = ((s, column.decode(numbers[row])) for s, row in zip(subjects, found, strict=True) if row >= 0)
                return {s: v for s, v in decoded if v is not None}
        return super().values(subjects, predicate)

    def query(self, sparql: str, **bindings: Binding) -> Rows:
        text = bind(sparql, bindings)
        found = answer_from_index(self, text) if self.indexed else None
        return super().query(text) if found is None else found.as_rows()

    def on_graph(self, sparql: str) -> ox.QuerySolutions:
        """The graph's answer to a SELECT, without the index."""
        answer = EmbeddedStore.evaluate(self, sparql)
        assert isinstance(answer, ox.QuerySolutions)
        return answer

    def kept(self, make: Callable[["IndexedStore"], T]) -> T:
        """Return `make(self)`, which is computed again only after a change of models, boards or other shared facts."""
        edition = self._edition
        known = self._kept.get(make)
        if known is None or known[0] != edition:
            known = self._kept[make] = edition, make(self)
        return cast("T", known[1])

    @contextmanager
    def reading(self) -> Iterator[Columns | None]:
        """The columns, locked against changes; None if there is no index now and the graph must be asked."""
        with self._reading:
            yield self._ready

    def _candidates(self, word: str) -> list[str] | None:
        with self._reading:
            columns = self._ready
            found = None if columns is None else columns.titles.find(word)
            if columns is None or found is None:
                return None
            mask = np.zeros(columns.size, np.bool_)
            mask[found[0]] = True
            return [f"urn:tinyfleet:{name.decode()}" for name in columns.raw_names(mask).tolist()] + found[1]

    def select(self, where: Mapping[Iri, Range | Collection[Value]]) -> NDArray[np.str_] | None:
        """The devices, as `{fleet}:{device}`, that have for each predicate a number in the range or one of the values.

        None if there is no index now and the graph must be asked.
        """
        with self._reading:
            columns = self._ready
            if columns is None:
                return None
            mask = columns.numbers(RDF.type) == 1
            for predicate, wanted in where.items():
                column, numbers = columns.columns[predicate], columns.numbers(predicate)
                if isinstance(wanted, Range):
                    mask &= (numbers >= wanted.low) & (numbers <= wanted.high) & (numbers != column.missing)
                elif isinstance(column, Codes):
                    mask &= is_in(column, wanted)[numbers]
                else:
                    mask &= np.isin(numbers, [column.encode(v) for v in wanted])
            return columns.raw_names(mask).astype("U")


class _SplitWrite:
    """The facts of a write, split into those that the columns hold and the rest.

    For a value in a column, the change of the graph follows from the column: the graph need not be asked.
    """

    def __init__(self, columns: Columns, facts: Facts) -> None:
        self.change = GraphChange([], [], [])
        """Change of the graph for the facts in columns."""
        self.rest: dict[Iri, dict[Iri, Binding | None]] = {}
        """Facts whose change of the graph is found by asking it."""
        self._columns = columns
        self._values: list[tuple[bytes, int, Column, Binding | None]] = []
        self._titles: list[tuple[Iri, int | None, Binding | None]] = []
        names = {s: name for s in facts if (name := _name(s)) and name not in columns.odd}
        rows = dict(zip(names, columns.rows(list(names.values()), make=True).tolist(), strict=True))
        for subject, said in facts.items():
            row = rows.get(subject)
            for predicate, given in said.items():
                column = None if row is None else columns.columns.get(predicate)
                if row is None or column is None:
                    self._leave(subject, row, predicate, given)
                else:
                    self._split(subject, names[subject], row, predicate, column, given)

    def _leave(self, subject: Iri, row: int | None, predicate: Iri, given: Binding | None) -> None:
        self.rest.setdefault(subject, {})[predicate] = given
        if predicate == TD.title and (row is not None or not _name(subject)):  # an odd device's is read again anyway
            self._titles.append((subject, row, given))

    def _split(
        self, subject: Iri, name: bytes, row: int, predicate: Iri, column: Column, given: Binding | None
    ) -> None:
        if isinstance(column, (Types, Ids)):
            values = self.rest.setdefault(subject, {})[predicate] = list(each(given))
            self._values.append((name, row, column, values))
            return
        there = column.decode(column.numbers[row])
        if type(there) is type(given) and there == given and (there or type(there) is not float):
            return  # the common case; 0.0 and -0.0 are told apart by their terms
        values = list(each(given))
        wanted = {term(o) for o in values}
        was = set() if there is None else {term(there)}
        self.change.removed.extend(f"<{subject}> <{predicate}> {o} .\n" for o in was - wanted)
        self.change.added.extend(f"<{subject}> <{predicate}> {o} .\n" for o in wanted - was)
        self._values.append((name, row, column, values))

    def put(self) -> None:
        """Put the values and titles into the columns."""
        columns = self._columns
        for name, row, column, given in self._values:
            try:
                columns.put(column, row, name, given)
            except NotIndexable:
                columns.odd.add(name)
        for subject, titled, given in self._titles:
            texts = [text_of(term(o)) for o in each(given)]
            if titled is None:
                columns.titles.put_other(subject, texts)
            else:
                columns.titles.put(titled, texts)


def _to_be_read(columns: Columns, subject: Iri, said: Mapping[Iri, Binding | None]) -> bool:
    """Whether a written subject must be read from the graph: an odd device, or a device with another kind of name."""
    name = _name(subject)
    if name or RDF.type not in said:
        return name in columns.odd
    return subject in columns.misnamed or TF.Device in each(said[RDF.type])


class _StaleRead(Exception):
    """The graph has changed so that what is being read is useless."""


class _Sink:
    """A file that receives TSV and passes its lines on in large blocks."""

    BLOCK = 4 << 20

    def __init__(
        self,
        take: Callable[[Sequence[bytes], Sequence[bytes]], None],
        rest: Callable[[str, bytes], None],
        useless: Callable[[], bool],
    ) -> None:
        self._take = take
        self._rest = rest
        self._useless = useless
        self._text = bytearray()

    def write(self, part: bytes) -> int:
        self._text += part
        if len(self._text) >= self.BLOCK:
            self.take()
        return len(part)

    def flush(self) -> None:
        """Only incomplete lines are held back."""

    def take(self) -> None:
        if self._useless():
            raise _StaleRead
        end = self._text.rfind(b"\n") + 1
        block = bytes(self._text[:end])
        del self._text[:end]
        if found := _LINE.findall(block):
            names, texts = zip(*found, strict=True)
            self._take(names, texts)
        for subject, text in _OTHER.findall(block) if len(found) < block.count(b"\n") else ():
            self._rest(subject.decode(), text)


def _name(subject: str) -> bytes:
    """`{fleet}:{device}` of a device's IRI; empty for any other IRI."""
    match = _DEVICE.fullmatch(subject)
    return b"" if match is None else match[1].encode()


def _shared(line: str) -> bool:
    """Whether a changed triple may affect what `kept` holds: the facts of models and boards."""
    _, predicate, rest = line.split(" ", 2)
    return predicate in _SHARED and (predicate != f"<{RDF.type}>" or rest == _MODEL)


def _mark(folder: Path) -> str:
    """A hash of a RocksDB folder's file names, sizes and times: any process that opens it for writing changes it."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.name != "LOCK")
    return hashlib.sha256(repr(files).encode()).hexdigest()


# An update whose subjects can be read off its text: exactly what Store.write, add and remove send. It must not contain
# \\u, which stands for a character that is not visible in the text.
_I = r"<[^<>\\\s]*>"
_O = rf"(?:{_I}|\"(?:[^\"\\\n\r]|\\[^uU\n\r])*\"(?:\^\^{_I})?)"
_DATA = rf"INSERT DATA \{{\n(?:{_I} {_I} {_O} \.\n)*\}}"
_WRITE = (
    rf"DELETE \{{ \?s \?p \?o \}} WHERE \{{ VALUES \(\?s \?p\) \{{ (?:\({_I} {_I}\) ?)+ \}} \?s \?p \?o \}} ;\n{_DATA}"
)
_REMOVE = rf"DELETE WHERE \{{ {_I} \?p \?o \}} ; DELETE WHERE \{{ GRAPH <{RECORDS}> \{{ {_I} \?p \?o \}} \}}"
_PLAIN = re.compile(rf"{_WRITE}|{_DATA}|{_REMOVE}")
_ABSOLUTE = re.compile("[A-Za-z][A-Za-z0-9+.-]*:")
_SUBJECT = re.compile(rf"(?:^|\(|WHERE \{{ )<({_I[1:-1]})>", re.MULTILINE)


def _subjects(update: str) -> set[str] | None:
    """The subjects that an update changes, and possibly others; None if they cannot be read off its text."""
    if _PLAIN.fullmatch(update) is None:
        return None
    subjects = set(_SUBJECT.findall(update))
    return subjects if all(_ABSOLUTE.match(subject) for subject in subjects) else None
