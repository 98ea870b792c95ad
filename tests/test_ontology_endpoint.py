"""The SPARQL Protocol over real HTTP: forms, refusals, limits."""

import csv
import http.client
import io
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import pyoxigraph as ox
import pytest
from ontology_fixtures import TOKEN, everything

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.http import request_handling, sparql
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.ontology.store.store import EmbeddedStore, StoreError
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri

SELECT = "SELECT ?s ?o WHERE { ?s <urn:p> ?o } ORDER BY ?o"
FORM = "application/x-www-form-urlencoded"


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes
    headers: dict[str, str]


class Client:
    def __init__(self, url: str) -> None:
        self.port = int(urllib.parse.urlsplit(url).port or 0)

    def __call__(self, method: str, target: str = "/sparql", body: bytes | str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, target, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            kind = answer.headers.get_content_type()
            return Answer(answer.status, kind, answer.read(), {k.lower(): v for k, v in answer.headers.items()})
        finally:
            connection.close()

    def get(self, query: str, accept: str = "*/*") -> Answer:
        return self("GET", "/sparql?" + urllib.parse.urlencode({"query": query}), Accept=accept)


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedStore]:
    with EmbeddedStore() as opened:
        yield opened


@pytest.fixture
def filled(store: EmbeddedStore) -> EmbeddedStore:
    store.update("CLEAR ALL")
    store.add([(Iri("urn:a"), Iri("urn:p"), 1), (Iri("urn:b"), Iri("urn:p"), 'a "text"\n')])
    return store


@pytest.fixture(scope="module")
def served(store: EmbeddedStore) -> Iterator[Endpoint]:
    with Endpoint(store, Access.of_token(TOKEN, "read")) as endpoint:
        yield endpoint


@pytest.fixture
def client(served: Endpoint, filled: EmbeddedStore) -> Client:
    return Client(served.url)


def test_a_query_comes_in_three_ways(client: Client) -> None:
    answers = [
        client.get(SELECT),
        client("POST", body=urllib.parse.urlencode({"query": SELECT}), Content_Type=FORM),
        client("POST", body=SELECT, Content_Type="application/sparql-query; charset=utf-8"),
    ]
    for answer in answers:
        assert answer.status == 200
        assert answer.kind == "application/sparql-results+json"
        assert [row["o"]["value"] for row in json.loads(answer.body)["results"]["bindings"]] == ["1", 'a "text"\n']


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "application/sparql-results+json"),
        ("application/json", "application/json"),
        ("application/sparql-results+xml", "application/sparql-results+xml"),
        ("text/csv", "text/csv"),
        ("text/tab-separated-values", "text/tab-separated-values"),
        ("text/csv;q=0.3, application/sparql-results+xml;q=0.7", "application/sparql-results+xml"),
        ("text/html, */*;q=0.1", "application/sparql-results+json"),
        ("text/*", "text/csv"),
    ],
)
def test_rows_come_in_the_form_that_is_asked_for(client: Client, accept: str, kind: str) -> None:
    answer = client.get(SELECT, accept)
    assert (answer.status, answer.kind) == (200, kind) if accept else answer.status in (200, 406)
    if kind == "text/csv":
        assert list(csv.reader(io.StringIO(answer.body.decode(), newline="")))[2] == ["urn:b", 'a "text"\n']
    elif kind.endswith("+xml"):
        assert answer.body.count(b"<result>") == 2


@pytest.mark.parametrize("kind", ["text/turtle", "application/n-triples", "application/rdf+xml", "application/ld+json"])
def test_triples_come_in_the_form_that_is_asked_for(client: Client, kind: str) -> None:
    answer = client.get("CONSTRUCT { ?s <urn:q> ?o } WHERE { ?s <urn:p> ?o }", kind)
    assert (answer.status, answer.kind) == (200, kind)
    form = ox.RdfFormat.from_media_type(kind)
    assert form is not None
    assert len(list(ox.parse(answer.body, form))) == 2


SD = "http://www.w3.org/ns/sparql-service-description#"


@pytest.mark.parametrize("kind", ["text/turtle", "application/n-triples", "application/rdf+xml", "application/ld+json"])
def test_without_a_query_the_service_describes_itself(client: Client, served: Endpoint, kind: str) -> None:
    answer = client("GET", Accept=kind, Authorization=f"Bearer {TOKEN}")
    assert (answer.status, answer.kind) == (200, kind)
    form = ox.RdfFormat.from_media_type(kind)
    assert form is not None
    said = {(quad.predicate.value, str(quad.object).strip("<>")) for quad in ox.parse(answer.body, form)}
    assert (f"{SD}endpoint", served.url) in said
    assert {o for p, o in said if p == f"{SD}supportedLanguage"} == {f"{SD}SPARQL11Query", f"{SD}SPARQL11Update"}
    formats = {o.rpartition("/")[2] for p, o in said if p == f"{SD}resultFormat"}
    assert {"SPARQL_Results_JSON", "SPARQL_Results_CSV", "Turtle", "JSON-LD"} <= formats


