"""Models over the air, two slots: tried, confirmed or rolled back, and what a device comes back with after a reset."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from command_fixtures import MemoryStore, device, said, sealed, send, status
from node_fixtures import (
    DATA,
    HEAD_ONLY,
    NOW,
    PROGRAM,
    TOPICS,
    carried,
    data_of,
    deliver,
    replies,
    update,
    work,
)

from tinyfleet.edge._mote import ffi
from tinyfleet.edge.device.node import Node
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.commands import Action, Forget, Phase
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Reply, Success, Trial

THIRD = build([DenseLayer(8), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")


class Server:
    """Numbers the commands to a node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.counter = max(NOW, status(node).ceiling)

    def says(self, action: Action, chunks: Sequence[tuple[str, bytes]] = ()) -> list[Reply]:
        self.counter += 1
        outs = send(self.node, sealed(action, self.counter))
        return said(outs) + replies(deliver(self.node, chunks))

    def deploys(self, program: Program, version: int, **manifest: Any) -> Reply:
        (reply,) = self.says(update(version, program, version, **manifest), carried(program))
        return reply

    def trains(self, program: Program, steps: int = 5, rate: float = 0.1) -> Reply:
        order = work(
            id=77,
            model=program.model_id,
            phases=(Phase(0xFFFFFFFF, steps, rate),),
            weights=data_of(program.initial(3)),
            round=self.counter & 0xFFFF,
            query=0,
        )
        (reply,) = self.says(order)
        return reply


def test_a_program_is_confirmed_and_survives_a_reset() -> None:
    store = MemoryStore()
    node = device(store=store)
    assert status(node).trial is Trial.BUILT_IN
    assert isinstance(Server(node).deploys(HEAD_ONLY, 5), Success)
    assert node.model == HEAD_ONLY.model_id and status(node).trial is Trial.CONFIRMED
    node = device(store=store)
    assert node.model == HEAD_ONLY.model_id and status(node).trial is Trial.CONFIRMED
    assert isinstance(Server(node).trains(HEAD_ONLY), Failure) is False
    assert Server(device()).node.model == PROGRAM.model_id, "without a store it begins with what it was built with"


def test_a_program_no_newer_than_one_before_is_refused() -> None:
    store = MemoryStore()
    node = device(store=store)
    assert isinstance(Server(node).deploys(HEAD_ONLY, 5), Success)
    for version in (1, 5):
        (reply,) = Server(node).says(update(8, THIRD, version))
        assert reply == Failure(8, ErrorCode.DOWNGRADE)
    node = device(store=store)
    (reply,) = Server(node).says(update(8, THIRD, 5))
    assert reply == Failure(8, ErrorCode.DOWNGRADE) and node.model == HEAD_ONLY.model_id
    assert isinstance(Server(node).deploys(THIRD, 6), Success)


def test_a_program_that_does_worse_on_its_test_never_runs() -> None:
    node = device()
    assert Server(node).deploys(THIRD, 5, tested=10, max_loss=0.001) == Failure(5, ErrorCode.FAILED_TRIAL)
    assert node.model == PROGRAM.model_id and status(node).trial is Trial.ROLLED_BACK
    assert isinstance(Server(node).trains(PROGRAM), Success)
    assert isinstance(Server(node).deploys(THIRD, 5, tested=10, max_loss=9.0), Success), "its version was not used up"
    assert status(node).trial is Trial.CONFIRMED


def test_a_new_command_during_the_test_leaves_the_old_program() -> None:
    node = device()
    server = Server(node)
    send(node, sealed(update(3, THIRD, 5, tested=1000), NOW + 1))
    for topic, payload in carried(THIRD):
        node.receive(topic, payload)
    assert node.step() and node.model == PROGRAM.model_id
    server.counter = NOW + 1
    assert isinstance(server.trains(PROGRAM), Success)


@pytest.mark.parametrize("good", [True, False])
def test_probation_confirms_or_rolls_back(good: bool) -> None:
    store = MemoryStore()
    node = device(store=store)
    server = Server(node)
    assert isinstance(server.deploys(HEAD_ONLY, 4), Success)
    assert isinstance(server.deploys(THIRD, 5, probation=8, max_loss=9.0 if good else 0.001), Success)
    assert status(node).trial is Trial.ON_TRIAL and node.model == THIRD.model_id
    assert device(store=store).model == HEAD_ONLY.model_id, "a reset takes back what is not confirmed"
    assert isinstance(server.trains(THIRD, 7), Success) and status(node).trial is Trial.ON_TRIAL
    reply = server.trains(THIRD, 7)
    if good:
        assert isinstance(reply, Success) and status(node).trial is Trial.CONFIRMED
    else:
        assert reply == Failure(77, ErrorCode.FAILED_TRIAL) and status(node).trial is Trial.ROLLED_BACK
    running = THIRD if good else HEAD_ONLY
    assert node.model == running.model_id == device(store=store).model
    assert isinstance(server.trains(running), Success)
    assert isinstance(server.deploys(PROGRAM, 6), Success)


