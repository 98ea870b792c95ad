"""Emulated boards in a fleet: behind a gateway, over noisy lines, through lost connections, and hostile."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from broker_fixtures import connection_options
from conftest import free_port, plain_broker, start_mosquitto
from firmware_fixtures import FLEET, ID, LIMIT, NEEDS_TOOLS, ROOT, TOPICS, mlp, samples
from plain_commands import plain

from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import layers
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Reboot, Sha256, TrainTask, UpdateFormat, UpdateModel
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Success, decode_reply, decode_status
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import emulate
from tinyfleet.firmware_tools.gateway import Gateway
from tinyfleet.server.deployment import manifest

pytestmark = NEEDS_TOOLS


class Observer:
    """A client of the broker that keeps what it hears."""

    def __init__(self, broker: BrokerAddress) -> None:
        self._heard: list[tuple[str, bytes]] = []
        self._news = threading.Condition()
        self.session = Session(broker, f"observer-{os.urandom(4).hex()}", on_message=self._receive)
        for topic in (TOPICS.td(ID), TOPICS.status(ID), TOPICS.reply(ID)):
            self.session.subscribe(topic)

    def _receive(self, topic: str, payload: bytes) -> None:
        with self._news:
            self._heard.append((topic, payload))
            self._news.notify_all()

    def wait(self, reached: Callable[[], bool], timeout: float = LIMIT) -> bool:
        """Until `reached`, looked at whenever a message arrives."""
        with self._news:
            return self._news.wait_for(reached, timeout)

    def said(self, topic: str) -> list[bytes]:
        return [payload for at, payload in list(self._heard) if at == topic]

    def online(self) -> bool | None:
        """What the last status said; None if there was none."""
        said = self.said(TOPICS.status(ID))
        return decode_status(said[-1]).online if said else None

    def forget(self) -> None:
        with self._news:
            self._heard.clear()

    def parts(self, order: int) -> dict[int, bytes]:
        """The parts of the reply to an order that have arrived."""
        found = {}
        for payload in self.said(TOPICS.reply(ID)):
            did = decode_reply(payload)
            if isinstance(did, Success) and did.id == order:
                found[did.part] = payload
        return found

    def replied(self, order: int) -> bool:
        parts = self.parts(order)
        return bool(parts) and len(parts) == decode_reply(next(iter(parts.values()))).parts  # type: ignore[union-attr]

    def ask(self, order: TrainTask, again: float) -> dict[int, bytes]:
        """Sends an order, and again whenever nothing new has come for so many seconds, as a server does."""
        payload = plain(order, nonce=bytes(8))
        for _ in range(int(LIMIT * 3 / again)):
            before = len(self._heard)
            self.session.publish(TOPICS.command(ID), payload)
            while self.wait(lambda: self.replied(order.id) or len(self._heard) > before, again):  # noqa: B023
                if self.replied(order.id):
                    return self.parts(order.id)
                before = len(self._heard)
        raise AssertionError(f"no reply to {order}; heard {[topic for topic, _ in self._heard]}")


@contextmanager
def joined(port: str, broker: BrokerAddress) -> Iterator[Gateway]:
    """A gateway between a serial line and a broker, once the board on it has announced itself."""
    gateway, stop = Gateway(port, lambda *_: broker), threading.Event()
    thread = threading.Thread(target=gateway.run, args=(stop,), daemon=True)
    thread.start()
    try:
        assert gateway.joined.wait(LIMIT)
        yield gateway
    finally:
        stop.set()
        thread.join(LIMIT)
        assert not thread.is_alive()


def order(number: int, density: float = 1.0, half: bool = False) -> TrainTask:
    return TrainTask(
        id=number,
        kind="train",
        run=9,
        round=number,
        model=mlp().model_id,
        seed=number,
        phases=(Phase(2, 10, 0.05), Phase(ALL_LAYERS, 40, 0.02)),
        query=8,
        update=UpdateFormat(ALL_LAYERS, half, density),
        weights=Sha256.of(mlp().initial(number).tobytes()),
    )


def weights_of(number: int) -> dict[str, bytes]:
    """The round's weights, as retained messages."""
    vector = mlp().initial(number)
    return {TOPICS.weights(9, number, i): chunk for i, chunk in enumerate(chunks(vector.tobytes()))}


