"""How far devices that collude can move FedAvg and TinyMetaFed: the formulas of docs/explanation/robustness.md."""

import math

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg, Strategy
from numpy.typing import NDArray
from test_strategies import Nodes

from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.tasks import MAX_NORM_RATIO
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, TrainTask, UpdateFormat
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.messages import Dense, Metrics, Sparse, Success
from tinyfleet.server.flower.broadcast import SentParameters
from tinyfleet.server.flower.replies import ReplyError, ReplyParts, reply_content
from tinyfleet.server.flower.reply_bounds import NormBound
from tinyfleet.server.flower.strategies import TinyMetaFed

Vector = NDArray[np.float64]

PROGRAM = build([DenseLayer(16), ReLU(), DenseLayer(3)], (20,), "softmax_cross_entropy")
SIZE, STEPS, DEVICES, DENSITY = PROGRAM.n_params, 16, 8, 0.25
LARGEST = math.ceil(DENSITY * SIZE)
START = PROGRAM.initial(1)


def largest(vector: Vector) -> Vector:
    """The vector, but 0 where it is not among its LARGEST largest."""
    kept = np.zeros_like(vector)
    at = np.argsort(-np.abs(vector), kind="stable")[:LARGEST]
    kept[at] = vector[at]
    return kept


def honest_changes(count: int, sparse: bool) -> list[Vector]:
    random = np.random.default_rng(5)
    common = random.normal(size=SIZE)
    changes = [0.01 * (1 + 0.2 * i) * (common + random.normal(size=SIZE)) for i in range(count)]
    return [largest(change) if sparse else change for change in changes]


def longest(honest: list[Vector], colluders: int) -> float:
    """The longest change that colluders can send: the ratio times the median, with theirs above it."""
    norms = [float(np.linalg.norm(change)) for change in honest] + [math.inf] * colluders
    return MAX_NORM_RATIO * float(np.median(norms))


def reply(message: Message, change: Vector, sparse: bool, samples: int) -> Message:
    """A device's reply, as the grid makes it from the wire's."""
    (sent,) = message.content.array_records.values()
    values = change.astype(np.float32)
    at = np.flatnonzero(values).astype(np.uint32)
    update = Sparse(at, values[at]) if sparse else Dense(0, values, change=True)
    task = TrainTask(
        1, "train", 1, 1, PROGRAM.model_id, 1, (Phase(ALL_LAYERS, STEPS, 0.1),), 0,
        UpdateFormat(density=DENSITY if sparse else 1.0),
    )  # fmt: skip
    parts = ReplyParts()
    parts.add(Success(1, 0, 1, Metrics(samples, 0.5, 0, 0, 0.0, 1000), update), b"")
    content, norm = reply_content(parts, task, SentParameters.from_record(sent, PROGRAM), PROGRAM)
    assert norm == pytest.approx(np.linalg.norm(change), rel=1e-4)
    return Message(content, reply_to=message)


def learned(strategy: Strategy, changes: list[Vector], sparse: bool, samples: list[int]) -> Vector:
    """The change that the strategy makes of those that the bounds let through."""
    norms = {str(i): float(np.linalg.norm(change)) for i, change in enumerate(changes)}
    assert NormBound().too_long(norms) == {}, "all are within the bounds"
    nodes = Nodes(list(range(100, 100 + len(changes))))
    sent: ArrayRecord = vector_to_arrays(START, PROGRAM)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), nodes))
    assert len(messages) == len(changes)
    replies = [reply(m, c, sparse, n) for m, c, n in zip(messages, changes, samples, strict=True)]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays_to_vector(arrays, PROGRAM).astype(np.float64) - START


