"""The Thing Description Directory over real HTTP, by the assertions of W3C WoT Discovery, named where they apply."""

import http.client
import itertools
import json
import os
import queue
import re
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ontology_fixtures import MODEL, TOKEN, description, everything, payload, status

from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.directory import PAGE
from tinyfleet.ontology.http.directory import description as self_description
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.description_parser import MAX_BYTES
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import CONTEXT, REMEMBERED, DocumentChanges, ThingStore, difference, merged
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri, device_iri
from tinyfleet.server.fleet_server import FleetServer

TD_JSON, PATCH = "application/td+json", "application/merge-patch+json"
TOPICS = Topics("home")


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Directory:
    """A client of a directory."""

    def __init__(self, address: str, token: str) -> None:
        self.port = urllib.parse.urlsplit(address).port
        self._token = token

    def __call__(
        self,
        method: str,
        path: str,
        body: Any = None,
        kind: str | None = TD_JSON,
        token: str | None = "",
        **headers: str,
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent["Authorization"] = f"Bearer {token or self._token}"
        if body is not None and kind is not None:
            sent["Content-Type"] = kind
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def put(self, td: dict[str, Any]) -> int:
        return self("PUT", at(td["id"]), td).status

    def get(self, id: str) -> Any:
        answer = self("GET", at(id), token=None)
        assert answer.status == 200, answer
        return answer.json


class Here(Directory):
    """A client of a directory in this process, and what is behind it."""

    def __init__(self, endpoint: Endpoint, store: EmbeddedStore, registry: Registry) -> None:
        super().__init__(endpoint.address, TOKEN)
        self.store = store
        self.registry = registry

    def say(self, device: str, td: dict[str, Any] | None) -> None:
        """What a device says over MQTT; None: its retained description is cleared."""
        content = b"" if td is None else payload(td)
        assert self.registry.ingest_one(TOPICS.td(device), content), self.registry.last_rejection


def at(id: str) -> str:
    return "/things/" + urllib.parse.quote(id, safe="")


def lamp(id: str | None = "urn:example:lamp", **changes: Any) -> dict[str, Any]:
    """The description of a thing that is no device of the fleet."""
    td: dict[str, Any] = {
        "@context": "https://www.w3.org/2022/wot/td/v1.1",
        "title": "A lamp",
        "security": ["nosec_sc"],
        "securityDefinitions": {"nosec_sc": {"scheme": "nosec"}},
        "properties": {"on": {"type": "boolean", "forms": [{"href": "http://lamp.example/on"}]}},
    }
    td |= ({} if id is None else {"id": id}) | {name.replace("__", ":"): value for name, value in changes.items()}
    return {name: value for name, value in td.items() if value is not None}


@pytest.fixture
def directory() -> Iterator[Here]:
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        with Endpoint(store, TOKEN, registry=registry) as endpoint:
            yield Here(endpoint, store, registry)


def given_back(td: dict[str, Any]) -> dict[str, Any]:
    """An enriched description without what the directory adds."""
    assert td["@context"][-1] == CONTEXT
    context = td["@context"][:-1]
    rest = {name: value for name, value in td.items() if name != "registration"}
    return rest | {"@context": context[0] if len(context) == 1 else context}


# Create, retrieve, update, delete.


@pytest.mark.parametrize("td", [description(), lamp()], ids=["a device", "another thing"])
def test_a_description_is_created_and_retrieved_as_it_was_given(directory: Here, td: dict[str, Any]) -> None:
    """tdd-things-create-known-td-resp, tdd-things-retrieve-resp, -content-type, tdd-context-injection."""
    assert directory.put(td) == 201
    answer = directory("GET", at(td["id"]), token=None)
    assert (answer.status, answer.headers.get_content_type()) == (200, TD_JSON)
    assert given_back(answer.json) == td
    assert list(answer.json)[: len(td)] == list(td)


def test_registration_says_when(directory: Here) -> None:
    """tdd-registrationinfo-vocab-created, -modified, -retrieved, tdd-absolute-time."""
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    directory.put(lamp())
    first = directory.get("urn:example:lamp")["registration"]
    times = {name: datetime.fromisoformat(text) for name, text in first.items()}
    assert before <= times["created"] == times["modified"] <= times["retrieved"] <= datetime.now(UTC)
    directory.put(lamp(title="A brighter lamp"))
    second = directory.get("urn:example:lamp")["registration"]
    assert second["created"] == first["created"]
    assert second["modified"] > first["modified"]


def test_an_anonymous_description_gets_an_id(directory: Here) -> None:
    """tdd-things-create-anonymous-td-resp, tdd-anonymous-td-identifier, tdd-anonymous-td-local-uuid."""
    answer = directory("POST", "/things", lamp(None))
    assert answer.status == 201
    location = answer.headers["Location"]
    td = directory("GET", location).json
    assert location == f"/things/{td['id']}"
    assert uuid.UUID(td["id"]).version == 4
    assert td["id"].startswith("urn:uuid:")
    assert {name: value for name, value in given_back(td).items() if name != "id"} == lamp(None)


def test_an_anonymous_device_gets_the_id_of_the_device(directory: Here) -> None:
    answer = directory("POST", "/things", description("dev-7", id=None))
    assert (answer.status, answer.headers["Location"]) == (201, "/things/urn:tinyfleet:home:dev-7")


def test_what_has_an_id_is_put_and_what_has_none_is_posted(directory: Here) -> None:
    """tdd-things-create-known-vs-anonymous."""
    assert directory("POST", "/things", lamp()).status == 400
    assert directory("PUT", at("urn:example:lamp"), lamp(None)).status == 400
    assert directory("PUT", at("urn:example:other"), lamp()).status == 400
    assert directory("GET", "/things").json == []


def test_put_replaces(directory: Here) -> None:
    """tdd-things-update-resp."""
    directory.put(lamp(description="Old"))
    assert directory.put(lamp(title="New")) == 204
    assert given_back(directory.get("urn:example:lamp")) == lamp(title="New")


def test_what_was_retrieved_can_be_put_back(directory: Here) -> None:
    directory.put(lamp())
    enriched = directory.get("urn:example:lamp")
    assert directory("PUT", at("urn:example:lamp"), enriched).status == 204
    assert given_back(directory.get("urn:example:lamp")) == lamp()


def test_patch_merges(directory: Here) -> None:
    """tdd-things-update-partial, -mergepatch, -resp."""
    directory.put(lamp(description="Old", base="http://a/"))
    patch = {"title": "New", "description": None, "properties": {"on": {"title": "On?"}}}
    assert directory("PATCH", at("urn:example:lamp"), patch, PATCH).status == 204
    td = directory.get("urn:example:lamp")
    assert (td["title"], td.get("description"), td["base"]) == ("New", None, "http://a/")
    assert td["properties"]["on"] == lamp()["properties"]["on"] | {"title": "On?"}


def test_patch_has_its_media_type_and_its_target(directory: Here) -> None:
    """tdd-things-update-partial-contenttype."""
    directory.put(lamp())
    assert directory("PATCH", at("urn:example:lamp"), {"title": "x"}, "application/json").status == 415
    assert directory("PATCH", at("urn:example:none"), {"title": "x"}, PATCH).status == 404
    assert directory("PATCH", at("urn:example:lamp"), {"id": "urn:example:other"}, PATCH).status == 400
    assert directory("PATCH", at("urn:example:lamp"), {"title": None}, PATCH).status == 400
    assert given_back(directory.get("urn:example:lamp")) == lamp()


def test_delete(directory: Here) -> None:
    """tdd-things-delete-resp."""
    before = everything(directory.store)
    directory.put(lamp())
    assert directory("DELETE", at("urn:example:lamp")).status == 204
    assert directory("GET", at("urn:example:lamp")).status == 404
    assert directory("DELETE", at("urn:example:lamp")).status == 404
    assert everything(directory.store) == before


@pytest.mark.parametrize("id", ["urn:example:a/b", "https://things.example/lamp?x=1#y", "urn:example:ü%20"])
def test_any_iri_is_an_id(directory: Here, id: str) -> None:
    assert directory.put(lamp(id)) == 201
    assert directory.get(id)["id"] == id
    assert directory("DELETE", at(id)).status == 204


@pytest.mark.parametrize("id", ["", "x y", "no iri", "<>", "urn:example:none", "../things", "\n"])
def test_what_is_not_there_is_not_found(directory: Here, id: str) -> None:
    assert directory("GET", at(id)).status == 404
    assert directory("DELETE", at(id)).status == 404


# Rights and errors.


@pytest.mark.parametrize(
    ("method", "path", "body", "kind"),
    [
        ("POST", "/things", lamp(None), TD_JSON),
        ("PUT", at("urn:example:new"), lamp("urn:example:new"), TD_JSON),
        ("PUT", at("urn:example:lamp"), lamp(title="x"), TD_JSON),
        ("PATCH", at("urn:example:lamp"), {"title": "x"}, PATCH),
        ("DELETE", at("urn:example:lamp"), None, None),
    ],
)
def test_writing_needs_the_token(directory: Here, method: str, path: str, body: Any, kind: str | None) -> None:
    """tdd-things-read-only-auth."""
    directory.put(lamp())
    for token in (None, "wrong"):
        answer = directory(method, path, body, kind, token)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert [given_back(td) for td in directory("GET", "/things", token=None).json] == [lamp()]


def test_without_a_token_nobody_writes() -> None:
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        with Endpoint(store, registry=registry) as endpoint:
            assert Here(endpoint, store, registry).put(lamp()) == 403


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "kind"),
    [
        (400, "PUT", at("urn:x:y"), b"<td/>", TD_JSON),
        (400, "PUT", at("urn:x:y"), b"[]", TD_JSON),
        (400, "GET", "/things?limit=0", None, None),
        (400, "GET", "/things?limit=x", None, None),
        (400, "GET", "/things?offset=-1", None, None),
        (400, "GET", "/things?format=table", None, None),
        (400, "GET", "/things?sort_order=up", None, None),
        (501, "GET", "/things?sort_by=properties", None, None),
        (400, "GET", "/events?diff=maybe", None, None),
        (400, "GET", "/search/sparql", None, None),
        (400, "GET", "/search/sparql?query=ASK", None, None),
        (404, "GET", "/nothing", None, None),
        (404, "GET", "/events/thing_renamed", None, None),
        (404, "GET", at("urn:x:y"), None, None),
        (405, "PATCH", "/things", b"{}", PATCH),
        (405, "POST", "/events", b"{}", TD_JSON),
        (413, "PUT", at("urn:x:y"), b" " * (MAX_BYTES + 1), TD_JSON),
        (415, "PUT", at("urn:x:y"), b"{}", "text/plain"),
        (415, "PUT", at("urn:x:y"), b"{}", "application/td+json; charset=utf-16"),
    ],
)
def test_errors_are_problem_details(
    directory: Here, status: int, method: str, path: str, body: bytes | None, kind: str | None
) -> None:
    """tdd-http-error-response, -utf-8."""
    answer = directory(method, path, body, kind)
    assert (answer.status, answer.headers.get_content_type()) == (status, "application/problem+json")
    said = json.loads(answer.body.decode("utf-8"))
    assert said["status"] == status
    assert said["title"]
    assert said["detail"]


