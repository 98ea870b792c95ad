"""The methods that the simulator compares: what a round asks of clients, and what the server does with the results."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Task
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.server.flower.strategies import TinyMetaFed
from tinyfleet.server.named_strategies import META_STRATEGIES, meta_strategy, random_initialization

Vector = NDArray[np.float32]

WHOLE_UPDATE = UpdateFormat()


@dataclass(frozen=True)
class MethodSettings:
    """What a round asks of its clients, and what the server does with their updates.

    Parameters
    ----------
    name
        The method, one of METHODS or a name of your own.
    phases
        How a client learns in a round; one batch a step.
    adapts
        How a new client adapts before it is scored; one batch a step.
    clients
        Clients of a round.
    batch
        Samples of one step.
    alpha
        The server's rate.
    alpha_end
        What the rate falls to over the run. Default: it stays at alpha.
    anneal
        How it falls: along a half cosine, or a line.
    update
        What clients send. Layers that it leaves out keep their initial values; with `since`, the changes after that
        phase, as first-order MAML does.
    proximal
        FedProx's mu.
    adam
        Whether clients learn with Adam.
    """

    name: str
    phases: tuple[Phase, ...]
    adapts: tuple[Phase, ...]
    clients: int = 5
    batch: int = 1
    alpha: float = 1.0
    alpha_end: float | None = None
    anneal: Literal["cosine", "linear"] = "cosine"
    update: UpdateFormat = WHOLE_UPDATE
    proximal: float = 0.0
    adam: bool = False

    def rate(self, number: int, rounds: int) -> float:
        """The server's rate in a round; rounds count from 1."""
        if self.alpha_end is None:
            return self.alpha
        progress = min(max((number - 1) / rounds, 0.0), 1.0)
        left = (1 + math.cos(math.pi * progress)) / 2 if self.anneal == "cosine" else 1 - progress
        return self.alpha_end + (self.alpha - self.alpha_end) * left

    @property
    def steps(self) -> int:
        """Steps of a client in a round."""
        return sum(phase.steps for phase in self.phases)

    @property
    def last_steps(self) -> int:
        """An update holds the changes of this many last steps; 0: of all."""
        return sum(phase.steps for phase in self.phases[self.update.since :]) if self.update.since else 0


METHODS = (
    "tinymetafed",
    "tinyreptile",
    "reptile",
    "fomaml",
    "fedavg",
    "fedprox",
    "fedavg-finetuned",
    "tinyol",
    "scratch",
)


def strategy_settings(name: str, task: Task, *, clients: int = 5) -> MethodSettings:
    """A method with a task's hyperparameters: what `tinyfleet run start` does with the strategy of that name.

    fedavg and fedprox are scored without adaptation, fedavg-finetuned after it. tinyol adapts only the head of FedAvg's
    model. scratch learns nothing before a device adapts. Change a setting with `dataclasses.replace`.

    Parameters
    ----------
    name
        One of METHODS.
    task
        The learning task.
    clients
        Clients of a round.

    Returns
    -------
    MethodSettings

    Raises
    ------
    UserError
        For another name.
    """
    if name not in METHODS:
        raise UserError(f"there is no method '{name}'; choose one of {', '.join(METHODS)}")
    if name in META_STRATEGIES:
        ours = meta_strategy(name, task, rounds=1, clients=clients)
        phases = tuple(ours.phases)
        adapts = (Phase(ALL_LAYERS, task.meta.steps, task.meta.rate),) if ours.update.since else phases
        end = ours.alpha_end if isinstance(ours, TinyMetaFed) else None
        return MethodSettings(name, phases, adapts, ours.clients, alpha=ours.alpha, alpha_end=end, update=ours.update)
    everything = (Phase(ALL_LAYERS, task.fedavg.steps, task.fedavg.rate),)
    only_head = (replace(everything[0], layers=task.program.head),)
    adapts = {"fedavg": (), "fedprox": (), "tinyol": only_head}.get(name, everything)
    phases = () if name == "scratch" else everything
    return MethodSettings(name, phases, adapts, clients, proximal=0.1 if name == "fedprox" else 0.0)


def initial_parameters(program: Program, settings: MethodSettings, seed: int = 0) -> Vector:
    """Random from the seed, but 0 in layers that stay on the devices; see `named_strategies.initial_parameters`."""
    return random_initialization(program, settings.update.shared, seed)
