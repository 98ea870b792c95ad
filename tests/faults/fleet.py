"""A fleet of real processes whose members are killed, started again, and looked after: what must hold afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from conftest import free_port
from launcher import Point
from members import LIMIT, PROBE, TASK, TOPICS, Board, Probe
from proxy import Proxy

from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_broker, find_device_brokers, find_server
from tinyfleet.ontology.store.data_folder import remote_store
from tinyfleet.ontology.store.remote_store import RemoteStore
from tinyfleet.server.deployment import deploy, plan_deployment
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.named_strategies import make_strategy
from tinyfleet.server.training_run import run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OTHER = build([Dense(9), ReLU(), Dense(1)], (1,), "mse")
WORKERS = ("worker-0", "worker-1")
PREFIXES = """PREFIX tf: <https://w3id.org/tinyfleet#>
PREFIX prov: <http://www.w3.org/ns/prov#>
"""


class Command:
    """A command that is started again whenever it is killed, as a service manager does.

    Parameters
    ----------
    words
        The command line, after `tinyfleet`.
    folder
        For its output and its list of points.
    ready
        A regular expression for the line after which it counts as started.
    """

    def __init__(self, words: Sequence[str], folder: Path, ready: str) -> None:
        self.words = words
        self.points = folder / f"{words[0]}.points"
        self._ready = re.compile(ready)
        self.lines: list[str] = []
        self.killed_at: list[float] = []
        self.exit_codes: list[int] = []
        self._state = threading.Condition()
        self._kill: Point | None = None
        self._is_ready = self._stopping = False
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None

    def start(self, kill: Point | None = None) -> None:
        """Start it; it kills itself at that point. Returns when it is ready, or has been killed."""
        self._kill, self._is_ready, self._stopping = kill, False, False
        self.killed_at, self.exit_codes, self.lines = [], [], []
        self.points.write_text("")
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Until the process that runs now has said so."""
        with self._state:
            if not self._state.wait_for(lambda: self._is_ready or self._over, LIMIT) or self._over:
                raise AssertionError(f"{self.words} does not start: {self.lines[-5:]}, exit codes {self.exit_codes}")

    @property
    def _over(self) -> bool:
        return bool(self.exit_codes) and self.exit_codes[-1] != -signal.SIGKILL

    def kill(self) -> bool:
        """SIGKILL, now. False if it has ended."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._process.kill()
        return True

    def stop(self) -> None:
        """SIGTERM; returns when it has ended."""
        self._stopping = True
        if self._process is not None:
            self._process.terminate()
        assert self._thread is not None
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), f"{self.words} does not end"

    def join(self) -> int:
        """Wait until it ends by itself; its exit code."""
        assert self._thread is not None
        self._thread.join(2 * LIMIT)
        assert not self._thread.is_alive(), f"{self.words} does not end"
        return self.exit_codes[-1]

    def _supervise(self) -> None:
        while True:
            command = [sys.executable, str(HERE / "launcher.py"), "--points", str(self.points)]
            if self._kill is not None:
                command += ["--kill", str(self._kill)]
            self._process = subprocess.Popen(
                [*command, "--", *self.words],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
            if self._stopping:
                self._process.terminate()
            self._kill = None
            assert self._process.stdout is not None
            for line in self._process.stdout:
                with self._state:
                    self.lines.append(line.rstrip())
                    if self._ready.search(line):
                        self._is_ready = True
                        self._state.notify_all()
            code = self._process.wait()
            with self._state:
                self.exit_codes.append(code)
                if code == -signal.SIGKILL:
                    self.killed_at.append(time.monotonic())
                self._is_ready = False
                self._state.notify_all()
            if code != -signal.SIGKILL or self._stopping:
                return


@dataclasses.dataclass
class Outcome:
    """The result of one kill: whether the point was reached, and the seconds from there until all was well."""

    point: str
    reached: bool
    seconds: float
    complaints: list[str]


class Fleet:
    """A server, two virtual devices, a probe, and perhaps a device that is a process of its own. Use it in a `with`.

    Parameters
    ----------
    folder
        For the data and the output of the commands.
    target
        What will be killed: "server", "broker", "run", or the third device, "agent" or "gateway". With "links" nothing
        is; there is a proxy between the devices and the broker.
    """

    def __init__(self, folder: Path, target: str) -> None:
        log_level(40)
        self.folder, self.data = folder, folder / "data"
        ports = ["--port", str(free_port()), "--operator-port", str(free_port()), "--http-port", str(free_port())]
        more = ["--insecure"] if target == "broker" else []  # so that a proxy can read what passes
        self.server = Command(["server", "start", *ports, "--data", str(self.data), *more], folder, "^ready: ")
        self.guest: Command | None = None
        self.board: Board | None = None
        self.devices: list[Device] = []
        self.names = [*WORKERS]
        self.target = target
        if target in ("agent", "gateway"):
            self.names.append(target)
        self.proxy: Proxy | None = None
        self._packets: Counter[tuple[str, str]] = Counter()
        self._packet_order: list[Point] = []
        self._kill_broker_at: Point | None = None
        self._broker_killed_at = 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> Fleet:
        self.server.start()
        if self.target == "broker":
            self.proxy = Proxy(find_broker(None, self.data).port, on_packet=self._on_packet)
        elif self.target == "links":
            self.proxy = Proxy(BrokerAddress.parse(find_server(self.data)["device_broker"]).port)
        brokers = self._device_brokers(WORKERS)
        for index, (name, broker) in enumerate(zip(WORKERS, brokers, strict=True)):
            device = virtual_device(broker, "home", name, TASK.program, TASK.client(index, 4))
            device.start()
            self.devices.append(device)
        self.probe = Probe(self._device_brokers([PROBE])[0])
        if self.target in ("agent", "gateway"):
            self.guest = self._make_guest()
            self.guest.start()
        elif self.target == "run":
            select = self.folder / "select.rq"
            select.write_text(_selecting(self.names))
            words = ["run", "start", "--task", "sine", "--rounds", "2", "--clients-per-round", "2", "--json"]
            self.guest = Command([*words, "--select", str(select), "--data", str(self.data)], self.folder, "")
        return self

    def __exit__(self, *_: object) -> None:
        self.probe.close()
        for device in self.devices:
            device.stop()
        for device in self.devices:
            device.join(10)
        if self.guest is not None and self.target != "run":
            self.guest.stop()
        if self.proxy is not None:
            self.proxy.close()
        if self.board is not None:
            self.board.close()
        self.server.stop()

    def _make_guest(self) -> Command:
        kind, where = self.target, ["--data", str(self.data)]
        if kind == "agent":
            words = ["agent", "start", "--device-id", kind, "--task", "sine", "--client-index", "2", *where]
            return Command(words, self.folder, " is up ")
        self.board = Board(kind)
        return Command(["gateway", "start", "--port", self.board.port, *where], self.folder, "is part of the fleet")

    def broker(self) -> BrokerAddress:
        """Where an operator finds the broker now."""
        broker = find_broker(None, self.data)
        return broker if self.target == "links" else self._through_proxy(broker)

    def _device_brokers(self, names: Sequence[str]) -> list[BrokerAddress]:
        return [self._through_proxy(each) for each in find_device_brokers(names, None, self.data)]

    def _through_proxy(self, broker: BrokerAddress) -> BrokerAddress:
        return broker if self.proxy is None else dataclasses.replace(broker, port=self.proxy.port)

    def store(self) -> RemoteStore:
        """The server's graph."""
        return remote_store(find_server(self.data))

    # What happens

    def history(self) -> list[str]:
        """Devices announce themselves, learn, get another program and the old one back, change and leave. Returns what
        went wrong on the way, as it does while something is dead."""
        steps: list[Callable[[], object]] = [
            self.probe.learn,
            self.round,
            lambda: self.deploy(OTHER, self.names[-1]),
            lambda: self.deploy(TASK.program, self.names[-1]),
            self.probe.change,
            lambda: self.probe.set_online(False),
            lambda: self.probe.set_online(True),
            self.probe.learn,
        ]
        wrong = []
        for step in steps:
            try:
                step()
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            self.probe.flush()
        return wrong

    def round(self) -> list[str]:
        """One round with all devices that learn; the names of those that took part."""
        count = len(self.names)
        strategy = make_strategy("fedavg", TASK, rounds=1, clients=count, seed=0)
        with self.store() as store:
            ended = run(
                TASK, strategy, broker=self.broker(), fleet="home", store=store, rounds=1, query=_selecting(self.names),
                clients=count, wait=10.0, timeout=15.0,
            )  # fmt: skip
        return [each.device for each in ended.rounds[0].participations]

    def deploy(self, program: Program, name: str) -> None:
        """Send a program to one device."""
        with self.store() as store:
            sparql = _selecting([name])
            plan = plan_deployment(store, program, f"model-{program.model_id.hex()}", sparql, "home")
            deploy(store, program, plan, broker=self.broker(), fleet="home", selected_by=sparql, timeout=15.0)

    # What must hold

    def settle(self) -> list[str]:
        """Wait until all is well; what is not in time. Repairs nothing but the program of a device that was killed
        between two deployments."""
        end = time.monotonic() + LIMIT
        while True:
            try:
                complaints = self._complaints()
            except Exception as error:  # the server is on its way
                complaints = [f"{type(error).__name__}: {error}"]
            if not complaints or time.monotonic() > end:
                return complaints
            time.sleep(0.1)

    def _complaints(self) -> list[str]:
        with self.store() as store:
            state = {
                str(row["id"]): row
                for row in store.query(
                    PREFIXES
                    + """SELECT ?id ?online ?samples ?model ?title { ?d a tf:Device ; tf:deviceId ?id .
                    OPTIONAL { ?d tf:online ?online } OPTIONAL { ?d tf:samplesLearned ?samples }
                    OPTIONAL { ?d tf:currentModel ?model }
                    OPTIONAL { ?d <https://www.w3.org/2019/wot/td#title> ?title } }"""
                )
            }
            unfinished = store.query(
                PREFIXES
                + """SELECT ?a ?type { ?a a ?type ; prov:startedAtTime ?t FILTER(?type IN (tf:Run, tf:Deployment))
                FILTER NOT EXISTS { ?a prov:endedAtTime ?e } }"""
            )
        wrong = [f"{name} is not in the graph" for name in (*self.names, PROBE) if name not in state]
        if wrong:
            return wrong
        wrong += [f"{name} is not online" for name in self.names if state[name].get("online") is not True]
        probe = state[PROBE]
        if probe.get("online") is not self.probe.online:
            wrong.append(f"the probe's state is {probe.get('online')}, not {self.probe.online}")
        if probe.get("samples") != self.probe.samples:
            wrong.append(f"the probe has learned {self.probe.samples} samples, and the graph says {probe}")
        if probe.get("title") != f"Probe {self.probe.version}":
            wrong.append(f"the probe's description is the old one: {probe}")
        wrong += [f"{row['a']} has no end" for row in unfinished]
        if wrong:
            return wrong
        for name in self.names:
            if not str(state[name].get("model")).endswith(TASK.program.model_id.hex()):
                self.deploy(TASK.program, name)
                return [f"{name} ran another program"]
        wrong += [f"{topic} is retained, and nobody drives it" for topic in self.left()]
        if not wrong and sorted(part := self.round()) != sorted(self.names):
            wrong.append(f"only {part} took part in a round")
        return wrong

    def left(self) -> list[str]:
        """Topics of retained messages that belong to no device's state."""
        came: queue.Queue[str] = queue.Queue()
        marker = TOPICS.command("marker")
        session = Session(self.broker(), "looking", on_message=lambda topic, _: came.put(topic))
        topics = set()
        with contextlib.closing(session):
            session.subscribe("tinyfleet/#")
            session.publish(marker, b"")
            with contextlib.suppress(queue.Empty):
                while (topic := came.get(timeout=5)) != marker:
                    topics.add(topic)
        known = {topic(name) for name in (*self.names, PROBE) for topic in (TOPICS.td, TOPICS.status)}
        return sorted(topics - known - {"tinyfleet/home/time"})

    def processes(self) -> list[str]:
        """Command lines of the processes that have this fleet's folder in theirs."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                with contextlib.suppress(OSError):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if str(self.folder) in words:
                        found.append(words)
        return found

    # Kills

    def points(self) -> list[Point]:
        """The points of a history, each before and after, in their order."""
        if self.target == "broker":
            self._packets.clear()
            self._packet_order.clear()
            self.history()
            return list(self._packet_order)
        target = self._command()
        if self.target == "run":
            target.start()
            assert target.join() == 0, target.lines
        else:
            target.stop()
            target.start()
            self.history()
            target.stop()  # what it does at its end counts, too
        seen = [Point.parse(line) for line in target.points.read_text().splitlines()]
        if self.target != "run":
            target.start()
        return [point._replace(when=when) for point in seen for when in ("before", "after")]

    def kill_at(self, point: Point) -> Outcome:
        """Have the target killed there while the history happens, and see what is left."""
        if self.target == "broker":
            return self._kill_broker(point)
        target = self._command()
        wrong = []
        if self.target == "run":
            target.start(point)
            if (code := target.join()) != 0:
                wrong.append(f"the second run ended with {code}: {target.lines[-3:]}")
        else:
            target.stop()
            target.start(point)
            self.history()
            if not target.killed_at:  # a point at its end
                target.stop()
                killed_at = target.killed_at
                target.start()
                target.killed_at = killed_at
        return self._outcome(str(point), target.killed_at[0] if target.killed_at else None, wrong)

    def kill_randomly(self, times: int, seed: int) -> list[Outcome]:
        """Kill the target at random moments, while devices report and rounds run without pause."""
        chance, outcomes = random.Random(seed), []
        for number in range(times):
            if self.target == "run":
                self._command().start()
            loading = threading.Thread(target=self.history)
            loading.start()
            for _ in range(chance.randint(1, 1500)):
                self.probe.learn()
                if chance.random() < 0.2:
                    self.probe.flush()
            killed_at: float | None = time.monotonic()
            if self.target == "broker":
                self._end_broker()
            elif self._command().kill():
                pass
            else:
                killed_at = None
            loading.join()
            wrong = []
            if self.target == "run" and (code := self._command().join()) != 0:
                wrong.append(f"the second run ended with {code}: {self._command().lines[-3:]}")
            outcomes.append(self._outcome(f"random {number}", killed_at, wrong))
        return outcomes

    def _outcome(self, point: str, killed_at: float | None, wrong: list[str]) -> Outcome:
        began = time.monotonic()
        complaints = wrong + self.settle()
        seconds = 0.0 if killed_at is None else time.monotonic() - (began if self.target == "run" else killed_at)
        return Outcome(point, killed_at is not None, seconds, complaints)

    def _command(self) -> Command:
        if self.target == "server":
            return self.server
        assert self.guest is not None
        return self.guest

    def _kill_broker(self, point: Point) -> Outcome:
        with self._lock:
            self._packets.clear()
            self._kill_broker_at, self._broker_killed_at = point, 0.0
        self.history()
        self._kill_broker_at = None
        return self._outcome(str(point), self._broker_killed_at or None, [])

    def _on_packet(self, when: str, kind: str) -> None:
        with self._lock:
            self._packets[when, kind] += 1
            point = Point(kind, self._packets[when, kind], when)
            self._packet_order.append(point)
            if point == self._kill_broker_at:
                self._kill_broker_at, self._broker_killed_at = None, time.monotonic()
                self._end_broker()

    def _end_broker(self) -> None:
        number = int((self.data / "broker" / "mosquitto.pid").read_text())
        if str(self.folder).encode() in Path(f"/proc/{number}/cmdline").read_bytes():  # no other with its old number
            os.kill(number, signal.SIGKILL)


def _selecting(names: Sequence[str]) -> str:
    listed = " ".join(f"'{name}'" for name in names)
    return f"SELECT ?id {{ VALUES ?id {{ {listed} }} }}"