def test_a_service_that_takes_no_updates_does_not_say_that_it_does(filled: EmbeddedStore) -> None:
    with Endpoint(filled, Access.of_token("unknown", "read")) as endpoint:
        assert b"SPARQL11Update" not in Client(endpoint.url)("GET").body


def test_a_browser_is_led_from_the_endpoint_to_the_page(client: Client) -> None:
    answer = client("GET", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (answer.status, answer.headers["location"]) == (303, "/")


def test_the_vocabulary_is_a_page_for_people_and_turtle_for_programs(client: Client) -> None:
    page = client("GET", "/vocabulary", Accept="text/html,application/xhtml+xml,*/*;q=0.8")
    assert (page.status, page.kind) == (200, "text/html")
    assert b'<section id="arenaBytes">' in page.body
    turtle = client("GET", "/vocabulary", Accept="text/turtle")
    assert (turtle.status, turtle.kind) == (200, "text/turtle")
    assert {quad.subject for quad in ox.parse(turtle.body, ox.RdfFormat.TURTLE)} >= {ox.NamedNode(TF.arenaBytes)}
    assert client("GET", "/vocabulary", Accept="image/png").status == 406


def test_a_boolean_comes_as_json_or_xml(client: Client) -> None:
    assert json.loads(client.get("ASK { ?s ?p 1 }").body)["boolean"] is True
    assert client.get("ASK { ?s ?p 1 }", "text/csv").status == 406


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (400, lambda c: c("GET", "/sparql?default-graph-uri=urn:x")),
        (400, lambda c: c("GET", "/sparql?query=ASK%7B%7D&query=ASK%7B%7D")),
        (400, lambda c: c("GET", "/sparql?update=CLEAR+ALL")),
        (400, lambda c: c("GET", "/sparql?query=ASK%7B%7D&default-graph-uri=x+y")),
        (400, lambda c: c("GET", "/sparql?query=ASK%7B%7D&using-graph-uri=urn:x")),
        (400, lambda c: c("POST", "/sparql?query=ASK%7B%7D", "ASK {}", Content_Type="application/sparql-query")),
        (400, lambda c: c("GET", "/sparql?query=%FF")),
        (400, lambda c: c.get("SELECT ?s WHERE {")),
        (400, lambda c: c("POST", body="query=ASK%7B%7D&update=CLEAR+ALL", Content_Type=FORM)),
        (400, lambda c: c("POST", body="nothing=here", Content_Type=FORM)),
        (400, lambda c: c("POST", body=b"\xff", Content_Type="application/sparql-query")),
        (404, lambda c: c("GET", "/nothing")),
        (404, lambda c: c("GET", "/things")),
        (405, lambda c: c("PUT", body="ASK {}")),
        (406, lambda c: c.get(SELECT, "text/html")),
        (406, lambda c: c.get(SELECT, "text/turtle")),
        (415, lambda c: c("POST", body="ASK {}", Content_Type="text/plain")),
        (415, lambda c: c("POST", body="ASK {}")),
        (400, lambda c: c("GET", "/sparql?query=ASK%7B%7D", Host="attacker.example")),
    ],
)
def test_a_wrong_request_gets_its_status(client: Client, filled: EmbeddedStore, status: int, answer) -> None:  # type: ignore[no-untyped-def]
    before = everything(filled)
    got = answer(client)
    assert got.status == status, got
    assert got.body
    assert b"Traceback" not in got.body
    assert everything(filled) == before


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_an_update_needs_the_token(client: Client, filled: EmbeddedStore, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    for body, kind in (("update=CLEAR+ALL", FORM), ("CLEAR ALL", "application/sparql-update")):
        answer = client("POST", body=body, Content_Type=kind, **headers)
        assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert len(filled) == 2


def test_an_update_with_the_token_is_done(client: Client, filled: EmbeddedStore) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    update = "INSERT DATA { <urn:c> <urn:p> 2 }"
    assert client("POST", body=update, Content_Type="application/sparql-update", **headers).status == 204
    form = urllib.parse.urlencode({"update": "DELETE DATA { <urn:a> <urn:p> 1 }"})
    assert client("POST", body=form, Content_Type=FORM, **headers).status == 204
    assert filled.query(SELECT).column("o") == [2, 'a "text"\n']
    wrong = client("POST", body="INSERT DATA {", Content_Type="application/sparql-update", **headers)
    assert (wrong.status, wrong.body[:31]) == (400, b"the update is not valid SPARQL:")


def test_without_a_token_nobody_updates() -> None:
    with EmbeddedStore() as store, Endpoint(store, Access.of_token("unknown", "read")) as endpoint:
        with pytest.raises(StoreError, match="does not know this token"):
            RemoteStore(endpoint.url, "any").update("CLEAR ALL")
        assert RemoteStore(endpoint.url).ask("ASK { }")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * { SERVICE <{url}> { ?s ?p ?o } }",
        "SELECT * { service silent <{url}> { ?s ?p ?o } }",
        "SELECT * { ?s ?p ?o.SERVICE <{url}> { ?s ?p ?o } }",
        "SELECT * { ?s ?p 1SERVICE <{url}> { ?s ?p ?o } }",
        "SELECT * { ?s ?p trueSERVICE <{url}> { ?s ?p ?o } }",
        "SELECT * { VALUES ?x { <{url}> } SERVICE ?x { ?s ?p ?o } }",
        "SELECT * { FILTER(1<2)SERVICE<{url}>{ ?s ?p ?o } }",
        "SELECT * { FILTER('''\n#''' != 'x') SERVICE <{url}> { ?s ?p ?o } }",
        "PREFIX : <urn:x> SELECT * { ?s :a\\# ?o . SERVICE <{url}> { ?s ?p ?o } }",
        "SELECT * { FILTER(?a<?b)SERVICE$s#>\n{ ?s ?p ?o } }",
    ],
)
def test_a_query_makes_this_machine_fetch_nothing(client: Client, query: str) -> None:
    with EmbeddedStore() as store, Endpoint(store, Access.of_token("unknown", "read")) as other:
        answer = client.get(query.replace("{url}", other.url))
    assert answer.status == 403, answer
    assert b"SERVICE is not allowed" in answer.body


