"""A model given to devices over the air: whom it goes to, what they answer, what is lost, what is written down."""

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

import numpy as np
import pytest
from ontology_fixtures import description, payload, status

from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.device.node import Node
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, Board, thing_description
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, ReLU, Tanh, build
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build as firmware_build
from tinyfleet.firmware_tools.firmware import emulate
from tinyfleet.firmware_tools.gateway import Gateway
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import Store
from tinyfleet.ontology.vocabulary.namespaces import PROV, TF, board_iri, model_iri
from tinyfleet.server import deployment as deployments
from tinyfleet.server.fleet_server import FleetServer

ROOT = Path(__file__).parents[1]
LIMIT = 30.0
OLD = build([Dense(12), ReLU(), Dense(3)], (6,), "softmax_cross_entropy")
NEW = build([Dense(400), ReLU(), Dense(3)], (6,), "softmax_cross_entropy")
"""Some chunks, with the initial weights."""
NEW = build([Dense(400), ReLU(), Dense(3)], (6,), "softmax_cross_entropy", weights=NEW.split(NEW.initial(1)))


@pytest.fixture
def broker(own_broker: BrokerAddress) -> BrokerAddress:
    """Without a command service: the server that each test starts is one."""
    return own_broker


def samples() -> ClientData:
    random = np.random.default_rng(0)
    return ClientData.of([random.integers(0, 255, (12, 6), np.uint8) for _ in range(5)], 1 / 255, 3)