def test_a_learner_of_its_own_counts_for_probation() -> None:
    node = device()
    Server(node).deploys(THIRD, 5, probation=3, max_loss=0.5)
    assert node.observe(0.1) and node.observe(0.1) and status(node).trial is Trial.ON_TRIAL
    assert node.observe(0.1) and status(node).trial is Trial.CONFIRMED and node.observe(99.0)
    Server(node).deploys(HEAD_ONLY, 6, probation=3, max_loss=0.5)
    assert node.observe(0.1) and not node.observe(float("nan"))
    assert status(node).trial is Trial.ROLLED_BACK and node.model == THIRD.model_id


def test_a_deployment_during_probation_begins_from_what_is_confirmed() -> None:
    node = device()
    server = Server(node)
    server.deploys(HEAD_ONLY, 4)
    server.deploys(THIRD, 5, probation=100)
    assert server.deploys(THIRD, 6, tested=5, max_loss=0.0001).id == 6, "it runs already"
    other = build([DenseLayer(9), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
    assert server.deploys(other, 7, tested=5, max_loss=0.0001) == Failure(7, ErrorCode.FAILED_TRIAL)
    assert node.model == HEAD_ONLY.model_id


def test_a_device_with_one_slot_goes_back_to_the_builtin_program() -> None:
    node = device()
    node._node.config.model_slot[1] = ffi.NULL
    server = Server(node)
    assert isinstance(server.deploys(HEAD_ONLY, 4), Success)
    assert server.deploys(THIRD, 5, tested=5, max_loss=0.0001) == Failure(5, ErrorCode.FAILED_TRIAL)
    assert node.model == PROGRAM.model_id and isinstance(server.trains(PROGRAM), Success)


MANIFESTS = {
    "another program's hash": {"hash": THIRD.data[:32]},
    "fewer bytes": {"size": len(HEAD_ONLY.data) - 1},
    "more inputs": {"inputs": 7},
    "more outputs": {"outputs": 4},
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_program_that_is_not_its_manifests_is_refused(change: str) -> None:
    node = device()
    order = update(3, HEAD_ONLY, 5, **MANIFESTS[change])
    payloads = [payload for _, payload in carried(HEAD_ONLY)]
    chunks = [(TOPICS.program(order.manifest.model, i), payload) for i, payload in enumerate(payloads)]
    got = Server(node).says(order, chunks)
    assert all(isinstance(reply, Failure) and reply.error is ErrorCode.PROGRAM for reply in got)
    assert node.model == PROGRAM.model_id and isinstance(Server(node).deploys(HEAD_ONLY, 6), Success)


def test_what_a_manifest_cannot_ask_for_is_refused() -> None:
    node = device()
    for change, error in (
        ({"arena": 1 << 30}, ErrorCode.CAPACITY),
        ({"size": 1 << 24}, ErrorCode.CAPACITY),
        ({"max_loss": float("nan")}, ErrorCode.ENGINE),
        ({"max_loss": -1.0}, ErrorCode.ENGINE),
    ):
        (reply,) = Server(node).says(update(3, HEAD_ONLY, 5, **change))
        assert isinstance(reply, Failure) and reply.error is error


class CutStore(MemoryStore):
    """A store whose power is cut after so many writes: what is written after that is lost, and the device starts."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def set(self, key: int, data: bytes) -> None:
        if self.left <= 0:
            raise OSError("no power")
        self.left -= 1
        super().set(key, data)


def test_a_cut_at_every_write_of_an_update_leaves_the_old_or_the_new_program() -> None:
    """And never the higher version with the old program (an update that is cut, then taken again)."""
    before = CutStore(1000)
    Server(device(store=before)).deploys(HEAD_ONLY, 4)
    ends = set()
    for left in range(12):
        store = copy.deepcopy(before)
        store.left = left
        node = device(store=store)
        server = Server(node)
        server.says(update(5, THIRD, 5), carried(THIRD))
        done = store.left > 0
        store.left = 1000
        node = device(store=store)
        ends.add(node.model)
        assert node.model in (HEAD_ONLY.model_id, THIRD.model_id) and status(node).trial is Trial.CONFIRMED
        assert not done or node.model == THIRD.model_id
        (reply,) = Server(node).says(update(6, THIRD, 5), carried(THIRD))
        assert isinstance(reply, Success) and node.model == THIRD.model_id, "the same version again"
        (reply,) = Server(node).says(update(7, HEAD_ONLY, 4))
        assert reply == Failure(7, ErrorCode.DOWNGRADE)
    assert ends == {HEAD_ONLY.model_id, THIRD.model_id}


def test_a_damaged_kept_program_leaves_the_builtin_one() -> None:
    store = MemoryStore()
    Server(device(store=store)).deploys(HEAD_ONLY, 4)
    for key, data in list(store.records.items()):
        for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], b"x"):
            other = copy.deepcopy(store)
            other.records[key] = damaged
            node = device(store=other)
            assert node.model in (PROGRAM.model_id, HEAD_ONLY.model_id)
            assert isinstance(Server(node).deploys(THIRD, 2**31), Success)


def test_weights_are_kept_after_so_many_tasks() -> None:
    store = MemoryStore()
    node = device(store=store, keep_every=2)
    server = Server(node)
    server.trains(PROGRAM, 5)
    first = node.parameters
    assert not np.array_equal(device(store=store, keep_every=2).parameters, first), "not after one"
    server.trains(PROGRAM, 9)
    kept = node.parameters
    restored = device(store=store, keep_every=2)
    assert np.array_equal(restored.parameters, kept)
    assert isinstance(Server(restored).trains(PROGRAM, 5), Success)
    assert np.array_equal(restored.parameters, first), "and a round begins with its own"
    assert not np.array_equal(device(store=store).parameters, kept), "not without being asked to"


def test_weights_of_another_model_are_not_used() -> None:
    store = MemoryStore()
    node = device(store=store, keep_every=1)
    server = Server(node)
    server.trains(PROGRAM)
    server.deploys(HEAD_ONLY, 4)
    assert np.array_equal(device(store=store, keep_every=1).parameters, HEAD_ONLY.initial(0) * 0)


def test_parameters_are_kept_on_request() -> None:
    store = MemoryStore()
    node = device(store=store, keep_every=1000)
    Server(node).trains(PROGRAM)
    node.keep_parameters()
    assert np.array_equal(device(store=store, keep_every=1000).parameters, node.parameters)


def test_forget_leaves_counters_and_keys() -> None:
    store = MemoryStore()
    node = device(store=store, keep_every=1)
    server = Server(node)
    server.deploys(HEAD_ONLY, 4)
    server.trains(HEAD_ONLY)
    device(store=store)
    (reply,) = server.says(Forget(9))
    assert isinstance(reply, Success) and node.model == PROGRAM.model_id
    again = device(store=store, keep_every=1)
    assert again.model == PROGRAM.model_id and status(again).boots == 1
    assert status(again).ceiling >= status(node).ceiling
    (reply,) = Server(again).says(update(8, HEAD_ONLY, 4))
    assert reply == Failure(8, ErrorCode.DOWNGRADE), "nor can an older model come back that way"


def test_a_failing_store_takes_an_update_back() -> None:
    store = MemoryStore()
    node = device(store=store)
    server = Server(node)
    server.trains(PROGRAM)
    send(node, sealed(update(3, THIRD, 5), server.counter + 1))
    store.fails = True
    assert replies(deliver(node, carried(THIRD))) == [Failure(3, ErrorCode.STORE, -10)]
    assert node.model == PROGRAM.model_id and status(node).trial is Trial.ROLLED_BACK
    store.fails = False
    server.counter += 1
    assert isinstance(server.deploys(THIRD, 5), Success)


def test_an_update_is_scored_on_the_devices_own_samples() -> None:
    """The mean loss of the test is the engine's on the stream's queries."""
    trained = THIRD.initial(2)
    program = build(
        [DenseLayer(8), ReLU(), DenseLayer(3)],
        (6,),
        "softmax_cross_entropy",
        weights={
            "dense_0/weights": trained[:48].reshape(8, 6),
            "dense_0/bias": trained[48:56],
            "dense_1/weights": trained[56:80].reshape(3, 8),
            "dense_1/bias": trained[80:],
        },
    )
    learner, stream = MoteLearner(program), DatasetStream(DATA)
    stream.open(5)
    loss = float(np.mean([learner.loss(*stream.next(True)) for _ in range(20)]))
    assert isinstance(Server(device()).deploys(program, 5, tested=20, max_loss=loss * 1.001), Success)
    assert Server(device()).deploys(program, 5, tested=20, max_loss=loss * 0.999) == Failure(5, ErrorCode.FAILED_TRIAL)
