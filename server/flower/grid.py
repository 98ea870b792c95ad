"""Flower's Grid over MQTT: every Flower strategy runs on microcontrollers.

A round's weights are published once, as retained chunks that the broker fans out, however many devices take part: the
grid sees that a round's messages carry the same arrays. What to do with them goes to each device by itself, and is
asked again, more and more seldom, until the device replies, is gone, or the time is up. Replies are put together from
parts that may come twice, in any order, cut or not at all. Whatever a device does, or no longer does, costs its own
reply and no other.
"""

import hashlib
import itertools
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from tinyfleet.edge.device.flower_client import (
    apply_update,
    arrays_to_vector,
    single_records,
    to_metrics,
    vector_to_arrays,
)
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import (
    Dense,
    Failure,
    Kind,
    Sparse,
    Status,
    Success,
    TrainTask,
    decode_reply,
    decode_status,
    encode,
    error_text,
)
from tinyfleet.edge.wire.mqtt_session import Message as Out
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.round_config import RoundConfig, parse_round_config
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.flower.internals import NO_REPLY, NODE_FAILED, NODE_UNAVAILABLE, Run, new_run, stamp

Vector = NDArray[np.float32]

RECENT = 4
"""Rounds whose weights are taken back once more in a new session."""


@dataclass(frozen=True)
class RoundEvent:
    """What happened in a round, for whoever watches.

    broadcast: the weights are out; asked: a device was given work; replied: with these metrics, and an update of this
    encoding, if any; lost: it gives no reply, for this reason.
    """

    kind: Literal["broadcast", "asked", "replied", "lost"]
    server_round: int
    device: str = ""
    reason: str = ""
    metrics: MetricRecord | None = None
    encoding: str | None = None


@dataclass
class Traffic:
    """Payload bytes and messages that the grid dropped, since it was opened. A broadcast counts once."""

    bytes_down: int = 0
    bytes_up: int = 0
    malformed: int = 0  # replies that did not decode or did not fit
    stale: int = 0  # replies that nothing asked for (any more)


class _DeviceRequest(NamedTuple):
    """What one message asks of a device."""

    device: str
    kind: Kind
    round_config: RoundConfig
    server_round: int


class _Weights(NamedTuple):
    """What a message carries."""

    record: ArrayRecord
    vector: Vector
    data: bytes  # the vector as it travels


@dataclass(eq=False)
class _Broadcast:
    """The weights of one round, while a device may still need them."""

    weights: _Weights
    number: int  # of the round on the wire
    chunks: list[Out]
    open_jobs: int = 0


@dataclass
class _Job:
    """One message to one device, until its reply."""

    message: Message
    device: str
    server_round: int
    broadcast: _Broadcast
    train_task: TrainTask
    request: bytes
    expires: float  # time.monotonic(), as the next two
    resend_at: float
    offline_since: float | None = None
    resend_interval: float = 0.0  # seconds until it is asked once more
    asked: int = 0
    parts: dict[int, tuple[Success, bytes]] = field(default_factory=dict)  # part -> the message, and its payload
    reply: Message | None = None
    ended: RoundEvent | None = None  # what its reply came to; told when that is pulled


@cache
def node_id(device: str) -> int:
    """Flower's number for a device: 63 bits of its id's SHA-256, so it is the same in every run."""
    return int.from_bytes(hashlib.sha256(device.encode()).digest()[:8], "big") >> 1


