"""W3C's 34 tests of the SPARQL 1.1 Protocol (rdf-tests, sparql/sparql11/protocol), each by its name there.

Every request goes to the real endpoint as the test gives it, with the token that updates need.
"""

import contextlib
import csv
import http.client
import io
import json
import urllib.parse
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyoxigraph as ox
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ontology_fixtures import TOKEN

from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.store.sparql_update import with_graphs
from tinyfleet.ontology.store.store import BASE, EmbeddedStore, StoreError
from tinyfleet.ontology.vocabulary.namespaces import Iri

DATA = "http://kasei.us/2009/09/sparql/data/data{}.rdf"
DOCUMENT = "http://xmlns.com/foaf/0.1/Document"
QUERY, UPDATE, FORM = "application/sparql-query", "application/sparql-update", "application/x-www-form-urlencoded"
ROWS = ("application/sparql-results+json", "application/sparql-results+xml", "text/csv", "text/tab-separated-values")
TRIPLES = ("text/turtle", "application/rdf+xml", "application/n-triples", "application/ld+json")
INSERT_THREE = "\n".join(f"GRAPH <{DATA.format(i)}> {{ <{DATA.format(i)}> a foaf:Document }}" for i in (1, 2, 3))


@dataclass(frozen=True)
class Reply:
    status: int
    kind: str
    body: bytes

    @property
    def boolean(self) -> bool:
        assert 200 <= self.status < 300, self
        if self.kind == "application/sparql-results+xml":
            return ElementTree.fromstring(self.body).findtext("{*}boolean") == "true"
        assert self.kind == "application/sparql-results+json"
        return bool(json.loads(self.body)["boolean"])


Ask = Callable[..., Reply]


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Sends a request to an endpoint whose store has the test data's three graphs."""
    with EmbeddedStore() as store, Endpoint(store, Access.of_token(TOKEN, "read")) as endpoint:
        store.update(f"PREFIX foaf: <http://xmlns.com/foaf/0.1/> INSERT DATA {{ {INSERT_THREE} }}")
        port = urllib.parse.urlsplit(endpoint.url).port

        def send(method: str, target: str, body: bytes | str | None = None, kind: str | None = None) -> Reply:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            headers = {"Authorization": f"Bearer {TOKEN}"} | ({} if kind is None else {"Content-Type": kind})
            try:
                connection.request(method, target, body.encode() if isinstance(body, str) else body, headers)
                reply = connection.getresponse()
                return Reply(reply.status, reply.headers.get_content_type(), reply.read())
            finally:
                connection.close()

        yield send


def target(**fields: str | list[str]) -> str:
    """The endpoint's address with these parameters; - in their names is written _."""
    named = {name.replace("_", "-"): value for name, value in fields.items()}
    return "/sparql/?" + urllib.parse.urlencode(named, doseq=True, quote_via=urllib.parse.quote)


def graphs(*numbers: int) -> list[str]:
    return [DATA.format(i) for i in numbers]


def types(*numbers: int) -> str:
    return " ".join(f"<{DATA.format(i)}> a ?type ." for i in numbers)


def named(*numbers: int) -> str:
    return " ".join(f"GRAPH ?g{i} {{ <{DATA.format(i)}> a ?type }}" for i in numbers)


def accepted(reply: Reply) -> bool:
    return 200 <= reply.status < 400


def refused(reply: Reply) -> bool:
    return 400 <= reply.status < 500


def test_query_post_form(ask: Ask) -> None:
    assert ask("POST", target(default_graph_uri=DATA.format(0)), "query=ASK%20%7B%7D", FORM).boolean


def test_query_dataset_default_graphs_get(ask: Ask) -> None:
    assert ask("GET", target(query=f"ASK {{ {types(1, 2)} }}", default_graph_uri=graphs(1, 2))).boolean
    assert not ask("GET", target(query=f"ASK {{ {types(1, 2)} }}", default_graph_uri=graphs(1, 3))).boolean


def test_query_dataset_default_graphs_post(ask: Ask) -> None:
    assert ask("POST", target(default_graph_uri=graphs(1, 2)), f"ASK {{ {types(1, 2)} }}", QUERY).boolean


def test_query_dataset_named_graphs_post(ask: Ask) -> None:
    assert ask("POST", target(named_graph_uri=graphs(1, 2)), f"ASK {{ {named(1, 2)} }}", QUERY).boolean


