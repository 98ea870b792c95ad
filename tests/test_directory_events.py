"""The directory's expiry and events, alone and in a server with a broker; W3C's assertions are named."""

import http.client
import itertools
import json
import queue
import threading
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pytest
from directory_fixtures import PATCH, TOPICS, Directory, Here, at, given_back, lamp
from ontology_fixtures import TOKEN, description, payload

from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import REMEMBERED
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.server.fleet_server import FleetServer

# Expiry.


@pytest.fixture
def broker(own_broker: BrokerAddress) -> BrokerAddress:
    """Without a command service: the server that each test starts is one."""
    return own_broker


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
        headers = {"Authorization": f"Bearer {directory.token}"} | ({} if since is None else {"Last-Event-ID": since})
        self._connection.request("GET", path, headers=headers)
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
        endpoint = Endpoint(store, Access.of_token(TOKEN, "read"), registry=registry)
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


# The whole server: a broker, devices on it, and the directory.


def test_a_device_that_is_deleted_over_http_is_gone_from_the_broker_too(broker: BrokerAddress, tmp_path: Path) -> None:
    """Else its retained description would bring it back with the next server. A device that is there may come again."""
    retained: queue.Queue[tuple[str, bytes]] = queue.Queue()
    with FleetServer(tmp_path, "home", broker=broker) as server:
        device = Session(broker, "device", on_message=lambda topic, said: retained.put((topic, said)))
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
