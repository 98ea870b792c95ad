"""Titles, to be searched for a word: which subjects have it in their td:title, in milliseconds among a million.

The titles lie one after another in one text, case folded, which is searched as a whole: memory's speed, no words to be
kept in order, and any part of a title is found, as SPARQL's CONTAINS finds it. What is found are candidates. The query
is asked of the graph with those alone, so that the graph decides.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyoxigraph as ox
from numpy.typing import NDArray
from tinyfleet.ontology.store.store import OPAQUE
from tinyfleet.ontology.vocabulary.namespaces import TD

MOST = 1000
"""Candidates: of more, a query is asked without them. It then finds one in every thousand, or has no limit anyway."""


class TitleIndex:
    """The titles of devices, by their rows, and of other subjects, by their IRIs."""

    def __init__(self) -> None:
        self._text = b""  # of each title a line
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)
        self._rows: NDArray[np.int32] = np.empty(0, np.int32)  # of each line, -1 of one that holds no more
        self._changed: dict[int, bytes] = {}  # rows that have other lines now
        self.others: dict[str, bytes] = {}

    def fill(self, rows: Sequence[NDArray[Any]], texts: Sequence[bytes]) -> None:
        """Makes these all titles: rows, and their titles from `lines`."""
        self._text = b"".join(texts)
        self._rows = np.concatenate([np.empty(0, np.int32), *rows]).astype(np.int32)
        self._ends = _ends(self._text)

    def put(self, row: int, titles: Iterable[str]) -> None:
        """Makes these the titles of a device."""
        self._changed[row] = lines(titles)
        if len(self._changed) > 4096 + len(self._rows) // 16:
            self._settle()

    def put_other(self, subject: str, titles: Iterable[str]) -> None:
        """Makes these the titles of what is no device."""
        if text := lines(titles):
            self.others[subject] = text
        else:
            self.others.pop(subject, None)

    def find(self, word: str) -> tuple[list[int], list[str]] | None:
        """The rows, and the other subjects, with a title that may have the word in it; None if they are too many."""
        wanted, rows = word.casefold().encode(), set[int]()
        at = self._text.find(wanted)
        while at >= 0:
            line = int(np.searchsorted(self._ends, at))
            row = int(self._rows[line])
            if row >= 0 and row not in self._changed:
                rows.add(row)
                if len(rows) > MOST:
                    return None
            at = self._text.find(wanted, int(self._ends[line]))
        rows.update(row for row, text in self._changed.items() if wanted in text)
        others = [subject for subject, text in self.others.items() if wanted in text]
        return (list(rows), others) if len(rows) + len(others) <= MOST else None

    def settled(self) -> tuple[bytes, NDArray[np.int32]]:
        """All devices' titles: a line each, and their rows."""
        self._settle()
        return self._text, self._rows

    def _settle(self) -> None:
        """Puts what has changed among the rest."""
        rows = [row for row, text in self._changed.items() for _ in range(text.count(b"\n"))]
        self._rows[np.isin(self._rows, np.array(list(self._changed), np.int32))] = -1
        kept = self._rows >= 0
        texts = [line for line, held in zip(self._text.splitlines(keepends=True), kept.tolist(), strict=True) if held]
        self.fill([self._rows[kept], np.array(rows, np.int64)], [*texts, *self._changed.values()])
        self._changed = {}


def lines(titles: Iterable[str]) -> bytes:
    """A line for each title, in which a word can be found whatever its case."""
    return "".join(f"{title.translate(_ONE_LINE).casefold()}\n" for title in titles).encode("utf-8", "replace")


_ONE_LINE = {ord(c): " " for c in "\n\r"}  # which no word has in it that is looked for


def _ends(text: bytes) -> NDArray[np.int64]:
    return np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n"))


def parse_titles_tsv(texts: Sequence[bytes]) -> bytes:
    """Lines from titles as SPARQL's TSV writes them."""
    plain = all(text[:1] == b'"' == text[-1:] and b"\\" not in text and b"\r" not in text for text in texts)
    if plain:
        return b"".join(text[1:-1] + b"\n" for text in texts).decode().casefold().encode()
    return lines(_title(text) for text in texts)


def _title(text: bytes) -> str:
    (quad,) = ox.parse(b"<urn:s> <urn:p> " + text + b" .", ox.RdfFormat.TURTLE)
    return text_of(quad.object)


def text_of(node: object) -> str:
    """What STR makes of a term."""
    return node.value if isinstance(node, (ox.Literal, ox.NamedNode)) else ""


