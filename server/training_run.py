"""Rounds of federated (meta-)learning on the devices that a SPARQL query selects, written into the graph as they end.

What `tinyfleet run` and the demo share.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import flwr.serverapp.strategy as flower_strategies
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from numpy.typing import NDArray
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Hyperparameters, Task
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.messages import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.edge.wire.round_config import RoundConfig, format_round_config
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.lineage import Lineage, Participation
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.queries.match import select
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import Iri
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.requests import RoundEvent
from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile, TinyMetaFed, TinyReptile

Vector = NDArray[np.float32]

META_STRATEGIES = ("tinymetafed", "tinyreptile", "reptile", "fomaml")
ASYNCHRONOUS = ("tinymetafed", "reptile", "fomaml", "fedavg")


def phases(hyperparameters: Hyperparameters, program: Program) -> tuple[Phase, ...]:
    """How a device adapts under a recipe: the head alone first, if it says so, then everything."""
    everything = Phase(ALL_LAYERS, hyperparameters.steps, hyperparameters.rate)
    return (
        (Phase(program.head, hyperparameters.head_steps, hyperparameters.rate), everything)
        if hyperparameters.head_steps
        else (everything,)
    )


@dataclass(frozen=True)
class NamedStrategy:
    """A strategy, what it tells the devices beside what it says itself, and its name in the graph."""

    name: str
    strategy: Strategy
    train_config: Mapping[str, int | float | bool | list[int] | list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class StrategyOptions:
    """What of a method can be chosen apart from its recipe; None: as the strategy has it.

    local, anneal: whether TinyMetaFed keeps the head on the devices, and lowers alpha as it goes. top: the share of the
    changes that is sent. mu: of FedProx's proximal term, 0.1 by default. asynchronous: no rounds; an update counts when
    it comes. dp_clip: of differential privacy, the largest norm of a device's change (0: none of it); dp_noise: the
    standard deviation of the sum's noise in units of dp_clip, 1 by default; dp_on_device: devices clip, not the server.
    """

    local: bool | None = None
    anneal: bool | None = None
    density: float | None = None
    mu: float | None = None
    asynchronous: bool = False
    dp_clip: float = 0.0
    dp_noise: float | None = None
    dp_on_device: bool = False

    def check(self, key: str) -> None:
        """Raises UserError for what was chosen that the strategy of that name, in small letters, has no use for."""
        head, flowers = key == "tinymetafed", key not in META_STRATEGIES and not self.asynchronous
        uses = {
            "--local/--no-local": (self.local is not None, head, "--strategy tinymetafed"),
            "--anneal/--no-anneal": (self.anneal is not None, head, "--strategy tinymetafed"),
            "--top": (self.density is not None, head or flowers, "--strategy tinymetafed or one of Flower's"),
            "--mu": (self.mu is not None, key == "fedprox", "--strategy fedprox"),
            "--dp-noise": (self.dp_noise is not None, self.dp_clip > 0, "--dp-clip above 0"),
            "--dp-on-device": (self.dp_on_device, self.dp_clip > 0, "--dp-clip above 0"),
        }
        for option, (chosen, used, requires) in uses.items():
            if chosen and not used:
                how = f"{'asynchronous ' * self.asynchronous}{key}"
                raise UserError(f"{how} has no use for {option}: leave it out, or choose {requires}")


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
    """One of ours (META), or any of Flower's by its class name in any case, with the task's recipe for it.

    clients: how many a round. query: samples that each device scores itself on. Raises UserError for an unknown name,
    or for options that do not go with it.
    """
    key = name.lower()
    if options.density is not None and not 0 < options.density <= 1:
        raise UserError(f"--top is the share of the changes that is sent, in (0, 1], not {options.density:g}")
    if options.dp_clip and (options.asynchronous or key not in ("fedavg", "fedprox")):
        raise UserError(
            f"differential privacy is for the rounds of fedavg and fedprox: its noise is made for their mean, and "
            f"not for {'asynchronous ones' if options.asynchronous else name}"
        )
    if key in META_STRATEGIES or (options.asynchronous and key == "fedavg"):
        options.check(key)
        ours = strategy(key, task, rounds=rounds, clients=clients, query=query, seed=seed, options=options)
        if not options.asynchronous:
            return NamedStrategy(type(ours).__name__, ours)
        if key == "tinyreptile":
            raise UserError("TinyReptile visits one device at a time; for asynchronous rounds choose reptile")
        return NamedStrategy(
            "FedAsync" if key == "fedavg" else f"asynchronous {type(ours).__name__}", Asynchronous(ours)
        )
    if options.asynchronous:
        raise UserError(f"{name} needs all of a round's updates at once; asynchronous are {', '.join(ASYNCHRONOUS)}")
    return _make_flower_strategy(key, name, task, clients, query, seed, options)


def strategy(
    key: str,
    task: Task,
    *,
    rounds: int,
    clients: int,
    query: int = 0,
    seed: int = 0,
    options: StrategyOptions = StrategyOptions(),
) -> Reptile:
    """One of META, with the task's recipe."""
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
        local=task.program.head if hyperparameters.head_steps and options.local is not False else 0,
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
    known = {name.lower(): kind for name, kind in classes.items() if issubclass(kind, FedAvg)}
    if key not in known:
        raise UserError(f"there is no strategy '{name}'; choose one of {', '.join((*META_STRATEGIES, *sorted(known)))}")
    options.check(key)
    hyperparameters, kind = task.fedavg, known[key]
    # No least number of nodes: Flower's would wait for them without end.
    more = {"proximal_mu": 0.1 if options.mu is None else options.mu} if key == "fedprox" else {}
    flowers: Strategy = kind(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=0, min_available_nodes=0, **more
    )
    if options.dp_clip:
        private = DifferentialPrivacyClientSideFixedClipping
        wrapper = private if options.dp_on_device else DifferentialPrivacyServerSideFixedClipping
        noise = 1.0 if options.dp_noise is None else options.dp_noise
        flowers = wrapper(flowers, noise, options.dp_clip, clients)
    density = hyperparameters.density if options.density is None else options.density
    round_config = RoundConfig(phases(hyperparameters, task.program), query, UpdateFormat(density=density), seed)
    config = format_round_config(round_config)
    del config["seed"]  # then every device draws samples of its own in every round
    return NamedStrategy(f"{kind.__name__}{' with differential privacy' if options.dp_clip else ''}", flowers, config)


