"""What people see of a run: its progress, its scores, a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from server.evaluate import Score
from server.run import Round


class Bar:
    """A bar that says how many of `total` are done, where there is a terminal. Use it in a `with`."""

    def __init__(self, console: Console, name: str, total: int, said: str = "") -> None:
        self.shown = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task(name, total=total, said=said)

    def __enter__(self) -> Self:
        if self.shown:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()

    def advance(self, said: str = "") -> None:
        self._bar.update(self._task, advance=1, said=said)


class Rounds(Bar):
    """Shows the rounds of a run as they end: a bar on a terminal, else a line each. Call it with each."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        super().__init__(console, name, total, "waiting for clients")
        self._console = console
        self._name = name
        self._total = total

    def __call__(self, ended: Round) -> None:
        said = describe(ended)
        if self.shown:
            self.advance(said)
        else:
            self._console.print(f"{self._name} round {ended.number}/{self._total}: {said}", soft_wrap=True)
        for device, reason in ended.lost.items():
            self._console.print(f"round {ended.number}: no reply from {device}: {reason}", style="yellow")


def describe(ended: Round) -> str:
    """One round in one line."""
    loss = "no loss" if ended.loss is None else f"loss {ended.loss:.3f}"
    up, down = size(ended.bytes_up), size(ended.bytes_down)
    return f"{len(ended.parts)}/{ended.asked} clients, {loss}, up {up}, down {down}, {ended.seconds:.2f} s"


def size(count: float) -> str:
    """Bytes as a person reads them; 1 kB is 1000."""
    return f"{count:.0f} B" if count < 1000 else f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def scores(results: Mapping[str, Sequence[Score]]) -> Table:
    """Accuracy by start and shots; after the sign, 1.96 standard errors of the mean over tasks."""
    table = Table(title="Accuracy on held-out tasks, after one pass over K samples a class")
    table.add_column("start")
    for score in next(iter(results.values())):
        table.add_column(f"K = {score.shots}", justify="right")
    for name, row in results.items():
        table.add_row(name, *(f"{score.mean:.1%} ± {half_width(score):.1%}" for score in row))
    return table


def half_width(score: Score) -> float:
    """Of the 95 % interval of the mean over tasks."""
    return float(1.96 * score.spread / len(score.accuracies) ** 0.5)


def plot(path: Path, title: str, runs: Mapping[str, Sequence[Round]], results: Mapping[str, Sequence[Score]]) -> None:
    """Writes a PNG: the devices' loss against the bytes that they sent, and accuracy against shots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    learning, adapting = figure.subplots(1, 2)
    colours: dict[str, Any] = {}
    for name, rounds in runs.items():
        sent, kilobytes = 0, []
        for ended in rounds:
            sent += ended.bytes_up
            kilobytes.append(sent / 1000)
        losses = [ended.loss if ended.loss is not None else float("nan") for ended in rounds]
        (line,) = learning.plot(kilobytes, losses, label=name)
        colours[name] = line.get_color()
    learning.set(xlabel="sent by all devices (kB)", ylabel="mean loss on the devices", xscale="log")
    greys = itertools.cycle(("grey", "silver"))
    for name, row in results.items():
        colour = next((colour for run, colour in colours.items() if run in name), None) or next(greys)
        shots = [score.shots for score in row]
        means, errors = [100 * score.mean for score in row], [100 * half_width(score) for score in row]
        adapting.errorbar(shots, means, errors, marker="o", capsize=3, label=name, color=colour)
    adapting.set(xlabel="samples a class (K)", ylabel="accuracy on held-out tasks (%)", xticks=shots)
    for axes in (learning, adapting):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
