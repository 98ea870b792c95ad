"""The vocabulary as a web page: every term with its definition, generated from the vocabulary's files."""

from collections.abc import Iterable, Iterator
from html import escape

import pyoxigraph as ox

from tinyfleet.ontology.vocabulary.entailment import CATALOGUE, VOCABULARY
from tinyfleet.ontology.vocabulary.namespaces import DCTERMS, OWL, RDF, RDFS, SH, SKOS, SOSA, TF, Iri, shorten
from tinyfleet.ontology.vocabulary.shapes import SHAPES

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; --code: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1.5rem; }
h1 { margin-bottom: 0; } h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
nav { columns: 14rem; font-size: .9rem; } nav a { display: block; }
section { border-top: 1px solid var(--line); padding: .6rem 0; }
section h3 { margin: 0; } section h3 small { color: var(--soft); font-weight: normal; margin-left: .5rem; }
section p { margin: .2rem 0; } :target { background: var(--code); }
dl { display: grid; grid-template-columns: 9rem 1fr; gap: 0 .8rem; margin: .3rem 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } code { background: var(--code); padding: 0 .2em; }
"""
_ROWS = (
    ("subclass of", RDFS.subClassOf),
    ("same as", OWL.equivalentClass),
    ("subproperty of", RDFS.subPropertyOf),
    ("domain", RDFS.domain),
    ("range", RDFS.range),
    ("unit", Iri("http://qudt.org/schema/qudt/hasUnit")),
    ("entailed by", OWL.propertyChainAxiom),
    ("see also", RDFS.seeAlso),
)
Node = ox.NamedNode | ox.BlankNode | ox.Literal | ox.Triple


class _Graph:
    def __init__(self) -> None:
        self.store = ox.Store()
        for path in (VOCABULARY, CATALOGUE, SHAPES):
            self.store.load(path=str(path), format=ox.RdfFormat.TURTLE)

    def objects(self, subject: Node, predicate: str) -> list[Node]:
        assert isinstance(subject, ox.NamedNode | ox.BlankNode)
        quads = self.store.quads_for_pattern(subject, ox.NamedNode(predicate), None)
        return sorted((quad.object for quad in quads), key=str)

    def text(self, subject: Node, predicate: str) -> str:
        return escape(next((o.value for o in self.objects(subject, predicate) if isinstance(o, ox.Literal)), ""))

    def items(self, cell: Node) -> Iterator[Node]:
        while cell != ox.NamedNode(RDF.nil):
            yield from self.objects(cell, RDF.first)
            (cell,) = self.objects(cell, RDF.rest)

    def of_type(self, kind: Iri, namespace: str) -> list[ox.NamedNode]:
        quads = self.store.quads_for_pattern(None, ox.NamedNode(RDF.type), ox.NamedNode(kind))
        nodes = [quad.subject for quad in quads if isinstance(quad.subject, ox.NamedNode)]
        return sorted((n for n in nodes if n.value.startswith(namespace)), key=lambda n: n.value.lower())

    def link(self, node: Node) -> str:
        """A link to a term, or the links of a list of terms (a union, a chain)."""
        if isinstance(node, ox.NamedNode):
            address = f"#{_anchor(node)}" if node.value.startswith(TF.iri) else node.value
            return f'<a href="{escape(address)}"><code>{escape(shorten(node.value))}</code></a>'
        for union in self.objects(node, OWL.unionOf):
            return " or ".join(self.link(item) for item in self.items(union))
        return " then ".join(self.link(item) for item in self.items(node))


def _anchor(term: ox.NamedNode) -> str:
    return term.value.removeprefix(TF.iri)


def page() -> str:
    """Return the page, complete in itself."""
    graph = _Graph()
    about = ox.NamedNode(TF.iri)
    classes = graph.of_type(OWL.Class, TF.iri)
    properties = graph.of_type(OWL.ObjectProperty, TF.iri) + graph.of_type(OWL.DatatypeProperty, TF.iri)
    properties.sort(key=lambda term: term.value.lower())
    observable = graph.of_type(SOSA.ObservableProperty, "")
    title = graph.text(about, DCTERMS.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>{graph.text(about, DCTERMS.description)}</p>
<dl><dt>namespace</dt><dd><code>{TF.iri}</code> (<code>tf:</code>)</dd>
<dt>version</dt><dd>{graph.text(about, OWL.versionInfo)}, after {_links(graph, about, OWL.priorVersion)}</dd>
<dt>licence</dt><dd>{_links(graph, about, DCTERMS.license)}</dd></dl>
<h2>Classes</h2><nav>{_index(classes)}</nav>{"".join(_term(graph, term) for term in classes)}
<h2>Properties</h2><nav>{_index(properties)}</nav>{"".join(_term(graph, term) for term in properties)}
<h2>Observable properties</h2>
<p>The values of <code>tf:observes</code> and <code>tf:inputProperty</code>, with the words that stand for them.</p>
<dl>{"".join(_observable(graph, term) for term in observable)}</dl>
</body></html>
"""


def _links(graph: _Graph, term: ox.NamedNode, predicate: str) -> str:
    return ", ".join(graph.link(node) for node in graph.objects(term, predicate))


def _index(terms: Iterable[ox.NamedNode]) -> str:
    return "".join(f'<a href="#{_anchor(term)}">{_anchor(term)}</a>' for term in terms)


def _term(graph: _Graph, term: ox.NamedNode) -> str:
    rows = [(name, _links(graph, term, predicate)) for name, predicate in _ROWS]
    rows.append(("constraints", "<br>".join(_rules(graph, term))))
    table = "".join(f"<dt>{name}</dt><dd>{said}</dd>" for name, said in rows if said)
    return (
        f'<section id="{_anchor(term)}"><h3>tf:{_anchor(term)}<small>{graph.text(term, RDFS.label)}</small></h3>'
        f"<p>{graph.text(term, SKOS.definition)}</p><dl>{table}</dl></section>\n"
    )


def _rules(graph: _Graph, term: ox.NamedNode) -> Iterator[str]:
    """The constraints of the shapes on this class."""
    for quad in graph.store.quads_for_pattern(None, ox.NamedNode(SH.targetClass), term):
        messages = [graph.text(quad.subject, SH.message)]
        messages += [graph.text(rule, SH.message) for rule in graph.objects(quad.subject, SH.property)]
        yield from sorted(filter(None, messages))


def _observable(graph: _Graph, term: ox.NamedNode) -> str:
    words = ", ".join(escape(o.value) for o in graph.objects(term, SKOS.notation) if isinstance(o, ox.Literal))
    return f"<dt>{escape(term.value.rpartition('/')[2])}</dt><dd><code>{escape(term.value)}</code> {words}</dd>"
