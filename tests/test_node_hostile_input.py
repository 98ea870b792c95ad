"""The node under lost, doubled, reordered, cut and random messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from node_fixtures import (
    HEAD_ONLY,
    ID,
    PROGRAM,
    TOPICS,
    WEIGHTS,
    Make,
    both,
    broadcast,
    callbacks,
    carried,
    command,
    deliver,
    do,
    mote,
    replies,
    update,
    work,
)

from tinyfleet.edge.device.node import Node, NodeCounters
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import ALL_LAYERS, Action, Manifest, Phase, TrainTask, UpdateFormat, UpdateModel
from tinyfleet.edge.wire.commands import Reboot as RebootOrder
from tinyfleet.edge.wire.messages import ErrorCode, Failure


@both
@pytest.mark.parametrize("rate", [float("inf"), float("nan"), -0.1, 1e7])
def test_a_rate_that_is_none_is_refused_by_the_engine(make: Make, rate: float) -> None:
    node, order = make(), work(phases=(Phase(ALL_LAYERS, 1, rate),))
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [Failure(7, ErrorCode.ENGINE, -1)]


@both
@given(payload=st.binary(max_size=80), data=st.data())
@settings(max_examples=150, deadline=None)
def test_anything_else_is_counted_and_dropped(make: Make, payload: bytes, data: st.DataObject) -> None:
    """Random bytes, and cut messages, on every topic."""
    node = make()
    valid = command(node, work())
    payload = data.draw(st.one_of(st.just(payload), st.integers(1, len(valid) - 1).map(lambda n: valid[:n]))) or b"\0"
    node.receive(TOPICS.command(ID), payload)
    assert list(node.poll()) == [] and node.counters.malformed == 1
    do(node, work())
    for number in ("0", "00", "1", "-1", "4294967296", "99999", "+", ""):
        node.receive(TOPICS.weights(5, 1, number), payload)
    node.receive(data.draw(st.text(max_size=40)), payload)
    assert list(node.poll()) == [] and node.counters == NodeCounters(9, 1, 0, 0)
    assert len(replies(deliver(node, broadcast(work())))) == 1


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
    node.receive(TOPICS.command(ID), command(node, work()) + b"\0")
    node.receive(TOPICS.command(ID), b"")  # cleared
    assert node.counters.malformed == 1 and list(node.poll()) == []


# ------------------------------------------------------------------------------------- the two nodes, side by side

ORDERS: list[Action] = [
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
    update(7, HEAD_ONLY, version=2),
    update(8, PROGRAM, version=3),
    UpdateModel(9, Manifest(b"12345678" + bytes(24), len(HEAD_ONLY.data), 9, 100, 6, 3)),
    RebootOrder(10),
]
# What the broker keeps for each order, and so delivers to every new subscriber.
RETAINED: list[list[tuple[str, bytes]]] = [
    [*broadcast(order), *(broadcast(order, HEAD_ONLY.initial(1)) if order.round == 3 else [])]
    if isinstance(order, TrainTask)
    else carried(HEAD_ONLY)
    if isinstance(order, UpdateModel) and order.manifest.model == HEAD_ONLY.model_id
    else carried(PROGRAM)
    if isinstance(order, UpdateModel) and order.manifest.model == PROGRAM.model_id
    else [(TOPICS.program(b"12345678", i), payload) for i, payload in enumerate(chunks(HEAD_ONLY.data))]
    for order in ORDERS
]
CHUNKS = [m for kept in RETAINED for m in kept]
CHUNKS += [
    (TOPICS.weights(5, 1, 0), b""),
    (TOPICS.command("two"), b"\x84"),
    (TOPICS.weights(5, 1, 0), b"\x80"),
]

actions = st.one_of(
    st.tuples(st.just("again"), st.integers(0, len(ORDERS) - 1)),
    st.integers(0, len(CHUNKS) - 1),
    st.tuples(st.just("serve"), st.integers(0, len(ORDERS) - 1), st.randoms(use_true_random=False), st.booleans()),
    st.tuples(st.just("cut"), st.integers(0, len(ORDERS) - 1), st.integers(1, 20)),
    st.tuples(st.just("step"), st.sampled_from([1, 12, 1000])),
    st.just("connected"),
)


def act(nodes: list[Node], action: Any) -> None:
    messages: list[tuple[str, bytes]] = []
    steps = 0
    match action:
        case int():
            messages = [CHUNKS[action]]
        case ("again", int(i)):
            messages = [(TOPICS.command(ID), command(nodes[0], ORDERS[i]))]
        case ("serve", int(i), random, lossy):  # a whole order, its chunks in any order, perhaps one of them lost
            kept = random.sample(RETAINED[i], len(RETAINED[i]) - lossy)
            messages, steps = [(TOPICS.command(ID), command(nodes[0], ORDERS[i])), *kept], 1000
        case ("cut", int(i), int(cut)):
            messages = [(TOPICS.command(ID), command(nodes[0], ORDERS[i])[:-cut])]
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
