"""Learning tasks: what a fleet learns, one file each. Devices, simulator and server use the same files.

A file has a function `load()` that returns its Task. Whole numbers in a task's name, as in omniglot-20, are its
arguments.
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

    Attributes
    ----------
    features : [samples, size], rows sorted by class
        uint8, each worth `scale`, or float32 as they are.
    starts : uint32 [classes + 1]
        Class c has rows starts[c] to starts[c + 1] - 1. The last quarter of a class is never learned from. If time
        matters, the rows of a class are in time order.
    scale : float
        The value of one unit of a uint8 feature.
    ways : int
        The number of classes in one episode.
    fixed : bool
        Whether a class's number is its label in every episode. If not, every episode relabels its classes.
    targets : float32 [samples, outputs], or None
        For a regression: what to predict. A class is then a function, and an episode has one of them (`ways` is 1).
    """

    features: NDArray[np.uint8] | NDArray[np.float32]
    starts: NDArray[np.uint32]
    scale: float
    ways: int
    fixed: bool = False
    targets: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Puts the arrays into the form that C reads: float64 and float16 become float32.

        Raises
        ------
        UserError
            If they cannot be: the message names what is wrong with which of them.
        """
        features = np.asarray(self.features)
        if features.ndim != 2 or features.shape[1] < 1:
            raise UserError(f"a device's features have the shape {features.shape}; it must be (samples, size)")
        kept = features if features.dtype == np.uint8 else _as_float32(features, "a device's features", "uint8 or ")
        starts = np.asarray(self.starts)
        if starts.ndim != 1 or starts.dtype.kind not in "iu" or not _is_rising(starts, len(features)):
            raise UserError(
                f"a device's starts must be whole numbers that rise from 0 to the {len(features)} samples, at least 2 "
                "for each class"
            )
        if not math.isfinite(self.scale):
            raise UserError(f"a device's scale must be a finite number, not {self.scale}")
        targets = self.targets
        if targets is not None:
            targets = _as_float32(targets, "a device's targets")
            if targets.ndim != 2 or len(targets) != len(features) or targets.shape[1] < 1:
                raise UserError(f"a device's targets have the shape {targets.shape}; one row a sample is wanted")
        for name, array in (("features", kept), ("starts", starts.astype(np.uint32)), ("targets", targets)):
            object.__setattr__(self, name, None if array is None else np.ascontiguousarray(array))

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
        """Joins one array for each class.

        Parameters
        ----------
        classes : uint8 or float32 [samples, size], one array for each class
        scale, ways, fixed
            As the attributes.
        targets : float32 [samples, outputs], one array for each class
            For a regression.

        Examples
        --------
        >>> data = ClientData.of([np.zeros((3, 2), np.uint8), np.ones((4, 2), np.uint8)], scale=1 / 255, ways=2)
        >>> data.starts.tolist()
        [0, 3, 7]
        """
        starts = np.cumsum([0, *(len(c) for c in classes)]).astype(np.uint32)
        joined = None if targets is None else np.concatenate(targets)
        return cls(np.concatenate(classes), starts, scale, ways, fixed, joined)

    def check_compatible(self, program: Program) -> None:
        """Checks that a model can learn from these samples: their number of features, and their classes or targets.

        Raises
        ------
        UserError
            If it cannot; the message says what differs.
        """
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


def _as_float32(values: NDArray[Any], what: str, other: str = "") -> NDArray[np.float32]:
    """Finite floats as float32. Raises UserError, which says `what` they are, for others and for other numbers."""
    array = np.asarray(values)
    if array.dtype.kind != "f":
        raise UserError(f"{what} are {array.dtype}; give {other}float32, such as with .astype(np.float32)")
    with np.errstate(over="ignore"):
        floats = array.astype(np.float32, copy=False)
    if not np.isfinite(floats).all():
        raise UserError(f"{what} have numbers that are not finite, or too large for float32; leave these samples out")
    return floats


def _is_rising(starts: NDArray[Any], samples: int) -> bool:
    """Whether these are where the classes of so many samples begin and end, each with 2 samples or more."""
    sizes = np.diff(starts.astype(np.int64))
    return len(sizes) > 0 and sizes.min() >= 2 and starts[0] == 0 and starts[-1] == samples


Split = Literal["training", "validation", "held_out"]
"""What the fleet learns from, what rates and step counts are tuned on, and what is scored. They never share a class (or
a speaker, a room, a span of time: whatever is new about a new device)."""

Targets = NDArray[np.int64] | NDArray[np.float32]
"""Classes, int64 [...] in 0 .. ways - 1, or for a regression float32 [..., outputs]."""


@dataclass(frozen=True)
class Episode:
    """One few-shot problem: float32 samples [n, size] and targets [n, ...]. No sample is in both support and query."""

    support_x: NDArray[np.float32]
    support_y: Targets
    query_x: NDArray[np.float32]
    query_y: Targets


@dataclass(frozen=True)
class Episodes:
    """Episodes of one size: the arrays of an Episode with one more axis in front, the episodes."""

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
    """What one device sees over time.

    Attributes
    ----------
    x : float32 [n, size]
    y : int64 [n], or float32 [n, outputs]
    drifts : tuple of int, or None
        The samples at which the problem changes; None if that is unknown.
    """

    x: NDArray[np.float32]
    y: Targets
    drifts: tuple[int, ...] | None

    def __post_init__(self) -> None:
        """Makes the features float32; a sample may hold anything, as a sensor's can.

        Raises
        ------
        UserError
            If there is no sample, or if the arrays are of other numbers or shapes.
        """
        x, y = np.asarray(self.x), np.asarray(self.y)
        if x.ndim != 2 or len(x) != len(y) or y.ndim not in (1, 2):
            raise UserError(f"a recording has the shapes {x.shape} and {y.shape}; it needs (n, size) and (n, outputs)")
        if not len(x):
            raise UserError("a recording has no samples; record some first")
        if x.dtype.kind not in "fiu" or y.dtype.kind not in "fiu":
            raise UserError(f"a recording of {x.dtype} features and {y.dtype} targets; give numbers")
        with np.errstate(over="ignore"):
            object.__setattr__(self, "x", np.ascontiguousarray(x, np.float32))

    def check_compatible(self, program: Program) -> None:
        """Raises UserError if a model takes another number of features."""
        takes = math.prod(program.input_shape)
        if self.x.shape[1] != takes:
            raise UserError(
                f"a recording has {self.x.shape[1]} features and the model takes {takes}; choose the same task's model"
            )


Draw = Callable[[Split, Sequence[int], int, int], Episodes]
"""(split, seeds, shots, queries) -> one episode for each seed, with that many support and query samples of each class
(for a regression: in total). The same seed always gives the same episode, whatever other seeds it is drawn with."""


MAX_NORM_RATIO = 5.0
"""More than honest devices' changes differ in length, unless a task says otherwise; benchmarks/change_norms.py."""


