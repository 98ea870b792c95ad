"""The node of a device that runs Python, a Raspberry Pi say: what mote_node.c does, over any Learner.

It answers the same orders with the same replies; with the C engine as its learner, to the bit.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge._mote import lib
from tinyfleet.edge.device.drift import DriftResponse, OnlineLearner
from tinyfleet.edge.device.node import (
    NOT_FOR_FLEETS,
    OUT_BYTES,
    PROGRAM_BYTES,
    NodeCounters,
    Out,
    Publish,
    Reboot,
    Subscribe,
    Unsubscribe,
)
from tinyfleet.edge.device.sources import Sample, Stream
from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.learner import Learner, LearnerError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.protocol import (
    ALL_LAYERS,
    CHUNK,
    MAX_CHUNKS,
    Assembly,
    Command,
    Dense,
    ErrorCode,
    Failure,
    Metrics,
    Phase,
    ProtocolError,
    Sparse,
    Status,
    Success,
    Topics,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    decode_chunk,
    decode_command,
    encode,
    varint_sizes,
)

RECENT = 8  # orders remembered, so that a late double of one is known
HEAD = 72  # bytes of a reply besides its update's values, at most
HALF_LIMIT = 65520.0  # the least number that f16 rounds to infinity

_CHUNK_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")

Vector = NDArray[np.float32]


class MaskedLearner(Learner, Protocol):
    """A learner of whose layers some can be held fixed, as MoteLearner and LiteRTLearner are."""

    @property
    def mask(self) -> int:
        """Which layers train now: bit i is the i-th layer with parameters."""
        ...

    @mask.setter
    def mask(self, layers: int) -> None: ...


class OnlineLearning(NamedTuple):
    """How a device learns for itself: from which stream, at what rate, and what it does about drift."""

    stream: Stream
    rate: float
    drift_response: DriftResponse | None = DriftResponse()


class _State(Enum):
    IDLE = auto()
    WANT_WEIGHTS = auto()
    WANT_PROGRAM = auto()
    LEARN = auto()
    QUERY = auto()
    DONE = auto()


class AgentNode:
    """See edge.node.Node."""

    def __init__(
        self,
        fleet: str,
        id: str,
        td: Mapping[str, Any],
        program: Program,
        stream: Stream,
        make: Callable[[Program], MaskedLearner],
        *,
        model_slot_bytes: int = PROGRAM_BYTES,
        out_bytes: int = OUT_BYTES,
        online: OnlineLearning | None = None,
    ) -> None:
        """`td` is its Thing Description. `make` gives the learner for a program: this one now, another when the
        model is updated. model_slot_bytes: the largest program it accepts (0: none). online: what it learns by itself,
        between commands, from each round's weights on."""
        self.id = id
        self._topics = Topics(fleet)
        self._command_topic = self._topics.do(id)
        self._td = json.dumps(td).encode()
        self._builtin = program
        self._stream = stream
        self._make = make
        self._model_slot_bytes = model_slot_bytes
        self._out_bytes = out_bytes
        self._online_settings = online
        self._online: OnlineLearner | None = None
        self._base: Vector
        self._train_task: TrainTask
        self._load(program)
        self._malformed = self._stale = self._samples = 0
        self._announce = self._status_changed = False
        self._unsubscribe: str | None = None
        self._subscribe = False
        self._rejection: Failure | None = None
        self._reply: Iterator[Success | Failure] = iter(())
        self._restart = False
        self._recent = [0] * RECENT
        self._state = _State.IDLE
        self._command: Command | None = None
        self._round: tuple[int, int] | None = None
        self._filter = ""
        self._assembly = Assembly(0)
        self._update: UpdateFormat | None = None
        self._measured = False
        self._error: Failure | None = None
        self._at_phase = self._at_step = 0
        self._learned = self._queried = self._correct = 0
        self._loss = self._query_loss = np.float32(0)

    # Node

    @property
    def counters(self) -> NodeCounters:
        """See Node."""
        return NodeCounters(self._malformed, self._stale, self._samples)

    @property
    def model(self) -> bytes:
        """See Node."""
        return self._program.model_id

    def connected(self) -> None:
        """See Node."""
        self._announce = self._status_changed = True
        self._unsubscribe = None
        self._subscribe = self._wants_chunks()

    def will(self) -> Publish:
        """See Node."""
        return self._status(online=False)

    def receive(self, topic: str, payload: bytes) -> None:
        """See Node."""
        if topic == self._command_topic:
            self._receive_do(payload)
        elif self._wants_chunks() and topic.startswith(self._filter[:-1]):
            self._receive_chunk(topic[len(self._filter) - 1 :], payload)
        else:
            self._stale += 1  # of something that was left in the meantime

    def step(self) -> bool:
        """See Node."""
        if self._state is _State.LEARN:
            while (
                self._at_phase < len(self._train_task.phases)
                and self._at_step >= self._train_task.phases[self._at_phase].steps
            ):
                self._at_phase, self._at_step = self._at_phase + 1, 0
                if self._update is not None and self._at_phase == self._update.since:
                    self._base = self._learner.parameters
            if self._at_phase == len(self._train_task.phases):
                self._state = _State.QUERY
        try:
            if self._state is _State.LEARN:
                if not self._learn():
                    return False
            elif self._state is _State.QUERY and self._queried < self._train_task.query:
                if not self._score():
                    return False
            elif self._state is _State.QUERY:
                update = self._update
                fine = update is None or (self._update_is_finite(update) and (not update.clip or self._clip(update)))
                self._finish(None if fine else ErrorCode.DIVERGED)
        except LearnerError as error:
            diverged = error.code == lib.MOTE_ERR_DIVERGED
            self._finish(ErrorCode.DIVERGED if diverged else ErrorCode.ENGINE, 0 if diverged else error.code)
        return self._state in (_State.LEARN, _State.QUERY) or self._learn_online()

    def poll(self) -> Iterator[Out]:
        """See Node."""
        if self._announce:
            self._announce = False
            yield Subscribe(self._command_topic)
            yield Publish(self._topics.td(self.id), self._td, True)
        if self._status_changed:
            self._status_changed = False
            yield self._status(online=True)
        if self._unsubscribe is not None:
            left, self._unsubscribe = self._unsubscribe, None
            yield Unsubscribe(left)
        if self._subscribe:
            self._subscribe = False
            yield Subscribe(self._filter)
        if self._rejection is not None:
            rejection, self._rejection = self._rejection, None
            yield Publish(self._topics.did(self.id), encode(rejection), False)
        for part in self._reply:
            yield Publish(self._topics.did(self.id), encode(part), False)
        if self._restart:
            self._restart = False
            yield Reboot()

    def _status(self, online: bool) -> Publish:
        drift = self._online.drift if self._online is not None else None
        status = Status(online, self.model, self._samples, self._malformed, self._stale, drift=drift)
        return Publish(self._topics.status(self.id), encode(status), True)

    # Orders

    def _load(self, program: Program) -> None:
        """Raises LearnerError, and then runs what it ran before."""
        learner = self._make(program)
        if program.input.dtype != "float32" or program.trains_int8 or program.loss is None:
            raise LearnerError(NOT_FOR_FLEETS, lib.MOTE_ERR_UNSUPPORTED)
        if _sample_sizes(program) != _sample_sizes(self._builtin):
            raise LearnerError("this program takes other samples than this device has", lib.MOTE_ERR_ARGUMENT)
        self._program, self._learner = program, learner
        self._base = np.zeros(0, np.float32)  # until a round has brought some
        if self._online_settings is not None:
            stream, rate, drift_response = self._online_settings
            stream.open(0)
            nothing = np.zeros(program.n_params, np.float32)
            self._online = OnlineLearner(self._make(program), program, nothing, rate, drift_response)
        self._trainable = (1 << sum(layer.trainable for layer in program.layers)) - 1

    def _wants_chunks(self) -> bool:
        return self._state in (_State.WANT_WEIGHTS, _State.WANT_PROGRAM)

    def _receive_do(self, payload: bytes) -> None:
        try:
            command = decode_command(payload)
        except ProtocolError:
            self._malformed += 1
            return
        crc = zlib.crc32(payload)
        if self._state is not _State.IDLE and crc == self._recent[0]:
            if self._wants_chunks():
                self._subscribe = True  # the retained chunks come again, with them those that were lost
            elif self._state is _State.DONE:
                self._reply = self._parts()
            else:
                self._stale += 1
        elif crc in self._recent:
            self._stale += 1
        elif isinstance(command, TrainTask):
            self._take_work(crc, command)
        elif isinstance(command, UpdateModel):
            self._begin_model_update(crc, command)
        else:
            self._begin(crc, command, _State.DONE)
            self._finish()
            self._restart = True

    def _begin(self, crc: int, command: Command, state: _State) -> None:
        """Drops what the node was at, and begins another order."""
        self._leave_chunks()
        self._reply = iter(())
        self._recent = [crc, *self._recent[:-1]]
        self._state = state
        self._command = command
        self._update = None
        self._measured = False

    def _leave_chunks(self) -> None:
        if self._wants_chunks():
            self._unsubscribe = self._filter
        self._subscribe = False

    def _want_chunks(self, filter: str, size: int) -> None:
        self._filter = filter
        self._assembly = Assembly(size)
        self._subscribe = True

    def _take_work(self, crc: int, train_task: TrainTask) -> None:
        density = 1.0 if train_task.update is None else train_task.update.density
        if not 0.0 < density <= 1.0:
            self._malformed += 1
        elif self._round is not None and train_task.run == self._round[0] and train_task.round < self._round[1]:
            self._stale += 1
        elif train_task.model != self.model:
            self._rejection = Failure(train_task.id, ErrorCode.WRONG_MODEL)
        elif self._program.n_params * 4 > CHUNK * MAX_CHUNKS:
            self._rejection = Failure(train_task.id, ErrorCode.CAPACITY)
        elif not _makes_sense(train_task):
            self._rejection = Failure(train_task.id, ErrorCode.ENGINE, lib.MOTE_ERR_ARGUMENT)
        elif any(p.layers != ALL_LAYERS and p.layers & ~self._trainable for p in train_task.phases):
            self._rejection = Failure(train_task.id, ErrorCode.ENGINE, lib.MOTE_ERR_FROZEN)
        else:
            self._begin(crc, train_task, _State.WANT_WEIGHTS)
            self._train_task = train_task
            self._round = (train_task.run, train_task.round)
            self._update = train_task.update if train_task.kind == "train" else None
            self._want_chunks(self._topics.weights(train_task.run, train_task.round), self._program.n_params * 4)
            if self._assembly.complete:
                self._start_learning()

    def _begin_model_update(self, crc: int, update_command: UpdateModel) -> None:
        if update_command.model == self.model:
            self._begin(crc, update_command, _State.DONE)
            self._finish()
        elif not 0 < update_command.size <= min(self._model_slot_bytes, CHUNK * MAX_CHUNKS):
            self._rejection = Failure(update_command.id, ErrorCode.CAPACITY)
        else:
            self._begin(crc, update_command, _State.WANT_PROGRAM)
            if self._program is not self._builtin:  # as a microcontroller must, whose buffer is overwritten
                self._load(self._builtin)
                self._status_changed = True
            self._update_command = update_command
            self._want_chunks(self._topics.program(update_command.model), update_command.size)

    # Chunks

    def _receive_chunk(self, number: str, payload: bytes) -> None:
        if not payload:  # cleared: the round is over
            self._stale += 1
            return
        try:
            chunk = decode_chunk(payload)
            if not _CHUNK_NUMBER.fullmatch(number) or chunk.offset != int(number) * CHUNK:
                raise ProtocolError("the chunk does not belong to its topic")
            new = self._assembly.add(chunk)
        except ProtocolError:
            self._malformed += 1
            return
        if not new:
            self._stale += 1
        elif self._assembly.complete and self._state is _State.WANT_WEIGHTS:
            self._start_learning()
        elif self._assembly.complete:
            self._start_program()

    def _start_learning(self) -> None:
        self._leave_chunks()
        self._measured = True
        self._at_phase = self._at_step = 0
        self._learned = self._queried = self._correct = 0
        self._loss = self._query_loss = np.float32(0)
        self._base = np.frombuffer(self._assembly.data(), "<f4").astype(np.float32)
        if not np.isfinite(self._base).all():
            self._finish(ErrorCode.DIVERGED)
            return
        self._learner.set_parameters(self._base)
        if self._online is not None:
            self._online.set_initialization(self._base)
        self._state = _State.LEARN
        try:
            self._stream.open(self._train_task.seed)
        except ValueError:
            self._finish(ErrorCode.SAMPLES, lib.MOTE_ERR_ARGUMENT)

    def _start_program(self) -> None:
        self._leave_chunks()
        data = self._assembly.data()
        if zlib.crc32(data) != self._update_command.crc:
            self._finish(ErrorCode.PROGRAM, lib.MOTE_ERR_CRC)
            return
        try:
            self._load(Program.parse(data))
            self._finish()
        except ProgramError:
            self._finish(ErrorCode.PROGRAM, lib.MOTE_ERR_FORMAT)
        except LearnerError as error:
            self._finish(ErrorCode.PROGRAM, error.code)

    # Work

    def _learn(self) -> bool:
        sample = self._stream.next(query=False)
        if sample is None:
            return False
        phase = self._train_task.phases[self._at_phase]
        self._learner.mask = self._trainable if phase.layers == ALL_LAYERS else phase.layers
        if phase.proximal_mu > 0:
            self._loss += self._learn_pulled(sample, phase)
        else:
            self._loss += np.float32(self._learner.learn(*sample, phase.rate))
        self._learned += 1
        self._samples += 1
        self._at_step += 1
        return True

    def _learn_online(self) -> bool:
        """Learns from one sample for itself. False if there is none, or if there is something to say first."""
        if self._online is None or self._online_settings is None or len(self._base) == 0:
            return False
        sample = self._online_settings.stream.next(query=False)
        if sample is None:
            return False
        before = self._online.drift
        self._online.learn(*sample)
        self._samples += 1
        # Said when drift is noticed, and when it is over: what lies between is nobody's news. At once, as it falls.
        news = (before == 0) != (self._online.drift == 0)
        self._status_changed |= news
        return not news

    def _learn_pulled(self, sample: Sample, phase: Phase) -> np.float32:
        """FedProx's step, as learn_one in mote_node.c takes it. The loss."""
        kept = np.float32(1) - np.float32(phase.rate) * np.float32(phase.proximal_mu)
        loss = np.float32(self._learner.learn(*sample, float(np.float32(phase.rate) / kept)))
        learned, has_proximal_term = self._learner.parameters, self._program.in_layers(self._learner.mask)
        learned[has_proximal_term] = self._base[has_proximal_term] + kept * (
            learned[has_proximal_term] - self._base[has_proximal_term]
        )
        self._learner.set_parameters(learned)
        return loss

    def _clip(self, update: UpdateFormat) -> bool:
        """Scales the shared changes down to a norm of at most update.clip, as mote_update_clip does: False, and nothing
        is scaled, if the norm is beyond the range of floats."""
        learned, shared = self._learner.parameters, self._program.in_layers(update.shared)
        with np.errstate(over="ignore"):
            changes = learned[shared] - self._base[shared]
            squares = np.cumsum(changes * changes, dtype=np.float32)  # one after the other, as C adds them up
        norm = np.sqrt(squares[-1]) if len(squares) else np.float32(0)
        if not np.isfinite(norm):
            return False
        if norm > np.float32(update.clip):
            learned[shared] = self._base[shared] + np.float32(update.clip) / norm * changes
            self._learner.set_parameters(learned)
        return True

    def _score(self) -> bool:
        sample = self._stream.next(query=True)
        if sample is None:
            return False
        self._query_loss += np.float32(self._learner.loss(*sample))
        self._queried += 1
        if self._program.loss == "softmax_cross_entropy":
            self._correct += int(np.argmax(self._learner.infer(sample[0]))) == sample[1]
        return True

    def _finish(self, error: ErrorCode | None = None, detail: int = 0) -> None:
        assert self._command is not None
        self._state = _State.DONE
        self._error = None if error is None else Failure(self._command.id, error, detail)
        self._status_changed = True
        self._reply = self._parts()

    def _update_is_finite(self, update: UpdateFormat) -> bool:
        sent = self._learner.parameters
        if _sends_changes(update):
            sent = sent - self._base
        magnitude = np.abs(sent[self._program.in_layers(update.shared)])
        return bool((magnitude < HALF_LIMIT if update.half else np.isfinite(magnitude)).all())

    def _parts(self) -> Iterator[Success | Failure]:
        """The reply to the order that is done."""
        if self._error is not None:
            return iter((self._error,))
        assert self._command is not None
        metrics = None
        if self._measured:
            metrics = Metrics(
                self._learned,
                float(self._loss / np.float32(max(self._learned, 1))),
                self._queried,
                self._correct,
                float(self._query_loss / np.float32(max(self._queried, 1))),
                self._program.arena_bytes,
            )
        updates: list[Dense | Sparse | None] = [None]
        if self._update is not None:
            parameters, shared = self._learner.parameters, self._program.in_layers(self._update.shared)
            room = self._out_bytes - HEAD
            if self._update.density < 1.0:
                updates = [*sparse_update(parameters - self._base, shared, self._update, room)]
            elif _sends_changes(self._update):
                changes = dense_update(parameters - self._base, shared, self._update, room)
                updates = [replace(dense, change=True) for dense in changes]
            else:
                updates = [*dense_update(parameters, shared, self._update, room)]
        return iter(
            [
                Success(self._command.id, part, len(updates), None if part else metrics, update)
                for part, update in enumerate(updates)
            ]
        )


