"""Tunes the recipes of edge/tasks on validation tasks: TinyMetaFed's and FedAvg's, eight trials each.

    python benchmarks/recipes.py digits
    python benchmarks/recipes.py omniglot --rounds 40 --seeds 2

A trial is a whole run of the real strategy on C nodes in this process, without a network. It is scored on validation
tasks, by the mean accuracy after 1, 5 and 10 shots; held-out classes are not looked at. The best trial is the recipe.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from flwr.app import ConfigRecord, Message
from rich.console import Console
from rich.table import Table

from tinyfleet.edge import tasks
from tinyfleet.edge.device.flower_client import serve
from tinyfleet.edge.tasks import Hyperparameters, Task
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.server.evaluate import SHOTS, one_pass
from tinyfleet.server.flower.grid import RunGrid
from tinyfleet.server.flower.internals import log_level, new_run, stamp
from tinyfleet.server.named_strategies import initial_parameters, limit_clients, make_strategy

FLEET = 14
CLIENTS = 8
SAMPLES = 160  # of a client in a round

META = [
    Hyperparameters(head_steps, SAMPLES - head_steps, rate, alpha, density=0.1)
    for head_steps, rate, alpha in itertools.product((16, 32), (0.05, 0.1), (1.0, 2.0))
]
FEDAVG = [Hyperparameters(0, SAMPLES, rate, 1.0, 1.0) for rate in (0.005, 0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.15)]


class LocalGrid(RunGrid):
    """A fleet in this process, one device after the other."""

    def __init__(self, task: Task) -> None:
        super().__init__(new_run(1))
        self._task = task

    def get_node_ids(self) -> list[int]:
        return list(range(1, FLEET + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        raise TypeError("a grid in one process sends and receives in one go")

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        raise TypeError("a grid in one process sends and receives in one go")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            stamp(message)
            replies.append(serve(message, "train", self._task, message.metadata.dst_node_id - 1, FLEET))
        return replies


def trial(task: Task, strategy: str, rounds: int, seed: int) -> float:
    """Mean accuracy on validation tasks after a run with the task's recipe for this strategy."""
    how = make_strategy(strategy, task, rounds=rounds, clients=CLIENTS, query=0, seed=seed)
    limit_clients(how.strategy, CLIENTS, FLEET)
    start = vector_to_arrays(initial_parameters(task.program, how, seed), task.program)
    config = ConfigRecord(dict(how.train_config))
    result = how.strategy.start(LocalGrid(task), start, rounds, train_config=config)
    learned = arrays_to_vector(result.arrays, task.program)
    if not np.isfinite(learned).all():
        return 0.0
    unseen = replace(task, draw=lambda _, *how: task.draw("validation", *how))
    return float(np.mean([one_pass(unseen, learned, shots=k, episodes=100, seed=seed).mean for k in SHOTS]))


def main(
    name: Annotated[str, typer.Argument(help=f"The task: {', '.join(tasks.NAMES)}.")],
    rounds: Annotated[int, typer.Option(help="Of every trial.")] = 40,
    seeds: Annotated[int, typer.Option(help="Every trial is run with so many seeds.")] = 2,
) -> None:
    """Tune the recipes of a task."""
    log_level(logging.ERROR)
    task = tasks.load(name)
    console = Console(highlight=False)
    for strategy, candidates in (("tinymetafed", META), ("fedavg", FEDAVG)):
        table = Table(title=f"{strategy} on {name}: {rounds} rounds, {CLIENTS} clients of {FLEET}, {seeds} seeds")
        for column in ("head steps", "steps", "rate", "alpha", "validation accuracy"):
            table.add_column(column, justify="right")
        scores = []
        for hyperparameters in candidates:
            tried = replace(task, meta=hyperparameters, fedavg=hyperparameters)
            scores.append(float(np.mean([trial(tried, strategy, rounds, seed) for seed in range(seeds)])))
        for hyperparameters, score in zip(candidates, scores, strict=True):
            now = hyperparameters == (task.meta if strategy == "tinymetafed" else task.fedavg)
            marks = " best" * (score == max(scores)) + " in use" * now
            numbers = (hyperparameters.head_steps, hyperparameters.steps, hyperparameters.rate, hyperparameters.alpha)
            table.add_row(*(f"{n:g}" for n in numbers), f"{score:.1%}{marks}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
