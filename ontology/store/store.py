"""One interface to embedded Oxigraph and to any SPARQL 1.1 endpoint.

Facts are in the default graph; a named graph beside it holds documents (ontology/ingest/thing_store.py). A query
declares a parameter as `VALUES ?name { UNDEF }`. The text is valid SPARQL as it stands, with the parameter unset;
binding puts terms in place of UNDEF, so the same text and values work on every store. Terms are written by Oxigraph's
serialiser, so a value cannot end its literal.
"""

import re
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import pyoxigraph as ox

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.vocabulary.namespaces import XSD, Iri

Value = Iri | str | bool | int | float | datetime
Binding = Value | Iterable[Value]
Triple = tuple[Iri, Iri, Value]
Facts = Mapping[Iri, Mapping[Iri, Binding | None]]
"""For each subject and each predicate, the value or values; None for a predicate to be removed."""
QueryResult = ox.QuerySolutions | ox.QueryBoolean | ox.QueryTriples
Row = dict[str, Value]

BASE = "https://w3id.org/tinyfleet/"
"""Base of relative IRIs. It is not the address of a server, because the graph outlives the server."""


RECORDS = Iri("https://w3id.org/tinyfleet/things")
"""Named graph of documents and the times of their registration, which are not facts about the fleet."""


ROOM = 1 << 24
"""Bytes that must be free on a disk that was full before the graph is opened again."""


@dataclass(frozen=True)
class Dataset:
    """The graphs that a query uses, in place of those it names itself: those that make up its default graph, and those
    that GRAPH may name."""

    default: Sequence[Iri] = ()
    named: Sequence[Iri] = ()


class StoreError(UserError):
    """The store did not answer, or did not accept a query or an update; the message says why."""


class DiskError(StoreError):
    """The graph cannot be written, as when the disk is full. The next write may succeed: it opens the graph again."""


class Unreachable(StoreError):
    """No server answers at the store's address."""


class Rows(Sequence[Row]):
    """The rows of a SELECT: a sequence of dicts.

    A row has no entry for an unbound variable.

    Attributes
    ----------
    variables : tuple of str
        The variables, in the order of the SELECT.

    Examples
    --------
    >>> rows = Rows(["id", "drift"], [{"id": "kitchen", "drift": 0.7}, {"id": "cellar"}])
    >>> rows.column("id"), rows.column("drift"), len(rows)
    (['kitchen', 'cellar'], [0.7], 2)
    """

    def __init__(self, variables: Sequence[str], rows: list[Row]) -> None:
        self.variables = tuple(variables)
        self._rows = rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Rows({self._rows!r})"

    def column(self, variable: str) -> list[Value]:
        """Return the values of one variable, row by row, without unbound ones."""
        return [row[variable] for row in self._rows if variable in row]


