"""Omniglot: handwritten characters of fifty alphabets, as few-shot classification.

The background alphabets train, the evaluation alphabets are held out, as Lake et al. (2015) split them; every tenth
background character is for validation. A device holds what some drawers wrote of one alphabet, and no two devices the
same drawing, as long as there are enough. Every drawer drew a character once, so that a device needs a few of them to
learn a character and to be asked about it.

    omniglot         5-way, 14x14 pixels
    omniglot-20      20-way
    omniglot-5-28    5-way, 28x28 pixels, and so on

The data is read from the folder `omniglot` of TINYFLEET_DATA if there is one, else downloaded once from its authors'
repository and kept in the user's cache.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge import datasets
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Conv2D, Dense, Flatten, Layer, MaxPool2D, ReLU, build
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData, Episodes, Hyperparameters, Recording, Split, Task, draw_classes

CHARACTERS = 40  # of one device, at most
DRAWERS = 20
FEW = 4  # drawers of one device, at least: three to learn from and one to be asked about
SHOWN = 100  # samples of an alphabet in a recording

SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python/"
SHA256 = {
    "images_background.zip": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "images_evaluation.zip": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
}
PACKED = "omniglot/omniglot_28x28_4bit.npz"
PACKED_SHA256 = "e73efef81bd0cd909eef36695bad4008db8e77967595e0092fcf87e5277e50cc"

Characters = NDArray[np.uint8]  # [characters, drawers, 28 * 28], ink 0 to 15
Alphabets = NDArray[np.int64]  # [characters]


def _conv(filters: int, stride: int = 1) -> list[Layer]:
    return [Conv2D(filters, (3, 3), strides=stride, padding="same"), ReLU()]


def program(ways: int, side: int) -> Program:
    """Trains on a Cortex-M4 with 256 KB of RAM."""
    first = [*_conv(8), MaxPool2D(2)] if side == 14 else [*_conv(8, 2), *_conv(16), MaxPool2D(2)]
    layers = [*first, *_conv(16), MaxPool2D(2), Flatten(), Dense(ways)]
    return build(layers, (side, side, 1), "softmax_cross_entropy")


def large(ways: int, side: int) -> Program:
    """Four convolutions of 64 filters, as Vinyals et al. (2016), in strides as in Nichol et al. (2018), without batch
    normalization, which training on single samples does not have."""
    strides = (2, 2, 2, 2) if side == 28 else (1, 2, 2, 2)
    layers = [layer for stride in strides for layer in _conv(64, stride)]
    return build([*layers, Flatten(), Dense(ways)], (side, side, 1), "softmax_cross_entropy")


def load(ways: int = 5, side: int = 14) -> Task:
    if not 2 <= ways <= 20 or side not in (14, 28):
        raise UserError(
            f"there is no task of omniglot with {ways} ways and sides of {side} pixels; name 2 to 20 ways, and a side "
            "of 14 or 28, as in omniglot-20-28"
        )
    whole = characters()
    scale = 1 / 15 if side == 28 else 1 / 60
    images = {split: drawn if side == 28 else shrink(drawn) for split, (drawn, _) in whole.items()}
    training, evaluation = images["training"], images["held_out"]
    alphabet, evaluation_alphabet = whole["training"][1], whole["held_out"][1]
    alphabets = [np.flatnonzero(alphabet == a) for a in np.unique(alphabet)]
    alphabets = [own for own in alphabets if len(own) >= ways]

    def client(index: int, fleet_size: int) -> ClientData:
        turn, which = divmod(index, len(alphabets))
        sharing = -(-(fleet_size - which) // len(alphabets))  # devices that have this alphabet
        count = max(FEW, DRAWERS // sharing)
        drawers = (turn * count + np.arange(count)) % DRAWERS
        own = alphabets[which][:CHARACTERS]
        return ClientData.of([training[c, drawers] for c in own], scale, ways)

    def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        return draw_classes(images[split], scale, ways, seeds, shots, queries)

    def stream(index: int) -> Recording:
        """The evaluation alphabets in sequence, `ways` characters of each, in a random order from the index."""
        random = np.random.default_rng(index)
        order = random.permutation(np.unique(evaluation_alphabet))
        xs, ys = [], []
        for a in order:
            own = random.choice(np.flatnonzero(evaluation_alphabet == a), ways, replace=False)
            rows = random.permutation(ways * DRAWERS)[:SHOWN]
            xs.append(evaluation[own].reshape(ways * DRAWERS, -1)[rows].astype(np.float32) * np.float32(scale))
            ys.append(rows // DRAWERS)
        drifts = tuple(int(at) for at in np.cumsum([len(y) for y in ys])[:-1])
        return Recording(np.concatenate(xs), np.concatenate(ys).astype(np.int64), drifts)

    return Task(
        name="-".join(["omniglot", *map(str, (ways, side) if side != 14 else (ways,) if ways != 5 else ())]),
        ways=ways,
        program=program(ways, side),
        client=client,
        draw=draw,
        meta=Hyperparameters(head_steps=16, steps=144, rate=0.1, alpha=2.0, density=0.1),
        fedavg=Hyperparameters(head_steps=0, steps=160, rate=0.05, alpha=1.0, density=1.0),
        large=large(ways, side),
        stream=stream,
    )


def characters() -> dict[Split, tuple[Characters, Alphabets]]:
    """For each split, images of 28x28 pixels and their alphabets. Raises UserError without the data."""
    (background, alphabet), evaluation = data()
    for_validation = np.arange(len(background)) % 10 == 9
    return {
        "training": (background[~for_validation], alphabet[~for_validation]),
        "validation": (background[for_validation], alphabet[for_validation]),
        "held_out": evaluation,
    }


def data() -> tuple[tuple[Characters, Alphabets], tuple[Characters, Alphabets]]:
    """Background and evaluation characters, as their authors split them. Raises UserError without the data."""
    packed = datasets.local(PACKED)
    if packed is not None:
        datasets.check([packed], PACKED_SHA256, "Omniglot")
        return read_packed(packed)
    paths = [datasets.download(SOURCE + name, digest, "Omniglot", PACKED) for name, digest in SHA256.items()]
    background, evaluation = (read_zip(path) for path in paths)
    return background, evaluation


def read_packed(path: Path) -> tuple[tuple[Characters, Alphabets], tuple[Characters, Alphabets]]:
    """Background and evaluation characters from 28x28 images of 16 grey levels, two pixels a byte."""
    with np.load(path) as data:
        packed, split, shape = data["images"], data["class_split"], data["shape"]
        alphabet = data["class_alphabet"].astype(np.int64)
    images = np.stack([packed >> 4, packed & 15], -1).reshape(*shape[:2], 28 * 28)
    return (images[split == 0], alphabet[split == 0]), (images[split == 1], alphabet[split == 1])


def read_zip(path: Path) -> tuple[Characters, Alphabets]:
    """Characters from the authors' archive: alphabet/character/drawer.png, ink black on white, 105x105 pixels."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        characters, alphabets = [], []
        for folder, drawers in groupby(names, key=lambda name: name.rsplit("/", 1)[0]):
            pages = [Image.open(archive.open(name)).convert("L") for name in drawers]
            small = [np.asarray(page.resize((28, 28), Image.Resampling.BOX)) for page in pages]
            characters.append(15 - np.stack(small).reshape(len(small), 28 * 28) // 16)
            alphabets.append(folder.split("/")[-2])
    return np.stack(characters), np.unique(alphabets, return_inverse=True)[1].astype(np.int64)


def shrink(images: Characters) -> Characters:
    """[n, drawers, 28 * 28] of 0 to 15 -> [n, drawers, 14 * 14] of 0 to 60, each the sum of 2x2 pixels."""
    n, drawers = images.shape[:2]
    quarters: NDArray[np.uint8] = images.reshape(n, drawers, 14, 2, 14, 2).sum(axis=(3, 5), dtype=np.uint8)
    return np.reshape(quarters, (n, drawers, 14 * 14))