def _sample_sizes(program: Program) -> tuple[int, int]:
    """Numbers of one input and of one target."""
    targets = 1 if program.loss == "softmax_cross_entropy" else math.prod(program.output_shape)
    return math.prod(program.input_shape), targets


def _sends_changes(update: UpdateFormat) -> bool:
    return update.density < 1.0 or update.since > 0


def _makes_sense(train_task: TrainTask) -> bool:
    """Whether the pulls, the base and the clipping that work asks for go together."""
    proximal_terms = [(np.float32(phase.rate), np.float32(phase.proximal_mu)) for phase in train_task.phases]
    with np.errstate(over="ignore", invalid="ignore"):
        if not all(
            proximal_mu >= 0 and (proximal_mu == 0 or rate * proximal_mu < 1) for rate, proximal_mu in proximal_terms
        ):
            return False
    if train_task.kind != "train" or train_task.update is None:
        return True
    since, has_proximal_term = train_task.update.since, any(proximal_mu > 0 for _, proximal_mu in proximal_terms)
    return train_task.update.clip >= 0 and (since == 0 or (since < len(train_task.phases) and not has_proximal_term))


def dense_update(parameters: Vector, shared: NDArray[np.bool_], update: UpdateFormat, room: int) -> Iterator[Dense]:
    """The shared parameters' values, in parts of at most `room` bytes of values."""
    size = room // (2 if update.half else 4)
    edges = np.flatnonzero(np.diff(shared, prepend=False, append=False)).reshape(-1, 2)
    for first, end in edges.tolist() or [(0, 0)]:
        for offset in range(first, max(end, first + 1), size):
            yield Dense(offset, parameters[offset : min(offset + size, end)], update.half)


