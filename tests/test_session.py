"""The session with a broker, from several threads at once."""

import logging
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import plain_broker
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Message, Receipt, Session

Broker = BrokerAddress
Heard = list[tuple[str, bytes]]

ACCEPTED = bytes((0x20, 2, 0, 0))


@contextmanager
def said_to(heard: Heard, parts: list[bytes]) -> Iterator[None]:
    """A session whose broker accepts it, says this, a part at a time, and hangs up; all of it has been read."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def broker() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(ACCEPTED)
                for part in parts:
                    connection.sendall(part)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=broker)
        thread.start()
        session = Session(
            plain_broker(listening.getsockname()[1]), "s", on_message=lambda *m: heard.append(m), background=False
        )
        while session.connected:
            session.pump(1)
        session.close()
        thread.join()
        yield


def published(topic: str, payload: bytes, qos: int) -> bytes:
    """MQTT 3.1.1, section 3.3."""
    name = topic.encode()
    content = len(name).to_bytes(2, "big") + name + b"\x00\x07" * qos + payload
    sizes, left = [], len(content)
    while True:
        sizes.append(left % 128 + 128 * (left >= 128))
        left //= 128
        if not left:
            return bytes([0x30 | qos << 1, *sizes]) + content


MESSAGES = st.tuples(
    st.text(st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=200),
    st.binary(max_size=300),
    st.integers(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(messages=st.lists(MESSAGES, max_size=8), cuts=st.lists(st.integers(0, 2000), max_size=8))
def test_messages_are_read_however_their_bytes_are_cut(messages: list[tuple[str, bytes, int]], cuts: list[int]) -> None:
    heard: Heard = []
    data = b"".join(published(*message) for message in messages)
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    with said_to(heard, [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]):
        assert heard == [(topic, payload) for topic, payload, _ in messages]


@settings(max_examples=60, deadline=None)
@given(message=MESSAGES, garbage=st.binary(max_size=200))
def test_bytes_that_are_no_mqtt_end_the_connection_and_no_more(message: tuple[str, bytes, int], garbage: bytes) -> None:
    heard: Heard = []
    with said_to(heard, [published(*message), garbage]):
        assert heard[0] == message[:2]


def test_what_is_sent_together_arrives_in_order_and_all_of_it(broker: Broker) -> None:
    """More than a socket takes at once, so that the listening thread must write the rest."""
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(broker, "listener", on_message=lambda *message: arrived.put(message))
    listener.subscribe("t/+")
    sender = Session(broker, "sender")
    payloads = [n.to_bytes(2, "big") * 512 for n in range(8000)]  # 8 MB
    sender.send(Message("t/1", payload) for payload in payloads)
    assert sender.flush(60)
    assert [arrived.get(timeout=30)[1] for _ in payloads] == payloads
    sender.close()
    listener.close()


def test_a_message_of_any_size_is_sent_as_it_is(broker: Broker) -> None:
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(broker, "listener", on_message=lambda *message: arrived.put(message))
    listener.subscribe("sizes/+")
    sender = Session(broker, "sender")
    sizes = [0, 1, *range(116, 122), *range(16371, 16377), 1 << 21]  # around those whose length takes a byte more
    sender.send([Message("sizes/á", bytes([size % 251]) * size) for size in sizes])
    sender.publish("sizes/end", b"the end")
    got = [arrived.get(timeout=30) for _ in range(len(sizes) + 1)]
    assert got == [*(("sizes/á", bytes([size % 251]) * size) for size in sizes), ("sizes/end", b"the end")]
    sender.close()
    listener.close()


def test_an_error_in_the_callers_own_thread_ends_no_session_and_costs_its_message_only(broker: Broker) -> None:
    arrived: list[bytes] = []

    def hear(_topic: str, payload: bytes) -> None:
        arrived.append(payload)
        if payload == b"bad":
            raise RuntimeError("what is this?")

    listener = Session(broker, "listener", on_message=hear, background=False)
    listener.subscribe("t")
    listener.pump(0.1)
    sender = Session(broker, "sender")  # now: when the broker accepts it, it has read the subscription
    sender.send([Message("t", payload, True) for payload in (b"one", b"bad", b"two", b"bad", b"three")])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="what is this"):
            while True:
                listener.pump(0.1)
    while arrived[-1] != b"three":
        listener.pump(0.1)
    assert arrived == [b"one", b"bad", b"two", b"bad", b"three"]
    sender.close()
    listener.close()


def test_threads_publish_at_once_and_nothing_is_torn(broker: Broker) -> None:
    arrived: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(broker, "listener", on_message=lambda *message: arrived.put(message))
    listener.subscribe("t/+")
    sender = Session(broker, "sender")

    def send(name: int) -> None:
        for n in range(300):
            sender.publish(f"t/{name}", n.to_bytes(2, "big") * (1 + n))

    threads = [threading.Thread(target=send, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got: dict[str, list[bytes]] = {}
    for _ in range(1200):
        topic, payload = arrived.get(timeout=30)
        got.setdefault(topic, []).append(payload)
    assert got == {f"t/{name}": [n.to_bytes(2, "big") * (1 + n) for n in range(300)] for name in range(4)}
    sender.close()
    listener.close()


def test_a_callback_may_wait_for_a_thread_that_uses_the_session(broker: Broker) -> None:
    """As the server's does, when more has arrived than it can write: it waits for the writer, who confirms messages."""
    room, waiting = threading.Semaphore(1), queue.SimpleQueue[Receipt | None]()

    def deliver(_topic: str, _payload: bytes, receipt: Receipt | None) -> None:
        room.acquire()
        waiting.put(receipt)

    session = Session(broker, "server", on_delivery=deliver)
    session.subscribe("t/+")
    sender = Session(broker, "sender")
    for _ in range(50):
        sender.publish("t/1", b"x")
    for _ in range(50):
        receipt = waiting.get(timeout=30)
        session.publish("u", b"while the callback waits")
        session.received([receipt])
        room.release()
    assert session.flush(30)
    sender.close()
    session.close()


