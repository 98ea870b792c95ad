"""Fleets with a straggler, a liar or a secret: asynchronous rounds, robust aggregation, privacy, FedProx, first-order
MAML, on virtual devices over a real broker."""
# ruff: noqa: F811

import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import flwr.serverapp.strategy as flower_strategies
import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    Strategy,
)
from numpy.typing import NDArray
from test_grid_fleet import PROGRAM, START, TASK, Start, client, devices, learn, quiet, replayed, server  # noqa: F401
from test_grid_messages import retained

from tinyfleet.edge.device.device import Device
from tinyfleet.edge.device.node import Node, Out, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.tasks import MAX_NORM_RATIO, ClientData
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.messages import Dense, Success, decode_reply, encode
from tinyfleet.ontology.queries import library
from tinyfleet.server.fleet_server import FleetServer
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile
from tinyfleet.server.named_strategies import NamedStrategy, StrategyOptions, make_strategy
from tinyfleet.server.run_report import round_json
from tinyfleet.server.training_run import NothingLearned, Round

Vector = NDArray[np.float32]
Broker = BrokerAddress


class OddNode(Node):
    """The C node, but its owner tampers with what it sends."""

    def __init__(self, id: str, data: ClientData) -> None:
        td = thing_description("test", id, VIRTUAL, "mote", "0.2.0", 65_536, PROGRAM.model_id)
        super().__init__("test", id, td, PROGRAM, DatasetStream(data))

    def poll(self) -> Iterator[Out]:
        for out in super().poll():
            if isinstance(out, Publish) and out.topic.endswith("/reply"):
                yield from self.tamper(out)
            else:
                yield out

    def tamper(self, reply: Publish) -> Iterator[Publish]:
        raise NotImplementedError


class Liar(OddNode):
    """Sends ten times the opposite of what it has learned."""

    def tamper(self, reply: Publish) -> Iterator[Publish]:
        did = decode_reply(reply.payload)
        assert isinstance(did, Success) and isinstance(did.update, Dense)
        update = Dense(did.update.offset, -10 * did.update.values, did.update.half)
        yield reply._replace(payload=encode(Success(did.id, did.part, did.parts, did.metrics, update)))


class Silent(OddNode):
    """Never answers."""

    def tamper(self, reply: Publish) -> Iterator[Publish]:
        return iter(())


class Late(OddNode):
    """Keeps its first reply until it is released."""

    def __init__(self, id: str, data: ClientData) -> None:
        super().__init__(id, data)
        self.released, self.sent = threading.Event(), threading.Event()
        self.kept: list[Publish] = []

    def tamper(self, reply: Publish) -> Iterator[Publish]:
        if self.sent.is_set():
            yield reply
        else:
            self.kept = [reply]

    def poll(self) -> Iterator[Out]:
        yield from super().poll()
        if self.kept and self.released.is_set():
            yield self.kept.pop()
            self.sent.set()


@pytest.fixture
def odd(broker: Broker) -> Iterator[Any]:
    started: list[Device] = []

    def start(kind: type[OddNode], index: int) -> Device:
        id = f"odd-{index}"
        device = Device(lambda: kind(id, client(index, 100)), broker, "test")
        device.start()
        started.append(device)
        return device

    yield start
    for device in started:
        device.stop()
    for device in started:
        assert device.join(10)


# Robust aggregation


def accuracy(vector: Vector) -> float:
    """On the task of seed 5, on samples that no device has."""
    learner, stream = MoteLearner(PROGRAM), DatasetStream(client(50, 100))
    learner.set_parameters(vector)
    stream.open(5)
    samples = [stream.next(query=False) for _ in range(300)]
    return float(np.mean([int(np.argmax(learner.infer(x))) == y for x, y in samples]))


def after_rounds(
    strategy: Strategy,
    broker: Broker,
    count: int,
    rounds: int = 3,
    max_norm_ratio: float = MAX_NORM_RATIO,
    **config: Any,
) -> Vector:
    settings = ConfigRecord({"phase-steps": [60], "lr": 0.1, "seed": 5, **config})
    with MqttGrid(broker, "test", PROGRAM, max_norm_ratio=max_norm_ratio) as grid:
        assert len(grid.wait_for_nodes(count, 10)) == count
        result = strategy.start(grid, vector_to_arrays(START, PROGRAM), rounds, 30, train_config=settings)
    return arrays_to_vector(result.arrays, PROGRAM)


