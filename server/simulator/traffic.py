"""Updates as the server receives them, and the bytes that a round's messages take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.device.node import OUT_BYTES
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import MAX_INLINE, Sha256, TrainTask, UpdateFormat, encode_action, sealed_size
from tinyfleet.edge.wire.messages import Dense, ErrorCode, Failure, Metrics, Sparse, Success, encode
from tinyfleet.edge.wire.updates import HEAD_BYTES, dense_parts, sparse_parts, varint_sizes
from tinyfleet.server.simulator.methods import MethodSettings

Vector = NDArray[np.float32]
Floats = NDArray[np.float32]

PART_BYTES = OUT_BYTES - HEAD_BYTES
"""Bytes of gaps and values in one part of a reply, as a node sends it."""
COMMAND_ID = 1 << 31
"""Takes as many bytes as a number drawn from 32 bits; all but one in 65,536 of those take as many."""
FAILURE_BYTES = len(encode(Failure(COMMAND_ID, ErrorCode.DIVERGED)))
"""Of the reply of a client that diverged."""


def received_updates(
    initialization: Vector,
    learned: Floats,
    update_format: UpdateFormat,
    shared: NDArray[np.bool_],
    metrics: Metrics,
) -> tuple[Floats, NDArray[np.int64]]:
    """Many clients' updates as the server receives them: the choice and the numbers of mote_update.c.

    Parameters
    ----------
    initialization
        Parameters [n_params] that the clients were sent.
    learned
        What they learned, [clients, n_params].
    update_format
        What they send.
    shared
        Which parameters [n_params] they may send.
    metrics
        Sent with every update; only the encoded lengths of its numbers matter.

    Returns
    -------
    parameters : ndarray of float32, shape (clients, n_params)
        As the server has them from each client.
    sizes : ndarray of int64, shape (clients,)
        Payload bytes of each client's reply.
    """
    half = update_format.half
    if update_format.density >= 1:
        length = _reply_bytes(dense_parts(initialization, shared, half, PART_BYTES), metrics)
        return np.where(shared, _rounded(learned, half), initialization), np.full(len(learned), length)
    changes = learned - initialization
    sent = _largest(np.where(shared, np.abs(changes), np.float32(0)), update_format.density, shared)
    client, index = np.nonzero(sent)
    follows = np.diff(client, prepend=-1) == 0
    between = varint_sizes(index - np.where(follows, np.roll(index, 1), -1) - 1)
    gaps = np.bincount(client, between, len(learned)).astype(np.int64)
    values = sent.sum(1) * (2 if half else 4)
    empty = Sparse(np.zeros(0, np.uint32), np.zeros(0, np.float32), half)
    sizes = _reply_bytes([empty], metrics) + gaps + _length_bytes(gaps) + values + _length_bytes(values)
    for i in np.flatnonzero(gaps + values > PART_BYTES):  # too long for one message
        indices = np.flatnonzero(sent[i]).astype(np.uint32)
        sizes[i] = _reply_bytes(sparse_parts(indices, changes[i], half, PART_BYTES), metrics)
    return np.where(sent, initialization + _rounded(changes, half), initialization), sizes


def _largest(magnitude: Floats, density: float, shared: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which parameters each client sends [clients, n_params]: the largest changes, of equal ones the first, none that
    are 0."""
    k = max(1, int(np.ceil(np.float32(density) * np.float32(shared.sum()))))
    least = np.partition(magnitude, -k, axis=1)[:, -k, None]
    above, equal = magnitude > least, magnitude == least
    left = k - above.sum(1, keepdims=True)
    largest: NDArray[np.bool_] = (above | (equal & (np.cumsum(equal, 1) <= left))) & (magnitude > 0)
    return largest


def _rounded(values: Floats, half: bool) -> Floats:
    return values.astype(np.float16).astype(np.float32) if half else values


def _reply_bytes(updates: Iterable[Dense | Sparse], metrics: Metrics) -> int:
    """Payload bytes of a reply with these updates."""
    parts = list(updates)
    return sum(
        len(encode(Success(COMMAND_ID, i, len(parts), None if i else metrics, update)))
        for i, update in enumerate(parts)
    )


def _length_bytes(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes that the length of a CBOR byte string takes beyond its first byte."""
    return (sizes >= 24).astype(np.int64) + (sizes >= 1 << 8) + 2 * (sizes >= 1 << 16)


def round_bytes_down(initialization: Vector, settings: MethodSettings, number: int, clients: int) -> int:
    """Payload bytes that a round sends: the parameters once, and a command to each client."""
    phases = tuple(replace(phase, proximal_mu=settings.proximal) for phase in settings.phases)
    data = initialization.astype("<f4").tobytes()
    is_inline = clients == 1 and len(data) <= MAX_INLINE
    weights = data if is_inline else Sha256.of(data)
    task = TrainTask(COMMAND_ID, "train", COMMAND_ID, number, bytes(8), COMMAND_ID, phases, 0, settings.update, weights)
    return (0 if is_inline else sum(map(len, chunks(data)))) + clients * sealed_size(encode_action(task))
