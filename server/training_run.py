"""Rounds of federated (meta-)learning on the devices that a SPARQL query selects, written into the graph as they end.

`tinyfleet run start` and the demo share this.
"""

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import Task
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.ontology.ingest import describe
from tinyfleet.ontology.ingest.lineage import Lineage, Participation
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.queries.matching import select_devices
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import Iri
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.requests import RoundEvent
from tinyfleet.server.flower.strategies import Asynchronous
from tinyfleet.server.named_strategies import PRIVATE, NamedStrategy, initial_parameters, limit_clients

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Round:
    """One round that has ended, or in an asynchronous run one update.

    Parameters
    ----------
    number
        From 1.
    selected
        How many devices were sent a command.
    participations
        Of the devices whose updates were used.
    no_reply
        Why each other device gave no reply.
    refused
        Why a device's reply is out of bounds, and was not used.
    bytes_up, bytes_down
        Payload bytes.
    arena_bytes
        The largest arena of a device's engine; None if no device reported it.
    seconds
        Time that it took.
    """

    number: int
    selected: int
    participations: Sequence[Participation]
    no_reply: Mapping[str, str]
    refused: Mapping[str, str]
    bytes_up: int
    bytes_down: int
    arena_bytes: int | None
    seconds: float

    @property
    def loss(self) -> float | None:
        """Mean over the devices; None if none reported one."""
        return _mean([participation.loss for participation in self.participations])

    @property
    def accuracy(self) -> float | None:
        """Mean over the devices, on query samples; None if none reported one."""
        return _mean([participation.accuracy for participation in self.participations])


@dataclass(frozen=True)
class RunResult:
    """A run that has ended: its number, its first and its learned parameters [n_params], and its rounds."""

    run: int
    initialization: Vector
    parameters: Vector
    rounds: Sequence[Round]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def why_devices_cannot_train(store: Store, model: Iri, fleet: str) -> list[str]:
    """For every device of the fleet, why it may not be able to train the model, as far as the graph can tell."""
    rows = store.query(
        """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id ?online ?current ?arena ?required ?incompatibility WHERE {
          VALUES ?model { UNDEF }
          VALUES ?fleet { UNDEF }
          ?device tf:deviceId ?id ; a tf:Device ; tf:fleet ?fleet .
          OPTIONAL { ?model tf:trainRamBytes ?required }
          OPTIONAL { ?device tf:online ?online }
          OPTIONAL { ?device tf:currentModel ?current }
          OPTIONAL { ?device tf:arenaBytes ?arena }
          OPTIONAL { ?device tf:incompatibility ?incompatibility }
        } ORDER BY ?id""",
        model=model,
        fleet=fleet,
    )
    reasons = []
    for row in rows:
        arena, required = row.get("arena"), row.get("required")
        if incompatibility := row.get("incompatibility"):
            reason = str(incompatibility)
        elif not row.get("online"):
            reason = "is offline"
        elif row.get("current") != model:
            reason = f"runs another model ({row.get('current', 'unknown')})"
        elif isinstance(arena, int) and isinstance(required, int) and arena < required:
            reason = f"has an arena of {arena} bytes, and training needs {required}"
        else:
            reason = "could train it, but is not selected"
        reasons.append(f"{row['id']} {reason}")
    return reasons


def _no_clients_message(store: Store, model: Iri, fleet: str, selected: Sequence[str]) -> UserError:
    reasons = why_devices_cannot_train(store, model, fleet)
    if not reasons:
        return UserError(
            f"no client is eligible: the graph knows no device of the fleet '{fleet}'; start some (tinyfleet device "
            "simulate), or name another fleet with --fleet"
        )
    shown = "; ".join(reasons[:5]) + (f"; and {len(reasons) - 5} more" if len(reasons) > 5 else "")
    if selected:
        problem = f"the query selects {', '.join(selected[:5])}, but none of them is online at the broker with {model}"
    else:
        problem = f"the query selects none of the fleet's {len(reasons)} devices to train {model}"
    return UserError(f"no client is eligible: {problem} ({shown}); start such devices, or change the query")


class NothingLearned(UserError):
    """A run has ended in which no device gave a usable reply."""

    exit_code = 1


