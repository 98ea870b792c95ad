"""What a fleet learns. One file a task; the agent, the simulator and the server read the same.

A file has a function `load()` that returns its Task; whole numbers in a task's name, as in omniglot-20, are given to
it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclass(frozen=True)
class ClientData:
    """The samples that one device holds, in the form that the C stream replays (see mote_stream.h).

    features: [samples, size], rows sorted by class: uint8, of which each is worth `scale`, or float32 as they are.
    starts: uint32 [classes + 1]; class c has rows starts[c] to starts[c + 1] - 1. Its last quarter is never learned
    from: where time matters, rows of a class are in the order of time.
    ways: how many classes make one task.
    fixed: whether a class's number is its label, and all are one task; else every task labels its classes anew.
    targets: of a regression, float32 [samples, outputs]; a class is then a function, and a task has one: ways is 1.
    """

    features: NDArray[np.uint8] | NDArray[np.float32]
    starts: NDArray[np.uint32]
    scale: float
    ways: int
    fixed: bool = False
    targets: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        classes: Sequence[NDArray[Any]],
        scale: float,
        ways: int,
        *,
        fixed: bool = False,
        targets: Sequence[NDArray[np.float32]] | None = None,
    ) -> ClientData:
        """From one array [samples, size] a class, uint8 or float32, and of a regression one [samples, outputs]."""
        starts = np.cumsum([0, *(len(c) for c in classes)]).astype(np.uint32)
        joined = None if targets is None else np.ascontiguousarray(np.concatenate(targets), np.float32)
        return cls(np.ascontiguousarray(np.concatenate(classes)), starts, scale, ways, fixed, joined)

    def check_compatible(self, program: Program) -> None:
        """Raises UserError unless this model can learn from these samples: their features, and their class or targets
        for a target."""
        has, takes, gives = self.features.shape[1], math.prod(program.input_shape), math.prod(program.output_shape)
        if has != takes:
            raise UserError(
                f"the samples have {has} features and the model takes {takes}; choose the same task's model"
            )
        if self.targets is not None:
            wants = self.targets.shape[1]
            if program.loss == "softmax_cross_entropy" or gives != wants:
                kind = "classes" if program.loss == "softmax_cross_entropy" else "values"
                raise UserError(
                    f"a sample has {wants} numbers to predict and the model learns {gives} {kind}; choose the same "
                    "task's model"
                )
            return
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


@dataclass(frozen=True)
class Recording:
    """What one device sees, in the order of time.

    x: float32 [n, size]. y: int64 [n], or float32 [n, outputs]. drifts: the samples with which what is to be learned
    changes; None where nobody knows.
    """

    x: NDArray[np.float32]
    y: Targets
    drifts: tuple[int, ...] | None


Draw = Callable[[Split, Sequence[int], int, int], Episodes]
"""(split, seeds, shots, queries) -> one task a seed, of so many samples a class to learn from and to be asked about (of
a regression: so many in all). The same seed gives the same task, whatever it is drawn with."""


@dataclass(frozen=True)
class Hyperparameters:
    """How a device works in one round, and what the server makes of it. Tuned on validation tasks."""

    head_steps: int  # samples that fit the head alone, the rest frozen; 0: there is no local part
    steps: int  # samples that train everything, one step each
    rate: float  # of the device
    alpha: float  # of the server, where the strategy has one
    density: float  # share of the changes that is sent


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
    meta: Hyperparameters
    fedavg: Hyperparameters
    #: for a Raspberry Pi; takes the same samples as `program`, which trains on a Cortex-M4 with 256 KB of RAM.
    large: Program
    #: index -> what device number `index`, of those that are held out, sees as time goes by.
    stream: Callable[[int], Recording]


def load(name: str) -> Task:
    """The task of that name, or of that file, if it ends in .py. Raises UserError if there is none, or if its data
    cannot be had."""
    if name.endswith(".py"):
        return _load_file(Path(name))
    module, *numbers = name.split("-")
    if module not in NAMES or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"there is no task named '{name}'; known tasks: {', '.join(NAMES)}, or the path of a file that has one"
        )
    load_it: Callable[..., Task] = importlib.import_module(f"tinyfleet.edge.tasks.{module}").load
    try:
        given = inspect.signature(load_it).bind(*map(int, numbers))
    except TypeError as error:
        raise UserError(f"there is no task named '{name}': '{module}' takes no such numbers") from error
    return load_it(*given.args)


def _load_file(path: Path) -> Task:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"there is no file {path}; name one of the tasks {', '.join(NAMES)}, or a file's path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load"):
        raise UserError(f"{path} has no function load() that returns its Task; see docs/how-to/add-a-learning-task.md")
    task: Task = module.load()
    return task


def hashed(seeds: Sequence[int] | NDArray[Any], salt: int, count: int) -> NDArray[np.float64]:
    """[seeds, count] numbers in [0, 1), the same for the same seed and salt: SplitMix64 (Steele et al. 2014). A
    generator for every seed would take 15 microseconds each."""
    state = np.asarray(seeds, np.uint64)[:, None] * np.uint64(0xD1342543DE82EF95) + np.uint64(salt << 32)
    state = state + np.arange(1, count + 1, dtype=np.uint64)
    state = state * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    state = state ^ state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_classes(
    pool: NDArray[np.uint8], scale: float, ways: int, seeds: Sequence[int], shots: int, queries: int
) -> Episodes:
    """A task a seed, of `ways` of the classes [classes, samples, size] under a random labelling: many at once.

    Raises ValueError if a class has too few samples.
    """
    tasks, (classes, samples, _) = len(seeds), pool.shape
    if shots + queries > samples:
        raise ValueError(f"a class has {samples} samples, fewer than {shots} + {queries}")
    # A random subset without a list of all classes (Floyd, in Bentley 1987), in a random order: the labelling.
    drawn, chosen = hashed(seeds, 1, 2 * ways), np.empty((tasks, ways), np.int64)
    for i in range(ways):
        last = classes - ways + i
        class_ = (drawn[:, i] * (last + 1)).astype(np.int64)
        taken = (chosen[:, :i] == class_[:, None]).any(axis=1)
        chosen[:, i] = np.where(taken, last, class_)
    chosen = np.take_along_axis(chosen, np.argsort(drawn[:, ways:], axis=1), 1)
    keys = hashed(seeds, 2, ways * samples).reshape(tasks, ways, samples)
    rows = np.argsort(keys, axis=2)[:, :, : shots + queries]
    order = np.argsort(hashed(seeds, 3, ways * shots), axis=1)
    label = np.arange(ways)

    def values(rows: NDArray[np.int64], order: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        of = np.broadcast_to(chosen[:, :, None], rows.shape).reshape(tasks, -1)
        flat = rows.reshape(tasks, -1)
        if order is not None:
            of, flat = np.take_along_axis(of, order, 1), np.take_along_axis(flat, order, 1)
        picked: NDArray[np.float32] = pool[of, flat].astype(np.float32) * np.float32(scale)
        return picked

    return Episodes(
        support_x=values(rows[:, :, :shots], order),
        support_y=label.repeat(shots)[order],
        query_x=values(rows[:, :, shots:]),
        query_y=np.tile(label.repeat(queries), (tasks, 1)),
    )


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