_TOKEN = re.compile(
    rf"(?P<opaque>{OPAQUE})|(?P<var>[?$]\w+)|(?P<pname>(?:[A-Za-z][\w.-]*)?:(?:[\w%:-]+(?:\.+[\w%:-]+)*)?)|(?P<word>[A-Za-z]\w*)"
    r"|(?P<other>&&|\|\||\^\^|[<>!]=|[0-9]+(?:\.[0-9]+)?|\S)",
    re.DOTALL,
)
_WORD = re.compile(r"(['\"])([^'\"\\\n\r]+)\1")
_PLAIN = re.compile(r"[A-Za-z0-9 _-]+")


def with_title_candidates(sparql: str, candidates: Callable[[str], Sequence[str] | None]) -> str | None:
    """The query with the candidates for its subjects, if it looks for a word in titles; None if it does not, or not in
    a way that is seen here, or if `candidates` of that word are None.

    It is seen in a SELECT whose one group has nothing but triples and filters in it, among them `?s td:title ?t` and a
    filter by CONTAINS(?t, "word") or REGEX(?t, "word", "i"), alone or joined to others by &&. LCASE or STR may be
    around ?t. All solutions then have ?s among the candidates, and nothing else of the query changes.
    """
    if "title" not in sparql or "\\u" in sparql.lower():  # \\u stands for other characters than are seen
        return None
    tokens = [m for m in _TOKEN.finditer(sparql) if not m[0].startswith("#")]
    texts = [m[0] for m in tokens]
    words = [m[0].upper() if m.lastgroup == "word" else m[0] for m in tokens]
    prefixes, at = {}, 0
    while words[at : at + 1] == ["PREFIX"] and len(texts) > at + 2:
        prefixes[texts[at + 1]] = texts[at + 2][1:-1]
        at += 3
    if words[at : at + 1] != ["SELECT"] or texts.count("{") != 1 or texts.count("}") != 1 or "FROM" in words:
        return None
    begin, end = texts.index("{"), texts.index("}")
    if not at < begin < end:
        return None

    def iri(token: str) -> str:
        prefix, colon, local = token.partition(":")
        return token[1:-1] if token.startswith("<") else prefixes.get(prefix + colon, "") + local

    triple: list[str] = []  # what there is of one, from its subject on
    titled: dict[str, str] = {}
    filters: list[list[str]] = []
    at = begin + 1
    while at < end:
        token, kind = words[at], tokens[at].lastgroup
        if token == "FILTER":
            first, depth = at + 1, 0
            at += 1
            while at < end and (words[at] not in ("(", ")") or (depth := depth + (1 if words[at] == "(" else -1)) > 0):
                at += 1
            filters.append(words[first : at + 1])
            triple = []
        elif token in (".", ";", ","):
            triple = triple[: {".": 0, ";": 1, ",": 2}[token]]
        elif kind in ("opaque", "var", "pname") or texts[at] in ("a", "true", "false") or token[0].isdigit():
            triple.append(texts[at])
            if len(triple) == 3 and triple[0][0] in "?$" and triple[2][0] in "?$" and iri(triple[1]) == TD.title:
                titled[triple[2][1:]] = triple[0][1:]
        elif token != "^^":  # of a literal
            return None
        at += 1
    for conjunct in (part for each in filters for part in _conjuncts(each)):
        found = _wanted(conjunct)
        if found is None or found[0] not in titled:
            continue
        subjects = candidates(found[1])
        if subjects is None:
            return None
        place, (title, subject) = tokens[begin].end(), (found[0], titled[found[0]])
        among = f"VALUES ?{subject} {{ {' '.join(f'<{s}>' for s in subjects)} }} ?{subject} <{TD.title}> ?{title}"
        return f"{sparql[:place]} {{ SELECT ?{subject} ?{title} WHERE {{ {among} }} }} {sparql[place:]}"
    return None


def _conjuncts(tokens: Sequence[str]) -> list[list[str]]:
    """The parts of a filter that must all be true."""
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
    """Where the parenthesis closes that the tokens begin with."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth == 0:
            return i
    return -1


def _wanted(tokens: list[str]) -> tuple[str, str] | None:
    """The variable and the word that it must have in it."""
    if len(tokens) < 6 or tokens[0] not in ("CONTAINS", "REGEX") or _close(tokens[1:]) != len(tokens) - 2:
        return None
    given = tokens[2:-1]
    while given[0] in ("LCASE", "STR") and given[1:2] == ["("] and (end := _close(given[1:])) > 0:
        given = [*given[2 : 1 + end], *given[2 + end :]]
    if given[0][0] not in "?$" or given[1:2] != [","] or (word := _WORD.fullmatch(given[2])) is None:
        return None
    if tokens[0] == "CONTAINS" and given[3:] == [] and word[2].isprintable():
        return given[0][1:], word[2]
    if tokens[0] == "REGEX" and given[3:] in ([], [",", '"i"'], [",", "'i'"]) and _PLAIN.fullmatch(word[2]):
        return given[0][1:], word[2]
    return None
