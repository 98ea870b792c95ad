"""The device node, with the C engine and with a learner in Python, whatever the network does to the messages."""

from __future__ import annotations

import pathlib
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyfleet.edge import versions
from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.node import (
    Node,
    NodeCounters,
    Out,
    Publish,
    Reboot,
    Subscribe,
    Unsubscribe,
)
from tinyfleet.edge.device.sources import DatasetStream, Sample
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import (
    ALL_LAYERS,
    Command,
    Dense,
    ErrorCode,
    Failure,
    Phase,
    Reply,
    Sparse,
    Status,
    Success,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    decode_reply,
    decode_status,
    encode,
)
from tinyfleet.edge.wire.messages import Reboot as RebootOrder
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.edge.wire.updates import apply_update

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


def test_topics_are_checked_for_names() -> None:
    for name in ("", "a/b", "x" * 33, "+", "ä"):
        with pytest.raises(ProtocolError):
            Topics(name)
    with pytest.raises(ProtocolError):
        Node(FLEET, "a#b", {}, PROGRAM, DatasetStream(DATA))


def test_a_device_with_too_little_memory_or_other_samples_says_so() -> None:
    with pytest.raises(UserError, match=f"needs {PROGRAM.arena_bytes} bytes"):
        mote(arena_bytes=PROGRAM.arena_bytes - 4)
    with pytest.raises(UserError, match="6 features"):
        mote(build([DenseLayer(3)], (7,), "softmax_cross_entropy"))


def test_the_versions_are_the_headers() -> None:
    mote = pathlib.Path(__file__).parents[1] / "edge" / "mote"
    assert f'#define MOTE_VERSION "{versions.ENGINE_VERSION}"' in (mote / "include" / "mote.h").read_text()
    format = f"enum {{ MOTE_FORMAT_VERSION = {versions.PROGRAM_FORMAT} }};"
    assert format in (mote / "src" / "engine" / "mote_internal.h").read_text()
    cddl = mote.parent / "wire" / "protocol.cddl"
    assert f"wire: {versions.WIRE_VERSION}," in cddl.read_text()


@both
def test_a_new_session_is_announced(make: Make) -> None:
    node = make()
    assert list(node.poll()) == []
    node.connected()
    subscribe, td, status = node.poll()
    assert subscribe == Subscribe(TOPICS.command(ID))
    assert td == Publish(TOPICS.td(ID), b'{"title": "one"}', True)
    assert isinstance(status, Publish) and status.retain and status.topic == TOPICS.status(ID)
    assert decode_status(status.payload).online and decode_status(status.payload).model == PROGRAM.model_id
    will = node.will()
    assert will.topic == TOPICS.status(ID) and will.retain and not decode_status(will.payload).online


@both
def test_training_gives_the_engines_numbers(make: Make) -> None:
    order = work(phases=(Phase(2, 15, 0.2), Phase(ALL_LAYERS, 25, 0.05)))
    (done,) = serve(make(), order)
    learner, loss, query_loss, correct = expected(order)
    assert np.array_equal(dense([done]), learner.parameters)
    m = done.metrics
    assert m is not None and (m.samples, m.queried, m.correct) == (40, 10, correct)
    assert (m.loss, m.query_loss, m.arena_bytes) == (float(loss), float(query_loss), PROGRAM.arena_bytes)


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
    node, far = make(), work(phases=(Phase(ALL_LAYERS, 1, 1e6),), query=0, update=UpdateFormat(clip=1.0))
    large = WEIGHTS * np.float32(-1e13)
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


@both
def test_an_evaluation_sends_no_update(make: Make) -> None:
    (done,) = serve(make(), work(kind="evaluate", update=UpdateFormat()))
    assert done.update is None and done.metrics is not None and done.metrics.queried == 10


