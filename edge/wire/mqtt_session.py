"""One session with an MQTT 3.1.1 broker, kept up: the only place that knows paho."""

from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, cast

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from tinyfleet.edge.errors import UserError

KEEPALIVE = 30
"""Seconds of silence after which each side asks whether the other is still there; 1.5 times that, and the broker
publishes the will."""
CONNECT_TIMEOUT = 10.0
RETRY = (1, 10)
"""Seconds between attempts to reconnect: at first, and at most."""
SHORT = 5.0
"""Seconds: a session that ends sooner is suspicious. Two clients of one name end each other's."""

READ = 65_536
"""Bytes to read at once, at most."""

log = logging.getLogger(__name__)


class Receipt(NamedTuple):
    """What `Session.received` tells the broker of a message by: its number in one session."""

    session: int
    number: int


class Message(NamedTuple):
    """What is to be published."""

    topic: str
    payload: bytes
    retain: bool = False


class _Wire:
    """The socket that paho has. paho reads byte by byte and writes message by message, a system call each; this reads
    what is there, and gathers what is written until it is flushed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # one thread may write while another, who reads, sees that it is over and closes
        self._read = b""
        self._at, self._end = 0, 0  # what paho may take of it; what comes before is done with
        self._over = False
        self.unsent = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    @property
    def unread(self) -> bool:
        """Whether a packet was read that nobody has taken: an error in a callback came before."""
        return _packet(self._read, self._end) is not None

    def packets(self) -> Iterator[tuple[int, bytes]]:
        """Reads what is there. For each packet that is complete: the first byte of its fixed header and what follows
        that header. Until the next one is asked for, `recv` gives the whole of it once more; after the last, the end of
        the connection, if that is what there was to read."""
        self._at = self._end
        try:
            data = self._sock.recv(READ)
            self._over = not data
        except OSError as error:
            data, self._over = b"", not isinstance(error, BlockingIOError)
        self._read, self._end = self._read[self._end :] + data, 0
        while (bounds := _packet(self._read, self._end)) is not None:
            self._at, (body, self._end) = self._end, bounds
            yield self._read[self._at], self._read[body : self._end]
        self._at = self._end
        if self._over:
            yield 0, b""

    def recv(self, size: int) -> bytes:
        if self._at == self._end and not self._over:
            raise BlockingIOError
        data = self._read[self._at : min(self._at + size, self._end)]
        self._at += len(data)
        return data

    def send(self, data: bytes) -> int:
        with self._lock:
            self.unsent += data
        return len(data)

    def flush(self) -> None:
        """Sends as much as the system takes now. A connection that is lost is noticed by reading."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        with self._lock:
            self._flush()
            self._sock.close()

    def _flush(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self._sock.send(self.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()


def _packet(data: bytes, first: int) -> tuple[int, int] | None:
    """Where the content of the packet that begins here begins, and where it ends; None if it is not complete. MQTT
    3.1.1, section 2.2; a length of more than four bytes, which paho refuses, is a packet without content."""
    length = 0
    for at in range(first + 1, min(first + 6, len(data))):
        length |= (data[at] & 0x7F) << 7 * (at - first - 1)
        if at == first + 5:
            return at + 1, at + 1
        if data[at] < 0x80:
            return (at + 1, at + 1 + length) if at + 1 + length <= len(data) else None
    return None


class _Client(mqtt.Client):
    """paho's client on a _Wire. Messages, which are nearly all that travels, are read and written here, as many at once
    as there are; all else is paho's."""

    deliver: Callable[[str, bytes, int | None], None]
    """Gets each message: topic, payload, and its number if it is of QoS 1."""

    def receive(self) -> None:
        """Handles what has arrived."""
        for head, content in self.wire.packets():
            if self.socket() is None:  # a callback has ended it
                return
            message = _read_publish(head, content)
            if message is None:
                self.loop_read()
            else:
                self.deliver(*message)

    def _create_socket(self) -> Any:
        sock = cast(socket.socket, super()._create_socket())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages, one after the other
        self.wire = _Wire(sock)
        return self.wire

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Says of messages of QoS 1 that they have been received."""
        self._enqueue(struct.pack("!BBH", mqtt.PUBACK, 2, number) for number in numbers)

    def publish_all(self, messages: Iterable[Message]) -> None:
        """Publishes at QoS 0."""
        self._enqueue(_publish_packet(topic.encode(), payload, retain) for topic, payload, retain in messages)

    def _enqueue(self, packets: Iterable[bytes]) -> None:
        """One packet as far as paho is concerned, and none that it waits for an answer to, or tells anyone of."""
        self._packet_queue(mqtt.PUBACK, b"".join(packets), 0, 1)


def _read_publish(head: int, content: bytes) -> tuple[str, bytes, int | None] | None:
    """The topic, payload and, at QoS 1, number of a message; None unless it is a message, well formed. MQTT 3.1.1,
    section 3.3."""
    qos = head >> 1 & 3
    at = 2 + int.from_bytes(content[:2], "big")
    if head & 0xF0 != mqtt.PUBLISH or qos > 1 or at + 2 * qos > len(content):
        return None
    topic = content[2:at].decode(errors="replace")
    return topic, content[at + 2 * qos :], int.from_bytes(content[at : at + 2], "big") if qos else None


def _publish_packet(topic: bytes, payload: bytes, retain: bool) -> bytes:
    """MQTT 3.1.1, section 3.3, at QoS 0."""
    left, length = 2 + len(topic) + len(payload), bytearray()
    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return b"".join((bytes([mqtt.PUBLISH | retain]), length, len(topic).to_bytes(2, "big"), topic, payload))


class Session:
    """Connects on construction, and again whenever the broker is lost, until closed.

    on_message(topic, payload) gets every message, and the broker is told so when it returns. With on_delivery(topic,
    payload, receipt) in its place, the broker is told when `received` is given the receipt: once the message is safe.
    on_connect() is called whenever the session is new, the first time too: nothing is subscribed to then. Without
    on_connect, what was subscribed to is subscribed to again.
    will: (topic, payload) that the broker publishes, retained, should this session break.

    With `background`, a thread of its own listens and calls back; without, `pump` does, in the caller's thread. That
    thread goes on when a callback raises: the error is logged, and the message counts as one that has been handled.
    """

    def __init__(
        self,
        host: str,
        port: int,
        client_id: str,
        *,
        on_message: Callable[[str, bytes], None] | None = None,
        on_delivery: Callable[[str, bytes, Receipt | None], None] | None = None,
        on_connect: Callable[[], None] | None = None,
        will: tuple[str, bytes] | None = None,
        background: bool = True,
    ) -> None:
        """Raises UserError if no broker answers there, or if it refuses."""
        self._where = f"{host}:{port}"
        self._client_id = client_id
        self._on_connect = on_connect
        self._background = background
        self._filters: dict[str, None] = {}
        self._last: mqtt.MQTTMessageInfo | None = None
        self._refusal: str | None = None
        self._known = False  # whether a broker has ever accepted
        self._since = 0.0  # when it last did
        self._short = 0  # sessions in a row that ended soon
        self._connected = threading.Event()
        self._closing = threading.Event()
        self._retry_at, self._retry = 0.0, RETRY[0]
        self._number = 0  # of the session: a message's number means nothing in the next one
        # Any thread publishes, so any may write; one thread reads, and calls back. paho's own thread would
        # do both, and every publish would wake it. The lock is for writing alone: a callback may wait for a publisher.
        self._lock = threading.Lock()
        self._pipe = socket.socketpair() if background else None  # one end wakes who waits at the other
        for end in self._pipe or ():
            end.setblocking(False)
        self._thread: threading.Thread | None = None
        self._client = _Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv311)
        self._client.on_socket_register_write = lambda *_: None  # so that paho only queues: `_write` writes
        self._client.on_connect = self._accepted
        self._client.on_disconnect = self._lost

        def deliver(topic: str, payload: bytes, number: int | None) -> None:
            if on_delivery is not None:
                receipt = None if number is None else Receipt(self._number, number)
                self._call(on_delivery, topic, payload, receipt)
                return
            if on_message is not None:
                self._call(on_message, topic, payload)
            if number is not None:
                self._client.acknowledge([number])

        self._client.deliver = deliver
        if will is not None:
            self._client.will_set(*will, qos=1, retain=True)
        try:
            self._client.connect(host, port, KEEPALIVE)
        except (OSError, ValueError) as error:
            raise UserError(self._nobody(str(error))) from error
        self._wait_until_accepted()
        if background:
            self._thread = threading.Thread(target=self._run, name=client_id, daemon=True)
            self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the broker is there now. If not, what is published waits for it."""
        return self._connected.is_set()

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publishes at QoS 1. Does not wait."""
        self._last = self._client.publish(topic, payload, qos=1, retain=retain)
        self._leave()

    def send(self, messages: Iterable[Message]) -> None:
        """Publishes all of these at QoS 0, in their order and at once: many messages at the cost of one. What finds no
        connection, or is lost with one, stays lost: `on_connect` may send it again."""
        if self._connected.is_set():
            self._client.publish_all(messages)
            self._leave()

    def subscribe(self, filter: str) -> None:
        """Subscribes at QoS 1. Doing so again brings the retained messages again."""
        self._filters[filter] = None
        self._client.subscribe(filter, qos=1)
        self._leave()

    def unsubscribe(self, filter: str) -> None:
        self._filters.pop(filter, None)
        self._client.unsubscribe(filter)
        self._leave()

    def received(self, receipts: Iterable[Receipt | None]) -> None:
        """Tells the broker that these messages have been received, in whatever thread. Those of QoS 0 have no receipt,
        and those of a session that has ended come again."""
        numbers = [receipt.number for receipt in receipts if receipt is not None and receipt.session == self._number]
        if numbers:
            self._client.acknowledge(numbers)
            self._leave()

    def pump(self, timeout: float) -> None:
        """Sends and receives, waiting for at most so many seconds; reconnects when it is time to. Not for a session
        in the background."""
        if self._client.socket() is None:
            now = time.monotonic()
            if now < self._retry_at:
                self._closing.wait(min(timeout, self._retry_at - now))
                return
            self._retry_at, self._retry = now + self._retry, min(2 * self._retry, RETRY[1])
            try:
                self._client.reconnect()
            except OSError:
                return
        self._loop(timeout)

    def _loop(self, timeout: float) -> None:
        """Waits until there is something to read, or room to write what is left, and does so."""
        self._write()
        wire = self._client.wire
        waiting = select.poll()
        try:
            waiting.register(wire, select.POLLIN | (select.POLLOUT if wire.unsent else 0))
        except ValueError:  # it is closed
            return
        if self._pipe is not None:
            waiting.register(self._pipe[0], select.POLLIN)
        ready = [fd for fd, _ in waiting.poll(0 if wire.unread else 1000 * timeout)]
        if self._pipe is not None and self._pipe[0].fileno() in ready:
            self._pipe[0].recv(4096)
        if wire.fileno() in ready or wire.unread:
            self._client.receive()
        self._client.loop_misc()
        self._write()

    def _write(self) -> None:
        if self._client.want_write() or self._client.wire.unsent:
            with self._lock:
                self._client.loop_write()
                self._client.wire.flush()

    def _run(self) -> None:
        while not self._closing.is_set():
            self.pump(1.0)

    def _leave(self) -> None:
        """Sends what is queued, in the background: without, `pump` does, and while the listening thread calls back, or
        there is no connection, that thread will."""
        if self._pipe is None or threading.current_thread() is self._thread or not self._connected.is_set():
            return
        self._write()
        if self._client.wire.unsent:  # the socket is full: the reading thread writes the rest
            self._rouse()

    def _rouse(self) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # it is full, so that the thread will wake; or closed, as the session is
                self._pipe[1].send(b"!")

    def flush(self, timeout: float) -> bool:
        """Waits until all that was sent has left, and the broker has what was published last. False if that is not so
        in so many seconds."""
        end = time.monotonic() + timeout
        self._write()
        try:
            while self._client.wire.unsent or not (self._last is None or self._last.is_published()):
                left = end - time.monotonic()
                if left <= 0:
                    return False
                if not self._background:
                    self.pump(min(left, 0.1))
                elif self._client.wire.unsent or self._last is None:  # the listening thread writes it
                    self._closing.wait(min(left, 0.01))
                else:
                    self._last.wait_for_publish(left)
        except (RuntimeError, ValueError):  # it was published while there was no connection
            return False
        return True

    def close(self) -> None:
        """Says goodbye: the broker drops the will. Does not wait for what was published: flush does."""
        self._closing.set()
        inside = self._thread is threading.current_thread()
        if self._thread is not None and not inside:
            self._rouse()
            self._thread.join()  # first: it may be about to reconnect
        self._client.disconnect()
        if not inside:  # else it is written when this callback returns
            self._write()
        for end in self._pipe or ():
            end.close()

    def _wait_until_accepted(self) -> None:
        end = time.monotonic() + CONNECT_TIMEOUT
        while not self._known and self._refusal is None:  # it may be lost again by now
            left = end - time.monotonic()
            if left <= 0:
                self._refusal = self._nobody("something is there, and stays silent")
            else:
                self._loop(min(left, 0.05))
        if self._refusal is not None:
            self.close()
            raise UserError(self._refusal)

    def _nobody(self, reason: str) -> str:
        return (
            f"no MQTT broker answers at {self._where} ({reason}); start one with `tinyfleet server start`, or name "
            "another with --broker HOST:PORT"
        )

    def _call(self, callback: Callable[..., None], *about: Any) -> None:
        """In the background nobody is there to catch an error; paho would then handle the same message forever."""
        try:
            callback(*about)
        except Exception:
            if not self._background:
                raise
            log.exception("an error while a message of %s was handled: %.200r", self._client_id, about)

    # Called by paho.

    def _accepted(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._refusal = f"the MQTT broker at {self._where} refuses this session: {reason}"
            return
        self._known = True
        self._since = time.monotonic()
        self._connected.set()
        if self._on_connect is not None:
            self._filters.clear()
            self._call(self._on_connect)
            return
        for filter in list(self._filters):
            self._client.subscribe(filter, qos=1)

    def _lost(self, _client: mqtt.Client, _data: Any, _flags: Any, _reason: ReasonCode, _properties: Any) -> None:
        self._number += 1
        self._connected.clear()
        if not self._known and self._refusal is None:
            self._refusal = self._nobody("something else than a broker is there")
        if time.monotonic() - self._since > SHORT:
            self._retry_at, self._retry, self._short = 0.0, RETRY[0], 0
        elif not self._closing.is_set():
            self._short += 1
            if self._short == 3:
                log.warning(
                    "the broker at %s ends this session soon after it begins; is another one called %s? Trying on",
                    self._where,
                    self._client_id,
                )
