"""Accuracy over time on streams that drift: a model that stays, one that learns, and one that also notices.

python benchmarks/drift.py [--seeds 5] [--samples 3000] [--changes 3] [--plot docs/drift-digits.png] [--tune]

The task is the digits of cameras. A camera that no device has trained at watches the digits 5 to 9, whose labels stay;
`changes` times, at random, it is knocked into another position. All three begin with the same start, learned with
TinyMetaFed from the training cameras, adapted to the first 100 samples. Accuracy is prequential: a sample is answered,
then learned from. A change counts as noticed by the first alarm after it and before the next; any other is false.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from recipes import LocalGrid
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from edge import tasks
from edge.client_app import to_record, to_vector
from edge.drift import OnlineLearner, Reaction
from edge.learner import MoteLearner
from edge.tasks import Task
from edge.tasks.digits import MOUNTS, SCALE, UNSEEN, WAYS
from server.flower import log_level
from server.run import first_parameters, method

Vector = NDArray[np.float32]
RATE = 0.05  # of learning online, tuned on the validation streams as the reaction is
WARM = 100  # samples that all adapt to before the stream begins
SMOOTH = 100  # samples that a point of the plot is the mean of


@dataclass(frozen=True)
class Drifting:
    """A stream: samples x [n, 64], their labels [n], and where the position changes."""

    x: Vector
    y: NDArray[np.int64]
    changes: list[int]


def meta_learn(task: Task, seed: int, rounds: int = 60, clients: int = 5) -> Vector:
    """A start from TinyMetaFed on the training cameras, with the task's own recipe."""
    how = method("tinymetafed", task, rounds=rounds, clients=clients, query=0, seed=seed)
    start = to_record(first_parameters(task.program, how, seed), task.program)
    return to_vector(how.strategy.start(LocalGrid(task), start, rounds).arrays, task.program)


