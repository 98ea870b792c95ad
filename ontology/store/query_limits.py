"""What a query or an update of anyone may be, before anything parses it: its length, its depth, how often its clauses
repeat, and that it makes this machine fetch nothing.

Oxigraph's parser calls itself for each nested form, and for each of some clauses: a few thousand of them overflow its
stack and end the process.
"""

from __future__ import annotations

import re

from tinyfleet.ontology.store.store import LETTERS, OPAQUE, StoreError

MAX_LENGTH = 65_536
"""Characters of a query or an update that has a pattern."""
MAX_DEPTH = 64
"""Brackets within each other."""
MAX_CLAUSES = 256
"""Of each of the words below, and of each operator."""

_WORDS = (
    "AS", "BIND", "EXISTS", "FILTER", "GRAPH", "IN", "MINUS", "NOT", "OPTIONAL", "SELECT", "UNION", "VALUES",
)  # fmt: skip
# A backslash escapes the next character of a name, so that this one begins no comment. Variables, names with a prefix
# and language tags are no keywords.
_TOKENS = (
    r"(?P<iri><[^<>\"{}|^`\\\x00-\x20]*>)|"
    + OPAQUE
    + r"|\\."
    + r"|[?$@]\w+"
    # Possessive: in how many ways a row of # is comments does not matter.
    + rf"|(?P<name>(?:\w{LETTERS})?:(?:[\w.:-]|%[0-9A-Fa-f]{{2}}|\\.)*)(?P<pattern>(?:\s|#[^\n\r]*+)*+\{{)?"
    + r"|(?P<word>[A-Za-z_]\w*)"
    + r"|(?P<open>[({\[])|(?P<close>[)}\]])|\^\^"
    + r"|(?P<operator>&&|\|\||[!+*/^|-])"
)
_QUERY = re.compile(_TOKENS, re.DOTALL)
# The numbers in an update's data have signs.
_UPDATE = re.compile(r"(?<=[\s,;.{(])[+-](?=[\d.])|" + _TOKENS, re.DOTALL)
# Oxigraph's keywords need no space before or after them: trueSERVICE, SERVICEex:a. A comparison without spaces may look
# like an IRI: FILTER(?a<?b)SERVICE$s#>
_FETCHING = re.compile("SERVICE|LOAD", re.IGNORECASE)
_BEFORE_GRAPH_NAMES = {"PREFIX", "GRAPH", "WITH", "USING", "NAMED", "TO"}
_ESCAPE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})")


class QueryRefused(StoreError):
    """A query or an update is refused before it is parsed."""


class QueryTooLong(QueryRefused):
    """It is too long."""


class FetchRefused(QueryRefused):
    """It would make the server fetch something."""


def check_query(sparql: str) -> None:
    """Check a query.

    Raises
    ------
    QueryRefused
        If it is too long, nests too deep, repeats a clause too often, or contains SERVICE other than in comments and
        texts.
    """
    if len(sparql) > MAX_LENGTH:
        raise QueryTooLong(f"the query is longer than {MAX_LENGTH} characters")
    _check(sparql, _QUERY)


def check_update(sparql: str) -> None:
    """Check an update, as a query. One that only has data may be longer, and has no clauses.

    Raises
    ------
    QueryRefused
        As for a query, and if it contains LOAD.
    """
    _check(sparql, _UPDATE)


def _check(sparql: str, tokens: re.Pattern[str]) -> None:
    _check_tokens(sparql, tokens)
    if "\\u" in sparql or "\\U" in sparql:  # an escape may stand for a quote or a letter of a keyword
        _check_tokens(_ESCAPE.sub(_unescaped, sparql), tokens)


def _unescaped(match: re.Match[str]) -> str:
    try:
        return chr(int(match[1] or match[2], 16))
    except (ValueError, OverflowError):
        raise QueryRefused("an escape is no character") from None


def _check_tokens(sparql: str, tokens: re.Pattern[str]) -> None:
    depth, previous = 0, ""
    counts: dict[str, int] = dict.fromkeys(_WORDS, 0)
    for token in tokens.finditer(sparql):
        if _fetches(token, depth, previous):
            raise FetchRefused(
                "SERVICE is not allowed, nor LOAD: a query must not make the server fetch from elsewhere"
            )
        if token["iri"] or token["name"]:
            previous = ""
        if token["open"] or token["pattern"]:
            depth += 1
            if depth > MAX_DEPTH:
                raise QueryRefused(f"it nests deeper than {MAX_DEPTH} brackets")
        elif token["close"]:
            depth = max(0, depth - 1)
        elif token["word"] or token["operator"]:
            text = previous = token[0].upper()
            if token["operator"] or text in counts:
                counts[text] = counts.get(text, 0) + 1
                if counts[text] > MAX_CLAUSES:
                    raise QueryRefused(f"it has more than {MAX_CLAUSES} of {text}")


def _fetches(token: re.Match[str], depth: int, previous: str) -> bool:
    """Whether Oxigraph may read SERVICE or LOAD in this token, which comes after the keyword `previous`."""
    if token["iri"]:
        return "SERVICE" in token[0].partition(")")[2].upper()
    if token["word"]:
        return _FETCHING.search(token[0]) is not None
    if token["name"] and (found := _FETCHING.match(token[0])):
        is_service = found[0].upper() == "SERVICE"
        return bool(token["pattern"]) if is_service else depth == 0 and previous not in _BEFORE_GRAPH_NAMES
    return False
