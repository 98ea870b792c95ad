"""Online learning under drift: noticed soon, not without cause, adapted to, and known to the fleet's graph."""

import itertools
import math
import queue
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray
from plain_commands import plain
from test_grid_fleet import FEATURES, PROGRAM, START, WAYS, client

from tinyfleet.edge.device.agent import AgentNode, OnlineLearning
from tinyfleet.edge.device.device import Device
from tinyfleet.edge.device.drift import DriftResponse, OnlineLearner, PacedStream
from tinyfleet.edge.device.sources import DatasetStream, Sample
from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description
from tinyfleet.edge.model.layers import Dense, Tanh, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import Sha256, TrainTask
from tinyfleet.edge.wire.flower_records import vector_to_arrays
from tinyfleet.edge.wire.messages import decode_status
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.ingest.registry import Registry
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import EmbeddedStore
from tinyfleet.server.flower.grid import MqttGrid

TOPICS = Topics("test")

Vector = NDArray[np.float32]
RESPONSE = DriftResponse(delta=0.002, steps=50, rate=0.1, restart=True)


class Changing:
    """Three noisy patterns, told apart by their labels; from sample `at` on, each label belongs to the next pattern."""

    def __init__(self, seed: int, at: int) -> None:
        self._seed, self._at = seed, at
        self.open(0)

    def open(self, seed: int) -> None:
        self._random = np.random.default_rng([self._seed, seed])
        self._patterns = self._random.random((WAYS, FEATURES))
        self.given = 0

    def next(self, query: bool) -> Sample:
        label = int(self._random.integers(WAYS))
        shown = (label + (self.given >= self._at)) % WAYS
        self.given += 1
        noisy = self._patterns[shown] + self._random.normal(0, 0.1, FEATURES)
        return noisy.astype(np.float32), float(label)


def follow(
    stream: Changing, samples: int, drift_response: DriftResponse | None, rate: float = 0.02
) -> tuple[Vector, list[int]]:
    """Whether each answer was right, and when drift was noticed."""
    learner = OnlineLearner(MoteLearner(PROGRAM), PROGRAM, START, rate, drift_response)
    answers = [learner.learn(*stream.next(query=False)) for _ in range(samples)]
    return np.array([1 - a.error for a in answers], np.float32), [i for i, a in enumerate(answers) if a.drifted]


@pytest.mark.parametrize("seed", range(5))
def test_drift_is_noticed_soon_and_adapted_to(seed: int) -> None:
    right, alarms = follow(Changing(seed, at=600), 1200, RESPONSE)
    blind, none = follow(Changing(seed, at=600), 1200, None)
    assert len(alarms) == 1 and 600 <= alarms[0] < 680 and none == []
    assert right[400:600].mean() > 0.9 and right[-200:].mean() > 0.9
    assert right[600:900].mean() >= blind[600:900].mean(), "from the start, at a higher rate, it is learned sooner"


def test_there_are_no_false_alarms_where_nothing_changes() -> None:
    assert [follow(Changing(seed, at=9999), 1500, RESPONSE)[1] for seed in range(8)] == [[]] * 8


def test_learning_is_no_drift() -> None:
    """Errors that become fewer are a change that ADWIN notices, too."""
    right, alarms = follow(Changing(3, at=9999), 800, DriftResponse(delta=0.5, steps=10, rate=0.1), rate=0.005)
    assert right[:50].mean() < 0.7 < 0.9 < right[-100:].mean()
    assert not [t for t in alarms if t < 200]


def test_after_an_alarm_it_goes_on_from_its_start() -> None:
    stream = Changing(1, at=600)
    learner = OnlineLearner(mote := MoteLearner(PROGRAM), PROGRAM, START, 0.02, RESPONSE)
    while not learner.learn(*(sample := stream.next(query=False))).drifted:
        assert learner.drift == 0
    assert learner.drift == 1
    again = MoteLearner(PROGRAM)
    again.set_parameters(START)
    again.learn(*sample, RESPONSE.rate)
    assert np.array_equal(mote.parameters, again.parameters)
    drifts = [learner.drift for _ in range(RESPONSE.steps) if learner.learn(*stream.next(query=False))]
    assert drifts == [i / RESPONSE.steps for i in reversed(range(RESPONSE.steps))]


def test_the_error_of_a_regression_is_the_squared_error() -> None:
    program = build([Dense(8), Tanh(), Dense(2)], (3,), "mse")
    learner = OnlineLearner(mote := MoteLearner(program), program, program.initial(0), 0.0)
    x, y = np.ones(3, np.float32), np.array([0.5, -1.0], np.float32)
    assert learner.learn(x, y).error == pytest.approx(float(np.mean((mote.infer(x) - y) ** 2)))
    assert np.array_equal(mote.parameters, program.initial(0)), "a rate of 0 learns nothing"


def test_where_learning_diverges_it_begins_anew_from_its_start() -> None:
    program = build([Dense(8), Tanh(), Dense(2)], (3,), "mse")
    start = program.initial(0)
    learner = OnlineLearner(mote := MoteLearner(program), program, start, 0.1, DriftResponse())
    hostile = np.full(2, 1e30, np.float32)
    learner.learn(np.ones(3), hostile)
    assert np.array_equal(mote.parameters, start)
    for _ in range(50):
        answer = learner.learn(np.ones(3), np.ones(2))
    assert answer.error < 0.01