def test_query_dataset_named_graphs_get(ask: Ask) -> None:
    assert ask("GET", target(query=f"ASK {{ {named(1, 2)} }}", named_graph_uri=graphs(1, 2))).boolean
    assert not ask("GET", target(query=f"ASK {{ {named(1, 2)} }}", named_graph_uri=graphs(1, 3))).boolean


def test_query_dataset_full(ask: Ask) -> None:
    where = target(default_graph_uri=graphs(3), named_graph_uri=graphs(1, 2))
    assert ask("POST", where, f"ASK {{ {types(3)} {named(1, 2)} }}", QUERY).boolean


@pytest.mark.parametrize("between", ["&named-graph-uri=", "%26named-graph-uri%3D"], ids=["as meant", "as published"])
def test_query_multiple_dataset(ask: Ask, between: str) -> None:
    """The request's graphs hold, not the query's. The published test escapes the & between two of them."""
    first, second = (urllib.parse.quote(graph, safe="") for graph in graphs(1, 2))
    query = f"ASK FROM <{DATA.format(3)}> {{ {named(1, 2)} }}"
    assert ask("POST", f"/sparql/?named-graph-uri={first}{between}{second}", query, QUERY).boolean
    assert not ask("POST", f"/sparql/?named-graph-uri={first}", query, QUERY).boolean


def test_query_get(ask: Ask) -> None:
    assert ask("GET", target(query="ASK {}", default_graph_uri=DATA.format(0))).boolean


def test_query_content_type_select(ask: Ask) -> None:
    reply = ask("POST", target(default_graph_uri=DATA.format(0)), "SELECT (1 AS ?value) {}", QUERY)
    assert (reply.status, reply.kind in ROWS) == (200, True)


def test_query_content_type_ask(ask: Ask) -> None:
    reply = ask("POST", target(default_graph_uri=DATA.format(0)), "ASK {}", QUERY)
    assert (reply.status, reply.kind in ROWS[:2]) == (200, True)


def test_query_content_type_describe(ask: Ask) -> None:
    reply = ask("POST", target(default_graph_uri=DATA.format(0)), "DESCRIBE <http://example.org/>", QUERY)
    assert (reply.status, reply.kind in TRIPLES) == (200, True)


def test_query_content_type_construct(ask: Ask) -> None:
    reply = ask("POST", target(default_graph_uri=DATA.format(0)), "CONSTRUCT { <s> <p> 1 } WHERE {}", QUERY)
    assert (reply.status, reply.kind in TRIPLES) == (200, True)
    form = ox.RdfFormat.from_media_type(reply.kind)
    assert form is not None
    assert [quad.subject for quad in ox.parse(reply.body, form)] == [ox.NamedNode(f"{BASE}s")]


MARK = """PREFIX dc: <http://purl.org/dc/terms/>
PREFIX foaf: <http://xmlns.com/foaf/0.1/>
DROP ALL ;
INSERT DATA {{ {data} }} ;
INSERT {{ GRAPH <http://example.org/marked/> {{ ?s a dc:BibliographicResource }} }}
WHERE {{ {pattern} }}"""


def marked(ask: Ask, *numbers: int) -> bool:
    pattern = " ".join(f"<{DATA.format(i)}> a <http://purl.org/dc/terms/BibliographicResource> ." for i in numbers)
    return ask("POST", "/sparql/", f"ASK {{ GRAPH <http://example.org/marked/> {{ {pattern} }} }}", QUERY).boolean


def test_update_dataset_default_graph(ask: Ask) -> None:
    data = f"GRAPH <{DATA.format(1)}> {{ <{DATA.format(1)}> a foaf:Document }}"
    update = MARK.format(data=data, pattern="?s a foaf:Document")
    assert accepted(ask("POST", target(using_graph_uri=DATA.format(1)), update, UPDATE))
    assert marked(ask, 1)


def test_update_dataset_default_graphs(ask: Ask) -> None:
    update = MARK.format(data=INSERT_THREE, pattern="?s a foaf:Document")
    assert accepted(ask("POST", target(using_graph_uri=graphs(1, 2)), update, UPDATE))
    assert marked(ask, 1, 2)
    assert not marked(ask, 3)


