"""What devices say: replies and their status, as protocol.cddl describes them.

`encode` writes a message; `decode_reply` and `decode_status` read one, and raise `ProtocolError` on anything that is
not exactly such a message: their input may come from anyone. The C node's code is generated from the same
protocol.cddl. What is said to devices is in commands.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import cbor2
import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.versions import ENGINE_VERSION, PROGRAM_FORMAT, WIRE_VERSION
from tinyfleet.edge.wire.cbor import (
    Float32,
    array,
    boolean,
    dumps,
    int32,
    loads,
    octets,
    real,
    text,
    uint32,
    uint64,
)
from tinyfleet.edge.wire.errors import ProtocolError, WireVersionError

_MAX_ENGINE = 16
_FLOAT16S = 84  # RFC 8746 typed arrays, little-endian
_FLOAT32S = 85
_SUCCESS, _FAILURE = 1, 2
_DENSE, _SPARSE, _CHANGE = 1, 2, 3

Floats = NDArray[np.float32]


class ErrorCode(IntEnum):
    """Why a device could not do what the server asked for: as in the C node's node_internal.h."""

    WRONG_MODEL = 1
    """It runs another model than the train task is for."""
    PROGRAM = 2
    """The program sent over the air is damaged or not valid; detail is the engine's error."""
    CAPACITY = 3
    """Too little memory for this: a program over the air, the copy that sparse replies need, or a reply."""
    SAMPLES = 4
    """Its source can't give the samples asked for; detail is the source's error."""
    ENGINE = 5
    """The engine rejected it; detail is its error."""
    DIVERGED = 6
    """The parameters, the loss or the update are not finite (or, where f16 was asked for, are beyond its range)."""
    DOWNGRADE = 7
    """The program or the keys are no newer than what it had."""
    FAILED_TRIAL = 8
    """The program did worse on trial than its manifest allows; the device went back to the one before."""
    STORE = 9
    """Its store can't keep this; detail is the store's error."""
    DAMAGED = 10
    """The weights that arrived are not those that the command names."""
    EXPIRED = 11
    """The command expired, or another came, before it was done."""


_ERROR_TEXTS = {
    ErrorCode.WRONG_MODEL: "it runs another model than this train task is for; start it with this model, or deploy it",
    ErrorCode.PROGRAM: "the program sent to it is damaged or not valid; compile it again",
    ErrorCode.CAPACITY: "it has too little memory for this; use a smaller model, or send all changes (density 1)",
    ErrorCode.SAMPLES: "its source gave no samples; check its sensor or its data",
    ErrorCode.ENGINE: "its engine rejected it; check the rates, the layers and the samples",
    ErrorCode.DIVERGED: "its numbers left the range of floats; lower the rate",
    ErrorCode.DOWNGRADE: "it had a newer one before, and takes only newer ones; deploy it again with a higher version",
    ErrorCode.FAILED_TRIAL: "the program did worse on trial than it may, and the one before runs; train it further",
    ErrorCode.STORE: "its store is full or failed; give it a larger store, or send it a smaller model",
    ErrorCode.DAMAGED: "the weights that arrived are not those of the command; check who may write on the broker",
    ErrorCode.EXPIRED: "it had no time left to finish, or another command came; give it more time or fewer steps",
}


@dataclass(frozen=True)
class Metrics:
    """What a device measured.

    Parameters
    ----------
    samples
        Samples learned from.
    loss
        The mean over them, each before its step.
    queried, correct
        Query samples scored, and how many of them were classified right.
    query_loss
        The mean over the query samples.
    arena_bytes
        The RAM that learning took.
    """

    samples: int
    loss: float
    queried: int
    correct: int
    query_loss: float
    arena_bytes: int


@dataclass(frozen=True, eq=False)
class Dense:
    """Parameters `offset`, `offset + 1`, ...: their values, or with `change` what was added to them.

    `half` says that they travel as f16.
    """

    offset: int
    values: Floats
    half: bool = False
    change: bool = False