def initial_parameters(program: Program, how: NamedStrategy, seed: int = 0) -> Vector:
    """What a run begins with: random from the seed, but 0 in layers that stay on the devices, which each fits its own
    from there. (A random one would favour some labels over others, and no task has the labels of another.)"""
    strategy = how.strategy.strategy if isinstance(how.strategy, Asynchronous) else how.strategy
    return random_initialization(program, strategy.update.shared if isinstance(strategy, Reptile) else ALL_LAYERS, seed)


def random_initialization(program: Program, shared: int, seed: int) -> Vector:
    """Random parameters, but 0 in layers that are not in the mask `shared`."""
    return np.where(program.in_layers(shared), program.initial(seed), np.float32(0))


_PRIVATE = (DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping)


def limit_clients(strategy: Strategy, clients: int, nodes: int) -> None:
    """Has one of Flower's strategies, which take a share of the nodes, take so many of them; ours know their number.
    Under differential privacy, the noise is made for as many."""
    if isinstance(strategy, _PRIVATE):
        strategy.num_sampled_clients = min(clients, nodes)
        strategy = strategy.strategy
    if isinstance(strategy, FedAvg):
        strategy.fraction_train = min(1.0, (clients + 0.5) / nodes)  # it rounds down


@dataclass(frozen=True)
class Round:
    """What one round came to, or in an asynchronous run one update. loss and accuracy are None where no device reported
    one."""

    number: int
    asked: int
    parts: Sequence[Participation]
    lost: Mapping[str, str]  # device -> why
    bytes_up: int
    bytes_down: int
    arena_bytes: int | None  # the most that a device's engine has to work in
    seconds: float

    @property
    def loss(self) -> float | None:
        """Mean over the devices."""
        return _mean([part.loss for part in self.parts])

    @property
    def accuracy(self) -> float | None:
        """Mean over the devices, on samples that they had not learned from."""
        return _mean([part.accuracy for part in self.parts])