@dataclass(frozen=True)
class Hyperparameters:
    """What a device does in one round, and how the server combines the results. Tuned on validation episodes."""

    head_steps: int  # samples that fit only the head, the rest frozen; 0: the head is shared
    steps: int  # samples that train all layers, one step each
    rate: float  # the device's learning rate
    alpha: float  # the server's rate, if the strategy has one
    density: float  # the share of the changes that a device sends
    max_norm_ratio: float = MAX_NORM_RATIO  # how many times as long as the median an honest device's change may be

    def __post_init__(self) -> None:
        if self.steps < 1 or self.head_steps < 0:
            raise UserError(f"a device learns in at least 1 step, not {self.steps} (and {self.head_steps} of the head)")
        if not (0 < self.rate < math.inf and 0 < self.alpha < math.inf and 0 < self.density <= 1):
            raise UserError(
                f"rate and alpha are positive numbers, and density is in (0, 1]; not {self.rate:g}, {self.alpha:g} and "
                f"{self.density:g}"
            )


@dataclass(frozen=True)
class Task:
    """A learning task: the data that devices hold, models, and how few-shot episodes are drawn."""

    name: str
    ways: int
    program: Program
    #: (client index, fleet size) -> the data of that device.
    client: Callable[[int, int], ClientData]
    draw: Draw
    #: For TinyMetaFed and its relatives, and for FedAvg.
    meta: Hyperparameters
    fedavg: Hyperparameters
    #: For a Raspberry Pi; takes the same samples as `program`, which trains on a Cortex-M4 with 256 KB of RAM.
    large: Program
    #: client index -> what that held-out device records over time.
    stream: Callable[[int], Recording]


def load(name: str) -> Task:
    """Loads a learning task.

    Parameters
    ----------
    name : str
        A name in `NAMES`, with numbers after it if the task takes any (`omniglot-20`), or the path of a .py file that
        has a function `load() -> Task`.

    Returns
    -------
    Task

    Raises
    ------
    UserError
        If there is no such task, or if its data are missing and cannot be downloaded.

    Examples
    --------
    >>> task = load("sine")
    >>> task.program.input_shape, task.program.n_params
    ((1,), 1153)
    """
    if name.endswith(".py"):
        return _load_file(Path(name))
    module, *numbers = name.split("-")
    if module not in NAMES or not all(number.isdecimal() for number in numbers):
        raise UserError(
            f"there is no task named '{name}'; known tasks: {', '.join(NAMES)}, or the path of a file that has one"
        )
    load_it: Callable[..., Task] = importlib.import_module(f"tinyfleet.edge.tasks.{module}").load
    try:
        arguments = inspect.signature(load_it).bind(*map(int, numbers))
    except TypeError as error:
        raise UserError(f"there is no task named '{name}': '{module}' does not take these numbers") from error
    return load_it(*arguments.args)


def _load_file(path: Path) -> Task:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserError(f"there is no file {path}; name one of the tasks {', '.join(NAMES)}, or a file's path")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "load"):
        raise UserError(f"{path} has no function load() that returns its Task; see docs/how-to/add-a-learning-task.md")
    task = module.load()
    if not isinstance(task, Task):
        raise UserError(f"load() of {path} returns a {type(task).__name__}; it must return a tinyfleet.edge.tasks.Task")
    return task


def hashed(seeds: Sequence[int] | NDArray[Any], salt: int, count: int) -> NDArray[np.float64]:
    """[seeds, count] numbers in [0, 1), the same for the same seed and salt: SplitMix64 (Steele et al. 2014).

    One NumPy generator for each seed would take 15 microseconds each.
    """
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
    """Draws many episodes together: for each seed, `ways` of the classes under random labels.

    Parameters
    ----------
    pool : uint8 [classes, samples, size]
    scale : float
        The value of one unit of a feature.
    shots, queries : int
        Support and query samples of each class.

    Raises
    ------
    ValueError
        If a class has too few samples.
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
    """Draws one episode: `ways` of the classes (each an array [samples, size]) under random labels."""
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
