"""A TCP proxy between clients and a broker that does to links what networks do."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Literal

Fault = Literal["none", "stall", "cut", "delay", "hold", "refuse", "double"]
"""What happens to a link: nothing; what is sent waits; it ends in the middle of a packet; everything comes late; it
stays open, but nothing comes through any more and no end is told; new connections end at once; messages come twice
(only where packets are read)."""

_KINDS = {
    1: "CONNECT", 2: "CONNACK", 3: "PUBLISH", 4: "PUBACK", 8: "SUBSCRIBE", 9: "SUBACK", 10: "UNSUBSCRIBE",
    11: "UNSUBACK", 12: "PINGREQ", 13: "PINGRESP", 14: "DISCONNECT",
}  # fmt: skip


class Proxy:
    """Listens on a free port of this machine until it is closed. Use it in a `with`.

    Parameters
    ----------
    port
        Where the broker listens on this machine.
    seed
        Of what is random: where a link is cut, how late data comes.
    on_packet
        Called with "before" or "after" and the name of each MQTT packet, around its forwarding: only for links without
        TLS.

    Attributes
    ----------
    faults : int
        How often something was read from a link with a fault, or a new link did not come to be.
    """

    def __init__(self, port: int, *, seed: int = 0, on_packet: Callable[[str, str], None] | None = None) -> None:
        self._to = port
        self._random = random.Random(seed)
        self._on_packet = on_packet
        self._fault: Fault = "none"
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=600)
        self.port = int(self._listener.getsockname()[1])
        self.faults = 0
        self._closing = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the proxy and all links."""
        self._closing.set()
        self._listener.close()
        self.cut()

    def set(self, fault: Fault) -> None:
        """From now on, on all links."""
        self._fault = fault

    def cut(self) -> None:
        """End all links at once."""
        with self._lock:
            links, self._links = self._links, []
        for pair in links:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._fault == "refuse":
                self.faults += 1
                client.close()
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self._fault == "hold":
                self.faults += 1
                self._closing.wait()
                return
            try:
                broker = socket.create_connection(("127.0.0.1", self._to), 5)
            except OSError:
                return
            with broker:
                for end in (client, broker):
                    end.settimeout(None)
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._links.append((client, broker))
                self._forward(client, broker)

    def _forward(self, client: socket.socket, broker: socket.socket) -> None:
        other = {client: broker, broker: client}
        left = {client: b"", broker: b""}
        copies: dict[socket.socket, list[bytes]] = {client: [], broker: []}
        with selectors.DefaultSelector() as waiting:
            for end in other:
                waiting.register(end, selectors.EVENT_READ)
            while True:
                ready = waiting.select(0.1)
                if ready and self._fault != "none":
                    self.faults += 1
                if self._fault == "hold":  # it never wakes up again, whatever comes later
                    self._closing.wait()
                    return
                while self._fault == "stall" and not self._closing.wait(0.02):
                    pass
                for key, _ in ready:
                    end = client if key.fileobj is client else broker
                    data = end.recv(65536)
                    if not data:
                        return
                    if self._fault == "delay":
                        self._closing.wait(self._random.random() * 0.05)
                    if self._fault == "cut" and self._random.random() < 0.3:
                        other[end].sendall(data[: self._random.randrange(len(data))])
                        return
                    left[end] = self._packets(left[end] + data, other[end], copies[end], copies[other[end]])

    def _packets(self, data: bytes, to: socket.socket, got: list[bytes], sent: list[bytes]) -> bytes:
        """Forward whole packets, and return what is left of the last one.

        `got` and `sent` are the numbers of messages that the sender of these packets, and the other end, got twice. Who
        sent a message once expects one acknowledgement: of a second one mosquitto makes room for a message more, which
        it then sends before those that wait.
        """
        if self._on_packet is None:
            to.sendall(data)
            return b""
        while (size := _size(data)) is not None and size <= len(data):
            kind = _KINDS.get(data[0] >> 4, "other")
            self._on_packet("before", kind)
            packet = data[:size]
            if kind == "PUBLISH" and self._fault == "double":
                to.sendall(packet * 2)
                if packet[0] & 6:
                    topic = 2 + next(at for at, byte in enumerate(packet[1:5]) if byte < 0x80)
                    number = topic + 2 + int.from_bytes(packet[topic : topic + 2], "big")
                    sent.append(packet[number : number + 2])
            elif kind == "PUBACK" and packet[2:4] in got:
                got.remove(packet[2:4])
            else:
                to.sendall(packet)
            self._on_packet("after", kind)
            data = data[size:]
        return data


def _size(data: bytes) -> int | None:
    """The size of the MQTT packet that begins here, if it is known by now."""
    length = 0
    for at, byte in enumerate(data[1:5]):
        length |= (byte & 0x7F) << 7 * at
        if byte < 0x80:
            return 2 + at + length
    return None
