"""The wire between a server and its devices: topics, messages, chunks, update encodings.

The messages' form is protocol.cddl, from which the C node's code is generated; this is the same in Python. `encode`
writes a message, `decode_command`, `decode_reply`, `decode_status` and `decode_chunk` read one and raise
`ProtocolError` on anything that is not exactly such a message: their input may come from anyone.
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import cbor2
import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge.errors import error_name

CHUNK = 1024
"""Bytes of every chunk but the last."""
MAX_CHUNKS = 1024
"""So a program or a round's weights are at most 1 MiB."""
MAX_PHASES = 4
ALL_LAYERS = 0xFFFFFFFF

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT16S = 84  # RFC 8746 typed arrays, little-endian
_FLOAT32S = 85
_TRAIN, _EVALUATE, _UPDATE_MODEL, _REBOOT = 1, 2, 3, 4
_SUCCESS, _FAILURE = 1, 2
_DENSE, _SPARSE, _CHANGE = 1, 2, 3

Floats = NDArray[np.float32]
Kind = Literal["train", "evaluate"]


class ProtocolError(ValueError):
    """The bytes are not a message of this kind, or a message holds a value that the wire cannot carry."""


class ErrorCode(IntEnum):
    """Why a device could not do what it was asked."""

    WRONG_MODEL = 1
    """It runs another model than the work is for."""
    PROGRAM = 2
    """The program to adopt is damaged or not valid; detail is the engine's error."""
    CAPACITY = 3
    """It has no room for this: a program over the air, the copy that sparse replies need, or a reply."""
    SAMPLES = 4
    """Its source can't give the samples asked for; detail is the source's error."""
    ENGINE = 5
    """The engine refused; detail is its error."""
    DIVERGED = 6
    """The weights, the loss or the update are not finite numbers (or, where f16 was asked for, leave its range)."""


# ---------------------------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Phase:
    """`steps` samples learned at this rate with these layers training, everything else fixed. pull: FedProx's mu, how
    strongly each step draws them back to the round's weights; rate * pull < 1."""

    layers: int
    steps: int
    rate: float
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class UpdateFormat:
    """Which layers are sent back, as f16 or f32, and, with top < 1, what fraction of them (by largest change).

    since: changes are those since this phase (0: the round's weights); with since > 0 only changes are sent. clip: they
    are scaled down to at most this Euclidean norm; 0: as they are.
    """

    shared: int = ALL_LAYERS
    half: bool = False
    density: float = 1.0
    since: int = 0
    clip: float = 0.0


@dataclass(frozen=True)
class TrainTask:
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
    id: int
    model: bytes
    size: int
    crc: int


@dataclass(frozen=True)
class Reboot:
    id: int


Command = TrainTask | UpdateModel | Reboot


@dataclass(frozen=True)
class Metrics:
    """`loss` is the mean over the samples learned from, each before its step; `query_loss` over the queries."""

    samples: int
    loss: float
    queried: int
    correct: int
    query_loss: float
    arena_bytes: int


@dataclass(frozen=True, eq=False)
class Dense:
    """Parameter values offset, offset + 1, ...; `half` says that they travel as f16. With `change`, they are what was
    added to these parameters."""

    offset: int
    values: Floats
    half: bool = False
    change: bool = False


@dataclass(frozen=True, eq=False)
class Sparse:
    """changes[i] is what was added to parameter indices[i] (strictly rising)."""

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
    id: int
    error: ErrorCode
    detail: int = 0


Reply = Success | Failure


@dataclass(frozen=True)
class Status:
    online: bool
    model: bytes
    samples: int = 0
    malformed: int = 0
    stale: int = 0
    battery: float | None = None
    drift: float | None = None


class Chunk(NamedTuple):
    offset: int
    data: bytes


_ERROR_TEXTS = {
    ErrorCode.WRONG_MODEL: "it runs another model than this work is for; start it with this model, or let it adopt it",
    ErrorCode.PROGRAM: "the program it was to adopt is damaged or not valid; compile it again",
    ErrorCode.CAPACITY: "it has no room for this; use a smaller model, or have all changes sent (top 1)",
    ErrorCode.SAMPLES: "its source gave no samples; check its sensor or its data",
    ErrorCode.ENGINE: "its engine refused; check the rates, the layers and the samples of this work",
    ErrorCode.DIVERGED: "its numbers left the range of floats; lower the rate",
}


