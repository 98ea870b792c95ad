"""A session with an MQTT 3.1.1 broker that reconnects by itself. The only module that uses paho."""

from __future__ import annotations

import logging
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.log_limit import LogLimit

KEEPALIVE = 30
"""Seconds of silence after which the client pings the broker. After 1.5 times that the broker publishes the will."""
CONNECT_TIMEOUT = 10.0
RETRY = (1, 10)
"""Seconds between attempts to reconnect: at first, and at most."""
SHORT = 5.0
"""Seconds: sessions that end sooner are suspicious, as two clients with one name end each other's session."""
READ = 65_536
"""The most bytes to read at a time."""
MAX_PACKET = 1 << 22
"""Bytes of a packet that is received, at most; the fleet's largest messages have 64 KiB."""
MAX_QUEUED = 10_000
"""Messages of `Session.publish` that wait at most; later ones are lost."""
MAX_UNSENT = 1 << 26
"""Bytes that may wait for a broker that reads slowly; beyond that `Session.send` drops messages."""
_WAIT = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)

log = logging.getLogger(__name__)


_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it asks for a client certificate; give --cert and --key",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "it asks for a client certificate; give --cert and --key",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority that signed the client certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "it does not know the authority that signed the client certificate",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "the client certificate is revoked; enrol again",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the client certificate has expired; enrol again",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the client certificate is not valid there",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "the client certificate is not valid there",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it speaks no TLS version that is still safe",
}
"""What a broker's TLS alert means for the user, by OpenSSL's names for them."""
_CREDENTIALS = "; name the user in the address (mqtts://USER@HOST:PORT) and give --password-file, or --cert and --key"
_REASONS = {
    0x84: "; it does not speak MQTT 3.1.1",
    0x85: "; it does not accept this client ID",
    0x86: _CREDENTIALS,
    0x87: _CREDENTIALS,
}
"""Advice by paho's reason code (it translates MQTT 3.1.1's return codes to MQTT 5's)."""


class Receipt(NamedTuple):
    """Identifies a received message, for `Session.received`: its number in one session."""

    session: int
    number: int


class Message(NamedTuple):
    """A message to publish."""

    topic: str
    payload: bytes
    retain: bool = False