@both
def test_a_lost_chunk_is_asked_for_by_a_repeated_order(make: Make) -> None:
    node, order = make(), work()
    messages = broadcast(order)
    do(node, order)
    assert replies(deliver(node, messages[1:])) == []
    assert do(node, order) == [Subscribe(TOPICS.weights(5, 1))]
    outs = deliver(node, messages)
    assert np.array_equal(dense(replies(outs)), expected(order)[0].parameters)  # type: ignore[arg-type]
    assert Unsubscribe(TOPICS.weights(5, 1)) in outs
    assert node.counters.malformed == 0


@both
def test_a_repeated_order_that_is_done_is_answered_again(make: Make) -> None:
    node = make(out_bytes=256)
    do(node, work())
    first = [o for o in deliver(node, broadcast(work())) if isinstance(o, Publish) and not o.retain]
    again = [o for o in do(node, work()) if isinstance(o, Publish)]
    assert len(first) > 1 and again == first
    assert node.counters.samples == 20, "it is not learned from twice"


@both
def test_a_repeated_order_under_way_is_ignored(make: Make) -> None:
    node = make()
    do(node, work())
    for topic, payload in broadcast(work()):
        node.receive(topic, payload)
    assert node.step() and do(node, work()) == [Unsubscribe(TOPICS.weights(5, 1))]
    assert len(replies(deliver(node, []))) == 1
    assert node.counters.stale == 1


@both
def test_a_newer_order_replaces_the_older(make: Make) -> None:
    node, old, new = make(), work(round=1), work(id=8, round=2)
    do(node, old)
    deliver(node, broadcast(old)[:1])
    assert do(node, new) == [Unsubscribe(TOPICS.weights(5, 1)), Subscribe(TOPICS.weights(5, 2))]
    assert replies(deliver(node, broadcast(old))) == []
    assert do(node, old) == [], "it comes too late"
    (done,) = replies(deliver(node, broadcast(new)))
    assert isinstance(done, Success) and done.id == 8
    assert do(node, work(id=9, round=1)) == [], "a round that is over"
    assert node.counters.stale == len(broadcast(old)) + 2


@both
def test_another_order_of_the_same_round_loads_the_weights_anew(make: Make) -> None:
    node = make()
    serve(node, work())
    assert np.array_equal(dense(serve(node, work(id=8))), expected(work())[0].parameters)


@both
def test_another_run_may_begin_with_round_1(make: Make) -> None:
    node = make()
    serve(node, work(round=9))
    assert serve(node, work(id=8, run=6, round=1))


@both
def test_orders_that_cannot_be_done_are_turned_down(make: Make) -> None:
    node = make()
    do(node, work())
    assert replies(do(node, work(id=8, model=bytes(8)))) == [Failure(8, ErrorCode.WRONG_MODEL)]
    frozen = replies(do(make(HEAD_ONLY), work(model=HEAD_ONLY.model_id, phases=(Phase(2, 1, 0.1),))))
    assert frozen == [Failure(7, ErrorCode.ENGINE, -5)]
    assert len(replies(deliver(node, broadcast(work())))) == 1, "and the one in hand goes on"


def test_sparse_replies_need_room_for_the_weights() -> None:
    node = mote(sparse=False)
    assert replies(do(node, work(update=UpdateFormat(density=0.5)))) == [Failure(7, ErrorCode.CAPACITY)]
    assert serve(node, work(update=UpdateFormat()))

    layer = {"dense_0/weights": np.ones((3, 6), np.float32), "dense_0/bias": np.zeros(3, np.float32)}
    frozen = build([DenseLayer(3)], (6,), "softmax_cross_entropy", trainable=[], weights=layer)
    node, order = mote(frozen, sparse=False), work(model=frozen.model_id, update=UpdateFormat(density=0.5))
    assert replies(do(node, order)) == [Failure(7, ErrorCode.CAPACITY)], "not even of no weights"


