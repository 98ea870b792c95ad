"""Handwritten digits, 8x8 pixels, seen by cameras at different angles: five-way few-shot classification.

A class is a digit at one of eight mounts: turned by a multiple of 90 degrees, and perhaps mirrored. The digits 0 to 4
train: each device holds its own share of them, at its own mount. Half of the samples of the digits 5 to 9, not
mirrored, are for validation; the other half, mirrored, are held out. An episode has one mount. Data: the test part of
the Optical Recognition of Handwritten Digits set, which comes with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.tasks import ClientData, Episode, Episodes, Hyperparameters, Recording, Split, Task, draw_episode

WAYS = 5
MOUNTS = 8  # four turns, then the same mirrored
TRAINING, UNSEEN = range(5), range(5, 10)
SCALE = 1 / 16  # a pixel is 0 to 16

PROGRAM = build([Dense(32), ReLU(), Dense(WAYS)], (64,), "softmax_cross_entropy")
LARGE = build([Dense(128), ReLU(), Dense(64), ReLU(), Dense(WAYS)], (64,), "softmax_cross_entropy")


def load() -> Task:
    package = find_spec("sklearn")  # not imported: that takes longer than the rest of a device's start
    if package is None or not package.submodule_search_locations:
        raise UserError("the digits come with scikit-learn: pip install 'tinyfleet[edge]'")
    path = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = np.loadtxt(path, np.uint8, delimiter=",")
    images = [table[table[:, -1] == d, :-1].reshape(-1, 8, 8) for d in range(10)]

    def client(index: int, fleet_size: int) -> ClientData:
        shares = [_mounted(images[d][index::fleet_size], index % MOUNTS) for d in TRAINING]
        return ClientData.of(shares, SCALE, WAYS)

    def episode(split: Split, seed: int, shots: int, queries: int) -> Episode:
        if split == "training":
            mount, chosen = seed % MOUNTS, [images[d] for d in TRAINING]
        else:
            mirrored = split == "held_out"
            mount, chosen = 4 * mirrored + seed % 4, [images[d][int(mirrored) :: 2] for d in UNSEEN]
        classes = [_mounted(some, mount).astype(np.float32) * np.float32(SCALE) for some in chosen]
        return draw_episode(classes, WAYS, seed, shots, queries)

    def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        return Episodes.of(episode(split, seed, shots, queries) for seed in seeds)

    def stream(index: int) -> Recording:
        """The digits 5 to 9, not mirrored; the camera turns by 90 degrees after every 200 of them."""
        random = np.random.default_rng(index)
        parts, labels = [], []
        for mount in range(4):
            label = random.integers(0, WAYS, 200)
            rows = [images[UNSEEN[k]][random.integers(len(images[UNSEEN[k]]))] for k in label]
            parts.append(_mounted(np.stack(rows), (index + mount) % 4).astype(np.float32) * np.float32(SCALE))
            labels.append(label.astype(np.int64))
        return Recording(np.concatenate(parts), np.concatenate(labels), (200, 400, 600))

    return Task(
        name="digits",
        ways=WAYS,
        program=PROGRAM,
        client=client,
        draw=draw,
        meta=Hyperparameters(head_steps=16, steps=144, rate=0.1, alpha=2.0, density=0.1),
        fedavg=Hyperparameters(head_steps=0, steps=160, rate=0.02, alpha=1.0, density=1.0),
        large=LARGE,
        stream=stream,
    )


def _mounted(images: NDArray[np.uint8], mount: int) -> NDArray[np.uint8]:
    """Images [n, 8, 8] as a camera at that mount (0 to 7) sees them, as rows [n, 64]."""
    turned = np.rot90(images, mount % 4, (1, 2))
    return (turned if mount < 4 else turned[:, :, ::-1]).reshape(len(images), 64)