def host_reply(work: TrainTask) -> list[bytes]:
    """What the C node on this machine replies, in order."""
    node = Node(FLEET, ID, {}, mlp(), DatasetStream(samples()), out_bytes=1024 + 128)
    node.connected()
    list(node.poll())
    node.receive(TOPICS.command(ID), plain(work))
    list(node.poll())
    for topic, payload in weights_of(work.round).items():
        node.receive(topic, payload)
        list(node.poll())
    said: list[bytes] = []
    busy = True
    while busy:
        busy = node.step()
        said += [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == TOPICS.reply(ID)]
    return said


def test_a_board_behind_a_gateway_learns_what_the_host_learns(
    firmware: Callable[[str], Path], broker: BrokerAddress
) -> None:
    observer = Observer(broker)
    with emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator:
        with joined(emulator.url, broker) as gateway:
            assert observer.wait(lambda: observer.online() is True)
            assert gateway.device == ID
            td = json.loads(observer.said(TOPICS.td(ID))[-1])
            assert td["tf:board"]["tf:mcu"] == "Cortex-M4F"
            assert td["tf:arenaBytes"] == mlp().arena_bytes

            for work in (order(1), order(2, density=0.2, half=True)):
                for topic, payload in weights_of(work.round).items():
                    observer.session.publish(topic, payload, retain=True)
                parts = observer.ask(work, again=LIMIT / 3)
                assert [parts[i] for i in range(len(parts))] == host_reply(work)

            observer.forget()
            observer.session.publish(TOPICS.command(ID), plain(Reboot(3), nonce=bytes(8)))
            assert observer.wait(lambda: bool(observer.said(TOPICS.td(ID))))  # it has announced itself again
            assert observer.wait(lambda: observer.online() is True)
            assert gateway.counters.damaged == gateway.counters.dropped == 0
        assert observer.wait(lambda: observer.online() is False)
    observer.session.close()


def test_a_board_takes_another_model_over_the_air(firmware: Callable[[str], Path], broker: BrokerAddress) -> None:
    small = layers.build([layers.Dense(8), layers.Tanh(), layers.Dense(5)], (64,), "softmax_cross_entropy")
    large = layers.build([layers.Dense(64), layers.Tanh(), layers.Dense(5)], (64,), "softmax_cross_entropy")
    observer = Observer(broker)
    for offered in (small, large):
        for i, chunk in enumerate(chunks(offered.data)):
            observer.session.publish(TOPICS.program(offered.model_id, i), chunk, retain=True)

    def adopt(number: int, offered: Program) -> None:
        order = UpdateModel(number, manifest(offered, number))
        observer.session.publish(TOPICS.command(ID), plain(order, nonce=bytes(8)))

    def runs(model: bytes) -> bool:
        said = observer.said(TOPICS.status(ID))
        return bool(said) and decode_status(said[-1]).model == model

    with (
        emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator,
        joined(emulator.url, broker),
    ):
        assert observer.wait(lambda: runs(mlp().model_id))
        adopt(1, large)  # which its arena has no room for
        assert observer.wait(lambda: bool(observer.said(TOPICS.reply(ID))))
        failed = decode_reply(observer.said(TOPICS.reply(ID))[-1])
        assert isinstance(failed, Failure)
        assert (failed.id, failed.error) == (1, ErrorCode.CAPACITY)
        adopt(2, small)
        assert observer.wait(lambda: runs(small.model_id))
    observer.session.close()


@contextmanager
def terminal(url: str) -> Iterator[str]:
    """A terminal device of this machine with a board's serial port behind it."""
    host, port = url.removeprefix("socket://").split(":")
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    with socket.create_connection((host, int(port))) as board:

        def up() -> None:
            with suppress(OSError):
                while data := board.recv(4096):
                    os.write(ours, data)

        def down() -> None:
            with suppress(OSError):
                while data := os.read(ours, 4096):
                    board.sendall(data)

        threads = [threading.Thread(target=work, daemon=True) for work in (up, down)]
        for thread in threads:
            thread.start()
        yield os.ttyname(theirs)
        os.close(theirs)
        board.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(LIMIT)
    os.close(ours)


