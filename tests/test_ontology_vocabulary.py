"""The vocabulary says what every one of its terms means, and nothing in the graph uses a term that it lacks."""

import json
import os
import re
from html import escape
from pathlib import Path

import pyoxigraph as ox
import pytest

from tinyfleet.ontology.queries import library
from tinyfleet.ontology.vocabulary.namespaces import (
    MLS,
    NNET,
    OWL,
    RDF,
    RDFS,
    S3N,
    S3N_EXTEND,
    SOSA,
    SOSA_EXTEND,
    SSN,
    SSN_SYSTEM,
    TD,
    TF,
)

ONTOLOGY = Path(__file__).parent.parent / "ontology" / "vocabulary"
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
    unions = [q.object.value for q in VOCABULARY if q.predicate.value == RDF.first and not is_foreign(q.object)]
    assert unions and set(unions) <= defined()


def is_foreign(node: object) -> bool:
    return not (isinstance(node, ox.NamedNode) and node.value.startswith(TF.iri))


def test_the_vocabulary_has_a_version_and_names_the_one_before() -> None:
    (version,) = said(TF.iri, OWL.versionIRI)
    (number,) = said(TF.iri, OWL.versionInfo)
    (prior,) = said(TF.iri, OWL.priorVersion)
    assert version == f"https://w3id.org/tinyfleet/{number}"
    assert prior.startswith("https://w3id.org/tinyfleet/") and prior < version


def test_quantities_say_their_unit() -> None:
    for term in defined():
        if term.endswith(("Bytes", "Seconds", "Joules", "Hz")):
            assert len(said(term, "http://qudt.org/schema/qudt/hasUnit")) == 1, term


def ontologies() -> set[str]:
    """Every IRI that the ontologies at hand speak of as a subject."""
    data = os.environ.get("TINYFLEET_DATA")
    if not data or not (Path(data) / "ontologies").is_dir() or not (Path(data) / "seloc_ml").is_dir():
        pytest.skip("TINYFLEET_DATA has no ontologies to compare with")
    known: set[str] = set()
    files = [*(Path(data) / "ontologies").rglob("*.ttl"), *(Path(data) / "seloc_ml").glob("schema_*.ttl")]
    for path in files:
        try:
            quads = ox.parse(path=str(path), format=ox.RdfFormat.TURTLE, base_iri="urn:base:")
            known |= {q.subject.value for q in quads if isinstance(q.subject, ox.NamedNode)}
        except SyntaxError:
            assert path.name in ("sosa-oms.ttl", "dht22.ttl"), "these two are broken at their source"
    return known


def test_every_term_of_others_that_we_align_to_exists() -> None:
    known = ontologies()
    # PROV-O, schema.org, QUDT and SKOS are not at hand.
    checked = (MLS, NNET, S3N, S3N_EXTEND, SOSA, SOSA_EXTEND, SSN, SSN_SYSTEM, TD)
    used: set[str] = set()
    for path in (ONTOLOGY / "tinyfleet.ttl", ONTOLOGY / "catalogue.ttl"):
        for quad in load(path):
            used |= {n.value for n in (quad.subject, quad.predicate, quad.object) if isinstance(n, ox.NamedNode)}
    rules = (ONTOLOGY / "entailment.rq").read_text(encoding="utf-8")
    prefixes = dict(re.findall(r"PREFIX ([\w-]+): <([^>]+)>", rules))
    used |= {prefixes[p] + name for p, name in re.findall(r"(?<![\w<:])([a-z][\w-]*):([A-Za-z]\w*)", rules)}
    found = {iri for iri in used if iri.startswith(tuple(namespace.iri for namespace in checked))}
    assert len(found) > 50
    # S3N's axioms use this one, and it forgets to define it; the authors' descriptions and queries use it too.
    assert found - known == {S3N.hasSystemCapability}
    for namespace in checked:
        assert any(iri.startswith(namespace.iri) for iri in found), namespace.iri


def test_what_the_registry_writes_of_a_device_is_implied() -> None:
    from tinyfleet.ontology.ingest.registry import _TYPES
    from tinyfleet.ontology.vocabulary.entailment import entailment_rules

    assert set(_TYPES) - {TF.Device} <= entailment_rules()[TF.Device]


def test_axioms_are_closed_and_hold_both_ways_where_they_are_equal() -> None:
    from tinyfleet.ontology.vocabulary.entailment import entailment_rules

    assert TF.Model in entailment_rules()[NNET.NeuralNetwork] and NNET.NeuralNetwork in entailment_rules()[TF.Model]
    assert TF.target in entailment_rules()[TF.confirmedBy]
    for term, upper in entailment_rules().items():
        assert term not in upper
        for wider in upper:
            assert entailment_rules().get(wider, frozenset()) - {term} <= upper


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
    for kind in (term for term in defined() if OWL.Class in said(term, RDF.type)):
        assert kind in used, f"{kind} has no shape"


def test_every_term_that_code_and_queries_use_is_defined() -> None:
    used = {}
    root = ONTOLOGY.parent
    for path in (p for folder in ("edge", "ontology", "firmware_tools", "server") for p in root.glob(f"{folder}/*.py")):
        text = path.read_text(encoding="utf-8")
        used |= {term: path.name for term in re.findall(r"\bTF\.([a-zA-Z]\w*)", text) if term != "iri"}
        used |= dict.fromkeys(re.findall(r"\btf:([a-zA-Z]\w*)", text), path.name)
    used |= dict.fromkeys(re.findall(r"\btf:([a-zA-Z]\w*)", (ONTOLOGY / "entailment.rq").read_text()), "entailment.rq")
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
        from tinyfleet.ontology.store.store import parameters

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


def test_the_page_holds_every_term_and_needs_nothing_from_elsewhere() -> None:
    from html.parser import HTMLParser

    from tinyfleet.ontology.vocabulary.page import page

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.ids: set[str] = set()
            self.anchors: set[str] = set()
            self.tags: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            said = dict(attrs)
            if tag == "section":
                self.ids.add(str(said["id"]))
            if str(said.get("href", "")).startswith("#"):
                self.anchors.add(str(said["href"])[1:])

    text = page()
    reader = Reader()
    reader.feed(text)
    assert reader.ids == {term.removeprefix(TF.iri) for term in defined()}
    assert reader.anchors <= reader.ids
    assert not reader.tags & {"script", "link", "img", "iframe"}
    for term in defined():
        (definition,) = said(term, SKOS_DEFINITION)
        assert escape(definition) in text
    assert "tf:ramBytes: one whole number of bytes from 1" in text, "the rules are there"