@pytest.mark.parametrize(
    ("td", "fields"),
    [
        (lamp(title=None), {"(root)"}),
        (lamp(title=5), {"title"}),
        (lamp(security=None, securityDefinitions={}), {"(root)", "securityDefinitions"}),
        (lamp(properties={"on": {"forms": [{}]}}), {"properties.on.forms.0"}),
        (lamp(links=[{"rel": "next"}]), {"links.0"}),
        (lamp(registration={"ttl": -1}), {"registration.ttl"}),
        (lamp(registration={"expires": "2026-01-01T00:00:00"}), {"registration.expires"}),
        (lamp("urn:tinyfleet:model:0123456789abcdef"), {"id"}),
        (lamp("https://w3id.org/tinyfleet/board/nano33ble"), {"id"}),
        (description(fleet="away"), {"id"}),
        (description(tf__engine="No Engine!", tf__arenaBytes=0), {"tf:engine", "tf:arenaBytes"}),
        (lamp(**{"@context": ["https://www.w3.org/2022/wot/td/v1.1", "https://elsewhere.example/"]}), {"(root)"}),
    ],
)
def test_what_is_wrong_with_a_description_is_listed(directory: Here, td: dict[str, Any], fields: set[str]) -> None:
    """tdd-validation-result, tdd-validation-response."""
    before = everything(directory.store)
    answer = directory("PUT", at(td["id"]), td)
    assert (answer.status, answer.headers.get_content_type()) == (400, "application/problem+json")
    errors = answer.json["validationErrors"]
    assert fields <= {error["field"] for error in errors}, errors
    assert all(error["description"] for error in errors)
    assert directory("GET", "/things").json == []
    assert everything(directory.store) == before


