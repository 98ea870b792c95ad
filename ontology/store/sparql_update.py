"""Adapts updates to the SPARQL 1.1 Protocol where Oxigraph behaves differently.

Graphs that the request names (`using-graph-uri`, 2.2.3) are written into the update. A graph that does not exist counts
as empty: clearing or dropping it is not an error.
"""

import re
from collections.abc import Collection

from tinyfleet.ontology.store.store import LETTERS, OPAQUE, StoreError, term
from tinyfleet.ontology.vocabulary.namespaces import Iri

# Tokens in which no brace or keyword is looked for come first: comments, IRIs, strings, variables, names, tags.
_TOKEN = re.compile(
    OPAQUE + r"|[?$@]\w+"
    rf"|(?:\w{LETTERS})?:(?:[\w.:-]|%[0-9A-Fa-f]{{2}}|\\.)*|\\."
    r"|(?P<word>[A-Za-z]+)"
    r"|(?P<brace>[{}])",
    re.DOTALL,
)
_CLEARS = re.compile(r"\b(CLEAR|DROP)\b", re.IGNORECASE)


def with_graphs(update: str, default: Collection[Iri], named: Collection[Iri]) -> str:
    """Return the update with a USING clause for these graphs in each of its operations that has a pattern.

    Raises
    ------
    StoreError
        If an operation names its graphs itself (WITH, USING): only one of the two may name them.
    """
    clause = " ".join([*(f"USING {term(g)}" for g in default), *(f"USING NAMED {term(g)}" for g in named)])
    if not clause and not _CLEARS.search(update):
        return update
    rewriter = _Rewriter(update, clause)
    for token in _TOKEN.finditer(update):
        if token["brace"]:
            rewriter.brace(token)
        elif token["word"] and rewriter.depth == 0:
            rewriter.keyword(token)
    return rewriter.result()


class _Rewriter:
    """Copies an update token by token and inserts what is missing.

    `DELETE WHERE { ... }` is a shorthand for `DELETE { ... } WHERE { ... }`. It has no place for a USING clause, so it
    is written out.
    """

    def __init__(self, update: str, clause: str) -> None:
        self.depth = 0
        self._update = update
        self._clause = clause
        self._out: list[str] = []
        self._copied = 0
        self._before = ""  # the last keyword of the operation
        self._shorthand: int | None = None  # where the pattern of a DELETE WHERE begins

    def brace(self, token: re.Match[str]) -> None:
        self.depth += 1 if token["brace"] == "{" else -1
        if self.depth > 0:
            return
        self._before = ""
        if self._shorthand is not None:
            pattern = self._update[self._shorthand : token.end()]
            self._out += [pattern, " ", self._clause, " WHERE ", pattern]
            self._copied, self._shorthand = token.end(), None

    def keyword(self, token: re.Match[str]) -> None:
        word = token["word"].upper()
        if word == "GRAPH" and self._before in ("CLEAR", "DROP"):
            self._insert("SILENT ", token.start())
        elif self._clause and word in ("USING", "WITH"):
            raise StoreError(f"both the update ({word}) and the request name graphs; remove one of them")
        elif self._clause and word == "WHERE" and self._before == "DELETE":
            self._copy(token.start())
            self._copied = self._shorthand = token.end()
        elif self._clause and word == "WHERE":
            self._insert(f"{self._clause} ", token.start())
        self._before = word

    def result(self) -> str:
        self._copy(len(self._update))
        return "".join(self._out)

    def _insert(self, text: str, at: int) -> None:
        self._copy(at)
        self._out.append(text)

    def _copy(self, end: int) -> None:
        self._out.append(self._update[self._copied : end])
        self._copied = end
