"""The same ServerApp and strategies on Flower's own transports: its simulation engine, SuperLink and SuperNodes."""

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from tinyfleet.edge import tasks
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.edge.device.flower_client import app
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.server.flower.app import app as server_app
from tinyfleet.server.flower.devices import node_id
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import new_run

ROOT = Path(__file__).parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


def context(**settings: str | int | float) -> Context:
    node = {"partition-id": 0, "num-partitions": 2}
    return Context(1, 2, node, RecordDict(), {**CONFIG, **settings})


def test_the_client_app_does_what_a_device_over_mqtt_does(broker: BrokerAddress) -> None:
    task = tasks.load("digits")
    start = task.program.initial(5)
    config = {"phase-layers": [2, 3], "phase-steps": [8, 24], "phase-rates": [0.1, 0.1], "query": 8, "seed": 77}
    config |= {"shared-layers": 1, "density": 0.1, "half": True}
    new_run(1)
    replies = []
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        content = RecordDict({"arrays": vector_to_arrays(start, task.program), "config": ConfigRecord(config)})  # type: ignore[arg-type]
        asked = Message(content, node_id("one"), kind)
        device = virtual_device(broker, "test", "one", task.program, task.client(0, 2))
        device.start()
        try:
            with MqttGrid(broker, "test", task.program) as grid:
                grid.wait_for_nodes(1, 10)
                (by_mqtt,) = grid.send_and_receive([asked], timeout=20)
        finally:
            device.stop()
            assert device.join(10)
        by_flower = app(asked, context())
        replies.append((by_flower.content, by_mqtt.content))
    (flower, mqtt), evaluated = replies
    learned = arrays_to_vector(flower.array_records["arrays"], task.program)
    assert np.array_equal(learned, arrays_to_vector(mqtt.array_records["arrays"], task.program))
    assert 0 < np.count_nonzero(learned - start) < task.program.n_params / 8, "the largest changes of one layer"
    assert not evaluated[0].array_records and not evaluated[1].array_records
    for one, other in replies:
        a, b = one.metric_records["metrics"], other.metric_records["metrics"]
        assert {k: v for k, v in a.items() if k != "bytes-up"} == {k: v for k, v in b.items() if k != "bytes-up"}


def test_the_server_app_runs_on_the_mqtt_grid(broker: BrokerAddress) -> None:
    task = tasks.load("digits")
    devices = [virtual_device(broker, "home", f"d{i}", task.program, task.client(i, 3)) for i in range(3)]
    for device in devices:
        device.start()
    try:
        with MqttGrid(broker, "home", task.program) as grid:
            server_app(grid, context(rounds=3, clients=3, wait=10.0))
            assert grid.traffic.bytes_up > 0
    finally:
        for device in devices:
            device.stop()
        assert all(device.join(10) for device in devices)


def test_the_server_app_says_when_nobody_comes(broker: BrokerAddress) -> None:
    with (
        MqttGrid(broker, "home", tasks.load("digits").program) as grid,
        pytest.raises(UserError, match="no client came within 0 s"),
    ):
        server_app(grid, context(wait=0.0))


# With Flower's processes


@contextmanager
def process(words: Sequence[str], environment: dict[str, str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process in a group of its own, of which nothing is left."""
    program = Path(sys.executable).with_name(words[0])
    with log.open("wb") as output:
        started = subprocess.Popen(
            [str(program), *words[1:]], env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield started
        finally:
            started.send_signal(signal.SIGTERM)
            try:
                started.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()


def listening(port: int, by: "subprocess.Popen[bytes]", log: Path) -> None:
    """Returns when something listens there."""
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert by.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)  # Flower gives no sign of its own


@pytest.fixture
def flower(tmp_path: Path) -> tuple[dict[str, str], int]:
    """(environment, port): a Flower home of its own, which knows a SuperLink on that port."""
    home, port = tmp_path / "flower", free_port()
    home.mkdir()
    connection = f'[superlink]\ndefault = "test"\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    return environment, port


def flwr_run(environment: dict[str, str], settings: str, *more: str) -> str:
    program = Path(sys.executable).with_name("flwr")
    words = [str(program), "run", str(ROOT), "--stream", "-c", settings, *more]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_flwr_run_on_the_simulation_engine(flower: tuple[dict[str, str], int], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    environment, port = flower
    log = tmp_path / "superlink.log"
    link = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with process(link, environment, log) as started:
        listening(port, started, log)
        said = flwr_run(environment, "rounds=2 clients=2", "--federation-config", "num-supernodes=3")
    assert "Starting TinyMetaFed strategy" in said
    assert "learned, 10 shots: accuracy" in said, said


@pytest.mark.slow
def test_superlink_with_two_supernodes_and_a_device(
    flower: tuple[dict[str, str], int], tmp_path: Path, broker: BrokerAddress
) -> None:
    """Two nodes on Flower's transport and one on MQTT, in the same round."""
    environment, port = flower
    log = tmp_path / "superlink.log"
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    task = tasks.load("digits")
    device = virtual_device(broker, "mixed", "one", task.program, task.client(2, 3))
    device.start()
    with ExitStack() as stack:
        stack.callback(device.join, 10)
        stack.callback(device.stop)
        started = stack.enter_context(process(link, environment, log))
        listening(port, started, log)
        for i in range(2):
            words = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            words += ["--node-config", f"partition-id={i} num-partitions=3"]
            home = tmp_path / f"node-{i}"
            home.mkdir()
            log = tmp_path / f"node-{i}.log"
            stack.enter_context(process(words, {**environment, "FLWR_HOME": str(home)}, log))
        settings = f'rounds=1 clients=3 strategy="fedavg" fleet="mixed" broker="{broker.url}" ca="{broker.ca}"'
        settings += f' cert="{broker.cert}" key="{broker.key}"'
        said = flwr_run(environment, settings)
    assert "Received 3 results and 0 failures" in said, said
    assert "learned, 10 shots: accuracy" in said, said
