"""Sparse replies stay sparse from the bytes to the aggregation, and give the same bits as dense ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian
from numpy.typing import NDArray
from test_strategies import Nodes

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, TrainTask, UpdateFormat
from tinyfleet.edge.wire.flower_records import SparseArrayRecord, vector_to_arrays
from tinyfleet.edge.wire.messages import Metrics, Sparse, Success, decode_reply, encode
from tinyfleet.edge.wire.updates import apply_update
from tinyfleet.server.flower.broadcast import SentParameters
from tinyfleet.server.flower.replies import ReplyParts, reply_content
from tinyfleet.server.flower.strategies import FOMAML, Asynchronous, Reptile, TinyMetaFed, TinyReptile
from tinyfleet.server.flower.strategies.reptile import SentArrays

PROGRAM = build([Dense(16), ReLU(), Dense(3)], (20,), "softmax_cross_entropy")
SIZE = PROGRAM.n_params
PHASES = (Phase(ALL_LAYERS, 8, 0.1),)
TASK = TrainTask(1, "train", 1, 1, PROGRAM.model_id, 1, PHASES, 4, UpdateFormat(density=0.2))
METRICS = Metrics(samples=8, loss=0.5, queried=4, correct=3, query_loss=0.25, arena_bytes=PROGRAM.arena_bytes)


def parts_of(random: np.random.Generator, half: bool, parts: int) -> list[Success]:
    """A sparse reply; some changes vanish in float32 beside what was sent, some are 0."""
    successes = []
    for part in range(parts):
        first, end = part * SIZE // parts, (part + 1) * SIZE // parts
        indices = np.sort(random.choice(np.arange(first, end, dtype=np.uint32), 20, replace=False))
        changes = (random.normal(size=20) * random.choice([0, 1e-9, 1e-3, 1.0], 20)).astype(np.float32)
        update = Sparse(indices, changes, half)
        success = decode_reply(encode(Success(1, part, parts, None if part else METRICS, update)))
        assert isinstance(success, Success)
        successes.append(success)
    return successes


def content(sent: ArrayRecord, parts: Sequence[Success]) -> RecordDict:
    reply = ReplyParts()
    for part in parts:
        reply.add(part, encode(part))
    arrays, _ = reply_content(reply, TASK, SentParameters.from_record(sent, PROGRAM), PROGRAM)
    return arrays


def dense_content(sent: ArrayRecord, vector: NDArray[np.float32], parts: Sequence[Success]) -> RecordDict:
    """What a reply would carry if the server made every sparse update dense."""
    (metrics,) = content(sent, parts).metric_records.values()
    return RecordDict(
        {"arrays": vector_to_arrays(apply_update(vector, parts), PROGRAM, sent), "metrics": metrics.copy()}
    )


def replies_to(
    messages: Sequence[Message], vector: NDArray[np.float32], half: bool, parts: int
) -> tuple[list[Message], list[Message]]:
    """The same replies, sparse and dense."""
    sparse, dense = [], []
    for number, message in enumerate(messages):
        (sent,) = message.content.array_records.values()
        successes = parts_of(np.random.default_rng(number), half, parts)
        sparse.append(Message(content(sent, successes), reply_to=message))
        dense.append(Message(dense_content(sent, vector, successes), reply_to=message))
    return sparse, dense


def arrays_of(message: Message) -> SparseArrayRecord:
    (arrays,) = (record for record in message.content.values() if isinstance(record, ArrayRecord))
    assert isinstance(arrays, SparseArrayRecord) and arrays.is_sparse
    return arrays


def data(record: ArrayRecord | None) -> dict[str, bytes]:
    assert record is not None
    return {key: array.data for key, array in record.items()}


def initialization() -> NDArray[np.float32]:
    vector = PROGRAM.initial(1)
    vector[::7] = -0.0
    return vector


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [
        Reptile(alpha=0.7, clients=4),
        TinyReptile(alpha=0.3),
        TinyMetaFed(rounds=5, alpha=0.9, local=2, clients=4),
        FOMAML(alpha=0.5, clients=4),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_our_strategies_aggregate_sparse_replies_to_the_same_bits(strategy: Reptile, half: bool, parts: int) -> None:
    vector = initialization()
    messages = list(
        strategy.configure_train(1, vector_to_arrays(vector, PROGRAM), ConfigRecord(), Nodes([11, 12, 13, 14, 15]))
    )
    sparse, dense = replies_to(messages, vector, half, parts)
    arrays, metrics = strategy.aggregate_train(1, sparse)
    expected, expected_metrics = strategy.aggregate_train(1, dense)
    assert data(arrays) == data(expected)
    assert metrics is not None and expected_metrics is not None and dict(metrics) == dict(expected_metrics)
    assert all("dense" not in vars(arrays_of(reply)) for reply in sparse), "no reply was made dense"


@pytest.mark.parametrize("staleness", [0, 3])
def test_an_asynchronous_update_is_the_same_bits(staleness: int) -> None:
    strategy = Reptile(alpha=0.7, clients=4)
    asynchronous = Asynchronous(strategy)
    vector = initialization()
    sent = vector_to_arrays(vector, PROGRAM)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), Nodes([11])))
    (sparse,), (dense,) = replies_to(messages, vector, True, 1)
    current = SentArrays.from_record(vector_to_arrays(vector + np.float32(0.25), PROGRAM))
    results = []
    for reply in (sparse, dense):
        change = strategy.change(reply, SentArrays.from_record(sent))
        assert change is not None
        results.append(data(asynchronous._updated(current, change, asynchronous.weight(5, staleness)).record))
    assert results[0] == results[1]
    assert "dense" not in vars(arrays_of(sparse))


@pytest.mark.parametrize("kind", [FedAvg, FedMedian])
def test_strategies_of_flower_get_the_dense_arrays(kind: Any) -> None:
    strategy = kind(fraction_evaluate=0.0)
    vector = initialization()
    sender = Reptile(clients=4)
    messages = list(
        sender.configure_train(1, vector_to_arrays(vector, PROGRAM), ConfigRecord(), Nodes([11, 12, 13, 14]))
    )
    sparse, dense = replies_to(messages, vector, False, 2)
    arrays, _ = strategy.aggregate_train(1, sparse)
    expected, _ = strategy.aggregate_train(1, dense)
    assert data(arrays) == data(expected)


def test_arrays_that_were_replaced_count_and_the_sparse_update_no_longer() -> None:
    strategy, vector = Reptile(alpha=1.0, clients=1), initialization()
    messages = list(strategy.configure_train(1, vector_to_arrays(vector, PROGRAM), ConfigRecord(), Nodes([11])))
    (reply,), _ = replies_to(messages, vector, False, 1)
    arrays = arrays_of(reply)
    for key, array in list(arrays.items()):
        arrays[key] = Array(array.numpy() * np.float32(0))
    learned, _ = strategy.aggregate_train(1, [reply])
    assert learned is not None and all((array.numpy() == 0).all() for array in learned.values())


@pytest.mark.parametrize("change", ["order", "dtype"])
def test_parameters_that_are_not_the_vector_as_it_travels_give_dense_replies(change: str) -> None:
    vector = initialization()
    arrays = vector_to_arrays(vector, PROGRAM)
    if change == "order":
        sent = ArrayRecord({key: arrays[key] for key in reversed(list(arrays))})
    else:
        sent = ArrayRecord({key: Array(array.numpy().astype(np.float64)) for key, array in arrays.items()})
    parts = parts_of(np.random.default_rng(0), False, 2)
    received = content(sent, parts)
    (record,) = received.array_records.values()
    assert not isinstance(record, SparseArrayRecord)
    assert data(record) == data(vector_to_arrays(apply_update(vector, parts), PROGRAM, sent))
    assert isinstance(received["metrics"], MetricRecord)