def _nothing_learned_message(rounds: Sequence[Round]) -> str:
    if refused := next((f"{d}: {why}" for ended in rounds for d, why in ended.refused.items()), ""):
        return f"no device gave a usable reply; nothing was learned ({refused})"
    reason = next((f"{d}: {why}" for ended in rounds for d, why in ended.no_reply.items()), "")
    return f"no device replied; nothing was learned{f' ({reason})' if reason else ''}"


@dataclass
class _OpenRound:
    """What the grid has reported since the last round ended."""

    selected: int = 0
    replies: list[tuple[Participation, int]] = field(default_factory=list)  # and the round that it was asked in
    no_reply: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    arenas: list[int] = field(default_factory=list)

    def add(self, event: RoundEvent) -> None:
        """Takes in an event of the grid."""
        if event.kind == "requested":
            self.selected += 1
        elif event.kind == "replied" and event.metrics is not None:
            self.replies.append((_participation(event.device, event.metrics, event.encoding), event.server_round))
            self.arenas.append(int(event.metrics["arena-bytes"]))  # type: ignore[arg-type]
        elif event.kind == "no_reply":
            self.no_reply[event.device] = event.reason
        elif event.kind == "refused":
            self.refused[event.device] = event.reason

    def used(self, server_round: int, max_staleness: int | None) -> list[Participation]:
        """The participations that count, by device; updates that are too old move to `no_reply`."""
        used = []
        for participation, asked_in in sorted(self.replies, key=lambda reply: reply[0].device):
            staleness = server_round - asked_in
            if max_staleness is not None and staleness > max_staleness:
                self.no_reply[participation.device] = f"its update is {staleness} versions old, too old"
            else:
                used.append(replace(participation, staleness=staleness))
        return used


class _Recorder:
    """Closes the rounds of a run: each becomes a Round, and is written into the graph."""

    def __init__(
        self,
        grid: MqttGrid,
        lineage: Lineage,
        named_strategy: NamedStrategy,
        clients: int,
        seed: int,
        initialization: Vector,
    ) -> None:
        self.rounds: list[Round] = []
        self.parameters = initialization
        self._grid = grid
        self._lineage = lineage
        self._strategy = named_strategy.strategy
        self._clients = clients
        self._seed = seed
        self._open = _OpenRound()
        self._began = datetime.now(UTC)
        self._bytes_up, self._bytes_down = 0, 0

    def close(self, server_round: int, arrays: ArrayRecord) -> Round | None:
        """Ends a round with these parameters. Round 0 is the beginning of the run, and no round of its own."""
        random.seed(f"{self._seed} {server_round}")  # Flower's strategies draw the next round's nodes with it
        if server_round == 0:
            return None
        closing = self._open
        if not closing.selected and not closing.replies:  # Flower's strategies would go on without any client
            raise UserError(f"no client is there for round {server_round}; start devices, or widen the selection")
        now, traffic = datetime.now(UTC), self._grid.traffic
        up, down = traffic.bytes_up, traffic.bytes_down
        max_staleness = self._strategy.max_staleness if isinstance(self._strategy, Asynchronous) else None
        self.parameters = arrays_to_vector(arrays, self._grid.program)
        ended = Round(
            number=server_round,
            selected=closing.selected,
            participations=closing.used(server_round, max_staleness),
            no_reply=closing.no_reply,
            refused=closing.refused,
            bytes_up=up - self._bytes_up,
            bytes_down=down - self._bytes_down,
            arena_bytes=max(closing.arenas, default=None),
            seconds=(now - self._began).total_seconds(),
        )
        self._lineage.round(
            self._grid.run.run_id,
            server_round,
            ended.participations,
            selected=ended.selected,
            started=self._began,
            ended=now,
            sha256=_sha256(self.parameters) if ended.participations else None,
            bytes_up=ended.bytes_up,
            bytes_down=ended.bytes_down,
            accuracy=ended.accuracy,
            lost=ended.no_reply,
            refused=ended.refused,
        )
        self.rounds.append(ended)
        self._open, self._began, self._bytes_up, self._bytes_down = _OpenRound(), now, up, down
        return ended

    def add(self, event: RoundEvent) -> None:
        """Takes in an event of the grid."""
        self._open.add(event)

    def limit_clients(self) -> None:
        """Tells Flower's strategies how large the fleet is now; ours ask by themselves."""
        if isinstance(self._strategy, (FedAvg, *PRIVATE)) and (nodes := self._grid.wait_for_nodes(1, 0)):
            limit_clients(self._strategy, self._clients, len(nodes))