class News:
    """What a server says, and a wait for some of it."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._changed = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._changed:
            self._lines.add(line)
            self._changed.notify_all()

    def until(self, *lines: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(lines) <= self._lines, LIMIT), (lines, self._lines)


@pytest.fixture
def heard() -> News:
    return News()


@pytest.fixture
def server(tmp_path: Path, broker: BrokerAddress, heard: News) -> Iterator[FleetServer]:
    with FleetServer(tmp_path / "data", "home", broker=broker, on_log=heard) as server:
        yield server


@pytest.fixture
def start(heard: News, server: FleetServer) -> Iterator[Callable[[Device], Device]]:
    """Starts a device and waits until the graph knows it; it ends with the test."""
    with ExitStack() as stack:

        def begin(device: Device) -> Device:
            device.start()
            stack.callback(lambda: device.join(10))
            stack.callback(device.stop)
            heard.until(f"{device.node.id}: described", f"{device.node.id}: online")
            return device

        yield begin


TOPICS = Topics("home")
Start = Callable[[Device], Device]


def mote(broker: BrokerAddress, id: str, board: Board = VIRTUAL) -> Device:
    return virtual_device(broker, "home", id, OLD, samples(), board)


def agent(broker: BrokerAddress, id: str) -> Device:
    td = thing_description("home", id, VIRTUAL, "mote", "0.2.0", 100_000, OLD.model_id)
    return Device(lambda: Node("home", id, td, OLD, DatasetStream(samples()), learner=MoteLearner), broker, "home")


def plan(store: Store, program: Program = NEW, query: str | None = None) -> deployments.DeploymentPlan:
    return deployments.plan_deployment(store, program, "new", query or library.text("runnable"), "home")


def deploy(
    server: FleetServer, what: deployments.DeploymentPlan, program: Program = NEW, **more: object
) -> deployments.DeploymentResult:
    return deployments.deploy(
        server.store, program, what, broker=server.broker, fleet="home", selected_by="runnable", **more  # type: ignore[arg-type]
    )  # fmt: skip


def announce(server: FleetServer, id: str, online: bool = True, **changes: object) -> None:
    """A device that only the graph knows."""
    topics = Topics("home")
    assert server.registry.ingest_one(topics.td(id), payload(description(id, **changes))), (
        server.registry.last_rejection
    )
    assert server.registry.ingest_one(topics.status(id), status(model=OLD.model_id))
    if not online:
        assert server.registry.ingest_one(topics.status(id), status(online=False))


def test_devices_get_the_model_and_the_graph_says_so(
    server: FleetServer, broker: BrokerAddress, start: Start, heard: News
) -> None:
    devices = [start(mote(broker, "one")), start(mote(broker, "two")), start(agent(broker, "pi"))]
    what = plan(server.store)
    assert sorted(fit.device for fit in what.targets) == ["one", "pi", "two"] and what.excluded == {}
    assert what.running == dict.fromkeys(("one", "two", "pi"), OLD.model_id.hex())
    came: list[deployments.TargetResult] = []
    ended = deploy(server, what, on_result=came.append)
    assert ended.devices("confirmed") == ["one", "pi", "two"] and list(ended.results) == came
    assert all(device.node.model == NEW.model_id for device in devices)
    rows = server.store.query(library.text("deployments"), fleet="home")
    assert [(row["model"], row["targets"], row["confirmed"], row["silent"], row["selected"]) for row in rows] == [
        (model_iri(NEW.model_id), 3, 3, 0, "runnable")
    ]
    assert rows[0]["ended"] >= rows[0]["began"]  # type: ignore[operator]
    assert server.store.ask(f"ASK {{ <{ended.iri}> a <{PROV.Activity}> ; <{PROV.used}> <{model_iri(NEW.model_id)}> }}")
    with pytest.raises(UserError, match=r"no device is left to send it to: .*runs it already"):
        wait_for_graph(server, NEW)
        plan(server.store)


def test_a_model_on_trial_is_not_confirmed_and_a_device_that_comes_back_without_it_is_reported(
    server: FleetServer, broker: BrokerAddress, start: Start, heard: News
) -> None:
    device = start(mote(broker, "one"))
    ended = deploy(server, plan(server.store), trial=deployments.TrialConditions(probation=1_000_000))
    assert ended.devices("on trial") == ["one"] and ended.devices("confirmed") == []
    wait_for_graph(server, NEW)
    targets = library.text("deployment-targets")
    assert [row["outcome"] for row in server.store.query(targets, deployment=ended.iri)] == ["on trial"]
    assert [(row["id"], row["state"]) for row in server.store.query(library.text("trials"))] == [("one", "on trial")]
    device.stop()
    assert device.join(10)
    heard.until("one: offline")
    start(mote(broker, "one"))  # without a store: it has only the model that it was built with
    given, running = model_iri(NEW.model_id), model_iri(OLD.model_id)
    heard.until(
        f"one: was given {given} and does not run it any more: it runs {running} (tinyfleet query stale-models)"
    )
    assert [row["outcome"] for row in server.store.query(targets, deployment=ended.iri)] == ["replaced"]
    assert not server.store.query(library.text("trials"))


def wait_for_graph(server: FleetServer, program: Program) -> None:
    """Until the registry, which hears what the deployment hears, has written that all run it."""
    sparql = f"ASK {{ ?d <{TF.currentModel}> ?m FILTER(?m != <{model_iri(program.model_id)}>) }}"
    ready = threading.Event()
    end = threading.Timer(LIMIT, ready.set)
    end.start()
    while server.store.ask(sparql) and not ready.wait(0.02):
        pass
    end.cancel()
    assert not server.store.ask(sparql)


class Deaf(Node):
    """The C node behind a line that loses the first messages of each kind."""

    def __init__(self, *arguments: object, lose: dict[str, int], **more: object) -> None:
        super().__init__(*arguments, **more)  # type: ignore[arg-type]
        self.lose = lose

    def receive(self, topic: str, payload: bytes) -> None:
        kind = topic.split("/")[2]
        if self.lose.get(kind, 0) > 0:
            self.lose[kind] -= 1
        else:
            super().receive(topic, payload)


def deaf(broker: BrokerAddress, id: str, lose: dict[str, int]) -> Device:
    td = thing_description("home", id, VIRTUAL, "mote", "0.2.0", 65_536, OLD.model_id)
    return Device(lambda: Deaf("home", id, td, OLD, DatasetStream(samples()), lose=lose), broker, "home")


def test_what_is_lost_is_sent_again(
    server: FleetServer, broker: BrokerAddress, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order to one device, a chunk to another."""
    monkeypatch.setattr(deployments, "REPEAT", 0.2)
    lost = {"one": {"devices": 2}, "two": {"models": 3}}
    for id, lose in lost.items():
        start(deaf(broker, id, lose))
    ended = deploy(server, plan(server.store))
    assert ended.devices("confirmed") == ["one", "two"]
    assert lost == {"one": {"devices": 0}, "two": {"models": 0}}, "they were lost"


