"""The device node: messages in, messages out, one sample a step. mote_node.c, for Python.

Where samples come from and what learns are callbacks of the C node; Python may supply both.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.sources import DatasetStream, Stream
from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.errors import ProgramError, UserError
from tinyfleet.edge.model.learner import Learner, LearnerError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.chunks import CHUNK, MAX_CHUNKS
from tinyfleet.edge.wire.keys import Keys
from tinyfleet.edge.wire.messages import ResetReason
from tinyfleet.edge.wire.topics import Topics

log = logging.getLogger(__name__)

OUT_BYTES = 8192
"""Room for one outgoing payload: a larger update goes in parts."""
ARENA_BYTES = 65_536
PROGRAM_BYTES = 65_536

NOT_FOR_FLEETS = (
    "a fleet's node takes a program with a float32 input, a loss, and parameters that train as float32; build one of "
    "these, or train this one with a MoteLearner"
)

Vector = NDArray[np.float32]


class MaskedLearner(Learner, Protocol):
    """A learner of whose layers some can be held fixed, as MoteLearner and LiteRTLearner are."""

    @property
    def mask(self) -> int:
        """Which layers train now: bit i is the i-th layer with parameters."""
        ...

    @mask.setter
    def mask(self, layers: int) -> None: ...


class Store(Protocol):
    """What keeps a node's records through a reset, as FileStore does. Errors: OSError."""

    def get(self, key: int) -> bytes | None:
        """The record under this key."""
        ...

    def set(self, key: int, data: bytes) -> None:
        """Write a record, in full or not at all. Without data: remove it."""
        ...


def wall_clock() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class NodeCounters(NamedTuple):
    """What a node has counted since the start.

    Parameters
    ----------
    malformed
        Messages that did not decode or did not fit.
    stale
        Messages that were repeated, reordered, or of a round that is over.
    samples
        Samples learned from.
    refused
        Commands that were not authentic, not fresh or not allowed.
    """

    malformed: int
    stale: int
    samples: int
    refused: int


class Publish(NamedTuple):
    """Publish this."""

    topic: str
    payload: bytes
    retain: bool


class Subscribe(NamedTuple):
    """Subscribe to this."""

    filter: str


class Unsubscribe(NamedTuple):
    """Unsubscribe from this."""

    filter: str


class Reboot(NamedTuple):
    """Start again, from the built-in program."""


Out = Publish | Subscribe | Unsubscribe | Reboot


