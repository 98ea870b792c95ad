"""The facts that follow from a description by the vocabulary.

They are written along with the description, so that queries in other vocabularies (S3N, SOSA, the network schema) are
answered without a reasoner. The axioms of tinyfleet.ttl are computed once. The rules of entailment.rq go beyond axioms
and run over one board or model and catalogue.ttl. Devices do not pass through here, since a fleet may have a million of
them; the registry adds the few entailed facts that they need.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pyoxigraph as ox

from tinyfleet.ontology.store.store import Binding, Facts, Value, term, triples, value
from tinyfleet.ontology.vocabulary.namespaces import OWL, RDF, RDFS, Iri

VOCABULARY = Path(__file__).with_name("tinyfleet.ttl")
CATALOGUE = Path(__file__).with_name("catalogue.ttl")
_RULES = Path(__file__).with_name("entailment.rq")


@cache
def _graph(path: Path) -> list[ox.Quad]:
    return [ox.Quad(q.subject, q.predicate, q.object) for q in ox.parse(path=str(path), format=ox.RdfFormat.TURTLE)]


@cache
def entailment_rules() -> Mapping[Iri, frozenset[Iri]]:
    """For each class and each property, the classes and properties that it entails."""
    steps: dict[Iri, set[Iri]] = {}
    for quad in _graph(VOCABULARY):
        if not isinstance(quad.subject, ox.NamedNode) or not isinstance(quad.object, ox.NamedNode):
            continue
        lower, upper = Iri(quad.subject.value), Iri(quad.object.value)
        if quad.predicate.value in (RDFS.subClassOf, RDFS.subPropertyOf):
            steps.setdefault(lower, set()).add(upper)
        elif quad.predicate.value in (OWL.equivalentClass, OWL.equivalentProperty):
            steps.setdefault(lower, set()).add(upper)
            steps.setdefault(upper, set()).add(lower)
    closed = {}
    for start in steps:
        found: set[Iri] = set()
        ahead = {start}
        while ahead:
            ahead = {upper for lower in ahead for upper in steps.get(lower, ())} - found
            found |= ahead
        closed[start] = frozenset(found - {start})
    return closed


def with_entailments(facts: Facts, known: Facts | None = None) -> dict[Iri, dict[Iri, Binding | None]]:
    """Return facts about boards and models with the facts that follow. known: facts about the parts that they name."""
    both: dict[Iri, dict[Iri, list[Value]]] = {}

    def say(subject: Iri, predicate: Iri, o: Value) -> None:
        values = both.setdefault(subject, {}).setdefault(predicate, [])
        if not any(o == v and type(o) is type(v) for v in values):
            values.append(o)

    def close() -> None:
        for subject, said in list(both.items()):
            for predicate, values in list(said.items()):
                upper = entailment_rules().get(predicate, frozenset())
                for o in list(values):
                    for wider in upper:
                        say(subject, wider, o)
                    if predicate == RDF.type and isinstance(o, Iri):
                        for wider in entailment_rules().get(o, frozenset()):
                            say(subject, RDF.type, wider)

    for s, p, o in triples(facts):
        say(s, p, o)
    close()
    store = ox.Store()
    store.extend(_graph(CATALOGUE))
    for some in (both, known or {}):
        store.extend([ox.Quad(ox.NamedNode(s), ox.NamedNode(p), term(o)) for s, p, o in triples(some)])
    found = store.query(_RULES.read_text(encoding="utf-8"))
    assert isinstance(found, ox.QueryTriples)
    for t in found:
        say(Iri(t.subject.value), Iri(t.predicate.value), value(t.object))
    close()
    result: dict[Iri, dict[Iri, Binding | None]] = {s: dict(said) for s, said in both.items()}
    for subject, given in facts.items():
        for predicate, o_ in given.items():
            if o_ is None:  # to be removed
                result.setdefault(subject, {}).setdefault(predicate, None)
    return result