@both
def test_samples_that_are_no_targets_of_the_model_are_not_learned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ClientData, "check_compatible", lambda self, program: None
    )  # a device's own source is not checked
    regression = build([DenseLayer(3)], (6,), "mse")
    node, order = make(regression), work(model=regression.model_id)
    do(node, order)
    (failed,) = replies(deliver(node, broadcast(order, regression.initial(0))))
    assert isinstance(failed, Failure) and failed.error is ErrorCode.ENGINE
    assert node.counters.samples == 0


@both
@pytest.mark.parametrize("density", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_that_is_none_is_malformed(make: Make, density: float) -> None:
    node = make()
    assert do(node, work(update=UpdateFormat(density=density))) == []
    assert node.counters == NodeCounters(1, 0, 0)


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
    node = make()
    do(node, order)
    assert replies(deliver(node, broadcast(order, vector))) == [Failure(7, ErrorCode.DIVERGED)]
    assert serve(node, work(id=8)), "and the node goes on"


@both
@pytest.mark.parametrize("rate", [float("inf"), float("nan"), -0.1, 1e7])
def test_a_rate_that_is_none_is_refused_by_the_engine(make: Make, rate: float) -> None:
    node, order = make(), work(phases=(Phase(ALL_LAYERS, 1, rate),))
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [Failure(7, ErrorCode.ENGINE, -1)]


@both
def test_a_program_is_adopted_over_the_air(make: Make) -> None:
    node = make()
    adopt = UpdateModel(3, HEAD_ONLY.model_id, len(HEAD_ONLY.data), zlib.crc32(HEAD_ONLY.data))
    assert do(node, adopt) == [Subscribe(TOPICS.program(HEAD_ONLY.model_id))]
    outs = deliver(node, carried(HEAD_ONLY))
    assert Unsubscribe(TOPICS.program(HEAD_ONLY.model_id)) in outs
    (done,) = replies(outs)
    assert isinstance(done, Success) and done.id == 3 and done.metrics is None and done.update is None
    (status,) = [decode_status(o.payload) for o in outs if isinstance(o, Publish) and o.topic == TOPICS.status(ID)]
    assert status.model == HEAD_ONLY.model_id == node.model
    assert replies(do(node, adopt)) != [], "a repeated order is answered again"
    assert replies(do(node, work())) == [Failure(7, ErrorCode.WRONG_MODEL)]
    order = work(id=8, model=HEAD_ONLY.model_id)
    do(node, order)
    (learned,) = replies(deliver(node, broadcast(order, HEAD_ONLY.initial(0))))
    assert isinstance(learned, Success) and isinstance(learned.update, Dense) and len(learned.update.values) == 123
    back = UpdateModel(4, PROGRAM.model_id, len(PROGRAM.data), zlib.crc32(PROGRAM.data))
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
    ("program", "crc", "error", "detail"),
    [
        (HEAD_ONLY.data, 1, ErrorCode.PROGRAM, -3),  # not the bytes that were promised
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
    make: Make, program: bytes, crc: int | None, error: ErrorCode, detail: int
) -> None:
    node = make(model_slot_bytes=1500)
    model = b"12345678"
    adopt = UpdateModel(3, model, len(program), zlib.crc32(program) if crc is None else crc)
    outs = do(node, adopt)
    outs += deliver(node, [(TOPICS.program(model, i), payload) for i, payload in enumerate(chunks(program))])
    assert replies(outs) == [Failure(3, error, detail)]
    assert node.model == PROGRAM.model_id
    assert np.array_equal(dense(serve(node, work())), expected(work())[0].parameters)


@both
@pytest.mark.parametrize("program", [int8_input(), NO_LOSS], ids=["int8", "no loss"])
def test_a_program_that_fleets_cannot_exchange_is_refused_at_the_start(make: Make, program: Program) -> None:
    with pytest.raises(UserError, match=r"float32 input, a loss|ends in softmax"):
        make(program=program)


@both
def test_a_reboot_is_answered_first(make: Make) -> None:
    outs = do(make(), RebootOrder(4))
    assert [did.id for did in replies(outs)] == [4] and outs[-1] == Reboot()


@both
def test_a_new_session_subscribes_to_what_is_missing(make: Make) -> None:
    node = make()
    do(node, work())
    node.connected()
    assert [o for o in node.poll() if isinstance(o, Subscribe)] == [
        Subscribe(TOPICS.command(ID)),
        Subscribe(TOPICS.weights(5, 1)),
    ]


@both
@given(payload=st.binary(max_size=80), data=st.data())
@settings(max_examples=150, deadline=None)
def test_anything_else_is_counted_and_dropped(make: Make, payload: bytes, data: st.DataObject) -> None:
    """Random bytes, and cut messages, on every topic."""
    node = make()
    valid = encode(work())
    payload = data.draw(st.one_of(st.just(payload), st.integers(0, len(valid) - 1).map(lambda n: valid[:n])))
    node.receive(TOPICS.command(ID), payload)
    assert list(node.poll()) == [] and node.counters.malformed == 1
    do(node, work())
    for number in ("0", "00", "1", "-1", "4294967296", "99999", "+", ""):
        node.receive(TOPICS.weights(5, 1, number), payload or b"\0")
    node.receive(data.draw(st.text(max_size=40)), payload)
    assert list(node.poll()) == [] and node.counters == NodeCounters(9, 1, 0)
    assert len(replies(deliver(node, broadcast(work())))) == 1


def node_of(**changes: Any) -> tuple[int, Any, Any]:
    """What mote_node_init says to a good configuration with these fields changed; the node; what it needs alive."""
    good = mote()
    config = ffi.new("mote_node_config_t *", good._node.config)  # type: ignore[attr-defined]
    for name, value in changes.items():
        setattr(config, name, value)
    node = ffi.new("mote_node_t *")
    return int(lib.mote_node_init(node, config)), node, (good, config)


@pytest.mark.parametrize(
    "changes",
    [{name: ffi.NULL} for name in ("fleet", "id", "td", "sample", "out", "program", "base")]
    + [{"out_size": 255}, {"out_size": (1 << 20) + 1}, {"sample_count": 6}]
    + [{"source": {"open": ffi.NULL}}, {"source": {"next": ffi.NULL}}],
    ids=lambda changes: " ".join(f"{name}" for name in changes),
)
def test_a_configuration_that_lacks_something_is_refused(changes: dict[str, Any]) -> None:
    assert node_of()[0] == lib.MOTE_OK
    if "source" in changes:
        source = ffi.new("mote_source_t *", mote()._node.config.source)  # type: ignore[attr-defined]
        for name, value in changes["source"].items():
            setattr(source, name, value)
        changes = {"source": source[0]}
    assert node_of(**changes)[0] == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_node_init(ffi.NULL, ffi.NULL) == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_node_init(ffi.new("mote_node_t *"), ffi.NULL) == lib.MOTE_ERR_ARGUMENT


def test_names_are_letters_digits_dots_lines_and_dashes() -> None:
    def starts(name: bytes) -> bool:
        fleet = ffi.new("char[]", name)
        return node_of(fleet=fleet)[0] == lib.MOTE_OK

    good = b"ABCXYZabcxyz0123456789._-"
    for byte in range(1, 256):
        if byte not in good:
            assert starts(bytes([byte])) == (chr(byte).isalnum() and byte < 128), byte
    assert all(starts(bytes([byte])) for byte in good)
    assert starts(b"x" * 32) and not starts(b"x" * 33) and not starts(b"")


def test_a_node_without_room_for_a_copy_of_the_weights_turns_sparse_replies_down() -> None:
    code, node, _keep = node_of(base_count=PROGRAM.n_params - 1)
    assert code == lib.MOTE_OK
    c = mote()
    c._node = node  # type: ignore[attr-defined]
    assert replies(do(c, work(update=UpdateFormat(density=0.5)))) == [Failure(7, ErrorCode.CAPACITY)]
    assert serve(c, work(id=8, update=UpdateFormat()))


def test_a_source_that_does_not_open_and_one_that_has_nothing_yet() -> None:
    node = mote()
    source = node._node.config.source  # type: ignore[attr-defined]
    opens, gives = source.open, source.next
    ready = False

    @ffi.callback("int(void *, uint32_t)")  # type: ignore[untyped-decorator]
    def fails(_context: Any, _seed: int) -> int:
        return -77

    @ffi.callback("int(void *, int, float *, float *)")  # type: ignore[untyped-decorator]
    def waits(context: Any, query: int, x: Any, y: Any) -> int:
        return int(gives(context, query, x, y)) if ready else 0

    source.open = fails
    do(node, work())
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.SAMPLES, -77)]
    source.open, source.next = opens, waits
    do(node, work(id=8))
    assert replies(deliver(node, broadcast(work()))) == [], "it waits for a sample to learn from"
    assert not node.step()
    ready = True
    for _ in range(20):
        assert node.step()
    ready = False
    assert not node.step(), "it waits for a sample to be scored by"
    ready = True
    (done,) = replies(deliver(node, []))
    assert isinstance(done, Success) and np.array_equal(dense([done]), expected(work())[0].parameters)