def test_a_liar_ruins_the_mean_and_not_what_is_made_for_liars(broker: Broker, devices: Start, odd: Any) -> None:
    devices(5)
    honest = accuracy(after_rounds(FedAvg(fraction_evaluate=0.0), broker, 5))
    odd(Liar, 7)
    assert honest > 0.9
    unbounded = after_rounds(FedAvg(fraction_evaluate=0.0), broker, 6, max_norm_ratio=math.inf)
    assert accuracy(unbounded) < honest - 0.3
    for robust, ratio in (
        (FedAvg(fraction_evaluate=0.0), MAX_NORM_RATIO),  # its change is refused
        (FedMedian(fraction_evaluate=0.0), math.inf),
        (FedTrimmedAvg(fraction_evaluate=0.0, beta=0.2), math.inf),
        (Krum(fraction_evaluate=0.0, num_malicious_nodes=1), math.inf),
    ):
        learned = after_rounds(robust, broker, 6, max_norm_ratio=ratio)
        assert accuracy(learned) > honest - 0.05, type(robust).__name__


def test_fedprox_is_applied_on_the_device(broker: Broker, devices: Start) -> None:
    """The stronger the term, the nearer the fleet stays to the weights that it was sent."""
    devices(3)

    def distance(mu: float) -> float:
        strategy = FedProx(fraction_evaluate=0.0, proximal_mu=mu)
        return float(np.linalg.norm(after_rounds(strategy, broker, 3, rounds=1) - START))

    free, some, strong = (distance(mu) for mu in (0.0, 1.0, 9.0))
    assert strong < 0.5 * some < 0.5 * free * 0.9
    with MqttGrid(broker, "test", PROGRAM) as grid, pytest.raises(ValueError, match="proximal-mu times the rate"):
        grid.wait_for_nodes(3, 10)
        FedProx(proximal_mu=11.0).start(
            grid, vector_to_arrays(START, PROGRAM), 1, 30, train_config=ConfigRecord({"phase-steps": [5], "lr": 0.1})
        )


# Differential privacy


@pytest.mark.parametrize(
    "wrapper", [DifferentialPrivacyServerSideFixedClipping, DifferentialPrivacyClientSideFixedClipping]
)
def test_privacy_clips_each_change_and_adds_noise(broker: Broker, devices: Start, wrapper: Any) -> None:
    """Without noise the mean is that of the clipped changes; with it, the difference has the deviation promised."""
    devices(4)
    clip, noise = 0.25, 2.0
    config = {"phase-steps": [20], "lr": 0.1}

    def once(noise: float) -> Vector:
        strategy = wrapper(FedAvg(fraction_evaluate=0.0), noise, clip, 4)
        settings = ConfigRecord({**config})
        with MqttGrid(broker, "test", PROGRAM) as grid:
            grid.wait_for_nodes(4, 10)
            return arrays_to_vector(
                strategy.start(grid, vector_to_arrays(START, PROGRAM), 1, 30, settings).arrays, PROGRAM
            )

    changes = replayed(4) - START
    norms = np.linalg.norm(changes, axis=1)
    assert (norms > clip).all(), "there is something to clip"
    clipped = (changes * (clip / norms)[:, None]).mean(axis=0)
    still = once(0.0)
    np.testing.assert_allclose(still - START, clipped, rtol=1e-3, atol=1e-6)
    difference = once(noise) - still
    assert difference.std() == pytest.approx(noise * clip / 4, rel=0.15), f"over {PROGRAM.n_params} parameters"


def test_the_devices_send_no_change_larger_than_the_clip(broker: Broker, devices: Start, server: FleetServer) -> None:
    devices(3)
    options = StrategyOptions(dp_clip_norm=0.1, dp_noise_multiplier=0.0, dp_on_device=True)
    how = make_strategy("fedavg", TASK, rounds=1, clients=3, options=options)
    outcome = learn(server, how, 1, clients=3)
    assert how.name == "FedAvg with differential privacy" and len(outcome.rounds[0].participations) == 3
    assert 0 < np.linalg.norm(outcome.parameters - outcome.initialization) <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize(("name", "options"), [("krum", {}), ("reptile", {}), ("fedavg", {"asynchronous": True})])
