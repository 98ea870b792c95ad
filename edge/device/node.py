"""The device node: messages in, messages out, one sample a step. The C one, as a virtual microcontroller runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError, error_name
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.protocol import Topics

ENGINE_VERSION = "0.2.0"
"""Of mote: MOTE_VERSION in mote.h."""
OUT_BYTES = 8192
"""Room for one outgoing payload: a larger update goes in parts."""
ARENA_BYTES = 65_536
PROGRAM_BYTES = 65_536

NOT_FOR_FLEETS = (
    "a fleet's node takes a program with a float32 input, a loss, and parameters that train as float32; build one of "
    "these, or train this one with a MoteLearner"
)


class NodeCounters(NamedTuple):
    """malformed: messages that did not decode or did not fit; stale: doubled, reordered, or of a round that is over;
    samples: learned from since the start."""

    malformed: int
    stale: int
    samples: int


class Publish(NamedTuple):
    topic: str
    payload: bytes
    retain: bool


class Subscribe(NamedTuple):
    filter: str


class Unsubscribe(NamedTuple):
    filter: str


class Reboot(NamedTuple):
    """Start anew, from the built-in program."""


Out = Publish | Subscribe | Unsubscribe | Reboot


class Node(Protocol):
    """What a device does, without any I/O of its own; see mote_node.h. Not for two threads at once."""

    @property
    def id(self) -> str: ...

    @property
    def counters(self) -> NodeCounters: ...

    @property
    def model(self) -> bytes:
        """The id of the program that runs."""
        ...

    def connected(self) -> None:
        """The session with the broker is new: the node announces itself and subscribes again."""
        ...

    def will(self) -> Publish:
        """What the session must leave as its will."""
        ...

    def receive(self, topic: str, payload: bytes) -> None:
        """A message has arrived."""
        ...

    def step(self) -> bool:
        """Learns from, or scores, one sample. False: nothing more to do until a message or a sample arrives."""
        ...

    def poll(self) -> Iterator[Out]:
        """What to send now; to be used up after each of the calls above."""
        ...


class MoteNode:
    """mote_node.c with the samples of `data`: the same code as in a microcontroller's firmware. See Node."""

    def __init__(
        self,
        fleet: str,
        id: str,
        td: Mapping[str, Any],
        program: Program,
        data: ClientData,
        *,
        arena_bytes: int = ARENA_BYTES,
        model_slot_bytes: int = PROGRAM_BYTES,
        out_bytes: int = OUT_BYTES,
        sparse: bool = True,
    ) -> None:
        """`td` is its Thing Description. arena_bytes: memory to learn in; model_slot_bytes: room for a program over the
        air (0: none is adopted); out_bytes: room for one payload; sparse: whether there is room for the copy of the
        weights that sparse replies need. Raises UserError; ProtocolError for a bad name; ValueError for samples that
        can't give a task.
        """
        Topics(fleet).do(id)  # checks the names,
        DatasetStream(data)  # and this the data
        self.id = id
        data.check_compatible(program)
        description = json.dumps(td).encode()
        self._node: Any = ffi.new("mote_node_t *")
        self._stream: Any = ffi.new("mote_stream_t *")
        self._out: Any = ffi.new("mote_out_t *")
        config: Any = ffi.new("mote_node_config_t *")
        self._keep: list[Any] = []  # all that the C code points to

        def keep(value: Any) -> Any:
            self._keep.append(value)
            return value

        if data.features.dtype == np.uint8:
            self._stream.features = keep(ffi.from_buffer("uint8_t[]", data.features))
        else:
            self._stream.values = keep(ffi.from_buffer("float[]", data.features))
        if data.targets is not None:
            self._stream.targets = keep(ffi.from_buffer("float[]", data.targets))
            self._stream.outputs = data.targets.shape[1]
        self._stream.starts = keep(ffi.from_buffer("uint32_t[]", data.starts))
        self._stream.classes = len(data.starts) - 1
        self._stream.size = data.features.shape[1]
        self._stream.scale = data.scale
        self._stream.ways = data.ways
        self._stream.fixed = data.fixed
        config.source = lib.mote_stream_source(self._stream)
        config.fleet = keep(ffi.new("char[]", fleet.encode()))
        config.id = keep(ffi.new("char[]", id.encode()))
        config.td, config.td_size = keep(ffi.new("char[]", description)), len(description)
        config.program, config.program_size = keep(ffi.from_buffer(program.data)), len(program.data)
        config.model = program.model_id
        config.arena, config.arena_size = keep(ffi.new("uint32_t[]", arena_bytes // 4)), arena_bytes // 4 * 4
        if sparse:
            config.base, config.base_count = keep(ffi.new("float[]", arena_bytes // 4)), arena_bytes // 4
        config.sample_count = math.prod(program.input_shape) + math.prod(
            program.output_shape
        )  # a target is one class, or all outputs
        config.sample = keep(ffi.new("float[]", config.sample_count))
        if model_slot_bytes:
            model_slot = keep(ffi.new("uint32_t[]", model_slot_bytes // 4))
            config.model_slot, config.model_slot_size = ffi.cast("uint8_t *", model_slot), model_slot_bytes // 4 * 4
        config.out, config.out_size = keep(ffi.new("uint8_t[]", out_bytes)), out_bytes
        error = lib.mote_node_init(self._node, config)
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
        """See Node."""
        c = self._node.counters
        return NodeCounters(c.malformed, c.stale, c.samples)

    @property
    def model(self) -> bytes:
        """See Node."""
        return bytes(self._node.model)

    def connected(self) -> None:
        """See Node."""
        lib.mote_node_connected(self._node)

    def will(self) -> Publish:
        """See Node."""
        lib.mote_node_will(self._node, self._out)
        return self._publish()

    def receive(self, topic: str, payload: bytes) -> None:
        """See Node."""
        name = topic.encode()
        lib.mote_node_receive(self._node, name, len(name), payload, len(payload))

    def step(self) -> bool:
        """See Node. Other threads run meanwhile."""
        return bool(lib.mote_node_step(self._node))

    def poll(self) -> Iterator[Out]:
        """See Node."""
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

    def _publish(self) -> Publish:
        out = self._out
        payload = bytes(ffi.buffer(out.payload, out.size))
        return Publish(ffi.string(out.topic).decode(), payload, out.kind == lib.MOTE_PUBLISH_RETAINED)
