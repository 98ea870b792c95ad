"""Accuracy over time on streams that drift: a model that stays, one that learns, and one that also notices.

python benchmarks/drift.py [--seeds 5] [--samples 3000] [--changes 3] [--plot docs/images/drift-digits.png] [--tune]
python benchmarks/drift.py --task presence [--seeds 5]

With --task, the streams are those of the task's held-out devices 0, 1, ... (Task.stream), and rates are what `tinyfleet
agent --online` takes; nothing is tuned. Without, the task is the digits of cameras. A camera that no device has trained
at watches the digits 5 to 9, whose labels stay; `changes` times, at random, it is knocked into another position. All
three begin with the same start, learned with TinyMetaFed from the training cameras, adapted to the first 100 samples.
Accuracy is prequential: a sample is answered, then learned from; of a regression it is the mean squared error. A change
counts as noticed by the first alarm after it and before the next; any other is false.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from recipes import LocalGrid
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from tinyfleet.edge import tasks
from tinyfleet.edge.device.drift import DriftResponse, OnlineLearner, default_drift_response
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.tasks import Recording, Task
from tinyfleet.edge.tasks.digits import MOUNTS, SCALE, UNSEEN, WAYS
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.named_strategies import initial_parameters, make_strategy

Vector = NDArray[np.float32]
RATE = 0.05  # of learning online, tuned on the validation streams as the reaction is
WARM = 100  # samples that all adapt to before the stream begins
SMOOTH = 100  # samples that a point of the plot is the mean of


def meta_learn(task: Task, seed: int, rounds: int = 60, clients: int = 5) -> Vector:
    """An initialization from TinyMetaFed on the training devices, with the task's own hyperparameters."""
    how = make_strategy("tinymetafed", task, rounds=rounds, clients=clients, query=0, seed=seed)
    start = vector_to_arrays(initial_parameters(task.program, how, seed), task.program)
    return arrays_to_vector(how.strategy.start(LocalGrid(task), start, rounds).arrays, task.program)


def stream(seed: int, samples: int, changes: int, held_out: bool) -> Recording:
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
    return Recording(np.ascontiguousarray(x), y, tuple(at))


def methods(rate: float, drift_response: DriftResponse) -> dict[str, tuple[float, DriftResponse | None]]:
    return {
        "no learning": (0.0, None),
        "online learning": (rate, None),
        "and notices drift": (rate, replace(drift_response, restart=False)),
        "and restarts": (rate, replace(drift_response, restart=True)),
    }


def follow(
    task: Task, start: Vector, seen: Recording, rate: float, drift_response: DriftResponse | None
) -> tuple[NDArray[np.float64], list[int]]:
    """The error of each answer after the first WARM, and when drift was noticed."""
    model = MoteLearner(task.program)
    learner = OnlineLearner(model, task.program, start, rate, drift_response)
    for x, y in zip(seen.x[:WARM], seen.y[:WARM], strict=True):  # without being asked about them
        model.learn(x, y, task.meta.rate)
    errors, alarms = np.zeros(len(seen.y)), []
    for t in range(WARM, len(seen.y)):
        errors[t], drifted = learner.learn(seen.x[t], seen.y[t])
        if drifted:
            alarms.append(t)
    return errors[WARM:], alarms


def delays(changes: Sequence[int], alarms: Sequence[int], end: int) -> tuple[list[int], int]:
    """Samples from each change that was noticed to its alarm, and how many alarms are false."""
    found = []
    for change, following in zip(changes, [*changes[1:], end], strict=True):
        after = [alarm for alarm in alarms if change <= alarm < following]
        found += [after[0] - change] if after else []
    return found, len(alarms) - len(found)


def interval(errors: Sequence[float], classes: bool) -> str:
    """Mean and half width of its 95 % interval, over seeds (Student's t): of the accuracy, or of the squared error."""
    from scipy import stats

    mean, n = float(np.mean(errors)), len(errors)
    half = stats.t.ppf(0.975, n - 1) * np.std(errors, ddof=1) / n**0.5 if n > 1 else 0.0
    return f"{100 - 100 * mean:.1f} ± {100 * half:.1f} %" if classes else f"{mean:.3f} ± {half:.3f}"