def run(
    task: Task,
    named_strategy: NamedStrategy,
    *,
    broker: BrokerAddress,
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
    """Runs rounds, and writes the model, the rounds and the lineage into the graph.

    Parameters
    ----------
    task
        The learning task.
    named_strategy
        See `named_strategies.make_strategy`.
    broker
        The MQTT broker.
    fleet
        The fleet's name.
    store
        The graph.
    rounds
        How many.
    query
        SPARQL whose column ?id selects the devices that may take part; asked again in every round. Default: the
        library's `clients`.
    initialization
        Parameters [n_params] that the run begins with. Default: `named_strategies.initial_parameters`.
    seed
        Of the initial parameters and of the selection of devices.
    clients
        Devices to wait for; the run begins with fewer, but not with none.
    wait
        Seconds to wait for them, and in a round for a first one.
    timeout
        Seconds that a round may take.
    on_event
        Called with each event of a round.
    on_round
        Called with each round as it ends.

    Returns
    -------
    RunResult

    Raises
    ------
    UserError
        If no device can take part, at the beginning or in a round.
    NothingLearned
        If no device gave a usable reply in any round.
    """
    program, sparql = task.program, query or library.text("clients")
    model = describe.put_model(store, describe.from_program(program, task.name))
    if initialization is None:
        vector = initial_parameters(program, named_strategy, seed)
    else:
        vector = np.asarray(initialization, np.float32)
    recorder: _Recorder | None = None

    def selected() -> list[str]:
        return list(select_devices(store, sparql, model, fleet))

    def watch(event: RoundEvent) -> None:
        assert recorder is not None
        recorder.add(event)
        if on_event is not None:
            on_event(event)

    def close(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Flower calls this with the initial parameters, as round 0, and after every round."""
        assert recorder is not None
        ended = recorder.close(server_round, arrays)
        if ended is not None:
            if on_round is not None:
                on_round(ended)
            recorder.limit_clients()
        return None

    with MqttGrid(
        broker,
        fleet,
        program,
        select_devices=selected,
        on_event=watch,
        wait=wait,
        max_norm_ratio=named_strategy.max_norm_ratio,
    ) as grid:
        # Wait for all selected devices, so that a draw among them does not depend on which reported first.
        nodes = grid.wait_for_nodes(max(clients, len(selected())), wait)
        if not nodes:
            raise _no_clients_message(store, model, fleet, selected())
        limit_clients(named_strategy.strategy, clients, len(nodes))
        number, lineage = grid.run.run_id, Lineage(store, fleet)
        lineage.begin(number, model, named_strategy.name, _sha256(vector), task=task.name)
        recorder = _Recorder(grid, lineage, named_strategy, clients, seed, vector)
        failed = True
        try:
            named_strategy.strategy.start(
                grid,
                vector_to_arrays(vector, program),
                rounds,
                timeout,
                train_config=ConfigRecord(dict(named_strategy.train_config)),
                evaluate_fn=close,
            )
            failed = not any(ended.participations for ended in recorder.rounds)
        finally:  # an interrupt ends it too
            lineage.end(number, failed=failed)
    if failed:
        raise NothingLearned(_nothing_learned_message(recorder.rounds))
    return RunResult(number, vector, recorder.parameters, recorder.rounds)


def _participation(device: str, metrics: MetricRecord, encoding: str | None) -> Participation:
    def number(key: str) -> float | None:
        value = metrics.get(key)
        return float(value) if isinstance(value, int | float) else None

    samples, size = metrics["num-examples"], metrics["bytes-up"]
    assert isinstance(samples, int) and isinstance(size, int)
    return Participation(device, number("loss"), number("accuracy"), samples, size, encoding)


def _sha256(vector: Vector) -> str:
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()