class Node:
    """A device without any I/O of its own: the code of a microcontroller's firmware. Not for two threads at once.

    Hand over every message with `receive`, call `step` while it returns True, and send what `poll` gives.

    Parameters
    ----------
    fleet, id
        As in the topics.
    td
        The Thing Description.
    program
        The built-in model.
    source
        Where samples come from.
    learner
        What learns, for a program: called for the built-in one, and for each that arrives over the air. None: the C
        engine, as on a microcontroller.
    arena_bytes
        Memory to learn in.
    model_slot_bytes
        Memory for a program over the air, twice; 0: it takes none.
    out_bytes
        Memory for one outgoing payload.
    sparse
        Whether there is memory for the copy of the parameters that sparse replies, clipping and a proximal term need.
    keys
        Whom it obeys; None: anyone who can publish.
    store
        What survives a reset; None: nothing does.
    keep_every
        With a store: the parameters are kept after every so many train tasks; 0: they are not.
    clock
        The time; None: it takes the time from the server.
    groups
        Groups whose commands it obeys, at most 4.

    Attributes
    ----------
    id
        Its name.
    skipped
        Damaged samples that it did not learn from, by itself: see AgentNode.

    Raises
    ------
    UserError
        If the samples or the memory do not fit the program, or if a fleet cannot exchange it.
    ProtocolError
        If a name is not valid.
    """

    def __init__(
        self,
        fleet: str,
        id: str,
        td: Mapping[str, Any],
        program: Program,
        source: Stream,
        *,
        learner: Callable[[Program], MaskedLearner] | None = None,
        arena_bytes: int = ARENA_BYTES,
        model_slot_bytes: int = PROGRAM_BYTES,
        out_bytes: int = OUT_BYTES,
        sparse: bool = True,
        keys: Keys | None = None,
        store: Store | None = None,
        keep_every: int = 0,
        clock: Callable[[], int] | None = wall_clock,
        groups: Sequence[str] = (),
    ) -> None:
        topics = Topics(fleet)
        topics.command(id)  # checks the names, as the next line does
        if len([topics.group_command(group) for group in groups]) > lib.MOTE_GROUPS:
            raise UserError(f"a device is in at most {lib.MOTE_GROUPS} groups, not {len(groups)}")
        if isinstance(source, DatasetStream):
            source.data.check_compatible(program)
        self.id = id
        self.skipped = 0
        self._builtin = program
        self._node: Any = ffi.new("mote_node_t *")
        self._out: Any = ffi.new("mote_out_t *")
        config: Any = ffi.new("mote_node_config_t *")
        self._keep: list[Any] = []  # all that the C code points to

        def keep(value: Any) -> Any:
            self._keep.append(value)
            return value

        def memory(dtype: type, count: int) -> Any:
            """Zeros that take no physical memory until they are written to."""
            return keep(ffi.from_buffer(keep(np.zeros(count, dtype))))

        description = json.dumps(td).encode()
        config.fleet = keep(ffi.new("char[]", fleet.encode()))
        config.id = keep(ffi.new("char[]", id.encode()))
        config.td, config.td_size = keep(ffi.new("char[]", description)), len(description)
        config.program, config.program_size = keep(ffi.from_buffer(program.data)), len(program.data)
        config.model = program.model_id
        config.arena, config.arena_size = memory(np.uint32, arena_bytes // 4), arena_bytes // 4 * 4
        if sparse:
            config.base_count = min(arena_bytes, CHUNK * MAX_CHUNKS) // 4
            config.base = ffi.cast("float *", memory(np.float32, config.base_count))
        if model_slot_bytes:
            for slot in range(2):
                config.model_slot[slot] = ffi.cast("uint8_t *", memory(np.uint32, model_slot_bytes // 4))
            config.model_slot_size = model_slot_bytes // 4 * 4
        config.out, config.out_size = keep(ffi.new("uint8_t[]", out_bytes)), out_bytes
        inputs = math.prod(program.input_shape)
        classes = program.loss == "softmax_cross_entropy"
        sample: Vector = np.zeros(inputs + (1 if classes else math.prod(program.output_shape)), np.float32)
        config.sample, config.sample_count = keep(ffi.from_buffer("float[]", sample)), len(sample)
        self._callbacks = _Callbacks(sample[:inputs], sample[inputs:], source, learner, store, clock)
        self._callbacks.fill(config)
        config.keep_every, config.nonce = keep_every, secrets.token_bytes(lib.MOTE_NONCE)
        for at, group in enumerate(groups):
            config.groups[at] = keep(ffi.new("char[]", group.encode()))
        if keys is not None:
            config.keys = keep(_c_keys(keys))
            config.verify.verify = lib.mote_ed25519_verify
        error = lib.mote_node_init(self._node, config)
        self._callbacks.raise_error()
        if error != lib.MOTE_OK and self._callbacks.learner_error is not None:
            raise self._callbacks.learner_error
        if error == lib.MOTE_ERR_ARENA:
            raise UserError(
                f"the model needs {program.arena_bytes} bytes to learn in and the device has {arena_bytes}; take a "
                "smaller model, or a device with more memory"
            )
        if error == lib.MOTE_ERR_UNSUPPORTED:
            raise UserError(NOT_FOR_FLEETS)
        if error != lib.MOTE_OK:
            raise UserError(f"the node can't start: the engine failed with {error_name(error)}")

    @property
    def counters(self) -> NodeCounters:
        """What it has counted since the start."""
        c = self._node.counters
        return NodeCounters(c.malformed, c.stale, c.samples, c.refused)

    @property
    def model(self) -> bytes:
        """The id of the program that runs."""
        return bytes(self._node.model)

    @property
    def program(self) -> Program:
        """The program that runs."""
        if self.model == self._builtin.model_id:
            return self._builtin
        return Program.parse(bytes(ffi.buffer(self._node.mote.program, self._node.program_size)))

    @property
    def rounds(self) -> int:
        """Rounds whose parameters have arrived since the start."""
        return int(self._node.rounds)

    @property
    def parameters(self) -> Vector:
        """A copy of the parameters: the round's once they have arrived, until `step` learns."""
        count = ffi.new("size_t *")
        values = lib.mote_parameters(ffi.addressof(self._node, "mote"), count)
        return np.frombuffer(ffi.buffer(values, 4 * count[0]), np.float32).copy()

    def connected(self) -> None:
        """Announce the device and subscribe again: the session with the broker is new."""
        lib.mote_node_connected(self._node)

    def will(self) -> Publish:
        """What the session must leave as its will."""
        lib.mote_node_will(self._node, self._out)
        return self._publish()

    def receive(self, topic: str, payload: bytes) -> None:
        """Take a message that has arrived."""
        name = topic.encode()
        lib.mote_node_receive(self._node, name, len(name), payload, len(payload))
        self._callbacks.raise_error()

    def step(self) -> bool:
        """Learn from, or score, one sample. Other threads run meanwhile.

        Returns
        -------
        bool
            False if there is nothing more to do until a message or a sample arrives.
        """
        busy = bool(lib.mote_node_step(self._node))
        self._callbacks.raise_error()
        return busy

    def poll(self) -> Iterator[Out]:
        """What there is to send now."""
        while lib.mote_node_poll(self._node, self._out):
            kind = self._out.kind
            if kind == lib.MOTE_SUBSCRIBE:
                yield Subscribe(ffi.string(self._out.topic).decode())
            elif kind == lib.MOTE_UNSUBSCRIBE:
                yield Unsubscribe(ffi.string(self._out.topic).decode())
            elif kind == lib.MOTE_REBOOT:
                yield Reboot()
            else:
                yield self._publish()

    def keep_parameters(self) -> None:
        """Keep the parameters as they are now for the next start, if there is a store.

        Raises
        ------
        UserError
            If the store cannot keep them.
        """
        if error := lib.mote_node_keep_weights(self._node):
            raise UserError(f"the parameters can't be kept: {error_name(error)}")

    def observe(self, loss: float) -> bool:
        """Count a sample that its owner has learned from, or scored, for the trial of a program.

        Returns
        -------
        bool
            False: the program has failed on trial, and the one before runs.
        """
        return not lib.mote_node_observe(self._node, loss)

    def set_reset_reason(self, reason: ResetReason) -> None:
        """Report in the status why it started."""
        self._node.config.reset = reason

    def set_drift(self, drift: float) -> None:
        """Report drift in the status, 0 to 1, which is sent where drift begins or ends."""
        lib.mote_node_set_drift(self._node, drift)

    def set_battery(self, level: float) -> None:
        """Report the battery's level in the status, 0 to 1, from the next one that is sent on."""
        lib.mote_node_set_battery(self._node, level)

    def _publish(self) -> Publish:
        out = self._out
        payload = bytes(ffi.buffer(out.payload, out.size))
        return Publish(ffi.string(out.topic).decode(), payload, out.kind == lib.MOTE_PUBLISH_RETAINED)


def _c_keys(keys: Keys) -> Any:
    """A mote_keys_t."""
    nothing = bytes(lib.MOTE_KEY)
    c = ffi.new("mote_keys_t *")
    c.command, c.current, c.next, c.root = keys.command, keys.current, keys.next or nothing, keys.root
    c.version = keys.version
    return c


class _Callbacks:
    """What the C node calls: the source, the learner if it is Python's, the clock and the store. x and y are the node's
    sample."""

    def __init__(
        self,
        x: Vector,
        y: Vector,
        source: Stream,
        make_learner: Callable[[Program], MaskedLearner] | None,
        store: Store | None,
        clock: Callable[[], int] | None,
    ) -> None:
        self.store = store
        self.clock = clock
        self._x, self._y = x, y
        self._source = source
        self._make_learner = make_learner
        self._learner: MaskedLearner
        self._classes = False
        self.learner_error: LearnerError | None = None
        self._error: BaseException | None = None
        self._handle = ffi.new_handle(self)

    def fill(self, config: Any) -> None:
        """Write them into a node's configuration."""
        if isinstance(self._source, DatasetStream):
            config.source = lib.mote_stream_source(self._source.c)
        else:
            config.source = (self._handle, lib.mote_python_open, lib.mote_python_next)
        if self._make_learner is not None:
            config.learner = (
                self._handle, lib.mote_python_load, lib.mote_python_set, lib.mote_python_get, lib.mote_python_learn,
                lib.mote_python_score,
            )  # fmt: skip
        if self.clock is not None:
            config.clock = (self._handle, lib.mote_python_now)
        if self.store is not None:
            config.keep = (self._handle, lib.mote_python_keep_get, lib.mote_python_keep_set)

    def raise_error(self) -> None:
        """Raise what a callback could not tell the C node as an error code."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def failed(self, error: BaseException) -> int:
        """The C node's error code for it."""
        if isinstance(error, LearnerError):
            self.learner_error = error
            return error.code or int(lib.MOTE_ERR_ARGUMENT)
        if isinstance(error, ProgramError):
            return int(lib.MOTE_ERR_FORMAT)
        self._error = error
        return int(lib.MOTE_ERR_ARGUMENT)

    def open(self, seed: int) -> None:
        try:
            self._source.open(seed)
        except ValueError as error:
            raise LearnerError(str(error), lib.MOTE_ERR_ARGUMENT) from error

    def next(self, query: bool) -> bool:
        sample = self._source.next(query)
        if sample is None:
            return False
        for to, values in zip((self._x, self._y), sample, strict=True):
            to[:] = np.ravel(values) if np.size(values) == len(to) else np.nan  # which no learner takes
        return True

    def load(self, program: Program) -> None:
        assert self._make_learner is not None
        self._learner = self._make_learner(program)
        self._classes = program.loss == "softmax_cross_entropy"

    def set(self, parameters: Vector) -> None:
        self._learner.set_parameters(parameters)

    def get(self, parameters: Vector) -> None:
        values = self._learner.parameters
        if np.shape(values) != parameters.shape:
            raise LearnerError(f"the learner has {np.size(values)} parameters; its program has {parameters.size}")
        parameters[:] = values

    def learn(self, rate: float, layers: int) -> float:
        self._learner.mask = layers
        return self._learner.learn(self._x, self._y, rate)

    def score(self) -> tuple[float, bool]:
        loss = self._learner.loss(self._x, self._y)
        return loss, self._classes and bool(np.argmax(self._learner.infer(self._x)) == self._y[0])


def _callback(function: Callable[..., int]) -> None:
    """Let C call it as mote_python_{name}: what it raises becomes an error code, or is kept until C has returned."""

    def call(context: Any, *arguments: Any) -> int:
        callbacks: _Callbacks = ffi.from_handle(context)
        try:
            return function(callbacks, *arguments)
        except BaseException as error:  # C code can't pass one on, not even Ctrl-C
            return callbacks.failed(error)

    ffi.def_extern(name=f"mote_python{function.__name__}")(call)


@_callback
def _open(callbacks: _Callbacks, seed: int) -> int:
    callbacks.open(seed)
    return int(lib.MOTE_OK)


@_callback
def _next(callbacks: _Callbacks, query: int, _x: Any, _y: Any) -> int:
    return callbacks.next(bool(query))


@_callback
def _load(callbacks: _Callbacks, program: Any, size: int) -> int:
    callbacks.load(Program.parse(bytes(ffi.buffer(program, size))))
    return int(lib.MOTE_OK)


@_callback
def _set(callbacks: _Callbacks, parameters: Any, count: int) -> int:
    callbacks.set(np.frombuffer(ffi.buffer(parameters, 4 * count), np.float32))
    return int(lib.MOTE_OK)


@_callback
def _get(callbacks: _Callbacks, parameters: Any, count: int) -> int:
    callbacks.get(np.frombuffer(ffi.buffer(parameters, 4 * count), np.float32))
    return int(lib.MOTE_OK)


@_callback
def _learn(callbacks: _Callbacks, _x: Any, _y: Any, rate: float, layers: int, loss: Any) -> int:
    loss[0] = callbacks.learn(rate, layers)
    return int(lib.MOTE_OK)


@_callback
def _score(callbacks: _Callbacks, _x: Any, _y: Any, loss: Any, correct: Any) -> int:
    loss[0], correct[0] = callbacks.score()
    return int(lib.MOTE_OK)


@_callback
def _keep_get(callbacks: _Callbacks, key: int, out: Any, capacity: int) -> int:
    assert callbacks.store is not None
    try:
        data = callbacks.store.get(key)
    except (OSError, UserError) as error:
        log.error("the store can't be read: %s", error)
        return int(lib.MOTE_ERR_STORE)
    if data is None or len(data) > capacity:
        return 0
    ffi.memmove(out, data, len(data))
    return len(data)


@_callback
def _keep_set(callbacks: _Callbacks, key: int, data: Any, size: int) -> int:
    assert callbacks.store is not None
    try:
        callbacks.store.set(key, bytes(ffi.buffer(data, size)) if size else b"")
    except (OSError, UserError) as error:
        log.error("the store can't keep what the device must remember: %s", error)
        return int(lib.MOTE_ERR_STORE)
    return int(lib.MOTE_OK)


@_callback
def _now(callbacks: _Callbacks) -> int:
    assert callbacks.clock is not None
    return callbacks.clock()