def test_update_dataset_named_graphs(ask: Ask) -> None:
    update = MARK.format(data=INSERT_THREE, pattern="GRAPH ?g { ?s a foaf:Document }")
    assert accepted(ask("POST", target(using_named_graph_uri=graphs(1, 2)), update, UPDATE))
    assert marked(ask, 1, 2)
    assert not marked(ask, 3)


def test_update_dataset_full(ask: Ask) -> None:
    update = f"""PREFIX foaf: <http://xmlns.com/foaf/0.1/>
        DROP ALL ;
        INSERT DATA {{ {INSERT_THREE} }} ;
        INSERT {{ GRAPH <http://example.org/full/> {{ ?s <http://example.org/in> ?in }} }}
        WHERE {{
          {{ GRAPH ?g {{ ?s a foaf:Document }} BIND(?g AS ?in) }}
          UNION {{ ?s a foaf:Document . BIND("default" AS ?in) }}
        }}"""
    where = target(using_graph_uri=DATA.format(1), using_named_graph_uri=DATA.format(2))
    assert accepted(ask("POST", where, update, UPDATE))
    reply = ask(
        "POST", "/sparql/", "SELECT ?s ?in { GRAPH <http://example.org/full/> { ?s ?p ?in } } ORDER BY ?s", QUERY
    )
    rows = json.loads(reply.body)["results"]["bindings"]
    assert [(row["s"]["value"], row["in"]["value"]) for row in rows] == [
        (DATA.format(1), "default"),
        (DATA.format(2), DATA.format(2)),
    ]


def test_update_post_form(ask: Ask) -> None:
    assert accepted(ask("POST", "/sparql/", "update=CLEAR+ALL", FORM))
    assert not ask("POST", "/sparql/", f"ASK {{ {named(1)} }}", QUERY).boolean


def test_update_post_direct(ask: Ask) -> None:
    assert accepted(ask("POST", "/sparql/", "CLEAR ALL", UPDATE))
    assert not ask("POST", "/sparql/", f"ASK {{ {named(1)} }}", QUERY).boolean


def test_update_base_uri(ask: Ask) -> None:
    graph = "http://example.org/protocol-base-test/"
    data = "<http://example.org/s> <http://example.org/p> <test>"
    update = f"CLEAR GRAPH <{graph}> ;\nINSERT DATA {{ GRAPH <{graph}> {{ {data} }} }}"
    assert accepted(ask("POST", "/sparql/", update, UPDATE))
    query = f"SELECT ?o {{ GRAPH <{graph}> {{ <http://example.org/s> <http://example.org/p> ?o }} }}"
    (row,) = json.loads(ask("POST", "/sparql/", query, QUERY).body)["results"]["bindings"]
    assert row["o"] == {"type": "uri", "value": f"{BASE}test"}


def test_query_post_direct(ask: Ask) -> None:
    assert ask("POST", "/sparql/", "ASK {}", QUERY).boolean


def test_bad_query_method(ask: Ask) -> None:
    assert refused(ask("PUT", target(query="ASK {}", default_graph_uri=DATA.format(0)), kind=FORM))


def test_bad_multiple_queries(ask: Ask) -> None:
    assert refused(ask("GET", target(query=["ASK {}", "SELECT * {}"])))


def test_bad_query_wrong_media_type(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "ASK {}", "text/plain"))


def test_bad_query_missing_form_type(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "query=ASK%20%7B%7D"))


def test_bad_query_missing_direct_type(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "ASK {}"))


def test_bad_query_non_utf8(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "ASK {}".encode("utf-16"), f"{QUERY}; charset=UTF-16"))


def test_bad_query_syntax(ask: Ask) -> None:
    assert refused(ask("GET", target(query="ASK {")))


def untouched(ask: Ask) -> bool:
    return ask("POST", "/sparql/", f"ASK {{ {named(1, 2, 3)} }}", QUERY).boolean


def test_bad_update_get(ask: Ask) -> None:
    assert refused(ask("GET", target(update="CLEAR ALL")))
    assert untouched(ask)


def test_bad_multiple_updates(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "update=CLEAR%20NAMED&update=CLEAR%20DEFAULT", FORM))
    assert untouched(ask)


def test_bad_update_wrong_media_type(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "CLEAR NAMED", "text/plain"))
    assert untouched(ask)


def test_bad_update_missing_form_type(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "update=CLEAR%20NAMED"))
    assert untouched(ask)