class Broken(MoteLearner):
    """Fails in one of its methods, with this error."""

    at = ""
    error: Exception = LearnerError("broken", -42)

    def fail(self, at: str) -> None:
        if at == self.at:
            raise self.error

    def set_parameters(self, vector: Any) -> None:
        self.fail("set")
        super().set_parameters(vector)

    @property
    def parameters(self) -> NDArray[np.float32]:
        self.fail("get")
        return super().parameters

    def learn(self, x: Any, y: Any, rate: float) -> float:
        self.fail("learn")
        return super().learn(x, y, rate)

    def loss(self, x: Any, y: Any) -> float:
        self.fail("score")
        return super().loss(x, y)


@pytest.mark.parametrize("at", ["set", "get", "learn", "score"])
@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (LearnerError("broken", -42), Failure(7, ErrorCode.ENGINE, -42)),
        (LearnerError("diverged", lib.MOTE_ERR_DIVERGED), Failure(7, ErrorCode.DIVERGED)),
        (LearnerError("no code"), Failure(7, ErrorCode.ENGINE, lib.MOTE_ERR_ARGUMENT)),
    ],
)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_learner_that_fails_is_told(
    at: str, error: Exception, reply: Failure, mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "error", error)
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    order = work(phases=(Phase(3, 2, 0.1), Phase(3, 2, 0.1, mu)))
    monkeypatch.setattr(Broken, "at", at)
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [reply]
    monkeypatch.setattr(Broken, "at", "")
    assert serve(node, replace(order, id=8)), "and the node goes on"