def test_words_that_only_look_like_service_are_free(client: Client) -> None:
    query = "SELECT ?service $myservice { ?service service:service ?x ; <urn:x/service> ?myservice }"
    assert client.get("PREFIX service: <urn:x#> " + query).status == 200


def test_a_result_that_is_too_long_is_cut_off(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparql, "MAX_RESULT", 100)
    answer = client.get(SELECT)
    assert (answer.status, b"add a LIMIT" in answer.body) == (413, True)


def test_a_request_that_is_too_long_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handling, "MAX_REQUEST", 1000)
    answer = client("POST", body="# " + "x" * 2000, Content_Type="application/sparql-query")
    assert answer.status == 413


def test_a_query_that_takes_too_long_is_given_up_and_the_server_goes_on() -> None:
    with EmbeddedStore() as store:
        store.add([(Iri(f"urn:{i}"), Iri("urn:p"), i) for i in range(150)])
        with Endpoint(store, Access.of_token("unknown", "read"), timeout=0.3, workers=1) as endpoint:
            client = Client(endpoint.url)
            slow = "SELECT (COUNT(*) AS ?n) { ?a ?b ?c . ?d ?e ?f . ?g ?h ?i . ?j ?k 1 }"
            answer = client.get(slow)
            assert (answer.status, b"takes too long" in answer.body) == (408, True)
            assert client.get("ASK { }").status == 200


def test_a_port_that_is_taken_is_said(served: Endpoint) -> None:
    port = int(urllib.parse.urlsplit(served.url).port or 0)
    with EmbeddedStore() as store, pytest.raises(UserError, match=f"port {port} .* choose another"):
        Endpoint(store, Access.of_token("unknown", "read"), port=port)


def test_many_ask_while_one_writes(client: Client, served: Endpoint, filled: EmbeddedStore) -> None:
    """Every reader sees a write whole: both facts of a pair, never one."""
    errors: list[object] = []
    written = threading.Event()

    def read() -> None:
        remote = RemoteStore(served.url)
        while not written.is_set():
            try:
                rows = remote.query("SELECT ?l ?r { OPTIONAL { <urn:x> <urn:l> ?l } OPTIONAL { <urn:x> <urn:r> ?r } }")
            except StoreError as error:
                if "busy" not in str(error):
                    errors.append(error)
                continue
            if rows[0].get("l") != rows[0].get("r"):
                errors.append(rows[0])

    readers = [threading.Thread(target=read, daemon=True) for _ in range(3)]
    for reader in readers:
        reader.start()
    writer = RemoteStore(served.url, TOKEN)
    for i in range(100):
        writer.write({Iri("urn:x"): {Iri("urn:l"): i, Iri("urn:r"): i}})
    written.set()
    for reader in readers:
        reader.join()
    assert errors == []
