"""Omniglot: handwritten characters of fifty alphabets, 14x14 pixels, as five-way few-shot classification.

The background alphabets train, the evaluation alphabets are held out, as Lake et al. (2015) split them; every tenth
background character is for validation. Every device holds training characters of its own, each from twenty drawers.
The data is read from the folder `omniglot` of TINYFLEET_DATA if there is one, else downloaded once from its authors'
repository and kept in the user's cache.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge import program as p
from edge.errors import UserError
from edge.tasks import ClientData, Episode, Episodes, Recipe, Split, Task, draw_episode

WAYS = 5
CHARACTERS = 40  # of one device: 800 samples, 157 KB
SIDE = 14
SCALE = 1 / 60  # a pixel is the sum of four grey levels of 0 to 15

PROGRAM = p.build(
    [
        p.Conv2D(8, (3, 3), padding="same"),
        p.ReLU(),
        p.MaxPool2D(2),
        p.Conv2D(16, (3, 3), padding="same"),
        p.ReLU(),
        p.MaxPool2D(2),
        p.Flatten(),
        p.Dense(WAYS),
    ],
    (SIDE, SIDE, 1),
    "softmax_cross_entropy",
)

SOURCE = "https://github.com/brendenlake/omniglot/raw/master/python/"
SHA256 = {
    "images_background.zip": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "images_evaluation.zip": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
}

Characters = NDArray[np.uint8]  # [characters, drawers, SIDE * SIDE]


def load() -> Task:
    folder = os.environ.get("TINYFLEET_DATA")
    packed = Path(folder, "omniglot", "omniglot_28x28_4bit.npz") if folder else None
    background, evaluation = read_packed(packed) if packed and packed.exists() else _download()
    for_validation = np.arange(len(background)) % 10 == 9
    training = background[~for_validation]
    characters = {"training": training, "validation": background[for_validation], "held_out": evaluation}

    def client(index: int, of: int) -> ClientData:
        own = np.random.default_rng(index).choice(len(training), CHARACTERS, replace=False)
        return ClientData.of([training[c] for c in own], SCALE, WAYS)

    def episode(some: Characters, seed: int, shots: int, queries: int) -> Episode:
        few = np.random.default_rng(seed).choice(len(some), WAYS, replace=False)
        classes = [some[c].astype(np.float32) * np.float32(SCALE) for c in few]
        return draw_episode(classes, WAYS, seed, shots, queries)

    def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        return Episodes.of(episode(characters[split], seed, shots, queries) for seed in seeds)

    return Task(
        name="omniglot",
        ways=WAYS,
        program=PROGRAM,
        client=client,
        draw=draw,
        meta=Recipe(head_steps=16, steps=144, rate=0.1, alpha=2.0, top=0.1),
        fedavg=Recipe(head_steps=0, steps=160, rate=0.07, alpha=1.0, top=1.0),
    )


def read_packed(path: Path) -> tuple[Characters, Characters]:
    """Background and evaluation characters from 28x28 images of 16 grey levels, two pixels a byte."""
    with np.load(path) as data:
        packed, split, shape = data["images"], data["class_split"], data["shape"]
    images = _shrink(np.stack([packed >> 4, packed & 15], -1).reshape(shape))
    return images[split == 0], images[split == 1]


def read_zip(path: Path) -> Characters:
    """Characters from the authors' archive: alphabet/character/drawer.png, ink black on white, 105x105 pixels."""
    from PIL import Image

    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        characters = []
        for _, drawers in groupby(names, key=lambda name: name.rsplit("/", 1)[0]):
            pages = [Image.open(archive.open(name)).convert("L") for name in drawers]
            small = [np.asarray(page.resize((28, 28), Image.Resampling.BOX)) for page in pages]
            characters.append(15 - np.stack(small) // 16)
    return _shrink(np.stack(characters))


def _download() -> tuple[Characters, Characters]:
    try:
        import pooch

        paths = [pooch.retrieve(SOURCE + name, f"sha256:{digest}") for name, digest in SHA256.items()]
    except ImportError as error:
        raise UserError("downloading Omniglot needs pooch: pip install 'tinyfleet[edge]'") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"Omniglot could not be downloaded ({error}); set TINYFLEET_DATA to a folder that has "
            "omniglot/omniglot_28x28_4bit.npz, or try again with a network"
        ) from error
    background, evaluation = (read_zip(Path(path)) for path in paths)
    return background, evaluation


def _shrink(images: NDArray[np.uint8]) -> Characters:
    """[n, drawers, 28, 28] of 0 to 15 -> [n, drawers, 196] of 0 to 60, each the sum of 2x2 pixels."""
    n, drawers = images.shape[:2]
    quarters: NDArray[np.uint8] = images.reshape(n, drawers, SIDE, 2, SIDE, 2).sum(axis=(3, 5), dtype=np.uint8)
    return np.reshape(quarters, (n, drawers, SIDE * SIDE))