def test_a_learner_may_fail_between_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "at", "get")
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    order = work(phases=(Phase(3, 2, 0.1), Phase(3, 2, 0.1)), update=UpdateFormat(since=1))
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [Failure(7, ErrorCode.ENGINE, -42)]


def test_a_bug_in_a_learner_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "error", ZeroDivisionError("a bug"))
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    monkeypatch.setattr(Broken, "at", "learn")
    do(node, work())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        deliver(node, broadcast(work()))


def test_a_learner_that_can_not_be_made_is_told_at_the_start() -> None:
    def missing(_: Program) -> MoteLearner:
        raise LearnerError("cannot read the model 'x.tflite'")

    with pytest.raises(LearnerError, match="cannot read the model"):
        Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=missing)


def test_a_learner_that_loads_nothing_takes_no_program_over_the_air() -> None:
    node = callbacks()
    node._node.config.learner.load = ffi.NULL
    update = UpdateModel(3, HEAD_ONLY.model_id, len(HEAD_ONLY.data), zlib.crc32(HEAD_ONLY.data))
    assert replies(do(node, update)) == [Failure(3, ErrorCode.CAPACITY)]
    assert np.array_equal(dense(serve(node, work())), expected(work())[0].parameters)


@pytest.mark.parametrize("name", ["set", "get", "score"])
def test_a_learner_has_all_its_callbacks_or_none(name: str) -> None:
    learner = ffi.new("mote_learner_t *", callbacks()._node.config.learner)
    setattr(learner, name, ffi.NULL)
    assert node_of(learner=learner[0])[0] == lib.MOTE_ERR_ARGUMENT