class _Wire:
    """The socket that paho uses. paho reads byte by byte and writes message by message, each with a system call; this
    class reads all that has arrived, and collects what paho writes until it is flushed."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()  # one thread may write while another one, which reads, sees the end and closes
        self._read = b""
        self._at, self._end = 0, 0  # the part that paho may read; what comes before is done
        self._over = False
        self.error: OSError | None = None  # why it ended, if the broker did not just close it
        self.unsent = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    @property
    def unread(self) -> bool:
        """Whether a complete packet is left: an error in a callback can interrupt `packets`."""
        return _packet(self._read, self._end) is not None

    def packets(self) -> Iterator[tuple[int, bytes]]:
        """Read what has arrived. Yields, for each complete packet, the first byte of its fixed header and its content.

        While the caller holds a packet, `recv` returns that packet's bytes. If the connection has ended, the last item
        is (0, b""), and `recv` then returns the end of the stream.
        """
        self._at = self._end
        data = self._receive()
        self._read, self._end = self._read[self._end :] + data, 0
        while (bounds := _packet(self._read, self._end)) is not None:
            self._at, (body, self._end) = self._end, bounds
            yield self._read[self._at], self._read[body : self._end]
        self._at = self._end
        if (head := _header(self._read, self._end)) is not None and head[1] > MAX_PACKET:  # do not wait for the rest
            self._over, self.error = True, OSError(f"it sends a packet of {head[1]} bytes")
        if self._over:
            yield 0, b""

    def _receive(self) -> bytes:
        """What has arrived. TLS hands it over record by record, and keeps what it has decrypted from `poll`."""
        parts: list[bytes] = []
        with self._lock:  # a TLS connection bears one thread at a time
            try:
                while not self._over and sum(map(len, parts)) < READ:
                    parts.append(self._sock.recv(READ))
                    self._over = not parts[-1]
                    if not isinstance(self._sock, ssl.SSLSocket):
                        break
            except _WAIT:
                pass
            except OSError as error:
                self._over, self.error = True, error
        return b"".join(parts)

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
        """Send as much as the system accepts now. A lost connection shows when reading."""
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
        except _WAIT:
            pass
        except OSError:
            self.unsent.clear()


def _packet(data: bytes, first: int) -> tuple[int, int] | None:
    """The first and the last byte (exclusive) of the content of the packet at `first`; None if it is incomplete.

    See MQTT 3.1.1, section 2.2. A length of more than four bytes counts as a packet without content; paho rejects it.
    """
    if (head := _header(data, first)) is None:
        return None
    body, length = head
    return (body, body + length) if body + length <= len(data) else None


def _header(data: bytes, first: int) -> tuple[int, int] | None:
    """Where the content of the packet at `first` begins, and its length; None if its header is incomplete."""
    length = 0
    for at in range(first + 1, min(first + 6, len(data))):
        length |= (data[at] & 0x7F) << 7 * (at - first - 1)
        if at == first + 5:
            return at + 1, 0
        if data[at] < 0x80:
            return at + 1, length
    return None


class _Client(mqtt.Client):
    """paho's client on a _Wire. PUBLISH and PUBACK packets, nearly all of the traffic, are read and written here, many
    at a time; paho handles all others."""

    broker: BrokerAddress
    deliver: Callable[[str, bytes, int | None], None]
    """Called with each message: topic, payload, and its number if it has QoS 1."""

    def receive(self) -> None:
        """Handle what has arrived."""
        for head, content in self.wire.packets():
            if self.socket() is None:  # a callback has ended it
                return
            message = _read_publish(head, content)
            if message is None:
                self.loop_read()
            else:
                self.deliver(*message)

    def _create_socket(self) -> Any:
        context = self.broker.tls_context()  # each time: a renewed certificate counts from the next connection on
        sock = cast(socket.socket, super()._create_socket())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages, one after the other
        if context is not None:
            sock.settimeout(CONNECT_TIMEOUT)
            try:
                sock = context.wrap_socket(sock, server_hostname=self.broker.host)
            except OSError:
                sock.close()
                raise
        self.wire = _Wire(sock)
        return self.wire

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Acknowledge messages of QoS 1."""
        self._enqueue(struct.pack("!BBH", mqtt.PUBACK, 2, number) for number in numbers)

    def publish_all(self, messages: Iterable[Message]) -> None:
        """Publish at QoS 0."""
        self._enqueue(_publish_packet(topic.encode(), payload, retain) for topic, payload, retain in messages)

    def _enqueue(self, packets: Iterable[bytes]) -> None:
        """Queue packets as one that paho expects no answer to and reports to no callback."""
        self._packet_queue(mqtt.PUBACK, b"".join(packets), 0, 1)


def _read_publish(head: int, content: bytes) -> tuple[str, bytes, int | None] | None:
    """The topic, payload and, at QoS 1, number of a message; None if the packet is not a well-formed message.

    See MQTT 3.1.1, section 3.3.
    """
    qos = head >> 1 & 3
    at = 2 + int.from_bytes(content[:2], "big")
    if head & 0xF0 != mqtt.PUBLISH or qos > 1 or at + 2 * qos > len(content):
        return None
    topic = content[2:at].decode(errors="replace")
    return topic, content[at + 2 * qos :], int.from_bytes(content[at : at + 2], "big") if qos else None


def _publish_packet(topic: bytes, payload: bytes, retain: bool) -> bytes:
    """A PUBLISH packet at QoS 0: MQTT 3.1.1, section 3.3."""
    left, length = 2 + len(topic) + len(payload), bytearray()
    while left > 0x7F:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return b"".join((bytes([mqtt.PUBLISH | retain]), length, len(topic).to_bytes(2, "big"), topic, payload))


