"""What the tests of the node share: two nodes that must agree, train commands, and what the engine alone computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

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
from tinyfleet.edge.wire.commands import (
    ALL_LAYERS,
    Action,
    Manifest,
    Phase,
    Sha256,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    encode_action,
    encode_command,
)  # fmt: skip
from tinyfleet.edge.wire.messages import Dense, Reply, Success, decode_reply
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
NOW = 1_800_000_000_000
"""What time it is for the nodes here, Unix time in milliseconds."""


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
    return Node(FLEET, ID, {"title": ID}, program, DatasetStream(DATA), **{"clock": lambda: NOW} | options)


def callbacks(program: Program = PROGRAM, **options: Any) -> Node:
    """With the C node's source and learner in Python; the same engine, so that the numbers are the same."""
    options = {"clock": lambda: NOW, "learner": MoteLearner} | options
    return Node(FLEET, ID, {"title": ID}, program, PythonStream(), **options)


both = pytest.mark.parametrize("make", [mote, callbacks])


def data_of(vector: NDArray[np.float32]) -> bytes:
    return vector.astype("<f4").tobytes()


def work(id: int = 7, round: int = 1, *, vector: NDArray[np.float32] = WEIGHTS, **fields: Any) -> TrainTask:
    defaults: dict[str, Any] = {
        "kind": "train",
        "run": 5,
        "model": PROGRAM.model_id,
        "seed": 11,
        "phases": (Phase(ALL_LAYERS, 20, 0.1),),
        "query": 10,
        "update": UpdateFormat(),
        "weights": Sha256.of(data_of(vector)),
    }
    return TrainTask(id=id, round=round, **(defaults | fields))


def broadcast(order: TrainTask, vector: NDArray[np.float32] = WEIGHTS) -> list[tuple[str, bytes]]:
    """The round's retained messages."""
    payloads = chunks(data_of(vector))
    return [(TOPICS.weights(order.run, order.round, i), payload) for i, payload in enumerate(payloads)]


def carried(program: Program) -> list[tuple[str, bytes]]:
    return [(TOPICS.program(program.model_id, i), payload) for i, payload in enumerate(chunks(program.data))]


def update(id: int, program: Program, version: int = 1, **changes: Any) -> UpdateModel:
    """The command to run this program."""
    inputs, outputs = int(np.prod(program.input_shape)), int(np.prod(program.output_shape))
    hash = Sha256.of(program.data).digest
    manifest = Manifest(hash, len(program.data), version, program.arena_bytes, inputs, outputs)
    return UpdateModel(id, replace(manifest, **changes))


_sent: WeakKeyDictionary[Node, dict[Action, bytes]] = WeakKeyDictionary()


def command(node: Node, action: Action) -> bytes:
    """The command for this node: a new one the first time, the same bytes again after that."""
    sent = _sent.setdefault(node, {})
    if action not in sent:
        clock = node._callbacks.clock
        now = NOW if clock is None else clock()
        sent[action] = encode_command(now + 1000 + len(sent), now + 60_000, None, encode_action(action))
    return sent[action]


def do(node: Node, action: Action) -> list[Out]:
    node.receive(TOPICS.command(ID), command(node, action))
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
    order = replace(order, weights=Sha256.of(data_of(vector)))
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
