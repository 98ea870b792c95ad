"""A round's parameters on the broker: published once as retained chunks, which the broker fans out to every device."""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import MAX_INLINE, Sha256
from tinyfleet.edge.wire.flower_records import arrays_to_vector, parameter_keys
from tinyfleet.edge.wire.mqtt_session import Message as MqttMessage
from tinyfleet.edge.wire.topics import Topics

Vector = NDArray[np.float32]

REMEMBERED = 4
"""Ended broadcasts that are cleared once more in a new session, as the first time may have been lost."""


@dataclass(frozen=True, eq=False)
class SentParameters:
    """The parameters that a message carries, in the forms that the grid needs."""

    record: ArrayRecord
    vector: Vector  # in the program's order
    is_flat: bool  # whether the vector is the record's arrays in their order, unconverted

    @classmethod
    def from_record(cls, record: ArrayRecord, program: Program) -> "SentParameters":
        """Raises ValueError if the arrays are not the program's."""
        in_order = parameter_keys(record, program) == list(record)
        is_float32 = all(array.dtype == "float32" for array in record.values())
        return cls(record, arrays_to_vector(record, program), in_order and is_float32)

    @cached_property
    def data(self) -> bytes:
        """The vector as it travels."""
        return self.vector.astype("<f4", copy=False).tobytes()

    @cached_property
    def is_finite(self) -> bool:
        """Whether all parameters are finite."""
        return bool(np.isfinite(self.vector).all())


@dataclass(eq=False)
class Broadcast:
    """One round's parameters, while a device may still need them."""

    parameters: SentParameters
    run: int  # numbers of the run and of the round on the wire
    number: int
    chunks: list[MqttMessage]  # none: the parameters are in the commands
    open_requests: int = 0

    @property
    def weights(self) -> bytes | Sha256:
        """What a train task says of them."""
        return Sha256.of(self.parameters.data) if self.chunks else self.parameters.data

    @property
    def clearing(self) -> list[MqttMessage]:
        """Messages that remove the chunks from the broker."""
        return [chunk._replace(payload=b"") for chunk in self.chunks]


class Broadcasts:
    """The broadcasts of one grid. Not synchronised: the caller holds a lock.

    Rounds are numbered on the wire by a counter of their own that only rises: one Flower round may broadcast twice, to
    train and to evaluate.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._numbers = itertools.count(1)
        self._current: list[Broadcast] = []
        self._ended: deque[Broadcast] = deque(maxlen=REMEMBERED)

    def add(self, run_id: int, parameters: SentParameters, devices: int) -> Broadcast:
        """A new broadcast to so many devices. The caller sends its chunks. Few parameters for one device go into its
        command."""
        run, number = run_id & 0xFFFFFFFF, next(self._numbers)
        is_inline = devices == 1 and len(parameters.data) <= MAX_INLINE
        payloads = () if is_inline else enumerate(chunks(parameters.data))
        messages = [MqttMessage(self._topics.weights(run, number, n), payload, True) for n, payload in payloads]
        self._current.append(Broadcast(parameters, run, number, messages))
        return self._current[-1]

    def end(self, broadcast: Broadcast) -> None:
        """No device needs it any more. The caller sends its `clearing`."""
        self._current.remove(broadcast)
        self._ended.append(broadcast)

    def is_current(self, broadcast: Broadcast) -> bool:
        """Whether a device may still need it."""
        return broadcast in self._current

    def current(self) -> Sequence[Broadcast]:
        """Those that a device may still need."""
        return list(self._current)

    def ended(self) -> Sequence[Broadcast]:
        """The last few that have ended."""
        return list(self._ended)