class Session:
    """Connects when it is created, and reconnects whenever the connection is lost, until it is closed.

    Parameters
    ----------
    broker
        Its address, and what the client shows it.
    client_id
        The client's name at the broker.
    on_message
        Called with the topic and payload of each message, which is acknowledged when it returns.
    on_delivery
        In place of `on_message`: called with topic, payload and receipt. The message is acknowledged when `received`
        gets the receipt.
    on_connect
        Called whenever the session is new, also the first time; it must subscribe to everything again. Without it, the
        session renews its subscriptions.
    on_lost
        Called whenever the session has ended without `close`.
    will
        Topic and payload that the broker publishes, retained, if the session breaks.
    background
        Whether a thread of the session listens and calls back. If a callback raises there, the error is logged and the
        message counts as handled. Otherwise `pump` does so in the caller's thread, and the error is the caller's.

    Raises
    ------
    UserError
        If no broker answers, or if it rejects the session.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        client_id: str,
        *,
        on_message: Callable[[str, bytes], None] | None = None,
        on_delivery: Callable[[str, bytes, Receipt | None], None] | None = None,
        on_connect: Callable[[], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        will: tuple[str, bytes] | None = None,
        background: bool = True,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._on_connect = on_connect
        self._on_lost = on_lost
        self._log_refusal = LogLimit(log.warning, 1)
        self._log_error = LogLimit(partial(log.error, exc_info=True), 5)
        self._background = background
        self._filters: dict[str, None] = {}
        self._last: mqtt.MQTTMessageInfo | None = None
        self._refusal: str | None = None
        self._known = False  # whether a broker has ever accepted
        self._since, self._short = 0.0, 0  # when it last did; sessions in a row that ended soon
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
        self._client.broker = broker
        self._client.max_queued_messages_set(MAX_QUEUED)
        if broker.username is not None or broker.password is not None:
            self._client.username_pw_set(broker.username or "", broker.password)

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
            self._client.connect(broker.host, broker.port, KEEPALIVE)
        except (OSError, ValueError) as error:
            raise UserError(self._no_connection(error)) from error
        self._wait_until_accepted()
        if background:
            self._thread = threading.Thread(target=self._run, name=client_id, daemon=True)
            self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether there is a connection now. Otherwise, what is published waits for one."""
        return self._connected.is_set()

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publish at QoS 1, without waiting for the acknowledgement. Without a connection, at most `MAX_QUEUED`
        messages wait for one."""
        self._last = self._client.publish(topic, payload, qos=1, retain=retain)
        self._leave()

    def send(self, messages: Iterable[Message]) -> None:
        """Publish messages at QoS 0, in their order, with one write.

        Without a connection, or with one that is too slow, they are dropped, and those that a connection loses are not
        repeated; `on_connect` may send them again.
        """
        if self._connected.is_set() and len(self._client.wire.unsent) < MAX_UNSENT:
            self._client.publish_all(messages)
            self._leave()

    def subscribe(self, filter: str) -> None:
        """Subscribe at QoS 1. The broker sends the retained messages, also if the filter is known already."""
        self._filters[filter] = None
        self._client.subscribe(filter, qos=1)
        self._leave()

    def unsubscribe(self, filter: str) -> None:
        """Unsubscribe from a filter."""
        self._filters.pop(filter, None)
        self._client.unsubscribe(filter)
        self._leave()

    def received(self, receipts: Iterable[Receipt | None]) -> None:
        """Acknowledge messages; any thread may.

        Parameters
        ----------
        receipts
            Those that `on_delivery` got. None, of a message with QoS 0, is ignored, and so is the receipt of an earlier
            session: the broker sends that message again.
        """
        numbers = [receipt.number for receipt in receipts if receipt is not None and receipt.session == self._number]
        if numbers:
            self._client.acknowledge(numbers)
            self._leave()

    def pump(self, timeout: float) -> None:
        """Send and receive, and reconnect when that is due. Only without `background`.

        Parameters
        ----------
        timeout
            Seconds to wait at most for something to receive.
        """
        if self._client.socket() is None:
            now = time.monotonic()
            if now < self._retry_at:
                self._closing.wait(min(timeout, self._retry_at - now))
                return
            self._retry_at, self._retry = now + self._retry, min(2 * self._retry, RETRY[1])
            try:
                self._client.reconnect()
            except (OSError, UserError) as error:  # UserError: of a certificate's file
                log.debug("no connection to %s: %s", self._broker.url, error)
                return
        self._loop(timeout)

    def _loop(self, timeout: float) -> None:
        """Wait until the socket can be read, or written if something is left to send; then read and write."""
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
        """Send what is queued, if the session runs in the background.

        Otherwise `pump` sends it; so does the listening thread after a callback or once there is a connection.
        """
        if self._pipe is None or threading.current_thread() is self._thread or not self._connected.is_set():
            return
        self._write()
        if self._client.wire.unsent:  # the socket is full: the reading thread writes the rest
            self._rouse()

    def _rouse(self) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # full, so the thread will wake; or closed with the session
                self._pipe[1].send(b"!")

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sent and the broker has acknowledged the last message that was published.

        Parameters
        ----------
        timeout
            Seconds to wait at most.

        Returns
        -------
        bool
            False if that took longer, or if there is no connection.
        """
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
        """Disconnect, so that the broker drops the will. What is still queued may be lost: call `flush` first."""
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
                self._refusal = self._no_broker("it accepts connections, but sends nothing")
            else:
                self._loop(min(left, 0.05))
        if self._refusal is not None:
            self.close()
            raise UserError(self._refusal)

    def _no_broker(self, reason: str) -> str:
        return (
            f"no MQTT broker answers at {self._broker.url} ({reason}); start one with `tinyfleet server start`, or "
            "name another with --broker mqtts://HOST:PORT"
        )

    def _no_connection(self, error: Exception) -> str:
        """Why there is no connection, and what to do."""
        where = self._broker.url
        if isinstance(error, ssl.SSLCertVerificationError):
            ca = "the system's authorities" if self._broker.ca is None else str(self._broker.ca)
            return (
                f"the broker at {where} shows a certificate that cannot be trusted: {error.verify_message}; checked "
                f"against {ca} (--ca names another authority)"
            )
        if isinstance(error, ssl.SSLError) and error.reason is not None:
            if (advice := _ALERTS.get(error.reason)) is not None:
                return f"the broker at {where} refuses this client: {advice}"
            return f"TLS with the broker at {where} fails: {error.reason.lower().replace('_', ' ')}"
        if isinstance(error, (ConnectionResetError, ssl.SSLError)):
            if self._broker.tls:
                return f"the program at {where} ends the connection when TLS begins: it is no broker with TLS"
            return f"the program at {where} ends the connection; if it is a broker with TLS, write mqtts://"
        return self._no_broker(error.strerror or str(error) if isinstance(error, OSError) else str(error))

    def _call(self, callback: Callable[..., None], *about: Any) -> None:
        """Call back. In the background nothing would catch an error, and paho would handle the same message forever."""
        try:
            callback(*about)
        except Exception:
            if not self._background:
                raise
            topic = printable(str(about[0]), 200) if about else "a new session"
            self._log_error("callback", f"an error while handling a message of {self._client_id}: {topic}")

    def _accepted(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            advice = _REASONS.get(int(reason.value), "")
            self._refusal = f"the MQTT broker at {self._broker.url} refuses this session: {reason}{advice}"
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
        lasted = time.monotonic() - self._since if self._connected.is_set() else 0.0  # 0: it was not accepted
        self._connected.clear()
        if self._known and self._on_lost is not None and not self._closing.is_set():
            self._call(self._on_lost)
        error = self._client.wire.error
        if self._known and isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
            self._log_refusal("refusal", self._no_connection(error))
        if not self._known and self._refusal is None:
            self._refusal = self._no_broker("another program is there") if error is None else self._no_connection(error)
        if lasted > SHORT:
            self._retry_at, self._retry, self._short = 0.0, RETRY[0], 0
        elif lasted and not self._closing.is_set():
            self._short += 1
            if self._short == 3:
                log.warning(
                    "the broker at %s keeps ending this session; does another client use the name %s? It keeps trying",
                    self._broker.url,
                    self._client_id,
                )
