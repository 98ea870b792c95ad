"""Which command each device is sent, and when: one at a time on each topic, again until it is done.

A command stays at the broker until its device has replied or it has expired, and is sent again at growing intervals,
with identical bytes. A newer one replaces it. What is done is taken back a little later, unless another has taken its
place, and is remembered until it expires: asked for again, it is sent again as it was, and the device repeats its
reply.
Nothing here does I/O: what is to be published is returned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tinyfleet.edge.wire.commands import Action
from tinyfleet.edge.wire.messages import Failure, Reply, Status

RESEND = 2.0
"""Seconds until a command is sent again; the interval doubles each time, up to 16 times this."""
MAX_BACKOFF = 16
LINGER = 5.0
"""Seconds that a command which has ended stays at the broker."""
MAX_OPEN = 100_000
"""Devices and groups that have a command at a time. Others are refused, as memory has an end."""
GROUPS = "groups/"
"""What a group's name begins with, where a device's could stand."""


class Out(NamedTuple):
    """What to publish, retained, for a device or a group."""

    to: str
    payload: bytes


@dataclass(eq=False)
class Outstanding:
    """The last command to a device or a group. Times are those of time.monotonic(), but for the expiry."""

    action: Action
    encoded: bytes
    expires: int  # Unix time in milliseconds
    ends: float
    counter: int = 0
    nonce: bytes | None = None
    payload: bytes = b""  # as it travels; empty until it can be sealed
    resend_at: float = 0.0
    interval: float = RESEND
    parts: set[int] = field(default_factory=set)  # of the reply that have been seen
    done_at: float | None = None
    is_published: bool = False  # whether it is still at the broker


class CommandScheduler:
    """The commands of one fleet.

    Parameters
    ----------
    next_counter
        Given a recipient and the counter up to which it refuses, its next counter; None if there is none now.
    seal
        Given a recipient, the action, and the counter, expiry, nonce and encoded action: the command as it travels.
        None: it cannot be sealed yet.
    clock
        Unix time in milliseconds.
    monotonic
        Seconds.
    """

    def __init__(
        self,
        next_counter: Callable[[str, int], int | None],
        seal: Callable[[str, Outstanding], bytes | None],
        clock: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._next_counter = next_counter
        self._seal = seal
        self._clock = clock
        self._monotonic = monotonic
        self._open: dict[str, Outstanding] = {}
        self._devices: dict[str, Status] = {}

    def status_of(self, device: str) -> Status | None:
        """What a device last said of itself."""
        return self._devices.get(device)

    def outstanding(self, to: str) -> Outstanding | None:
        """The command that a device or a group is sent now."""
        command = self._open.get(to)
        return None if command is None or command.done_at is not None else command

    def has_room(self, to: str) -> bool:
        """Whether another command can be kept. Those that are done and taken back give way."""
        if to in self._open or len(self._open) < MAX_OPEN:
            return True
        self._open = {name: each for name, each in self._open.items() if each.done_at is None or each.is_published}
        return len(self._open) < MAX_OPEN

    def submit(self, to: str, life: int, action: Action, encoded: bytes) -> Iterator[Out]:
        """Take a command.

        Parameters
        ----------
        to
            A device, or "groups/" and a group.
        life
            Milliseconds until it expires; 0 takes it back.
        action, encoded
            What to do, and its encoding.

        Yields
        ------
        Out
            What to publish.
        """
        there = self._open.get(to)
        if there is not None and there.encoded == encoded:
            if not life:
                self._end(there)
            else:  # a reply that the device has sent was lost on its way to who asks, or the command to the device was
                there.done_at = None
                there.parts.clear()
                yield from self._publish(to, there)
        elif life:
            now = self._monotonic()
            self._open[to] = Outstanding(action, encoded, self._clock() + life, now + life / 1000)
            yield from self._send(to)

    def _send(self, to: str) -> Iterator[Out]:
        """Number, seal and publish what is outstanding."""
        command = self._open[to]
        status = self._devices.get(to)
        ceiling = 0 if status is None or to.startswith(GROUPS) else status.ceiling
        command.nonce = None if status is None else status.nonce
        command.parts.clear()
        command.interval = RESEND
        counter = self._next_counter(to, ceiling)
        if counter is not None:
            command.counter = counter
            command.payload = self._seal(to, command) or b""
        yield from self._publish(to, command)

    def _publish(self, to: str, command: Outstanding) -> Iterator[Out]:
        command.resend_at = self._monotonic() + command.interval
        command.interval = min(2 * command.interval, MAX_BACKOFF * RESEND)
        if command.payload:
            command.is_published = True
            yield Out(to, command.payload)

    def _end(self, command: Outstanding) -> None:
        if command.done_at is None:
            command.done_at = self._monotonic()

    def on_reply(self, device: str, reply: Reply) -> None:
        """A device has replied: to what it is sent now, or to something else."""
        command = self.outstanding(device)
        if command is None or command.action.id != reply.id:
            return
        if not isinstance(reply, Failure):
            command.parts.add(reply.part)
            if len(command.parts) < reply.parts:
                return
        self._end(command)

    def on_status(self, device: str, status: Status | None) -> Iterator[Out]:
        """A device has said who it is, or was removed. One that has started again, and refuses the command that it is
        sent now, is sent it under a new number."""
        if status is None:
            self._devices.pop(device, None)
            return
        self._devices[device] = status
        command = self.outstanding(device)
        if command is not None and status.online and _is_refused(command, status):
            yield from self._send(device)

    def due(self) -> Iterator[Out]:
        """What to publish now: commands again, and empty messages that take back those that are done."""
        now = self._monotonic()
        for to, command in list(self._open.items()):
            if now >= command.ends:
                del self._open[to]
                if command.is_published:
                    yield Out(to, b"")
            elif command.done_at is not None:
                if command.is_published and now >= command.done_at + LINGER:
                    command.is_published = False
                    yield Out(to, b"")
            elif now >= command.resend_at and not command.payload:
                yield from self._send(to)
            elif now >= command.resend_at and not to.startswith(GROUPS):
                yield from self._publish(to, command)

    def resend_all(self) -> Iterator[Out]:
        """All that is outstanding, for a broker that may have lost it; and what is done is taken back."""
        for to, command in self._open.items():
            if command.done_at is None and command.payload:
                command.is_published = True
                yield Out(to, command.payload)
            elif command.is_published:
                command.is_published = False
                yield Out(to, b"")


def _is_refused(command: Outstanding, status: Status) -> bool:
    """Whether a device in this state refuses a command that it has not taken before; or could not be sent it yet."""
    return not command.payload or command.nonce != status.nonce or status.ceiling > command.counter
