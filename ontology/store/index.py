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
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray
from tinyfleet.ontology.store.columns import Codes, Column, Columns, Ids, NotIndexable, Range, Types, among, exact, fill
from tinyfleet.ontology.store.query_rewriting import answer_from_index, with_counts
from tinyfleet.ontology.store.store import (
    RECORDS,
    Binding,
    Dataset,
    EmbeddedStore,
    Facts,
    Patch,
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
# What the questions ask of models and boards (query_rewriting.py).
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
    """An EmbeddedStore with columns over its devices, from which it answers some of the library's queries
    (query_rewriting.py), whoever asks them, and finds words in titles (text_index.py); and those of its own
    methods that the graph alone would take seconds for.

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
        self._edition = 0  # of all but the devices' own columns
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
        """Whether the columns say all that the graph does. If not, the graph is asked."""
        return self._ready is not None

    @property
    def _ready(self) -> Columns | None:
        columns = self._columns
        return None if columns is None or columns.odd or columns.strangers else columns

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
            titled: list[tuple[Iri, int | None, Binding | None]] = []
            named = [(s, name) for s in facts if (name := _name(s)) and name not in columns.odd]
            found = columns.rows([name for _, name in named], make=True).tolist()
            row_of = dict(zip((s for s, _ in named), found, strict=True))
            for s, said in facts.items():
                row = row_of.get(s)
                for p, given in said.items():
                    column = None if row is None else columns.columns.get(p)
                    if row is None or column is None:
                        rest.setdefault(s, {})[p] = given
                        if p == TD.title and (row is not None or not _name(s)):  # of an odd device: `_note` reads it
                            titled.append((s, row, given))
                        continue
                    if isinstance(column, (Types, Ids)):
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
            more = self._difference(rest)
            anew = bool(more.emptied) or any(_shared(line) for line in (*more.gone, *more.new))
            patch.extend(more)
            patch.extend(self._difference(records or {}, RECORDS))
            self._apply(patch)
            self._edition += anew
            with self._reading:
                for s, row, column, given in puts:
                    try:
                        columns.put(column, row, _name(s), given)
                    except NotIndexable:
                        columns.odd.add(_name(s))
                for s, row, given in titled:
                    texts = [text_of(term(o)) for o in each(given)]
                    if row is None:
                        columns.titles.put_other(s, texts)
                    else:
                        columns.titles.put(row, texts)
            self._note(
                s
                for s, said in facts.items()
                if _name(s) in columns.odd
                or (RDF.type in said and not _name(s) and (s in columns.strangers or TF.Device in each(said[RDF.type])))
            )

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
        written = set(subjects)
        self._edition += bool(written)
        if self._columns is None:
            self._changed |= written
        else:
            self._refresh(self._columns, written)

    def _refresh(self, columns: Columns, subjects: Collection[str]) -> None:
        """Reads these subjects from the graph."""
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
                    columns.strangers.discard(subject)
                    if ox.NamedNode(TF.Device) in terms.get(RDF.type, ()):
                        columns.strangers.add(subject)
                    continue
                (row,) = columns.rows([name], make=bool(terms or titles)).tolist()
                columns.odd.discard(name)
                if row >= 0:
                    columns.titles.put(row, titles)
                    try:
                        columns.replace(row, name, {p: [exact(o, p) for o in said] for p, said in terms.items()})
                    except NotIndexable:
                        columns.odd.add(name)

    # ------------------------------------------------------------------------------------------------------- building

    def _rebuild(self) -> None:
        """Has the columns built anew, in the background. Called with self._writing, but at first."""
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
                        if odd := len(columns.odd) + len(columns.strangers):
                            log.warning("%d devices are not as their columns must be: no index", odd)
                        return
                self._refresh(columns, changed)

    def _read(self) -> Columns | None:
        """The columns from the graph, predicate by predicate; None if the store is being closed."""
        columns = Columns()
        ask = f"SELECT ?s ?o WHERE {{ VALUES ?o {{ <{TF.Device}> }} ?s a ?o }}"
        names = [np.empty(0, "S1")]
        self._each(ask, lambda some, _: names.append(np.array(some, "S")), lambda one, _: columns.strangers.add(one))
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
        for groups in (columns.by_kind, columns.by_model):
            groups.sort(columns.size)
        return columns

    def _each(
        self,
        query: str,
        take: Callable[[Sequence[bytes], Sequence[bytes]], None],
        rest: Callable[[str, bytes], None] = lambda subject, text: None,
    ) -> bool:
        """Hands over the devices of an answer, as `{fleet}:{device}`, and their values, in pieces; what other IRIs it
        has, one by one, to `rest`. False if the store is being closed, or changes so that it is all in vain.

        As Oxigraph writes TSV faster than Python reads its solutions; a million of them need little memory so.
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
            del answer  # an error's traceback would take it to another thread, and Oxigraph's answers may not go there
        return True

    # ---------------------------------------------------------------------------------------------------------- asked

    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> QueryResult:
        text = bind(sparql, bindings)
        if dataset is None and self.indexed:
            found = answer_from_index(self, text)
            if found is not None:
                return found.as_solutions()
            text = with_counts(self, text) or with_title_candidates(text, self._candidates) or text
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

    def query(self, sparql: str, **bindings: Binding) -> Rows:
        text = bind(sparql, bindings)
        found = answer_from_index(self, text) if self.indexed else None
        return super().query(text) if found is None else found.as_rows()

    def on_graph(self, sparql: str) -> ox.QuerySolutions:
        """The answer to a SELECT, whatever the index knows."""
        answer = EmbeddedStore.evaluate(self, sparql)
        assert isinstance(answer, ox.QuerySolutions)
        return answer

    def kept(self, make: Callable[["IndexedStore"], T]) -> T:
        """What `make` makes of the graph, made again after every change of what is said of anything but devices' own
        states: of models and boards, say."""
        edition = self._edition
        known = self._kept.get(make)
        if known is None or known[0] != edition:
            known = self._kept[make] = edition, make(self)
        return cast("T", known[1])

    @contextmanager
    def reading(self) -> Iterator[Columns | None]:
        """The columns, while they do not change; None if there is no index now: ask the graph."""
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
            return columns.raw_names(mask).astype("U")


class _StaleRead(Exception):
    """What is being read is of no use any more."""


class _Sink:
    """Takes TSV as it is written, and hands over its lines in large pieces."""

    PIECE = 4 << 20

    def __init__(
        self,
        take: Callable[[Sequence[bytes], Sequence[bytes]], None],
        rest: Callable[[str, bytes], None],
        vain: Callable[[], bool],
    ) -> None:
        self._take = take
        self._rest = rest
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
            raise _StaleRead
        end = self._text.rfind(b"\n") + 1
        piece = bytes(self._text[:end])
        del self._text[:end]
        if found := _LINE.findall(piece):
            names, texts = zip(*found, strict=True)
            self._take(names, texts)
        for subject, text in _OTHER.findall(piece) if len(found) < piece.count(b"\n") else ():
            self._rest(subject.decode(), text)


def _name(subject: str) -> bytes:
    """`{fleet}:{device}` of a device's IRI; nothing if it is none."""
    match = _DEVICE.fullmatch(subject)
    return b"" if match is None else match[1].encode()


def _shared(line: str) -> bool:
    """Whether a triple that changes may be one of those that `kept` holds: what devices say of themselves, and rounds
    and events, are none, unless one of them is called a model."""
    _, predicate, rest = line.split(" ", 2)
    return predicate in _SHARED and (predicate != f"<{RDF.type}>" or rest == _MODEL)


def _mark(folder: Path) -> str:
    """What a folder of RocksDB looks like from outside: whoever opens it to write changes that."""
    files = sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.iterdir() if f.name != "LOCK")
    return hashlib.sha256(repr(files).encode()).hexdigest()


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
_ABSOLUTE = re.compile("[A-Za-z][A-Za-z0-9+.-]*:")
_SUBJECT = re.compile(rf"(?:^|\(|WHERE \{{ )<({_I[1:-1]})>", re.MULTILINE)


def _subjects(update: str) -> set[str] | None:
    """The subjects that an update changes, and perhaps others; None if it does not say so plainly."""
    if _PLAIN.fullmatch(update) is None:
        return None
    subjects = set(_SUBJECT.findall(update))
    return subjects if all(_ABSOLUTE.match(subject) for subject in subjects) else None
