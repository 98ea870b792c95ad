"""A query's result as rows of Python values, that can become what Oxigraph would return."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, cast

import pyoxigraph as ox

from tinyfleet.ontology.store.store import Rows, Value, term

BLOCK = 10_000
"""Rows that are written at a time."""


@dataclass
class Table:
    """The variables of a result, and its rows; None stands for an unbound value. It can be read once."""

    variables: Sequence[str]
    rows: Iterator[Sequence[Value | None]]

    def as_rows(self) -> Rows:
        return Rows(
            self.variables,
            [{name: v for name, v in zip(self.variables, row, strict=True) if v is not None} for row in self.rows],
        )

    def as_solutions(self) -> ox.QuerySolutions:
        answer = ox.parse_query_results(cast("IO[bytes]", _Tsv(self)), ox.QueryResultsFormat.TSV)
        assert isinstance(answer, ox.QuerySolutions)
        return answer


class _Tsv:
    """A table as a file of SPARQL's TSV, written while it is read."""

    def __init__(self, table: Table) -> None:
        self._rows = table.rows
        self._text = ("\t".join(f"?{v}" for v in table.variables) + "\n").encode()

    def read(self, size: int) -> bytes:
        if not self._text:
            lines = ["\t".join("" if v is None else _to_tsv(v) for v in row) for row in islice(self._rows, BLOCK)]
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