@dataclass(frozen=True, eq=False)
class Sparse:
    """changes[i] was added to parameter indices[i]. The indices are strictly rising."""

    indices: NDArray[np.uint32]
    changes: Floats
    half: bool = False


@dataclass(frozen=True, eq=False)
class Success:
    """Part `part` of `parts` of a reply. The metrics come with part 0, unless there is nothing to measure."""

    id: int
    part: int = 0
    parts: int = 1
    metrics: Metrics | None = None
    update: Dense | Sparse | None = None


@dataclass(frozen=True)
class Failure:
    """A reply: the command was not done. `detail` is the engine's error (mote.h) where it gave one."""

    id: int
    error: ErrorCode
    detail: int = 0


Reply = Success | Failure


class Trial(IntEnum):
    """Whether the program that a device runs is confirmed."""

    BUILT_IN = 0
    """It runs the program that it was built with."""
    ON_TRIAL = 1
    """It runs an update that is not confirmed yet; a reset would take it back."""
    CONFIRMED = 2
    """It runs an update that it will come back with after a reset."""
    ROLLED_BACK = 3
    """Its last update failed on trial; it runs the program before."""


class ResetReason(IntEnum):
    """Why a device started."""

    UNKNOWN = 0
    POWER = 1
    COMMAND = 2
    FAULT = 3
    PIN = 4


@dataclass(frozen=True)
class Status:
    """A device's state, or its will.

    Parameters
    ----------
    online
        False in the will.
    model
        The program that runs: the first 8 bytes of its SHA-256.
    samples
        Learned from since the start.
    malformed, stale
        Messages that did not decode or did not fit; that were repeated, reordered, or of a round that is over.
    battery, drift
        0 to 1; None: not known.
    program_format
        The version of the program format that the device's engine reads.
    engine
        The version of its engine, 1 to 16 characters.
    trial
        Whether its program is confirmed.
    refused
        Commands that were not authentic, not fresh or not allowed.
    boots
        Starts since its store was empty.
    reset
        Why it started.
    ceiling
        It refuses commands on its own topic whose counter is not higher.
    nonce
        8 bytes that a command must echo while the device does not know the time; None: it knows it.
    keys
        The version of the fleet's keys that it holds; 0: it was built without keys.
    """

    online: bool
    model: bytes
    samples: int = 0
    malformed: int = 0
    stale: int = 0
    battery: float | None = None
    drift: float | None = None
    program_format: int = PROGRAM_FORMAT
    engine: str = ENGINE_VERSION
    trial: Trial = Trial.BUILT_IN
    refused: int = 0
    boots: int = 0
    reset: ResetReason = ResetReason.UNKNOWN
    ceiling: int = 0
    nonce: bytes | None = None
    keys: int = 0


def error_text(failed: Failure) -> str:
    """What happened on the device and what to do, for the log and for people."""
    detail = error_name(failed.detail) if failed.detail else "no detail"
    return f"{failed.error.name.lower()} ({detail}): {_ERROR_TEXTS[failed.error]}"


# Encoding


def _numbers(values: Floats, half: bool) -> cbor2.CBORTag:
    if half:
        with np.errstate(over="ignore"):
            return cbor2.CBORTag(_FLOAT16S, np.asarray(values).astype("<f2").tobytes())
    return cbor2.CBORTag(_FLOAT32S, np.asarray(values).astype("<f4").tobytes())


