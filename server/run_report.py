"""A run on the terminal and in files: its progress, its rounds as JSON, its scores, a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tinyfleet.server.evaluate import Score
from tinyfleet.server.training_run import Round

if TYPE_CHECKING:
    from tinyfleet.server import simulator  # which takes seconds to import


class Bar:
    """A progress bar, if there is a terminal. Use it in a `with`."""

    def __init__(self, console: Console, name: str, total: int, text: str = "") -> None:
        self.shown = console.is_terminal
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._task = self._bar.add_task(name, total=total, text=text)

    def __enter__(self) -> Self:
        if self.shown:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._bar.stop()

    def advance(self, text: str = "") -> None:
        self._bar.update(self._task, advance=1, text=text)


class Rounds(Bar):
    """Shows the rounds of a run as they end: a bar on a terminal, otherwise a line each. Call it with each round."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        super().__init__(console, name, total, "waiting for clients")
        self._console = console
        self._name = name
        self._total = total

    def __call__(self, ended: Round) -> None:
        text = describe(ended)
        if self.shown:
            self.advance(text)
        else:
            self._console.print(f"{self._name} round {ended.number}/{self._total}: {text}", soft_wrap=True)
        for device, reason in ended.no_reply.items():
            self._console.print(f"round {ended.number}: no reply from {device}: {reason}", style="yellow")
        for device, reason in ended.refused.items():
            self._console.print(f"round {ended.number}: {device} {reason}; left out", style="yellow", soft_wrap=True)


def describe(ended: Round) -> str:
    """One round in one line."""
    loss = "no loss" if ended.loss is None else f"loss {ended.loss:.3f}"
    up, down = size(ended.bytes_up), size(ended.bytes_down)
    return f"{len(ended.participations)}/{ended.selected} clients, {loss}, up {up}, down {down}, {ended.seconds:.2f} s"


def round_json(ended: Round) -> dict[str, Any]:
    """One round as `tinyfleet run start --json` prints it."""
    return {
        "round": ended.number,
        "selected": ended.selected,
        "clients": [participation.device for participation in ended.participations],
        "staleness": [participation.staleness for participation in ended.participations],
        "no-reply": dict(ended.no_reply),
        "refused": dict(ended.refused),
        "loss": ended.loss,
        "accuracy": ended.accuracy,
        "bytes-up": ended.bytes_up,
        "bytes-down": ended.bytes_down,
        "seconds": round(ended.seconds, 3),
    }


def size(count: float) -> str:
    """A number of bytes with its unit; 1 kB is 1000 bytes."""
    return f"{count:.0f} B" if count < 1000 else f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def scores(results: Mapping[str, Sequence[Score]]) -> Table:
    """Accuracy or error by initialization and shots, with the 95 % interval of the mean over tasks."""
    first = next(iter(results.values()))[0]
    each = "K samples a class" if first.metric == "accuracy" else "K samples"
    title = f"{first.metric.capitalize()} on {len(first.values)} held-out tasks, after learning from {each}"
    table = Table(title=title)
    table.add_column("initialization")
    for score in next(iter(results.values())):
        table.add_column(f"K = {score.shots}", justify="right")
    for name, row in results.items():
        table.add_row(name, *map(interval, row))
    return table


def interval(score: Score) -> str:
    """A score and the half width of its 95 % interval."""
    if score.metric == "accuracy":
        return f"{score.mean:.1%} ± {score.half_width:.1%}"
    return f"{score.mean:.3g} ± {score.half_width:.2g}"


def plot(
    path: Path,
    title: str,
    runs: Mapping[str, Sequence[Round] | Sequence[simulator.Round]],
    results: Mapping[str, Sequence[Score]],
    *,
    by_round: bool = False,
) -> None:
    """Writes a PNG: the devices' loss against the bytes that they sent, or by round, and accuracy against shots.

    Parameters
    ----------
    path
        Of the file.
    title
        Of the figure.
    runs
        The rounds of each run, by name.
    results
        Scores by initialization; one whose name contains that of a run is drawn in the run's colour.
    by_round
        Draw the loss against the number of the round.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    learning, adapting = figure.subplots(1, 2)
    colours = _plot_losses(learning, runs, by_round)
    _plot_scores(adapting, results, colours)
    for axes in (learning, adapting):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def _plot_losses(
    axes: Any, runs: Mapping[str, Sequence[Round] | Sequence[simulator.Round]], by_round: bool
) -> dict[str, Any]:
    """Draws a curve for each run; returns the curves' colours."""
    colours: dict[str, Any] = {}
    for name, rounds in runs.items():
        sent = itertools.accumulate(ended.bytes_up / 1000 for ended in rounds)
        at = [ended.number for ended in rounds] if by_round else list(sent)
        losses = [ended.loss if ended.loss is not None else float("nan") for ended in rounds]
        (line,) = axes.plot(at, losses, label=name)
        colours[name] = line.get_color()
    axes.set(ylabel="mean loss on the devices", xlabel="round" if by_round else "sent by all devices (kB)")
    axes.set_xscale("linear" if by_round else "log")
    return colours


def _plot_scores(axes: Any, results: Mapping[str, Sequence[Score]], colours: Mapping[str, Any]) -> None:
    """Draws the scores of each initialization with their intervals."""
    greys = itertools.cycle(("grey", "silver"))
    first = next(iter(results.values()))
    metric, unit, scale = (first[0].metric, " (%)", 100) if first[0].metric == "accuracy" else (first[0].metric, "", 1)
    for name, row in results.items():
        colour = next((colour for run, colour in colours.items() if run in name), None) or next(greys)
        means, errors = [scale * score.mean for score in row], [scale * score.half_width for score in row]
        axes.errorbar([score.shots for score in row], means, errors, marker="o", capsize=3, label=name, color=colour)
    ticks = [score.shots for score in list(results.values())[-1]]
    axes.set(xlabel="samples a class (K)", ylabel=f"{metric} on held-out tasks{unit}", xticks=ticks)