def tune(task: Task, seeds: Sequence[int], starts: Sequence[Vector], samples: int, changes: int) -> None:
    """Prints the accuracy of every setting on the validation streams, the best last."""

    def settings() -> Iterator[tuple[float, DriftResponse | None]]:
        for rate in (0.01, 0.02, 0.05, 0.1):
            yield rate, None
            for steps, fast, restart in itertools.product((40, 80, 160), (0.1, 0.2), (True, False)):
                yield rate, DriftResponse(steps=steps, rate=fast, restart=restart)

    streams = [stream(seed, samples, changes, held_out=False) for seed in seeds]

    def accuracy(how: tuple[float, DriftResponse | None]) -> float:
        errors = [follow(task, start, seen, *how)[0].mean() for start, seen in zip(starts, streams, strict=True)]
        return 1 - float(np.mean(errors))

    for right, how in sorted((accuracy(how), str(how)) for how in settings()):
        print(f"{right:.4f} {how}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--changes", type=int, default=3)
    parser.add_argument("--task", help="take the streams of this task's held-out devices")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    log_level(logging.ERROR)
    task, seeds = tasks.load(args.task or "digits"), range(args.seeds)
    classes = task.program.loss == "softmax_cross_entropy"
    starts = [meta_learn(task, seed) for seed in seeds]
    if args.tune:
        tune(task, seeds, starts, args.samples, args.changes)
        return
    if args.task:
        rate, drift_response = task.fedavg.rate, default_drift_response(task)
        streams = [task.stream(seed) for seed in seeds]
    else:
        rate, drift_response = RATE, DriftResponse()
        streams = [stream(seed, args.samples, args.changes, held_out=True) for seed in seeds]
    known = [[change for change in seen.drifts if change >= WARM] for seen in streams if seen.drifts is not None]
    lengths = " to ".join(str(n) for n in sorted({min(len(s.y) for s in streams), max(len(s.y) for s in streams)}))
    changes = f"{sum(map(len, known))} changes" if known else "nobody knows when it changes"
    title = f"{task.name}, {len(seeds)} streams of {lengths} samples, {changes} (mean ± 95 %)"
    measure = "accuracy" if classes else "mean squared error"
    table = Table("", measure, "100 after a change", "noticed", "delay (samples)", "false alarms", "alarms")
    curves = {}
    for name, how in methods(rate, drift_response).items():
        errors, after, noticed, waits, false, total = [], [], 0, list[int](), 0, 0
        for start, seen in zip(starts, streams, strict=True):
            error, alarms = follow(task, start, seen, *how)
            errors.append(error)
            total += len(alarms)
            if seen.drifts is not None:
                at = [change for change in seen.drifts if change >= WARM]
                found, wrong = delays(at, alarms, len(seen.y))
                after.append(float(np.mean([error[c - WARM : c - WARM + 100].mean() for c in at])))
                noticed, waits, false = noticed + len(found), waits + found, false + wrong
        curves[name] = errors
        sure = how[1] is not None and bool(known)
        table.add_row(
            name,
            interval([float(error.mean()) for error in errors], classes),
            interval(after, classes) if after else "-",
            f"{noticed} of {sum(map(len, known))}" if sure else "-",
            f"{np.median(waits):.0f} (median), {max(waits)} at most" if waits else "-",
            str(false) if sure else "-",
            str(total) if how[1] is not None else "-",
        )
    console = Console(highlight=False, width=140)
    console.print(title)
    console.print(table)
    if classes:
        commonest = np.mean([np.bincount(seen.y[WARM:]).max() / len(seen.y[WARM:]) for seen in streams])
        console.print(f"Who always names a stream's commonest class is right in {100 * commonest:.1f} %")
    if args.plot:
        plot(args.plot, curves, streams[0].drifts or (), classes)


def plot(path: Path, curves: dict[str, list[NDArray[np.float64]]], changes: Sequence[int], classes: bool) -> None:
    """The first seed's stream: its changes are where they are, those of another are elsewhere."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for name, errors in curves.items():
        smooth = np.convolve(errors[0], np.ones(SMOOTH) / SMOOTH, "valid")
        axes.plot(np.arange(len(smooth)) + WARM + SMOOTH, 100 - 100 * smooth if classes else smooth, label=name)
    for i, change in enumerate(changes):
        axes.axvline(change, color="grey", linestyle=":", label="" if i else "a change")
    measure = "accuracy" if classes else "mean squared error"
    axes.set(xlabel="samples", ylabel=f"{measure} of the last {SMOOTH} answers{' (%)' if classes else ''}")
    axes.set_ylim(0, 100 if classes else None)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
