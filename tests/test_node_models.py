"""The models that the node takes over the air, and those that it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import small_models
from node_fixtures import (
    HEAD_ONLY,
    ID,
    PROGRAM,
    TOPICS,
    Make,
    both,
    broadcast,
    callbacks,
    carried,
    deliver,
    dense,
    do,
    expected,
    replies,
    serve,
    update,
    work,
)

from tinyfleet.edge._mote import ffi
from tinyfleet.edge.device.node import Node, Publish, Subscribe, Unsubscribe
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import build
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import Manifest, Sha256, UpdateModel
from tinyfleet.edge.wire.messages import Dense, ErrorCode, Failure, Reply, Success, decode_status


@both
def test_a_program_is_adopted_over_the_air(make: Make) -> None:
    node = make()
    adopt = update(3, HEAD_ONLY)
    assert do(node, adopt) == [Subscribe(TOPICS.program(HEAD_ONLY.model_id))]
    outs = deliver(node, carried(HEAD_ONLY))
    assert Unsubscribe(TOPICS.program(HEAD_ONLY.model_id)) in outs
    (done,) = replies(outs)
    assert isinstance(done, Success) and done.id == 3 and done.metrics is None and done.update is None
    (status,) = [decode_status(o.payload) for o in outs if isinstance(o, Publish) and o.topic == TOPICS.status(ID)]
    assert status.model == HEAD_ONLY.model_id == node.model
    assert replies(do(node, adopt)) != [], "a repeated order is answered again"
    assert replies(do(node, work())) == [Failure(7, ErrorCode.WRONG_MODEL)]
    order = work(id=8, model=HEAD_ONLY.model_id, vector=HEAD_ONLY.initial(0))
    do(node, order)
    (learned,) = replies(deliver(node, broadcast(order, HEAD_ONLY.initial(0))))
    assert isinstance(learned, Success) and isinstance(learned.update, Dense) and len(learned.update.values) == 123
    back = update(4, PROGRAM, version=2)
    do(node, back)
    deliver(node, carried(PROGRAM))
    assert node.model == PROGRAM.model_id and serve(node, work(id=9))


OTHER_SIZE = build([DenseLayer(3)], (5,), "softmax_cross_entropy")
OTHER_TARGETS = build([DenseLayer(3)], (6,), "mse")
NO_LOSS = build([DenseLayer(3)], (6,), None, weights={"dense_0/weights": np.ones((3, 6)), "dense_0/bias": np.ones(3)})


def int8_input() -> Program:
    """A program that takes six int8 numbers."""
    tensors = (Tensor((1, 1, 6), "int8", 0.1), Tensor((1, 1, 6)), Tensor((1, 1, 3)))
    head = Op(Kind.DENSE, "head", (1,), 2, weights=np.ones((3, 6), np.float32), trains="all")
    return assemble(Graph(tensors, (Op(Kind.DEQUANTIZE, "in", (0,), 1), head), 2, "softmax_cross_entropy"))


@both
@pytest.mark.parametrize(
    ("program", "hash", "error", "detail"),
    [
        (HEAD_ONLY.data, bytes(32), ErrorCode.PROGRAM, -9),  # not the bytes that were promised
        (b"MOTE" + bytes(200), None, ErrorCode.PROGRAM, -2),  # no program
        (OTHER_SIZE.data, None, ErrorCode.PROGRAM, -1),  # takes other samples than this device has
        (OTHER_TARGETS.data, None, ErrorCode.PROGRAM, -1),
        (int8_input().data, None, ErrorCode.PROGRAM, -8),  # what a fleet does not exchange
        (small_models.int8_weights().data, None, ErrorCode.PROGRAM, -8),
        (NO_LOSS.data, None, ErrorCode.PROGRAM, -8),
        (bytes(2000), None, ErrorCode.CAPACITY, 0),  # too large
    ],
)
def test_a_program_that_does_not_fit_leaves_the_builtin_one(
    make: Make, program: bytes, hash: bytes | None, error: ErrorCode, detail: int
) -> None:
    node = make(model_slot_bytes=1500)
    manifest = Manifest(Sha256.of(program).digest if hash is None else hash, len(program), 1, 100, 6, 3)
    model = manifest.model
    outs = do(node, UpdateModel(3, manifest))
    outs += deliver(node, [(TOPICS.program(model, i), payload) for i, payload in enumerate(chunks(program))])
    assert replies(outs) == [Failure(3, error, detail)]
    assert node.model == PROGRAM.model_id
    assert np.array_equal(dense(serve(node, work())), expected(work())[0].parameters)


@both
@pytest.mark.parametrize("program", [int8_input(), NO_LOSS], ids=["int8", "no loss"])
def test_a_program_that_fleets_cannot_exchange_is_refused_at_the_start(make: Make, program: Program) -> None:
    with pytest.raises(UserError, match=r"float32 input, a loss|ends in softmax"):
        make(program=program)


def test_a_learner_that_loads_nothing_takes_no_program_over_the_air() -> None:
    node = callbacks()
    node._node.config.learner.load = ffi.NULL
    order = update(3, HEAD_ONLY)
    assert replies(do(node, order)) == [Failure(3, ErrorCode.CAPACITY)]
    assert np.array_equal(dense(serve(node, work())), expected(work())[0].parameters)


@both
def test_a_model_larger_than_the_wire_is_turned_down(make: Make) -> None:
    large = build([DenseLayer(40_000), DenseLayer(3)], (6,), "softmax_cross_entropy")
    assert large.n_params * 4 > 1 << 20
    node = make(large, arena_bytes=4 << 20)
    order = work(model=large.model_id)
    assert replies(do(node, order)) == [Failure(7, ErrorCode.CAPACITY)]


@both
def test_a_program_that_can_not_be_taken_is_turned_down(make: Make) -> None:
    def adopt(node: Node, size: int) -> list[Reply]:
        return replies(do(node, UpdateModel(3, Manifest(b"12345678" + bytes(24), size, 1, 100, 6, 3))))

    assert adopt(make(model_slot_bytes=0), 100) == [Failure(3, ErrorCode.CAPACITY)]
    assert adopt(make(model_slot_bytes=100), 101) == [Failure(3, ErrorCode.CAPACITY)]
    assert adopt(make(model_slot_bytes=2 << 20), (1 << 20) + 1) == [Failure(3, ErrorCode.CAPACITY)]
    assert adopt(make(), 0) == [Failure(3, ErrorCode.CAPACITY)]
    node = make()
    assert adopt(node, 100) == []
    assert do(node, work()) == [Unsubscribe(TOPICS.program(b"12345678")), Subscribe(TOPICS.weights(5, 1))]
    node = make()
    assert adopt(node, 100) == []
    node.connected()
    assert Subscribe(TOPICS.program(b"12345678")) in list(node.poll())
