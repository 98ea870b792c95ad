"""What a fleet learns. One file a task; the agent, the simulator and the server read the same."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import UserError
from edge.program import Program

NAMES = ("digits", "omniglot")


@dataclass(frozen=True)
class ClientData:
    """The samples that one device holds, in the form that the C stream replays (see mote_stream.h).

    features: uint8 [samples, size], rows sorted by class; a feature's value is its byte times `scale`.
    starts: uint32 [classes + 1]; class c has rows starts[c] to starts[c + 1] - 1.
    ways: how many classes make one task.
    """

    features: NDArray[np.uint8]
    starts: NDArray[np.uint32]
    scale: float
    ways: int

    @classmethod
    def of(cls, classes: Sequence[NDArray[np.uint8]], scale: float, ways: int) -> ClientData:
        """From one array [samples, size] a class."""
        starts = np.cumsum([0, *(len(c) for c in classes)]).astype(np.uint32)
        return cls(np.ascontiguousarray(np.concatenate(classes)), starts, scale, ways)

    def must_fit(self, program: Program) -> None:
        """Raises UserError unless this model can learn from these samples: their features, and a class for a target."""
        has, takes, gives = self.features.shape[1], math.prod(program.input_shape), math.prod(program.output_shape)
        if has != takes:
            raise UserError(
                f"the samples have {has} features and the model takes {takes}; choose the same task's model"
            )
        if program.loss != "softmax_cross_entropy" and gives > 1:
            raise UserError(
                f"a sample has one class and the model learns {gives} values; choose one that ends in softmax"
            )
        if program.loss == "softmax_cross_entropy" and gives < self.ways:
            raise UserError(f"a task has {self.ways} classes and the model {gives}; choose the same task's model")


Split = Literal["training", "validation", "held_out"]
"""What the fleet learns from, what rates and step counts are tuned on, and what is scored: they never share a class (or
a speaker, a room, a span of time: whatever a new device would be new in)."""

Targets = NDArray[np.int64] | NDArray[np.float32]
"""Classes int64 [...] in 0 .. ways - 1, or of a regression float32 [..., outputs]."""


@dataclass(frozen=True)
class Episode:
    """One few-shot task: float32 samples [n, size] and targets [n, ...]; no sample is in both halves."""

    support_x: NDArray[np.float32]
    support_y: Targets
    query_x: NDArray[np.float32]
    query_y: Targets


@dataclass(frozen=True)
class Episodes:
    """Few-shot tasks of one size, side by side: the arrays of an Episode under one more axis, the tasks."""

    support_x: NDArray[np.float32]
    support_y: Targets
    query_x: NDArray[np.float32]
    query_y: Targets

    @classmethod
    def of(cls, episodes: Iterable[Episode]) -> Episodes:
        rows = [vars(episode) for episode in episodes]
        return cls(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def __len__(self) -> int:
        return len(self.support_x)

    def __getitem__(self, index: int) -> Episode:
        return Episode(**{name: array[index] for name, array in vars(self).items()})


Draw = Callable[[Split, Sequence[int], int, int], Episodes]
"""(split, seeds, shots, queries) -> one task a seed, of so many samples a class to learn from and to be asked about (of
a regression: so many in all). The same seed gives the same task, whatever it is drawn with."""


@dataclass(frozen=True)
class Recipe:
    """How a device works in one round, and what the server makes of it. Tuned on validation tasks."""

    head_steps: int  # samples that fit the head alone, the rest frozen; 0: there is no local part
    steps: int  # samples that train everything, one step each
    rate: float  # of the device
    alpha: float  # of the server, where the strategy has one
    top: float  # share of the changes that is sent


@dataclass(frozen=True)
class Task:
    """A learning problem, split by class: what devices hold, what is tuned on and what is scored never share one."""

    name: str
    ways: int
    program: Program
    #: (index, of) -> what device number `index` of a fleet of `of` holds.
    client: Callable[[int, int], ClientData]
    draw: Draw
    #: what TinyMetaFed does with it, and what FedAvg does.
    meta: Recipe
    fedavg: Recipe


def load(name: str) -> Task:
    """The task of that name. Raises UserError if there is none, or if its data cannot be had."""
    if name not in NAMES:
        raise UserError(f"there is no task named '{name}'; known tasks: {', '.join(NAMES)}")
    task: Task = importlib.import_module(f"edge.tasks.{name}").load()
    return task


def draw_episode(classes: list[NDArray[np.float32]], ways: int, seed: int, shots: int, queries: int) -> Episode:
    """A task of `ways` of the classes (each an array [samples, size]) under a random labelling."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(classes), ways, replace=False)
    rows = [random.permutation(len(classes[c]))[: shots + queries] for c in chosen]
    if any(len(r) < shots + queries for r in rows):
        raise ValueError(f"a class has fewer than {shots} + {queries} samples")
    picked = [classes[c][r] for c, r in zip(chosen, rows, strict=True)]
    order = random.permutation(ways * shots)
    label = np.arange(ways)
    return Episode(
        support_x=np.concatenate([p[:shots] for p in picked])[order],
        support_y=label.repeat(shots)[order],
        query_x=np.concatenate([p[shots:] for p in picked]),
        query_y=label.repeat(queries),
    )