def test_a_thing_cannot_take_what_is_the_fleets(directory: Here) -> None:
    context = ["https://www.w3.org/2022/wot/td/v1.1", {"tf": TF.iri}]
    for kinds in ("tf:Board", ["Thing", "tf:Device"]):
        assert directory.put(lamp(**{"@context": context, "@type": kinds})) == 400


def test_get_has_its_head(directory: Here) -> None:
    """tdd-http-head."""
    directory.put(lamp())
    for path in ("/things", at("urn:example:lamp"), "/events", "/.well-known/wot", "/search/sparql?query=ASK%7B%7D"):
        answer = directory("HEAD", path)
        assert (answer.status, answer.body) == (200, b""), path


mutations = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["PUT", "PATCH"]),
    name=st.sampled_from([*lamp(), "registration", "@type", "@id", "forms", "x"]),
    value=mutations,
    raw=st.none() | st.binary(max_size=40),
)
def test_nothing_that_a_client_sends_breaks_the_directory(
    directory: Here, method: str, name: str, value: Any, raw: bytes | None
) -> None:
    directory.registry.put_description(lamp())
    body: Any = raw if raw is not None else (lamp() | {name: value} if method == "PUT" else {name: value})
    answer = directory(method, at("urn:example:lamp"), body, TD_JSON if method == "PUT" else PATCH)
    assert answer.status in (204, 400), answer
    assert directory.get("urn:example:lamp")["title"] is not None


