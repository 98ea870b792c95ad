"""What the tests of the node share: two nodes that must agree, train commands, and what the engine alone computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.node import Node, Out, Publish, Subscribe
from tinyfleet.edge.device.sources import DatasetStream, Sample
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.messages import (
    ALL_LAYERS,
    Dense,
    Phase,
    Reply,
    Success,
    TrainTask,
    UpdateFormat,
    decode_reply,
    encode,
)
from tinyfleet.edge.wire.topics import Topics

FLEET, ID = "home", "one"
TOPICS = Topics(FLEET)
PROGRAM = build([DenseLayer(40), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
HEAD_ONLY = build(
    [DenseLayer(40), ReLU(), DenseLayer(3)],
    (6,),
    "softmax_cross_entropy",
    trainable=[1],
    weights={"dense_0/weights": np.ones((40, 6), np.float32), "dense_0/bias": np.zeros(40, np.float32)},
)
WEIGHTS = PROGRAM.initial(3)


def samples() -> ClientData:
    random = np.random.default_rng(0)
    return ClientData.of([random.integers(0, 255, (12, 6), np.uint8) for _ in range(5)], 1 / 255, 3)


DATA = samples()
Make = Callable[..., Node]


class PythonStream:
    """The same samples, from Python."""

    def __init__(self) -> None:
        self._stream = DatasetStream(DATA)

    def open(self, seed: int) -> None:
        self._stream.open(seed)

    def next(self, query: bool) -> Sample:
        return self._stream.next(query)


def mote(program: Program = PROGRAM, **options: Any) -> Node:
    return Node(FLEET, ID, {"title": ID}, program, DatasetStream(DATA), **options)


def callbacks(program: Program = PROGRAM, **options: Any) -> Node:
    """With the C node's source and learner in Python; the same engine, so that the numbers are the same."""
    return Node(FLEET, ID, {"title": ID}, program, PythonStream(), learner=MoteLearner, **options)


both = pytest.mark.parametrize("make", [mote, callbacks])


def work(id: int = 7, round: int = 1, **fields: Any) -> TrainTask:
    defaults: dict[str, Any] = {
        "kind": "train",
        "run": 5,
        "model": PROGRAM.model_id,
        "seed": 11,
        "phases": (Phase(ALL_LAYERS, 20, 0.1),),
        "query": 10,
        "update": UpdateFormat(),
    }
    return TrainTask(id=id, round=round, **(defaults | fields))


def broadcast(order: TrainTask, vector: NDArray[np.float32] = WEIGHTS) -> list[tuple[str, bytes]]:
    """The round's retained messages."""
    payloads = chunks(vector.astype("<f4").tobytes())
    return [(TOPICS.weights(order.run, order.round, i), payload) for i, payload in enumerate(payloads)]


def carried(program: Program) -> list[tuple[str, bytes]]:
    return [(TOPICS.program(program.model_id, i), payload) for i, payload in enumerate(chunks(program.data))]


def do(node: Node, order: Any) -> list[Out]:
    node.receive(TOPICS.command(ID), encode(order))
    return list(node.poll())


def deliver(node: Node, messages: Iterable[tuple[str, bytes]]) -> list[Out]:
    """Hands the messages over and lets the node work until it rests."""
    outs: list[Out] = []
    for topic, payload in messages:
        node.receive(topic, payload)
        outs += node.poll()
    while node.step():
        outs += node.poll()
    return outs + list(node.poll())


def replies(outs: Iterable[Out]) -> list[Reply]:
    return [decode_reply(o.payload) for o in outs if isinstance(o, Publish) and o.topic == TOPICS.reply(ID)]


def serve(node: Node, order: TrainTask, vector: NDArray[np.float32] = WEIGHTS) -> list[Success]:
    """The replies to an order on a network that loses nothing."""
    assert Subscribe(TOPICS.weights(order.run, order.round)) in do(node, order)
    done = [did for did in replies(deliver(node, broadcast(order, vector))) if isinstance(did, Success)]
    assert [d.part for d in done] == list(range(len(done))) and {d.parts for d in done} == {len(done)}
    return done


def expected(
    order: TrainTask, vector: NDArray[np.float32] = WEIGHTS
) -> tuple[MoteLearner, np.float32, np.float32, int]:
    """The learner after the order's phases; the mean loss; the queries' mean loss, and how many were right."""
    learner = MoteLearner(PROGRAM)
    learner.set_parameters(vector)
    stream = DatasetStream(DATA)
    stream.open(order.seed)
    loss = query_loss = np.float32(0)
    correct = 0
    for phase in order.phases:
        learner.mask = 3 if phase.layers == ALL_LAYERS else phase.layers
        for _ in range(phase.steps):
            loss += np.float32(learner.learn(*stream.next(False), phase.rate))
    for _ in range(order.query):
        x, y = stream.next(True)
        query_loss += np.float32(learner.loss(x, y))
        correct += int(np.argmax(learner.infer(x))) == y
    steps = sum(phase.steps for phase in order.phases)
    return learner, loss / np.float32(max(steps, 1)), query_loss / np.float32(max(order.query, 1)), correct


def dense(done: Iterable[Success]) -> NDArray[np.float32]:
    """The vector that a dense reply's parts give, NaN where they give nothing."""
    vector = np.full(PROGRAM.n_params, np.nan, np.float32)
    for d in done:
        assert isinstance(d.update, Dense)
        vector[d.update.offset : d.update.offset + len(d.update.values)] = d.update.values
    return vector


def node_of(**changes: Any) -> tuple[int, Any, Any]:
    """What mote_node_init says to a good configuration with these fields changed; the node; what it needs alive."""
    good = mote()
    config = ffi.new("mote_node_config_t *", good._node.config)  # type: ignore[attr-defined]
    for name, value in changes.items():
        setattr(config, name, value)
    node = ffi.new("mote_node_t *")
    return int(lib.mote_node_init(node, config)), node, (good, config)
