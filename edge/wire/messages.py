"""The messages between a server and its devices, as protocol.cddl describes them.

`encode` writes a message; `decode_command`, `decode_reply` and `decode_status` read one, and raise `ProtocolError` on
anything that is not exactly such a message: their input may come from anyone. The C node's code is generated from the
same protocol.cddl.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal

import cbor2
import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.versions import ENGINE_VERSION, PROGRAM_FORMAT, WIRE_VERSION
from tinyfleet.edge.wire.cbor import Float32, array, boolean, dumps, int32, loads, octets, real, text, uint32
from tinyfleet.edge.wire.errors import ProtocolError, WireVersionError

MAX_PHASES = 4
ALL_LAYERS = 0xFFFFFFFF
"""The layer mask of all layers that may train."""

_MAX_ENGINE = 16
_FLOAT16S = 84  # RFC 8746 typed arrays, little-endian
_FLOAT32S = 85
_TRAIN, _EVALUATE, _UPDATE_MODEL, _REBOOT = 1, 2, 3, 4
_SUCCESS, _FAILURE = 1, 2
_DENSE, _SPARSE, _CHANGE = 1, 2, 3

Floats = NDArray[np.float32]
Kind = Literal["train", "evaluate"]


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


_ERROR_TEXTS = {
    ErrorCode.WRONG_MODEL: "it runs another model than this train task is for; start it with this model, or deploy it",
    ErrorCode.PROGRAM: "the program sent to it is damaged or not valid; compile it again",
    ErrorCode.CAPACITY: "it has too little memory for this; use a smaller model, or send all changes (density 1)",
    ErrorCode.SAMPLES: "its source gave no samples; check its sensor or its data",
    ErrorCode.ENGINE: "its engine rejected it; check the rates, the layers and the samples",
    ErrorCode.DIVERGED: "its numbers left the range of floats; lower the rate",
}


@dataclass(frozen=True)
class Phase:
    """One phase of a train task.

    Parameters
    ----------
    layers
        The mask of the layers that train; all others are fixed.
    steps
        Samples to learn from, one step each.
    rate
        The learning rate.
    proximal_mu
        FedProx's mu: how strongly each step draws the parameters back to the round's. rate * proximal_mu < 1.
    """

    layers: int
    steps: int
    rate: float
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class UpdateFormat:
    """Which of the learned parameters a device sends back, and how.

    Parameters
    ----------
    shared
        The mask of the layers to send.
    half
        Whether numbers travel as f16 rather than f32.
    density
        The share of the changes to send, the largest ones, in (0, 1]. With 1, values are sent instead of changes.
    since
        The phase at whose beginning changes are counted from; 0: the round's parameters. With since > 0 only changes
        are sent.
    clip
        The largest Euclidean norm of the changes, which are scaled down to it; 0: no limit.
    """

    shared: int = ALL_LAYERS
    half: bool = False
    density: float = 1.0
    since: int = 0
    clip: float = 0.0


@dataclass(frozen=True)
class TrainTask:
    """The command to train with a round's parameters, or to evaluate them.

    Parameters
    ----------
    id
        Comes back in the reply.
    kind
        "train", or "evaluate", which never sends an update.
    run, round
        Whose parameters to load.
    model
        The first 8 bytes of the SHA-256 of the program that this is for.
    seed
        Which samples the device draws.
    phases
        What to learn, at most MAX_PHASES.
    query
        Samples to score after that, which are never learned from.
    update
        What to send back; None: nothing.
    """

    id: int
    kind: Kind
    run: int
    round: int
    model: bytes
    seed: int
    phases: tuple[Phase, ...]
    query: int = 0
    update: UpdateFormat | None = None


@dataclass(frozen=True)
class UpdateModel:
    """The command to fetch the program `model`, of `size` bytes with this CRC-32, and to run it from then on."""

    id: int
    model: bytes
    size: int
    crc: int


@dataclass(frozen=True)
class Reboot:
    """The command to start again, from the built-in program."""

    id: int


Command = TrainTask | UpdateModel | Reboot


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


def _train_task(m: TrainTask) -> list[Any]:
    if len(m.phases) > MAX_PHASES:
        raise ProtocolError(f"at most {MAX_PHASES} phases fit one message, not {len(m.phases)}")
    update: list[Any] | None = None
    if m.update is not None:
        update = [uint32(m.update.shared, "shared"), boolean(m.update.half, "half"), Float32(m.update.density)]
        if m.update.since or m.update.clip:
            update += [uint32(m.update.since, "since"), Float32(m.update.clip)]
    return [
        {"train": _TRAIN, "evaluate": _EVALUATE}[m.kind],
        uint32(m.id, "id"),
        uint32(m.run, "run"),
        uint32(m.round, "round"),
        octets(m.model, "model", 8),
        uint32(m.seed, "seed"),
        [
            [
                uint32(p.layers, "layers"),
                uint32(p.steps, "steps"),
                Float32(p.rate),
                *([Float32(p.proximal_mu)] if p.proximal_mu else []),
            ]
            for p in m.phases
        ],
        uint32(m.query, "query"),
        update,
    ]


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
    ]


def encode(message: Command | Reply | Status) -> bytes:
    """Encode a message.

    Parameters
    ----------
    message
        Any message but a chunk.

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
    >>> encode(Reboot(7)).hex()
    '820407'
    """
    fields: list[Any]
    match message:
        case TrainTask():
            fields = _train_task(message)
        case UpdateModel():
            model = octets(message.model, "model", 8)
            fields = [
                _UPDATE_MODEL,
                uint32(message.id, "id"),
                model,
                uint32(message.size, "size"),
                uint32(message.crc, "crc"),
            ]
        case Reboot():
            fields = [_REBOOT, uint32(message.id, "id")]
        case Success():
            fields = _success(message)
        case Failure():
            detail = int32(message.detail, "detail")
            fields = [_FAILURE, uint32(message.id, "id"), int(message.error), detail]
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


def decode_command(payload: bytes) -> Command:
    """Decode a command, as a device does.

    Raises
    ------
    ProtocolError
        If the payload is not a command.
    """
    fields = loads(payload)
    match uint32(fields[0], "a command's number"):
        case 1 | 2 as kind:
            _, id, run, round_, model, seed, phases, query, update = array(fields, "train-task", 9)
            if type(phases) is not list or len(phases) > MAX_PHASES:
                raise ProtocolError(f"phases must be an array of at most {MAX_PHASES}")
            return TrainTask(
                uint32(id, "id"),
                "train" if kind == _TRAIN else "evaluate",
                uint32(run, "run"),
                uint32(round_, "round"),
                octets(model, "model", 8),
                uint32(seed, "seed"),
                tuple(map(_decode_phase, phases)),
                uint32(query, "query"),
                None if update is None else _decode_format(update),
            )
        case 3:
            _, id, model, size, crc = array(fields, "update-model", 5)
            return UpdateModel(uint32(id, "id"), octets(model, "model", 8), uint32(size, "size"), uint32(crc, "crc"))
        case 4:
            _, id = array(fields, "reboot", 2)
            return Reboot(uint32(id, "id"))
    raise ProtocolError(f"no command is numbered {fields[0]}")


def _decode_phase(fields: object) -> Phase:
    layers, steps, rate, *proximal_mu = array(fields, "phase", 3, 4)
    return Phase(
        uint32(layers, "layers"),
        uint32(steps, "steps"),
        real(rate, "rate"),
        *(real(p, "proximal-mu") for p in proximal_mu),
    )


def _decode_format(fields: object) -> UpdateFormat:
    shared, half, density, *more = array(fields, "update", 3, 5)
    format = UpdateFormat(uint32(shared, "shared"), boolean(half, "half"), real(density, "density"))
    return replace(format, since=uint32(more[0], "since"), clip=real(more[1], "clip")) if more else format


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
    _, online, model, samples, malformed, stale, battery, drift, program_format, engine = array(fields, "status", 10)
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
    )