def test_bad_update_non_utf8(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "CLEAR NAMED".encode("utf-16"), f"{UPDATE}; charset=UTF-16"))
    assert untouched(ask)


def test_bad_update_syntax(ask: Ask) -> None:
    assert refused(ask("POST", "/sparql/", "update=CLEAR%20XYZ", FORM))
    assert untouched(ask)


def test_bad_update_dataset_conflict(ask: Ask) -> None:
    update = """PREFIX foaf:  <http://xmlns.com/foaf/0.1/>
        WITH <http://example/addresses>
        DELETE { ?person foaf:givenName 'Bill' }
        INSERT { ?person foaf:givenName 'William' }
        WHERE { ?person foaf:givenName 'Bill' }"""
    assert refused(ask("POST", target(using_named_graph_uri="http://example/people"), update, UPDATE))
    assert untouched(ask)


# What W3C's tests leave out.


def test_the_rows_of_chosen_graphs_come_in_every_form(ask: Ask) -> None:
    reply = ask("GET", target(query="SELECT ?s { ?s a ?t }", default_graph_uri=graphs(1, 2)))
    assert len(json.loads(reply.body)["results"]["bindings"]) == 2


@pytest.mark.parametrize(
    ("update", "left"),
    [
        ("DELETE WHERE { ?s a ?type }", 3),
        ("DELETE WHERE { GRAPH ?g { ?s a ?type } }", 2),
        ("DELETE { GRAPH ?g { ?s a ?type } } WHERE { GRAPH ?g { ?s a ?type } } ; INSERT DATA { <a> <b> '{ WHERE' }", 2),
        ("PREFIX where: <urn:> DELETE { GRAPH ?g { ?s a ?type } } # } WHERE {\n WHERE { GRAPH ?g { ?s a ?type } }", 2),
        ("DELETE { GRAPH ?g { ?s ?p ?o } } WHERE { GRAPH ?g { ?s ?p ?o FILTER(?o != '}') } }", 2),
    ],
)
def test_graphs_hold_for_every_operation_of_an_update(ask: Ask, update: str, left: int) -> None:
    assert accepted(ask("POST", target(using_named_graph_uri=DATA.format(2)), update, UPDATE))
    reply = ask("POST", "/sparql/", f"SELECT ?g {{ GRAPH ?g {{ ?s a <{DOCUMENT}> }} }}", QUERY)
    assert len(list(csv.reader(io.StringIO(reply.body.decode())))) >= 1
    assert len(json.loads(reply.body)["results"]["bindings"]) == left


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["INSERT DATA", "DELETE DATA", "DELETE WHERE", "INSERT", "DELETE", "CLEAR", "DROP"]),
            st.sampled_from(["<urn:x#where>", '"} WHERE {"', "'''\n} USING '''", "where:insert", '"\\"}"@en']),
            st.sampled_from([" ", " # } WHERE {\n", "\n", "#\n"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_an_update_that_is_valid_stays_valid_with_graphs(operations: list[tuple[str, str, str]]) -> None:
    """Whatever its strings, comments and names look like."""
    parts = []
    for kind, node, space in operations:
        triple = f"{{{space}<urn:s> <urn:p> {node} {space}}}"
        if kind in ("INSERT", "DELETE"):
            parts.append(f"{kind}{space}{triple}{space}WHERE{space}{{ ?s ?where {node} {{ ?x <urn:p> 1 }} }}")
        elif kind in ("CLEAR", "DROP"):
            parts.append(f"{kind}{space}GRAPH{space}<urn:none>")
        else:
            parts.append(f"{kind}{space}{triple}")
    update = "PREFIX where: <urn:w:>\n" + " ;\n".join(parts)
    graph = Iri("urn:g")
    with EmbeddedStore() as store:
        store.update(with_graphs(update, [graph], [graph]))
    looking = sum(kind in ("INSERT", "DELETE", "DELETE WHERE") for kind, _, _ in operations)
    assert with_graphs(update, [graph], []).count("USING <urn:g>") == looking
    if not any(kind in ("CLEAR", "DROP") for kind, _, _ in operations):
        assert with_graphs(update, [], []) == update


@given(st.text(alphabet="{}<>\"'#?: \n\\WHERDLTINSUG", max_size=60))
def test_no_text_breaks_the_reading_of_an_update(text: str) -> None:
    with contextlib.suppress(StoreError):
        with_graphs(text, [Iri("urn:g")], [])