def stream(seed: int, samples: int, changes: int, held_out: bool) -> Drifting:
    """Mirrored cameras and one half of the samples are held out; the others are for tuning."""
    random = np.random.default_rng([seed, 2, held_out])
    pixels, digit = load_digits(return_X_y=True)
    images = [(pixels[digit == d].reshape(-1, 8, 8) * SCALE).astype(np.float32)[int(held_out) :: 2] for d in UNSEEN]
    third = samples // (3 * (changes + 1))  # changes lie apart
    at = [samples * i // (changes + 1) + int(random.integers(-third, third + 1)) for i in range(1, changes + 1)]
    mounts = range(MOUNTS // 2, MOUNTS) if held_out else range(MOUNTS // 2)
    mount, x, y = int(random.choice(mounts)), [], random.integers(0, WAYS, samples)
    for t in range(samples):
        if t in at:
            mount = int(random.choice([m for m in mounts if m != mount]))
        image = images[y[t]][int(random.integers(len(images[y[t]])))]
        turned = np.rot90(image, mount % 4)
        x.append((turned if mount < 4 else turned[:, ::-1]).ravel())
    return Drifting(np.ascontiguousarray(x), y, at)


def methods(rate: float, reaction: Reaction) -> dict[str, tuple[float, Reaction | None]]:
    return {
        "no learning": (0.0, None),
        "online learning": (rate, None),
        "and notices drift": (rate, reaction),
        "and starts anew": (rate, replace(reaction, restart=True)),
    }


def follow(
    task: Task, start: Vector, drifting: Drifting, rate: float, reaction: Reaction | None
) -> tuple[NDArray[np.float64], list[int]]:
    """Whether each answer after the first WARM was right, and when drift was noticed."""
    learner = OnlineLearner(MoteLearner(task.program), task.program, start, rate, reaction)
    learner.adapt(zip(drifting.x[:WARM], drifting.y[:WARM], strict=True), task.meta.rate)
    right, alarms = np.zeros(len(drifting.y)), []
    for t in range(WARM, len(drifting.y)):
        answer = learner.learn(drifting.x[t], int(drifting.y[t]))
        right[t] = 1 - answer.error
        if answer.drifted:
            alarms.append(t)
    return right[WARM:], alarms


def delays(changes: Sequence[int], alarms: Sequence[int], end: int) -> tuple[list[int], int]:
    """Samples from each change that was noticed to its alarm, and how many alarms are false."""
    found = []
    for change, following in zip(changes, [*changes[1:], end], strict=True):
        after = [alarm for alarm in alarms if change <= alarm < following]
        found += [after[0] - change] if after else []
    return found, len(alarms) - len(found)


def interval(values: Sequence[float]) -> str:
    """Mean and half width of its 95 % interval, over seeds (Student's t)."""
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0
    return f"{100 * np.mean(values):.1f} ± {100 * half:.1f} %"


def tune(task: Task, seeds: Sequence[int], starts: Sequence[Vector], samples: int, changes: int) -> None:
    """Prints the accuracy of every setting on the validation streams, the best last."""

    def settings() -> Iterator[tuple[float, Reaction | None]]:
        for rate in (0.01, 0.02, 0.05, 0.1):
            yield rate, None
            for steps, fast, restart in itertools.product((40, 80, 160), (0.1, 0.2), (True, False)):
                yield rate, Reaction(steps=steps, rate=fast, restart=restart)

    streams = [stream(seed, samples, changes, held_out=False) for seed in seeds]
    scored = [
        (float(np.mean([follow(task, s, d, *how)[0].mean() for s, d in zip(starts, streams, strict=True)])), str(how))
        for how in settings()
    ]
    for accuracy, how in sorted(scored):
        print(f"{accuracy:.4f} {how}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--changes", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    log_level(logging.ERROR)
    task, seeds = tasks.load("digits"), range(args.seeds)
    starts = [meta_learn(task, seed) for seed in seeds]
    if args.tune:
        tune(task, seeds, starts, args.samples, args.changes)
        return
    streams = [stream(seed, args.samples, args.changes, held_out=True) for seed in seeds]
    title = f"Digits, {args.samples} samples, {args.changes} changes, {args.seeds} seeds (mean ± 95 %)"
    table = Table("", "accuracy", "100 after a change", "noticed", "delay (samples)", "false alarms")
    curves = {}
    for name, how in methods(RATE, Reaction()).items():
        rights, after, noticed, waits, false = [], [], 0, [], 0
        for start, drifting in zip(starts, streams, strict=True):
            right, alarms = follow(task, start, drifting, *how)
            found, wrong = delays(drifting.changes, alarms, args.samples)
            rights.append(right)
            after.append(float(np.mean([right[c - WARM : c - WARM + 100].mean() for c in drifting.changes])))
            noticed, waits, false = noticed + len(found), waits + found, false + wrong
        curves[name] = rights
        seen = f"{noticed} of {args.changes * args.seeds}" if how[1] else "-"
        delay = f"{np.median(waits):.0f} (median), {max(waits)} at most" if waits else "-"
        accuracy = interval([float(right.mean()) for right in rights])
        table.add_row(name, accuracy, interval(after), seen, delay, str(false) if how[1] else "-")
    console = Console(highlight=False)
    console.print(title)
    console.print(table)
    if args.plot:
        plot(args.plot, curves, streams[0].changes)


def plot(path: Path, curves: dict[str, list[NDArray[np.float64]]], changes: Sequence[int]) -> None:
    """The first seed's stream: its changes are where they are, those of another are elsewhere."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, rights in curves.items():
        smooth = np.convolve(rights[0], np.ones(SMOOTH) / SMOOTH, "valid")
        axes.plot(np.arange(len(smooth)) + WARM + SMOOTH, 100 * smooth, label=name)
    for i, change in enumerate(changes):
        axes.axvline(change, color="grey", linestyle=":", label="" if i else "the camera moves")
    axes.set(xlabel="samples", ylabel=f"accuracy of the last {SMOOTH} answers (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