@dataclass(frozen=True)
class RunResult:
    """A run that has ended: its number, the parameters that it began with and that it learned, and its rounds."""

    run: int
    initialization: Vector
    parameters: Vector
    rounds: Sequence[Round]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def why_devices_cannot_train(store: Store, model: Iri, fleet: str) -> list[str]:
    """For every device of the fleet, why it may not be able to train the model; what the graph can tell."""
    rows = store.query(
        """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id ?online ?current ?arena ?takes WHERE {
          VALUES ?model { UNDEF }
          VALUES ?fleet { UNDEF }
          ?device tf:deviceId ?id ; a tf:Device ; tf:fleet ?fleet .
          OPTIONAL { ?model tf:trainRamBytes ?takes }
          OPTIONAL { ?device tf:online ?online }
          OPTIONAL { ?device tf:currentModel ?current }
          OPTIONAL { ?device tf:arenaBytes ?arena }
        } ORDER BY ?id""",
        model=model,
        fleet=fleet,
    )
    reasons = []
    for row in rows:
        arena, takes = row.get("arena"), row.get("takes")
        if not row.get("online"):
            reason = "is offline"
        elif row.get("current") != model:
            reason = f"runs another model ({row.get('current', 'unknown')})"
        elif isinstance(arena, int) and isinstance(takes, int) and arena < takes:
            reason = f"has an arena of {arena} bytes, and training takes {takes}"
        else:
            reason = "could train it, but is not selected"
        reasons.append(f"{row['id']} {reason}")
    return reasons


def _no_clients_message(store: Store, model: Iri, fleet: str, selected: Sequence[str]) -> UserError:
    reasons = why_devices_cannot_train(store, model, fleet)
    if not reasons:
        return UserError(
            f"no client is eligible: the graph knows no device of the fleet '{fleet}'; start some (tinyfleet device), "
            "or name another fleet with --fleet"
        )
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    if selected:
        what = f"the query selects {', '.join(selected[:5])}, but none of them is online at the broker with {model}"
    else:
        what = f"the query selects none of the fleet's {len(reasons)} devices to train {model}"
    return UserError(f"no client is eligible: {what} ({shown}); start such devices, or change the query")


