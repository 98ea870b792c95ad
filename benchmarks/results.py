"""The results of every strategy on the four learning tasks: score by shots, rounds, bytes, memory and instructions.

    python benchmarks/results.py sine presence          # runs what has not been run, then prints
    python benchmarks/results.py omniglot --seeds 2 --tasks 50
    python benchmarks/results.py --plots docs/images     # prints all that has been run, and draws it

Every method trains on the same devices (server/simulator.py, which takes their streams to the bit), with the same
number of visits and of samples in each, from the same seeds. Each is tuned by as many trials, on the same validation
tasks: a trial is a run of --tuning-rounds, and its score the best of RATES to adapt by. The best trial is then run with
five other seeds, and each start adapts to the same held-out tasks, by the same number of steps: means, and the 95 %
interval
of Student's t over the seeds. Held-out tasks are looked at once, by the last step.

Bytes are those of the wire, indices counted. Instructions and the arena are of the task's model on an emulated
Cortex-M4F (benchmarks/instructions.py says how); a copy of the weights is added where a device needs one, for sparse
updates, FedProx and first-order MAML. A method that learns in batches is charged for the samples that it stores and for
a gradient as large as the model, which are computed, since the engine has no such mode.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tinyfleet.edge import tasks
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import Hyperparameters, Task
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase
from tinyfleet.server import simulator
from tinyfleet.server.evaluate import seeds_of

APPLICATIONS = ("sine", "omniglot", "keywords", "presence")
BOARD = "mps2-an386"
FLEET = 32  # devices
CLIENTS = 8  # a round; of a serial method one, in eight times as many rounds
SAMPLES = 160  # that a device learns from in a round
HEAD = 16  # of them for the head alone, where it stays on the device
BATCH = 10  # of a method that stores samples
ADAPT = 100  # samples that a new device learns from, going through its few again and again
POINTS = 5  # of a curve over the rounds
DENSITY = 0.1
RATES = (0.01, 0.02, 0.05, 0.1)  # of classifiers; regressions, whose losses are larger, take QUARTER of that
QUARTER = 0.25
QUERIES = 10

Scores = dict[int, NDArray[np.float64]]


@dataclass(frozen=True)
class Trial:
    """Settings that are tried: the devices' rate, the server's, and FedProx's mu."""

    rate: float
    alpha: float = 1.0
    proximal: float = 0.0


def grid(alphas: Sequence[float]) -> list[Trial]:
    return [Trial(rate, alpha) for rate, alpha in itertools.product(RATES, alphas)]


ONLINE = [Trial(rate) for rate in (0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.07, 0.1)]
PROXIMAL = [Trial(rate, proximal=mu) for rate, mu in itertools.product(RATES, (0.01, 0.1))]


@dataclass(frozen=True)
class Method:
    """name: as people read it. of: server.meta's. trials: eight. batched: a device stores its samples, and learns from
    BATCH at once. without: a part of TinyMetaFed that is switched off. samples: of a visit."""

    name: str
    of: str
    trials: Sequence[Trial]
    batched: bool = False
    without: str = ""
    samples: int = SAMPLES

    @property
    def copies(self) -> bool:
        """Whether a device keeps the weights that it was sent beside those that learn."""
        return self.of in ("fedprox", "fomaml") or (self.of == "tinymetafed" and self.without != "top-P")

    def settings(self, task: Task, trial: Trial) -> simulator.MethodSettings:
        local = self.of == "tinymetafed" and (task.meta.head_steps > 0) != (self.without == "reconstruction")
        density = 1.0 if self.without == "top-P" else DENSITY
        hyperparameters = Hyperparameters(
            HEAD if local else 0, self.samples - HEAD * local, trial.rate, trial.alpha, density
        )
        tried = replace(task, meta=hyperparameters, fedavg=hyperparameters)
        how = simulator.strategy_settings(self.of, tried, clients=CLIENTS)
        if self.batched:
            steps, last = self.samples // BATCH, how.update.since  # of first-order MAML, one step for the gradient
            phases = (Phase(ALL_LAYERS, steps - last, trial.rate), Phase(ALL_LAYERS, last, trial.rate))
            how = replace(how, phases=phases[: 1 + last], batch=BATCH)
        if self.without == "annealing":
            how = replace(how, alpha_end=None)
        if self.of == "fedprox":
            how = replace(how, adapts=how.phases)
        return replace(how, proximal=trial.proximal)

    def adapts(self, how: simulator.MethodSettings, rate: float) -> tuple[Phase, ...]:
        """How a new device learns: as the method says, in ADAPT steps at this rate."""
        spent = sum(phase.steps for phase in how.adapts[:-1])
        return tuple(
            Phase(phase.layers, phase.steps if i + 1 < len(how.adapts) else ADAPT - spent, rate)
            for i, phase in enumerate(how.adapts)
        )


