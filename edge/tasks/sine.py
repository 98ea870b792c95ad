"""Sine waves of unknown amplitude and phase: few-shot regression, after Finn et al. 2017 (MAML).

A task is one wave, y = a sin(x + p), with a in [0.1, 5], p in [0, 2 pi) and x in [-5, 5]; nothing is shared between two
tasks but that. It needs no data. A device holds waves of its own, and every task that it is given is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.layers import Dense, Tanh, build
from tinyfleet.edge.tasks import ClientData, Episodes, Hyperparameters, Recording, Split, Task, hashed

WAVES, SAMPLES = 32, 40  # of one device: 10 KB
CHANGES = 200  # samples in a recording until the wave changes
#: Hashed with a seed, so that the splits share no wave.
SALTS: dict[Split, int] = {"training": 1, "validation": 2, "held_out": 3}
DEVICES, RECORDED = 4, 5

PROGRAM = build([Dense(32), Tanh(), Dense(32), Tanh(), Dense(1)], (1,), "mse")
LARGE = build([Dense(64), Tanh(), Dense(64), Tanh(), Dense(1)], (1,), "mse")


def load() -> Task:
    return Task(
        name="sine",
        ways=1,
        program=PROGRAM,
        client=client,
        draw=draw,
        meta=Hyperparameters(head_steps=16, steps=144, rate=0.02, alpha=2.0, density=0.1, max_norm_ratio=300),
        fedavg=Hyperparameters(head_steps=0, steps=160, rate=0.02, alpha=1.0, density=1.0, max_norm_ratio=20),
        large=LARGE,
        stream=stream,
    )


def waves(
    seeds: Sequence[int] | NDArray[np.int64], salt: int, part: int, count: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Each seed's wave at `count` random points (others for another part): x and y, [waves, count, 1]."""
    wave = hashed(seeds, salt, 2)
    amplitude, phase = 0.1 + 4.9 * wave[:, :1], 2 * math.pi * wave[:, 1:]
    x = 10 * hashed(seeds, 16 * part + salt, count) - 5
    y = amplitude * np.sin(x + phase)
    return x.astype(np.float32)[:, :, None], y.astype(np.float32)[:, :, None]


def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
    salt = SALTS[split]
    return Episodes(*waves(seeds, salt, 1, shots), *waves(seeds, salt, 2, queries))


def client(index: int, fleet_size: int) -> ClientData:
    x, y = waves(np.arange(index * WAVES, (index + 1) * WAVES), DEVICES, 1, SAMPLES)
    return ClientData.of(list(x), 1.0, 1, targets=list(y))


def stream(index: int) -> Recording:
    """Five waves in sequence."""
    x, y = waves(np.arange(index * 5, index * 5 + 5), RECORDED, 1, CHANGES)
    return Recording(x.reshape(-1, 1), y.reshape(-1, 1), tuple(range(CHANGES, 5 * CHANGES, CHANGES)))
