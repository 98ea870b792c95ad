"""The strategies' arithmetic on hand-made replies: no network, no devices."""

import math
from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.commands import ALL_LAYERS
from tinyfleet.edge.wire.round_config import parse_round_config
from tinyfleet.server.flower.grid import RunGrid
from tinyfleet.server.flower.internals import new_run, stamp
from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile, TinyMetaFed, TinyReptile

Arrays = dict[str, list[float]]
START: Arrays = {"dense_0/weights": [1.0, 2.0], "dense_0/bias": [0.0], "dense_1/weights": [4.0, -4.0]}


class Nodes(RunGrid):
    """A grid that only has nodes: what a strategy's two halves need between them is carried by hand here."""

    def __init__(self, nodes: list[int]) -> None:
        super().__init__(new_run(1))
        self.nodes = nodes

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({key: Array(np.array(values, dtype=np.float32)) for key, values in arrays.items()})


def values(arrays: ArrayRecord | None) -> dict[str, NDArray[np.float32]]:
    assert arrays is not None
    return {key: array.numpy() for key, array in arrays.items()}


def reply(message: Message, arrays: Arrays, **metrics: float) -> Message:
    defaults: dict[str, int | float] = {"num-examples": 4, "loss": 1.0, "bytes-up": 10, "bytes-dense": 20}
    content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord({**defaults, **metrics})})
    return Message(content, reply_to=message)


def configure(strategy: Reptile, server_round: int = 1, nodes: int = 5) -> list[Message]:
    grid = Nodes(list(range(10, 10 + nodes)))
    return list(strategy.configure_train(server_round, record(START), ConfigRecord(), grid))


def moved(by: float) -> Arrays:
    return {key: [v + by for v in values] for key, values in START.items()}


def test_reptile_pulls_the_start_by_alpha_times_the_mean_change() -> None:
    strategy = Reptile(alpha=0.5, clients=3)
    messages = configure(strategy)
    assert len(messages) == 3
    changes = (1.0, 2.0, 6.0)  # mean 3; times alpha: 1.5
    arrays, metrics = strategy.aggregate_train(1, [reply(m, moved(c)) for m, c in zip(messages, changes, strict=True)])
    new = values(arrays)
    assert new["dense_0/weights"].tolist() == [2.5, 3.5]
    assert new["dense_0/bias"].tolist() == [1.5]
    assert new["dense_1/weights"].tolist() == [5.5, -2.5]
    assert all(array.dtype == np.float32 for array in new.values())
    assert metrics is not None and metrics["clients"] == 3 and metrics["bytes-up"] == 30


def test_the_order_of_the_replies_does_not_matter() -> None:
    strategy = Reptile(clients=5)
    messages = configure(strategy)
    random = np.random.default_rng(0)
    replies = [
        reply(m, {k: random.normal(size=len(v)).tolist() for k, v in START.items()}, loss=float(random.random()))
        for m in messages
    ]
    one = strategy.aggregate_train(1, replies)
    other = strategy.aggregate_train(1, replies[::-1])
    assert one == other


def test_metrics_are_weighted_by_examples() -> None:
    strategy = Reptile(clients=2)
    first, second = configure(strategy)
    replies = [
        reply(first, START, **{"num-examples": 1, "loss": 4.0, "arena-bytes": 100}),
        reply(second, START, **{"num-examples": 3, "loss": 0.0, "arena-bytes": 60}),
    ]
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None
    assert (metrics["clients"], metrics["num-examples"], metrics["loss"]) == (2, 4, 1.0)
    assert (metrics["bytes-up"], metrics["bytes-dense"], metrics["arena-bytes"]) == (20, 40, 100)