def test_a_device_that_cannot_and_one_that_does_not_answer(
    server: FleetServer, broker: BrokerAddress, start: Start
) -> None:
    start(mote(broker, "good"))
    td = thing_description("home", "full", VIRTUAL, "mote", "0.2.0", 65_536, OLD.model_id)
    full = start(
        Device(lambda: Node("home", "full", td, OLD, DatasetStream(samples()), model_slot_bytes=64), broker, "home")
    )
    announce(server, "ghost")
    ended = deploy(server, plan(server.store), timeout=2.0)
    results = {result.device: result for result in ended.results}
    assert results["good"].outcome == "confirmed"
    assert results["full"].outcome == "failed" and "it has too little memory for this" in results["full"].reason
    assert results["ghost"].outcome == "no answer" and results["ghost"].reason == "no answer within 2 s"
    assert full.node.model == OLD.model_id
    rows = server.store.query(library.text("deployment-targets"), deployment=ended.iri)
    assert {(row["id"], row["outcome"]) for row in rows} == {
        ("good", "confirmed"),
        ("full", "failed"),
        ("ghost", "no answer"),
    }


def test_a_deployment_that_is_cut_off_is_written_down(server: FleetServer, broker: BrokerAddress, start: Start) -> None:
    start(mote(broker, "good"))
    announce(server, "ghost")

    def interrupt(result: deployments.TargetResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(server, plan(server.store), on_result=interrupt)
    (row,) = server.store.query(library.text("deployments"))
    assert (row["targets"], row["confirmed"], row["silent"], "ended" in row) == (2, 1, 1, True)


def test_many_devices_a_few_at_a_time(
    server: FleetServer, broker: BrokerAddress, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments, "MAX_CONCURRENT", 3)
    for i in range(10):
        start(mote(broker, f"d-{i}"))
    ended = deploy(server, plan(server.store))
    assert ended.devices("confirmed") == sorted(f"d-{i}" for i in range(10))


def test_no_chunk_stays_at_the_broker(server: FleetServer, broker: BrokerAddress, start: Start) -> None:
    start(mote(broker, "one"))
    assert deploy(server, plan(server.store)).devices("confirmed") == ["one"]
    came: queue.Queue[tuple[str, bytes]] = queue.Queue()
    session = Session(broker, "looking", on_message=lambda topic, payload: came.put((topic, payload)))
    session.subscribe(TOPICS.program(NEW.model_id))
    session.publish(TOPICS.program(NEW.model_id, 0), b"the end")  # comes after whatever was retained
    assert came.get(timeout=30) == (TOPICS.program(NEW.model_id, 0), b"the end")
    session.close()


def test_who_is_left_out_and_why(server: FleetServer) -> None:
    announce(server, "fit")
    announce(server, "asleep", online=False)
    announce(server, "small", tf__arenaBytes=NEW.arena_bytes - 1)
    announce(server, "other", tf__engine="litert")
    announce(server, "full", tf__modelSlotBytes=len(NEW.data) - 1)
    announce(server, "built-in", tf__modelSlotBytes=0)
    announce(server, "unwanted")
    query = """PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id { ?d tf:deviceId ?id FILTER(?id != "unwanted") }"""
    extra = query.replace("SELECT ?id {", 'SELECT ?id { { BIND("stranger" AS ?id) } UNION {') + "}"
    room, takes = "model slot", f"{len(NEW.data):,}"
    what = plan(server.store, query=extra)
    assert [fit.device for fit in what.targets] == ["fit"]
    assert dict(what.excluded) == {
        "asleep": "is offline",
        "small": f"RAM to run: the model requires {NEW.arena_bytes:,} B, 1 more than the {NEW.arena_bytes - 1:,} B of "
        "the device",
        "other": "engine: the model requires mote, and the device has litert",
        "full": f"{room}: the model requires {takes} B, 1 more than the {len(NEW.data) - 1:,} B of the device",
        "built-in": f"{room}: the model requires {takes} B, {takes} more than the 0 B of the device",
        "unwanted": "the query does not select it",
        "stranger": "the graph knows no such device",
    }


def test_a_board_whose_flash_is_too_small_is_left_out(server: FleetServer) -> None:
    announce(server, "fit")
    server.store.write({board_iri("nano33ble"): {TF.flashBytes: len(NEW.data) - 10}})
    with pytest.raises(UserError, match=r"no device is left to send it to: fit: flash: the model requires .* 10 more"):
        plan(server.store)


def test_nobody_is_one_clear_line(server: FleetServer) -> None:
    with pytest.raises(UserError, match="knows no device of the fleet 'home'"):
        plan(server.store)
    for i in range(8):
        announce(server, f"d-{i}", online=False)
    with pytest.raises(UserError, match=r"d-0: is offline; .*; and 3 more$"):
        plan(server.store)
    with pytest.raises(UserError, match="a query that selects devices has a column"):
        plan(server.store, query="SELECT ?d { ?d ?p ?o }")
    with pytest.raises(UserError, match="which is not a device ID; use its tf:deviceId"):
        plan(server.store, query="SELECT (?d AS ?id) { ?d a <https://w3id.org/tinyfleet#Device> }")


# A board


@pytest.mark.skipif(
    not firmware_build.available() or not emulate.available(), reason="no cross compiler or no emulator"
)
def test_an_emulated_board_gets_the_model(
    server: FleetServer, broker: BrokerAddress, heard: News, tmp_path: Path
) -> None:
    first = build([Dense(24), ReLU(), Dense(3)], (6,), "softmax_cross_entropy")
    second = build([Dense(8), Tanh(), Dense(3)], (6,), "softmax_cross_entropy")
    large = build([Dense(64), ReLU(), Dense(3)], (6,), "softmax_cross_entropy")
    elf = firmware_build.build("mps2-an386", first, samples(), "home", "board", tmp_path / "firmware")
    stop = threading.Event()
    with emulate.Emulator(catalogue.load_board("mps2-an386"), elf) as emulator:
        gateway = Gateway(emulator.url, lambda *_: broker)
        thread = threading.Thread(target=gateway.run, args=(stop,), daemon=True)
        thread.start()
        try:
            heard.until("board: described", "board: online")
            with pytest.raises(UserError, match="board: RAM to run: the model requires"):
                plan(server.store, large)
            ended = deploy(server, plan(server.store, second), second)
        finally:
            stop.set()
            thread.join(LIMIT)
    assert [(result.device, result.outcome) for result in ended.results] == [("board", "confirmed")]
    assert server.store.query(library.text("deployment-targets"), deployment=ended.iri).column("outcome") == [
        "confirmed"
    ]


# As a user types it


def tinyfleet(*words: object, data: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tinyfleet", *map(str, words), "--data", str(data)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "COLUMNS": "160"}
    )


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Path]:
    """The data folder of a server that runs as a command, with two virtual devices of the task digits."""
    data = tmp_path / "data"

    def started(*words: object, until: Sequence[str]) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tinyfleet", *map(str, words), "--data", str(data)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        wait_for(process, until)
        return process

    def wait_for(process: "subprocess.Popen[str]", until: Sequence[str]) -> None:
        assert process.stdout is not None
        missing = set(until)
        for line in process.stdout:
            missing = {word for word in missing if word not in line}
            if not missing:
                return
        raise AssertionError(f"ended with {process.wait()} before it said {missing}")

    processes = [started("server", "start", "--port", 0, until=["ready"])]
    try:
        processes.insert(0, started("device", "simulate", "--devices", 2, until=["device-0", "device-1"]))
        wait_for(processes[-1], ["device-0: online", "device-1: online"])
        yield data
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)


