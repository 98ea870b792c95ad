"""A full-text index of titles: finds the subjects with a word in their td:title, in milliseconds among a million.

All titles are concatenated in one case-folded text, which is searched as a whole: at the speed of memory, without words
to keep in order, and for any part of a title, as SPARQL's CONTAINS does. The results are candidates: the graph answers
the query for them, so the graph decides.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray

from tinyfleet.ontology.store.store import LETTERS, OPAQUE
from tinyfleet.ontology.vocabulary.namespaces import TD

MAX_CANDIDATES = 1000
"""With more candidates, the query is run without them. It then finds a match soon, or needs all subjects anyway."""


class TitleIndex:
    """The titles of devices, by their rows, and of other subjects, by their IRIs."""

    def __init__(self) -> None:
        self._text = b""  # a line for each title
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)
        self._rows: NDArray[np.int32] = np.empty(0, np.int32)  # of each line; -1 if the line is out of date
        self._changed: dict[int, bytes] = {}  # rows with new lines
        self.others: dict[str, bytes] = {}

    def fill(self, rows: Sequence[NDArray[Any]], texts: Sequence[bytes]) -> None:
        """Replace all titles: rows, and their titles from `lines`."""
        self._text = b"".join(texts)
        self._rows = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
        self._ends = _ends(self._text)

    def put(self, row: int, titles: Iterable[str]) -> None:
        """Replace the titles of a device."""
        self._changed[row] = lines(titles)
        if len(self._changed) > 4096 + len(self._rows) // 16:
            self._merge()

    def put_other(self, subject: str, titles: Iterable[str]) -> None:
        """Replace the titles of a subject that is not a device."""
        if text := lines(titles):
            self.others[subject] = text
        else:
            self.others.pop(subject, None)

    def find(self, word: str) -> tuple[list[int], list[str]] | None:
        """The rows, and the other subjects, with a title that may have the word in it; None if there are too many."""
        wanted, rows = word.casefold().encode(), set[int]()
        at = self._text.find(wanted)
        while at >= 0:
            line = int(np.searchsorted(self._ends, at))
            row = int(self._rows[line])
            if row >= 0 and row not in self._changed:
                rows.add(row)
                if len(rows) > MAX_CANDIDATES:
                    return None
            at = self._text.find(wanted, int(self._ends[line]))
        rows.update(row for row, text in self._changed.items() if wanted in text)
        others = [subject for subject, text in self.others.items() if wanted in text]
        return (list(rows), others) if len(rows) + len(others) <= MAX_CANDIDATES else None

    def all_lines(self) -> tuple[bytes, NDArray[np.int32]]:
        """All devices' titles: a line each, and their rows."""
        self._merge()
        return self._text, self._rows

    def _merge(self) -> None:
        """Merge the changed titles into the text."""
        rows = [row for row, text in self._changed.items() for _ in range(text.count(b"\n"))]
        self._rows[np.isin(self._rows, np.array(list(self._changed), np.int32))] = -1
        kept = self._rows >= 0
        texts = [line for line, held in zip(self._text.splitlines(keepends=True), kept.tolist(), strict=True) if held]
        self.fill([self._rows[kept], np.array(rows, np.int64)], [*texts, *self._changed.values()])
        self._changed = {}


def lines(titles: Iterable[str]) -> bytes:
    """A line for each title, case-folded."""
    return "".join(f"{title.translate(_ONE_LINE).casefold()}\n" for title in titles).encode("utf-8", "replace")


_ONE_LINE = {ord(c): " " for c in "\n\r"}  # no word that is looked for has them in it


def _ends(text: bytes) -> NDArray[np.int64]:
    return np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))


def parse_titles_tsv(texts: Sequence[bytes]) -> bytes:
    """Lines from titles written as in SPARQL's TSV."""
    plain = all(text[:1] == b'"' == text[-1:] and b"\\" not in text and b"\r" not in text for text in texts)
    if plain:
        return b"".join(text[1:-1] + b"\n" for text in texts).decode().casefold().encode()
    return lines(_title(text) for text in texts)