def test_bad_replies_cost_only_themselves() -> None:
    strategy = Reptile(clients=5)
    a, b, c, d, e = configure(strategy)
    replies = [
        reply(a, moved(1.0)),
        Message(Error(5, "gone"), reply_to=b),
        reply(c, {**START, "dense_0/bias": [math.nan]}),
        reply(d, {**START, "dense_0/bias": [1.0, 2.0]}),
        reply(e, {"dense_0/weights": [1.0, 2.0]}),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert values(arrays)["dense_0/bias"].tolist() == [1.0]
    assert metrics is not None and metrics["clients"] == 1
    assert strategy.aggregate_train(1, replies[1:]) == (None, None)


def test_clients_and_their_tasks_are_drawn_by_seed_and_round() -> None:
    def drawn(seed: int, server_round: int) -> list[tuple[int, object]]:
        messages = configure(Reptile(seed=seed, clients=3), server_round, nodes=20)
        return [(m.metadata.dst_node_id, m.content.config_records["config"]["seed"]) for m in messages]

    assert drawn(1, 1) == drawn(1, 1)
    assert drawn(1, 1) != drawn(1, 2) and drawn(1, 1) != drawn(2, 1)
    seeds = [seed for _, seed in drawn(1, 1)]
    assert len(set(seeds)) == 3, "every client learns a task of its own"


def test_a_fleet_smaller_than_asked_takes_part_as_it_is() -> None:
    assert len(configure(Reptile(clients=8), nodes=2)) == 2
    with pytest.raises(UserError, match="no client is there for round 7"):
        configure(Reptile(), server_round=7, nodes=0)


def test_the_plan_travels_in_the_config() -> None:
    strategy = TinyMetaFed(
        rounds=10, beta=0.125, steps=6, local=2, local_steps=3, local_beta=0.5, density=0.25, query=7
    )
    config = configure(strategy)[0].content.config_records["config"]
    phases, query, update, _seed = parse_round_config(config)
    assert [(p.layers, p.steps, p.rate) for p in phases] == [(2, 3, 0.5), (ALL_LAYERS, 6, 0.125)]
    assert query == 7
    assert update is not None and (update.shared, update.half, update.density) == (ALL_LAYERS & ~2, True, 0.25)


def test_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 steps"):
        TinyReptile(steps=1)


def test_tinyreptile_visits_one_client_a_round() -> None:
    strategy = TinyReptile(alpha=0.25)
    visited = set()
    for server_round in range(1, 30):
        (message,) = configure(strategy, server_round)
        visited.add(message.metadata.dst_node_id)
    assert visited == {10, 11, 12, 13, 14}
    arrays, _ = strategy.aggregate_train(29, [reply(message, moved(2.0))])
    assert values(arrays)["dense_1/weights"].tolist() == [4.5, -3.5]


def test_tinymetafed_anneals_alpha_along_a_half_cosine() -> None:
    strategy = TinyMetaFed(rounds=4, alpha=1.0, alpha_end=0.2)
    expected = [1.0, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2]
    assert [strategy.rate(r) for r in (1, 2, 3, 4, 5)] == pytest.approx(expected)
    messages = configure(strategy, server_round=3)
    arrays, metrics = strategy.aggregate_train(3, [reply(m, moved(1.0)) for m in messages])
    assert values(arrays)["dense_0/bias"] == pytest.approx([0.6])
    assert metrics is not None and metrics["alpha"] == pytest.approx(0.6)


def test_tinymetafed_keeps_the_local_layers_initial_values() -> None:
    strategy = TinyMetaFed(rounds=2, alpha=1.0, local=2)  # dense_1
    messages = configure(strategy)
    arrays, _ = strategy.aggregate_train(1, [reply(m, moved(1.0)) for m in messages])
    new = values(arrays)
    assert new["dense_0/weights"].tolist() == [2.0, 3.0]
    assert new["dense_1/weights"].tolist() == START["dense_1/weights"]


def test_first_order_maml_asks_for_what_the_last_samples_changed() -> None:
    config = configure(FOMAML(beta=0.25, steps=6, outer=2, outer_beta=0.5))[0].content.config_records["config"]
    phases, _, update, _ = parse_round_config(config)
    assert [(p.layers, p.steps, p.rate) for p in phases] == [(ALL_LAYERS, 6, 0.25), (ALL_LAYERS, 2, 0.5)]
    assert update is not None and update.since == 1
    with pytest.raises(UserError, match="at least one sample"):
        FOMAML(outer=0)


def test_tinymetafeds_parts_switch_apart() -> None:
    strategy = TinyMetaFed(rounds=4, alpha=0.5, alpha_end=0.5, local=0, density=1.0)
    config = configure(strategy)[0].content.config_records["config"]
    phases, _, update, _ = parse_round_config(config)
    assert len(phases) == 1, "no local part"
    assert update is not None and (update.shared, update.density) == (ALL_LAYERS, 1.0)
    assert {strategy.rate(r) for r in (1, 2, 3, 4)} == {0.5}


class Inbox(Nodes):
    """A grid whose devices answer in the order that the test says, each by moving all parameters by 1."""

    def __init__(self, nodes: list[int], answers: list[int]) -> None:
        super().__init__(nodes)
        self.answers = answers  # the nodes, in the order of their replies
        self.open: dict[str, Message] = {}
        self.given: dict[int, list[float]] = {}  # node -> the first parameter that it was sent, each time

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            ids.append(stamp(message))
            self.open[ids[-1]] = message
            first = next(iter(message.content.array_records.values()))["dense_0/weights"].numpy()[0]
            self.given.setdefault(message.metadata.dst_node_id, []).append(float(first))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for id in message_ids:
            if self.answers and self.open[id].metadata.dst_node_id == abs(self.answers[0]):
                message, who = self.open.pop(id), self.answers.pop(0)
                if who < 0:
                    return [Message(Error(3, "late"), reply_to=message)]
                sent = next(iter(message.content.array_records.values()))
                return [reply(message, {k: (a.numpy() + 1).tolist() for k, a in sent.items()})]
        return []


def test_a_stale_update_counts_less_and_too_old_a_one_not_at_all() -> None:
    """Three devices at once; node 12's first reply comes when the others have made 3 versions."""
    strategy = Asynchronous(Reptile(alpha=3.0, clients=3), exponent=1.0, max_staleness=3)
    grid = Inbox([10, 11, 12], [10, 11, 10, 12])
    firsts: list[float] = []

    def seen(version: int, arrays: ArrayRecord) -> None:
        firsts.append(float(arrays["dense_0/weights"].numpy()[0]))

    result = strategy.start(grid, record(START), num_rounds=4, evaluate_fn=seen)
    ages = [metrics["staleness"] for metrics in result.train_metrics_clientapp.values()]
    assert ages == [0, 1, 1, 3]
    weights = [1.0, 1 / 2, 1 / 2, 1 / 4]
    assert firsts == pytest.approx([1.0 + sum(weights[:n]) for n in range(5)])
    assert grid.given[10] == pytest.approx([1.0, 2.0, 3.0]), "a client that replied works on the newest version"
    strict = Asynchronous(Reptile(alpha=3.0, clients=3), max_staleness=2)
    later = strict.start(Inbox([10, 11, 12], [10, 11, 10, 12, 10]), record(START), num_rounds=4)
    assert [m["staleness"] for m in later.train_metrics_clientapp.values()] == [0, 1, 1, 0], "the one of 3 is left out"


def test_devices_that_only_fail_end_an_asynchronous_run() -> None:
    with pytest.raises(UserError, match="none of the devices gave a usable reply for round 1"):
        Asynchronous(Reptile(clients=2)).start(Inbox([10, 11], [-10, -11]), record(START))
    with pytest.raises(UserError, match="no client is there for round 1"):
        Asynchronous(Reptile(clients=2)).start(Inbox([], []), record(START))