def sparse_update(changes: Vector, shared: NDArray[np.bool_], update: UpdateFormat, room: int) -> Iterator[Sparse]:
    """The largest changes of the shared parameters, in parts of at most `room` bytes of gaps and values.

    Exactly ceil(top * shared) of them, or all that are not 0 if those are fewer; among equals the first.
    """
    magnitude = np.where(shared, np.abs(changes), np.float32(0))
    k = max(1, int(np.ceil(np.float32(update.density) * np.float32(shared.sum()))))
    largest = np.argsort(-magnitude, kind="stable")[:k]
    indices = np.sort(largest[magnitude[largest] > 0]).astype(np.uint32)
    return sparse_parts(indices, changes, update, room)


def sparse_parts(indices: NDArray[np.uint32], changes: Vector, update: UpdateFormat, room: int) -> Iterator[Sparse]:
    """The changes at these indices, which rise, in parts of at most `room` bytes of gaps and values."""
    size = 2 if update.half else 4
    first = 0
    while True:
        gaps = varint_sizes(np.diff(indices[first:].astype(np.int64), prepend=-1) - 1)
        count = int(np.searchsorted(np.cumsum(gaps + size), room, side="right"))
        part = indices[first : first + count]
        yield Sparse(part, changes[part], update.half)
        first += count
        if first >= len(indices):
            return