def _title(text: bytes) -> str:
    (quad,) = ox.parse(b"<urn:s> <urn:p> " + text + b" .", ox.RdfFormat.TURTLE)
    return text_of(quad.object)


def text_of(node: object) -> str:
    """The term as a text, as SPARQL's STR gives it."""
    return node.value if isinstance(node, (ox.Literal, ox.NamedNode)) else ""


_TOKEN = re.compile(
    rf"(?P<opaque>{OPAQUE})|(?P<var>[?$]\w+)|(?P<pname>(?:[A-Za-z]{LETTERS})?:(?:[\w%:-]+(?:\.+[\w%:-]+)*)?)"
    r"|(?P<word>[A-Za-z]\w*)|(?P<other>\\.|&&|\|\||\^\^|[<>!]=|[0-9]+(?:\.[0-9]+)?|\S)",
    re.DOTALL,
)
_WORD = re.compile(r"(['\"])([^'\"\\\n\r]+)\1")
_PLAIN = re.compile(r"[A-Za-z0-9 _-]+")


def with_title_candidates(sparql: str, candidates: Callable[[str], Sequence[str] | None]) -> str | None:
    """Return a query with the candidates for its subjects, if it looks for a word in titles.

    It is recognised in a SELECT whose one group has only triples and filters, among them `?s td:title ?t` and a filter
    by CONTAINS(?t, "word") or REGEX(?t, "word", "i"), alone or joined to others by &&, and possibly with LCASE or STR
    around ?t. All solutions then have ?s among the candidates, and nothing else about the query changes.

    Parameters
    ----------
    sparql
        Any query.
    candidates
        Returns the subjects with a title that may have the word in it; None if they are too many.

    Returns
    -------
    str or None
        None if the query is not of this form, or has too many candidates.
    """
    if "title" not in sparql or "\\u" in sparql.lower():  # \\u stands for a character that is not visible in the text
        return None
    select = _parse_select(sparql)
    group = None if select is None else _parse_group(select.body, select.prefixes)
    if select is None or group is None:
        return None
    for conjunct in (part for condition in group.filters for part in _conjuncts(condition)):
        search = _parse_search(conjunct)
        if search is None or search[0] not in group.titles:
            continue
        title, word = search
        subjects = candidates(word)
        if subjects is None:
            return None
        subject = group.titles[title]
        values = f"VALUES ?{subject} {{ {' '.join(f'<{s}>' for s in subjects)} }} ?{subject} <{TD.title}> ?{title}"
        before, after = sparql[: select.body_start], sparql[select.body_start :]
        return f"{before} {{ SELECT ?{subject} ?{title} WHERE {{ {values} }} }} {after}"
    return None


class _Token(NamedTuple):
    text: str
    word: str
    """The text, of a keyword in capitals."""
    kind: str | None
    end: int


class _Select(NamedTuple):
    prefixes: dict[str, str]
    body: list[_Token]
    """What is between the braces of its one group."""
    body_start: int


class _Group(NamedTuple):
    titles: dict[str, str]
    """For each variable of a title, that of the subject."""
    filters: list[list[str]]


def _parse_select(sparql: str) -> _Select | None:
    """The parts of a SELECT with one group and no FROM; None for any other query."""
    tokens = [
        _Token(m[0], m[0].upper() if m.lastgroup == "word" else m[0], m.lastgroup, m.end())
        for m in _TOKEN.finditer(sparql)
        if not m[0].startswith("#")
    ]
    prefixes, at = {}, 0
    while at + 2 < len(tokens) and tokens[at].word == "PREFIX":
        prefixes[tokens[at + 1].text] = tokens[at + 2].text[1:-1]
        at += 3
    words = [token.word for token in tokens]
    if words[at : at + 1] != ["SELECT"] or words.count("{") != 1 or words.count("}") != 1 or "FROM" in words:
        return None
    begin, end = words.index("{"), words.index("}")
    return _Select(prefixes, tokens[begin + 1 : end], tokens[begin].end) if at < begin < end else None


