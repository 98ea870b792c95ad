"""Finds out at the start what a broker does not allow or cannot do, and names it.

A broker acknowledges what it denies, so nothing but an echo shows that a message got through: a probe is published to
each topic that matters, retained and as long as the longest message in use, and must come back twice: at once, and to a
new subscription.
"""

from __future__ import annotations

import queue
import secrets
from collections.abc import Sequence

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics

TIMEOUT = 5.0
"""Seconds that an echo may take."""
PROBE_BYTES = 65_536
"""As long as the longest description of a device; a reply and a chunk are shorter."""


def check_broker(broker: BrokerAddress, client_id: str, topics: Sequence[str]) -> None:
    """Check that a broker does what is needed, with a session of its own.

    Parameters
    ----------
    broker
        The broker, and who asks.
    client_id
        The session's name; with brokers that let a user have one session, the one that the caller will have.
    topics
        What must be possible to write, to read, and to retain.

    Raises
    ------
    UserError
        If there is no session, or something is not possible; says what and for which topic.
    """
    echoes: queue.Queue[tuple[str, bytes]] = queue.Queue()
    session = Session(broker, client_id, on_message=lambda *message: echoes.put(message))
    lost = False

    def comes_back(topic: str, payload: bytes) -> bool:
        nonlocal lost
        try:
            while echoes.get(timeout=TIMEOUT) != (topic, payload):
                pass
        except queue.Empty:
            lost = not session.connected
            return False
        return True

    try:
        for topic in topics:
            nonce = secrets.token_bytes(16)
            probe = nonce + bytes(PROBE_BYTES - len(nonce))
            session.subscribe(topic)
            session.publish(topic, nonce)
            if not comes_back(topic, nonce):
                raise UserError(
                    f"the broker at {broker.url} does not let this client publish to {topic} and read it; its access "
                    "list must allow both"
                )
            session.publish(topic, probe, retain=True)
            if not comes_back(topic, probe):
                what = "ends the session after" if lost else "loses"
                raise UserError(
                    f"the broker at {broker.url} {what} a message of {PROBE_BYTES} bytes; raise its limit "
                    "(mosquitto: message_size_limit, max_packet_size)"
                )
            session.unsubscribe(topic)
            session.subscribe(topic)
            if not comes_back(topic, probe):
                raise UserError(
                    f"the broker at {broker.url} does not retain messages, which devices rely on (mosquitto: "
                    "retain_available true)"
                )
            session.publish(topic, b"", retain=True)
        session.flush(TIMEOUT)
    finally:
        session.close()


def device_topics(fleet: str, device: str) -> list[str]:
    """What a device's identity must be able to write and read."""
    return [Topics(fleet).echo(device)]


def operator_topics(fleet: str) -> list[str]:
    """What the server's and an operator's identity must be able to write and read."""
    topics, name = Topics(fleet), f"echo-{secrets.token_hex(4)}"
    return [topics.command(name), *(f"{topics.root}/{kind}/{name}" for kind in ("runs", "models", "drivers"))]
