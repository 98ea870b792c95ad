"""What a server says to its devices: commands, and what asks the server for them, as protocol.cddl describes them.

A command is an action, such as a train task, with what makes it fresh: a counter, an expiry and perhaps a nonce. What
is decoded here may come from anyone; `ProtocolError` is raised on anything that is not exactly such a message. Who may
command is not decided here: commands travel sealed (cose.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import cbor2

from tinyfleet.edge.wire.cbor import (
    Float32,
    array,
    boolean,
    dumps,
    loads,
    octets,
    real,
    text,
    typed_array,
    uint32,
    uint64,
)
from tinyfleet.edge.wire.errors import ProtocolError

MAX_PHASES = 4
ALL_LAYERS = 0xFFFFFFFF
"""The layer mask of all layers that may train."""
MAX_INLINE = 2048
"""Bytes of the largest weights that travel in a command; larger ones come in chunks."""
MAX_SUBMITTED = 16
"""Commands of one submission."""

_FLOAT32S = 85
_TRAIN, _EVALUATE, _UPDATE_MODEL, _REBOOT, _FORGET, _NEW_KEYS = 1, 2, 3, 4, 5, 6
_MAX_ACTION = 4096
_MAX_TO = 39
_MAX_TOKEN = 128
_MAX_REASON = 200

Kind = Literal["train", "evaluate"]


class Sha256(NamedTuple):
    """A SHA-256, where bytes would be something else."""

    digest: bytes

    @classmethod
    def of(cls, data: bytes) -> Sha256:
        """That of these bytes."""
        return cls(hashlib.sha256(data).digest())


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
    weights
        The weights, little-endian float32s of at most MAX_INLINE bytes; or the hash of those that come in chunks.
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
    weights: bytes | Sha256 = b""


@dataclass(frozen=True)
class Manifest:
    """What a device needs to know of a program before it takes it.

    Parameters
    ----------
    hash
        Its SHA-256.
    size
        Its bytes.
    version
        Higher than that of any program that the device had before: the Unix time in seconds, as a rule.
    arena
        Bytes of memory that it learns in.
    inputs, outputs
        Floats of a sample, and of its prediction.
    tested
        Samples that it is scored on before it runs.
    probation
        Samples that it then learns from, or is scored on, before it is confirmed.
    max_loss
        The largest mean loss of either; 0: any that is finite.
    """

    hash: bytes
    size: int
    version: int
    arena: int
    inputs: int
    outputs: int
    tested: int = 0
    probation: int = 0
    max_loss: float = 0.0

    @property
    def model(self) -> bytes:
        """The program's id: the first 8 bytes of the hash."""
        return self.hash[:8]


@dataclass(frozen=True)
class UpdateModel:
    """The command to fetch this program, to try it, and to run it from then on."""

    id: int
    manifest: Manifest


@dataclass(frozen=True)
class Reboot:
    """The command to start again."""

    id: int


@dataclass(frozen=True)
class Forget:
    """The command to forget all that was kept but counters and keys."""

    id: int


@dataclass(frozen=True)
class NewKeys:
    """The command that the fleet's keys are these from now on, in place of those of a lower version."""

    id: int
    version: int
    current: bytes
    next: bytes | None = None


Action = TrainTask | UpdateModel | Reboot | Forget | NewKeys


class Command(NamedTuple):
    """An action, and what makes it fresh.

    Parameters
    ----------
    counter
        Higher than any before it on its topic.
    expires
        Unix time in milliseconds.
    nonce
        That of the device's status, where it does not know the time.
    action
        What to do.
    """

    counter: int
    expires: int
    nonce: bytes | None
    action: Action


class Submitted(NamedTuple):
    """A command that the server is asked to send.

    Parameters
    ----------
    to
        A device, or "groups/" and a group's name.
    expires
        Milliseconds from now.
    action
        The encoded action, which becomes part of the command as it is.
    """

    to: str
    expires: int
    action: bytes


