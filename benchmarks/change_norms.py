"""How much the lengths of honest devices' changes differ: the largest norm of a round as a multiple of its median.

python benchmarks/change_norms.py [--rounds 40] [--clients 8] [--seeds 2] [TASK ...]

The rounds are those of the task's own recipes, with the C engine, on the local fleet of benchmarks/recipes.py. For
TinyReptile, a change is compared with the last ones of the other devices, as the grid does.
"""

import logging
import statistics
from collections.abc import Iterable
from typing import Annotated

import numpy as np
import typer
from flwr.app import ConfigRecord, Message
from recipes import FLEET, LocalGrid
from rich.console import Console
from rich.table import Table

from tinyfleet.edge import tasks
from tinyfleet.edge.tasks import MAX_NORM_RATIO, Task
from tinyfleet.edge.wire.flower_records import arrays_to_vector, single_records, vector_to_arrays
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.flower.reply_bounds import ENOUGH
from tinyfleet.server.named_strategies import initial_parameters, limit_clients, make_strategy


class MeasuringGrid(LocalGrid):
    """Notes the largest norm of each round as a multiple of the median."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.ratios: list[float] = []
        self._program = task.program
        self._last: dict[int, float] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        messages = list(messages)
        replies = super().send_and_receive(messages, timeout=timeout)
        norms = {}
        for message, reply in zip(messages, replies, strict=True):
            sent = arrays_to_vector(single_records(message)[0], self._program)
            (arrays,) = reply.content.array_records.values()
            change = arrays_to_vector(arrays, self._program).astype(np.float64) - sent
            norms[message.metadata.dst_node_id] = float(np.linalg.norm(change))
        self._last |= norms
        compared = norms if len(norms) >= ENOUGH else self._last
        if norms and len(compared) >= ENOUGH:
            self.ratios.append(max(norms.values()) / statistics.median(compared.values()))
        return replies


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks.")] = None,
    rounds: Annotated[int, typer.Option(help="Of every run.")] = 40,
    clients: Annotated[int, typer.Option(help="Of every round.")] = 8,
    seeds: Annotated[int, typer.Option(help="Runs of every strategy.")] = 2,
) -> None:
    """Measure the ratios."""
    log_level(logging.ERROR)
    table = Table(title=f"largest norm / median: {rounds} rounds, {clients} clients of {FLEET}, {seeds} seeds")
    for column in ("task", "strategy", "median", "largest"):
        table.add_column(column)
    for name in names or ("digits", "keywords"):
        task = tasks.load(name)
        for strategy in ("fedavg", "tinymetafed", "reptile", "tinyreptile"):
            ratios: list[float] = []
            for seed in range(seeds):
                how = make_strategy(strategy, task, rounds=rounds, clients=clients, query=0, seed=seed)
                limit_clients(how.strategy, clients, FLEET)
                start = vector_to_arrays(initial_parameters(task.program, how, seed), task.program)
                grid = MeasuringGrid(task)
                how.strategy.start(grid, start, rounds, train_config=ConfigRecord(dict(how.train_config)))
                ratios += grid.ratios
            table.add_row(name, strategy, f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}")
    Console(highlight=False).print(table)
    print(f"the bound is {MAX_NORM_RATIO:g}, unless the task has its own")


if __name__ == "__main__":
    typer.run(main)