def error_text(failed: Failure) -> str:
    """What happened on the device and what to do, for the log and for people."""
    detail = error_name(failed.detail) if failed.detail else "no detail"
    return f"{failed.error.name.lower()} ({detail}): {_ERROR_TEXTS[failed.error]}"


# ------------------------------------------------------------------------------------------------------------- checks


def _uint(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= 0xFFFFFFFF:
        raise ProtocolError(f"{what} must be an integer in 0..2^32-1, not {value!r:.50}")
    return value


def _float(value: object, what: str) -> float:
    if type(value) is not float:
        raise ProtocolError(f"{what} must be a float, not {value!r:.50}")
    return value


def _bool(value: object, what: str) -> bool:
    if type(value) is not bool:
        raise ProtocolError(f"{what} must be true or false, not {value!r:.50}")
    return value


def _bytes(value: object, what: str, size: int | None = None) -> bytes:
    if type(value) is not bytes or (size is not None and len(value) != size):
        raise ProtocolError(f"{what} must be {'' if size is None else f'{size} '}bytes, not {value!r:.50}")
    return value


def _list(value: object, what: str, *lengths: int) -> list[Any]:
    if type(value) is not list or len(value) not in lengths:
        raise ProtocolError(f"{what} must be an array of {' or '.join(map(str, lengths))}, not {value!r:.50}")
    return value


# ------------------------------------------------------------------------------------------------------------- encode


class _F32:
    """A number that travels as a CBOR float32, whatever its value (cbor2 would choose float64)."""

    def __init__(self, value: float) -> None:
        self.value = value


def _write_f32(encoder: cbor2.CBOREncoder, value: object) -> None:
    if not isinstance(value, _F32):
        raise ProtocolError(f"a message can't carry {value!r:.50}")
    try:
        encoder.write(struct.pack(">Bf", 0xFA, value.value))
    except (OverflowError, struct.error, TypeError) as error:
        raise ProtocolError(f"{value.value!r:.50} is no float32") from error


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
        update = [_uint(m.update.shared, "shared"), _bool(m.update.half, "half"), _F32(m.update.density)]
        if m.update.since or m.update.clip:
            update += [_uint(m.update.since, "since"), _F32(m.update.clip)]
    return [
        {"train": _TRAIN, "evaluate": _EVALUATE}[m.kind],
        _uint(m.id, "id"),
        _uint(m.run, "run"),
        _uint(m.round, "round"),
        _bytes(m.model, "model", 8),
        _uint(m.seed, "seed"),
        [
            [
                _uint(p.layers, "layers"),
                _uint(p.steps, "steps"),
                _F32(p.rate),
                *([_F32(p.proximal_mu)] if p.proximal_mu else []),
            ]
            for p in m.phases
        ],
        _uint(m.query, "query"),
        update,
    ]


def _success(m: Success) -> list[Any]:
    metrics: list[Any] | None = None
    if m.metrics is not None:
        metrics = [
            _uint(m.metrics.samples, "samples"),
            _F32(m.metrics.loss),
            _uint(m.metrics.queried, "queried"),
            _uint(m.metrics.correct, "correct"),
            _F32(m.metrics.query_loss),
            _uint(m.metrics.arena_bytes, "arena-bytes"),
        ]
    update: list[Any] | None = None
    if isinstance(m.update, Dense):
        kind = _CHANGE if m.update.change else _DENSE
        update = [kind, _uint(m.update.offset, "offset"), _numbers(m.update.values, m.update.half)]
    elif isinstance(m.update, Sparse):
        if len(m.update.indices) != len(m.update.changes):
            raise ProtocolError(f"{len(m.update.indices)} indices for {len(m.update.changes)} changes")
        update = [_SPARSE, _to_gaps(m.update.indices), _numbers(m.update.changes, m.update.half)]
    return [_SUCCESS, _uint(m.id, "id"), _uint(m.part, "part"), _uint(m.parts, "parts"), metrics, update]


def _status(m: Status) -> list[Any]:
    return [
        _bool(m.online, "online"),
        _bytes(m.model, "model", 8),
        _uint(m.samples, "samples"),
        _uint(m.malformed, "malformed"),
        _uint(m.stale, "stale"),
        None if m.battery is None else _F32(m.battery),
        None if m.drift is None else _F32(m.drift),
    ]


def encode(message: Command | Reply | Status) -> bytes:
    """The message's payload. Raises ProtocolError if a value does not fit the wire."""
    fields: list[Any]
    match message:
        case TrainTask():
            fields = _train_task(message)
        case UpdateModel():
            model = _bytes(message.model, "model", 8)
            fields = [
                _UPDATE_MODEL,
                _uint(message.id, "id"),
                model,
                _uint(message.size, "size"),
                _uint(message.crc, "crc"),
            ]
        case Reboot():
            fields = [_REBOOT, _uint(message.id, "id")]
        case Success():
            fields = _success(message)
        case Failure():
            if not -(2**31) <= message.detail < 2**31:
                raise ProtocolError(f"detail must be an integer of 32 bits, not {message.detail}")
            fields = [_FAILURE, _uint(message.id, "id"), int(message.error), message.detail]
        case Status():
            fields = _status(message)
    return cbor2.dumps(fields, default=_write_f32)


# ------------------------------------------------------------------------------------------------------------- decode


def _loads(payload: bytes) -> list[Any]:
    stream = io.BytesIO(payload)
    try:
        value = cbor2.CBORDecoder(stream).decode()
    except Exception as error:  # the bytes are anyone's, and cbor2 builds what their tags name: dates, patterns, ...
        raise ProtocolError(f"not CBOR: {error}") from error
    if stream.tell() != len(payload):
        raise ProtocolError(f"{len(payload) - stream.tell()} bytes after the message")
    if type(value) is not list or not value:
        raise ProtocolError("not an array")
    return value


def _from_numbers(value: object) -> tuple[Floats, bool]:
    if not isinstance(value, cbor2.CBORTag) or value.tag not in (_FLOAT16S, _FLOAT32S):
        raise ProtocolError("not a typed array of floats")
    half = value.tag == _FLOAT16S
    data = _bytes(value.value, "a typed array")
    if len(data) % (2 if half else 4):
        raise ProtocolError(f"a typed array of {len(data)} bytes ends inside a number")
    return np.frombuffer(data, "<f2" if half else "<f4").astype(np.float32), half


def varint_sizes(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each value, in 0..2^32-1, as a LEB128 varint."""
    sizes = np.ones(len(values), np.int64)
    for bits in (7, 14, 21, 28):
        sizes += values >= 1 << bits
    return sizes


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
    """What the server asks for. Raises ProtocolError."""
    fields = _loads(payload)
    match _uint(fields[0], "an order's number"):
        case 1 | 2 as order:
            _, id, run, round_, model, seed, phases, query, update = _list(fields, "work", 9)
            if type(phases) is not list or len(phases) > MAX_PHASES:
                raise ProtocolError(f"phases must be an array of at most {MAX_PHASES}")
            return TrainTask(
                _uint(id, "id"),
                "train" if order == _TRAIN else "evaluate",
                _uint(run, "run"),
                _uint(round_, "round"),
                _bytes(model, "model", 8),
                _uint(seed, "seed"),
                tuple(map(_decode_phase, phases)),
                _uint(query, "query"),
                None if update is None else _decode_format(update),
            )
        case 3:
            _, id, model, size, crc = _list(fields, "adopt", 5)
            return UpdateModel(_uint(id, "id"), _bytes(model, "model", 8), _uint(size, "size"), _uint(crc, "crc"))
        case 4:
            _, id = _list(fields, "reboot", 2)
            return Reboot(_uint(id, "id"))
    raise ProtocolError(f"no order is numbered {fields[0]!r:.50}")


def _decode_phase(fields: object) -> Phase:
    layers, steps, rate, *proximal_mu = _list(fields, "phase", 3, 4)
    return Phase(
        _uint(layers, "layers"), _uint(steps, "steps"), _float(rate, "rate"), *(_float(p, "pull") for p in proximal_mu)
    )


def _decode_format(fields: object) -> UpdateFormat:
    shared, half, density, *more = _list(fields, "update", 3, 5)
    format = UpdateFormat(_uint(shared, "shared"), _bool(half, "half"), _float(density, "density"))
    return replace(format, since=_uint(more[0], "since"), clip=_float(more[1], "clip")) if more else format


def decode_reply(payload: bytes) -> Reply:
    """A device's reply, or a part of it. Raises ProtocolError."""
    fields = _loads(payload)
    match _uint(fields[0], "a reply's number"):
        case 1:
            _, id, part, parts, metrics, update = _list(fields, "done", 6)
            if _uint(part, "part") >= _uint(parts, "parts"):
                raise ProtocolError(f"part {part} of {parts}")
            return Success(
                _uint(id, "id"),
                part,
                parts,
                None if metrics is None else _decode_metrics(metrics),
                None if update is None else _decode_update(update),
            )
        case 2:
            _, id, error, detail = _list(fields, "failed", 4)
            if type(detail) is not int or not -(2**31) <= detail < 2**31:
                raise ProtocolError(f"detail must be an integer of 32 bits, not {detail!r:.50}")
            try:
                return Failure(_uint(id, "id"), ErrorCode(_uint(error, "error")), detail)
            except ValueError as unknown:
                raise ProtocolError(str(unknown)) from unknown
    raise ProtocolError(f"no reply is numbered {fields[0]!r:.50}")


def _decode_metrics(fields: object) -> Metrics:
    samples, loss, queried, correct, query_loss, arena_bytes = _list(fields, "metrics", 6)
    return Metrics(
        _uint(samples, "samples"),
        _float(loss, "loss"),
        _uint(queried, "queried"),
        _uint(correct, "correct"),
        _float(query_loss, "query-loss"),
        _uint(arena_bytes, "arena-bytes"),
    )


def _decode_update(fields: object) -> Dense | Sparse:
    kind, where, numbers = _list(fields, "update", 3)
    values, half = _from_numbers(numbers)
    match _uint(kind, "update"):
        case 1 | 3 as number:
            return Dense(_uint(where, "offset"), values, half, number == _CHANGE)
        case 2:
            indices = _from_gaps(_bytes(where, "gaps"))
            if len(indices) != len(values):
                raise ProtocolError(f"{len(indices)} indices for {len(values)} changes")
            return Sparse(indices, values, half)
    raise ProtocolError(f"no update is numbered {kind}")


def decode_status(payload: bytes) -> Status:
    """A device's state, or its will. Raises ProtocolError."""
    online, model, samples, malformed, stale, battery, drift = _list(_loads(payload), "status", 7)
    return Status(
        _bool(online, "online"),
        _bytes(model, "model", 8),
        _uint(samples, "samples"),
        _uint(malformed, "malformed"),
        _uint(stale, "stale"),
        None if battery is None else _float(battery, "battery"),
        None if drift is None else _float(drift, "drift"),
    )


# ------------------------------------------------------------------------------------------------------------- chunks


def chunks(data: bytes) -> Iterator[bytes]:
    """The payloads, in order, that carry these bytes. Raises ProtocolError if there are more than MAX_CHUNKS."""
    if len(data) > CHUNK * MAX_CHUNKS:
        raise ProtocolError(f"{len(data)} bytes are more than the {CHUNK * MAX_CHUNKS} that can be sent")
    for offset in range(0, len(data), CHUNK):
        part = bytes(data[offset : offset + CHUNK])
        yield cbor2.dumps([offset, zlib.crc32(part), part])


def decode_chunk(payload: bytes) -> Chunk:
    """One chunk, its CRC checked. Raises ProtocolError."""
    offset, crc, data = _list(_loads(payload), "chunk", 3)
    part = _bytes(data, "data")
    if not 1 <= len(part) <= CHUNK or _uint(offset, "offset") % CHUNK:
        raise ProtocolError(f"{len(part)} bytes at {offset} are no chunk")
    if zlib.crc32(part) != _uint(crc, "crc"):
        raise ProtocolError("the chunk is damaged: its CRC-32 differs")
    return Chunk(offset, part)


class Assembly:
    """`total` bytes put together from their chunks, in any order, any of them more than once."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._data = bytearray(total)
        self._missing = set(range(0, total, CHUNK))

    def add(self, chunk: Chunk) -> bool:
        """Takes a chunk; True if it was new. Raises ProtocolError if it is not one of these bytes."""
        if chunk.offset >= self.total or len(chunk.data) != min(CHUNK, self.total - chunk.offset):
            raise ProtocolError(f"{len(chunk.data)} bytes at {chunk.offset} do not belong to {self.total} bytes")
        if chunk.offset not in self._missing:
            return False
        self._data[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        self._missing.remove(chunk.offset)
        return True

    @property
    def complete(self) -> bool:
        return not self._missing

    def data(self) -> bytes:
        """All the bytes; only once complete."""
        if self._missing:
            raise ProtocolError(f"{len(self._missing)} chunks are missing")
        return bytes(self._data)


# ------------------------------------------------------------------------------------------------------------- topics

_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
_NUMBER = r"(0|[1-9][0-9]{0,9})"


class Topics:
    """The topics of one fleet. A fleet's and a device's name: 1..32 letters, digits, dots, dashes or underscores."""

    def __init__(self, fleet: str) -> None:
        if not _NAME.fullmatch(fleet):
            raise ProtocolError(f"a fleet's name is 1 to 32 letters, digits, '.', '_' or '-', not {fleet!r:.50}")
        self.fleet = fleet
        self._root = f"tinyfleet/{fleet}"
        root = re.escape(self._root)
        self._device = re.compile(rf"{root}/devices/({_NAME.pattern})/(td|status|command|reply)")
        self._weights = re.compile(rf"{root}/runs/{_NUMBER}/{_NUMBER}/{_NUMBER}")
        self._program = re.compile(rf"{root}/models/([0-9a-f]{{16}})/{_NUMBER}")

    def td(self, id: str) -> str:
        return self._of(id, "td")

    def status(self, id: str) -> str:
        return self._of(id, "status")

    def do(self, id: str) -> str:
        return self._of(id, "command")

    def did(self, id: str) -> str:
        return self._of(id, "reply")

    def weights(self, run: int, round: int, chunk: int | str = "+") -> str:
        """The topic of one chunk of a round's weights; by default the filter for all of them."""
        return f"{self._root}/runs/{run}/{round}/{chunk}"

    def program(self, model: bytes, chunk: int | str = "+") -> str:
        """The topic of one chunk of a program; by default the filter for all of them."""
        return f"{self._root}/models/{model.hex()}/{chunk}"

    def parse(self, topic: str) -> tuple[str, tuple[Any, ...]] | None:
        """What a topic is: ("td" | "status" | "command" | "reply", (id,)), ("weights", (run, round, chunk)),
        ("program", (model, chunk)), or None if it is not one of this fleet's."""
        if found := self._device.fullmatch(topic):
            return found[2], (found[1],)
        if found := self._weights.fullmatch(topic):
            run, round_, chunk = (int(number) for number in found.groups())
            return ("weights", (run, round_, chunk)) if max(run, round_, chunk) <= 0xFFFFFFFF else None
        if found := self._program.fullmatch(topic):
            return ("program", (bytes.fromhex(found[1]), int(found[2]))) if int(found[2]) <= 0xFFFFFFFF else None
        return None

    def _of(self, id: str, what: str) -> str:
        if id != "+" and not _NAME.fullmatch(id):
            raise ProtocolError(f"a device's name is 1 to 32 letters, digits, '.', '_' or '-', not {id!r:.50}")
        return f"{self._root}/devices/{id}/{what}"


# -------------------------------------------------------------------------------------------------- a round's config


class RoundConfig(NamedTuple):
    """What one round asks of every device."""

    phases: tuple[Phase, ...]
    query: int
    update: UpdateFormat | None
    seed: int


def parse_round_config(config: Mapping[str, Any], kind: Kind = "train", node: int = 0) -> RoundConfig:
    """Reads a round's work for a node from a Flower ConfigRecord, which any strategy may have filled.

    A key that is absent: "phase-steps" is [32] to train and [] to evaluate, "phase-layers" all layers,
    "phase-rates" the value of "lr" (as Flower's own examples call it), else 0.05; "query" 0 to train, 32 to evaluate;
    "shared-layers" all, "density" 1, "half" false, "since" 0; "seed" another for every round and node. Two keys are
    those that Flower's strategies set: "proximal-mu" (FedProx), of every phase, and "clipping_norm" (differential
    privacy with clipping on the device). An evaluation sends no update. Raises ProtocolError.
    """
    config = dict(config.items())  # a ConfigRecord takes its time over each key
    steps = _sequence(config, "phase-steps", [32] if kind == "train" else [])
    layers = _sequence(config, "phase-layers", [ALL_LAYERS] * len(steps))
    rates = _sequence(config, "phase-rates", [config.get("lr", 0.05)] * len(steps))
    if not len(steps) == len(layers) == len(rates) <= MAX_PHASES:
        raise ProtocolError(
            f"phase-steps, phase-layers and phase-rates must have the same length, at most {MAX_PHASES}: "
            f"{len(steps)}, {len(layers)}, {len(rates)}"
        )
    proximal_mu = _finite(config.get("proximal-mu", 0.0), "proximal-mu")
    phases = tuple(
        Phase(
            _uint(int(layer), "phase-layers"),
            _uint(int(step), "phase-steps"),
            _finite(rate, "phase-rates"),
            proximal_mu,
        )
        for layer, step, rate in zip(layers, steps, rates, strict=True)
    )
    if not all(
        phase.proximal_mu >= 0 and (phase.proximal_mu == 0 or phase.rate * phase.proximal_mu < 1) for phase in phases
    ):
        raise ProtocolError(f"proximal-mu times the rate must be less than 1, and not negative; mu is {proximal_mu:g}")
    update = None
    if kind == "train":
        shared = _uint(int(config.get("shared-layers", ALL_LAYERS)), "shared-layers")
        since, clip = (
            _uint(int(config.get("since", 0)), "since"),
            _finite(config.get("clipping_norm", 0.0), "clipping_norm"),
        )
        density = _finite(config.get("density", 1.0), "density")
        update = UpdateFormat(shared, bool(config.get("half", False)), density, since, clip)
        if not 0 < density <= 1:
            raise ProtocolError(f"top is the share of the changes to send, in (0, 1], not {density:g}")
        if since and (since >= len(phases) or proximal_mu):
            raise ProtocolError("since is the number of a phase, and goes with no proximal-mu")
        if clip < 0:
            raise ProtocolError(f"clipping_norm is the largest norm of an update, not {clip:g}")
    query = _uint(int(config.get("query", 0 if kind == "train" else 32)), "query")
    seed = config["seed"] if "seed" in config else config.get("server-round", 0) + node * 0x9E3779B1
    return RoundConfig(phases, query, update, int(seed) & 0xFFFFFFFF)


def format_round_config(round_config: RoundConfig) -> dict[str, int | float | bool | list[int] | list[float]]:
    """The inverse of parse_round_config, for a strategy to put into its ConfigRecord."""
    config: dict[str, int | float | bool | list[int] | list[float]] = {
        "phase-layers": [phase.layers for phase in round_config.phases],
        "phase-steps": [phase.steps for phase in round_config.phases],
        "phase-rates": [phase.rate for phase in round_config.phases],
        "query": round_config.query,
        "seed": round_config.seed,
    }
    if round_config.update is not None:
        config |= {
            "shared-layers": round_config.update.shared,
            "density": round_config.update.density,
            "half": round_config.update.half,
        }
        config |= {"since": round_config.update.since} if round_config.update.since else {}
        config |= {"clipping_norm": round_config.update.clip} if round_config.update.clip else {}
    if round_config.phases and round_config.phases[0].proximal_mu:
        config["proximal-mu"] = round_config.phases[0].proximal_mu
    return config


def _sequence(config: Mapping[str, Any], key: str, default: list[Any]) -> Sequence[Any]:
    value = config.get(key, default)
    return value if isinstance(value, Sequence) else [value]


def _finite(value: Any, what: str) -> float:
    number = float(value)
    if not abs(number) <= _FLOAT32_MAX:
        raise ProtocolError(f"{what} must be a finite float32, not {value}")
    return number
