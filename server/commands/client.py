"""Asks the fleet's server to command devices: a run's, a deployment's and every other program's way to a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.commands import (
    MAX_SUBMITTED,
    Refusal,
    Submission,
    Submitted,
    decode_refusal,
    encode_submission,
)
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.topics import Topics

WAIT = 5.0
"""Seconds to wait for a sign of the server."""


class CommandClient:
    """What a session needs to submit commands. Its owner hands it each message and calls `subscribe` in a new session.

    Parameters
    ----------
    topics
        The fleet's topics.
    name
        The session's name.
    token
        A token of the server's API whose scope is to operate; None where the server asks for none.
    on_refusal
        Called with each command that the server does not send.
    """

    def __init__(self, topics: Topics, name: str, token: str | None, on_refusal: Callable[[Refusal], None]) -> None:
        self._topics = topics
        self._name = name
        self._token = token
        self._on_refusal = on_refusal
        self._refused = topics.refused(name)
        self._found = threading.Event()

    def subscribe(self, session: Session) -> None:
        """Listen for the server, in a new session."""
        session.subscribe(self._topics.time)
        session.subscribe(self._refused)

    def receive(self, topic: str, payload: bytes) -> None:
        """Take a message, if it is one for it."""
        if topic == self._topics.time:
            (self._found.set if payload else self._found.clear)()
        elif topic == self._refused:
            try:
                self._on_refusal(decode_refusal(payload))
            except ProtocolError:
                return

    def require_server(self, broker: BrokerAddress, wait: float = WAIT) -> None:
        """Wait until the server is there.

        Raises
        ------
        UserError
            If there is none.
        """
        if not self._found.wait(wait):
            raise UserError(
                f"no server commands the fleet '{self._topics.fleet}' on {broker.url}, and devices obey nobody else; "
                "start it (tinyfleet server start), or with this broker (tinyfleet server start --broker URL)"
            )

    def messages(self, commands: Sequence[Submitted]) -> list[Message]:
        """What to publish to submit these commands."""
        topic = self._topics.submission(self._name)
        parts = [commands[at : at + MAX_SUBMITTED] for at in range(0, len(commands), MAX_SUBMITTED)]
        return [Message(topic, encode_submission(Submission(self._token, tuple(part))), False) for part in parts]
