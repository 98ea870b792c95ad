"""The updates that the node replies with: dense, sparse, clipped, and since a phase."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from node_fixtures import (
    DATA,
    PROGRAM,
    TOPICS,
    WEIGHTS,
    Make,
    both,
    broadcast,
    data_of,
    deliver,
    dense,
    do,
    expected,
    mote,
    node_of,
    replies,
    serve,
    work,
)
from numpy.typing import NDArray

from tinyfleet.edge._mote import lib
from tinyfleet.edge.device.node import NodeCounters, Subscribe
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Sha256, TrainTask, UpdateFormat
from tinyfleet.edge.wire.messages import Dense, ErrorCode, Failure, Sparse, Success
from tinyfleet.edge.wire.updates import apply_update


@both
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("out_bytes", [256, 8192])
def test_dense_replies(make: Make, half: bool, out_bytes: int) -> None:
    """In one part or in many; all layers or only the shared."""
    node = make(out_bytes=out_bytes)
    wanted = expected(work())[0].parameters
    wanted = wanted.astype(np.float16).astype(np.float32) if half else wanted
    done = serve(node, work(update=UpdateFormat(half=half)))
    assert (len(done) > 1) == (out_bytes == 256)
    assert np.array_equal(dense(done), wanted)
    assert done[0].metrics is not None and all(d.metrics is None for d in done[1:])
    shared = serve(node, work(id=8, update=UpdateFormat(shared=1, half=half)))
    assert np.array_equal(dense(shared)[:280], wanted[:280]) and np.isnan(dense(shared)[280:]).all()
    (nothing,) = serve(node, work(id=9, update=UpdateFormat(shared=0, half=half)))
    assert isinstance(nothing.update, Dense) and len(nothing.update.values) == 0


@both
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("out_bytes", [256, 8192])
@pytest.mark.parametrize("density", [0.001, 0.3, 0.999])
def test_sparse_replies(make: Make, half: bool, out_bytes: int, density: float) -> None:
    """Exactly the share asked for, of the largest changes."""
    node = make(out_bytes=out_bytes)
    changes = expected(work())[0].parameters - WEIGHTS
    for id, shared, part in ((7, ALL_LAYERS, slice(0, PROGRAM.n_params)), (8, 2, slice(280, PROGRAM.n_params))):
        own = np.zeros_like(changes)
        own[part] = changes[part]
        k = int(np.ceil(np.float32(density) * np.float32(len(changes[part]))))
        chosen = np.argsort(-np.abs(own), kind="stable")[:k]
        wanted = np.sort(chosen[own[chosen] != 0])
        updates = [d.update for d in serve(node, work(id=id, update=UpdateFormat(shared, half, density)))]
        got = [u for u in updates if isinstance(u, Sparse)]
        assert len(got) == len(updates)
        assert np.array_equal(np.concatenate([u.indices for u in got]), wanted)
        values = own[wanted].astype(np.float16).astype(np.float32) if half else own[wanted]
        assert np.array_equal(np.concatenate([u.changes for u in got]), values)


@both
def test_a_pull_is_fedproxs_step(make: Make) -> None:
    """w - rate * (g + mu * (w - the round's weights)), of the layers that train: the gradient from plain steps."""
    rate, mu = np.float32(0.25), np.float32(1.5)
    order = work(phases=(Phase(2, 3, 0.25), Phase(3, 12, float(rate), float(mu))), query=0)
    learner, stream = MoteLearner(PROGRAM), DatasetStream(DATA)
    learner.set_parameters(WEIGHTS)
    stream.open(order.seed)
    learner.mask = 2
    for _ in range(3):
        learner.learn(*stream.next(False), 0.25)
    learner.mask = 3
    for _ in range(12):
        before = learner.parameters
        learner.learn(*stream.next(False), float(rate))
        learner.set_parameters(learner.parameters - rate * mu * (before - WEIGHTS))
    got = dense(serve(make(), order))
    np.testing.assert_allclose(got, learner.parameters, rtol=1e-5, atol=1e-6)
    free = dense(serve(make(), replace(order, phases=tuple(replace(phase, proximal_mu=0.0) for phase in order.phases))))
    assert np.linalg.norm(got - WEIGHTS) < 0.8 * np.linalg.norm(free - WEIGHTS), (
        "it stays nearer to the round's weights"
    )


@both
@pytest.mark.parametrize("out_bytes", [256, 8192])
def test_changes_since_a_phase(make: Make, out_bytes: int) -> None:
    """What the last phase alone has changed, as first-order MAML asks: dense as changes, and the largest of them."""
    inner, outer = Phase(ALL_LAYERS, 10, 0.1), Phase(ALL_LAYERS, 1, 0.05)
    adapted, learned = (expected(work(phases=phases, query=0))[0].parameters for phases in ((inner,), (inner, outer)))
    node = make(out_bytes=out_bytes)
    done = serve(node, work(phases=(inner, outer), update=UpdateFormat(since=1)))
    assert all(isinstance(d.update, Dense) and d.update.change for d in done)
    assert np.array_equal(dense(done), learned - adapted)
    assert np.array_equal(apply_update(WEIGHTS, done), WEIGHTS + (learned - adapted))
    some = serve(node, work(8, phases=(inner, outer), update=UpdateFormat(since=1, density=0.1)))
    indices = np.concatenate([d.update.indices for d in some if isinstance(d.update, Sparse)])
    changes = np.concatenate([d.update.changes for d in some if isinstance(d.update, Sparse)])
    assert np.array_equal(changes, (learned - adapted)[indices]) and len(indices) == np.ceil(0.1 * PROGRAM.n_params)


@both
def test_an_update_is_clipped_on_the_device(make: Make) -> None:
    """To a norm over what is sent; one that is small enough goes as it is."""
    node, changes = make(), expected(work())[0].parameters - WEIGHTS
    for id, shared, part in ((7, ALL_LAYERS, slice(0, None)), (8, 2, slice(280, None))):
        norm = float(np.linalg.norm(changes[part]))
        clipped = dense(serve(node, work(id, update=UpdateFormat(shared, clip=norm / 4))))[part] - WEIGHTS[part]
        np.testing.assert_allclose(clipped, changes[part] / 4, rtol=1e-3, atol=1e-6)
        assert np.linalg.norm(clipped) <= norm / 4 * (1 + 1e-5)
        whole = dense(serve(node, work(id + 10, update=UpdateFormat(shared, clip=norm * 2))))
        assert np.array_equal(whole[part], expected(work())[0].parameters[part])


@both
def test_an_update_whose_norm_is_no_number_has_diverged(make: Make) -> None:
    """Each of its values is one, so that without a norm to be clipped to it can be sent."""
    large = WEIGHTS * np.float32(-1e13)
    format = UpdateFormat(clip=1.0)
    node, far = make(), work(phases=(Phase(ALL_LAYERS, 1, 1e6),), query=0, update=format, vector=large)
    assert Subscribe(TOPICS.weights(far.run, far.round)) in do(node, far)
    assert replies(deliver(node, broadcast(far, large))) == [Failure(7, ErrorCode.DIVERGED)]
    assert np.isfinite(dense(serve(node, replace(far, id=8, update=UpdateFormat()), large))).all()
    assert np.isfinite(dense(serve(node, work(9, update=UpdateFormat(clip=1.0))))).all()


@both
@pytest.mark.parametrize(
    "fields",
    [
        {"phases": (Phase(3, 5, 0.5, 2.0),)},
        {"phases": (Phase(3, 5, 0.5, -1.0),)},
        {"phases": (Phase(3, 5, 0.5, float("nan")),)},
        {"update": UpdateFormat(since=1)},
        {"update": UpdateFormat(clip=-1.0)},
        {"phases": (Phase(3, 5, 0.1), Phase(3, 5, 0.1, 1.0)), "update": UpdateFormat(since=1)},
    ],
    ids=["all the way", "negative", "not a number", "no such phase", "negative norm", "two bases"],
)
def test_what_makes_no_sense_is_turned_down(make: Make, fields: dict[str, Any]) -> None:
    assert replies(do(make(), work(**fields))) == [Failure(7, ErrorCode.ENGINE, lib.MOTE_ERR_ARGUMENT)]


def test_what_needs_a_copy_of_the_weights_is_turned_down_where_there_is_no_room_for_one() -> None:
    node = mote(sparse=False)
    pulled = (Phase(3, 5, 0.1, 1.0),)
    for id, order in enumerate(
        (
            work(phases=pulled),
            work(phases=pulled, kind="evaluate", update=None),
            work(phases=(Phase(3, 5, 0.1), Phase(3, 1, 0.1)), update=UpdateFormat(since=1)),
            work(update=UpdateFormat(clip=1.0)),
        )
    ):
        assert replies(do(node, replace(order, id=id))) == [Failure(id, ErrorCode.CAPACITY)]
    serve(node, work(9))


@both
def test_equal_changes_are_sent_first_come_first_served(make: Make) -> None:
    """Without a step nothing changes; and among equal changes the count is still exact."""
    node = make()
    (done,) = serve(node, work(phases=(), update=UpdateFormat(density=0.5)))
    assert isinstance(done.update, Sparse) and len(done.update.indices) == 0
    # From weights of 0, all of the first layer's changes are 0, and the output bias's are p - y: two of them equal.
    zeros = np.zeros_like(WEIGHTS)
    order = work(id=8, phases=(Phase(ALL_LAYERS, 1, 0.1),), update=UpdateFormat(shared=2, density=2 / 123))
    (done,) = serve(node, order, zeros)
    changes = expected(order, zeros)[0].parameters
    largest = np.flatnonzero(np.abs(changes) > 0)
    assert len(largest) == 3
    assert isinstance(done.update, Sparse) and len(done.update.indices) == 2
    assert set(done.update.indices) < set(largest)


def test_sparse_replies_need_room_for_the_weights() -> None:
    node = mote(sparse=False)
    assert replies(do(node, work(update=UpdateFormat(density=0.5)))) == [Failure(7, ErrorCode.CAPACITY)]
    assert serve(node, work(update=UpdateFormat()))

    layer = {"dense_0/weights": np.ones((3, 6), np.float32), "dense_0/bias": np.zeros(3, np.float32)}
    frozen = build([DenseLayer(3)], (6,), "softmax_cross_entropy", trainable=[], weights=layer)
    node, order = mote(frozen, sparse=False), work(model=frozen.model_id, update=UpdateFormat(density=0.5))
    assert replies(do(node, order)) == [Failure(7, ErrorCode.CAPACITY)], "not even of no weights"


@both
@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_malformed(make: Make, density: float) -> None:
    node = make()
    assert do(node, work(update=UpdateFormat(density=density))) == []
    assert node.counters == NodeCounters(1, 0, 0, 0)


@both
@pytest.mark.parametrize(
    ("vector", "order"),
    [
        (np.full_like(WEIGHTS, np.nan), work()),
        (WEIGHTS * np.float32(1e13), work(phases=(Phase(ALL_LAYERS, 30, 1e6),))),
        (WEIGHTS, work(phases=(Phase(ALL_LAYERS, 1, 1e6),), query=0, update=UpdateFormat(half=True))),
        (WEIGHTS, work(phases=(Phase(ALL_LAYERS, 1, 1e6),), query=0, update=UpdateFormat(half=True, density=0.5))),
    ],
)
def test_what_is_not_finite_is_not_sent(make: Make, vector: NDArray[np.float32], order: TrainTask) -> None:
    node, order = make(), replace(order, weights=Sha256.of(data_of(vector)))
    do(node, order)
    assert replies(deliver(node, broadcast(order, vector))) == [Failure(7, ErrorCode.DIVERGED)]
    assert serve(node, work(id=8)), "and the node goes on"


def test_a_node_without_room_for_a_copy_of_the_weights_turns_sparse_replies_down() -> None:
    code, node, _keep = node_of(base_count=PROGRAM.n_params - 1)
    assert code == lib.MOTE_OK
    c = mote()
    c._node = node  # type: ignore[attr-defined]
    assert replies(do(c, work(update=UpdateFormat(density=0.5)))) == [Failure(7, ErrorCode.CAPACITY)]
    assert serve(c, work(id=8, update=UpdateFormat()))


@both
def test_layers_apart_are_shared_in_parts(make: Make) -> None:
    """Two layers, with one between them that stays."""
    deep = build([DenseLayer(4), ReLU(), DenseLayer(5), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
    node, vector = make(deep), deep.initial(2)
    order = work(model=deep.model_id, phases=(), update=UpdateFormat(shared=0b101), vector=vector)
    do(node, order)
    parts = [did.update for did in replies(deliver(node, broadcast(order, vector))) if isinstance(did, Success)]
    got = [(part.offset, part.values.tolist()) for part in parts if isinstance(part, Dense)]
    assert got == [(0, vector[:28].tolist()), (53, vector[53:].tolist())]


@both
def test_a_share_that_is_a_whole_number_is_sent_exactly(make: Make) -> None:
    (done,) = serve(make(), work(update=UpdateFormat(shared=1, density=0.25)))
    assert isinstance(done.update, Sparse) and len(done.update.indices) == 70
