"""Updates: how what a device learned is cut into messages, and what a reply's updates make of a vector.

The device's side is mote_update.c. What it sends, in how many messages of which size, is computed here for many
clients at a time, without a device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.wire.messages import Dense, Sparse, Success

HEAD_BYTES = 72
"""Bytes of a reply besides its update's gaps and numbers, at most: MOTE_REPLY_HEAD."""

Vector = NDArray[np.float32]


def apply_update(sent: Vector, parts: Iterable[Success]) -> Vector:
    """Apply a reply to the parameters that were sent.

    Parameters
    ----------
    sent
        The round's parameters, float32 [n_params].
    parts
        The reply's parts, in any order.

    Returns
    -------
    Vector
        float32 [n_params]. What the parts do not mention stays as it was.

    Examples
    --------
    >>> sent = np.zeros(4, np.float32)
    >>> change = Sparse(np.array([1, 3], np.uint32), np.array([0.5, -1.0], np.float32))
    >>> apply_update(sent, [Success(1, update=change)]).tolist()
    [0.0, 0.5, 0.0, -1.0]
    """
    vector = sent.copy()
    for part in parts:
        match part.update:
            case Dense(offset=offset, values=values, change=change):
                rows = slice(offset, offset + len(values))
                vector[rows] = sent[rows] + values if change else values
            case Sparse(indices=indices, changes=changes):
                vector[indices] = sent[indices] + changes
    return vector


def dense_parts(values: Vector, shared: NDArray[np.bool_], half: bool, capacity: int) -> Iterator[Dense]:
    """Cut the shared parameters into messages.

    Parameters
    ----------
    values
        All parameters, float32 [n_params].
    shared
        Which of them are sent, bool [n_params].
    half
        Whether they travel as f16.
    capacity
        The bytes of numbers that fit one message.
    """
    size = capacity // (2 if half else 4)
    edges = np.flatnonzero(np.diff(shared, prepend=False, append=False)).reshape(-1, 2)
    for first, end in edges.tolist() or [(0, 0)]:
        for offset in range(first, max(end, first + 1), size):
            yield Dense(offset, values[offset : min(offset + size, end)], half)


def sparse_parts(indices: NDArray[np.uint32], changes: Vector, half: bool, capacity: int) -> Iterator[Sparse]:
    """Cut the changes at these indices into messages.

    Parameters
    ----------
    indices
        Strictly rising, uint32 [n].
    changes
        Of all parameters, float32 [n_params].
    half
        Whether they travel as f16.
    capacity
        The bytes of gaps and numbers that fit one message.
    """
    size = 2 if half else 4
    first = 0
    while True:
        gaps = varint_sizes(np.diff(indices[first:].astype(np.int64), prepend=-1) - 1)
        count = int(np.searchsorted(np.cumsum(gaps + size), capacity, side="right"))
        part = indices[first : first + count]
        yield Sparse(part, changes[part], half)
        first += count
        if first >= len(indices):
            return


def varint_sizes(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each value, in 0..2^32-1, as a LEB128 varint."""
    sizes = np.ones(len(values), np.int64)
    for bits in (7, 14, 21, 28):
        sizes += values >= 1 << bits
    return sizes
