"""The open requests of a grid: when each device is asked, asked again, and given up.

A request is one command to one device, which the server sends. It is submitted again at growing intervals, until the
device replies, stays offline for too long, or the request expires: a submission may be lost, or the server start again.
"""

import itertools
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import Error, Message, MetricRecord, RecordDict

from tinyfleet.edge.wire.commands import TrainTask
from tinyfleet.server.flower.broadcast import Broadcast
from tinyfleet.server.flower.devices import StatusChange
from tinyfleet.server.flower.internals import NO_REPLY, NODE_FAILED, NODE_UNAVAILABLE
from tinyfleet.server.flower.replies import ReplyParts

MAX_BACKOFF = 16
"""The longest interval between two transmissions of a request, in units of the first."""


@dataclass(frozen=True)
class RoundEvent:
    """Something that happened in a round, for progress displays and the lineage.

    Parameters
    ----------
    kind
        broadcast: the parameters are published; requested: a device is sent its command; replied: a device replied,
        with these metrics and an update of this encoding, if any; no_reply: a device is given up, for this reason;
        refused: a device's reply is out of bounds, for this reason.
    server_round
        Flower's number of the round.
    device
        The device's id; empty for a broadcast.
    reason
        Why there is no reply, or why it is refused.
    metrics
        Of a reply.
    encoding
        Of a reply's update, such as "sparse f16".
    """

    kind: Literal["broadcast", "requested", "replied", "no_reply", "refused"]
    server_round: int
    device: str = ""
    reason: str = ""
    metrics: MetricRecord | None = None
    encoding: str | None = None


@dataclass(eq=False)
class Request:
    """One command to one device, until its reply is pulled. Times are those of time.monotonic()."""

    message: Message
    device: str
    server_round: int
    broadcast: Broadcast
    train_task: TrainTask
    payload: bytes  # the action, as it is submitted
    expires: float
    resend_at: float
    offline_since: float | None
    resend_interval: float = 0.0  # seconds; set by the scheduler
    transmissions: int = 0
    parts: ReplyParts = field(default_factory=ReplyParts)
    reply: Message | None = None
    change_norm: float | None = None  # L2, of a reply with an update
    ended: RoundEvent | None = None  # reported when the reply is pulled

    def next_action(self, grace: float) -> float:
        """When something is due if nothing arrives."""
        gone = math.inf if self.offline_since is None else self.offline_since + grace
        return min(self.resend_at, self.expires, gone)


