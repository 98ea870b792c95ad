"""Answers queries of the library from the column index, in milliseconds where SPARQL would read every device.

A query is recognised by its text. The index either answers it (index_queries.py) or supplies the counts of devices that
it has in a subquery, and the graph answers the rest. An answer is always the one that the graph would give; where the
index cannot give it, the graph is asked.
"""

import re
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.columns import Columns, is_in
from tinyfleet.ontology.store.index_queries import INDEX_QUERIES, Requirements, requirements
from tinyfleet.ontology.store.store import Value, parameter_pattern, term
from tinyfleet.ontology.store.table import Table
from tinyfleet.ontology.vocabulary.namespaces import RDF, TF, Iri

if TYPE_CHECKING:
    from tinyfleet.ontology.store.column_index import IndexedStore


def answer_from_index(store: "IndexedStore", text: str) -> Table | None:
    """Return the index's answer to a query; None if it has none."""
    name, text = _match_library_query(text)
    match = _parse_library_query(name).fullmatch(text) if name in INDEX_QUERIES else None
    if match is None:
        return None
    given: dict[str, list[Value] | None] = {}
    for parameter, written in match.groupdict().items():
        if parameter != "LIMIT":
            values: list[Value] = [Iri(iri) if iri else text for text, iri in _VALUE.findall(written)]
            if len(set(values)) < len(values):
                return None
            given[parameter] = None if written == "UNDEF" else values
    table = INDEX_QUERIES[name](store, given)
    if table is None or match["LIMIT"] is None:
        return table
    return Table(table.variables, islice(table.rows, int(match["LIMIT"])))


def _match_library_query(text: str) -> tuple[str, str]:
    """The name of the library query with this query's first line, or an empty text; and the query, stripped.

    This is all the time that any other query loses here.
    """
    text = text.strip()
    return _first_lines().get(text.partition("\n")[0], ""), text


def is_library_query(text: str) -> bool:
    """Whether it is a query of the library, with its parameters unset or set, with or without a LIMIT."""
    name, text = _match_library_query(text)
    return bool(name) and _parse_library_query(name).fullmatch(text) is not None


@cache
def _first_lines() -> dict[str, str]:
    return {library.text(name).partition("\n")[0]: name for name in library.names()}


_VALUE = re.compile(r'"([^"]*)"|<([^>]*)>')


@cache
def _parse_library_query(name: str) -> re.Pattern[str]:
    """Matches a library query with its parameters unset or set to simple texts and IRIs, with or without a LIMIT."""
    simple = r'UNDEF|(?:(?:[0-9]++|"[A-Za-z0-9._-]*"|<[A-Za-z][A-Za-z0-9+.-]*:[^<>"{}|^`\\\x00-\x20]*>) ?)*'
    return re.compile(parameter_pattern(library.text(name).strip(), simple) + r"(?:\s+LIMIT (?P<LIMIT>[0-9]{1,9}))?")


# Counts of devices within a query


def with_counts(store: "IndexedStore", text: str) -> str | None:
    """Return a library query with values in place of the subquery that counts devices; None for any other query."""
    name, text = _match_library_query(text)
    if name not in COUNT_QUERIES or _parse_library_query(name).fullmatch(text) is None:
        return None
    pattern, count = COUNT_QUERIES[name]
    match = pattern.search(text)
    assert match is not None, f"{name}.rq does not count devices in the expected form"
    given = match["fleet"]
    fleets: list[Value] = [text for text, _ in _VALUE.findall(given)]
    known = store.kept(requirements)
    with store.reading() as columns:
        if columns is None or known is None or len(set(fleets)) < len(fleets):
            return None
        values = count(columns, known, None if given == "UNDEF" else fleets)
    return text[: match.start()] + values + text[match.end() :]


def _of_boards(columns: Columns, known: Requirements, fleets: list[Value] | None) -> str:
    boards, (counts, online) = _online(columns, TF.board, fleets)
    lines = (f"(<{b}> {n} {m})" for b, n, m in zip(boards, counts, online, strict=True) if n)
    return f"VALUES (?hardware ?alike ?ready) {{ {' '.join(lines)} }}"


def _of_models(columns: Columns, known: Requirements, fleets: list[Value] | None) -> str:
    models, (counts, _) = _online(columns, TF.currentModel, fleets)
    lines = (f"(<{model}> {n})" for model, n in zip(models, counts, strict=True) if n)
    return f"VALUES (?model ?alike) {{ {' '.join(lines)} }}"


def _online(columns: Columns, predicate: Iri, fleets: list[Value] | None) -> tuple[list[str], list[list[int]]]:
    """The values of a predicate; for each, the number of devices with it, and of online devices with it."""
    codes, values = columns.numbers(predicate), columns.codes(predicate).values
    mask = (columns.numbers(RDF.type) == 1) & (codes >= 0)
    fleet = columns.numbers(TF.fleet)
    mask &= fleet >= 0 if fleets is None else is_in(columns.codes(TF.fleet), fleets)[fleet]
    online = mask & (columns.numbers(TF.online) == 1)
    return values, [np.bincount(codes[chosen], minlength=len(values)).tolist() for chosen in (mask, online)]


def _of_configurations(columns: Columns, known: Requirements, fleets: list[Value] | None) -> str:
    groups = columns.by_configuration
    chosen = columns.select_groups(groups, fleets)
    boards, engines = columns.codes(TF.board).values, columns.codes(TF.engine).values
    counts: dict[tuple[str, int], int] = {}
    for n, (board, engine, arena) in zip(
        groups.counts[chosen].tolist(), groups.keys[2:, chosen].T.tolist(), strict=True
    ):
        if board >= 0 and engine >= 0 and (hardware := known.boards.get(Iri(boards[board]))):
            key = engines[engine], hardware.ram if arena < 0 else arena
            counts[key] = counts.get(key, 0) + n
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
_CONFIGURATIONS_COUNTED = _block(
    """SELECT ?engine ?arena (COUNT(?device) AS ?alike) WHERE { VALUES ?fleet { UNDEF }
    ?device a tf:Device ; tf:fleet ?fleet ; tf:engine ?engine ; tf:board/tf:ramBytes ?ram .
    OPTIONAL { ?device tf:arenaBytes ?said } BIND(COALESCE(?said, ?ram) AS ?arena) } GROUP BY ?engine ?arena"""
)
COUNT_QUERIES: dict[str, tuple[re.Pattern[str], Callable[[Columns, Requirements, list[Value] | None], str]]] = {
    "boards": (_BOARDS_COUNTED, _of_boards),
    "coverage": (_BOARDS_COUNTED, _of_boards),
    "models": (_MODELS_COUNTED, _of_models),
    "sensors": (_BOARDS_COUNTED, _of_boards),
    "training-options": (_CONFIGURATIONS_COUNTED, _of_configurations),
}
"""Library queries that count devices in a subquery, for which the index supplies the counts."""
