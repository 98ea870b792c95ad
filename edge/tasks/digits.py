"""Handwritten digits, 8x8 pixels, seen by cameras that are mounted at any angle: five-way few-shot classification.

The digits 0 to 4 train, 5 to 9 are held out. Every device holds its own share of the training digits, turned by a
multiple of 90 degrees and perhaps mirrored, as its mount has it; a held-out task has one mount too. Data: the test part
of the Optical Recognition of Handwritten Digits set, as it comes with scikit-learn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge import program as p
from edge.errors import UserError
from edge.tasks import ClientData, Episode, Recipe, Task, draw_episode

WAYS = 5
MOUNTS = 8
TRAINING, HELD_OUT = range(5), range(5, 10)
SCALE = 1 / 16  # a pixel is 0 to 16

PROGRAM = p.build([p.Dense(32), p.ReLU(), p.Dense(WAYS)], (64,), "softmax_cross_entropy")


def load() -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install 'tinyfleet[edge]'") from error
    pixels, digit = load_digits(return_X_y=True)
    images = [pixels[digit == d].astype(np.uint8).reshape(-1, 8, 8) for d in range(10)]

    def client(index: int, of: int) -> ClientData:
        shares = [_mounted(images[d][index::of], index % MOUNTS) for d in TRAINING]
        return ClientData.of(shares, SCALE, WAYS)

    def episode(digits: range, seed: int, shots: int, queries: int) -> Episode:
        mount = seed % MOUNTS
        classes = [_mounted(images[d], mount).astype(np.float32) * np.float32(SCALE) for d in digits]
        return draw_episode(classes, WAYS, seed, shots, queries)

    return Task(
        name="digits",
        ways=WAYS,
        program=PROGRAM,
        client=client,
        validation=lambda seed, shots, queries: episode(TRAINING, seed, shots, queries),
        held_out=lambda seed, shots, queries: episode(HELD_OUT, seed, shots, queries),
        meta=Recipe(head_steps=32, steps=128, rate=0.1, alpha=2.0, top=0.1),
        fedavg=Recipe(head_steps=0, steps=160, rate=0.02, alpha=1.0, top=1.0),
    )


def _mounted(images: NDArray[np.uint8], mount: int) -> NDArray[np.uint8]:
    """Images [n, 8, 8] as a camera at that mount (0 to 7) sees them, as rows [n, 64]."""
    turned = np.rot90(images, mount % 4, (1, 2))
    return (turned if mount < 4 else turned[:, :, ::-1]).reshape(len(images), 64)