def test_a_gateway_speaks_through_a_terminal_device(firmware: Callable[[str], Path], broker: BrokerAddress) -> None:
    observer = Observer(broker)
    with (
        emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator,
        terminal(emulator.url) as device,
        joined(device, broker) as gateway,
    ):
        work = order(6)
        for topic, payload in weights_of(work.round).items():
            observer.session.publish(topic, payload, retain=True)
        parts = observer.ask(work, again=LIMIT / 3)
        assert [parts[i] for i in range(len(parts))] == host_reply(work)
        assert gateway.counters.damaged == 0
    observer.session.close()


class Noise:
    """A line that damages what passes: between a gateway and a board's serial port. rate: errors a byte.

    cut() breaks the connection; the next one to come is carried on."""

    def __init__(self, url: str, rate: float) -> None:
        host, port = url.removeprefix("socket://").split(":")
        self._board = socket.create_connection((host, int(port)))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"socket://127.0.0.1:{self._listener.getsockname()[1]}"
        self.errors = 0
        self._rate = rate
        self._random = random.Random(5)
        self._client: socket.socket | None = None
        for work in (self._accept, self._up):
            threading.Thread(target=work, daemon=True).start()

    def _damaged(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            if self._random.random() >= self._rate:
                out.append(byte)
                continue
            self.errors += 1
            match self._random.randrange(3):
                case 0:
                    out.append(byte ^ 1 << self._random.randrange(8))
                case 1:
                    out += self._random.randbytes(self._random.randrange(1, 40))
                case _:
                    pass  # lost
        return bytes(out)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._client, _ = self._listener.accept()
                with suppress(OSError):  # cut
                    while data := self._client.recv(4096):
                        self._board.sendall(self._damaged(data))

    def _up(self) -> None:
        with suppress(OSError):  # closed
            while data := self._board.recv(4096):
                if self._client is not None:
                    with suppress(OSError):  # cut
                        self._client.sendall(self._damaged(data))

    def cut(self) -> None:
        assert self._client is not None
        self._client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self._board.close()


def test_noise_on_the_line_costs_time_and_nothing_else(firmware: Callable[[str], Path], broker: BrokerAddress) -> None:
    observer = Observer(broker)
    work = order(4)
    for topic, payload in weights_of(work.round).items():
        observer.session.publish(topic, payload, retain=True)
    with emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator:
        line = Noise(emulator.url, rate=1 / 4000)
        with joined(line.url, broker) as gateway:
            parts = observer.ask(work, again=1.0)
            assert [parts[i] for i in range(len(parts))] == host_reply(work)
            assert line.errors > 0
            assert gateway.counters.rejected == 0
        line.close()
    observer.session.close()


def test_a_board_comes_back_after_line_and_broker_were_lost(firmware: Callable[[str], Path], tmp_path: Path) -> None:
    port = free_port()
    mosquitto = start_mosquitto(tmp_path, port)
    observer = Observer(plain_broker(port))
    with emulate.Emulator(catalogue.load_board("mps2-an385"), firmware("mps2-an385")) as emulator:
        line = Noise(emulator.url, rate=0.0)
        with joined(line.url, plain_broker(port)):
            assert observer.wait(lambda: observer.online() is True)
            line.cut()
            assert observer.wait(lambda: observer.online() is False)
            assert observer.wait(lambda: observer.online() is True)

            mosquitto.kill()
            mosquitto.wait()
            observer.forget()
            mosquitto = start_mosquitto(tmp_path, port)
            assert observer.wait(lambda: observer.online() is True)  # nothing is retained: the board says it again
            work = order(5)
            for topic, payload in weights_of(work.round).items():
                observer.session.publish(topic, payload, retain=True)
            parts = observer.ask(work, again=LIMIT / 3)
            assert [parts[i] for i in range(len(parts))] == host_reply(work)
        line.close()
    observer.session.close()
    mosquitto.terminate()
    mosquitto.wait()


def test_the_commands_build_measure_and_run_a_board(broker: BrokerAddress, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn brings the digits")
    command = [sys.executable, "-m", "tinyfleet", "firmware"]
    choice = ["--task", "digits", "--client-index", "2", "--fleet-size", "3", "--device-id", ID, "--fleet", FLEET]
    built = subprocess.run(
        [*command, "build", "--board", "mps2-an500", *choice, "--out", tmp_path, "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    size = json.loads(built.stdout)
    assert size["arena"] == size["planned_arena"]
    assert size["flash"] == size["text"] + size["data"]
    observer = Observer(broker)
    start = [*command, "emulate", size["elf"], "--gateway", *connection_options(broker)]
    running = subprocess.Popen(start, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert observer.wait(lambda: observer.online() is True)
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=LIMIT)
    finally:
        running.kill()
    assert running.returncode == 0
    assert "socket://127.0.0.1:" in said
    assert observer.wait(lambda: observer.online() is False)
    observer.session.close()


def test_no_emulator_outlives_the_program_that_started_it(firmware: Callable[[str], Path]) -> None:
    code = (
        "import pathlib, sys\n"
        "from tinyfleet.firmware_tools.boards import catalogue\n"
        "from tinyfleet.firmware_tools.firmware import emulate\n"
        "board = emulate.Emulator(catalogue.load_board('mps2-an386'), pathlib.Path(sys.argv[1]))\n"
        "print(board.url, flush=True); board.wait()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, firmware("mps2-an386")], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    host, port = parent.stdout.readline().strip().removeprefix("socket://").split(":")
    with socket.create_connection((host, int(port)), timeout=LIMIT) as serial:
        parent.kill()
        parent.wait()
        with suppress(ConnectionResetError):
            while serial.recv(4096):
                pass  # what the board said before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def test_a_hostile_board_reaches_no_topic_but_its_own(broker: BrokerAddress) -> None:
    observer = Observer(broker)
    observer.session.subscribe("tinyfleet/#")
    other = Topics(FLEET).status("other")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gateway, stop = Gateway(f"socket://127.0.0.1:{listener.getsockname()[1]}", lambda *_: broker), threading.Event()
        thread = threading.Thread(target=gateway.run, args=(stop,), daemon=True)
        thread.start()
        line, _ = listener.accept()
        assert line.recv(4096)  # greeted: what arrives before the gateway has opened its end of the line is lost
        for frame in (
            serial_frames.Frame(serial_frames.PUBLISH, TOPICS.reply(ID), b"before any session"),
            serial_frames.Frame(serial_frames.HELLO, "tinyfleet/test/devices/+/status", b"a will on an invalid topic"),
            serial_frames.Frame(serial_frames.HELLO, "somewhere", b"else"),
            serial_frames.Frame(serial_frames.HELLO, TOPICS.status(ID), b"its will"),
            serial_frames.Frame(serial_frames.PUBLISH_RETAINED, other, b"another device's"),
            serial_frames.Frame(serial_frames.PUBLISH, "tinyfleet/test/devices/+/did", b"no topic"),
            serial_frames.Frame(serial_frames.SUBSCRIBE, "#"),
            serial_frames.Frame(serial_frames.SUBSCRIBE, Topics(FLEET).command("other")),
            serial_frames.Frame(serial_frames.SUBSCRIBE, "tinyfleet/test/runs/a#b"),
            serial_frames.Frame(99, TOPICS.reply(ID), b"no such kind"),
            serial_frames.Frame(serial_frames.PUBLISH, TOPICS.reply(ID), b"last"),
        ):
            line.sendall(serial_frames.encode(frame))
        assert observer.wait(lambda: observer.said(TOPICS.reply(ID)) == [b"last"])
        assert not observer.said(other)
        assert gateway.counters.rejected == 9
        line.close()
        assert observer.wait(lambda: observer.said(TOPICS.status(ID)) == [b"its will"])
        stop.set()
        thread.join(LIMIT)
    observer.session.close()


def test_a_line_or_broker_that_is_not_there_is_named(firmware: Callable[[str], Path]) -> None:
    nowhere = free_port()
    with pytest.raises(UserError, match=rf"cannot open the serial line socket://127\.0\.0\.1:{nowhere}"):
        Gateway(f"socket://127.0.0.1:{nowhere}", lambda *_: plain_broker(1883)).run(threading.Event())
    with pytest.raises(UserError, match=r"cannot open the serial line /dev/none"):
        Gateway("/dev/none", lambda *_: plain_broker(1883)).run(threading.Event())
    with (
        emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator,
        pytest.raises(UserError, match=rf"no MQTT broker answers at mqtt://127\.0\.0\.1:{nowhere}"),
    ):
        Gateway(emulator.url, lambda *_: plain_broker(nowhere)).run(threading.Event())