METHODS = (
    Method("from scratch", "scratch", [Trial(0.01)]),
    Method("FedAvg, as it is", "fedavg", ONLINE),
    Method("FedAvg + head alone (TinyOL)", "tinyol", ONLINE),
    Method("FedAvg + fine-tuning", "fedavg-finetuned", ONLINE),
    Method("FedProx + fine-tuning", "fedprox", PROXIMAL),
    Method("first-order MAML", "fomaml", grid((3.0, 10.0)), batched=True),
    Method("Reptile, in batches", "reptile", grid((0.5, 1.0)), batched=True),
    Method("Reptile, online", "reptile", grid((1.0, 2.0))),
    Method("TinyReptile", "tinyreptile", grid((0.2, 0.5))),
    Method("TinyReptile, half the samples", "tinyreptile", grid((0.2, 0.5)), samples=SAMPLES // 2),
    Method("TinyMetaFed", "tinymetafed", grid((1.0, 2.0))),
    Method("TinyMetaFed, head the other way", "tinymetafed", grid((1.0, 2.0)), without="reconstruction"),
    Method("TinyMetaFed, all changes sent", "tinymetafed", grid((1.0, 2.0)), without="top-P"),
    Method("TinyMetaFed, alpha not annealed", "tinymetafed", grid((1.0, 2.0)), without="annealing"),
)


@dataclass(frozen=True)
class Budget:
    """How much is run."""

    rounds: int
    tuning_rounds: int
    seeds: int
    tasks: int


class Bench:
    """One application's runs. Trained starts are kept: several methods score the same ones."""

    def __init__(self, name: str, budget: Budget) -> None:
        self.task = tasks.load(name)
        self.budget = budget
        self.backend = simulator.Backend(self.task.program)
        self.is_regression = self.task.program.loss == "mse"
        self.shots = (5, 10, 20) if self.is_regression else (1, 5, 10)
        self.scale = QUARTER if self.is_regression else 1.0
        self._source = simulator.simulated_fleet(self.task, FLEET)
        self._trained: dict[str, list[simulator.SimulationResult]] = {}

    def train(self, how: simulator.MethodSettings, rounds: int, seed: int) -> list[simulator.SimulationResult]:
        """How far it had come at each of POINTS moments; the last is the end. Empty if all clients diverged."""
        serial = CLIENTS // how.clients
        total = rounds * serial
        key = f"{replace(how, name='', adapts=())} {total} {seed}"
        if key not in self._trained:
            start = simulator.initial_parameters(self.task.program, how, seed)
            marks, at = {max(1, total * (i + 1) // POINTS) for i in range(POINTS)}, list[simulator.SimulationResult]()

            def keep(outcome: simulator.SimulationResult) -> None:
                if outcome.rounds[-1].number in marks:
                    at.append(outcome)

            if how.steps:
                try:
                    simulator.simulate(self.backend, self._source, how, start, rounds=total, seed=seed, on_round=keep)
                except UserError:
                    at.clear()
            else:
                at.append(simulator.SimulationResult(start, start, []))
            self._trained[key] = at
        return self._trained[key]

    def score(
        self,
        at: Sequence[simulator.SimulationResult],
        phases: Sequence[Phase],
        shots: int,
        count: int,
        *,
        held_out: bool,
    ) -> NDArray[np.float64]:
        """[count]: accuracies, or mean squared errors, of the last start, on the same tasks for everyone."""
        if not at:
            return np.full(count, np.nan)
        start = at[-1].parameters
        split, seed = ("held_out", 0) if held_out else ("validation", 1)
        return simulator.evaluate(
            self.backend, self.task.draw, start, phases,
            shots=shots, tasks=count, queries=QUERIES, seed=seed, split=split,  # type: ignore[arg-type]
        )  # fmt: skip

    def goodness(self, scores: NDArray[np.float64]) -> float:
        """More is better; an error that is not a number is the worst."""
        mean = float(np.mean(scores))
        return -math.inf if not math.isfinite(mean) else -mean if self.is_regression else mean

    def tune(self, method: Method) -> tuple[Trial, float, list[dict[str, float]]]:
        """The best trial, the best rate to adapt by, and the scores of all trials on validation tasks."""
        found: list[tuple[float, Trial, float]] = []
        for given in method.trials:
            trial = replace(given, rate=given.rate * self.scale)
            how = method.settings(self.task, trial)
            at = self.train(how, self.budget.tuning_rounds, seed=100)
            for rate in RATES if how.adapts else RATES[:1]:
                phases = method.adapts(how, rate * self.scale)
                scores = self.score(at, phases, self.shots[1], self.budget.tasks // 2, held_out=False)
                found.append((self.goodness(scores), trial, rate * self.scale))
        _, trial, rate = max(found, key=lambda one: one[0])
        return trial, rate, [{"score": s, **vars(t), "adapt": r} for s, t, r in found]

    def run(self, method: Method) -> dict[str, Any]:
        """All of one method: what was tuned, and by seed its curve, its score by shots, and its bytes."""
        trial, rate, trials = self.tune(method)
        how = method.settings(self.task, trial)
        phases = method.adapts(how, rate)
        seeds = list[dict[str, Any]]()
        for seed in range(self.budget.seeds):
            curve = []
            at = self.train(how, self.budget.rounds, seed)
            for i, outcome in enumerate(at):
                scores = self.score(at[: i + 1], phases, self.shots[1], self.budget.tasks, held_out=True)
                visits = sum(this.clients for this in outcome.rounds)
                sent = sum(this.bytes_up for this in outcome.rounds)
                curve.append([visits, sent, float(scores.mean())])
            by_shots = {self.shots[1]: curve[-1][2] if curve else math.nan}
            for shots in (self.shots[0], self.shots[2]):
                scores = self.score(at, phases, shots, self.budget.tasks, held_out=True)
                by_shots[shots] = float(scores.mean())
            seeds.append({"curve": curve, "shots": {k: by_shots[k] for k in self.shots}})
        visits, sent, _ = next((seed["curve"][-1] for seed in seeds if seed["curve"]), (0, 0, 0.0))
        return {
            "method": method.name, "rate": trial.rate, "alpha": trial.alpha, "proximal": trial.proximal, "adapt": rate,
            "trials": trials, "seeds": seeds, "visits": visits, "sent": sent / max(visits, 1),
            "samples": method.samples if visits else 0, "budget": vars(self.budget),
        }  # fmt: skip


@cache
def device(name: str) -> dict[str, int]:
    """Of the application's model: bytes of the arena, the parameters and a sample as devices hold it; instructions of
    an inference and a step on the board."""
    import instructions as board_instructions

    from tinyfleet.firmware_tools.boards import catalogue
    from tinyfleet.firmware_tools.firmware import build

    task, target = tasks.load(name), catalogue.load_board(BOARD)
    features = task.client(0, FLEET).features
    with tempfile.TemporaryDirectory() as folder:
        elf = build.build_benchmark(target, task.program, Path(folder) / "bench.elf", steps=20)
        counts = board_instructions.instructions(target, elf)
    return {
        "arena": task.program.arena_bytes, "parameters": task.program.params_bytes,
        "sample": features.shape[1] * features.itemsize, "learn": int(counts["learn"]), "infer": int(counts["infer"]),
    }  # fmt: skip


def memory(row: Mapping[str, Any], on_board: Mapping[str, int]) -> int:
    """Bytes that learning takes on the device: the arena, the copy of the weights, and what batches would take: their
    samples, as the device holds them, and a gradient."""
    method = next(method for method in METHODS if method.name == row["method"])
    batches = method.samples * on_board["sample"] + on_board["parameters"]
    return on_board["arena"] + method.copies * on_board["parameters"] + method.batched * batches


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the 95 % interval of Student's t."""
    from scipy import stats

    if len(values) < 2:
        return float(np.mean(values)), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(half)


def shown(values: Sequence[float], regression: bool) -> str:
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}" if regression else f"{100 * mean:.1f} ± {100 * half:.1f}"


def table(name: str, rows: Sequence[Mapping[str, Any]], on_board: Mapping[str, int]) -> Table:
    shots = list(rows[0]["seeds"][0]["shots"])
    regression = tasks.load(name).program.loss == "mse"
    budget = rows[0]["budget"]
    title = (
        f"{name}: {'mean squared error' if regression else 'accuracy, %'} on {budget['tasks']} held-out tasks, "
        f"{budget['rounds']} rounds of {CLIENTS}, {budget['seeds']} seeds; {on_board['learn']:,} instructions a step"
    )
    made = Table(title=title, box=box.MARKDOWN)
    for head in ("method", *(f"K = {k}" for k in shots), "B sent a visit", "RAM to learn, B", "million instr. a visit"):
        made.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        scores = [shown([seed["shots"][k] for seed in row["seeds"]], regression) for k in shots]
        ram = memory(row, on_board)
        work = row["samples"] * on_board["learn"] / 1e6
        made.add_row(row["method"], *scores, f"{row['sent']:,.0f}", f"{ram:,}", f"{work:.1f}")
    if name == "presence":
        for baseline, means in baselines(budget["tasks"], shots).items():
            made.add_row(f"{baseline}, no learning", *(f"{100 * mean:.1f}" for mean in means), "", "", "")
    return made


PAIRS = (
    ("TinyMetaFed", "FedAvg + fine-tuning"),
    ("TinyMetaFed", "Reptile, online"),
    ("TinyReptile", "Reptile, in batches"),
    ("TinyReptile, half the samples", "Reptile, in batches"),
)


def differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far apart two methods are, seed by seed: the same seed has the same devices, samples and tasks."""
    by_name = {row["method"]: row for row in rows}
    regression = tasks.load(rows[0]["task"]).program.loss == "mse"
    lines = []
    for one, other in PAIRS:
        if one in by_name and other in by_name:
            said = []
            for k in by_name[one]["seeds"][0]["shots"]:
                seeds = zip(by_name[one]["seeds"], by_name[other]["seeds"], strict=True)
                said.append(f"K = {k}: {shown([a['shots'][k] - b['shots'][k] for a, b in seeds], regression)}")
            lines.append(f"{one} less {other}: {'; '.join(said)}")
    return lines


def baselines(count: int, shots: Sequence[str]) -> dict[str, list[float]]:
    """Of presence, on the same held-out tasks: what needs no model, by shots."""
    from tinyfleet.edge.tasks import presence

    seeds = [seeds_of(0, task)[0] for task in range(count)]
    by_shots = [presence.baselines("held_out", seeds, int(k), QUERIES) for k in shots]
    return {name: [float(scores[name].mean()) for scores in by_shots] for name in by_shots[0]}


def draw(path: Path, name: str, rows: Sequence[Mapping[str, Any]], on_board: Mapping[str, int]) -> None:
    """A PNG of four: score against shots, visits, bytes and memory."""
    from matplotlib.figure import Figure

    regression = tasks.load(name).program.loss == "mse"
    rows = [row for row in rows if "," not in row["method"] or row["method"].startswith("Reptile")]
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{name}: {'mean squared error' if regression else 'accuracy'} on held-out tasks")
    by_shots, by_visits, by_bytes, by_memory = figure.subplots(2, 2).ravel()
    for i, row in enumerate(rows):
        color, label = f"C{i}", row["method"]
        shots = list(row["seeds"][0]["shots"])
        points = [interval([seed["shots"][k] for seed in row["seeds"]]) for k in shots]
        means, halves = zip(*points, strict=True)
        by_shots.errorbar([int(k) for k in shots], means, halves, marker="o", capsize=3, color=color, label=label)
        curve = np.mean([seed["curve"] for seed in row["seeds"]], axis=0)
        if row["visits"]:
            by_visits.plot(curve[:, 0], curve[:, 2], marker=".", color=color)
            by_bytes.plot(curve[:, 1] / 1e3, curve[:, 2], marker=".", color=color)
        ram = memory(row, on_board) / 1e3
        by_memory.errorbar([ram], [means[1]], [halves[1]], marker="o", capsize=3, color=color)
    by_shots.set(xlabel="K: samples to learn from, a class" if not regression else "K: samples to learn from")
    by_visits.set(xlabel="visits to devices")
    by_bytes.set(xlabel="kB that the devices have sent, indices counted", xscale="log")
    by_memory.set(xlabel="kB of RAM that learning takes on a device")
    for axes in (by_shots, by_visits, by_bytes, by_memory):
        axes.grid(alpha=0.3)
        if regression:
            axes.set_yscale("log")
    figure.legend(*by_shots.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110)


def main(
    applications: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(APPLICATIONS)}.")] = None,
    rounds: Annotated[int, typer.Option(help="Of eight visits.")] = 60,
    tuning_rounds: Annotated[int, typer.Option(help="Of a trial.")] = 20,
    seeds: Annotated[int, typer.Option(help="Of what is scored.")] = 5,
    count: Annotated[int, typer.Option("--tasks", help="Held-out tasks; half as many for tuning.")] = 100,
    data: Annotated[Path, typer.Option(help="Where what has been run is kept.")] = Path("build/results"),
    plots: Annotated[Path | None, typer.Option(help="A folder for plots.")] = None,
) -> None:
    """Run the strategies on the learning tasks, and print their results."""
    console = Console(width=170, highlight=False)
    for name in applications or []:
        bench: Callable[[], Bench] = cache(lambda name=name: Bench(name, Budget(rounds, tuning_rounds, seeds, count)))
        (data / name).mkdir(parents=True, exist_ok=True)
        with Progress(console=console) as bar:
            for method in bar.track(METHODS, description=name):
                path = data / name / f"{method.name}.json"
                if not path.exists():
                    path.write_text(json.dumps(bench().run(method), indent=1))
    for name in APPLICATIONS:
        files = [data / name / f"{method.name}.json" for method in METHODS]
        rows = [json.loads(path.read_text()) for path in files if path.exists()]
        if rows:
            console.print(table(name, rows, device(name)))
            console.print("\n".join(differences([{"task": name, **row} for row in rows])), soft_wrap=True)
            if plots is not None:
                draw(plots / f"results-{name}.png", name, rows, device(name))


if __name__ == "__main__":
    typer.run(main)