class RunGrid(Grid):
    """What grids of ours share: the run that they are in, and how its messages are made."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def set_run(self, run: Run) -> None:
        """Takes part in a run that Flower began."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run record."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class MqttGrid(RunGrid):
    """A Flower Grid whose nodes are the devices of one fleet.

    host, port: the broker. program: the model that the fleet learns; devices that say they run another are not nodes.
    select: returns the ids of the devices that may take part (a query of the graph); None: all. on_event: called from
    the thread that waits for a round. repeat: seconds until a device that has not replied is asked again (then twice
    that, and so on, up to 16 times that); grace: seconds that a device may be offline in a round and still take part;
    wait: seconds to wait for a node where there is none, as after a restart of the broker.

    Devices see the run's number modulo 2**32. Raises UserError if the broker is not there. Close it, or use it in a
    `with`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        fleet: str,
        program: Program,
        select: Callable[[], Iterable[str]] | None = None,
        *,
        on_event: Callable[[RoundEvent], None] | None = None,
        repeat: float = 2.0,
        grace: float = 2.0,
        wait: float = 0.0,
    ) -> None:
        self.program = program
        self.traffic = Traffic()
        self._select = select
        self._on_event = on_event
        self._repeat = repeat
        self._grace = grace
        self._wait = wait
        self._topics = Topics(fleet)
        super().__init__(new_run(secrets.randbits(32)))
        self._rounds = itertools.count(1)
        self._ids = itertools.count(secrets.randbits(32))
        self._changed = threading.Condition()  # guards all that follows
        self._devices: dict[int, str] = {}
        self._status: dict[str, Status] = {}
        self._jobs: dict[str, _Job] = {}  # by message id
        self._by_work: dict[int, _Job] = {}  # by the wire's correlation id, while open
        self._events: list[RoundEvent] = []
        self._broadcasts: list[_Broadcast] = []
        self._cleared: deque[_Broadcast] = deque(maxlen=RECENT)
        self._session: Session | None = None
        name = f"tinyfleet-grid-{secrets.token_hex(4)}"
        self._session = Session(host, port, name, on_message=self._receive, on_connect=self._connected)
        self._connected()

    def __enter__(self) -> "MqttGrid":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes back what is still published, and disconnects."""
        with self._changed:
            jobs = list(self._jobs.values())
            for job in jobs:
                self._fail(job, NO_REPLY, "the grid was closed")
            self._jobs.clear()
            broadcasts = list(self._broadcasts)
        for broadcast in broadcasts:
            self._clear(broadcast)
        if self._session is not None:
            if self._session.connected:
                self._session.flush(2)  # a run that has ended has left nothing at the broker
            self._session.close()

    # Flower's Grid

    def get_node_ids(self) -> list[int]:
        """The selected devices that are online and run this grid's program, in a fixed order."""
        return self.wait_for_nodes(1, self._wait)

    def _nodes(self) -> list[int]:
        selected = None if self._select is None else set(self._select())
        with self._changed:
            ready = [d for d, s in self._status.items() if s.online and s.model == self.program.model_id]
            return sorted(node_id(d) for d in ready if selected is None or d in selected)

    def device(self, node: int) -> str:
        """The device behind a node id. KeyError if none with that id was ever seen."""
        with self._changed:
            return self._devices[node]

    def wait_for_nodes(self, count: int, timeout: float) -> list[int]:
        """The node ids as soon as there are `count` of them, or those that are there after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            nodes = self._nodes()
            left = deadline - time.monotonic()
            if len(nodes) >= count or left <= 0:
                return nodes
            with self._changed:  # a selection can change without a message, so look again now and then
                self._changed.wait(min(left, 0.5))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Publishes the weights, once for all messages that carry the same ones, and asks every device.

        Raises ValueError, before anything is published, if a message has not one ArrayRecord and one ConfigRecord, if
        its arrays are not the program's, if its config asks for what no device can do, or if there is no such node.
        """
        known: dict[int, _Weights] = {}  # by the record's identity: most strategies give all messages the same one
        asked = []
        for message in messages:  # all of them, before anything is published
            record, config = single_records(message)
            if id(record) not in known:
                vector = arrays_to_vector(record, self.program)
                known[id(record)] = _Weights(record, vector, vector.astype("<f4", copy=False).tobytes())
            asked.append((message, self._device_request(message, config), known[id(record)]))
        broadcasts: dict[tuple[bytes | str, ...], _Broadcast] = {}
        message_ids = []
        for message, train_task, weights in asked:
            same = weights.data, *weights.record
            if same not in broadcasts:
                broadcasts[same] = self._broadcast(weights, train_task.server_round)
            message_ids.append(self._start(message, train_task, broadcasts[same]))
        self._ask([chunk for broadcast in broadcasts.values() for chunk in broadcast.chunks])
        self._tell()
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there. A device that failed, is gone, or ran out of time has an error for a reply."""
        self._ask()
        replies, over = [], []
        with self._changed:
            for message_id in list(message_ids):
                job = self._jobs.get(message_id)
                if job is not None and job.reply is not None:
                    assert job.ended is not None
                    replies.append(job.reply)
                    self._events.append(job.ended)
                    del self._jobs[message_id]
                    job.broadcast.open_jobs -= 1
                    if job.broadcast.open_jobs == 0:
                        over.append(job.broadcast)
        for broadcast in over:
            self._clear(broadcast)
        self._tell()
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Pushes, waits for every reply or the timeout (seconds), and pulls. There is a reply, if only an error, to
        every message."""
        waiting = set(self.push_messages(messages))
        until = float("inf") if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        try:
            while waiting:
                arrived = self.pull_messages(waiting)
                replies += arrived
                waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
                if arrived or not waiting:
                    continue
                with self._changed:
                    jobs = [self._jobs[message_id] for message_id in waiting]
                    if time.monotonic() >= until:
                        for job in jobs:
                            self._fail(job, NO_REPLY, f"no reply within {timeout:g} s")
                    elif all(job.reply is None for job in jobs):
                        self._changed.wait(max(0.0, min(until, *(self._next(job) for job in jobs)) - time.monotonic()))
        finally:  # an interrupt: nothing stays behind at the broker
            self.give_up(waiting, "interrupted")
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)  # sums do not depend on who came first

    def wait_for_one(self, message_ids: Iterable[str]) -> str:
        """The first of these messages that there is a reply to, as soon as there is one: at the latest when the time of
        one of them is up."""
        waiting = list(message_ids)
        while True:
            self._ask()
            with self._changed:
                jobs = [(message_id, self._jobs[message_id]) for message_id in waiting]
                for message_id, job in jobs:
                    if job.reply is not None:
                        return message_id
                self._changed.wait(max(0.0, min(self._next(job) for _, job in jobs) - time.monotonic()))

    def give_up(self, message_ids: Iterable[str], reason: str) -> None:
        """Waits for these no longer: a reply that comes yet is stale. What only they needed is taken back."""
        waiting = list(message_ids)
        with self._changed:
            for job in filter(None, map(self._jobs.get, waiting)):
                self._fail(job, NO_REPLY, reason)
        if waiting:
            self.pull_messages(waiting)

    # Down

    def _broadcast(self, weights: _Weights, server_round: int) -> _Broadcast:
        """The weights under a round number of the wire's own, which only ever rises: a Flower round may send two sets
        of weights, one to train and one to evaluate."""
        number, run = next(self._rounds), self._run.run_id & 0xFFFFFFFF
        payloads = enumerate(chunks(weights.data))
        broadcast = _Broadcast(
            weights, number, [Out(self._topics.weights(run, number, n), data, True) for n, data in payloads]
        )
        with self._changed:
            self._broadcasts.append(broadcast)
            self._events.append(RoundEvent("broadcast", server_round))
        return broadcast

    def _clear(self, broadcast: _Broadcast) -> None:
        with self._changed:
            self._broadcasts.remove(broadcast)
            self._cleared.append(broadcast)
        self._clear_topics(broadcast)

    def _clear_topics(self, broadcast: _Broadcast) -> None:
        """If the connection breaks now, they may stay: see `_connected`."""
        self._send([chunk._replace(payload=b"") for chunk in broadcast.chunks])

    def _connected(self) -> None:
        """A new connection has no subscriptions, and if the broker is new too, it has no weights either. What was sent
        on the last one may have been lost."""
        if self._session is None:
            return
        self._session.subscribe(self._topics.status("+"))
        self._session.subscribe(self._topics.reply("+"))
        with self._changed:
            broadcasts, cleared = list(self._broadcasts), list(self._cleared)
        for broadcast in cleared:
            self._clear_topics(broadcast)
        for broadcast in broadcasts:
            self._send(broadcast.chunks)
            with self._changed:
                over = not any(broadcast is other for other in self._broadcasts)
            if over:  # it ended meanwhile
                self._clear_topics(broadcast)
        with self._changed:
            for job in self._by_work.values():
                job.resend_at = 0.0
            self._changed.notify_all()

    def _send(self, messages: Sequence[Out]) -> None:
        assert self._session is not None
        self._session.send(messages)
        self.traffic.bytes_down += sum(len(message.payload) for message in messages)

    def _device_request(self, message: Message, config: ConfigRecord) -> _DeviceRequest:
        """What a message asks for. Raises ValueError if it is not something that a device can be asked."""
        try:
            device = self.device(message.metadata.dst_node_id)
        except KeyError:
            raise ValueError(f"no device has the node id {message.metadata.dst_node_id}") from None
        kind: Kind = "evaluate" if message.metadata.message_type.startswith(MessageType.EVALUATE) else "train"
        value = config.get("server-round", 0)
        round_config = parse_round_config(config, kind, message.metadata.dst_node_id)
        return _DeviceRequest(device, kind, round_config, value if isinstance(value, int) else 0)

    def _start(self, message: Message, asked: _DeviceRequest, broadcast: _Broadcast) -> str:
        train_task = TrainTask(
            id=next(self._ids) & 0xFFFFFFFF,
            kind=asked.kind,
            run=self._run.run_id & 0xFFFFFFFF,
            round=broadcast.number,
            model=self.program.model_id,
            seed=asked.round_config.seed,
            phases=asked.round_config.phases,
            query=asked.round_config.query,
            update=asked.round_config.update,
        )
        now = time.monotonic()
        message_id = stamp(message)
        with self._changed:
            status = self._status.get(asked.device)
            self._jobs[message_id] = self._by_work[train_task.id] = _Job(
                message=message,
                device=asked.device,
                server_round=asked.server_round,
                broadcast=broadcast,
                train_task=train_task,
                request=encode(train_task),
                expires=now + message.metadata.ttl,
                resend_at=now,
                offline_since=None if status is not None and status.online else now,
                resend_interval=self._repeat,
            )
            broadcast.open_jobs += 1
        return message_id

    def _ask(self, before: Sequence[Out] = ()) -> None:
        """Gives up on devices that are gone or late, and asks the others whose turn it is; this is sent before."""
        now = time.monotonic()
        out = list(before)
        with self._changed:
            for job in list(self._by_work.values()):
                if job.offline_since is not None and now >= job.offline_since + self._grace:
                    self._fail(job, NODE_UNAVAILABLE, "went offline")
                elif now >= job.expires:
                    self._fail(job, NO_REPLY, "no reply in time")
                elif now >= job.resend_at:
                    if not job.asked:
                        self._events.append(RoundEvent("asked", job.server_round, job.device))
                    job.asked += 1
                    job.resend_at = now + job.resend_interval
                    job.resend_interval = min(2 * job.resend_interval, 16 * self._repeat)
                    out.append(Out(self._topics.command(job.device), job.request))
        if out:  # not under the lock: the session's thread may wait for it
            self._send(out)

    def _next(self, job: _Job) -> float:
        """When something is due for this job, if nothing arrives."""
        gone = float("inf") if job.offline_since is None else job.offline_since + self._grace
        return min(job.resend_at, job.expires, gone)

    # Up: called by the session's thread

    def _receive(self, topic: str, payload: bytes) -> None:
        match self._topics.parse(topic):
            case "status", (str(device),):
                self._on_status(device, payload)
            case "did", (str(device),):
                self._on_did(device, payload)

    def _on_status(self, device: str, payload: bytes) -> None:
        try:
            status = decode_status(payload)
        except ProtocolError:
            if payload:  # an empty one means that the device was removed
                with self._changed:
                    self.traffic.malformed += 1
                return
            status = None
        now = time.monotonic()
        with self._changed:
            before = self._status.get(device)
            if status is None:
                self._status.pop(device, None)
            else:
                self._devices[node_id(device)] = device
                self._status[device] = status
            # A device tells its counters after all that it does, which concerns nobody who waits.
            news = status is None or before is None or (status.online, status.model) != (before.online, before.model)
            for job in self._by_work.values():
                if job.device != device:
                    continue
                if status is None or not status.online:
                    job.offline_since = job.offline_since or now
                elif job.offline_since is not None or (before is not None and status.samples < before.samples):
                    job.offline_since = None  # it is back, or it has started anew: what it was asked is lost
                    job.resend_at = now
                    news = True
            if news:
                self._changed.notify_all()

    def _on_did(self, device: str, payload: bytes) -> None:
        with self._changed:
            self.traffic.bytes_up += len(payload)
            try:
                did = decode_reply(payload)
            except ProtocolError:
                self.traffic.malformed += 1
                return
            job = self._by_work.get(did.id)
            if job is None:
                self.traffic.stale += 1
            elif job.device != device:
                self.traffic.malformed += 1
            elif isinstance(did, Failure):
                self._fail(job, NODE_FAILED, error_text(did))
            elif not self._fits(did):
                self.traffic.malformed += 1
            else:
                self._add(job, did, payload)

    def _fits(self, did: Success) -> bool:
        """Whether this can be a part of a reply of this program: bounded, and inside its parameters."""
        size = self.program.n_params
        match did.update:
            case Dense(offset=offset, values=values):
                inside = offset + len(values) <= size
            case Sparse(indices=indices):
                inside = len(indices) == 0 or int(indices[-1]) < size
            case None:
                inside = True
        return inside and did.parts <= size + 1 and (did.part != 0 or did.metrics is not None)

    def _add(self, job: _Job, did: Success, payload: bytes) -> None:
        held = job.parts.get(did.part)
        if held is not None and held[1] == payload:
            self.traffic.stale += 1
            return
        if held is not None or any(part.parts != did.parts for part, _ in job.parts.values()):
            job.parts.clear()  # the device has started anew, and learned something else
        job.parts[did.part] = (did, payload)
        if len(job.parts) == did.parts:
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        parts = [job.parts[n][0] for n in range(len(job.parts))]
        metrics = parts[0].metrics
        assert metrics is not None  # _fits saw to it
        if job.train_task.update is not None and all(part.update is None for part in parts):
            return self._fail(job, NODE_FAILED, "replied without an update")
        vector = apply_update(job.broadcast.weights.vector, parts)
        if not (np.isfinite(vector).all() and math.isfinite(metrics.loss) and math.isfinite(metrics.query_loss)):
            return self._fail(job, NODE_FAILED, "replied with numbers that are not finite")
        size = sum(len(payload) for _, payload in job.parts.values())
        said = to_metrics(metrics, job.train_task.kind, size, self.program)
        content = RecordDict({"metrics": said})
        if job.train_task.kind == "train":
            content["arrays"] = vector_to_arrays(vector, self.program, job.broadcast.weights.record)
        job.reply = Message(content, reply_to=job.message)
        form = _encoding(parts[0].update)
        self._close_job(job, RoundEvent("replied", job.server_round, job.device, metrics=said, encoding=form))

    def _fail(self, job: _Job, code: int, reason: str) -> None:
        if job.reply is None:
            job.reply = Message(Error(code, f"{job.device}: {reason}"), reply_to=job.message)
            self._close_job(job, RoundEvent("lost", job.server_round, job.device, reason))

    def _close_job(self, job: _Job, event: RoundEvent) -> None:
        del self._by_work[job.train_task.id]
        job.parts.clear()
        job.ended = event
        self._changed.notify_all()

    def _tell(self) -> None:
        with self._changed:
            events, self._events = self._events, []
        if self._on_event is not None:
            for event in events:
                self._on_event(event)


