"""A device's reply: put together from its parts, checked, and handed on as a Flower message's content.

Parts may arrive twice, in any order, or damaged. A sparse update stays sparse.
"""

import math
from collections.abc import Sequence

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.commands import TrainTask
from tinyfleet.edge.wire.flower_records import SparseArrayRecord, to_metrics, vector_to_arrays
from tinyfleet.edge.wire.messages import Dense, Sparse, Success
from tinyfleet.edge.wire.updates import apply_update
from tinyfleet.server.flower.broadcast import SentParameters
from tinyfleet.server.flower.reply_bounds import clip_error, metrics_error, update_error

Vector = NDArray[np.float32]


class ReplyError(Exception):
    """A reply is complete but cannot be used; the text says why."""


class ReplyParts:
    """The parts of one reply that have arrived."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Success, bytes]] = {}

    def add(self, success: Success, payload: bytes) -> bool:
        """Adds a part. Returns False if it had arrived before."""
        held = self._parts.get(success.part)
        if held is not None and held[1] == payload:
            return False
        if held is not None or any(part.parts != success.parts for part, _ in self._parts.values()):
            self._parts.clear()  # the device has restarted and learned something else
        self._parts[success.part] = success, payload
        return True

    @property
    def is_complete(self) -> bool:
        """Whether all parts are there."""
        return any(len(self._parts) == part.parts for part, _ in self._parts.values())

    @property
    def size(self) -> int:
        """Payload bytes of all parts."""
        return sum(len(payload) for _, payload in self._parts.values())

    def in_order(self) -> list[Success]:
        """The parts by number; only once complete."""
        return [self._parts[n][0] for n in range(len(self._parts))]

    def clear(self) -> None:
        """Forgets the parts."""
        self._parts.clear()


def is_valid_part(success: Success, program: Program) -> bool:
    """Whether this can be a part of a reply for this program: bounded, and within its parameters."""
    match success.update:
        case Dense(offset=offset, values=values):
            inside = offset + len(values) <= program.n_params
        case Sparse(indices=indices):
            inside = len(indices) == 0 or int(indices[-1]) < program.n_params
        case None:
            inside = True
    return inside and success.parts <= program.n_params + 1 and (success.part != 0 or success.metrics is not None)


def reply_content(
    reply: ReplyParts, train_task: TrainTask, sent: SentParameters, program: Program
) -> tuple[RecordDict, float | None]:
    """The content of the Flower message that a complete reply becomes.

    Parameters
    ----------
    reply
        Complete, every part of it valid.
    train_task
        The command that it answers.
    sent
        The parameters that the device learned from.
    program
        The model.

    Returns
    -------
    content : RecordDict
        `metrics`, and after training `arrays`: a SparseArrayRecord if the update was sparse.
    norm : float or None
        After training, the L2 norm of what the device changed.

    Raises
    ------
    ReplyError
        If the reply is out of the command's bounds, or a number is not finite.
    """
    parts = reply.in_order()
    metrics = parts[0].metrics
    assert metrics is not None  # part 0 is not valid without
    if error := metrics_error(metrics, train_task) or update_error(parts, train_task, program):
        raise ReplyError(error)
    arrays, norm = _received_arrays(parts, sent, program)
    if arrays is None or not (math.isfinite(metrics.loss) and math.isfinite(metrics.query_loss)):
        raise ReplyError("replied with numbers that are not finite")
    if error := clip_error(norm, train_task):
        raise ReplyError(error)
    content = RecordDict({"metrics": to_metrics(metrics, train_task.kind, reply.size, program)})
    if train_task.kind == "evaluate":
        return content, None
    content["arrays"] = arrays
    return content, norm


def _received_arrays(
    parts: Sequence[Success], sent: SentParameters, program: Program
) -> tuple[ArrayRecord | None, float]:
    """The device's parameters, None if they are not finite, and the norm of what it changed."""
    updates = [part.update for part in parts if part.update is not None]
    sparse = [update for update in updates if isinstance(update, Sparse)]
    if sent.is_flat and len(sparse) == len(updates):
        indices, values = _merge(sent.vector, sparse)
        if not (sent.is_finite and np.isfinite(values).all()):
            return None, math.inf
        changes = values.astype(np.float64) - sent.vector[indices]
        return SparseArrayRecord(sent.record, sent.vector, indices, values), float(np.linalg.norm(changes))
    vector = apply_update(sent.vector, parts)
    if not np.isfinite(vector).all():
        return None, math.inf
    norm = float(np.linalg.norm(vector.astype(np.float64) - sent.vector))
    return vector_to_arrays(vector, program, sent.record), norm


def _merge(base: Vector, updates: Sequence[Sparse]) -> tuple[NDArray[np.uint32], Vector]:
    """The parts of a sparse update as one: indices, strictly increasing, and the parameters there."""
    if not updates:
        return np.zeros(0, np.uint32), np.zeros(0, np.float32)
    indices = np.concatenate([update.indices for update in updates])
    return indices, base[indices] + np.concatenate([update.changes for update in updates])


def encoding(update: Dense | Sparse | None) -> str | None:
    """How an update's values travel, such as "sparse f16"."""
    if update is None:
        return None
    return f"{'dense' if isinstance(update, Dense) else 'sparse'} {'f16' if update.half else 'f32'}"