def test_privacy_that_would_not_hold_is_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="differential privacy is for the rounds of fedavg and fedprox"):
        make_strategy(name, TASK, rounds=1, clients=3, options=StrategyOptions(dp_clip_norm=1.0, **options))


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"in \(0, 1\], not 0"):
        make_strategy("fedavg", TASK, rounds=1, clients=3, options=StrategyOptions(density=0.0))


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        (
            "reptile",
            {"local_head": False},
            "reptile does not use --local-head/--no-local-head: .* choose --strategy tinymetafed$",
        ),
        ("fedavg", {"anneal": True}, "fedavg does not use --anneal/--no-anneal"),
        ("TinyReptile", {"density": 0.5}, "tinyreptile does not use --density: .* tinymetafed or one of Flower's$"),
        ("fedavg", {"density": 0.5, "asynchronous": True}, "asynchronous fedavg does not use --density"),
        ("fedavg", {"proximal_mu": 0.1}, "fedavg does not use --proximal-mu: .* choose --strategy fedprox$"),
        (
            "fedavg",
            {"dp_noise_multiplier": 1.0},
            "fedavg does not use --dp-noise-multiplier: .* choose --dp-clip-norm above 0$",
        ),
        ("fedprox", {"dp_on_device": True}, "does not use --dp-on-device"),
    ],
)
def test_an_option_that_the_strategy_has_no_use_for_is_refused(name: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        make_strategy(name, TASK, rounds=1, clients=3, options=StrategyOptions(**options))


def test_options_reach_the_strategy_that_has_a_use_for_them() -> None:
    def ours(**options: Any) -> Any:
        return make_strategy("tinymetafed", TASK, rounds=1, clients=3, options=StrategyOptions(**options)).strategy

    assert (ours().local, ours(local_head=True).local, ours(local_head=False).local) == (
        TASK.program.head,
        TASK.program.head,
        0,
    )
    assert (ours().alpha_end, ours(anneal=True).alpha_end, ours(anneal=False).alpha_end) == (0, 0, TASK.meta.alpha)
    assert ours(density=0.5, asynchronous=True).strategy.update.density == 0.5
    for options, mu in (({}, 0.1), ({"proximal_mu": 0.0}, 0.0)):
        fedprox: Any = make_strategy("fedprox", TASK, rounds=1, clients=3, options=StrategyOptions(**options)).strategy
        assert fedprox.proximal_mu == mu
    for options, noise in (({}, 1.0), ({"dp_noise_multiplier": 0.0}, 0.0)):
        private: Any = make_strategy(
            "fedavg", TASK, rounds=1, clients=3, options=StrategyOptions(dp_clip_norm=1, **options)
        ).strategy
        assert private.noise_multiplier == noise


# First-order MAML


def test_first_order_maml_moves_the_start_by_the_last_samples_changes(broker: Broker, devices: Start) -> None:
    devices(3)
    strategy = FOMAML(alpha=0.5, beta=0.1, steps=10, outer=3, outer_beta=0.02, clients=3, seed=4)
    expected = []
    with MqttGrid(broker, "test", PROGRAM) as grid:
        grid.wait_for_nodes(3, 10)
        for message in strategy.configure_train(1, vector_to_arrays(START, PROGRAM), ConfigRecord(), grid):
            index = int(grid.device(message.metadata.dst_node_id).removeprefix("test-"))
            learner, stream = MoteLearner(PROGRAM), DatasetStream(client(index, 100))
            learner.set_parameters(START)
            stream.open(int(message.content.config_records["config"]["seed"]))  # type: ignore[call-overload]
            for _ in range(10):
                learner.learn(*stream.next(query=False), 0.1)
            adapted = learner.parameters
            for _ in range(3):
                learner.learn(*stream.next(query=False), 0.02)
            expected.append(learner.parameters - adapted)
        result = strategy.start(grid, vector_to_arrays(START, PROGRAM), 1, 30)
    moved = arrays_to_vector(result.arrays, PROGRAM)
    np.testing.assert_allclose(moved, START + 0.5 * np.mean(expected, axis=0), rtol=1e-5, atol=1e-6)


# Asynchronous rounds


def test_a_straggler_that_never_answers_holds_nothing_up(server: FleetServer, devices: Start, odd: Any) -> None:
    """Twelve updates are used though one of the three places is taken for good, and no timeout is waited for."""
    devices(2)
    odd(Silent, 9)
    how = make_strategy("reptile", TASK, rounds=12, clients=3, options=StrategyOptions(asynchronous=True))
    outcome = learn(server, how, 12, clients=3, timeout=600.0)
    assert [this.number for this in outcome.rounds] == list(range(1, 13))
    assert all(len(this.participations) == 1 for this in outcome.rounds)
    assert {part.device for this in outcome.rounds for part in this.participations} == {"test-0", "test-1"}
    assert sum(this.selected for this in outcome.rounds) == 3 + 11, "a place is filled again as soon as it is free"
    assert not np.array_equal(outcome.parameters, outcome.initialization)


@pytest.mark.parametrize("most", [100, 4])
def test_a_late_update_is_used_with_its_staleness_unless_it_is_too_old(
    server: FleetServer, devices: Start, odd: Any, most: int
) -> None:
    """It comes when six others have been used."""
    devices(2)
    late = odd(Late, 9)

    def watch(this: Round) -> None:
        if this.number == 6:
            late.node.released.set()
            assert late.node.sent.wait(10)

    strategy = Asynchronous(Reptile(clients=3, beta=0.1), max_staleness=most)
    outcome = learn(server, NamedStrategy("late", strategy), 40, clients=3, timeout=600.0, on_round=watch)
    ages = [part.staleness or 0 for this in outcome.rounds for part in this.participations if part.device == "odd-9"]
    reasons = [this.no_reply["odd-9"] for this in outcome.rounds if "odd-9" in this.no_reply]
    if most == 100:
        assert ages[0] >= 6 and not reasons
    else:
        assert len(reasons) == 1 and "too old" in reasons[0]
        assert all(age <= 4 for age in ages), "what it learns next is used again"
    stalest = max(part.staleness or 0 for this in outcome.rounds for part in this.participations)
    assert server.store.query(library.text("updates"), run=outcome.run).column("stalest") == [stalest]


@pytest.mark.parametrize("name", ["tinymetafed", "fomaml", "fedavg"])
def test_asynchronous_rounds_learn(server: FleetServer, devices: Start, name: str) -> None:
    devices(4)
    how = make_strategy(name, TASK, rounds=20, clients=3, options=StrategyOptions(asynchronous=True))
    outcome = learn(server, how, 20, clients=4)
    assert len(outcome.rounds) == 20 and not any(this.no_reply for this in outcome.rounds)
    assert max(part.staleness or 0 for this in outcome.rounds for part in this.participations) >= 1
    sent = sum(part.bytes_up or 0 for this in outcome.rounds for part in this.participations)
    assert sum(this.bytes_up for this in outcome.rounds) >= sent, "what comes while a round is written down counts, too"
    assert not np.array_equal(outcome.parameters, outcome.initialization)


def test_what_can_not_be_asynchronous_says_so() -> None:
    for name, why in (("tinyreptile", "one device at a time"), ("krum", "all of a round's updates at once")):
        with pytest.raises(UserError, match=why):
            make_strategy(name, TASK, rounds=1, clients=2, options=StrategyOptions(asynchronous=True))


# Runs that fail


FAILED_RUNS = "PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?run { ?run a tf:Run ; tf:failed true }"


def test_a_run_in_which_no_device_ever_replied_has_failed(server: FleetServer, odd: Any) -> None:
    odd(Silent, 1)
    with pytest.raises(NothingLearned, match=r"no device replied; nothing was learned \(odd-1: no reply") as failure:
        learn(server, make_strategy("fedavg", TASK, rounds=2, clients=1), 2, clients=1, timeout=0.5)
    assert failure.value.exit_code == 1
    assert len(server.store.query(FAILED_RUNS)) == 1


def test_a_reply_out_of_bounds_is_in_the_round_and_in_the_graph(server: FleetServer, devices: Start, odd: Any) -> None:
    devices(3)
    odd(Liar, 7)
    how = make_strategy("fedavg", TASK, rounds=1, clients=4, options=StrategyOptions(density=1.0))
    ended = learn(server, how, 1, clients=4).rounds[0]
    assert list(ended.refused) == ["odd-7"] and "times the median" in ended.refused["odd-7"] and not ended.no_reply
    assert [part.device for part in ended.participations] == ["test-0", "test-1", "test-2"]
    assert round_json(ended)["refused"] == ended.refused
    refused = "PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?device { ?round tf:refusedReplyFrom ?device }"
    assert [str(row["device"]).endswith("odd-7") for row in server.store.query(refused)] == [True]
    assert server.store.query(library.text("stragglers")).column("id") == ["odd-7"]
    assert len(server.store.query(FAILED_RUNS)) == 0


def test_an_interrupted_run_has_failed_and_leaves_nothing_at_the_broker(
    server: FleetServer, devices: Start, broker: Broker
) -> None:
    devices(2)

    def interrupt(_ended: Round) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(server, make_strategy("reptile", TASK, rounds=3, clients=2), 3, clients=2, on_round=interrupt)
    assert len(server.store.query(FAILED_RUNS)) == 1
    assert {topic.rsplit("/", 1)[-1] for topic in retained(server.broker)} == {"status", "td"}


@pytest.mark.parametrize("name", sorted(name for name in flower_strategies.__all__ if name.startswith(("Fed", "QFed"))))
def test_each_of_flowers_strategies_is_made_or_refused_in_a_line(name: str) -> None:
    if "Xgb" in name:
        with pytest.raises(UserError, match="there is no strategy"):
            make_strategy(name, TASK, rounds=1, clients=1)
    else:
        assert make_strategy(name.lower(), TASK, rounds=1, clients=1).name == name


def test_what_no_device_can_be_asked_is_refused_before_a_run() -> None:
    with pytest.raises(UserError, match="--proximal-mu must be less than 1 / the task's rate, 10; lower it"):
        make_strategy("fedprox", TASK, rounds=1, clients=1, options=StrategyOptions(proximal_mu=100))
    for bad in ({"steps": 0}, {"rate": -0.1}, {"rate": math.nan}, {"alpha": math.inf}, {"density": 0.0}):
        with pytest.raises(UserError):
            replace(TASK.meta, **bad)