class Submission(NamedTuple):
    """Commands that the server is asked to number, seal and send, and the token of who asks."""

    token: str | None
    commands: tuple[Submitted, ...]


class Refusal(NamedTuple):
    """The submitted command of this id was not sent to `to`, and why."""

    to: str
    id: int
    reason: str


# Encoding


def _inline(weights: bytes) -> bytes:
    if len(weights) > MAX_INLINE:
        raise ProtocolError(f"weights of {len(weights)} bytes do not fit a command; at most {MAX_INLINE} do")
    return weights


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
        m.weights.digest if isinstance(m.weights, Sha256) else cbor2.CBORTag(_FLOAT32S, _inline(m.weights)),
    ]


def _action(action: Action) -> list[Any]:
    match action:
        case TrainTask():
            return _train_task(action)
        case UpdateModel(id, m):
            manifest = [
                octets(m.hash, "hash", 32),
                uint32(m.size, "size"),
                uint32(m.version, "version"),
                uint32(m.arena, "arena"),
                uint32(m.inputs, "inputs"),
                uint32(m.outputs, "outputs"),
                uint32(m.tested, "tested"),
                uint32(m.probation, "probation"),
                Float32(m.max_loss),
            ]
            return [_UPDATE_MODEL, uint32(id, "id"), manifest]
        case Reboot(id):
            return [_REBOOT, uint32(id, "id")]
        case Forget(id):
            return [_FORGET, uint32(id, "id")]
        case NewKeys(id, version, current, next):
            keys = [octets(current, "current", 32), None if next is None else octets(next, "next", 32)]
            return [_NEW_KEYS, uint32(id, "id"), uint32(version, "version"), *keys]


def encode_action(action: Action) -> bytes:
    """Encode an action, as it is submitted and as it stands in a command.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire.

    Examples
    --------
    >>> encode_action(Reboot(7)).hex()
    '820407'
    """
    return dumps(_action(action))


def encode_command(counter: int, expires: int, nonce: bytes | None, action: bytes) -> bytes:
    """Encode a command around an encoded action.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire.

    Examples
    --------
    >>> encode_command(1, 2, None, encode_action(Reboot(7))).hex()
    '840102f6820407'
    """
    fresh = [
        uint64(counter, "counter"),
        uint64(expires, "expires"),
        None if nonce is None else octets(nonce, "nonce", 8),
    ]
    head = bytearray(dumps([*fresh, 0]))
    head[-1:] = action
    return bytes(head)


def sealed_size(action: bytes) -> int:
    """Bytes of the command with this encoded action, sealed for a device that knows the time (COSE_Mac0)."""
    payload = len(encode_command(1 << 40, 1 << 40, None, action))
    return 7 + (1 if payload < 24 else 2 if payload < 0x100 else 3) + payload + 34


def encode_time(now: int) -> bytes:
    """Encode the time message: the Unix time in milliseconds."""
    return dumps([uint64(now, "now")])


def encode_submission(submission: Submission) -> bytes:
    """Encode what asks the server for commands.

    Raises
    ------
    ProtocolError
        If a value does not fit the wire.
    """
    token = None if submission.token is None else text(submission.token, "token", _MAX_TOKEN)
    commands = [
        [text(c.to, "to", _MAX_TO), uint32(c.expires, "expires"), octets(c.action, "action")]
        for c in submission.commands
    ]
    return dumps([token, commands])


def encode_refusal(refusal: Refusal) -> bytes:
    """Encode why a command was not sent. A reason that is too long is cut."""
    reason = refusal.reason.encode()[:_MAX_REASON].decode(errors="ignore")
    return dumps([refusal.to, uint32(refusal.id, "id"), reason])


# Decoding


def decode_command(payload: bytes) -> Command:
    """Decode a command's payload, as a device does.

    Raises
    ------
    ProtocolError
        If the payload is not a command.
    """
    counter, expires, nonce, action = array(loads(payload), "command", 4)
    return Command(
        uint64(counter, "counter"),
        uint64(expires, "expires"),
        None if nonce is None else octets(nonce, "nonce", 8),
        _decode_action(action),
    )


