"""Reads Thing Descriptions: JSON, then triples by our own JSON-LD context, checked against form and shapes."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema_rs
import pyoxigraph as ox

from tinyfleet.edge.wire.json_text import parse_json
from tinyfleet.ontology import vocabulary
from tinyfleet.ontology.store.store import Value, value
from tinyfleet.ontology.vocabulary import shapes
from tinyfleet.ontology.vocabulary.namespaces import RDF, Iri

MAX_BYTES = 65_536
"""Maximum length of a Thing Description."""
MAX_DEPTH = 16
"""Maximum nesting of objects and arrays in it."""
MAX_VALUES = 8192
"""Maximum number of members and elements in it."""
_MAX_VIOLATIONS = 20  # reported of one description

TD_CONTEXT = "https://www.w3.org/2022/wot/td/v1.1"
_CONTEXT_FILE = Path(vocabulary.__file__).with_name("context.jsonld")

_SCHEMA_FILE = Path(vocabulary.__file__).with_name("thing.schema.json")
# JSON-LD keywords that a description may use; others could describe other nodes or change the meaning of terms.
_KEYWORDS = {"@context", "@id", "@type"}


class RejectedMessage(Exception):
    """A message is not accepted; `violations` are the reasons, one line each."""

    def __init__(self, *violations: str) -> None:
        super().__init__("; ".join(violations))
        self.violations = violations


@cache
def _context() -> dict[str, Any]:
    context: dict[str, Any] = json.loads(_CONTEXT_FILE.read_text(encoding="utf-8"))["@context"]
    return context


@cache
def _schema() -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(json.loads(_SCHEMA_FILE.read_text(encoding="utf-8")))


def parse_thing_description(payload: bytes) -> dict[str, Any]:
    """Return the JSON object of a Thing Description.

    Raises RejectedMessage if it is too long, nests too deep, or is not a JSON object.
    """
    if len(payload) > MAX_BYTES:
        raise RejectedMessage(f"{len(payload)} bytes are more than the {MAX_BYTES} allowed for a description")
    try:
        document = parse_json(payload, max_values=MAX_VALUES, max_depth=MAX_DEPTH)
    except ValueError as error:
        raise RejectedMessage(str(error)) from None
    if not isinstance(document, dict):
        raise RejectedMessage("it is not a JSON object")
    return document


def to_triples(document: Mapping[str, Any]) -> list[ox.Triple]:
    """Return the triples of a Thing Description, read with our own context: nothing is fetched.

    Its @context must be that of TD 1.1, and may add prefixes as objects of names and IRIs. Raises RejectedMessage for
    any other context, for a nested context, and for keywords that describe other nodes.
    """
    given = document.get("@context")
    entries = given if isinstance(given, list) else [given]
    if TD_CONTEXT not in entries:
        raise RejectedMessage(f"its @context must hold {TD_CONTEXT}")
    context = dict(_context())
    for entry in entries:
        if entry == TD_CONTEXT:
            continue
        if not isinstance(entry, dict):
            raise RejectedMessage(
                f"its @context names {_shown(entry)}; only {TD_CONTEXT} is known, and nothing is fetched"
            )
        for name, iri in entry.items():
            if name.startswith("@") or not isinstance(iri, str) or not iri.endswith(("#", "/", ":")):
                raise RejectedMessage(f"its @context may add prefixes only, such as tf, not {_shown(name)}")
            if context.get(name, iri) != iri:
                raise RejectedMessage(f"its @context redefines {_shown(name)}")
            context[name] = iri
    body = {name: v for name, v in document.items() if name != "@context"}
    _no_keywords(body)
    try:
        quads = ox.parse(json.dumps({"@context": context, **body}), ox.RdfFormat.JSON_LD, without_named_graphs=True)
        return [quad.triple for quad in quads]
    except (SyntaxError, ValueError) as error:
        raise RejectedMessage(f"it is not valid JSON-LD: {error}") from None


def _shown(value: object) -> str:
    """A text of the sender's, cut; of anything else its type."""
    return f"'{value:.60}'" if isinstance(value, str) else type(value).__name__


def _no_keywords(node: object) -> None:
    if isinstance(node, dict):
        for name, inner in node.items():
            if name.startswith("@") and (name not in _KEYWORDS or name == "@context"):
                raise RejectedMessage(f"it may not use {_shown(name)} inside")
            _no_keywords(inner)
    elif isinstance(node, list):
        for inner in node:
            _no_keywords(inner)


class DescribedTriples:
    """The triples of a Thing Description."""

    def __init__(self, triples: list[ox.Triple]) -> None:
        self.triples = triples

    def facts(self, subject: str) -> dict[Iri, list[Value]]:
        facts: dict[Iri, list[Value]] = {}
        for t in self.triples:
            if isinstance(t.subject, ox.NamedNode) and t.subject.value == subject:
                facts.setdefault(Iri(t.predicate.value), []).append(value(t.object))
        return facts

    def of_type(self, kind: Iri) -> Iterator[str]:
        for t in self.triples:
            if t.predicate.value == RDF.type and isinstance(t.object, ox.NamedNode) and t.object.value == kind:
                yield t.subject.value if isinstance(t.subject, ox.NamedNode) else str(t.subject)

    def check(self, document: Mapping[str, Any]) -> None:
        """Raise RejectedMessage unless the document has the form of a description and the triples fit the shapes."""
        form = [
            f"{'.'.join(map(str, error.instance_path)) or '(root)'}: {error.message:.200}"
            for error in islice(_schema().iter_errors(dict(document)), _MAX_VIOLATIONS)
        ]
        violations = [*shapes.violations(self.triples), *form]
        if violations:
            raise RejectedMessage(*violations[:_MAX_VIOLATIONS])
