"""What the tests of the Thing Description Directory share: clients of it, and the description of a thing."""

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from ontology_fixtures import TOKEN, payload

from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.ingest.thing_store import CONTEXT
from tinyfleet.ontology.store.store import EmbeddedStore

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
        self.token = token

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
            sent["Authorization"] = f"Bearer {token or self.token}"
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
        answer = self("GET", at(id))
        assert answer.status == 200, answer
        return answer.json


class Here(Directory):
    """A client of a directory in this process, and what is behind it."""

    def __init__(self, endpoint: Endpoint, store: EmbeddedStore, registry: Registry) -> None:
        super().__init__(endpoint.address, TOKEN)
        self.endpoint = endpoint
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


@contextmanager
def open_directory() -> Iterator[Here]:
    """A directory served in this process, with a client of it."""
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        with Endpoint(store, Access.of_token(TOKEN, "read"), registry=registry) as endpoint:
            yield Here(endpoint, store, registry)


def given_back(td: dict[str, Any]) -> dict[str, Any]:
    """An enriched description without what the directory adds."""
    assert td["@context"][-1] == CONTEXT
    context = td["@context"][:-1]
    rest = {name: value for name, value in td.items() if name != "registration"}
    return rest | {"@context": context[0] if len(context) == 1 else context}