def test_the_command(running: Path, tmp_path: Path) -> None:
    """Dry run, the real one, and the same again."""
    file, mine = tmp_path / "new.mote", tmp_path / "mine.rq"
    program = build([Dense(16), Tanh(), Dense(5)], (64,), "softmax_cross_entropy")
    file.write_bytes(program.data)
    dry = tinyfleet("deploy", file, data=running)
    assert dry.returncode == 0, dry.stderr
    assert (
        f"{file}: model {program.model_id.hex()}, {len(program.data):,} B, {program.arena_bytes:,} B of RAM"
        in dry.stdout
    )
    assert "2 to get it, 0 excluded" in dry.stdout and "Nothing was sent" in dry.stdout
    mine.write_text(
        'PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?id { ?d tf:deviceId ?id FILTER(?id != "device-1") }'
    )
    said = json.loads(tinyfleet("deploy", file, "--select", mine, "--json", data=running).stdout)
    assert said == {
        "model": f"urn:tinyfleet:model:{program.model_id.hex()}",
        "targets": ["device-0"],
        "excluded": {"device-1": "the query does not select it"},
    }
    one = tinyfleet("deploy", file, "--select", mine, "--yes", "--json", data=running)
    assert one.returncode == 0, one.stderr
    (result,) = json.loads(one.stdout)["results"]
    assert (result["device"], result["outcome"], result["reason"]) == ("device-0", "confirmed", "")
    rest = tinyfleet("deploy", file, "--yes", data=running)
    assert rest.returncode == 0, rest.stderr
    assert "device-0  runs it already" in rest.stdout and "device-1: confirmed after" in rest.stdout
    assert "1 confirmed, 0 failed, 0 no answer" in rest.stdout
    stale = tinyfleet("query", "deployments", "--json", data=running)
    assert [row["confirmed"] for row in json.loads(stale.stdout)] == [1, 1]
    again = tinyfleet("deploy", file, "--yes", data=running)
    assert again.returncode == 2 and "no device is left to send it to: device-0: runs it already" in again.stderr


