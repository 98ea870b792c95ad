"""The server's side of commands: takes submissions, seals and sends what may be sent; and tells devices the time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Protocol

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.commands import (
    Action,
    NewKeys,
    Refusal,
    Submission,
    Submitted,
    TrainTask,
    decode_action,
    decode_submission,
    encode_action,
    encode_command,
    encode_refusal,
    encode_time,
)
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import Status, decode_reply, decode_status
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.commands.counters import unix_ms
from tinyfleet.server.commands.scheduler import GROUPS, MAX_OPEN, CommandScheduler, Out, Outstanding

TIME_INTERVAL = 60.0
"""Seconds between two messages with the time."""
TICK = 0.25
"""Seconds between two looks at what is due."""
MAX_LIFE = 3_600_000
"""Milliseconds that a command may live; devices refuse one that lives longer than 2^22."""

WITHOUT_KEYS = (
    "it was built without keys, and would obey anyone; enrol it (tinyfleet device enrol NAME), or run a server that "
    "takes such devices on this machine: tinyfleet server start --insecure"
)
NOT_ENROLLED = (
    "it is not enrolled here; enrol it (tinyfleet device enrol NAME), or, if another server of the same root key "
    "enrolled it: tinyfleet server rotate-keys"
)

log = logging.getLogger(__name__)


class Signer(Protocol):
    """Who holds the keys: the fleet's authority."""

    def command_key(self, device: str) -> bytes | None:
        """The key that a device shares with the server; None if it is not enrolled."""
        ...

    def sign(self, payload: bytes, topic: str) -> bytes:
        """A COSE_Sign1 with the fleet's current key."""
        ...

    @property
    def keys_version(self) -> int:
        """The version of the fleet's keys."""
        ...

    @property
    def new_keys(self) -> bytes | None:
        """The last change of the fleet's keys, sealed with the root key."""
        ...