def term(value: Value) -> ox.NamedNode | ox.Literal:
    """Convert a Python value to a term. StoreError if there is none (a bad IRI, a lone surrogate)."""
    try:
        if isinstance(value, Iri):
            return ox.NamedNode(value)
        if isinstance(value, datetime):
            return ox.Literal(value.isoformat(), datatype=ox.NamedNode(XSD.dateTime))
        if isinstance(value, (str, bool, int, float)):
            return ox.Literal(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise StoreError(f"{value!r} cannot be a term of the graph: {error}") from None
    raise StoreError(f"{value!r} cannot be a term of the graph; use Iri, str, bool, int, float or datetime")


def _node(iri: Iri) -> ox.NamedNode:
    node = term(iri)
    if not isinstance(node, ox.NamedNode):
        raise StoreError(f"{iri!r} is text; a subject or predicate must be an Iri")
    return node


def rows(answer: ox.QuerySolutions) -> Rows:
    """Convert the answer to a SELECT to Python values."""
    names = [variable.value for variable in answer.variables]
    found: list[Row] = []
    for solution in answer:
        nodes = {name: solution[name] for name in names}
        found.append({name: value(node) for name, node in nodes.items() if node is not None})
    return Rows(names, found)


_INTEGERS = {
    XSD[name]
    for name in (
        "integer", "int", "long", "short", "byte", "nonNegativeInteger", "positiveInteger", "nonPositiveInteger",
        "negativeInteger", "unsignedInt", "unsignedLong", "unsignedShort", "unsignedByte",
    )
}  # fmt: skip
_FLOATS = {XSD.decimal, XSD.double, XSD.float}


def value(node: ox.NamedNode | ox.BlankNode | ox.Literal | ox.Triple) -> Value:
    """Convert a term to a Python value: Iri, int, float, bool, datetime, or else its text."""
    if isinstance(node, ox.NamedNode):
        return Iri(node.value)
    if not isinstance(node, ox.Literal):
        return str(node)
    text, datatype = node.value, node.datatype.value
    try:
        if datatype in _INTEGERS:
            return int(text)
        if datatype in _FLOATS:
            return float(text)
        if datatype == XSD.boolean:
            return {"true": True, "1": True, "false": False, "0": False}[text]
        if datatype == XSD.dateTime:
            return datetime.fromisoformat(text)
    except (ValueError, KeyError):
        pass  # not valid for its datatype: keep the text
    return text


OPAQUE = (
    r"#[^\n\r]*"
    r"|<[^<>\"{}|^`\\\x00-\x20]*>"
    r"|\"\"\"(?:[^\"\\]|\\.|\"{1,2}(?!\"))*\"\"\""
    r"|'''(?:[^'\\]|\\.|'{1,2}(?!'))*'''"
    r"|\"(?:[^\"\\\n\r]|\\.)*\""
    r"|'(?:[^'\\\n\r]|\\.)*'"
)
"""Matches SPARQL's comments, IRIs and strings. Try it first, so that nothing inside them matches.

Where a stranger's text is searched, a quote after a backslash must begin no string: each of many would seek its end.
"""
LETTERS = r"[\w.-]{0,63}+"
"""Matches the rest of a name's prefix. It is tried at each letter of a text, so that it must look only so far."""

_PARAMETER = re.compile(
    OPAQUE + r"|\bVALUES\s*[?$](?P<name>\w+)\s*\{\s*UNDEF\s*\}",
    re.IGNORECASE | re.DOTALL,
)


def parameters(sparql: str) -> list[str]:
    """Return the names of a query's parameters, which it declares as `VALUES ?name { UNDEF }`."""
    return list(dict.fromkeys(m["name"] for m in _PARAMETER.finditer(sparql) if m["name"]))


def parameter_pattern(sparql: str, values: str) -> str:
    """Return a regular expression for the query with its parameters set or not.

    `values` matches what a parameter may hold, which is the same in all its places; a group has the parameter's name.
    """
    parts: list[str] = []
    end = 0
    names = set()
    for found in _PARAMETER.finditer(sparql):
        if name := found["name"]:
            held = rf"(?P={name})" if name in names else rf"(?P<{name}>{values})"
            parts += [re.escape(sparql[end : found.start()]), rf"VALUES \?{name} \{{ {held} \}}"]
            names.add(name)
            end = found.end()
    return "".join([*parts, re.escape(sparql[end:])])


def bind(sparql: str, bindings: Mapping[str, Binding]) -> str:
    """Return the query with parameters set; the others stay unset.

    A list sets a parameter to each of its values; an empty list matches nothing. StoreError if the query has no such
    parameter.
    """
    if not bindings:
        return sparql
    known = parameters(sparql)
    for name in bindings:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise StoreError(f"the query has no parameter {name!r} ({has}); write VALUES ?{name} {{ UNDEF }} into it")

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None or name not in bindings:
            return match[0]
        return f"VALUES ?{name} {{ {' '.join(str(term(v)) for v in each(bindings[name]))} }}"

    return _PARAMETER.sub(put, sparql)


class Store(ABC):
    """A graph that is queried and changed in SPARQL 1.1. Changes are atomic; threads may share a store."""

    @abstractmethod
    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> QueryResult:
        """Run any query and return its answer as terms: solutions, a boolean or triples."""

    @abstractmethod
    def update(self, sparql: str) -> None:
        """Run a SPARQL update, completely or, on an error, not at all."""

    @abstractmethod
    def close(self) -> None:
        """Close the store; it cannot be used afterwards."""

    def query(self, sparql: str, **bindings: Binding) -> Rows:
        """Run a SELECT and return its rows as Python values."""
        answer = self.evaluate(sparql, **bindings)
        if not isinstance(answer, ox.QuerySolutions):
            raise StoreError(
                "this query is not a SELECT; use ask() for an ASK and construct() for a CONSTRUCT or DESCRIBE"
            )
        return rows(answer)

    def ask(self, sparql: str, **bindings: Binding) -> bool:
        """Run an ASK."""
        answer = self.evaluate(sparql, **bindings)
        if not isinstance(answer, ox.QueryBoolean):
            raise StoreError("this query is not an ASK")
        return bool(answer)

    def construct(self, sparql: str, **bindings: Binding) -> list[ox.Triple]:
        """Run a CONSTRUCT or DESCRIBE and return its triples as terms."""
        answer = self.evaluate(sparql, **bindings)
        if not isinstance(answer, ox.QueryTriples):
            raise StoreError("this query is not a CONSTRUCT or DESCRIBE")
        return list(answer)

    def values(self, subjects: Sequence[Iri], predicate: Iri) -> dict[Iri, Value]:
        """Return the value of a predicate for those of the subjects that have it; one of them if there are several."""
        if not subjects:
            return {}
        wanted = " ".join(str(_node(subject)) for subject in subjects)
        found = self.query(f"SELECT ?s ?o WHERE {{ VALUES ?s {{ {wanted} }} ?s {_node(predicate)} ?o }}")
        return {Iri(str(row["s"])): row["o"] for row in found}

    def add(self, triples: Iterable[Triple]) -> None:
        """Add triples."""
        text = _data(triples)
        if text:
            self.update(f"INSERT DATA {{\n{text}}}")

    def write(self, facts: Facts, records: Facts | None = None) -> None:
        """Replace the values of these predicates of these subjects; None removes a predicate. Records go into the graph
        RECORDS, in the same change."""
        text = " ;\n".join(part for part in (_writing(facts), _writing(records or {}, RECORDS)) if part)
        if text:
            self.update(text)

    def records(self, subjects: Sequence[Iri]) -> list[dict[Iri, Value]]:
        """Return the facts in the graph RECORDS about each of the subjects, one value for each predicate."""
        found: dict[Value, dict[Iri, Value]] = {subject: {} for subject in subjects}
        if subjects:
            # With VALUES outside of GRAPH, Oxigraph reads all records.
            wanted = " ".join(str(_node(subject)) for subject in subjects)
            for row in self.query(f"SELECT * WHERE {{ GRAPH <{RECORDS}> {{ VALUES ?s {{ {wanted} }} ?s ?p ?o }} }}"):
                found[row["s"]][Iri(str(row["p"]))] = row["o"]
        return [found[subject] for subject in subjects]

    def remove(self, subject: Iri) -> None:
        """Remove all facts about a subject, including its records."""
        said = f"{{ {_node(subject)} ?p ?o }}"
        self.update(f"DELETE WHERE {said} ; DELETE WHERE {{ GRAPH <{RECORDS}> {said} }}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _writing(facts: Facts, graph: Iri | None = None) -> str:
    """The update that replaces these values in the default graph or a named one; empty if there is nothing to write."""
    pairs = " ".join(f"({_node(s)} {_node(p)})" for s, said in facts.items() for p in said)
    if not pairs:
        return ""
    begin, end = ("", "") if graph is None else (f"GRAPH {_node(graph)} {{ ", " }")
    return (
        f"DELETE {{ {begin}?s ?p ?o{end} }} WHERE {{ {begin}VALUES (?s ?p) {{ {pairs} }} ?s ?p ?o{end} }} ;\n"
        f"INSERT DATA {{{begin}\n{_data(triples(facts))}{end}}}"
    )


def triples(facts: Facts) -> Iterator[Triple]:
    """Return the triples of these facts."""
    for subject, said in facts.items():
        for predicate, given in said.items():
            for o in each(given):
                yield subject, predicate, o


def each(given: Binding | None) -> Iterable[Value]:
    """Return the values of a binding: none, one or many."""
    if given is None:
        return ()
    return (given,) if isinstance(given, (str, bool, int, float, datetime)) else given


def short_message(error: object) -> str:
    """Oxigraph's message in one line, without the long list of expected tokens."""
    text = " ".join(str(error).partition(": expected one of ")[0].split())
    return text if len(text) <= 300 else text[:300] + "…"


def _data(given: Iterable[Triple]) -> str:
    return "".join(f"{_node(s)} {_node(p)} {term(o)} .\n" for s, p, o in given)


_HERE = ox.DefaultGraph()
UNFLUSHED = 200_000
"""Changed triples after which RocksDB's buffers in memory are written to files."""


class GraphChange(NamedTuple):
    """A change of the graph in SPARQL, which makes it one transaction: delete operations (`cleared`), then triples to
    remove, then triples to add."""

    cleared: list[str]
    removed: list[str]
    added: list[str]

    def extend(self, more: "GraphChange") -> None:
        """Add another change to this one."""
        for all_, some in zip(self, more, strict=True):
            all_.extend(some)


class EmbeddedStore(Store):
    """Oxigraph in this process: on disk (RocksDB) in the folder `path`, which is created if needed, or in memory.

    There is one writer at a time, and any number of readers: a query sees the graph as it was when it began, and blocks
    no write. A completed write survives a kill of the process, since it is in RocksDB's log; after a power failure, the
    last seconds may be missing.

    Attributes
    ----------
    folder : Path, optional
        Where it is.
    version : int
        Grows with every write.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._writing = threading.RLock()
        self._unflushed = 0
        self._failed = False  # whether a write has failed on disk; RocksDB then accepts none until it is opened again
        self.folder = None if path is None else Path(path)
        self.version = 0
        if path is None:
            self._store: ox.Store | None = ox.Store()
            return
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            self._store = ox.Store(str(path))
        except OSError as error:
            if "lock" in str(error).lower():
                raise StoreError(
                    f"the graph in {path} is in use by another process; ask the running server's endpoint, or stop it"
                ) from None
            raise StoreError(f"the graph in {path} cannot be opened ({error}); choose another folder") from None

    @property
    def _open(self) -> ox.Store:
        if self._store is None:
            raise StoreError("the store is closed")
        return self._store

    def evaluate(self, sparql: str, dataset: Dataset | None = None, /, **bindings: Binding) -> QueryResult:
        text = bind(sparql, bindings)
        try:
            if dataset is None:
                return self._open.query(text, base_iri=BASE)
            return self._open.query(
                text,
                base_iri=BASE,
                default_graph=[_node(graph) for graph in dataset.default],
                named_graphs=[_node(graph) for graph in dataset.named],
            )
        except SyntaxError as error:
            raise StoreError(f"the query is not valid SPARQL: {short_message(error)}") from None
        except (OSError, ValueError, RuntimeError) as error:
            raise StoreError(f"the query failed: {error}") from None

    def update(self, sparql: str) -> None:
        try:
            with self._writing:
                if self._failed:
                    self._open_again()
                self._open.update(sparql, base_iri=BASE)
                self.version += 1
        except SyntaxError as error:
            raise StoreError(f"the update is not valid SPARQL: {short_message(error)}") from None
        except OSError as error:
            self._failed = self.folder is not None
            raise DiskError(f"the graph cannot be written: {error}") from None
        except (ValueError, RuntimeError) as error:
            raise StoreError(f"the update failed: {error}") from None

    def _open_again(self) -> None:
        """After a failed write. There must be room on the disk: opening the graph writes too, and if that fails, the
        graph cannot be read either until the next attempt."""
        assert self.folder is not None
        if shutil.disk_usage(self.folder).free < ROOM:
            raise DiskError(f"the disk of {self.folder} is full")
        self._store = None  # its files are closed when no query reads it any more
        try:
            self._store = ox.Store(str(self.folder))
        except OSError as error:
            raise DiskError(f"the graph in {self.folder} cannot be opened again: {error}") from None
        self._failed = False

    def add(self, triples: Iterable[Triple]) -> None:
        quads = [ox.Quad(_node(s), _node(p), term(o), _HERE) for s, p, o in triples]
        with self._writing:
            if self._failed:
                self._open_again()
            try:
                self._open.extend(quads)
            except OSError as error:
                self._failed = self.folder is not None
                raise DiskError(f"the graph cannot be written: {error}") from None
            self.version += 1

    def write(self, facts: Facts, records: Facts | None = None) -> None:
        with self._writing:
            change = self._difference(facts)
            change.extend(self._difference(records or {}, RECORDS))
            self._apply(change)

    def _difference(self, facts: Facts, graph: Iri | None = None) -> GraphChange:
        """The change by which `write` writes the facts into the default graph, or into a named one."""
        change = GraphChange([], [], [])
        where = _HERE if graph is None else _node(graph)
        begin, end = ("", "") if graph is None else (f"GRAPH {where} {{ ", " }")
        wanted = {(_node(s), _node(p)): set(map(term, each(o))) for s, said in facts.items() for p, o in said.items()}
        if not wanted:
            return change
        there: dict[tuple[ox.NamedNode, ox.NamedNode], set[Any]] = {pair: set() for pair in wanted}
        pairs = " ".join(f"({subject} {predicate})" for subject, predicate in wanted)
        # One query for all costs half of a quads_for_pattern for each.
        answer = EmbeddedStore.evaluate(self, f"SELECT * WHERE {{ {begin}VALUES (?s ?p) {{ {pairs} }} ?s ?p ?o{end} }}")
        assert isinstance(answer, ox.QuerySolutions)
        for solution in answer:
            there[solution["s"], solution["p"]].add(solution["o"])
        for (subject, predicate), values in wanted.items():
            known = there[subject, predicate]
            if not all(isinstance(o, (ox.NamedNode, ox.Literal)) for o in known):
                change.cleared.append(f"DELETE WHERE {{ {begin}{subject} {predicate} ?o{end} }} ;\n")
                known = set()
            change.removed.extend(f"{begin}{subject} {predicate} {o} .{end}\n" for o in known - values)
            change.added.extend(f"{begin}{subject} {predicate} {o} .{end}\n" for o in values - known)
        return change

    def records(self, subjects: Sequence[Iri]) -> list[dict[Iri, Value]]:
        graph = _node(RECORDS)
        return [
            {
                Iri(quad.predicate.value): value(quad.object)
                for quad in self._open.quads_for_pattern(_node(subject), None, None, graph)
            }
            for subject in subjects
        ]

    def _apply(self, change: GraphChange) -> None:
        if any(change):
            self._unflushed += len(change.removed) + len(change.added)
            if self._unflushed > UNFLUSHED:
                self._unflushed = 0
                with suppress(OSError):  # the update will say so
                    self._open.flush()
            EmbeddedStore.update(
                self,
                f"{''.join(change.cleared)}DELETE DATA {{\n{''.join(change.removed)}}} ;\n"
                f"INSERT DATA {{\n{''.join(change.added)}}}",
            )

    def for_graph_alone(self, sparql: str) -> str:
        """A query with the same answer that is fast on a copy of the graph, where nothing else can help."""
        return sparql

    def __len__(self) -> int:
        return len(self._open)

    def backup(self, folder: Path) -> None:
        """Write a copy of the graph into a new folder, as hard links where the file system allows it."""
        if self.folder is not None:
            self._open.backup(str(folder))
            return
        copy = ox.Store(str(folder))
        copy.bulk_extend(self._open)
        copy.flush()

    def quads(self) -> Iterator[ox.Quad]:
        """Return all quads of the graph."""
        return iter(self._open)

    def load(self, quads: Iterable[ox.Quad]) -> None:
        """Add many quads, faster than `add` but not in one transaction: for a graph that is not in use yet."""
        self._open.bulk_extend(quads)
        self.version += 1

    def close(self) -> None:
        """Write what is left and free the folder for another process."""
        if self._store is not None:
            with suppress(OSError):  # a full disk; what was written is in RocksDB's log
                self._store.flush()
            self._store = None
