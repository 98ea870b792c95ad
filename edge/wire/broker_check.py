"""Finds out at the start what a broker refuses or cannot do, before a fleet waits for messages that never come.

A broker acknowledges also what it denies: by MQTT 3.1.1 it cannot say no. So a client publishes a message and sees it
come back, on topics that it may both write and read.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics

LARGEST = 65_536
"""Bytes of the largest message: a description. A reply has 8 KiB at most."""
TIMEOUT = 5.0
"""Seconds that a message may take to come back."""
TAKEOVER = 3.0
"""Seconds in which a running device whose session was ended has opened it again."""
OPERATOR_TOPICS = ("devices/{}/td", "devices/{}/status", "devices/{}/reply", "devices/{}/command", "runs/{}/0/0",
                   "models/{}/0", "drivers/{}")  # fmt: skip
"""What the server and operators use, of no device, run or model."""


class NameTaken(UserError):
    """Another program runs as this device."""


def device_client_id(fleet: str, device: str) -> str:
    """A device's name at the broker."""
    return f"tinyfleet-{fleet}-{device}"


def check_operator(broker: BrokerAddress, fleet: str, *, timeout: float = TIMEOUT) -> None:
    """Check that an operator may use the fleet's topics, and that the broker retains messages.

    Parameters
    ----------
    broker
        The broker.
    fleet
        The fleet's name.
    timeout
        Seconds that a message may take to come back.

    Raises
    ------
    UserError
        If no broker answers, or it refuses or cannot do something.
    """
    root, name = _topics(fleet).root, f"~{secrets.token_hex(8)}"  # no name of a device, so that nobody takes it for one
    topics = [f"{root}/{topic.format(name)}" for topic in OPERATOR_TOPICS]
    _Check(broker, f"tinyfleet-check-{name[1:]}", topics, f"{root}/#", timeout).run()


def check_device(broker: BrokerAddress, fleet: str, device: str, *, timeout: float = TIMEOUT) -> None:
    """Check that a device can use the broker, and that no other program runs under its name.

    A device cannot write what it only reads, nor the reverse, so it tries its topic `echo` alone. Until the device
    ends, `release_name`, the broker keeps there that it runs: that tells the next one of its name.

    Parameters
    ----------
    broker
        The broker, and what the device shows it.
    fleet, device
        Names of the fleet and the device.
    timeout
        Seconds that a message may take to come back.

    Raises
    ------
    UserError
        If no broker answers, or it refuses or cannot do something.
    NameTaken
        If the device runs already.
    """
    try:
        topic = _topics(fleet).echo(device)
    except ProtocolError as error:
        raise UserError(str(error)) from None
    _Check(broker, device_client_id(fleet, device), [topic], topic, timeout).run(owner=device)


def _topics(fleet: str) -> Topics:
    try:
        return Topics(fleet)
    except ProtocolError as error:
        raise UserError(str(error)) from None


def release_name(session: Session, fleet: str, device: str) -> None:
    """Say at the broker that the device has ended."""
    session.publish(Topics(fleet).echo(device), b"", retain=True)


class _Check:
    def __init__(
        self, broker: BrokerAddress, client_id: str, topics: Sequence[str], permission: str, timeout: float
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._topics = topics
        self._permission = permission  # the filter that is enough for the broker to allow
        self._timeout = timeout
        self._mark = secrets.token_bytes(16)
        self._heard: set[tuple[str, bytes]] = set()

    def run(self, owner: str | None = None) -> None:
        """Raises UserError if something is wrong. `owner`: the device that keeps the mark on its topic from then on."""
        probe = self._mark.ljust(LARGEST, b"\0")
        session = self._open()
        try:
            if owner is not None and self._is_in_use(session):
                raise NameTaken(
                    f"another program runs as {owner}, and the broker lets a name in once only; stop the other one, "
                    "or give this one a name (and an identity) of its own"
                )
            works = self._exchange(session, self._topics, probe, retain=True)
            self._heard.clear()
            if works:
                for topic in self._topics:
                    session.subscribe(topic)
                works = self._returns(session, probe, self._topics)  # because it was kept
            if works:
                self._clear(session, self._topics, b"" if owner is None else self._mark)
        finally:
            session.close()
        if not works:
            raise self._problem()

    def _is_in_use(self, session: Session) -> bool:
        """Whether the last one to take this name is still there: then it soon takes it back, and this session ends."""
        self._exchange(session, self._topics, self._mark, retain=False)
        if not any(said not in (b"", self._mark) for _, said in self._heard):
            return False
        _pump(session, TAKEOVER, lambda: False)
        return not session.connected

    def _exchange(self, session: Session, topics: Sequence[str], payload: bytes, *, retain: bool) -> bool:
        """Whether a message to these topics comes back."""
        for topic in topics:
            session.subscribe(topic)
        for topic in topics:
            session.publish(topic, payload, retain)
        return self._returns(session, payload, topics)

    def _open(self) -> Session:
        self._heard.clear()
        return Session(self._broker, self._client_id, on_message=self._receive, background=False)

    def _receive(self, topic: str, payload: bytes) -> None:
        self._heard.add((topic, payload))

    def _returns(self, session: Session, payload: bytes, topics: Sequence[str]) -> bool:
        """Whether this arrives on all topics."""
        missing = {(topic, payload) for topic in topics}
        return _pump(session, self._timeout, lambda: missing <= self._heard)

    def _clear(self, session: Session, topics: Sequence[str], payload: bytes) -> None:
        for topic in topics:
            session.publish(topic, payload, retain=True)
        if session.connected:
            session.flush(min(self._timeout, 1.0))

    def _problem(self) -> UserError:
        """What is wrong: the message is tried again, first small and for once, then large."""
        where = self._broker.url
        denied = next((topic for topic in self._topics if not self._echoes(topic, self._mark)), None)
        if denied is not None:
            return UserError(
                f"the broker at {where} lets this client not write or not read {denied}: a message to it does not come "
                f"back; allow it to write and read {self._permission}"
            )
        if not self._echoes(self._topics[0], self._mark.ljust(LARGEST, b"\0")):
            return UserError(
                f"the broker at {where} does not deliver messages of {LARGEST:,} bytes; raise its limit on the size of "
                "messages (mosquitto: message_size_limit, max_packet_size)"
            )
        return UserError(
            f"the broker at {where} does not keep retained messages, which the fleet needs; allow them (mosquitto: "
            "retain_available true)"
        )

    def _echoes(self, topic: str, payload: bytes) -> bool:
        """Whether this comes back, in a session of its own: brokers may end one in which something is not allowed. What
        is still retained is cleared."""
        session = self._open()
        try:
            returned = self._exchange(session, [topic], payload, retain=False)
            self._clear(session, [topic], b"")
            return returned
        finally:
            session.close()


def _pump(session: Session, timeout: float, reached: Callable[[], bool]) -> bool:
    """Receive until something is reached, at most for `timeout` seconds and while there is a connection."""
    end = time.monotonic() + timeout
    while session.connected and not reached() and (left := end - time.monotonic()) > 0:
        session.pump(min(left, 0.2))
    return reached()