# Lists.


def links(answer: Answer) -> dict[str, tuple[str, dict[str, str]]]:
    found = {}
    for target, attributes in re.findall(r"<([^>]*)>((?:; \w+=\"[^\"]*\")*)", answer.headers["Link"]):
        said = dict(re.findall(r"(\w+)=\"([^\"]*)\"", attributes))
        found[said.pop("rel")] = (target, said)
    return found


def test_pages_in_the_order_of_the_ids(directory: Here) -> None:
    """tdd-things-list-resp, -content-type, -pagination-limit, -header-nextlink, -nextlink-attr, -canonicallink,
    -order-default."""
    ids = [f"urn:example:{name}" for name in ("b", "Z", "a", "ä", "10", "9", "\U0001f4a1", "ﬁ")]
    for id in ids:
        assert directory.put(lamp(id)) == 201
    found, path, etags = [], "/things?limit=3", set()
    for _ in range(3):
        answer = directory("GET", path, token=None)
        assert (answer.status, answer.headers.get_content_type()) == (200, "application/ld+json")
        assert len(answer.json) <= 3
        found += [td["id"] for td in answer.json]
        assert links(answer)["canonical"][0] == "/things"
        etags.add(links(answer)["canonical"][1]["etag"])
        if "next" not in links(answer):
            break
        path = links(answer)["next"][0]
        assert urllib.parse.parse_qs(path.partition("?")[2])["limit"] == ["3"]
    assert found == sorted(ids)
    assert len(etags) == 1
    directory.put(lamp(ids[0], title="Changed"))
    assert links(directory("GET", "/things"))["canonical"][1]["etag"] in etags
    directory("DELETE", at(ids[0]))
    assert links(directory("GET", "/things"))["canonical"][1]["etag"] not in etags
    assert [td["id"] for td in directory("GET", "/things").json] == sorted(ids[1:])


def test_other_orders(directory: Here) -> None:
    for i, title in enumerate(["Melon", "apple", "Banana"]):
        directory.put(lamp(f"urn:example:{i}", title=title))
    directory.put(lamp("urn:example:0", title="Cherry"))

    def order(**asked: str | int) -> list[str]:
        path = f"/things?{urllib.parse.urlencode(asked)}"
        found: list[str] = []
        while True:
            answer = directory("GET", path)
            found += [td["id"][-1] for td in answer.json]
            if "next" not in links(answer):
                return found
            path = links(answer)["next"][0]

    assert order(sort_by="id", sort_order="desc", limit=2) == ["2", "1", "0"]
    assert order(sort_by="title", limit=2) == ["2", "0", "1"]
    assert order(sort_by="created", limit=1) == ["0", "1", "2"]
    assert order(sort_by="modified", sort_order="desc", limit=2) == ["0", "2", "1"]


def test_a_page_as_a_collection(directory: Here) -> None:
    """tdd-things-list-pagination-collection."""
    for i in range(3):
        directory.put(lamp(f"urn:example:{i}"))
    page = directory("GET", "/things?limit=2&format=collection").json
    assert (page["@context"], page["@type"], page["total"]) == (CONTEXT, "ThingCollection", 3)
    assert [td["id"] for td in page["members"]] == ["urn:example:0", "urn:example:1"]
    last = directory("GET", page["next"]).json
    assert [td["id"] for td in last["members"]] == ["urn:example:2"]
    assert "next" not in last


def test_a_page_is_never_longer_than_the_directory_can_bear(directory: Here) -> None:
    for i in range(PAGE + 1):
        directory.registry.put_description(lamp(f"urn:example:{i:05}"))
    for asked in ("", f"?limit={PAGE + 1}"):
        answer = directory("GET", f"/things{asked}")
        assert len(answer.json) == PAGE
        assert [td["id"] for td in directory("GET", links(answer)["next"][0]).json] == [f"urn:example:{PAGE:05}"]


# Devices and facts.


def test_what_comes_over_mqtt_is_in_the_directory(directory: Here) -> None:
    directory.say("dev-1", description())
    assert given_back(directory.get("urn:tinyfleet:home:dev-1")) == description()
    assert [td["id"] for td in directory("GET", "/things").json] == ["urn:tinyfleet:home:dev-1"]
    directory.say("dev-1", None)
    assert directory("GET", "/things").json == []