class RequestScheduler:
    """The requests of one grid, and the lock that guards the grid's state.

    Parameters
    ----------
    resend_interval
        Seconds until a device that has not replied is asked again; the interval doubles each time, up to 16 times this.
    offline_grace
        Seconds that a device may be offline and still take part in the round.
    """

    def __init__(self, resend_interval: float, offline_grace: float) -> None:
        self.changed = threading.Condition()
        """Guards the grid's state; notified whenever a waiting thread may have something to do."""
        self._resend_interval = resend_interval
        self._offline_grace = offline_grace
        self._ids = itertools.count(secrets.randbits(32))
        self._by_message: dict[str, Request] = {}
        self._open: dict[int, Request] = {}  # by the command's id, until there is a reply
        self._events: list[RoundEvent] = []
        self._withdrawn: list[tuple[str, bytes]] = []

    def new_id(self) -> int:
        """A number for the next command."""
        return next(self._ids) & 0xFFFFFFFF

    def add(self, message_id: str, request: Request) -> None:
        """Opens a request."""
        with self.changed:
            self._by_message[message_id] = self._open[request.train_task.id] = request
            request.resend_interval = self._resend_interval
            request.broadcast.open_requests += 1

    def find(self, command_id: int) -> Request | None:
        """The open request with this command; None if there is none, or there is none any longer."""
        return self._open.get(command_id)

    def of(self, message_ids: Iterable[str]) -> list[tuple[str, Request]]:
        """The requests of these messages, but those that were pulled."""
        known = ((message_id, self._by_message.get(message_id)) for message_id in list(message_ids))
        return [(message_id, request) for message_id, request in known if request is not None]

    def due(self) -> list[Request]:
        """The requests to transmit now. Gives up on those whose time is up or whose device stays offline."""
        now, due = time.monotonic(), []
        with self.changed:
            for request in list(self._open.values()):
                if request.offline_since is not None and now >= request.offline_since + self._offline_grace:
                    self.fail(request, NODE_UNAVAILABLE, "went offline")
                elif now >= request.expires:
                    self.fail(request, NO_REPLY, "no reply in time")
                elif now >= request.resend_at:
                    if not request.transmissions:
                        self.report(RoundEvent("requested", request.server_round, request.device))
                    request.transmissions += 1
                    request.resend_at = now + request.resend_interval
                    request.resend_interval = min(2 * request.resend_interval, MAX_BACKOFF * self._resend_interval)
                    due.append(request)
        return due

    def withdrawn(self) -> list[tuple[str, bytes]]:
        """The devices and commands that were given up since the last call."""
        with self.changed:
            withdrawn, self._withdrawn = self._withdrawn, []
        return withdrawn

    def wait(self, requests: Iterable[Request], until: float = math.inf) -> None:
        """Waits until something arrives, an action is due for one of these requests, or the time `until`. The caller
        holds the lock."""
        deadline = min(until, *(request.next_action(self._offline_grace) for request in requests))
        self.changed.wait(max(0.0, deadline - time.monotonic()))

    def on_status(self, device: str, change: StatusChange) -> None:
        """A device's status has changed: note that it is offline, or ask it again where it may have lost its command.
        The caller holds the lock."""
        now = time.monotonic()
        notify = change.matters
        for request in self._open.values():
            if request.device != device:
                continue
            if not change.online:
                request.offline_since = request.offline_since or now
            elif request.offline_since is not None or change.restarted:
                request.offline_since, request.resend_at, notify = None, now, True
        if notify:
            self.changed.notify_all()

    def resend_all(self) -> None:
        """Makes every open request due, as a new connection may have lost it."""
        with self.changed:
            for request in self._open.values():
                request.resend_at = 0.0
            self.changed.notify_all()

    def succeed(self, request: Request, content: RecordDict, metrics: MetricRecord, encoding: str | None) -> None:
        """Ends a request with the device's reply. The caller holds the lock."""
        event = RoundEvent("replied", request.server_round, request.device, metrics=metrics, encoding=encoding)
        self._end(request, Message(content, reply_to=request.message), event)

    def fail(self, request: Request, code: int, reason: str) -> None:
        """Ends a request with an error, unless it has ended. The caller holds the lock."""
        if request.reply is None:
            if request.transmissions:
                self._withdrawn.append((request.device, request.payload))
            error = Message(Error(code, f"{request.device}: {reason}"), reply_to=request.message)
            self._end(request, error, RoundEvent("no_reply", request.server_round, request.device, reason))

    def refuse(self, request: Request, reason: str) -> None:
        """Makes an error of a device's reply, also of one that had been taken. The caller holds the lock."""
        error = Message(Error(NODE_FAILED, f"{request.device}: {reason}"), reply_to=request.message)
        self._end(request, error, RoundEvent("refused", request.server_round, request.device, reason))

    def _end(self, request: Request, reply: Message, event: RoundEvent) -> None:
        self._open.pop(request.train_task.id, None)
        request.parts.clear()
        request.reply, request.ended = reply, event
        self.changed.notify_all()

    def collect_replies(self, message_ids: Iterable[str]) -> tuple[list[Message], list[Broadcast]]:
        """The replies that are there, each handed out once, and the broadcasts that nothing needs any longer."""
        replies, over = [], []
        with self.changed:
            for message_id, request in self.of(message_ids):
                if request.reply is None:
                    continue
                assert request.ended is not None
                replies.append(request.reply)
                self.report(request.ended)
                del self._by_message[message_id]
                request.broadcast.open_requests -= 1
                if request.broadcast.open_requests == 0:
                    over.append(request.broadcast)
        return replies, over

    def close(self, reason: str) -> None:
        """Ends every request with an error."""
        with self.changed:
            for request in list(self._by_message.values()):
                self.fail(request, NO_REPLY, reason)
            self._by_message.clear()

    def report(self, event: RoundEvent) -> None:
        """Queues an event."""
        with self.changed:
            self._events.append(event)

    def deliver_events(self, on_event: Callable[[RoundEvent], None] | None) -> None:
        """Calls back for every queued event, without the lock."""
        with self.changed:
            events: Sequence[RoundEvent] = self._events
            self._events = []
        if on_event is not None:
            for event in events:
                on_event(event)