def _parse_group(body: list[_Token], prefixes: dict[str, str]) -> _Group | None:
    """The titles and filters of a group; None if it has anything but triples and filters in it."""
    group = _Group({}, [])
    triple: list[str] = []  # the terms of the current triple, from its subject
    at = 0
    while at < len(body):
        token = body[at]
        if token.word == "FILTER":
            first, at = at + 1, _filter_end(body, at + 1)
            group.filters.append([t.word for t in body[first : at + 1]])
            triple = []
        elif token.word in _KEPT:
            triple = triple[: _KEPT[token.word]]
        elif (
            token.kind in ("opaque", "var", "pname") or token.text in ("a", "true", "false") or token.text[0].isdigit()
        ):
            triple.append(token.text)
            if len(triple) == 3 and _is_title(triple, prefixes):
                group.titles[triple[2][1:]] = triple[0][1:]
        elif token.word != "^^":  # of a literal
            return None
        at += 1
    return group


_KEPT = {".": 0, ";": 1, ",": 2}  # how many terms of a triple the next one shares


def _is_title(triple: list[str], prefixes: dict[str, str]) -> bool:
    subject, predicate, value = triple
    prefix, colon, local = predicate.partition(":")
    iri = predicate[1:-1] if predicate.startswith("<") else prefixes.get(prefix + colon, "") + local
    return subject[0] in "?$" and value[0] in "?$" and iri == TD.title


def _filter_end(body: list[_Token], at: int) -> int:
    """The position of the parenthesis that closes a filter's condition."""
    depth = 0
    while at < len(body):
        depth += {"(": 1, ")": -1}.get(body[at].word, 0)
        if depth <= 0 and body[at].word == ")":
            break
        at += 1
    return at


def _conjuncts(tokens: Sequence[str]) -> list[list[str]]:
    """The parts of a condition that must all be true."""
    if tokens[:1] == ["("] and _close(tokens) == len(tokens) - 1:
        parts: list[list[str]] = [[]]
        depth = 0
        for token in tokens[1:-1]:
            depth += {"(": 1, ")": -1}.get(token, 0)
            if depth == 0 and token == "||":
                return []
            if depth == 0 and token == "&&":
                parts.append([])
            else:
                parts[-1].append(token)
        return [inner for part in parts for inner in (_conjuncts(part) if part[:1] == ["("] else [part])]
    return [list(tokens)]


def _close(tokens: Sequence[str]) -> int:
    """The position of the parenthesis that closes the one at the beginning."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0:
            return i
    return -1


def _parse_search(tokens: list[str]) -> tuple[str, str] | None:
    """The variable and the word of a condition that looks for a word; None for any other condition."""
    if len(tokens) < 6 or tokens[0] not in ("CONTAINS", "REGEX") or _close(tokens[1:]) != len(tokens) - 2:
        return None
    variable, *rest = _unwrap(tokens[2:-1])
    if variable[0] not in "?$" or len(rest) < 2 or rest[0] != "," or (match := _WORD.fullmatch(rest[1])) is None:
        return None
    word, options = match[2], rest[2:]
    plain = word.isprintable() if tokens[0] == "CONTAINS" else _PLAIN.fullmatch(word) is not None
    allowed: tuple[list[str], ...] = ([],) if tokens[0] == "CONTAINS" else ([], [",", '"i"'], [",", "'i'"])
    return (variable[1:], word) if plain and options in allowed else None


def _unwrap(tokens: list[str]) -> list[str]:
    """The tokens without LCASE and STR around the first of them."""
    while tokens[0] in ("LCASE", "STR") and tokens[1:2] == ["("] and (end := _close(tokens[1:])) > 0:
        tokens = [*tokens[2 : 1 + end], *tokens[2 + end :]]
    return tokens
