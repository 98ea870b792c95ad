"""The vocabulary says what every one of its terms means, and nothing in the graph uses a term that it lacks."""

import json
import os
import re
from pathlib import Path

import pyoxigraph as ox
import pytest

from ontology import library
from ontology.names import NNET, OWL, RDF, RDFS, TF

ONTOLOGY = Path(__file__).parent.parent / "ontology"
SKOS_DEFINITION = "http://www.w3.org/2004/02/skos/core#definition"


def load(path: Path) -> ox.Store:
    store = ox.Store()
    store.load(path=str(path), format=ox.RdfFormat.TURTLE)
    return store


VOCABULARY = load(ONTOLOGY / "tinyfleet.ttl")


def said(subject: str, predicate: str) -> list[str]:
    found = VOCABULARY.quads_for_pattern(ox.NamedNode(subject), ox.NamedNode(predicate), None)
    return [quad.object.value if not isinstance(quad.object, ox.BlankNode) else "_" for quad in found]


def defined() -> set[str]:
    return {
        quad.subject.value
        for quad in VOCABULARY.quads_for_pattern(None, ox.NamedNode(RDF.type), None)
        if isinstance(quad.subject, ox.NamedNode) and quad.subject.value.startswith(TF.iri)
        and quad.subject.value != TF.iri
    }  # fmt: skip


def test_every_term_has_a_label_and_a_definition() -> None:
    assert len(defined()) > 50
    for term in defined():
        assert len(said(term, RDFS.label)) == 1, term
        assert len(said(term, SKOS_DEFINITION)) == 1, term


def test_every_property_has_a_domain_and_a_range_that_exist() -> None:
    for term in defined():
        if OWL.Class in said(term, RDF.type):
            continue
        for predicate in (RDFS.domain, RDFS.range):
            (node,) = said(term, predicate)
            assert not node.startswith(TF.iri) or node in defined(), (term, node)


def test_every_term_that_the_shapes_use_is_defined() -> None:
    shapes = load(ONTOLOGY / "shapes.ttl")
    own = {quad.subject.value for quad in shapes if isinstance(quad.subject, ox.NamedNode)}
    used = {
        node.value
        for quad in shapes
        for node in (quad.subject, quad.predicate, quad.object)
        if isinstance(node, ox.NamedNode) and node.value.startswith(TF.iri)
    }
    assert used - own <= defined()
    for kind in ("Device", "Board", "Model", "Layer", "Run", "Round", "Participation", "ModelVersion"):
        assert TF[kind] in used, f"{kind} has no shape"


def test_every_term_that_code_and_queries_use_is_defined() -> None:
    used = {}
    for path in ONTOLOGY.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        used |= {term: path.name for term in re.findall(r"\bTF\.([a-zA-Z]\w*)", text) if term != "iri"}
        used |= dict.fromkeys(re.findall(r"\btf:([a-zA-Z]\w*)", text), path.name)
    for name in library.names():
        used |= dict.fromkeys(re.findall(r"\btf:([a-zA-Z]\w*)", library.text(name)), name)
    assert len(used) > 40
    for term, where in used.items():
        assert TF[term] in defined(), f"tf:{term} in {where}"


def test_every_query_says_what_it_answers_and_what_it_takes() -> None:
    assert {"clients", "trainable", "runnable", "last-round", "lineage"} <= set(library.names())
    for name in library.names():
        head = library.text(name).split("\n\n")[0]
        assert all(line.startswith("#") for line in head.splitlines()), name
        from ontology.store import parameters

        for parameter in parameters(library.text(name)):
            assert re.search(rf"^# {parameter}: ", head, re.MULTILINE), f"{name} does not explain {parameter}"


def test_the_context_agrees_with_that_of_the_thing_description() -> None:
    data = os.environ.get("TINYFLEET_DATA")
    path = Path(data or "") / "ontologies/wot-td/td-context-1.1.jsonld"
    if not data or not path.exists():
        pytest.skip("TINYFLEET_DATA has no W3C context to compare with")
    theirs = json.loads(path.read_text(encoding="utf-8"))["@context"]
    ours = json.loads((ONTOLOGY / "context.jsonld").read_text(encoding="utf-8"))["@context"]
    compared = 0
    for term, meaning in theirs.items():
        if term in ours and not term.startswith("@"):
            iri = meaning["@id"] if isinstance(meaning, dict) else meaning
            mine = ours[term]["@id"] if isinstance(ours[term], dict) else ours[term]
            expand = lambda i, c: re.sub(r"^(\w+):(?!//)", lambda m: c.get(m[1], m[0]), i)  # noqa: E731
            assert expand(mine, ours) == expand(iri, theirs), term
            compared += 1
    assert compared > 15


def test_the_terms_of_the_authors_schema_that_we_build_on_exist() -> None:
    data = os.environ.get("TINYFLEET_DATA")
    path = Path(data or "") / "seloc_ml/schema_network_schema.ttl"
    if not data or not path.exists():
        pytest.skip("TINYFLEET_DATA has no network schema")
    theirs = {q.subject.value for q in load(path) if isinstance(q.subject, ox.NamedNode)}
    used = {
        n.value
        for q in VOCABULARY
        for n in (q.subject, q.object)
        if isinstance(n, ox.NamedNode) and n.value.startswith(NNET.iri)
    }
    assert used and used <= theirs
