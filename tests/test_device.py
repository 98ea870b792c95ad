"""A virtual device and the agent against a real broker: presence, work, a broker that comes back, errors."""

from __future__ import annotations

import json
import queue
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from broker_fixtures import connection_options
from conftest import free_port, plain_broker, start_mosquitto
from plain_commands import plain

from tinyfleet.__main__ import main
from tinyfleet.edge.cli import run_devices
from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.device.node import Node
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import ReLU, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Reboot, Sha256, TrainTask, UpdateFormat, UpdateModel
from tinyfleet.edge.wire.messages import (
    Dense,
    ErrorCode,
    Failure,
    Reply,
    Status,
    Success,
    decode_reply,
    decode_status,
)
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_broker
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.deployment import manifest

ROOT = Path(__file__).parents[1]
TOPICS = Topics("home")
PROGRAM = build([DenseLayer(300), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
WIDER = build([DenseLayer(310), ReLU(), DenseLayer(3)], (6,), "softmax_cross_entropy")
Broker = BrokerAddress


def samples() -> ClientData:
    random = np.random.default_rng(0)
    return ClientData.of([random.integers(0, 255, (12, 6), np.uint8) for _ in range(5)], 1 / 255, 3)


def mote(broker: Broker, id: str) -> Device:
    return virtual_device(broker, "home", id, PROGRAM, samples())


def agent(broker: Broker, id: str) -> Device:
    def node() -> Node:
        return Node("home", id, {"title": id}, PROGRAM, DatasetStream(samples()), learner=MoteLearner)

    return Device(node, broker, "home")


class Server:
    """What a server sees and says."""

    def __init__(self, broker: Broker) -> None:
        self._messages: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.session = Session(broker, "server", on_message=lambda topic, payload: self._messages.put((topic, payload)))
        for what in (TOPICS.status("+"), TOPICS.reply("+"), TOPICS.td("+")):
            self.session.subscribe(what)

    def wait(self, topic: str, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message of this topic that is wanted; others are dropped."""
        decoders: dict[str, Callable[[bytes], Any]] = {"status": decode_status, "reply": decode_reply, "td": json.loads}
        decode = decoders[topic.rsplit("/", 1)[1]]
        end = time.monotonic() + 60
        while True:
            name, payload = self._messages.get(timeout=max(0.0, end - time.monotonic()))
            if name == topic and wanted(message := decode(payload)):
                return message

    def online(self, *ids: str) -> None:
        """Waits until all of them are, in any order."""
        absent = {TOPICS.status(id) for id in ids}
        while absent:
            name, payload = self._messages.get(timeout=60)
            if name in absent and decode_status(payload).online:
                absent.remove(name)

    def status(self, id: str, online: bool) -> Status:
        status: Status = self.wait(TOPICS.status(id), lambda s: s.online == online)
        return status

    def ask(self, id: str, order: TrainTask | UpdateModel | Reboot) -> None:
        self.session.publish(TOPICS.command(id), plain(order))

    def broadcast(self, run: int, round: int, program: Program = PROGRAM) -> None:
        for i, payload in enumerate(chunks(program.initial(1).tobytes())):
            self.session.publish(TOPICS.weights(run, round, i), payload, retain=True)

    def result(self, id: str, order: int) -> list[Reply]:
        """All parts of a reply."""
        parts = [self.wait(TOPICS.reply(id), lambda did: did.id == order)]
        while len(parts) < getattr(parts[0], "parts", 1):
            parts.append(self.wait(TOPICS.reply(id), lambda did: did.id == order))
        return parts


@pytest.fixture
def server(broker: Broker) -> Iterator[Server]:
    server = Server(broker)
    yield server
    server.session.close()


@pytest.fixture(params=[mote, agent])
def device(request: pytest.FixtureRequest, server: Server, broker: Broker) -> Iterator[Device]:
    """A device that is online; its name is `one`. A dense reply of its model takes two parts."""
    device: Device = request.param(broker, "one")
    device.start()
    server.status("one", online=True)
    yield device
    device.stop()
    assert device.join(10)


def work(id: int, round: int, program: Program = PROGRAM, **fields: Any) -> TrainTask:
    phases = (Phase(ALL_LAYERS, 20, 0.1),)
    weights = Sha256.of(program.initial(1).tobytes())
    return TrainTask(id, "train", 5, round, program.model_id, 3, phases, 5, UpdateFormat(**fields), weights)


def test_a_device_works_and_says_goodbye(server: Server, device: Device) -> None:
    server.broadcast(5, 1)
    server.ask("one", work(1, 1))
    first, second = server.result("one", 1)
    assert isinstance(first, Success) and first.metrics is not None and first.metrics.samples == 20
    assert isinstance(second, Success) and second.metrics is None and second.update is not None
    server.broadcast(5, 2)
    server.ask("one", work(2, 2, density=0.1, half=True))
    (done,) = server.result("one", 2)
    assert isinstance(done, Success) and done.update is not None
    device.stop()
    assert device.join(10)
    assert server.status("one", online=False).samples == 40


def test_an_order_before_its_weights_is_served_when_they_come(server: Server, device: Device) -> None:
    server.ask("one", work(1, 1))
    server.broadcast(5, 1)
    assert isinstance(server.result("one", 1)[0], Success)


def test_a_program_over_the_air(server: Server, device: Device) -> None:
    for i, payload in enumerate(chunks(WIDER.data)):
        server.session.publish(TOPICS.program(WIDER.model_id, i), payload, retain=True)
    server.ask("one", UpdateModel(1, manifest(WIDER, 1)))
    server.wait(TOPICS.status("one"), lambda s: s.model == WIDER.model_id)
    server.broadcast(5, 1, WIDER)
    server.ask("one", work(2, 1, WIDER))
    updates = [did.update for did in server.result("one", 2) if isinstance(did, Success)]
    assert sum(len(update.values) for update in updates if isinstance(update, Dense)) == WIDER.n_params


def test_a_reboot_brings_the_device_back(server: Server, device: Device) -> None:
    server.ask("one", Reboot(1))
    server.status("one", online=False)
    server.status("one", online=True)
    server.broadcast(5, 1)
    server.ask("one", work(2, 1))
    assert isinstance(server.result("one", 2)[0], Success)


@pytest.mark.parametrize("make", [mote, agent])
def test_a_broker_that_comes_back(make: Callable[[Broker, str], Device], tmp_path: Path) -> None:
    broker = plain_broker(free_port())
    process = start_mosquitto(tmp_path, broker.port)
    device = make(broker, "one")
    device.start()
    server = Server(broker)
    server.status("one", online=True)
    process.terminate()
    process.wait()
    process = start_mosquitto(tmp_path, broker.port)
    try:
        server.status("one", online=True)
        server.broadcast(5, 1)
        server.ask("one", work(1, 1))
        assert isinstance(server.result("one", 1)[0], Success)
    finally:
        device.stop()
        assert device.join(10)
        server.session.close()
        process.terminate()
        process.wait()


def test_two_of_one_name_are_warned(server: Server, broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    """They end each other's session, which MQTT 3.1.1 does not explain."""
    devices = [mote(broker, "one"), mote(broker, "one")]
    for one in devices:
        one.start()
    end = time.monotonic() + 30
    while not caplog.messages and time.monotonic() < end:
        server.status("one", online=True)
    assert "does another client use the name tinyfleet-home-one?" in caplog.messages[0]
    for one in devices:
        one.stop()
    assert all(one.join(10) for one in devices)


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def command() -> Iterator[Command]:
    """Starts the command with these arguments; it ends with the test at the latest."""
    with ExitStack() as stack:

        def start(*arguments: str) -> subprocess.Popen[str]:
            words = [sys.executable, "-m", "tinyfleet", *arguments]
            process = stack.enter_context(
                subprocess.Popen(words, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            )
            stack.callback(process.kill)
            return process

        yield start


def test_a_device_that_vanishes_is_marked_offline_by_its_will(server: Server, broker: Broker, command: Command) -> None:
    process = command("device", "simulate", "--devices", "2", "--prefix", "v", *connection_options(broker))
    server.online("v-0", "v-1")
    process.kill()
    process.wait()
    assert not server.status("v-0", online=False).online
    late: queue.Queue[bytes] = queue.Queue()
    session = Session(broker, "late", on_message=lambda _topic, payload: late.put(payload))
    session.subscribe(TOPICS.status("v-1"))
    assert not decode_status(late.get(timeout=60)).online, "retained: who comes later sees it too"
    session.close()


@pytest.mark.parametrize(("what", "number"), [("device", signal.SIGTERM), ("agent", signal.SIGINT)])
def test_a_command_ends_cleanly(server: Server, broker: Broker, command: Command, what: str, number: int) -> None:
    named = {
        "device": ["simulate", "--devices", "2", "--prefix", "v"],
        "agent": ["start", "--device-id", "v-0"],
    }[what]
    process = command(what, *named, "--json", *connection_options(broker))
    status = server.status("v-0", online=True)
    td = server.session
    td.subscribe(TOPICS.td("v-0"))
    described = server.wait(TOPICS.td("v-0"))
    assert described["tf:model"] == {"@id": f"urn:tinyfleet:model:{status.model.hex()}"}
    assert described["id"] == "urn:tinyfleet:home:v-0" and described["tf:arenaBytes"] > 0
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert json.loads(out.splitlines()[0]) == {"device": "v-0", "model": status.model.hex()}
    server.status("v-0", online=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--broker", "mqtt://127.0.0.1:{port}", "--insecure"], "no MQTT broker answers at mqtt://127.0.0.1:{port}"),
        (["--broker", "http://x"], "'http://x' is not a broker's address"),
        (["--task", "chess"], "there is no task named 'chess'"),
        (["--first-index", "3", "--fleet-size", "2"], "devices 3 to 3 are not in a fleet of 2; raise --fleet-size"),
        (["--prefix", "a/b"], "a device's name is 1 to 32 letters"),
        (["--fleet", "a b"], "a fleet's name is 1 to 32 letters"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(
    arguments: list[str], said: str, broker: Broker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nobody = free_port()
    if "--broker" not in arguments:
        arguments = [*arguments, *connection_options(broker)]
    monkeypatch.setattr(sys, "argv", ["tinyfleet", "device", "simulate", *(a.format(port=nobody) for a in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert err.startswith(f"error: {said.format(port=nobody)}") and err.count("\n") == 1


def test_something_else_than_a_broker_is_told_apart() -> None:
    class Closes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"220 mail here\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Closes) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        port = other.server_address[1]
        for background in (True, False):
            with pytest.raises(UserError, match="no MQTT broker answers"):
                Session(plain_broker(port), "x", on_message=lambda _topic, _payload: None, background=background)
        other.shutdown()


def test_the_brokers_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no server runs on"):
        find_broker(None, tmp_path)
    (tmp_path / "server.json").write_text('{"broker": "mqtts://10.0.0.1:1999", "endpoint": "http://x/sparql"}')
    assert find_broker(None, tmp_path) == BrokerAddress("10.0.0.1", 1999)
    assert find_broker("anna@[::1]:5", tmp_path) == BrokerAddress("::1", 5, username="anna")
    with pytest.raises(UserError, match="add --insecure"):
        find_broker("mqtt://localhost", tmp_path)
    assert find_broker("mqtt://localhost", tmp_path, insecure=True) == BrokerAddress("localhost", 1883, tls=False)
    with pytest.raises(UserError, match="not encrypted"):
        find_broker("mqtt://10.0.0.1", tmp_path, insecure=True)
    with pytest.raises(UserError, match="--password-file"):
        find_broker("mqtts://anna:secret@10.0.0.1", tmp_path)
    (tmp_path / "server.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        find_broker(None, tmp_path)


def test_a_device_survives_a_bug_in_its_learner(broker: Broker, server: Server) -> None:
    class Buggy(MoteLearner):
        def learn(self, x: Any, y: Any, rate: float) -> float:
            raise ZeroDivisionError("a bug")

    def node() -> Node:
        return Node("home", "one", {"title": "one"}, PROGRAM, DatasetStream(samples()), learner=Buggy)

    device = Device(node, broker, "home")
    device.start()
    server.online("one")
    server.broadcast(1, 1)
    for id in (1, 2):
        weights = Sha256.of(PROGRAM.initial(1).tobytes())
        phases = (Phase(ALL_LAYERS, 3, 0.1),)
        server.ask("one", TrainTask(id, "train", 1, 1, PROGRAM.model_id, 0, phases, 0, None, weights))
        assert server.result("one", id) == [Failure(id, ErrorCode.ENGINE, -1)]
    device.stop()
    assert device.join(30)


def test_an_idle_agent_imports_only_what_it_uses() -> None:
    """Each of these takes megabytes, or a second: on a Raspberry Pi that waits for work, for nothing."""
    code = """if True:
        import sys
        from tinyfleet.edge import cli, tasks
        from tinyfleet.edge.device import agent, device, node, sources
        task = tasks.load("digits")
        node.Node("home", "one", {}, task.program, sources.DatasetStream(task.client(0, 16)))
        unused = "cryptography fastapi flwr keras pandas pydantic pyoxigraph rdflib river scipy sklearn tensorflow"
        print(sorted({*unused.split()} & {*sys.modules}))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_device_that_dies_of_an_error_says_why_in_a_line_and_with_its_exit_code(
    server: Server, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    """Here the second start of a node fails, after a reboot; another device goes on."""
    device, other = mote(broker, "one"), mote(broker, "other")

    def fails() -> Node:
        raise OSError("no such sensor\n\x1b[2J")

    device._make_node = fails
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def reboot_one_then_stop() -> None:
        server.online("one", "other")
        server.ask("one", Reboot(1))
        assert device.join(30) and not other.join(0)
        other.stop()

    script = threading.Thread(target=reboot_one_then_stop)
    script.start()
    try:
        with pytest.raises(typer.Exit) as end:
            run_devices([device, other], as_json=True)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        script.join(30)
    assert end.value.exit_code == 1
    (said,) = (record.getMessage() for record in caplog.records if "has ended" in record.getMessage())
    assert said.startswith("one has ended: OSError: no such sensor") and said.isprintable()
    server.status("one", online=False)


def test_a_sensor_that_keeps_failing_does_not_fill_the_log(
    server: Server, broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def open(self, seed: int) -> None:
            pass

        def next(self, query: bool) -> None:
            raise OSError("no such sensor")

    device = Device(lambda: Node("home", "one", {"title": "one"}, PROGRAM, Broken()), broker, "home")
    device.start()
    server.status("one", online=True)
    server.broadcast(5, 1)
    for id in range(1, 11):
        server.ask("one", work(id, 1))
        assert isinstance(server.result("one", id)[0], Failure)
    device.stop()
    assert device.join(10)
    counts = [record.args[1] for record in caplog.records if "error in the source" in record.message]  # type: ignore[index]
    assert counts == [1, 2, 4, 8]