@pytest.mark.parametrize(("features", "target"), [(5, 0.0), (6, np.zeros(2))])
def test_a_sample_of_another_size_is_not_learned(features: int, target: Any) -> None:
    class Odd(PythonStream):
        def next(self, query: bool) -> Sample:
            return np.zeros(features, np.float32), target

    node = Node(FLEET, ID, {}, PROGRAM, Odd())
    do(node, work())
    (failed,) = replies(deliver(node, broadcast(work())))
    assert isinstance(failed, Failure) and failed.error is ErrorCode.ENGINE and node.counters.samples == 0


def test_a_stream_in_python_may_not_open_and_may_have_nothing_yet() -> None:
    class Slow(PythonStream):
        ready = False

        def open(self, seed: int) -> None:
            if seed == 1:
                raise ValueError("no sensor")
            super().open(seed)

        def next(self, query: bool) -> Sample | None:  # type: ignore[override]
            return super().next(query) if self.ready else None

    stream = Slow()
    node = Node(FLEET, ID, {}, PROGRAM, stream)
    do(node, work(seed=1))
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.SAMPLES, lib.MOTE_ERR_ARGUMENT)]
    do(node, work(id=8))
    assert replies(deliver(node, broadcast(work()))) == [] and not node.step()
    stream.ready = True
    assert np.array_equal(
        dense([d for d in replies(deliver(node, [])) if isinstance(d, Success)]), expected(work())[0].parameters
    )


def statuses(node: Node) -> list[Status]:
    return [decode_status(o.payload) for o in node.poll() if isinstance(o, Publish) and o.topic == TOPICS.status(ID)]


def test_drift_is_reported_when_it_begins_and_ends() -> None:
    node = mote()
    node.connected()
    (first,) = statuses(node)
    assert first.drift is None and first.battery is None
    node.set_drift(0.0)
    node.set_battery(0.75)
    assert statuses(node) == []
    node.set_drift(1.0)
    assert [(status.drift, status.battery) for status in statuses(node)] == [(1.0, 0.75)]
    node.set_drift(0.5)
    assert statuses(node) == []
    node.set_drift(0.0)
    assert [status.drift for status in statuses(node)] == [0.0]
    node.set_drift(-1.0)
    assert decode_status(node.will().payload).drift is None


@both
def test_a_chunk_that_does_not_fit_is_malformed(make: Make) -> None:
    node, order = make(), work()
    first, second = chunks(WEIGHTS.astype("<f4").tobytes())
    other = list(chunks(bytes(3 * 1024)))
    for number, payload in (
        (1, first),  # another's offset
        (2, other[2]),  # behind the end
        (1, other[1]),  # more than is left
        (0, next(chunks(bytes(1000)))),  # less than a chunk
        (0, first[:-1] + bytes([first[-1] ^ 1])),  # not what the checksum says
        (0, first + b"\0"),
        (0, first[:-1]),
        ("x", first),
        (":", first),
        ("00", first),
        ("99999", first),
        ("1024", first),
    ):
        before = node.counters.malformed
        do(node, order)
        node.receive(TOPICS.weights(5, 1, number), payload)
        assert node.counters.malformed == before + 1
    do(node, order)
    assert replies(deliver(node, [(TOPICS.weights(5, 1, 0), first), (TOPICS.weights(5, 1, 1), second)]))


@both
def test_an_order_with_something_behind_it_is_malformed(make: Make) -> None:
    node = make()
    node.receive(TOPICS.command(ID), encode(work()) + b"\0")
    node.receive(TOPICS.command(ID), b"")
    assert node.counters.malformed == 2 and list(node.poll()) == []


