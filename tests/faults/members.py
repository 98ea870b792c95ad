"""Members of a fleet in the test's own process: a board on a serial line, and a device whose every word is known."""

from __future__ import annotations

import contextlib
import socket
import threading

from ontology_fixtures import description, payload, status

from tinyfleet.edge import tasks
from tinyfleet.edge.device.node import Node, Publish, Subscribe, Unsubscribe
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description
from tinyfleet.edge.versions import ENGINE_VERSION
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.keys import Keys
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics

TOPICS = Topics("home")
TASK = tasks.load("sine")
PROBE = "probe"
LIMIT = 60.0
"""Seconds until everything must be well again."""


class Board:
    """A board on a serial line, which is a TCP connection: the C node behind frames."""

    def __init__(self, name: str) -> None:
        data, program = TASK.client(3, 4), TASK.program
        arena = max(65_536, program.arena_bytes)
        td = thing_description("home", name, VIRTUAL, "mote", ENGINE_VERSION, arena, program.model_id, 65_536)
        self.name = name

        def make(keys: Keys | None) -> Node:
            stream = DatasetStream(data)
            return Node("home", name, td, program, stream, arena_bytes=arena, model_slot_bytes=65_536, keys=keys)

        self._make = make
        self._node = make(None)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ending = False
        self.port = f"socket://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def close(self) -> None:
        """Unplug it."""
        self._ending = True
        self._listener.close()

    def _run(self) -> None:
        while not self._ending:
            with contextlib.suppress(OSError):
                line, _ = self._listener.accept()
                with line:
                    self._serve(line)

    def _serve(self, line: socket.socket) -> None:
        reader = serial_frames.FrameReader()
        line.settimeout(0.01)
        while not self._ending:
            data = b""
            with contextlib.suppress(TimeoutError):
                data = line.recv(65536)
                if not data:
                    return
            for frame in reader.feed(data):
                self._receive(frame, line)
            for _ in range(64):
                self._node.step()
            for out in self._node.poll():
                self._send(line, out)

    def _receive(self, frame: serial_frames.Frame, line: socket.socket) -> None:
        if frame.kind == serial_frames.HELLO:
            self._say_hello(line)
        elif frame.kind == serial_frames.KEYS:
            command, current, next, root = (frame.payload[at : at + 32] for at in range(0, 128, 32))
            version = int.from_bytes(frame.payload[128:132], "little")
            self._node = self._make(Keys(command, current, next, root, version))
            self._say_hello(line)
        elif frame.kind == serial_frames.CONNECTED:
            self._node.connected()
        elif frame.kind == serial_frames.MESSAGE:
            self._node.receive(frame.topic, frame.payload)

    def _say_hello(self, line: socket.socket) -> None:
        will = self._node.will()
        self._put(line, serial_frames.HELLO, will.topic, will.payload)

    def _send(self, line: socket.socket, out: object) -> None:
        match out:
            case Publish(topic, content, retain):
                kind = serial_frames.PUBLISH_RETAINED if retain else serial_frames.PUBLISH
                self._put(line, kind, topic, content)
            case Subscribe(filter):
                self._put(line, serial_frames.SUBSCRIBE, filter)
            case Unsubscribe(filter):
                self._put(line, serial_frames.UNSUBSCRIBE, filter)

    def _put(self, line: socket.socket, kind: int, topic: str, content: bytes = b"") -> None:
        line.settimeout(None)
        line.sendall(serial_frames.encode(serial_frames.Frame(kind, topic, content)))
        line.settimeout(0.01)


class Probe:
    """A device whose every word is known: it announces itself in each new session, as devices do."""

    def __init__(self, broker: BrokerAddress) -> None:
        self.samples, self.version, self.online = 0, 0, True
        self._session = Session(broker, PROBE, on_connect=self._announce)
        self._announce()

    def _announce(self) -> None:
        if hasattr(self, "_session"):
            self._session.publish(TOPICS.td(PROBE), self._description(), retain=True)
            self._session.publish(TOPICS.status(PROBE), self._status(), retain=True)

    def _description(self) -> bytes:
        return payload(description(PROBE, title=f"Probe {self.version}"))

    def _status(self) -> bytes:
        return status(self.online, samples=self.samples)

    def learn(self) -> None:
        """Report that it has learned from more samples."""
        self.samples += 1
        self._session.publish(TOPICS.status(PROBE), self._status(), retain=True)

    def change(self) -> None:
        """Describe itself in other words."""
        self.version += 1
        self._session.publish(TOPICS.td(PROBE), self._description(), retain=True)

    def set_online(self, online: bool) -> None:
        """Leave the fleet, or come back."""
        self.online = online
        self._session.publish(TOPICS.status(PROBE), self._status(), retain=True)

    def flush(self) -> bool:
        """Wait for the broker's acknowledgement."""
        return self._session.flush(LIMIT)

    def close(self) -> None:
        """End the session."""
        self._session.close()
