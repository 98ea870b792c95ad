"""Flower's strategies, unchanged, on virtual devices over a real broker; and what a run leaves in the graph."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broker_fixtures import command_services, connection_options
from conftest import free_port, plain_broker, start_mosquitto
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg, FedMedian, Krum, Strategy
from numpy.typing import NDArray

from tinyfleet.edge import tasks
from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.tasks import ClientData, Episodes, Hyperparameters, Recording, Split, Task, draw_episode
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.round_config import parse_round_config
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import EmbeddedStore, Rows
from tinyfleet.server.broker import Broker
from tinyfleet.server.fleet_server import FleetServer
from tinyfleet.server.flower.composite_grid import CompositeGrid
from tinyfleet.server.flower.devices import node_id
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.flower.requests import RoundEvent
from tinyfleet.server.named_strategies import NamedStrategy, make_strategy
from tinyfleet.server.training_run import Round, RunResult, run

Vector = NDArray[np.float32]

WAYS, FEATURES = 3, 12
PROGRAM = build([Dense(16), ReLU(), Dense(WAYS)], (FEATURES,), "softmax_cross_entropy")
START = PROGRAM.initial(3)
LIMIT = 600  # seconds; a hang is an error, a busy machine is not


def client(index: int, fleet_size: int) -> ClientData:
    """Four noisy patterns, seen by every device in its own way."""
    random = np.random.default_rng([7, index])
    patterns = np.random.default_rng(7).integers(0, 256, (4, 1, FEATURES))
    noisy = [np.clip(pattern + random.normal(0, 30, (16, FEATURES)), 0, 255).astype(np.uint8) for pattern in patterns]
    return ClientData.of(noisy, 1 / 255, WAYS)


def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
    data = client(99, 100)
    classes = np.split(data.features.astype(np.float32) * np.float32(data.scale), data.starts[1:-1].tolist())
    return Episodes.of(draw_episode(classes, WAYS, seed, shots, queries) for seed in seeds)


def stream(index: int) -> Recording:
    seen = draw("held_out", [index], 8, 1)[0]
    return Recording(seen.support_x, seen.support_y, None)


RECIPE = Hyperparameters(head_steps=4, steps=16, rate=0.1, alpha=1.0, density=0.25)
TASK = Task("patterns", WAYS, PROGRAM, client, draw, RECIPE, RECIPE, PROGRAM, stream)


@pytest.fixture(autouse=True)
def quiet() -> None:
    log_level(30)


@pytest.fixture
def devices(broker: BrokerAddress) -> Iterator[Callable[..., list[Device]]]:
    started: list[Device] = []

    def start(
        count: int,
        prefix: str = "test",
        broker: BrokerAddress = broker,
        fleet: str | None = None,
        task: Task = TASK,
    ) -> list[Device]:
        fleet = fleet or prefix
        new = [
            virtual_device(broker, fleet, f"{prefix}-{i}", task.program, task.client(i, count)) for i in range(count)
        ]
        for device in new:
            device.start()
        started.extend(new)
        return new

    yield start
    for device in started:
        device.stop()
    for device in started:
        assert device.join(10)


Start = Callable[..., list[Device]]


def replay(fleet: str, index: int, start: Vector, config: ConfigRecord) -> Vector:
    """What device `index` of the fleet must have learned: same engine, same samples."""
    plan = parse_round_config(config, node=node_id(f"{fleet}-{index}"))
    learner, stream = MoteLearner(PROGRAM), DatasetStream(client(index, 100))
    learner.set_parameters(start)
    stream.open(plan.seed)
    for phase in plan.phases:
        for _ in range(phase.steps):
            learner.learn(*stream.next(query=False), phase.rate)
    return learner.parameters


def learned(strategy: Strategy, broker: BrokerAddress, count: int) -> Vector:
    config = ConfigRecord({"lr": 0.1, "phase-steps": [20]})
    with MqttGrid(broker, "test", PROGRAM) as grid:
        assert len(grid.wait_for_nodes(count, 10)) == count
        result = strategy.start(grid, vector_to_arrays(START, PROGRAM), num_rounds=1, timeout=30, train_config=config)
    return arrays_to_vector(result.arrays, PROGRAM)


def replayed(count: int, *fleets: str) -> NDArray[np.float32]:
    config = ConfigRecord({"lr": 0.1, "phase-steps": [20], "server-round": 1})
    return np.stack([replay(fleet, i, START, config) for fleet in fleets or ("test",) for i in range(count)])


def test_flowers_fedavg_averages_what_the_devices_learned(broker: BrokerAddress, devices: Start) -> None:
    devices(4)
    result = learned(FedAvg(), broker, 4)
    np.testing.assert_allclose(result, replayed(4).mean(axis=0), rtol=1e-5, atol=1e-6)
    assert not np.allclose(result, START, atol=1e-3)


def test_flowers_fedmedian_takes_the_median(broker: BrokerAddress, devices: Start) -> None:
    devices(5)
    np.testing.assert_array_equal(learned(FedMedian(), broker, 5), np.median(replayed(5), axis=0))


def test_flowers_krum_takes_one_device_to_the_bit(broker: BrokerAddress, devices: Start) -> None:
    devices(5)
    result = learned(Krum(num_malicious_nodes=1), broker, 5)
    assert any(np.array_equal(result, one) for one in replayed(5))


def test_evaluation_over_the_same_grid(broker: BrokerAddress, devices: Start) -> None:
    devices(3)
    with MqttGrid(broker, "test", PROGRAM) as grid:
        grid.wait_for_nodes(3, 10)
        result = FedAvg().start(
            grid,
            vector_to_arrays(START, PROGRAM),
            num_rounds=3,
            timeout=30,
            train_config=ConfigRecord({"phase-steps": [60], "lr": 0.1, "seed": 5}),
            evaluate_config=ConfigRecord({"query": 16, "seed": 5}),
        )
    accuracies = [metrics["accuracy"] for metrics in result.evaluate_metrics_clientapp.values()]
    assert len(accuracies) == 3 and accuracies[-1] > 0.8, "devices score the new weights on what they never learn from"


def test_two_fleets_as_one_grid(broker: BrokerAddress, devices: Start) -> None:
    devices(2, "test"), devices(2, "other")
    with MqttGrid(broker, "test", PROGRAM) as first, MqttGrid(broker, "other", PROGRAM) as second:
        both = CompositeGrid([first, second])
        nodes = first.wait_for_nodes(2, 10) + second.wait_for_nodes(2, 10)
        assert both.get_node_ids() == sorted(nodes)
        config = ConfigRecord({"lr": 0.1, "phase-steps": [20]})
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=4)
        result = strategy.start(both, vector_to_arrays(START, PROGRAM), num_rounds=1, timeout=30, train_config=config)
        assert first.traffic.bytes_up > 0 and second.traffic.bytes_up > 0
    expected = replayed(2, "test", "other").mean(axis=0)
    np.testing.assert_allclose(arrays_to_vector(result.arrays, PROGRAM), expected, rtol=1e-5, atol=1e-6)


def test_a_round_over_the_broker_in_pure_python(tmp_path: Path, devices: Start) -> None:
    pytest.importorskip("amqtt")
    with Broker(0, tmp_path, kind="amqtt") as broker, ExitStack() as stack:
        stack.enter_context(command_services(broker.address, ["test"]))
        fleet = devices(3, broker=broker.address)
        stack.callback(lambda: [device.stop() for device in fleet])
        result = learned(FedAvg(fraction_evaluate=0.0), broker.address, 3)
    np.testing.assert_allclose(result, replayed(3).mean(axis=0), rtol=1e-5, atol=1e-6)


# Runs, with the graph


class News(queue.Queue[str]):
    """The lines that a server says as they come."""

    def until(self, *lines: str) -> None:
        """Returns once it has said all of these."""
        missing = set(lines)
        while missing:
            missing.discard(self.get(timeout=30))


@pytest.fixture
def server(tmp_path: Path, own_broker: BrokerAddress) -> Iterator[FleetServer]:
    with FleetServer(tmp_path / "data", "test", broker=own_broker) as server:
        yield server


def learn(server: FleetServer, how: NamedStrategy, rounds: int, **more: Any) -> RunResult:
    """A run of `rounds` rounds on the fleet that this server knows."""
    return run(TASK, how, broker=server.broker, fleet="test", store=server.store, rounds=rounds, **more)


@pytest.mark.parametrize("name", ["tinymetafed", "tinyreptile", "reptile", "fedavg"])
def test_a_run_learns_and_leaves_its_lineage(server: FleetServer, devices: Start, name: str) -> None:
    devices(4)
    outcome = learn(server, make_strategy(name, TASK, rounds=6, clients=3, query=8), 6, clients=4)
    assert [this.number for this in outcome.rounds] == [1, 2, 3, 4, 5, 6]
    expected = {"tinyreptile": 1, "fedavg": 4}.get(name, 3)
    assert all(len(this.participations) == this.selected == expected and not this.no_reply for this in outcome.rounds)
    assert not np.array_equal(outcome.parameters, PROGRAM.initial(0))
    if name == "tinymetafed":
        dense = 4 * PROGRAM.n_params
        assert all(part.bytes_up is not None and part.bytes_up < dense / 4 for part in outcome.rounds[0].participations)
    last = server.store.query(library.text("last-round"), fleet="test")
    assert last.column("number") == [6] * expected and last.column("run") == [outcome.run] * expected
    lineage = server.store.query(library.text("lineage"), fleet="test")
    assert lineage.column("version") == [6, 5, 4, 3, 2, 1, 0]
    assert lineage.column("strategy")[0] == make_strategy(name, TASK, rounds=1, clients=1).name


@pytest.mark.parametrize("name", ["tinymetafed", "fedavg"])
def test_the_same_seed_gives_the_same_run(server: FleetServer, devices: Start, name: str) -> None:
    devices(4)
    learn(server, make_strategy(name, TASK, rounds=1, clients=4), 1, clients=4)  # by then all four are known
    runs = [
        learn(server, make_strategy(name, TASK, rounds=4, clients=2, seed=11), 4, clients=2, seed=11) for _ in range(2)
    ]
    assert np.array_equal(runs[0].parameters, runs[1].parameters)
    assert [r.loss for r in runs[0].rounds] == [r.loss for r in runs[1].rounds]


def test_a_query_decides_who_takes_part(server: FleetServer, devices: Start) -> None:
    devices(4)
    chosen = """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id { VALUES ?fleet { UNDEF } ?d tf:fleet ?fleet ; tf:deviceId ?id ; tf:online true .
                     FILTER(?id IN ("test-1", "test-2")) }"""
    outcome = learn(server, make_strategy("reptile", TASK, rounds=2, clients=4), 2, query=chosen, clients=2)
    assert {part.device for this in outcome.rounds for part in this.participations} == {"test-1", "test-2"}


def test_a_device_killed_in_a_round_costs_its_reply_and_is_offline_in_the_graph(
    broker: BrokerAddress, tmp_path: Path
) -> None:
    task = tasks.load("digits")
    root = Path(__file__).parent.parent
    fleet = [virtual_device(broker, "test", f"steady-{i}", task.program, task.client(i, 4)) for i in range(3)]
    for device in fleet:
        device.start()
    command = [
        sys.executable,
        "-m",
        "tinyfleet",
        "device",
        "simulate",
        "--prefix",
        "weak",
        "--first-index",
        "3",
        "--fleet",
        "test",
    ]
    weak = subprocess.Popen([*command, *connection_options(broker)], cwd=root, stdout=subprocess.DEVNULL)

    there, gone = threading.Event(), threading.Event()

    def log_lines(line: str) -> None:
        if line == "weak-3: online":
            there.set()
        elif line == "weak-3: offline":
            gone.set()

    def kill(event: RoundEvent) -> None:
        if event.kind == "requested" and event.device == "weak-3":
            weak.send_signal(signal.SIGKILL)

    online = """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id ?online { ?d tf:fleet "test" ; tf:deviceId ?id ; tf:online ?online }"""
    how = make_strategy("fedavg", task, rounds=2, clients=4)
    try:
        with FleetServer(tmp_path, "test", broker=broker, on_log=log_lines) as server:
            assert there.wait(30)
            weak.send_signal(signal.SIGSTOP)  # so that it can't have replied before it dies
            outcome = run(
                task, how, broker=broker, fleet="test", store=server.store, rounds=2, clients=4, on_event=kill
            )
            states = {row["id"]: row["online"] for row in server.store.query(online)}
    finally:
        weak.kill()
        weak.wait()
        for device in fleet:
            device.stop()
        assert all(device.join(10) for device in fleet)
    first, second = outcome.rounds
    assert first.selected == 4 and len(first.participations) == 3 and first.no_reply == {"weak-3": "went offline"}
    assert second.selected == 3 and len(second.participations) == 3 and not second.no_reply
    assert states == {"steady-0": True, "steady-1": True, "steady-2": True, "weak-3": False}


@pytest.mark.parametrize("name", ["tinymetafed", "fedavg", "krum"])
def test_a_fleet_that_is_gone_ends_the_run_with_one_clear_error(
    tmp_path: Path, broker: BrokerAddress, devices: Start, name: str
) -> None:
    fleet, heard = devices(2), News()

    def stop(_ended: Round) -> None:
        for device in fleet:
            device.stop()
        heard.until("test-0: offline", "test-1: offline")

    with FleetServer(tmp_path / "data", "test", broker=broker, on_log=heard.put) as server:
        with pytest.raises(UserError, match="no client is there for round 2; start devices"):
            learn(server, make_strategy(name, TASK, rounds=3, clients=2), 3, clients=2, wait=1, on_round=stop)
        assert server.store.query(library.text("last-round"), fleet="test").column("number") == [1, 1]


def test_a_device_that_comes_during_a_run_takes_part(tmp_path: Path, broker: BrokerAddress, devices: Start) -> None:
    devices(2)
    heard = News()

    def another(ended: Round) -> None:
        if ended.number == 1:
            devices(1, "late", fleet="test")
            heard.until("late-0: described", "late-0: online")

    with FleetServer(tmp_path / "data", "test", broker=broker, on_log=heard.put) as server:
        how = make_strategy("reptile", TASK, rounds=30, clients=3)
        outcome = learn(server, how, 30, clients=2, on_round=another)  # 30: until the grid has heard of it, too
    first, *_, last = ({part.device for part in ended.participations} for ended in outcome.rounds)
    assert first == {"test-0", "test-1"} and last == {*first, "late-0"}


def test_flowers_strategies_keep_to_their_number_of_clients_as_the_fleet_shrinks(
    tmp_path: Path, broker: BrokerAddress, devices: Start
) -> None:
    fleet, heard = devices(6), News()

    def leave(ended: Round) -> None:
        if ended.number == 1:
            for device in fleet[:4]:
                device.stop()
            heard.until(*(f"test-{i}: offline" for i in range(4)))

    with FleetServer(tmp_path / "data", "test", broker=broker, on_log=heard.put) as server:
        heard.until(*(f"test-{i}: online" for i in range(6)))
        outcome = learn(server, make_strategy("fedavg", TASK, rounds=3, clients=1), 3, clients=1, on_round=leave)
    assert [ended.selected for ended in outcome.rounds] == [1, 1, 1]


def announced(
    server: FleetServer, name: str, *, online: bool = True, model: bytes = PROGRAM.model_id, arena: int = 65536
) -> None:
    topics = Topics("test")
    td = thing_description("test", name, VIRTUAL, "mote", "0.1.0", arena, model)
    assert server.registry.ingest_one(topics.td(name), json.dumps(td).encode())
    assert server.registry.ingest_one(topics.status(name), encode(Status(True, model)))
    if not online:
        assert server.registry.ingest_one(topics.status(name), encode(Status(False, model)))


def test_without_an_eligible_client_the_error_says_why(server: FleetServer) -> None:
    def attempt(**more: Any) -> str:
        how = make_strategy("reptile", TASK, rounds=1, clients=1)
        with pytest.raises(UserError) as error:
            learn(server, how, 1, wait=0, **more)
        return str(error.value)

    assert "the graph knows no device of the fleet 'test'; start some" in attempt()
    announced(server, "asleep", online=False)
    announced(server, "other", model=b"another!")
    announced(server, "small", arena=100)
    said = attempt()
    assert "selects none of the fleet's 3 devices" in said
    assert "asleep is offline" in said and "other runs another model" in said
    assert f"small has an arena of 100 bytes, and training needs {PROGRAM.arena_bytes}" in said
    announced(server, "ghost")  # the graph says it is there, the broker knows nothing of it
    assert "selects ghost, but none of them is online at the broker" in attempt()
    assert "column ?id" in attempt(query="SELECT ?s { ?s ?p ?o }")


# The server


def test_the_server_writes_where_it_is_for_its_owner_only(tmp_path: Path, broker: BrokerAddress) -> None:
    with FleetServer(tmp_path, "test", broker=broker) as server:
        path = tmp_path / "server.json"
        assert path.stat().st_mode & 0o777 == 0o600
        said = json.loads(path.read_text())
        assert said["broker"] == broker.url and said["endpoint"] == server.endpoint
        with pytest.raises(UserError, match="in use by another process"):
            FleetServer(tmp_path, "test", broker=broker)
        assert path.exists()
    assert not path.exists()


def test_a_port_that_is_taken_is_one_clear_error(tmp_path: Path, broker: BrokerAddress) -> None:
    with pytest.raises(UserError, match=f"port {broker.port} on 127.0.0.1 is taken"):
        FleetServer(tmp_path / "a", "test", port=broker.port)
    with pytest.raises(UserError, match=f"port {broker.port} on 127.0.0.1 for the HTTP server"):
        FleetServer(tmp_path / "b", "test", broker=broker, endpoint_port=broker.port)
    EmbeddedStore(tmp_path / "a" / "graph").close()  # nothing was left open


def test_a_device_that_was_there_before_the_server_is_known(tmp_path: Path, broker: BrokerAddress) -> None:
    device = virtual_device(broker, "test", "early", PROGRAM, client(0, 1))
    device.start()
    rows: list[Rows] = []
    heard: list[str] = []
    try:
        with FleetServer(tmp_path, "test", broker=broker, on_log=heard.append) as server:
            how = make_strategy("tinyreptile", TASK, rounds=1, clients=1)
            learn(server, how, 1)
            rows.append(server.store.query(library.text("clients"), fleet="test"))
    finally:
        device.stop()
        assert device.join(10)
    assert rows[0].column("id") == ["early"]
    assert "early: online" in heard and "early: described" in heard
    with FleetServer(tmp_path, "test", broker=broker) as server:  # it has left, and the graph knows
        assert not server.store.query(library.text("clients"), fleet="test")


def test_devices_that_died_while_the_broker_was_gone_are_offline(tmp_path: Path) -> None:
    port = free_port()
    broker = start_mosquitto(tmp_path, port)
    command = [
        sys.executable,
        "-m",
        "tinyfleet",
        "device",
        "simulate",
        "--fleet",
        "test",
        "--insecure",
        "--broker",
        plain_broker(port).url,
    ]
    root = Path(__file__).parent.parent
    online = """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id { ?d tf:fleet "test" ; tf:deviceId ?id ; tf:online true }"""
    heard = News()

    with FleetServer(tmp_path / "data", "test", broker=plain_broker(port), on_log=heard.put) as server:
        weak = subprocess.Popen([*command, "--prefix", "weak"], cwd=root, stdout=subprocess.DEVNULL)
        try:
            heard.until("weak-0: online")
            assert server.store.query(online).column("id") == ["weak-0"]
            broker.kill()  # without a word, and so without the wills
            broker.wait()
        finally:
            weak.kill()
            weak.wait()
        broker = start_mosquitto(tmp_path, port)
        late = virtual_device(plain_broker(port), "test", "late", PROGRAM, client(0, 1))
        late.start()
        try:
            heard.until("late: online")
            assert server.store.query(online).column("id") == ["late"]
        finally:
            late.stop()
            assert late.join(10)
            broker.terminate()
            broker.wait()


def test_what_the_server_refuses_is_news(broker: BrokerAddress, tmp_path: Path) -> None:
    heard = News()
    td = thing_description("other", "one", VIRTUAL, "mote", "0.1.0", 65536, PROGRAM.model_id) | {"tf:arenaBytes": 0}
    with FleetServer(tmp_path / "more", "other", broker=broker, on_log=heard.put) as other:
        session = Session(broker, "one", on_message=lambda _topic, _payload: None)
        session.publish(Topics("other").td("one"), json.dumps(td).encode(), retain=True)
        said = heard.get(timeout=10)
        session.close()
        assert not other.store.query(library.text("clients"))
    assert said.startswith("Thing Description of 'one' rejected: tf:arenaBytes: one whole number of bytes from 1")


def test_server_device_and_run_as_commands(tmp_path: Path) -> None:
    """A server with a broker of its own, devices that find it by its folder, and a run."""
    root, data = Path(__file__).parent.parent, tmp_path / "data"

    def command(*words: object) -> list[str]:
        return [sys.executable, "-m", "tinyfleet", *map(str, words), "--data", str(data)]

    def finish(*words: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(command(*words), cwd=root, capture_output=True, text=True, timeout=LIMIT, env=os.environ)

    def started(words: Sequence[object], until: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(command(*words), cwd=root, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if until in line:
                return process
        raise AssertionError(f"{words} ended with {process.wait()}")

    nothing = finish("run", "start")
    assert nothing.returncode == 2 and nothing.stderr.startswith("error: no server runs on")
    server = started(["server", "start", "--port", 0], "ready")
    fleet = started(["device", "simulate", "--devices", 3], "device-2")
    try:
        out = tmp_path / "start.npz"
        limits = ["--wait", LIMIT, "--round-timeout", LIMIT]
        first = finish("run", "start", "--rounds", 2, "--clients-per-round", 3, *limits, "--out", out, "--json")
        assert first.returncode == 0, first.stderr
        *rounds, result = [json.loads(line) for line in first.stdout.splitlines()]
        assert [line["round"] for line in rounds] == [1, 2] and len(rounds[0]["clients"]) == 3
        assert set(result["accuracy-by-shots"]["learned"]) == {"1", "5", "10"}
        second = finish("run", "start", "--strategy", "nonsense")
        assert second.returncode == 2 and "there is no strategy 'nonsense'" in second.stderr
        wrong = finish("run", "start", "--initialization", __file__)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    finally:
        for process in (fleet, server):
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=LIMIT)
    assert server.returncode == 0 and not (data / "server.json").exists()