def _success(m: Success) -> list[Any]:
    metrics: list[Any] | None = None
    if m.metrics is not None:
        metrics = [
            uint32(m.metrics.samples, "samples"),
            Float32(m.metrics.loss),
            uint32(m.metrics.queried, "queried"),
            uint32(m.metrics.correct, "correct"),
            Float32(m.metrics.query_loss),
            uint32(m.metrics.arena_bytes, "arena-bytes"),
        ]
    update: list[Any] | None = None
    if isinstance(m.update, Dense):
        kind = _CHANGE if m.update.change else _DENSE
        update = [kind, uint32(m.update.offset, "offset"), _numbers(m.update.values, m.update.half)]
    elif isinstance(m.update, Sparse):
        if len(m.update.indices) != len(m.update.changes):
            raise ProtocolError(f"{len(m.update.indices)} indices for {len(m.update.changes)} changes")
        update = [_SPARSE, _to_gaps(m.update.indices), _numbers(m.update.changes, m.update.half)]
    return [_SUCCESS, uint32(m.id, "id"), uint32(m.part, "part"), uint32(m.parts, "parts"), metrics, update]


def _status(m: Status) -> list[Any]:
    return [
        WIRE_VERSION,
        boolean(m.online, "online"),
        octets(m.model, "model", 8),
        uint32(m.samples, "samples"),
        uint32(m.malformed, "malformed"),
        uint32(m.stale, "stale"),
        None if m.battery is None else Float32(m.battery),
        None if m.drift is None else Float32(m.drift),
        uint32(m.program_format, "program-format"),
        text(m.engine, "engine", _MAX_ENGINE),
        int(m.trial),
        uint32(m.refused, "refused"),
        uint32(m.boots, "boots"),
        int(m.reset),
        uint64(m.ceiling, "ceiling"),
        None if m.nonce is None else octets(m.nonce, "nonce", 8),
        uint32(m.keys, "keys"),
    ]


def encode(message: Reply | Status) -> bytes:
    """Encode a device's message.

    Parameters
    ----------
    message
        A reply or a status.

    Returns
    -------
    bytes
        Its payload.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire.

    Examples
    --------
    >>> encode(Failure(7, ErrorCode.SAMPLES)).hex()
    '8402070400'
    """
    match message:
        case Success():
            fields = _success(message)
        case Failure():
            fields = [_FAILURE, uint32(message.id, "id"), int(message.error), int32(message.detail, "detail")]
        case Status():
            fields = _status(message)
    return dumps(fields)


# Decoding


def _from_numbers(value: object) -> tuple[Floats, bool]:
    if not isinstance(value, cbor2.CBORTag) or value.tag not in (_FLOAT16S, _FLOAT32S):
        raise ProtocolError("not a typed array of floats")
    half = value.tag == _FLOAT16S
    data = octets(value.value, "a typed array")
    if len(data) % (2 if half else 4):
        raise ProtocolError(f"a typed array of {len(data)} bytes ends inside a number")
    return np.frombuffer(data, "<f2" if half else "<f4").astype(np.float32), half


def _to_gaps(indices: NDArray[np.uint32]) -> bytes:
    gaps = np.diff(np.asarray(indices).astype(np.int64), prepend=-1) - 1
    if gaps.size and gaps.min() < 0:
        raise ProtocolError("indices must rise")
    if gaps.size == 0 or gaps.max() < 0x80:
        return gaps.astype(np.uint8).tobytes()
    out = bytearray()
    for gap in gaps.tolist():
        while gap >= 0x80:
            out.append(gap & 0x7F | 0x80)
            gap >>= 7
        out.append(gap)
    return bytes(out)


def _from_gaps(data: bytes) -> NDArray[np.uint32]:
    raw = np.frombuffer(data, np.uint8)
    if raw.size == 0:
        return np.empty(0, np.uint32)
    if raw[-1] & 0x80:
        raise ProtocolError("a gap is cut off")
    ends = np.flatnonzero(raw < 0x80)  # the last byte of each varint
    starts = np.concatenate(([0], ends[:-1] + 1))
    if (ends - starts).max() > 4:
        raise ProtocolError("a gap is longer than 32 bits")
    shifts = 7 * (np.arange(raw.size) - np.repeat(starts, ends - starts + 1))
    gaps = np.add.reduceat((raw & 0x7F).astype(np.int64) << shifts, starts)
    indices: NDArray[np.int64] = np.cumsum(gaps + 1) - 1
    if indices[-1] > 0xFFFFFFFF:
        raise ProtocolError("an index is larger than 32 bits")
    return np.asarray(indices, np.uint32)