def test_an_error_in_a_callback_costs_its_message_and_no_other(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the thread that listens would be gone, and nobody would notice."""
    arrived: queue.Queue[bytes] = queue.Queue()

    def hear(_topic: str, payload: bytes) -> None:
        if payload == b"bad":
            raise RuntimeError("what is this?")
        arrived.put(payload)

    listener = Session(broker, "listener", on_message=hear)
    listener.subscribe("t")
    sender = Session(broker, "sender")  # now: when the broker accepts it, it has read the subscription
    for payload in (b"one", b"bad", b"two"):
        sender.publish("t", payload)
    with caplog.at_level(logging.ERROR, "tinyfleet.edge.wire.mqtt_session"):
        assert [arrived.get(timeout=30) for _ in range(2)] == [b"one", b"two"]
    assert [record.exc_info is not None for record in caplog.records] == [True]
    sender.close()
    listener.close()


def test_a_session_can_be_closed_in_a_callback_and_used_no_more(broker: Broker) -> None:
    closed = threading.Event()

    def hear(_topic: str, _payload: bytes) -> None:
        listener.close()
        closed.set()

    listener = Session(broker, "listener", on_message=hear)
    listener.subscribe("t")
    sender = Session(broker, "sender")  # now: when the broker accepts it, it has read the subscription
    sender.publish("t", b"the end")
    assert closed.wait(30)
    sender.close()
    sender.publish("t", b"to nobody")
    assert not sender.connected


def test_it_is_closed_while_a_callback_sends(broker: Broker) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def hear(_topic: str, _payload: bytes) -> None:
        begun.set()
        assert go_on.wait(30)
        listener.send([Message("u", b"an answer")])

    listener = Session(broker, "listener", on_message=hear)
    listener.subscribe("t")
    sender = Session(broker, "sender")  # now: when the broker accepts it, it has read the subscription
    sender.publish("t", b"a question")
    assert begun.wait(30)
    closing = threading.Thread(target=listener.close, daemon=True)
    closing.start()
    go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    sender.close()
