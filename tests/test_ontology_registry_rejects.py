"""What the registry refuses: bad descriptions, statuses and bytes leave no trace, and nothing is fetched."""

import copy
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ontology_fixtures import TD, TOPICS, description, everything, payload, status

from tinyfleet.ontology.ingest.description_parser import MAX_BYTES, RejectedMessage, parse_thing_description, to_triples
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.store import EmbeddedStore, Store
from tinyfleet.ontology.vocabulary.namespaces import BOARDS, board_iri, device_iri


def without_board(name: str) -> dict[str, Any]:
    td = description()
    del td["tf:board"][name]
    return td


SHARP = [
    *(bytes([c]) for c in b'"\\{}[]:,\x00\xff'), b"\\u", b"\\ud800", b"@id", b"@type", b"@context", b"tf:", b"1e999",
    b"null",
]  # fmt: skip


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The data with some stretches of it cut out and others put in their place."""
    for at, length, new in edits:
        data = data[:at] + new + data[at + length :]
    return data


def with_board(**changes: Any) -> dict[str, Any]:
    td = description()
    td["tf:board"] |= {name.replace("__", ":").replace("at_", "@"): value for name, value in changes.items()}
    return td


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"properties": inner}
    return description(properties=inner)


REMOTE = "https://example.org/context.jsonld"
BAD = {
    "another device's id": (description("dev-2"), "its id must be urn:tinyfleet:home:dev-1"),
    "another fleet's id": (description(fleet="away"), "its id must be"),
    "no id": (description(id=None), "its id must be"),
    "another id inside": (description(tf__deviceId="dev-2"), "deviceId must be 'dev-1'"),
    "another fleet inside": (description(tf__fleet="away"), "fleet must be 'home'"),
    "no title": (description(title=None), "title: one text"),
    "two titles": (description(title=["a", "b"]), "title: one text"),
    "a title that is a number": (description(title=5), "title: one text"),
    "no security": (description(security=None), "security"),
    "no board": (description(tf__board=None), "tf:board"),
    "a board of another house": (description(tf__board={"@id": "https://example.org/board"}), "tf:board"),
    "a board that is not described": (description(tf__board={"@id": board_iri("x")}), "does not describe it"),
    "a board without its type": (without_board("@type"), "must have the @type tf:Board"),
    "a board without RAM": (without_board("tf:ramBytes"), "tf:ramBytes"),
    "a board without a processor": (without_board("tf:mcu"), "tf:mcu"),
    "a board with negative RAM": (with_board(tf__ramBytes=-1), "tf:ramBytes"),
    "a board with no RAM": (with_board(tf__ramBytes=0), "tf:ramBytes"),
    "a board with RAM in words": (with_board(tf__ramBytes="256 KB"), "tf:ramBytes"),
    "a board with two RAMs": (with_board(tf__ramBytes=[1, 2]), "tf:ramBytes"),
    "a board with part of a byte": (with_board(tf__ramBytes=1.5), "tf:ramBytes"),
    "a board with an unknown clock of 0": (with_board(tf__clockHz=0), "tf:clockHz"),
    "no engine": (description(tf__engine=None), "tf:engine"),
    "no engine version": (description(tf__engineVersion=None), "tf:engineVersion"),
    "an arena of 0 for unknown": (description(tf__arenaBytes=0), "tf:arenaBytes"),
    "an arena larger than the RAM": (description(tf__arenaBytes=262_145), "larger than the 262144 bytes"),
    "an invalid model": (description(tf__model={"@id": "urn:x:y"}), "tf:model"),
    "not a device": (description(**{"@type": "Thing"}), "@type"),
    "not a thing": (description(**{"@type": "tf:Device"}), "@type"),
    "no context": (description(**{"@context": None}), "its @context must hold"),
    "a remote context": (description(**{"@context": REMOTE}), "its @context must hold"),
    "a remote context besides": (
        description(**{"@context": ["https://www.w3.org/2022/wot/td/v1.1", REMOTE]}),
        "nothing is fetched",
    ),
    "a context that imports": (
        description(**{"@context": ["https://www.w3.org/2022/wot/td/v1.1", {"@import": REMOTE}]}),
        "prefixes only",
    ),
    "a context that redefines": (
        description(**{"@context": ["https://www.w3.org/2022/wot/td/v1.1", {"title": "https://w3id.org/tinyfleet#"}]}),
        "redefines",
    ),
    "a context within": (description(actions={"x": {"@context": REMOTE}}), "may not use '@context'"),
    "a reverse property": (description(**{"@reverse": {"tf:board": {"@id": "urn:x:y"}}}), "may not use '@reverse'"),
    "a graph": (description(**{"@graph": [description("dev-2")]}), "may not use '@graph'"),
    "another device within": (
        description(actions={"x": {"@id": "urn:tinyfleet:home:dev-2", "@type": "tf:Device"}}),
        "describes another device",
    ),
    "too deep": (nested(40), "nests deeper"),
    "an array": ([description()], "not a JSON object"),
    "a text": ("urn:tinyfleet:home:dev-1", "not a JSON object"),
}
RAW = {
    "10 MB": (payload(description(title="x" * 10_000_000)), f"more than the {MAX_BYTES}"),
    "10 MB of brackets": (b"[" * 10_000_000, f"more than the {MAX_BYTES}"),
    "very deep": (b"[" * 60_000, "more than 8192 values"),
    "deep": (b"[" * 8_000, "nests deeper"),
    "deep enough to parse": (b"[" * 500 + b"]" * 500, "nests deeper"),
    "deep objects": (b'{"a":' * 8_000 + b"1" + b"}" * 8_000, "nests deeper"),
    "many empty lists": (b"[" + b"[]," * 20_000 + b"[]]", "more than 8192 values"),
    "not JSON": (b"<td/>", "not JSON"),
    "cut": (payload(description())[:-20], "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not UTF-8"),
    "CBOR": (status(), "not UTF-8"),
    "not a number": (payload(description()).replace(b"65536", b"NaN"), "not a JSON number"),
    "an infinite number": (payload(description()).replace(b"65536", b"1e999"), "too large"),
    "a number of 5,000 digits": (payload(description()).replace(b"65536", b"9" * 5000), "5000 digits"),
    "a number of 21 digits": (payload(description()).replace(b"65536", b"9" * 21), "21 digits"),
    "half a character": (payload(description()).replace(b"A device", b"\\ud800"), "surrogate"),
    "half a character as a name": (payload(description()).replace(b'"title"', b'"\\udfff": 1, "title"'), "surrogate"),
    "a name twice": (payload(description()).replace(b'"title"', b'"id": "urn:x", "title"', 1), "twice"),
}


@pytest.mark.parametrize(
    ("data", "reason"),
    [pytest.param(payload(td), reason, id=name) for name, (td, reason) in BAD.items()]
    + [pytest.param(data, reason, id=name) for name, (data, reason) in RAW.items()],
)
@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_a_bad_description_is_refused_with_its_reason_and_leaves_no_trace(
    store: Store, registry: Registry, caplog: pytest.LogCaptureFixture, data: bytes, reason: str, known: bool
) -> None:
    if known:
        registry.ingest_one(TD, payload(description()))
    before = everything(store)
    with caplog.at_level(logging.WARNING):
        assert not registry.ingest_one(TD, data)
    assert everything(store) == before
    assert registry.rejected == 1
    assert registry.last_rejection is not None and reason in registry.last_rejection
    assert registry.last_rejection in caplog.text
    assert len(registry.last_rejection) < 2_000


def test_what_a_device_says_cannot_steer_the_terminal_that_shows_why_it_is_refused(registry: Registry) -> None:
    assert not registry.ingest_one(TD, payload(description(tf__engine="\x1b]0;x\x07")))
    assert registry.last_rejection is not None and "tf:engine" in registry.last_rejection
    assert registry.last_rejection.isprintable()


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"{}", status()[:-1], status() + b"\0", status(battery=1.5), status(drift=float("nan"))],
    ids=["empty", "break", "JSON", "cut", "longer", "battery above 1", "drift not a number"],
)
def test_a_bad_status_is_refused_and_leaves_no_trace(store: Store, registry: Registry, data: bytes) -> None:
    registry.ingest_one(TOPICS.status("dev-1"), status(samples=5))
    before = everything(store)
    assert not registry.ingest_one(TOPICS.status("dev-1"), data)
    assert (registry.accepted, registry.rejected) == (1, 1)
    assert everything(store) == before


@pytest.mark.parametrize(
    "topic",
    [
        "tinyfleet/away/devices/dev-1/td",
        TOPICS.command("dev-1"),
        TOPICS.reply("dev-1"),
        "tinyfleet/home/devices/a b/td",
        "",
    ],
)
def test_other_topics_are_none_of_its_business(store: Store, registry: Registry, topic: str) -> None:
    assert not registry.ingest_one(topic, payload(description()))
    assert (registry.accepted, registry.rejected, everything(store)) == (0, 0, [])


def test_nothing_is_fetched(store: Store, registry: Registry) -> None:
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/context.jsonld"
        known = "https://www.w3.org/2022/wot/td/v1.1"
        contexts = (url, [known, url], [known, {"@import": url}], [known, {"x": {"@id": "tf:x", "@context": url}}])
        for context in contexts:
            assert not registry.ingest_one(TD, payload(description(**{"@context": context})))
        assert not registry.ingest_one(TD, payload(description(actions={"x": {"@context": url}})))
        assert registry.ingest_one(TD, payload(description(links=[{"href": url}], support=url)))
        server.shutdown()
    assert asked == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
paths = st.sampled_from(
    [(name,) for name in description()]
    + [("tf:board", name) for name in description()["tf:board"]]
    + [("x",), ("@id",)]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=paths, value=json_values)
def test_no_description_breaks_the_registry(path: tuple[str, ...], value: Any) -> None:
    td = copy.deepcopy(description())
    node = td
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        taken = registry.ingest_one(TD, json.dumps(td).encode())
        assert (registry.accepted, registry.rejected) == ((1, 0) if taken else (0, 1))
        subjects = set(store.query("SELECT DISTINCT ?s WHERE { ?s ?p ?o }").column("s"))
        device = device_iri("home", "dev-1")
        boards = {str(s).partition("#")[0] for s in subjects if str(s).startswith(BOARDS)}
        assert subjects == set() if not taken else device in subjects and len(boards) <= 1


VALID = payload(description())
edits = st.lists(
    st.tuples(st.integers(0, len(VALID)), st.integers(0, 8), st.binary(max_size=4) | st.sampled_from(SHARP)), max_size=4
)


@settings(max_examples=300)
@given(data=st.one_of(st.binary(max_size=200), json_values.map(payload), edits.map(lambda e: edited(VALID, e))))
def test_no_bytes_break_the_reader_or_the_registry(data: bytes) -> None:
    try:
        to_triples(parse_thing_description(data))
    except RejectedMessage as reason:
        assert str(reason)
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        assert registry.ingest_one(TD, data) or everything(store) == []


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=40))
def test_no_status_breaks_the_registry(data: bytes) -> None:
    with EmbeddedStore() as store:
        Registry(store, "home").ingest_one(TOPICS.status("dev-1"), data)
