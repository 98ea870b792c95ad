"""The Thing Description Directory over real HTTP, by the assertions of W3C WoT Discovery, named where they apply."""

import json
import os
import urllib.parse
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from directory_fixtures import PATCH, TD_JSON, Here, at, given_back, lamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ontology_fixtures import MODEL, description, everything

from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.directory import description as self_description
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.description_parser import MAX_BYTES
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import difference, merged
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF

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
        with Endpoint(store, Access.of_token("unknown", "read"), registry=registry) as endpoint:
            assert Here(endpoint, store, registry).put(lamp()) == 401


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