def decode_action(payload: bytes) -> Action:
    """Decode an encoded action.

    Raises
    ------
    ProtocolError
        If the payload is not an action.
    """
    return _decode_action(loads(payload))


def _decode_action(fields: object) -> Action:
    if type(fields) is not list or not fields:
        raise ProtocolError("not an action")
    match uint32(fields[0], "an action's number"):
        case 1 | 2 as kind:
            return _decode_task("train" if kind == _TRAIN else "evaluate", fields)
        case 3:
            _, id, manifest = array(fields, "update-model", 3)
            return UpdateModel(uint32(id, "id"), _decode_manifest(manifest))
        case 4:
            _, id = array(fields, "reboot", 2)
            return Reboot(uint32(id, "id"))
        case 5:
            _, id = array(fields, "forget", 2)
            return Forget(uint32(id, "id"))
        case 6:
            _, id, version, current, next = array(fields, "new-keys", 5)
            return NewKeys(
                uint32(id, "id"),
                uint32(version, "version"),
                octets(current, "current", 32),
                None if next is None else octets(next, "next", 32),
            )
    raise ProtocolError("no action has this number")


def _decode_task(kind: Kind, fields: list[Any]) -> TrainTask:
    _, id, run, round_, model, seed, phases, query, update, weights = array(fields, "train-task", 10)
    if type(phases) is not list or len(phases) > MAX_PHASES:
        raise ProtocolError(f"phases must be an array of at most {MAX_PHASES}")
    return TrainTask(
        uint32(id, "id"),
        kind,
        uint32(run, "run"),
        uint32(round_, "round"),
        octets(model, "model", 8),
        uint32(seed, "seed"),
        tuple(map(_decode_phase, phases)),
        uint32(query, "query"),
        None if update is None else _decode_format(update),
        Sha256(octets(weights, "weights", 32)) if type(weights) is bytes else _decode_inline(weights),
    )


def _decode_inline(value: object) -> bytes:
    return _inline(typed_array(value, _FLOAT32S))


def _decode_manifest(fields: object) -> Manifest:
    hash, size, version, arena, inputs, outputs, tested, probation, max_loss = array(fields, "manifest", 9)
    return Manifest(
        octets(hash, "hash", 32),
        uint32(size, "size"),
        uint32(version, "version"),
        uint32(arena, "arena"),
        uint32(inputs, "inputs"),
        uint32(outputs, "outputs"),
        uint32(tested, "tested"),
        uint32(probation, "probation"),
        real(max_loss, "max-loss"),
    )


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


def decode_submission(payload: bytes) -> Submission:
    """Decode what asks the server for commands. The actions in it are bytes still.

    Raises
    ------
    ProtocolError
        If the payload is not a submission.
    """
    token, commands = array(loads(payload), "submission", 2)
    if type(commands) is not list or not 1 <= len(commands) <= MAX_SUBMITTED:
        raise ProtocolError(f"a submission has 1 to {MAX_SUBMITTED} commands")
    submitted = []
    for fields in commands:
        to, expires, action = array(fields, "submitted", 3)
        if not 1 <= len(octets(action, "action")) <= _MAX_ACTION:
            raise ProtocolError(f"an action has 1 to {_MAX_ACTION} bytes")
        submitted.append(Submitted(text(to, "to", _MAX_TO), uint32(expires, "expires"), action))
    return Submission(None if token is None else text(token, "token", _MAX_TOKEN), tuple(submitted))


def decode_refusal(payload: bytes) -> Refusal:
    """Decode why a command was not sent.

    Raises
    ------
    ProtocolError
        If the payload is not a refusal.
    """
    to, id, reason = array(loads(payload), "refusal", 3)
    return Refusal(text(to, "to", _MAX_TO), uint32(id, "id"), text(reason, "reason", _MAX_REASON))