def test_a_paced_stream_gives_a_sample_when_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("tinyfleet.edge.device.drift.time.monotonic", lambda: now)
    stream = PacedStream(DatasetStream(client(0, 1)), 0.5)
    stream.open(0)
    assert stream.next(False) is not None and stream.next(False) is None
    now += 1.1
    assert [stream.next(False) is not None for _ in range(3)] == [True, True, False]
    now += 3600  # nobody asked: what was to be seen in that hour is gone
    assert [stream.next(False) is not None for _ in range(3)] == [True, True, False]


def test_who_does_not_learn_online_imports_no_river_and_nobody_tensorflow() -> None:
    """Both take seconds; a server's first round is over before."""
    modules = "tinyfleet.edge.cli, tinyfleet.server.training_run, tinyfleet.server.evaluate"
    code = f"import sys, {modules}; print({{'river', 'scipy', 'tensorflow'}} & {{*sys.modules}})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


# The agent


@pytest.fixture
def agent(broker: BrokerAddress) -> Iterator[Any]:
    def node() -> AgentNode:
        td = thing_description("test", "pi", VIRTUAL, "mote", "0.2.0", 65_536, PROGRAM.model_id)
        online = OnlineLearning(Changing(1, at=600), 0.02, RESPONSE)
        return AgentNode("test", "pi", td, PROGRAM, DatasetStream(client(0, 1)), online=online)

    device = Device(node, broker, "test")
    device.start()
    yield device
    device.stop()
    assert device.join(10)


def test_an_agents_drift_becomes_an_event_in_the_graph(broker: BrokerAddress, agent: Device) -> None:
    """It learns for itself from the first round on, and says when it notices drift and when it has adapted."""
    said: queue.Queue[tuple[str, bytes]] = queue.Queue()
    listener = Session(broker, "listener", on_message=lambda *message: said.put(message))
    for filter in (TOPICS.td("+"), TOPICS.status("+")):
        listener.subscribe(filter)
    config = ConfigRecord({"phase-steps": [5], "lr": 0.1, "seed": 3})
    with MqttGrid(broker, "test", PROGRAM) as grid:
        assert grid.wait_for_nodes(1, 10)
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        strategy.start(grid, vector_to_arrays(START, PROGRAM), 1, 30, train_config=config)
    drifts: list[float | None] = []
    with EmbeddedStore() as store:
        registry = Registry(store, "test")
        while 1.0 not in drifts or drifts[-1] != 0.0:
            topic, payload = said.get(timeout=30)
            registry.ingest_one(topic, payload)
            if topic == TOPICS.status("pi"):
                drifts.append(decode_status(payload).drift)
        events = store.query(library.text("drift-events"), fleet="test")
    listener.close()
    assert drifts.count(1.0) == 1
    assert events.column("id") == ["pi"] and events.column("drift") == [1.0]
    assert events.column("ended")[0] is not None


class Sensor:
    """Gives these samples, again and again."""

    def __init__(self, samples: list[tuple[Any, Any]]) -> None:
        self._samples = itertools.cycle(samples)

    def open(self, seed: int) -> None:
        pass

    def next(self, query: bool) -> tuple[Any, Any]:
        return next(self._samples)


def test_an_agent_skips_and_counts_samples_that_no_model_takes(caplog: pytest.LogCaptureFixture) -> None:
    """And learns from the others: a faulty sample costs neither the agent nor what it has learned."""
    size, classes = math.prod(PROGRAM.input_shape), PROGRAM.classes
    good, bad = np.zeros(size, np.float32), np.full(size, np.nan, np.float32)
    faulty = [
        (bad, 0.0),
        (np.full(size, np.inf, np.float32), 0.0),
        (good[:-1], 0.0),
        (good, -1.0),
        (good, float("nan")),
    ]
    faulty += [(good, float(classes)), (good, 0.5), (good, 1e30)]
    td = thing_description("test", "pi", VIRTUAL, "mote", "0.2.0", 65_536, PROGRAM.model_id)
    online = OnlineLearning(Sensor([(good, 0.0), *faulty]), 0.02, None)
    node = AgentNode("test", "pi", td, PROGRAM, DatasetStream(client(0, 1)), online=online)
    weights = Sha256.of(START.astype("<f4").tobytes())
    work = TrainTask(1, "train", 5, 1, PROGRAM.model_id, 3, (), 0, None, weights)
    node.receive(TOPICS.command("pi"), plain(work))
    for number, payload in enumerate(chunks(START.astype("<f4").tobytes())):
        node.receive(TOPICS.weights(5, 1, number), payload)
    list(node.poll())
    while node.counters.samples < 20:
        node.step()
    assert node.skipped in range(19 * len(faulty), 20 * len(faulty) + 1)
    counts = [record.args[1] for record in caplog.records if "skipped" in record.message]  # type: ignore[index]
    assert counts == [1, 2, 4, 8, 16, 32, 64, 128], "a line each time that the number has doubled"