class CommandService:
    """Runs from its construction until it is closed.

    Parameters
    ----------
    broker
        The broker.
    fleet
        The fleet's name.
    next_counter
        The numbers of commands, as `Counters.next` gives them.
    signer
        Who seals. None: no device has keys.
    may_command
        Whether the bearer of a token may command devices; None for no token.
    takes_keyless
        Whether devices without keys are commanded.
    clock
        Unix time in milliseconds.

    Raises
    ------
    UserError
        If no broker answers.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        fleet: str,
        *,
        name: str,
        next_counter: Callable[[str, int], int],
        signer: Signer | None,
        may_command: Callable[[str | None], bool],
        takes_keyless: bool,
        clock: Callable[[], int] = unix_ms,
    ) -> None:
        self._topics = Topics(fleet)
        self._next_counter = next_counter
        self._signer = signer
        self._may_command = may_command
        self._takes_keyless = takes_keyless
        self._clock = clock
        self._lock = threading.RLock()  # guards the scheduler
        self._scheduler = CommandScheduler(self._number, self._seal, clock)
        self._closing = threading.Event()
        self._session: Session | None = None
        self._session = Session(
            broker, name, on_message=self._receive, on_connect=self._connected, will=(self._topics.time, b"")
        )
        self._connected()
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        self._thread.start()

    def __enter__(self) -> CommandService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take back the time, which says that a server is there, and disconnect. Commands stay until they expire."""
        self._closing.set()
        self._thread.join()
        if self._session is not None:
            self._session.publish(self._topics.time, b"", retain=True)
            if self._session.connected:
                self._session.flush(2)
            self._session.close()

    @property
    def alive(self) -> bool:
        """Whether its thread lives."""
        return self._thread.is_alive()

    def command(self, to: str, action: Action, life: int = 60_000) -> None:
        """Command a device, or a group ("groups/" and its name), in the server's own name.

        Raises
        ------
        UserError
            If it cannot be sent.
        """
        encoded = encode_action(action)
        with self._lock:
            reason = self._objection(to, action)
            if reason is not None:
                raise UserError(f"{to}: {reason}")
            self._send(self._scheduler.submit(to, life, action, encoded))

    def publish_keys(self) -> None:
        """Publish the last change of the fleet's keys, retained."""
        if self._session is not None and self._signer is not None and (sealed := self._signer.new_keys) is not None:
            self._session.publish(self._topics.group_command("keys"), sealed, retain=True)

    # Sealing

    def _topic(self, to: str) -> str:
        return self._topics.group_command(to[len(GROUPS) :]) if to.startswith(GROUPS) else self._topics.command(to)

    def _number(self, to: str, ceiling: int) -> int | None:
        try:
            return self._next_counter(self._topic(to), ceiling)
        except OSError as error:  # the disk is full, for example: it is tried again
            log.warning("no number for a command can be reserved: %s", error)
            return None

    def _seal(self, to: str, command: Outstanding) -> bytes | None:
        topic, payload = self._topic(to), self._payload(command)
        if to.startswith(GROUPS):
            return payload if self._signer is None else self._signer.sign(payload, topic)
        status = self._scheduler.status_of(to)
        if status is None:
            return None  # nothing is known of it yet
        if status.keys == 0:
            return payload if self._takes_keyless else None
        if self._signer is None:
            return None
        key = self._signer.command_key(to)
        if key is not None and isinstance(command.action, TrainTask):
            return cose.mac0(payload, key, topic)
        return self._signer.sign(payload, topic) if key is not None or self._obeys_us(status) else None

    def _obeys_us(self, status: Status) -> bool:
        """Whether a device that is not enrolled here holds this server's keys: another server of the same root key
        enrolled it, and was lost."""
        return self._signer is not None and status.keys == self._signer.keys_version

    @staticmethod
    def _payload(command: Outstanding) -> bytes:
        return encode_command(command.counter, command.expires, command.nonce, command.encoded)

    def _objection(self, to: str, action: Action) -> str | None:
        """Why this action is not sent to that recipient; None if it is."""
        if isinstance(action, NewKeys):
            return "a change of keys is signed by the root key: tinyfleet server rotate-keys"
        if not self._scheduler.has_room(to):
            return f"{MAX_OPEN:,} commands are under way; wait until some have ended"
        if to.startswith(GROUPS):
            return None
        status = self._scheduler.status_of(to)
        if status is None and self._takes_keyless:  # it may yet come
            return None
        if status is not None and status.keys == 0:
            return None if self._takes_keyless else WITHOUT_KEYS
        if self._signer is not None and self._signer.command_key(to) is not None:
            return None
        return None if status is not None and self._obeys_us(status) else NOT_ENROLLED

    # Called by the session's thread

    def _connected(self) -> None:
        if self._session is None:
            return
        for topic in (self._topics.status("+"), self._topics.reply("+"), self._topics.submission("+")):
            self._session.subscribe(topic)
        self._publish_time()
        self.publish_keys()
        with self._lock:
            self._send(self._scheduler.resend_all())

    def _publish_time(self) -> None:
        assert self._session is not None
        payload = encode_time(self._clock())
        if self._signer is not None and not self._takes_keyless:
            payload = self._signer.sign(payload, self._topics.time)
        self._session.publish(self._topics.time, payload, retain=True)

    def _send(self, outs: Iterable[Out]) -> None:
        messages = [Message(self._topic(out.to), out.payload, True) for out in outs]
        if messages:
            assert self._session is not None
            self._session.send(messages)

    def _receive(self, topic: str, payload: bytes) -> None:
        try:
            match self._topics.parse(topic):
                case "submission", (str(session),):
                    self._take(session, decode_submission(payload))
                case "reply", (str(device),):
                    reply = decode_reply(payload)
                    with self._lock:
                        self._scheduler.on_reply(device, reply)
                case "status", (str(device),):
                    status = decode_status(payload) if payload else None
                    with self._lock:
                        self._send(self._scheduler.on_status(device, status))
        except ProtocolError:  # the registry counts and reports what devices say wrong
            return

    def _take(self, session: str, submission: Submission) -> None:
        allowed = self._may_command(submission.token)
        outs: list[Out] = []
        with self._lock:
            for submitted in submission.commands:
                outs += self._take_one(session, submitted, allowed)
            self._send(outs)

    def _take_one(self, session: str, submitted: Submitted, allowed: bool) -> Iterable[Out]:
        id = 0
        try:
            self._topic(submitted.to)  # checks the name
            action = decode_action(submitted.action)
            id = action.id
            reason = self._objection(submitted.to, action) if allowed else "its token may not command devices"
            if reason is None and submitted.expires > MAX_LIFE:
                reason = f"a command may live for {MAX_LIFE // 60_000} minutes at most"
        except ProtocolError as error:
            reason = str(error)
        if reason is None:
            return self._scheduler.submit(submitted.to, submitted.expires, action, submitted.action)
        refusal = encode_refusal(Refusal(submitted.to, id, reason))
        assert self._session is not None
        self._session.send([Message(self._topics.refused(session), refusal, False)])
        return []

    # Its own thread

    def _run(self) -> None:
        waited = 0.0
        while not self._closing.wait(TICK):
            waited += TICK
            with self._lock:
                self._send(self._scheduler.due())
            if waited >= TIME_INTERVAL:
                waited = 0.0
                self._publish_time()
