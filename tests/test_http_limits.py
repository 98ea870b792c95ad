"""What one HTTP client may cost the server: raw sockets that send too much, too slowly, or read nothing."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from directory_fixtures import Here, lamp

from tinyfleet.ontology.http import connections, directory
from tinyfleet.ontology.http.access import Access
from tinyfleet.ontology.http.connections import ConnectionLimits
from tinyfleet.ontology.http.endpoint import Endpoint
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.server.authority.authority import Authority

HOST = b"Host: localhost\r\n"
QUERY = b"POST /sparql HTTP/1.1\r\n" + HOST + b"Content-Type: application/sparql-query\r\n"
ASK = b"GET /sparql?query=ASK%7B%7D HTTP/1.1\r\n" + HOST + b"\r\n"
ALL = b"GET /sparql?query=SELECT%20*%20%7B%3Fs%20%3Fp%20%3Fo%7D HTTP/1.1\r\n" + HOST + b"\r\n"
CHUNKED = QUERY + b"Transfer-Encoding: chunked\r\n\r\n"
SOME = ALL.replace(b"%7D HTTP", b"%7D%20LIMIT%2040 HTTP")  # more than the system takes, less than asyncio holds back


@pytest.fixture(scope="module")
def limited() -> Iterator[Here]:
    limits = ConnectionLimits(
        head_seconds=0.3, body_seconds=0.3, stalled_seconds=0.3, head_bytes=2000, pipelined=5, total=7, per_address=5
    )
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        with Endpoint(store, Access.open(), registry=registry, limits=limits) as endpoint:
            endpoint._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections have it from there
            store.update(
                "INSERT DATA { " + " ".join(f"<urn:{i}> <urn:p> '{'x' * 1000}' ." for i in range(20_000)) + " }"
            )
            yield Here(endpoint, store, registry)


@pytest.fixture
def limits(limited: Here) -> Iterator[ConnectionLimits]:
    """Without the connections of an earlier test."""
    until(lambda: limited.endpoint.limits.open == 0)
    yield limited.endpoint.limits
    until(lambda: limited.endpoint.limits.open == 0)


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def connect(limited: Here, source: str = "127.0.0.1", buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    connection.settimeout(20)
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.bind((source, 0))
    connection.connect(("127.0.0.1", limited.endpoint.port))
    return connection


def everything(connection: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    said = b""
    try:
        while part := connection.recv(65_536):
            said += part
    except ConnectionError:
        pass
    return said


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"G",
        b"GET / HTTP/1.1\r\n" + HOST,
        b"GET /" + b"x" * 5000,
        b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 5000,
        QUERY + b"Content-Length: 100\r\n\r\n",
        QUERY + b"Content-Length: 100\r\n\r\nASK {",
        CHUNKED + b"5\r\nASK {\r\n",
        CHUNKED + b"6\r\nASK {}\r\n0\r\n",
        CHUNKED + b"6;" + b"x" * 5000,
        CHUNKED + b"6\r\nASK {}\r\n0\r\nA: " + b"x" * 5000,
        CHUNKED + b"6\r\nASK {}\r\n0\r\n" + b"A: x\r\n" * 1000,
    ],
)
def test_what_does_not_end_is_ended(limited: Here, limits: ConnectionLimits, sent: bytes) -> None:
    refused, begin = limits.refused, time.monotonic()
    with connect(limited) as connection:
        connection.sendall(sent)
        everything(connection)
    assert time.monotonic() - begin < 4  # before the five seconds that uvicorn keeps an idle connection
    assert limits.refused > refused


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nA: ",
        QUERY + b"Content-Length: 1000\r\n\r\n",
        ASK[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\n" + HOST + b"\r\n",
    ],
)
def test_a_byte_now_and_then_gives_no_more_time(limited: Here, limits: ConnectionLimits, beginning: bytes) -> None:
    begin = time.monotonic()
    with connect(limited) as connection, pytest.raises(ConnectionError):
        connection.sendall(beginning)
        while time.monotonic() < begin + 20:
            connection.sendall(b"x")
            threading.Event().wait(0.05)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("long", [b"GET /sparql?query=ASK%7B%7D&x=", ASK[:-2] + b"A: "])
def test_a_head_that_is_too_long_is_refused_also_if_it_comes_at_once(
    limited: Here, limits: ConnectionLimits, long: bytes
) -> None:
    end = b"\r\n\r\n" if long.startswith(ASK[:-2]) else b" HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    for length, answered in ((1000, True), (3000, False)):
        with connect(limited) as connection:
            connection.sendall(long + b"x" * length + end)
            assert connection_answers(connection) is answered


def connection_answers(connection: socket.socket) -> bool:
    try:
        return connection.recv(65_536).startswith(b"HTTP/1.1 200")
    except ConnectionError:
        return False


def test_some_requests_may_be_sent_ahead_of_the_answers_and_not_thousands(
    limited: Here, limits: ConnectionLimits
) -> None:
    last = ASK[:-2] + b"Connection: close\r\n\r\n"
    with connect(limited) as connection:
        connection.sendall(ASK * 4 + last)
        assert everything(connection).count(b"HTTP/1.1 200") == 5
    with connect(limited) as connection:
        connection.sendall(ASK * 5000)
        assert everything(connection).count(b"HTTP/1.1 200") <= 6


@pytest.mark.parametrize(
    ("asked", "then"),
    [(ALL, b""), (SOME, b""), (SOME[:-2] + b"Connection: close\r\n\r\n", b""), (SOME, b"\0")],
    ids=["in the middle", "at the end", "closed", "closed for an error"],
)
def test_a_client_that_reads_nothing_is_ended(
    limited: Here, limits: ConnectionLimits, asked: bytes, then: bytes
) -> None:
    refused = limits.refused
    with connect(limited, buffer=4096) as connection:
        connection.sendall(asked)
        assert connection.recv(1) == b"H"
        connection.sendall(then)
        until(lambda: limits.open == 0)
    assert limits.refused == refused + 1


def test_an_address_and_all_together_have_so_many_connections(limited: Here, limits: ConnectionLimits) -> None:
    def answered(source: str, count: int) -> int:
        opened.extend(some := [connect(limited, source) for _ in range(count)])
        for connection in some:
            connection.sendall(b"GET /events HTTP/1.1\r\n" + HOST + b"\r\n")
        return sum(connection_answers(connection) for connection in some)

    opened: list[socket.socket] = []
    try:
        assert answered("127.0.0.1", 8) == 5
        assert answered("127.0.0.2", 4) == 2
    finally:
        for connection in opened:
            connection.close()
    until(lambda: limits.open == 0)
    with connect(limited) as connection:
        connection.sendall(ASK)
        assert connection_answers(connection)


def test_a_handshake_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 0.3)
    authority = Authority(tmp_path, ["127.0.0.1"])
    with EmbeddedStore() as store, Endpoint(store, Access.open(), certificate=authority.server_files) as endpoint:
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as connection:
            begin = time.monotonic()
            assert everything(connection) == b""
            assert time.monotonic() - begin < 10
        trusted = ssl.create_default_context(cafile=str(authority.ca_file))
        with (
            socket.create_connection(("127.0.0.1", endpoint.port), timeout=20) as plain,
            trusted.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
        ):
            secured.sendall(ASK)
            assert connection_answers(secured)
    authority.close()


# Streams of events

EVENTS = b"GET /events?diff=true HTTP/1.1\r\n" + HOST + b"\r\n"


def test_streams_of_events_are_so_many(
    limited: Here, limits: ConnectionLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "MAX_STREAMS", 2)
    streams = [connect(limited) for _ in range(4)]
    for connection in streams:
        connection.sendall(EVENTS)
    answers = [connection.recv(4096) for connection in streams]
    assert sum(answer.startswith(b"HTTP/1.1 200") for answer in answers) == 2
    refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
    assert len(refused) == 2
    assert all(b"retry-after: 60" in answer.lower() for answer in refused)
    for connection in streams:
        connection.close()
    until(lambda: limits.open == 0)
    with connect(limited) as connection:
        connection.sendall(EVENTS)
        assert connection_answers(connection)


@pytest.mark.parametrize("number", ["9" * 5000, "-1", "x", ""])
def test_where_a_client_left_off_may_be_any_text(number: str) -> None:
    with EmbeddedStore() as store:
        registry = Registry(store, "home")
        registry.put_description(lamp())
        with Endpoint(store, Access.open(), registry=registry) as endpoint:
            here = Here(endpoint, store, registry)
            with connect(here) as connection:
                since = f"Last-Event-ID: {registry.things.era}.{number}\r\n\r\n".encode()
                connection.sendall(EVENTS[:-2] + since)
                told = b""
                while b"thing_created" not in told:
                    part = connection.recv(4096)
                    assert part, told
                    told += part
