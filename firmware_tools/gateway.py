"""Connects a board on a serial line to the fleet's broker: COBS frames on one side, one MQTT session on the other.

The board sends its name and its last will; the gateway opens a session with that will, and from then on forwards
messages both ways (edge/mote/include/mote_frame.h describes the greeting). A full queue drops messages, and so does a
damaged frame: the wire's protocol asks again. The gateway itself repeats only the greeting, as boards need no clock.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import serial

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.broker_check import NameTaken, device_client_id, release_name
from tinyfleet.edge.wire.chunks import MAX_CHUNKS
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.log_limit import LogLimit
from tinyfleet.edge.wire.messages import decode_status
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics

#: Messages that wait for the line: the chunks of the largest program, and what else may arrive meanwhile.
QUEUE_SIZE = 2 * MAX_CHUNKS
#: Seconds between two greetings of a board that does not answer, or two attempts to open a line.
RETRY_SECONDS = 1.0
#: Seconds after which a user is told that no board answers.
SILENT_SECONDS = 5.0
#: Seconds until a board is tried again whose name another program uses: each attempt interrupts that one.
TAKEN_SECONDS = 60.0
#: Bytes written to the line at a time.
BLOCK = 1024
#: Frames that are taken from a board in a second; the rest waits on the line. A line of 1 Mbit/s carries fewer; a
#: program at the other end of a socket could send more than the broker should be given.
MAX_RATE = 5_000

_PUBLISHES = {serial_frames.PUBLISH, serial_frames.PUBLISH_RETAINED}
_KINDS = {*_PUBLISHES, serial_frames.SUBSCRIBE, serial_frames.UNSUBSCRIBE}
_NAME = "[A-Za-z0-9._-]{1,32}"
_WILL = re.compile(rf"tinyfleet/({_NAME})/devices/({_NAME})/status")
_NOTHING = re.compile(r"(?!)")


class SerialDisconnected(Exception):
    """The serial line is gone, for now."""


@dataclass
class GatewayCounters:
    """Messages since the start.

    Attributes
    ----------
    up, down
        Messages from the board, and to it.
    damaged
        Frames that did not decode.
    rejected
        Frames that a board may not send, such as one to another device's topic.
    dropped
        Messages for which the queue to the line, or the connection to the broker, had no place.
    """

    up: int = 0
    down: int = 0
    damaged: int = 0
    rejected: int = 0
    dropped: int = 0


class Gateway:
    """One serial line, the board on it, and its MQTT session.

    Parameters
    ----------
    port
        A device such as /dev/ttyUSB0, or socket://HOST:PORT of an emulator.
    find_broker
        Called with the names of a fleet and a device; returns the broker, and what the device shows it.
    baud
        Bits per second of the serial line.
    report
        Called with a line of text whenever something happens that a user may want to know.
    """

    def __init__(
        self,
        port: str,
        find_broker: Callable[[str, str], BrokerAddress],
        *,
        baud: int = 115200,
        report: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.port = port
        self._find_broker = find_broker
        self.baud = baud
        self.counters = GatewayCounters()
        #: Set while the board is part of the fleet and has announced itself.
        self.joined = threading.Event()
        #: The board's device ID, once it has sent it.
        self.device = ""
        self._fleet = ""
        self._not_before = 0.0  # when the board may join again
        self._report = partial(LogLimit(report, 5), "gateway")
        self._session: Session | None = None
        self._was_joined = False
        self._greeted = 0.0  # when
        self._reported = False  # that the board is part of the fleet
        self._new = threading.Event()  # the broker has a new session, to which the board must announce itself
        self._will: tuple[str, bytes] | None = None
        self._gave_keys = False  # to the board that is on the line now
        self._own: set[str] = set()  # topics that the board may publish to
        self._heard = _NOTHING  # filters that it may listen to
        self._announcement: set[str] = set()  # the topics of what a board sends when its session is new
        self._awaited: set[str] = set()  # those that are still missing
        self._queue: deque[bytes] = deque()
        # The session's thread wakes the line's through this pair.
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)

    def run(self, stop: threading.Event) -> None:
        """Forward messages until `stop` is set. A line that is lost is opened again, and so is the session.

        Raises
        ------
        UserError
            If the line cannot be opened, or the broker cannot be reached, at the first attempt.
        """
        line = self._open()
        while True:
            try:
                self._serve(line, stop)
            except SerialDisconnected as lost:
                self._report(f"{self.port}: {lost}; waiting for it to come back")
            finally:
                line.close()
                self._leave()
            while not stop.wait(RETRY_SECONDS):
                with contextlib.suppress(UserError):
                    line = self._open()
                    break
            if stop.is_set():
                return

    def _open(self) -> serial.SerialBase:
        try:
            # Nothing blocks: reads and writes do what is possible at once, and select says when something is.
            return serial.serial_for_url(self.port, baudrate=self.baud, timeout=0, write_timeout=0, exclusive=True)
        except (serial.SerialException, ValueError) as error:
            raise UserError(
                f"cannot open the serial line {self.port} ({error}); check its name, that the board is connected, and "
                "that no other program uses it"
            ) from error

    def _serve(self, line: serial.SerialBase, stop: threading.Event) -> None:
        """Until `stop`, or SerialDisconnected."""
        reader = serial_frames.FrameReader()
        pending = b""
        second, frames = 0, 0
        self._greeted = -RETRY_SECONDS
        self._gave_keys = False
        silent_since: float | None = time.monotonic()
        while not stop.is_set():
            self._greet_if_due()
            if silent_since is not None and time.monotonic() - silent_since >= SILENT_SECONDS:
                self._report(f"{self.port}: no board answers; does it run a node's firmware, at {self.baud} baud?")
                silent_since = None
            if not pending and self._queue:
                pending = self._queue.popleft()
            if int(time.monotonic()) != second:
                second, frames = int(time.monotonic()), 0
            data, pending = self._exchange(line, pending, frames < MAX_RATE)
            for frame in reader.feed(data):
                silent_since = None
                frames += 1
                self._from_board(frame)
            self.counters.damaged = reader.dropped

    def _exchange(self, line: serial.SerialBase, pending: bytes, read: bool) -> tuple[bytes, bytes]:
        """Waits until something can be written or, with `read`, read; returns the bytes read, and those still to be
        written."""
        here, woken = line.fileno(), self._woken.fileno()
        try:
            readers = [here, woken] if read else [woken]
            readable, writable, _ = select.select(readers, [here] if pending else [], [], 0.2)
            data = line.read(65536) if here in readable else b""
            if writable:
                pending = pending[line.write(pending[:BLOCK]) or 0 :]
        except (serial.SerialException, OSError) as error:
            raise SerialDisconnected("the line is lost") from error
        if woken in readable:
            self._woken.recv(4096)
        return data, pending

    def _greet_if_due(self) -> None:
        """Greets a board that has not joined, and again one whose session is new."""
        if self._new.is_set():
            self._new.clear()
            self.joined.clear()
            self._awaited = set(self._announcement)
            self._greeted = -RETRY_SECONDS
        if not self.joined.is_set() and time.monotonic() - self._greeted >= RETRY_SECONDS:
            self._send(serial_frames.HELLO if self._session is None else serial_frames.CONNECTED)
            self._greeted = time.monotonic()

    # From the board; in the line's thread.

    def _from_board(self, frame: serial_frames.Frame) -> None:
        if frame.kind == serial_frames.HELLO:
            self._join(frame.topic, frame.payload)
            return
        session = self._session
        if session is None:
            self.counters.rejected += 1  # from a board that believes it is connected; it is greeted anyway
            return
        allowed = frame.topic in self._own if frame.kind in _PUBLISHES else self._heard.fullmatch(frame.topic)
        if frame.kind not in _KINDS or not allowed:
            self.counters.rejected += 1
            return
        if not session.connected:
            self.counters.dropped += 1  # the board sends it again when the session is new
            return
        if frame.kind == serial_frames.SUBSCRIBE:
            session.subscribe(frame.topic)
        elif frame.kind == serial_frames.UNSUBSCRIBE:
            session.unsubscribe(frame.topic)
        else:
            session.publish(frame.topic, frame.payload, retain=frame.kind == serial_frames.PUBLISH_RETAINED)
            self.counters.up += 1
        self._awaited.discard(frame.topic)
        if not self._awaited and not self.joined.is_set():
            self.joined.set()
            if not self._reported:
                self._report(f"{self.port}: {self.device} is part of the fleet")
                self._reported = True

    def _join(self, topic: str, will: bytes) -> None:
        """Opens the session of the board that has sent this will."""
        found = _WILL.fullmatch(topic)
        if not found:
            self.counters.rejected += 1
            return
        if self._session is not None and self._will == (topic, will):
            self._new.set()  # it has restarted, or received the greeting twice: the session is still valid
            return
        if time.monotonic() < self._not_before:
            return
        fleet, device = found.groups()
        self._end_session()
        try:
            broker = self._find_broker(fleet, device)
            if self._gives_keys(broker, will):
                return
            self._connect(fleet, device, broker, (topic, will))
        except UserError as error:
            if not self._was_joined:
                raise
            self._report(f"{self.port}: {error}")
            if isinstance(error, NameTaken):
                self._not_before = time.monotonic() + TAKEN_SECONDS
            return
        self._was_joined = True

    def _connect(self, fleet: str, device: str, broker: BrokerAddress, will: tuple[str, bytes]) -> None:
        topics = Topics(fleet)
        self._fleet, self.device = fleet, device
        root = re.escape(f"tinyfleet/{fleet}")
        command = re.escape(topics.command(device))
        self._heard = re.compile(
            rf"{command}|{root}/(time|groups/{_NAME}/command|runs/[0-9]+/[0-9]+/\+|models/[0-9a-f]{{16}}/\+)"
        )
        self._own = {topics.td(device), topics.status(device), topics.reply(device)}
        self._announcement = {topics.td(device), topics.status(device), topics.command(device)}
        self._will = will
        self._session = Session(
            broker,
            device_client_id(fleet, device),
            on_message=self._from_broker,
            on_connect=self._session_is_new,
            will=will,
        )

    def _gives_keys(self, broker: BrokerAddress, will: bytes) -> bool:
        """Tell a board whom to obey, unless it has been told: it says HELLO again then. It is greeted until it does."""
        with contextlib.suppress(ProtocolError):
            if decode_status(will).keys == 0:  # it has started again
                self._gave_keys = False
        if broker.keys is None or self._gave_keys:
            return False
        self._gave_keys = True
        self._send(serial_frames.KEYS, payload=serial_frames.keys_payload(broker.keys))
        return True

    def _end_session(self) -> None:
        session, self._session = self._session, None
        self._reported = False
        self.joined.clear()
        if session is not None:
            session.close()

    def _leave(self) -> None:
        """The board is gone: publishes its will."""
        if self._session is not None and self._will is not None and self._session.connected:
            self._session.publish(*self._will, retain=True)
            release_name(self._session, self._fleet, self.device)
            self._session.flush(2.0)
        self._end_session()
        self._queue.clear()

    # From the broker; in the session's thread.

    def _session_is_new(self) -> None:
        self._new.set()
        self._rouse()

    def _from_broker(self, topic: str, payload: bytes) -> None:
        self.counters.down += 1
        self._send(serial_frames.MESSAGE, topic, payload)

    # To the board.

    def _send(self, kind: int, topic: str = "", payload: bytes = b"") -> None:
        """Queues a frame; any thread."""
        if len(self._queue) >= QUEUE_SIZE:
            self.counters.dropped += 1
            return
        self._queue.append(serial_frames.encode(serial_frames.Frame(kind, topic, payload)))
        self._rouse()

    def _rouse(self) -> None:
        """Wakes the line's thread; any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it is awake already
            self._wake.send(b"\0")