@both
def test_numbers_of_a_round_may_be_long(make: Make) -> None:
    order = work(run=2**32 - 1, round=1234567890)
    (done,) = serve(make(), order)
    assert np.array_equal(dense([done]), expected(order)[0].parameters)


@both
def test_without_queries_or_steps_the_mean_losses_are_0(make: Make) -> None:
    node = make()
    (done,) = serve(node, work(query=0))
    assert done.metrics is not None and done.metrics.query_loss == 0.0 < done.metrics.loss
    (done,) = serve(node, work(id=8, phases=()))
    assert done.metrics is not None and done.metrics.loss == 0.0 < done.metrics.query_loss


@both
def test_layers_apart_are_shared_in_parts(make: Make) -> None:
    """Two layers, with one between them that stays."""
    deep = build([DenseLayer(4), ReLU(), DenseLayer(5), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
    node, vector = make(deep), deep.initial(2)
    order = work(model=deep.model_id, phases=(), update=UpdateFormat(shared=0b101))
    do(node, order)
    parts = [did.update for did in replies(deliver(node, broadcast(order, vector))) if isinstance(did, Success)]
    got = [(part.offset, part.values.tolist()) for part in parts if isinstance(part, Dense)]
    assert got == [(0, vector[:28].tolist()), (53, vector[53:].tolist())]


@both
def test_a_share_that_is_a_whole_number_is_sent_exactly(make: Make) -> None:
    (done,) = serve(make(), work(update=UpdateFormat(shared=1, density=0.25)))
    assert isinstance(done.update, Sparse) and len(done.update.indices) == 70


@both
def test_a_model_of_which_nothing_trains_is_scored_at_once(make: Make) -> None:
    layer = {"dense_0/weights": np.ones((3, 6), np.float32), "dense_0/bias": np.zeros(3, np.float32)}
    frozen = build([DenseLayer(3)], (6,), "softmax_cross_entropy", trainable=[], weights=layer)
    node = make(frozen)
    outs = do(node, work(kind="evaluate", model=frozen.model_id, phases=(), update=None))
    (done,) = replies([*outs, *deliver(node, [])])
    assert isinstance(done, Success) and done.metrics is not None and done.metrics.queried == 10


@both
def test_a_loss_that_is_not_finite_while_scoring_is_told(make: Make) -> None:
    node, order = make(), work(kind="evaluate", phases=(), update=None)
    do(node, order)
    huge = np.full_like(WEIGHTS, 3e38)
    assert replies(deliver(node, broadcast(order, huge))) == [Failure(7, ErrorCode.DIVERGED)]


@both
def test_a_model_of_one_number_has_no_right_answers_to_count(make: Make) -> None:
    one = build([DenseLayer(1)], (6,), "mse")
    node, order = make(one), work(model=one.model_id)
    do(node, order)
    (done,) = replies(deliver(node, broadcast(order, one.initial(1))))
    assert isinstance(done, Success) and done.metrics is not None
    assert (done.metrics.queried, done.metrics.correct) == (10, 0) and done.metrics.query_loss > 0


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
        return replies(do(node, UpdateModel(3, b"12345678", size, 0)))

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


# ------------------------------------------------------------------------------------- the two nodes, side by side

ORDERS: list[Command] = [
    work(1, 1),
    work(2, 1, phases=(Phase(2, 3, 0.1), Phase(3, 4, 0.2)), update=UpdateFormat(half=True, density=0.1)),
    work(3, 2, update=UpdateFormat(shared=1, density=0.9), query=3),
    work(4, 3, kind="evaluate", update=None),
    work(5, 3, model=HEAD_ONLY.model_id),
    work(6, 4, phases=(Phase(3, 9, float("inf")),)),
    work(11, 4, phases=(Phase(2, 3, 0.1), Phase(3, 4, 0.2, 2.0)), update=UpdateFormat(shared=2, half=True)),
    work(12, 5, phases=(Phase(3, 5, 0.1), Phase(3, 0, 0.1), Phase(3, 2, 0.1)), update=UpdateFormat(since=2, clip=0.01)),
    work(13, 6, phases=(Phase(3, 5, 0.1), Phase(1, 2, 0.1)), update=UpdateFormat(density=0.2, since=1, half=True)),
    work(14, 6, update=UpdateFormat(shared=1, clip=0.05, half=True)),
    work(17, 6, phases=(Phase(3, 1, 1e6),), query=0, update=UpdateFormat(clip=1.0)),
    work(15, 7, phases=(Phase(3, 5, 0.5, 2.0),)),
    work(16, 7, update=UpdateFormat(since=1)),
    UpdateModel(7, HEAD_ONLY.model_id, len(HEAD_ONLY.data), zlib.crc32(HEAD_ONLY.data)),
    UpdateModel(8, PROGRAM.model_id, len(PROGRAM.data), zlib.crc32(PROGRAM.data)),
    UpdateModel(9, b"12345678", len(HEAD_ONLY.data), 5),
    RebootOrder(10),
]
# What the broker keeps for each order, and so delivers to every new subscriber.
RETAINED: list[list[tuple[str, bytes]]] = [
    [*broadcast(order), *(broadcast(order, HEAD_ONLY.initial(1)) if order.round == 3 else [])]
    if isinstance(order, TrainTask)
    else carried(HEAD_ONLY)
    if isinstance(order, UpdateModel) and order.model == HEAD_ONLY.model_id
    else carried(PROGRAM)
    if isinstance(order, UpdateModel) and order.model == PROGRAM.model_id
    else [(TOPICS.program(b"12345678", i), payload) for i, payload in enumerate(chunks(HEAD_ONLY.data))]
    for order in ORDERS
]
MESSAGES = [(TOPICS.command(ID), encode(order)) for order in ORDERS] + [m for kept in RETAINED for m in kept]
MESSAGES += [
    (TOPICS.weights(5, 1, 0), b""),
    (TOPICS.command("two"), encode(work())),
    (TOPICS.weights(5, 1, 0), b"\x80"),
]

actions = st.one_of(
    st.integers(0, len(ORDERS) - 1),
    st.integers(0, len(MESSAGES) - 1),
    st.tuples(st.just("serve"), st.integers(0, len(ORDERS) - 1), st.randoms(use_true_random=False), st.booleans()),
    st.tuples(st.just("cut"), st.integers(0, len(MESSAGES) - 1), st.integers(1, 20)),
    st.tuples(st.just("step"), st.sampled_from([1, 12, 1000])),
    st.just("connected"),
)


def act(nodes: list[Node], action: Any) -> None:
    messages: list[tuple[str, bytes]] = []
    steps = 0
    match action:
        case int():
            messages = [MESSAGES[action]]
        case ("serve", int(i), random, lossy):  # a whole order, its chunks in any order, perhaps one of them lost
            kept = random.sample(RETAINED[i], len(RETAINED[i]) - lossy)
            messages, steps = [MESSAGES[i], *kept], 1000
        case ("cut", int(i), int(cut)):
            messages = [(MESSAGES[i][0], MESSAGES[i][1][:-cut])]
        case ("step", int(count)):
            steps = count
    for node in nodes:
        for topic, payload in messages:
            node.receive(topic, payload)
        if action == "connected":
            node.connected()
        for _ in range(steps):
            if not node.step():
                break


@given(st.lists(actions, max_size=40))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_learners_agree_to_the_bit(history: list[Any]) -> None:
    """Messages lost, doubled, reordered and cut, with sessions that break: the same answers, and the same counts."""
    nodes = [mote(out_bytes=300), callbacks(out_bytes=300)]
    for action in history:
        act(nodes, action)
        said = [(list(node.poll()), node.counters, node.model, node.will()) for node in nodes]
        assert said[0] == said[1], action