def test_a_device_over_http_leaves_the_same_graph_as_over_mqtt(directory: Here) -> None:
    assert directory.put(description()) == 201
    with EmbeddedStore() as other:
        assert Registry(other, "home").ingest_one(TOPICS.td("dev-1"), payload(description()))
        assert everything(directory.store) == everything(other)


def test_a_deleted_device_takes_its_state_along(directory: Here) -> None:
    directory.say("dev-1", description())
    directory.registry.ingest_one(TOPICS.status("dev-1"), status(samples=3))
    assert directory("DELETE", at("urn:tinyfleet:home:dev-1")).status == 204
    subjects = directory.store.query("SELECT DISTINCT ?s { ?s ?p ?o }").column("s")
    assert device_iri("home", "dev-1") not in subjects


def test_the_state_of_a_device_outlives_a_change_of_its_description(directory: Here) -> None:
    directory.say("dev-1", description())
    directory.registry.ingest_one(TOPICS.status("dev-1"), status(samples=3))
    assert directory("PATCH", at("urn:tinyfleet:home:dev-1"), {"tf:engineVersion": "0.2.0"}, PATCH).status == 204
    (row,) = directory.store.query(f"SELECT ?v ?n {{ ?d <{TF.engineVersion}> ?v ; <{TF.samplesLearned}> ?n }}")
    assert row == {"v": "0.2.0", "n": 3}


def test_a_thing_is_found_by_what_it_says_of_itself(directory: Here) -> None:
    """tdd-search-sparql: and what a newer description no longer says is gone."""
    context = ["https://www.w3.org/2022/wot/td/v1.1", {"saref": "https://saref.etsi.org/core/"}]
    td = lamp(**{"@context": context, "@type": "saref:LightSwitch", "saref:hasModel": "X1", "description": "Bright"})
    directory.put(td)
    query = """PREFIX td: <https://www.w3.org/2019/wot/td#> PREFIX saref: <https://saref.etsi.org/core/>
        SELECT ?thing ?title ?model { ?thing a td:Thing, saref:LightSwitch ; td:title ?title .
          OPTIONAL { ?thing saref:hasModel ?model } }"""
    assert list(directory.store.query(query)) == [{"thing": td["id"], "title": "A lamp", "model": "X1"}]
    directory.put({name: value for name, value in td.items() if name != "saref:hasModel"})
    assert list(directory.store.query(query)) == [{"thing": td["id"], "title": "A lamp"}]


def test_no_query_for_facts_comes_across_a_document(directory: Here) -> None:
    directory.say("dev-1", description())
    assert not directory.store.ask(f"ASK {{ ?s <{TF.document}> ?o }}")
    assert not directory.store.ask('ASK { ?s ?p ?o FILTER(CONTAINS(STR(?o), "securityDefinitions")) }')


@pytest.mark.parametrize("method", ["GET", "POST", "form"])
def test_sparql_search(directory: Here, method: str) -> None:
    """tdd-search-sparql-method-get, -post, -resp-select-ask, -resp-describe-construct, -error."""
    directory.say("dev-1", description())

    def ask(query: str) -> Answer:
        if method == "GET":
            return directory("GET", "/search/sparql?" + urllib.parse.urlencode({"query": query}), token=None)
        if method == "form":
            form = urllib.parse.urlencode({"query": query}).encode()
            return directory("POST", "/search/sparql", form, "application/x-www-form-urlencoded", None)
        return directory("POST", "/search/sparql", query.encode(), "application/sparql-query", None)

    rows = ask(f"SELECT ?id {{ ?d <{TF.deviceId}> ?id }}")
    assert (rows.status, rows.headers.get_content_type()) == (200, "application/json")
    assert rows.json["results"]["bindings"][0]["id"]["value"] == "dev-1"
    assert ask("ASK {}").json["boolean"] is True
    graph = ask(f"CONSTRUCT {{ ?d <urn:is> ?id }} WHERE {{ ?d <{TF.deviceId}> ?id }}")
    assert (graph.status, graph.headers.get_content_type()) == (200, "application/ld+json")
    for wrong in ("CLEAR ALL", "INSERT DATA { <urn:a> <urn:b> 1 }", "SELECT"):
        assert ask(wrong).status == 400
    assert directory.store.ask(f"ASK {{ ?d <{TF.deviceId}> 'dev-1' }}")


def test_documents_are_found_by_sparql_where_they_are_kept(directory: Here) -> None:
    directory.put(lamp())
    query = f"SELECT ?td {{ GRAPH <https://w3id.org/tinyfleet/things> {{ ?thing <{TF.document}> ?td }} }}"
    (text,) = directory.store.query(query).column("td")
    assert json.loads(str(text)) == lamp()


