"""The device node's commands and replies, with the C engine and with a learner in Python."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
from node_fixtures import (
    DATA,
    FLEET,
    HEAD_ONLY,
    ID,
    PROGRAM,
    TOPICS,
    WEIGHTS,
    Make,
    both,
    broadcast,
    deliver,
    dense,
    do,
    expected,
    mote,
    replies,
    serve,
    work,
)

from tinyfleet.edge import versions
from tinyfleet.edge.device.node import Node, Publish, Reboot, Subscribe, Unsubscribe
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import build
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.edge.wire.commands import Reboot as RebootOrder
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Status, Success, decode_status
from tinyfleet.edge.wire.topics import Topics


def test_topics_are_checked_for_names() -> None:
    for name in ("", "a/b", "x" * 33, "+", "ä"):
        with pytest.raises(ProtocolError):
            Topics(name)
    with pytest.raises(ProtocolError):
        Node(FLEET, "a#b", {}, PROGRAM, DatasetStream(DATA))


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
    time, subscribe, td, status = node.poll()
    assert (time, subscribe) == (Subscribe(TOPICS.time), Subscribe(TOPICS.command(ID)))
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
        Subscribe(TOPICS.time),
        Subscribe(TOPICS.command(ID)),
        Subscribe(TOPICS.weights(5, 1)),
    ]


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
def test_a_model_of_which_nothing_trains_is_scored_at_once(make: Make) -> None:
    layer = {"dense_0/weights": np.ones((3, 6), np.float32), "dense_0/bias": np.zeros(3, np.float32)}
    frozen = build([DenseLayer(3)], (6,), "softmax_cross_entropy", trainable=[], weights=layer)
    node = make(frozen)
    outs = do(node, work(kind="evaluate", model=frozen.model_id, phases=(), update=None, vector=WEIGHTS[:0]))
    (done,) = replies([*outs, *deliver(node, [])])
    assert isinstance(done, Success) and done.metrics is not None and done.metrics.queried == 10


@both
def test_a_loss_that_is_not_finite_while_scoring_is_told(make: Make) -> None:
    huge = np.full_like(WEIGHTS, 3e38)
    node, order = make(), work(kind="evaluate", phases=(), update=None, vector=huge)
    do(node, order)
    assert replies(deliver(node, broadcast(order, huge))) == [Failure(7, ErrorCode.DIVERGED)]


@both
def test_a_model_of_one_number_has_no_right_answers_to_count(make: Make) -> None:
    one = build([DenseLayer(1)], (6,), "mse")
    node, order = make(one), work(model=one.model_id, vector=one.initial(1))
    do(node, order)
    (done,) = replies(deliver(node, broadcast(order, one.initial(1))))
    assert isinstance(done, Success) and done.metrics is not None
    assert (done.metrics.queried, done.metrics.correct) == (10, 0) and done.metrics.query_loss > 0
