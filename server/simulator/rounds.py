"""Simulated rounds: clients are drawn, learn and send their updates; the server moves the initialization."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.messages import Metrics
from tinyfleet.server.flower.strategies.reptile import draw_nodes, task_seed
from tinyfleet.server.simulator import checkpoints, traffic
from tinyfleet.server.simulator.backend import AdaptResult, Backend, Moments
from tinyfleet.server.simulator.methods import MethodSettings
from tinyfleet.server.simulator.results import Round, SimulationResult
from tinyfleet.server.simulator.sources import ClientSource

Vector = NDArray[np.float32]
Floats = NDArray[np.float32]


def simulate(
    backend: Backend,
    source: ClientSource,
    settings: MethodSettings,
    initialization: Vector,
    *,
    rounds: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    chunk: int = 256,
    on_round: Callable[[SimulationResult], None] | None = None,
) -> SimulationResult:
    """Runs whole rounds.

    Clients and their task seeds are those that the strategies draw with the same seed from the nodes 0 to
    source.clients - 1.

    Parameters
    ----------
    backend
        Computes the clients.
    source
        The clients' samples.
    settings
        The method.
    initialization
        Parameters [n_params] that the run begins with.
    rounds
        How many.
    seed
        Draws the clients and their tasks.
    checkpoint
        A file for the run's state. If it exists, the run continues from it, to the same end.
    checkpoint_every
        Rounds between checkpoints.
    chunk
        Clients computed at once, which bounds the memory however many clients a round has.
    on_round
        Called with the state after each round.

    Returns
    -------
    SimulationResult

    Raises
    ------
    UserError
        If all clients of a round diverge, or the checkpoint is of another run.
    """
    if 0 < settings.steps < 2 and settings.name in ("reptile", "tinyreptile", "tinymetafed"):
        raise UserError("meta-learning takes at least 2 steps on each client (1 is joint training); raise steps")
    state = SimulationResult(
        initialization, initialization, [], Moments(np.zeros_like(initialization)) if settings.adam else None
    )
    digest = hashlib.sha256(initialization.tobytes()).hexdigest()
    identity = f"{astuple(settings)} {seed} {rounds} {source.clients} {digest}"
    if checkpoint is not None and checkpoint.exists():
        state = checkpoints.resume(checkpoint, identity, state)
    if not settings.steps:
        return state
    run = _Run(backend, source, settings, rounds, seed, chunk)
    for number in range(len(state.rounds) + 1, rounds + 1):
        began = time.perf_counter()
        parameters, ended, moments = run.round(state, number)
        ended = replace(ended, seconds=time.perf_counter() - began)
        state = SimulationResult(initialization, parameters, [*state.rounds, ended], moments)
        if checkpoint is not None and (number % checkpoint_every == 0 or number == rounds):
            checkpoints.save(checkpoint, identity, state)
        if on_round is not None:
            on_round(state)
    return state


@dataclass
class _Sums:
    """What a round adds up over its clients, chunk by chunk."""

    changes: NDArray[np.float64]
    usable: int = 0
    bytes_up: int = 0
    losses: list[Floats] = field(default_factory=list)
    squares: list[Vector] = field(default_factory=list)
    moment_steps: int = 0


@dataclass(frozen=True)
class _Run:
    """What stays the same in all rounds of a run."""

    backend: Backend
    source: ClientSource
    settings: MethodSettings
    rounds: int
    seed: int
    chunk: int

    def round(self, state: SimulationResult, number: int) -> tuple[Vector, Round, Moments | None]:
        """One round from a state: the new parameters, what it reports, and Adam's moments."""
        random = np.random.default_rng([self.seed, number])
        drawn = draw_nodes(self.source.clients, self.settings.clients, random)
        seeds = [task_seed(self.seed, number, node) for node in drawn]
        sums = _Sums(np.zeros(self.backend.network.n_params))
        for first in range(0, len(drawn), self.chunk):
            part = slice(first, first + self.chunk)
            self._add(sums, state, self._adapt(state, drawn[part], seeds[part], random))
        if not sums.usable:
            raise UserError(f"all clients diverged in round {number}; lower the rate")
        alpha = self.settings.rate(number, self.rounds)
        parameters = np.asarray(state.parameters + alpha * (sums.changes / sums.usable), np.float32)
        moments = None
        if state.moments is not None:
            squares = np.asarray(sum(sums.squares) / np.float32(len(drawn)), np.float32)
            moments = Moments(squares, sums.moment_steps)
        down = traffic.round_bytes_down(state.parameters, self.settings, number, len(drawn))
        loss = float(np.concatenate(sums.losses).mean(dtype=np.float64))
        diverged = len(drawn) - sums.usable
        return parameters, Round(number, len(drawn), diverged, loss, alpha, sums.bytes_up, down, 0.0), moments

    def _adapt(
        self, state: SimulationResult, clients: Sequence[int], seeds: Sequence[int], random: np.random.Generator
    ) -> AdaptResult:
        """What some of the round's clients learn."""
        settings = self.settings
        x, y = self.source.samples(clients, seeds, settings.steps * settings.batch)
        order: NDArray[Any] | None = None
        if self.source.stores_samples:
            passes = np.tile(np.arange(x.shape[1]), (len(x), -(-settings.steps * settings.batch // x.shape[1]), 1))
            rows = random.permuted(passes, axis=2).reshape(len(x), -1)  # client after client, whatever the chunk
            order = rows[:, : settings.steps * settings.batch].reshape(len(x), settings.steps, settings.batch)
        return self.backend.adapt(
            state.parameters, x, y, settings.phases, batch=settings.batch, order=order, proximal=settings.proximal,
            moments=state.moments, keep=settings.last_steps,
        )  # fmt: skip

    def _add(self, sums: _Sums, state: SimulationResult, learned: AdaptResult) -> None:
        """Adds the updates of some clients as the server receives them, one after the other as the strategies do."""
        initialization, model = state.parameters, self.backend.model
        arena_bytes = model.arena_bytes if isinstance(model, Program) else 4 * len(initialization)
        metrics = Metrics(self.settings.steps, 0.0, 0, 0, 0.0, arena_bytes)
        answers = learned.parameters
        if learned.before is not None:
            answers = initialization + (learned.parameters - learned.before)
        finite = np.isfinite(answers).all(1)
        shared = self.backend.network.in_layers(self.settings.update.shared)
        received, sizes = traffic.received_updates(
            initialization, answers[finite], self.settings.update, shared, metrics
        )
        for vector in received:
            sums.changes += vector.astype(np.float64) - initialization
        sums.usable += len(received)
        sums.bytes_up += int(sizes.sum()) + (len(answers) - len(received)) * traffic.FAILURE_BYTES
        sums.losses.append(learned.losses[finite].mean(1))
        if learned.moments is not None:
            sums.squares.append(learned.moments.squares * len(answers))
            sums.moment_steps = learned.moments.steps