def test_an_update_behind_the_directorys_back_is_seen(directory: Here) -> None:
    directory.put(lamp())
    assert len(directory("GET", "/things").json) == 1
    assert directory("POST", "/sparql", b"CLEAR ALL", "application/sparql-update").status == 204
    answer = directory("GET", "/things?format=collection").json
    assert (answer["total"], answer["members"]) == (0, [])


def test_descriptions_are_there_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedStore(tmp_path / "graph") as store:
        Registry(store, "home").put_description(lamp())
        first = ThingStore(store).get(Iri("urn:example:lamp"))
        assert first is not None
    with EmbeddedStore(tmp_path / "graph") as store:
        again = ThingStore(store)
        assert again.get(Iri("urn:example:lamp")) == first
        assert again.count() == 1


def test_the_list_is_right_whoever_writes_while_it_is_made(directory: Here) -> None:
    things = directory.registry.things
    done = threading.Event()

    def write(name: str) -> None:
        for i in range(40):
            directory.registry.put_description(lamp(f"urn:example:{name}{i}"))
            if i % 3 == 0:
                things.remove(Iri(f"urn:example:{name}{i}"))

    def look() -> None:
        while not done.is_set():
            things.reread()
            things.page(0, 1)

    looking = threading.Thread(target=look)
    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    looking.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    looking.join()
    left = sorted(f"urn:example:{name}{i}" for name in "ab" for i in range(40) if i % 3)
    assert [thing.id for thing in things.page(0, 1000)] == left
    assert things.count() == len(left)


def test_one_description_is_read_without_reading_all() -> None:
    """Two hundred times as many do not take two hundred times as long."""

    def best(things: ThingStore) -> float:
        took = []
        for _ in range(20):
            start = time.perf_counter()
            assert things.get(Iri("urn:example:1")) is not None
            took.append(time.perf_counter() - start)
        return min(took)

    times = []
    for many in (5, 1000):
        with EmbeddedStore() as store:
            things, changes = ThingStore(store), DocumentChanges()
            for i in range(many):
                things.change(Iri(f"urn:example:{i}"), lamp(f"urn:example:{i}"), None, changes)
            things.write({}, changes)
            times.append(best(things))
    assert times[1] < 20 * times[0]


# Expiry.


def test_a_time_to_live_becomes_an_expiry(directory: Here) -> None:
    """tdd-registrationinfo-vocab-ttl, -expires: ttl goes before expires, and any update extends it."""
    directory.put(
        lamp(registration={"ttl": 3600, "expires": "2000-01-01T00:00:00Z", "created": "2000-01-01T00:00:00Z"})
    )
    first = directory.get("urn:example:lamp")["registration"]
    modified, expires = (datetime.fromisoformat(first[name]) for name in ("modified", "expires"))
    assert first["ttl"] == 3600
    assert expires - modified == timedelta(hours=1)
    assert directory("PATCH", at("urn:example:lamp"), {}, PATCH).status == 204
    second = directory.get("urn:example:lamp")["registration"]
    assert second["expires"] > first["expires"]
    assert second["created"] == first["created"] > "2026"


def test_an_expiry_can_be_set_and_taken_away(directory: Here) -> None:
    directory.put(lamp(registration={"expires": "2100-01-01T02:00:00+02:00"}))
    assert directory.get("urn:example:lamp")["registration"]["expires"] == "2100-01-01T00:00:00.000Z"
    directory("PATCH", at("urn:example:lamp"), {"registration": {"expires": None}}, PATCH)
    assert "expires" not in directory.get("urn:example:lamp")["registration"]


def test_what_has_expired_is_purged(directory: Here) -> None:
    """tdd-registrationinfo-expiry-purge."""
    directory.put(lamp("urn:example:old", registration={"expires": "2020-01-01T00:00:00Z"}))
    directory.put(lamp("urn:example:new", registration={"expires": "2100-01-01T00:00:00Z"}))
    directory.put(lamp("urn:example:eternal"))
    directory.registry.things.purge()
    assert [td["id"] for td in directory("GET", "/things").json] == ["urn:example:eternal", "urn:example:new"]
    assert not directory.store.ask("ASK { <urn:example:old> ?p ?o }")


# Events.