def _encoding(update: Dense | Sparse | None) -> str | None:
    """How an update's numbers travel: "sparse f16"."""
    if update is None:
        return None
    return f"{'dense' if isinstance(update, Dense) else 'sparse'} {'f16' if update.half else 'f32'}"


class CompositeGrid(Grid):
    """Several grids as one: microcontrollers over MQTT beside Raspberry Pis that run a SuperNode, say.

    A node belongs to the grid that offers it. The run is the first grid's. Rounds run on all grids at the same time.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        if not grids:
            raise ValueError("a CompositeGrid needs a grid")
        self._grids = list(grids)
        self._owner: dict[int, Grid] = {}  # by node id
        self._sent: dict[str, Grid] = {}  # by message id

    def set_run(self, run: Run) -> None:
        """Sets the run of every grid."""
        for grid in self._grids:
            grid.set_run(run)

    @property
    def run(self) -> Run:
        """The first grid's run record."""
        return self._grids[0].run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes of all grids. ValueError if two grids offer the same."""
        owner: dict[int, Grid] = {}
        for grid in self._grids:
            for node in grid.get_node_ids():
                if owner.setdefault(node, grid) is not grid:
                    raise ValueError(f"two grids have a node {node}")
        self._owner |= owner
        return sorted(owner)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Pushes each message to the grid of its node."""
        ids = []
        for grid, part in self._split(messages):
            pushed = list(grid.push_messages(part))
            self._sent |= dict.fromkeys(pushed, grid)
            ids += pushed
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that are there, of all grids."""
        wanted = list(message_ids)
        replies = []
        for grid in self._grids:
            mine = [i for i in wanted if self._sent.get(i) is grid]
            replies += list(grid.pull_messages(mine)) if mine else []
        for reply in replies:
            self._sent.pop(reply.metadata.reply_to_message_id, None)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Every grid's replies to its messages."""
        parts = self._split(messages)
        with ThreadPoolExecutor(max_workers=max(len(parts), 1)) as pool:
            replies = pool.map(lambda part: list(part[0].send_and_receive(part[1], timeout=timeout)), parts)
            return [reply for grid_replies in replies for reply in grid_replies]

    def _split(self, messages: Iterable[Message]) -> list[tuple[Grid, list[Message]]]:
        parts: dict[int, tuple[Grid, list[Message]]] = {}
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self._owner:
                self.get_node_ids()
            if node not in self._owner:
                raise ValueError(f"no grid has a node {node}")
            grid = self._owner[node]
            parts.setdefault(id(grid), (grid, []))[1].append(message)
        return list(parts.values())