@pytest.mark.parametrize("colluders", [1, 2, 3])
@pytest.mark.parametrize("honest_samples", [STEPS, STEPS // 4])
def test_fedavg_is_moved_exactly_as_far_as_the_formula_says(colluders: int, honest_samples: int) -> None:
    honest = honest_changes(DEVICES - colluders, sparse=False)
    mean = np.mean(honest, axis=0)
    away = -longest(honest, colluders) * 0.9999 * mean / np.linalg.norm(mean)
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=0, min_available_nodes=0)
    samples = [honest_samples] * len(honest) + [STEPS] * colluders
    moved = learned(strategy, honest + [away] * colluders, sparse=False, samples=samples) - mean
    share = colluders * STEPS / sum(samples)
    formula = share * (longest(honest, colluders) + np.linalg.norm(mean))
    assert np.linalg.norm(moved) == pytest.approx(formula, rel=1e-3)
    assert np.linalg.norm(moved) <= formula * (1 + 1e-6)


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_tinymetafed_is_moved_exactly_as_far_as_the_formula_says(colluders: int) -> None:
    honest = honest_changes(DEVICES - colluders, sparse=True)
    mean, length = np.mean(honest, axis=0), longest(honest, colluders)
    kept = float(np.linalg.norm(largest(mean)))
    away = -0.9999 * length * largest(mean) / kept
    strategy = TinyMetaFed(rounds=10, alpha=0.7, density=DENSITY, clients=DEVICES)
    moved = learned(strategy, honest + [away] * colluders, sparse=True, samples=[STEPS] * DEVICES)
    difference = np.linalg.norm(moved - 0.7 * mean)
    formula = 0.7 * colluders / DEVICES * math.sqrt(length**2 + float(mean @ mean) + 2 * length * kept)
    assert difference == pytest.approx(formula, rel=1e-3)
    assert difference <= formula * (1 + 1e-6)


@pytest.mark.parametrize("direction", range(10))
def test_no_direction_moves_them_farther(direction: int) -> None:
    honest = honest_changes(DEVICES - 2, sparse=True)
    mean, length = np.mean(honest, axis=0), longest(honest, 2)
    ideas = np.random.default_rng(direction).normal(size=(2, SIZE))
    away = [0.9999 * length * largest(idea) / np.linalg.norm(largest(idea)) for idea in ideas]
    strategy = TinyMetaFed(rounds=10, alpha=1.0, density=DENSITY, clients=DEVICES)
    moved = np.linalg.norm(learned(strategy, honest + away, True, [STEPS] * DEVICES) - mean)
    kept = float(np.linalg.norm(largest(mean)))
    assert moved <= 2 / DEVICES * math.sqrt(length**2 + float(mean @ mean) + 2 * length * kept)


@pytest.mark.parametrize("colluders", [1, 2, 3])
def test_beyond_the_bounds_colluders_count_for_nothing(colluders: int) -> None:
    honest = honest_changes(DEVICES - colluders, sparse=False)
    norms = {f"honest {i}": float(np.linalg.norm(change)) for i, change in enumerate(honest)}
    lies = {f"colluder {i}": 1.001 * longest(honest, colluders) for i in range(colluders)}
    assert set(NormBound().too_long({**norms, **lies})) == set(lies)


def test_a_sample_count_weighs_at_most_what_was_asked_for() -> None:
    (message,) = TinyMetaFed(rounds=1, clients=1).configure_train(
        1, vector_to_arrays(START, PROGRAM), ConfigRecord(), Nodes([1])
    )
    with pytest.raises(ReplyError, match="learned from 17 samples; it was asked for 16"):
        reply(message, np.ones(SIZE), False, STEPS + 1)


def test_the_rates_of_a_whole_annealed_run_add_up_as_the_formula_says() -> None:
    strategy = TinyMetaFed(rounds=40, alpha=0.8, alpha_end=0.2)
    total = sum(strategy.rate(number) for number in range(1, 41))
    assert total == pytest.approx(40 * (0.8 + 0.2) / 2 + (0.8 - 0.2) / 2)


def test_few_replies_and_changing_lengths() -> None:
    bound = NormBound(5.0)
    assert bound.too_long({"a": 1.0, "b": 1e9}) == {}, "of two replies nobody can tell which is wrong"
    assert set(bound.too_long({"c": 2.0, "b": 1e9})) == {"b"}, "of three devices, over two rounds"
    for _ in range(100):  # one device that replies more often than others counts once
        assert set(bound.too_long({"b": 1e9})) == {"b"}
    for device in "defgh":  # all of them begin to learn faster
        bound.too_long({device: 50.0})
    assert bound.too_long({"a": 50.0}) == {}