class Stream:
    """A stream of server-sent events. Opened once the directory has begun to tell."""

    def __init__(self, directory: Directory, path: str = "/events", since: str | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", directory.port, timeout=20)
        self._connection.request("GET", path, headers={} if since is None else {"Last-Event-ID": since})
        self._answer = self._connection.getresponse()
        assert (self._answer.status, self._answer.headers.get_content_type()) == (200, "text/event-stream")
        self._block()

    def _block(self) -> dict[str, str]:
        """The fields of the next block; none of a comment's. Empty at the end, too."""
        said: dict[str, str] = {}
        for line in iter(self._answer.readline, b""):
            text = line.decode().rstrip("\n")
            if not text:
                break
            name, _, value = text.partition(": ")
            if name:
                said[name] = value
        return said

    def next(self) -> tuple[str, Any, str]:
        block = self._block()
        return block["event"], json.loads(block["data"]), block["id"]

    def ended(self) -> bool:
        return self._answer.readline() == b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def test_events(directory: Here) -> None:
    """tdd-notification-sse, -event-id, -event-types, -data, -data-td-id."""
    with Stream(directory) as stream:
        directory.put(lamp())
        directory.say("dev-1", description())
        directory.put(lamp(title="New"))
        directory("DELETE", at("urn:example:lamp"))
        directory.say("dev-1", None)
        events = [stream.next() for _ in range(5)]
    lamps, device = {"id": "urn:example:lamp"}, {"id": "urn:tinyfleet:home:dev-1"}
    assert [(kind, data) for kind, data, _ in events] == [
        ("thing_created", lamps),
        ("thing_created", device),
        ("thing_updated", lamps),
        ("thing_deleted", lamps),
        ("thing_deleted", device),
    ]
    assert len({id for _, _, id in events}) == 5


def test_events_of_one_type(directory: Here) -> None:
    """tdd-notification-filter-type."""
    with Stream(directory, "/events/thing_deleted") as stream:
        directory.put(lamp())
        directory("DELETE", at("urn:example:lamp"))
        assert stream.next()[0] == "thing_deleted"


def test_events_with_what_has_changed(directory: Here) -> None:
    """tdd-notification-data-create-full, -update-diff, -update-id, -delete-diff."""
    with Stream(directory, "/events?diff=true") as stream:
        directory.put(lamp(description="Old"))
        kind, data, _ = stream.next()
        assert (kind, given_back(data)) == ("thing_created", lamp(description="Old"))
        directory.put(lamp(title="New"))
        kind, data, _ = stream.next()
        modified = data.pop("registration")
        assert (kind, data) == ("thing_updated", {"id": "urn:example:lamp", "title": "New", "description": None})
        assert set(modified) == {"modified"}
        directory("DELETE", at("urn:example:lamp"))
        assert stream.next()[:2] == ("thing_deleted", {"id": "urn:example:lamp"})


def test_a_client_that_comes_back_gets_what_it_missed(directory: Here) -> None:
    """tdd-notification-event-id."""
    with Stream(directory) as stream:
        directory.put(lamp())
        _, _, last = stream.next()
    directory.put(lamp(title="New"))
    directory("DELETE", at("urn:example:lamp"))
    with Stream(directory, since=last) as stream:
        assert [stream.next()[0] for _ in range(2)] == ["thing_updated", "thing_deleted"]
        directory.put(lamp())
        assert stream.next()[0] == "thing_created"
    with Stream(directory, since="of another server.7") as stream:
        assert [stream.next()[0] for _ in range(4)][-1] == "thing_created"


def test_what_is_remembered_is_bounded(directory: Here) -> None:
    for i in range(REMEMBERED + 10):
        directory.registry.put_description(lamp(title=str(i)))
    with Stream(directory, since="before") as stream:
        numbers = [int(stream.next()[2].rpartition(".")[2]) for _ in range(REMEMBERED)]
    assert numbers == list(range(11, REMEMBERED + 11))


def test_what_changes_nothing_is_no_event(directory: Here) -> None:
    """A broker hands out retained descriptions with every connection."""
    directory.say("dev-1", description())
    first = directory.get("urn:tinyfleet:home:dev-1")["registration"]["modified"]
    with Stream(directory) as stream:
        directory.say("dev-1", description())
        directory.say("dev-1", description(title="Renamed"))
        assert stream.next()[0] == "thing_updated"
    assert directory.get("urn:tinyfleet:home:dev-1")["registration"]["modified"] > first


def test_a_refused_description_is_no_event(directory: Here) -> None:
    with Stream(directory) as stream:
        assert directory.put(lamp(title=None)) == 400
        directory.put(lamp())
        assert stream.next()[0] == "thing_created"


def test_a_server_that_stops_ends_its_streams() -> None:
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        endpoint = Endpoint(store, TOKEN, registry=registry)
        with Stream(Here(endpoint, store, registry)) as stream:
            endpoint.close()
            assert stream.ended()


def test_many_write_while_one_listens(directory: Here) -> None:
    """Every change is told, once and in order, and no patch is lost to another."""
    directory.put(lamp(version={"instance": "0"}))

    def patch(name: str) -> None:
        for i in range(10):
            answer = directory("PATCH", at("urn:example:lamp"), {f"urn:x:{name}{i}": i}, PATCH)
            assert answer.status == 204

    with Stream(directory) as stream:
        writers = [threading.Thread(target=patch, args=(name,)) for name in "abc"]
        for writer in writers:
            writer.start()
        numbers = [int(stream.next()[2].rpartition(".")[2]) for _ in range(30)]
        for writer in writers:
            writer.join()
    assert all(b == a + 1 for a, b in itertools.pairwise(numbers))
    assert sum(name.startswith("urn:x:") for name in directory.get("urn:example:lamp")) == 30


# The directory's own TD.


def test_the_directory_describes_itself(directory: Here) -> None:
    """introduction-well-known: and its forms lead to where things are."""
    answer = directory("GET", "/.well-known/wot", token=None)
    assert (answer.status, answer.headers.get_content_type()) == (200, TD_JSON)
    td = answer.json
    assert "ThingDirectory" in td["@type"]
    assert td["base"] == f"http://127.0.0.1:{directory.port}/"
    assert {"createThing", "createAnonymousThing", "retrieveThing", "updateThing", "deleteThing"} < set(td["actions"])
    assert set(td["events"]) == {"thingCreated", "thingUpdated", "thingDeleted"}
    (form,) = td["properties"]["things"]["forms"]
    path = urllib.parse.urlsplit(urllib.parse.urljoin(td["base"], form["href"].partition("{")[0])).path
    assert directory("GET", path, token=None).json == []


def w3c_schema() -> jsonschema_rs.Validator:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / "ontologies" / "wot-td" / "td-json-schema-validation.json"
    if not path.is_file():
        pytest.skip("W3C's JSON Schema of Thing Descriptions is not in TINYFLEET_DATA")
    return jsonschema_rs.validator_for(json.loads(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("td", [self_description("http://a/", "home"), description(), lamp()])
def test_descriptions_are_valid_after_w3cs_schema(td: dict[str, Any]) -> None:
    assert [error.message for error in w3c_schema().iter_errors(td)] == []


def test_what_the_directory_hands_out_is_valid_after_w3cs_schema(directory: Here) -> None:
    validator = w3c_schema()
    directory.put(lamp(registration={"ttl": 60}))
    directory.say("dev-1", description())
    for td in directory("GET", "/things").json:
        assert [error.message for error in validator.iter_errors(td)] == []


# Merge patches.

scalars = st.booleans() | st.integers() | st.text(max_size=3)
documents = st.recursive(
    scalars | st.lists(scalars, max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abcd"), documents, max_size=4)


@given(before=objects, after=objects)
def test_a_difference_merged_gives_the_new_one(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert merged(before, difference(before, after)) == after
    assert difference(after, after) == {}


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ],
)
def test_merge_patches_as_in_rfc_7396(target: Any, patch: Any, result: Any) -> None:
    assert merged(target, patch) == result


def test_the_model_of_a_device_stays_an_iri(directory: Here) -> None:
    directory.put(description())
    assert directory.get("urn:tinyfleet:home:dev-1")["tf:model"] == {"@id": f"urn:tinyfleet:model:{MODEL.hex()}"}


# The whole server: a broker, devices on it, and the directory.


def test_a_device_that_is_deleted_over_http_is_gone_from_the_broker_too(
    broker: tuple[str, int], tmp_path: Path
) -> None:
    """Else its retained description would bring it back with the next server. A device that is there may come again."""
    retained: queue.Queue[tuple[str, bytes]] = queue.Queue()
    with FleetServer(tmp_path, "home", broker=broker) as server:
        device = Session(*broker, "device", on_message=lambda topic, said: retained.put((topic, said)))
        client = Directory(server.address, server.token)
        with Stream(client) as stream:
            device.publish(TOPICS.td("dev-1"), payload(description()), retain=True)
            assert stream.next()[:2] == ("thing_created", {"id": "urn:tinyfleet:home:dev-1"})
            assert given_back(client.get("urn:tinyfleet:home:dev-1")) == description()
            device.subscribe(TOPICS.td("dev-1"))
            assert retained.get(timeout=20) == (TOPICS.td("dev-1"), payload(description()))
            assert client("DELETE", at("urn:tinyfleet:home:dev-1")).status == 204
            assert stream.next()[0] == "thing_deleted"
            assert retained.get(timeout=20) == (TOPICS.td("dev-1"), b"")
        device.close()
    with FleetServer(tmp_path, "home", broker=broker) as server:
        assert Directory(server.address, server.token)("GET", "/things").json == []