def decode_reply(payload: bytes) -> Reply:
    """Decode a device's reply, or a part of it.

    Raises
    ------
    ProtocolError
        If the payload is not a reply.
    """
    fields = loads(payload)
    match uint32(fields[0], "a reply's number"):
        case 1:
            _, id, part, parts, metrics, update = array(fields, "success", 6)
            if uint32(part, "part") >= uint32(parts, "parts"):
                raise ProtocolError(f"part {part} of {parts}")
            return Success(
                uint32(id, "id"),
                part,
                parts,
                None if metrics is None else _decode_metrics(metrics),
                None if update is None else _decode_update(update),
            )
        case 2:
            _, id, error, detail = array(fields, "failure", 4)
            try:
                return Failure(uint32(id, "id"), ErrorCode(uint32(error, "error")), int32(detail, "detail"))
            except ValueError as unknown:  # no ErrorCode
                raise ProtocolError(str(unknown)) from unknown
    raise ProtocolError(f"no reply is numbered {fields[0]}")


def _decode_metrics(fields: object) -> Metrics:
    samples, loss, queried, correct, query_loss, arena_bytes = array(fields, "metrics", 6)
    return Metrics(
        uint32(samples, "samples"),
        real(loss, "loss"),
        uint32(queried, "queried"),
        uint32(correct, "correct"),
        real(query_loss, "query-loss"),
        uint32(arena_bytes, "arena-bytes"),
    )


def _decode_update(fields: object) -> Dense | Sparse:
    kind, where, numbers = array(fields, "update", 3)
    values, half = _from_numbers(numbers)
    match uint32(kind, "update"):
        case 1 | 3 as number:
            return Dense(uint32(where, "offset"), values, half, number == _CHANGE)
        case 2:
            indices = _from_gaps(octets(where, "gaps"))
            if len(indices) != len(values):
                raise ProtocolError(f"{len(indices)} indices for {len(values)} changes")
            return Sparse(indices, values, half)
    raise ProtocolError(f"no update is numbered {kind}")


def decode_status(payload: bytes) -> Status:
    """Decode a device's state, or its will.

    Raises
    ------
    WireVersionError
        If the device speaks another version of the wire. The version is a status's first element; version 1 had none,
        and began with a boolean.
    ProtocolError
        If the payload is not a status.
    """
    fields = loads(payload)
    version = 1 if type(fields[0]) is bool else uint32(fields[0], "wire")
    if version != WIRE_VERSION:
        raise WireVersionError(version, WIRE_VERSION)
    (
        _, online, model, samples, malformed, stale, battery, drift, program_format, engine,
        trial, refused, boots, reset, ceiling, nonce, keys,
    ) = array(fields, "status", 17)  # fmt: skip
    return Status(
        boolean(online, "online"),
        octets(model, "model", 8),
        uint32(samples, "samples"),
        uint32(malformed, "malformed"),
        uint32(stale, "stale"),
        None if battery is None else real(battery, "battery"),
        None if drift is None else real(drift, "drift"),
        uint32(program_format, "program-format"),
        text(engine, "engine", _MAX_ENGINE),
        Trial(_below(trial, "trial", len(Trial))),
        uint32(refused, "refused"),
        uint32(boots, "boots"),
        ResetReason(_below(reset, "reset", len(ResetReason))),
        uint64(ceiling, "ceiling"),
        None if nonce is None else octets(nonce, "nonce", 8),
        uint32(keys, "keys"),
    )


def _below(value: object, name: str, end: int) -> int:
    number = uint32(value, name)
    if number >= end:
        raise ProtocolError(f"{name} must be less than {end}")
    return number