def run(
    task: Task,
    how: NamedStrategy,
    *,
    broker: tuple[str, int],
    fleet: str,
    store: Store,
    rounds: int,
    query: str | None = None,
    initialization: Vector | None = None,
    seed: int = 0,
    clients: int = 1,
    wait: float = 10.0,
    timeout: float = 60.0,
    on_event: Callable[[RoundEvent], None] | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> RunResult:
    """Runs the rounds, and writes the model, the rounds and the lineage into the store.

    query: SPARQL whose column ?id are the devices that may take part, asked anew in every round; the library's
    `clients` by default. start: the first parameters, by default `initial_parameters`. clients: how many devices to
    wait for, `wait` seconds at most; it begins with fewer, but not with none, and in a round waits as long for a first
    one. timeout: seconds that a round may take. on_round: called as each round ends.

    Raises UserError if no device can take part, at the beginning or in a round.
    """
    program, sparql = task.program, query or library.text("clients")
    model = describe.put_model(store, describe.from_program(program, task.name))
    vector = (
        initial_parameters(program, how, seed) if initialization is None else np.asarray(initialization, np.float32)
    )
    asked: list[str] = []
    parts: list[tuple[Participation, int]] = []  # and the round that it was asked in
    lost: dict[str, str] = {}
    arenas: list[int] = []

    def watch(event: RoundEvent) -> None:
        if event.kind == "requested":
            asked.append(event.device)
        elif event.kind == "replied" and event.metrics is not None:
            parts.append((_part(event.device, event.metrics, event.encoding), event.server_round))
            arenas.append(int(event.metrics["arena-bytes"]))  # type: ignore[arg-type]
        elif event.kind == "no_reply":
            lost[event.device] = event.reason
        if on_event is not None:
            on_event(event)

    with MqttGrid(
        *broker, fleet, program, select_devices=lambda: select(store, sparql, model, fleet), on_event=watch, wait=wait
    ) as grid:
        # All that the graph knows of, so that a draw among them does not depend on who was heard of first.
        nodes = grid.wait_for_nodes(max(clients, len(select(store, sparql, model, fleet))), wait)
        if not nodes:
            raise _no_clients_message(store, model, fleet, select(store, sparql, model, fleet))
        limit_clients(how.strategy, clients, len(nodes))
        number = grid.run.run_id
        lineage = Lineage(store, fleet)
        lineage.begin(number, model, how.name, _sha256(vector), task=task.name)
        done: list[Round] = []
        newest, began = vector, datetime.now(UTC)
        up, down = 0, 0

        def close(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            """Flower calls this with the parameters it begins with, as round 0, and after every round."""
            nonlocal newest, began, up, down
            random.seed(f"{seed} {server_round}")  # Flower's strategies draw the next round's nodes with it
            if server_round == 0:
                return None
            if not asked and not parts:  # ours say so themselves; Flower's would go on with nobody
                raise UserError(f"no client is there for round {server_round}; start devices, or widen the selection")
            now, up_now, down_now = datetime.now(UTC), grid.traffic.bytes_up, grid.traffic.bytes_down
            learned = arrays_to_vector(arrays, program)
            used = []
            for part, began_in in sorted(parts, key=lambda part: part[0].device):
                late = server_round - began_in
                if isinstance(how.strategy, Asynchronous) and late > how.strategy.max_staleness:
                    lost[part.device] = f"its update is {late} versions old, too old"
                else:
                    used.append(replace(part, staleness=late))
            this = Round(
                number=server_round,
                asked=len(asked),
                parts=used,
                lost=dict(lost),
                bytes_up=up_now - up,
                bytes_down=down_now - down,
                arena_bytes=max(arenas, default=None),
                seconds=(now - began).total_seconds(),
            )
            lineage.round(
                number,
                server_round,
                this.parts,
                asked=this.asked,
                started=began,
                ended=now,
                sha256=_sha256(learned) if this.parts else None,
                bytes_up=this.bytes_up,
                bytes_down=this.bytes_down,
                accuracy=this.accuracy,
                lost=this.lost,
            )
            done.append(this)
            newest, began, up, down = learned, now, up_now, down_now
            asked.clear()
            parts.clear()
            lost.clear()
            arenas.clear()
            if on_round is not None:
                on_round(this)
            # The fleet may have shrunk or grown; only Flower's strategies need to be told.
            if isinstance(how.strategy, (FedAvg, *_PRIVATE)) and (there := grid.wait_for_nodes(1, 0)):
                limit_clients(how.strategy, clients, len(there))
            return None

        how.strategy.start(
            grid,
            vector_to_arrays(vector, program),
            rounds,
            timeout,
            train_config=ConfigRecord(dict(how.train_config)),
            evaluate_fn=close,
        )
        lineage.end(number)
    return RunResult(number, vector, newest, done)


def _part(device: str, metrics: MetricRecord, encoding: str | None) -> Participation:
    def number(key: str) -> float | None:
        value = metrics.get(key)
        return float(value) if isinstance(value, int | float) else None

    samples, size = metrics["num-examples"], metrics["bytes-up"]
    assert isinstance(samples, int) and isinstance(size, int)
    return Participation(device, number("loss"), number("accuracy"), samples, size, encoding)


def _sha256(vector: Vector) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
