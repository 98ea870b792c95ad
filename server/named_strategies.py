"""Strategies by name, with the hyperparameters of a learning task.

`tinyfleet run start`, the simulator, the demo and the Flower app build their strategies here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import flwr.serverapp.strategy as flower_strategies
import numpy as np
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import MAX_NORM_RATIO, Hyperparameters, Task
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.edge.wire.round_config import RoundConfig, format_round_config
from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile, TinyMetaFed, TinyReptile

Vector = NDArray[np.float32]

META_STRATEGIES = ("tinymetafed", "tinyreptile", "reptile", "fomaml")
"""Our own."""
ASYNCHRONOUS = ("tinymetafed", "reptile", "fomaml", "fedavg")
"""Those that can run asynchronously."""
PRIVATE = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping)
"""Flower's wrappers for differential privacy."""


def phases(hyperparameters: Hyperparameters, program: Program) -> tuple[Phase, ...]:
    """How a device learns: first the head alone if the hyperparameters say so, then all layers."""
    all_layers = Phase(ALL_LAYERS, hyperparameters.steps, hyperparameters.rate)
    if not hyperparameters.head_steps:
        return (all_layers,)
    return Phase(program.head, hyperparameters.head_steps, hyperparameters.rate), all_layers


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy, its name in the graph, and what it tells the devices in addition to its own configuration."""

    name: str
    strategy: Strategy
    train_config: Mapping[str, int | float | bool | list[int] | list[float]] = field(default_factory=dict)
    max_norm_ratio: float = MAX_NORM_RATIO


class _Applicability(NamedTuple):
    """Whether an option was given, whether the strategy uses it, and what uses it."""

    option: str
    given: bool
    used: bool
    requires: str


@dataclass(frozen=True)
class StrategyOptions:
    """What can be chosen of a strategy; None keeps the strategy's own value.

    Parameters
    ----------
    local_head
        TinyMetaFed: whether the head stays on the devices.
    anneal
        TinyMetaFed: whether the server's rate falls over the run.
    density
        Share of the changes that a device sends, in (0, 1].
    proximal_mu
        FedProx: weight of the proximal term; 0.1 by default.
    asynchronous
        Whether each update counts when it arrives.
    dp_clip_norm
        Differential privacy: the largest norm of a device's change; 0 turns it off.
    dp_noise_multiplier
        Differential privacy: standard deviation of the sum's noise, as a multiple of dp_clip_norm; 1 by default.
    dp_on_device
        Differential privacy: whether the devices clip, not the server.
    max_norm_ratio
        A device's change may be this many times as long as the median; the task's by default.
    """

    local_head: bool | None = None
    anneal: bool | None = None
    density: float | None = None
    proximal_mu: float | None = None
    asynchronous: bool = False
    dp_clip_norm: float = 0.0
    dp_noise_multiplier: float | None = None
    dp_on_device: bool = False
    max_norm_ratio: float | None = None

    def check(self, key: str) -> None:
        """Raises UserError for an option that the strategy of this name, in lower case, does not use."""
        tinymetafed = key == "tinymetafed"
        flowers = key not in META_STRATEGIES and not self.asynchronous
        private = self.dp_clip_norm > 0
        for option, given, used, requires in (
            _Applicability(
                "--local-head/--no-local-head", self.local_head is not None, tinymetafed, "--strategy tinymetafed"
            ),
            _Applicability("--anneal/--no-anneal", self.anneal is not None, tinymetafed, "--strategy tinymetafed"),
            _Applicability(
                "--density",
                self.density is not None,
                tinymetafed or flowers,
                "--strategy tinymetafed or one of Flower's",
            ),
            _Applicability("--proximal-mu", self.proximal_mu is not None, key == "fedprox", "--strategy fedprox"),
            _Applicability(
                "--dp-noise-multiplier", self.dp_noise_multiplier is not None, private, "--dp-clip-norm above 0"
            ),
            _Applicability("--dp-on-device", self.dp_on_device, private, "--dp-clip-norm above 0"),
        ):
            if given and not used:
                name = f"{'asynchronous ' * self.asynchronous}{key}"
                raise UserError(f"{name} does not use {option}: leave it out, or choose {requires}")


def make_strategy(
    name: str,
    task: Task,
    *,
    rounds: int,
    clients: int,
    query: int = 16,
    seed: int = 0,
    options: StrategyOptions = StrategyOptions(),
) -> NamedStrategy:
    """A strategy with a task's hyperparameters.

    Parameters
    ----------
    name
        One of META_STRATEGIES, or the class name of one of Flower's strategies; in any case.
    task
        The learning task.
    rounds
        Rounds of the run, over which TinyMetaFed lowers its rate.
    clients
        Clients of each round.
    query
        Query samples that each device scores itself on.
    seed
        Draws the clients and their tasks.
    options
        What differs from the strategy's own values.

    Returns
    -------
    NamedStrategy

    Raises
    ------
    UserError
        For an unknown name, or an option that the strategy does not use.
    """
    named = _make_strategy(name, task, rounds, clients, query, seed, options)
    hyperparameters = task.meta if name.lower() in META_STRATEGIES else task.fedavg
    ratio = options.max_norm_ratio
    return replace(named, max_norm_ratio=hyperparameters.max_norm_ratio if ratio is None else ratio)


def _make_strategy(
    name: str, task: Task, rounds: int, clients: int, query: int, seed: int, options: StrategyOptions
) -> NamedStrategy:
    key = name.lower()
    if options.density is not None and not 0 < options.density <= 1:
        raise UserError(f"--density is the share of the changes that is sent, in (0, 1], not {options.density:g}")
    if options.dp_clip_norm and (options.asynchronous or key not in ("fedavg", "fedprox")):
        raise UserError(
            f"differential privacy is for the rounds of fedavg and fedprox: its noise is made for their mean, and "
            f"not for {'asynchronous ones' if options.asynchronous else name}"
        )
    if options.asynchronous and key == "tinyreptile":
        options.check(key)
        raise UserError("TinyReptile visits one device at a time; for asynchronous rounds choose reptile")
    if options.asynchronous and key not in ASYNCHRONOUS:
        raise UserError(f"{name} needs all of a round's updates at once; asynchronous are {', '.join(ASYNCHRONOUS)}")
    if key not in META_STRATEGIES and not options.asynchronous:
        return _make_flower_strategy(key, name, task, clients, query, seed, options)
    options.check(key)
    ours = meta_strategy(key, task, rounds=rounds, clients=clients, query=query, seed=seed, options=options)
    if not options.asynchronous:
        return NamedStrategy(type(ours).__name__, ours)
    return NamedStrategy("FedAsync" if key == "fedavg" else f"asynchronous {type(ours).__name__}", Asynchronous(ours))


def meta_strategy(
    key: str,
    task: Task,
    *,
    rounds: int,
    clients: int,
    query: int = 0,
    seed: int = 0,
    options: StrategyOptions = StrategyOptions(),
) -> Reptile:
    """One of META_STRATEGIES, or FedAvg as asynchronous rounds have it, with the task's hyperparameters."""
    hyperparameters = task.meta if key in META_STRATEGIES else task.fedavg
    alpha, beta, steps = hyperparameters.alpha, hyperparameters.rate, hyperparameters.steps
    if key == "tinyreptile":
        return TinyReptile(alpha=alpha, beta=beta, steps=steps, query=query, seed=seed)
    if key == "fomaml":
        outer = max(1, steps // 8)
        return FOMAML(alpha=alpha, beta=beta, steps=steps - outer, outer=outer, clients=clients, query=query, seed=seed)
    if key != "tinymetafed":
        return Reptile(alpha=alpha, beta=beta, steps=steps, clients=clients, query=query, seed=seed)
    return TinyMetaFed(
        rounds=rounds,
        alpha=alpha,
        alpha_end=alpha if options.anneal is False else 0.0,
        beta=beta,
        steps=steps,
        local=task.program.head if hyperparameters.head_steps and options.local_head is not False else 0,
        local_steps=hyperparameters.head_steps,
        density=hyperparameters.density if options.density is None else options.density,
        clients=clients,
        query=query,
        seed=seed,
    )


def _make_flower_strategy(
    key: str, name: str, task: Task, clients: int, query: int, seed: int, options: StrategyOptions
) -> NamedStrategy:
    classes = {name: getattr(flower_strategies, name) for name in flower_strategies.__all__}
    known = {name.lower(): kind for name, kind in classes.items() if issubclass(kind, FedAvg) and "Xgb" not in name}
    if key not in known:
        raise UserError(f"there is no strategy '{name}'; choose one of {', '.join((*META_STRATEGIES, *sorted(known)))}")
    options.check(key)
    hyperparameters, kind = task.fedavg, known[key]
    # No least number of nodes: Flower's would wait for them without end.
    more: dict[str, float | str] = {}
    if key == "fedprox":
        proximal_mu = 0.1 if options.proximal_mu is None else options.proximal_mu
        if proximal_mu * hyperparameters.rate >= 1:
            raise UserError(
                f"--proximal-mu must be less than 1 / the task's rate, {1 / hyperparameters.rate:g}; lower it"
            )
        more = {"proximal_mu": proximal_mu}
    elif key == "qfedavg":
        more = {"client_learning_rate": hyperparameters.rate, "train_loss_key": "loss"}
    flowers: Strategy = kind(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=0, min_available_nodes=0, **more
    )
    if options.dp_clip_norm:
        private = DifferentialPrivacyClientSideFixedClipping
        wrapper = private if options.dp_on_device else DifferentialPrivacyServerSideFixedClipping
        noise = 1.0 if options.dp_noise_multiplier is None else options.dp_noise_multiplier
        flowers = wrapper(flowers, noise, options.dp_clip_norm, clients)
    density = hyperparameters.density if options.density is None else options.density
    round_config = RoundConfig(phases(hyperparameters, task.program), query, UpdateFormat(density=density), seed)
    config = format_round_config(round_config)
    del config["seed"]  # then every device draws samples of its own in every round
    privacy = " with differential privacy" if options.dp_clip_norm else ""
    return NamedStrategy(f"{kind.__name__}{privacy}", flowers, config)


def initial_parameters(program: Program, named_strategy: NamedStrategy, seed: int = 0) -> Vector:
    """The initialization of a run: random, but 0 in layers that stay on the devices.

    Each device fits such layers from there; random ones would favour some labels over others, and labels mean something
    else in every task.

    Parameters
    ----------
    program
        The model.
    named_strategy
        Says which layers stay on the devices.
    seed
        Of the random parameters.

    Returns
    -------
    ndarray of float32, shape (n_params,)
    """
    strategy = named_strategy.strategy
    strategy = strategy.strategy if isinstance(strategy, Asynchronous) else strategy
    return random_initialization(program, strategy.update.shared if isinstance(strategy, Reptile) else ALL_LAYERS, seed)


def random_initialization(program: Program, shared: int, seed: int) -> Vector:
    """Random parameters [n_params], but 0 in layers that are not in the mask `shared`."""
    return np.where(program.in_layers(shared), program.initial(seed), np.float32(0))


def limit_clients(strategy: Strategy, clients: int, nodes: int) -> None:
    """Makes one of Flower's strategies draw `clients` of the nodes: they know a share, ours know the number.

    Under differential privacy, the noise is scaled for as many clients. Other strategies are left as they are.
    """
    if isinstance(strategy, PRIVATE):
        strategy.num_sampled_clients = min(clients, nodes)
        strategy = strategy.strategy
    if isinstance(strategy, FedAvg):
        strategy.fraction_train = min(1.0, (clients + 0.5) / nodes)  # it rounds down
