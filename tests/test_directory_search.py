"""The directory's lists and searches, and what the graph has of its descriptions; W3C's assertions are named."""

import json
import re
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
from directory_fixtures import PATCH, TOPICS, Answer, Here, at, given_back, lamp
from ontology_fixtures import description, everything, payload, status

from tinyfleet.ontology.http.directory import PAGE
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import CONTEXT, DocumentChanges, ThingStore
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri, device_iri

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
