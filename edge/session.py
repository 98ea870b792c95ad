"""One session with an MQTT 3.1.1 broker, kept up: the only place that knows paho."""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from edge.errors import UserError

KEEPALIVE = 30
"""Seconds of silence after which each side asks whether the other is still there; 1.5 times that, and the broker
publishes the will."""
CONNECT_TIMEOUT = 10.0
RETRY = (1, 10)
"""Seconds between attempts to reconnect: at first, and at most."""
SHORT = 5.0
"""Seconds: a session that ends sooner is suspicious. Two clients of one name end each other's."""

PIECE = 65_536
"""Bytes that are read from the broker at once, at most."""

log = logging.getLogger(__name__)


class Receipt(NamedTuple):
    """What `Session.received` tells the broker of a message by: its number in one session."""

    session: int
    number: int


class _Buffered:
    """A socket that is read in large pieces: paho reads a message in three, each a call of the system, and each a time
    when other threads of Python go first. `pending` is what paho asks sockets of TLS for: it does not wait while there
    is some."""

    def __init__(self, socket: socket.socket) -> None:
        self._socket = socket
        self._piece = b""
        self._taken = 0

    def pending(self) -> int:
        return len(self._piece) - self._taken

    def recv(self, size: int, /) -> bytes:
        if not self._piece:
            self._piece = self._socket.recv(PIECE)
        part = self._piece[self._taken : self._taken + size]
        self._taken += len(part)
        if self._taken == len(self._piece):  # nobody keeps it while nothing comes
            self._piece, self._taken = b"", 0
        return part

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


class _Client(mqtt.Client):
    """paho's client, made for many small messages."""

    def _create_socket(self) -> Any:
        return _Buffered(cast("socket.socket", super()._create_socket()))

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        result = super().loop_read(max_packets)
        while result == MQTTErrorCode.MQTT_ERR_SUCCESS:
            sock = self.socket()
            if sock is None or not cast("_Buffered", sock).pending():
                break
            result = super().loop_read(max_packets)
        return result

    def acknowledge(self, numbers: Sequence[int]) -> None:
        """Says of messages of QoS 1 that they have been received: all in one packet as far as paho is concerned, for
        each by itself wakes its thread and takes a call of the system."""
        packet = b"".join(struct.pack("!BBH", mqtt.PUBACK, 2, number) for number in numbers)
        self._packet_queue(mqtt.PUBACK, packet, 0, 1)


class Session:
    """Connects on construction, and again whenever the broker is lost, until closed.

    on_message(topic, payload) gets every message, and the broker is told so when it returns. With on_delivery(topic,
    payload, receipt) in its place, the broker is told when `received` is given the receipt: once the message is safe.
    on_connect() is called whenever the session is new, the first time too: nothing is subscribed to then. Without
    on_connect, what was subscribed to is subscribed to again.
    will: (topic, payload) that the broker publishes, retained, should this session break.

    With `background`, paho's thread does the talking and calls back; without, `pump` does, in the caller's thread.
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
        self._client = _Client(
            CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv311, manual_ack=on_delivery is not None
        )
        self._client.reconnect_delay_set(*RETRY)
        self._client.on_socket_open = self._opened
        self._client.on_connect = self._accepted
        self._client.on_disconnect = self._lost
        if on_delivery is not None:
            self._client.on_message = lambda _client, _data, message: on_delivery(
                message.topic, bytes(message.payload), Receipt(self._number, message.mid) if message.qos else None
            )
        elif on_message is not None:
            self._client.on_message = lambda _client, _data, message: on_message(message.topic, bytes(message.payload))
        if will is not None:
            self._client.will_set(*will, qos=1, retain=True)
        try:
            self._client.connect(host, port, KEEPALIVE)
        except (OSError, ValueError) as error:
            raise UserError(self._nobody(str(error))) from error
        if background:
            self._client.loop_start()
        self._wait_until_accepted()

    @property
    def connected(self) -> bool:
        """Whether the broker is there now. If not, what is published waits for it."""
        return self._connected.is_set()

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publishes at QoS 1. Does not wait."""
        self._last = self._client.publish(topic, payload, qos=1, retain=retain)

    def subscribe(self, filter: str) -> None:
        """Subscribes at QoS 1. Doing so again brings the retained messages again."""
        self._filters[filter] = None
        self._client.subscribe(filter, qos=1)

    def unsubscribe(self, filter: str) -> None:
        self._filters.pop(filter, None)
        self._client.unsubscribe(filter)

    def received(self, receipts: Iterable[Receipt | None]) -> None:
        """Tells the broker that these messages have been received, in whatever thread. Those of QoS 0 have no receipt,
        and those of a session that has ended come again."""
        numbers = [receipt.number for receipt in receipts if receipt is not None and receipt.session == self._number]
        if numbers:
            self._client.acknowledge(numbers)

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
        self._client.loop(timeout)

    def flush(self, timeout: float) -> bool:
        """Waits until the broker has what was published last. False if it has not in so many seconds."""
        end = time.monotonic() + timeout
        while self._last is not None:
            try:
                if self._last.is_published():
                    return True
                left = end - time.monotonic()
                if left <= 0:
                    return False
                if self._background:
                    self._last.wait_for_publish(left)
                else:
                    self.pump(min(left, 0.1))
            except (RuntimeError, ValueError):  # it was published while there was no connection
                return False
        return True

    def close(self) -> None:
        """Says goodbye: the broker drops the will. Does not wait for what was published: flush does."""
        self._closing.set()
        self._client.disconnect()
        if self._background:
            self._client.loop_stop()
        else:
            self._client.loop(0)

    def _wait_until_accepted(self) -> None:
        end = time.monotonic() + CONNECT_TIMEOUT
        while not self._connected.is_set() and self._refusal is None:
            left = end - time.monotonic()
            if left <= 0:
                self._refusal = self._nobody("something is there, and stays silent")
            elif self._background:
                self._connected.wait(min(left, 0.05))
            else:
                self._client.loop(min(left, 0.05))
        if self._refusal is not None:
            self.close()
            raise UserError(self._refusal)

    def _nobody(self, reason: str) -> str:
        return (
            f"no MQTT broker answers at {self._where} ({reason}); start one with `tinyfleet server`, or name another "
            "with --broker HOST:PORT"
        )

    # Called by paho.

    def _opened(self, _client: mqtt.Client, _data: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages, one after the other

    def _accepted(self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._refusal = f"the MQTT broker at {self._where} refuses this session: {reason}"
            return
        self._known = True
        self._since = time.monotonic()
        self._connected.set()
        if self._on_connect is not None:
            self._filters.clear()
            self._on_connect()
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