def test_a_mistake_is_one_clear_line(running: Path, tmp_path: Path) -> None:
    good, other, large = tmp_path / "good.mote", tmp_path / "other.mote", tmp_path / "large.mote"
    good.write_bytes(OLD.data)
    large.write_bytes(build([Dense(9_000), ReLU(), Dense(5)], (64,), "softmax_cross_entropy").data)
    frozen = build([Dense(3)], (6,), "mse")
    other.write_bytes(build([Dense(3)], (6,), None, weights=frozen.split(frozen.initial(0))).data)
    no_id = tmp_path / "no-id.rq"
    no_id.write_text("SELECT ?d { ?d ?p ?o }")
    for words, reason in (
        ([tmp_path / "none.mote"], "there is no file"),
        ([__file__], "is not a program (these bytes are not a program"),
        ([other], "is not a program for a fleet"),
        ([large], "no device is left to send it to: device-0: RAM to run: the model requires"),
        ([good, "--select", "nonesuch"], "nor is it a query of the library"),
        ([good, "--select", no_id], "has a column ?id"),
        ([good, "--fleet", "other"], "lets this client not write or not read tinyfleet/other/"),
        ([good, "--broker", "http://nowhere"], "is not a broker's address"),
    ):
        done = tinyfleet("deploy", *words, data=running)
        assert (done.returncode, done.stdout) == (2, ""), (words, done.stderr)
        assert done.stderr.startswith("error: ") and reason in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = tinyfleet("deploy", good, data=tmp_path / "nowhere")
    assert done.returncode == 2 and "no server runs on" in done.stderr
