"""Firmware on emulated boards: what is built, what it computes, and how it takes part in a fleet."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import tty
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port, start_mosquitto
from small_models import MODELS

from tinyfleet.edge._mote import lib
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import layers
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote.build_extension import INCLUDES
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.messages import (
    ALL_LAYERS,
    ErrorCode,
    Failure,
    Phase,
    Reboot,
    Success,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    decode_reply,
    decode_status,
    encode,
)
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate, stack
from tinyfleet.firmware_tools.firmware.size import FirmwareSize, read_size
from tinyfleet.firmware_tools.gateway import Gateway
from tinyfleet.server.fleet_server import FleetServer

ROOT = Path(__file__).parents[1]
BOARDS = ["mps2-an385", "mps2-an386", "mps2-an500"]
FLEET, ID = "test", "board-01"
TOPICS = Topics(FLEET)
STATE = 40  # bytes of mote_t on a 32-bit target
LIMIT = 30.0  # seconds that anything may take on a busy machine

pytestmark = [
    pytest.mark.skipif(
        not build.available(), reason="no cross compiler: apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"
    ),
    pytest.mark.skipif(not emulate.available(), reason="no emulator: apt-get install qemu-system-arm"),
]


def samples() -> ClientData:
    """Six classes of ten made-up samples, 64 features each."""
    features = np.random.default_rng(1).integers(0, 256, (60, 64), np.uint8)
    return ClientData(features, np.arange(0, 61, 10, dtype=np.uint32), 1 / 255, 5)


def mlp() -> Program:
    return layers.build([layers.Dense(32), layers.ReLU(), layers.Dense(5)], (64,), "softmax_cross_entropy")


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The firmware of one device for a board, built once."""
    built: dict[str, Path] = {}

    def get(board: str) -> Path:
        if board not in built:
            built[board] = build.build(board, mlp(), samples(), FLEET, ID, tmp_path_factory.mktemp(board))
        return built[board]

    return get


# ----------------------------------------------------------------------------------------------- what is built


@pytest.mark.parametrize("board", BOARDS)
def test_firmware_fits_its_board_and_the_arena_is_the_planned_one(board: str, firmware: Callable[[str], Path]) -> None:
    size = read_size(firmware(board))
    target = catalogue.load_board(board).buildable()
    assert size.board == board
    assert size.arena == size.planned_arena == mlp().arena_bytes
    assert size.held["program"] == len(mlp().data)
    assert size.held["features"] == 60 * 64
    assert 10_000 < size.flash < target.flash.bytes
    assert size.arena < size.ram < target.ram.bytes


def test_firmware_uses_neither_malloc_nor_stdio(firmware: Callable[[str], Path]) -> None:
    done = subprocess.run(["arm-none-eabi-nm", firmware("mps2-an386")], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    assert "mote_learn" in names
    assert not names & {"malloc", "_malloc_r", "free", "_sbrk", "printf", "puts", "_write", "exit"}


def test_an_image_holds_the_operators_that_its_program_needs(tmp_path: Path) -> None:
    target, net = catalogue.load_board("mps2-an386"), mlp()
    elf = build.build_benchmark(target, net, tmp_path / "bench.elf", steps=1)
    names = subprocess.run(["arm-none-eabi-nm", elf], capture_output=True, text=True, check=True).stdout
    assert "mote_dense_back" in names and "mote_relu" in names
    assert not {"mote_conv2d", "mote_int8_dense", "mote_tanh", "mote_huber"} & set(names.split())
    size = read_size(elf)
    assert size.mote.keys() >= {"mote.c", "mote_load.c", "mote_dense.c"}
    assert sum(size.mote.values()) < size.text - len(net.data)


def test_a_device_that_keeps_its_model_is_smaller(firmware: Callable[[str], Path], tmp_path: Path) -> None:
    kept = build.build("mps2-an386", mlp(), samples(), FLEET, ID, tmp_path, model_slot_bytes=0)
    assert read_size(kept).text < read_size(firmware("mps2-an386")).text - 10_000


def whole_image(board: str, profile: build.Profile, elf: Path) -> FirmwareSize:
    """Of an image with all operators that the engine has."""
    sources = [build.SOURCES / "main_bench.c", build.SOURCES / "bench_mote.c", build.SOURCES / "semihost.c"]
    target, net = catalogue.load_board(board), mlp()
    defines = {"arena_bytes": net.arena_bytes, "inputs": 64, "outputs": 5, "steps": 1}
    build.link(target, elf, [*sources, *build.ENGINE], blobs={"program": net.data}, defines=defines, profile=profile)
    return read_size(elf)


@pytest.mark.parametrize("board", ["microbit", "mps2-an385", "mps2-an386"])
@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_what_the_engine_takes_beyond_its_arena_is_bounded(profile: build.Profile, board: str, tmp_path: Path) -> None:
    """Of any model: with all operators that the engine has, its state and its stack take at most 512 bytes."""
    size = whole_image(board, profile, tmp_path / "whole.elf")
    assert set(size.depths) == {"mote_load", "mote_infer", "mote_loss", "mote_learn", "mote_learn_with"}
    assert {"mote_conv2d_back", "mote_int8_conv2d"} <= set(size.frames)
    assert {name: depth for name, depth in size.depths.items() if depth.bytes + STATE > 512} == {}
    assert size.static == 0


@pytest.mark.parametrize("model", ["mlp", "cnn", "separable", "int8_with_head", "quantised_training"])
def test_an_image_takes_the_planned_arena_and_little_beside_it(model: str, tmp_path: Path) -> None:
    """Read from the linked image: the arena is the plan's, to the byte; the engine's state, what variables of its own
    it has (none) and the deepest of its calls take at most 512 bytes. That is all of the RAM but the bench's own."""
    net = MODELS[model]()
    elf = build.build_benchmark(catalogue.load_board("mps2-an386"), net, tmp_path / "bench.elf", steps=1)
    size = read_size(elf)
    assert size.arena == size.planned_arena == net.arena_bytes
    symbols = subprocess.run(["arm-none-eabi-nm", "-S", elf], capture_output=True, text=True, check=True).stdout
    (state,) = (int(row[1], 16) for line in symbols.splitlines() if (row := line.split())[2:] == ["b", "m"])
    assert 0 < state <= STATE
    assert size.static == 0
    deepest = max(depth.bytes for depth in size.depths.values())
    assert 0 < state + size.static + deepest <= 512
    sample = 4 * net.input.size + 4 * net.output.size
    assert size.data + size.bss <= net.arena_bytes + state + sample + 64  # a few counters of the bench's


@pytest.mark.parametrize(
    ("core", "board"),
    [("M0", "microbit"), ("M3", "mps2-an385"), ("M4F, M7F, M33", "mps2-an386"), ("M55", "mps3-an547")],
)
def test_the_stack_is_at_most_what_the_document_says(core: str, board: str, tmp_path: Path) -> None:
    """No recursion, no arrays of variable length (the build fails), no call to who knows where: all is summed up."""
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "reference" / "engine.md").read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    column = next(row for row in cells if row[0] == "stack in bytes").index(core)
    stated = {row[0].strip("`"): int(row[column]) for row in cells if row[0].startswith("`mote_")}
    depths = whole_image(board, "exact", tmp_path / "whole.elf").depths
    assert stated.keys() == depths.keys()
    for name, depth in depths.items():
        assert depth.bytes <= stated[name], f"{name}: {depth.calls}; change docs/reference/engine.md, or the code"


def test_the_state_is_40_bytes(tmp_path: Path) -> None:
    source = tmp_path / "state.c"
    source.write_text(f'#include "mote.h"\ntypedef char state[sizeof(mote_t) == {STATE} ? 1 : -1];\nstate s;\n')
    command = ["arm-none-eabi-gcc", "-mcpu=cortex-m0", "-mthumb", f"-I{INCLUDES[0]}", "-c", source]
    subprocess.run([*command, "-o", tmp_path / "state.o"], check=True)


def test_recursion_pointers_and_frames_of_unknown_size_are_found(tmp_path: Path) -> None:
    source = tmp_path / "deep.c"
    for body, why in (
        ("int mote_load(int n) { return n ? mote_load(n - 1) * n + mote_load(n / 2) : 1; }", "mote_load calls itself"),
        ("int use(char *); int mote_load(int n) { char a[n]; return use(a); }", "frame of mote_load has no known size"),
        ("int mote_load(int (*f)(int)) { return f(1) + 1; }", "mote_load calls through a pointer that can be anything"),
    ):
        source.write_text(body)
        command = ["arm-none-eabi-gcc", "-O2", stack.FLAG, "-c", source, "-o", tmp_path / "deep.o"]
        subprocess.run(command, check=True)
        with pytest.raises(ValueError, match=why):
            stack.usage([tmp_path / "deep.ci"], [])


def test_a_training_step_is_counted_in_instructions() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "instructions.py", "--json", "--models", "MLP", "conv"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    rows = {(row["model"], row["profile"]): row for row in json.loads(done.stdout)["rows"]}
    exact, fast = (rows["MLP 64-32-10", profile] for profile in ("exact", "fast"))
    assert exact["beyond_parameters"] == 296
    assert 5_000 < exact["infer"] < exact["learn_least"] < exact["learn"] < exact["learn_most"] < 26_500
    assert fast["learn"] < 20_000
    assert exact["mote_text"] <= 6 * 1024
    assert exact["learn"] / exact["infer"] < 2.2
    conv = rows["conv 3x3x8, max pool, dense 10 on 12x12", "fast"]
    assert conv["learn"] < 60_000
    assert exact["reference"] > exact["learn"] and conv["reference"] > conv["learn"]


# ------------------------------------------------------------------------------------------------ in a fleet


class Observer:
    """A client of the broker that keeps what it hears."""

    def __init__(self, broker: tuple[str, int]) -> None:
        self._heard: list[tuple[str, bytes]] = []
        self._news = threading.Condition()
        self.session = Session(*broker, f"observer-{os.urandom(4).hex()}", on_message=self._receive)
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
        for _ in range(int(LIMIT * 3 / again)):
            before = len(self._heard)
            self.session.publish(TOPICS.command(ID), encode(order))
            while self.wait(lambda: self.replied(order.id) or len(self._heard) > before, again):  # noqa: B023
                if self.replied(order.id):
                    return self.parts(order.id)
                before = len(self._heard)
        raise AssertionError(f"no reply to {order}; heard {[topic for topic, _ in self._heard]}")


@contextmanager
def joined(port: str, broker: tuple[str, int]) -> Iterator[Gateway]:
    """A gateway between a serial line and a broker, once the board on it has announced itself."""
    gateway, stop = Gateway(port, broker), threading.Event()
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
    node.receive(TOPICS.command(ID), encode(work))
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
    firmware: Callable[[str], Path], broker: tuple[str, int]
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
            observer.session.publish(TOPICS.command(ID), encode(Reboot(3)))
            assert observer.wait(lambda: bool(observer.said(TOPICS.td(ID))))  # it has announced itself again
            assert observer.wait(lambda: observer.online() is True)
            assert gateway.counters.damaged == gateway.counters.dropped == 0
        assert observer.wait(lambda: observer.online() is False)
    observer.session.close()


def test_a_board_takes_another_model_over_the_air(firmware: Callable[[str], Path], broker: tuple[str, int]) -> None:
    small = layers.build([layers.Dense(8), layers.Tanh(), layers.Dense(5)], (64,), "softmax_cross_entropy")
    large = layers.build([layers.Dense(64), layers.Tanh(), layers.Dense(5)], (64,), "softmax_cross_entropy")
    observer = Observer(broker)
    for offered in (small, large):
        for i, chunk in enumerate(chunks(offered.data)):
            observer.session.publish(TOPICS.program(offered.model_id, i), chunk, retain=True)

    def adopt(number: int, offered: Program) -> None:
        order = UpdateModel(number, offered.model_id, len(offered.data), zlib.crc32(offered.data))
        observer.session.publish(TOPICS.command(ID), encode(order))

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
        assert (failed.id, failed.error, failed.detail) == (1, ErrorCode.PROGRAM, lib.MOTE_ERR_ARENA)
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


def test_a_gateway_speaks_through_a_terminal_device(firmware: Callable[[str], Path], broker: tuple[str, int]) -> None:
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


def test_noise_on_the_line_costs_time_and_nothing_else(
    firmware: Callable[[str], Path], broker: tuple[str, int]
) -> None:
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
    observer = Observer(("127.0.0.1", port))
    with emulate.Emulator(catalogue.load_board("mps2-an385"), firmware("mps2-an385")) as emulator:
        line = Noise(emulator.url, rate=0.0)
        with joined(line.url, ("127.0.0.1", port)):
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


def test_the_commands_build_measure_and_run_a_board(broker: tuple[str, int], tmp_path: Path) -> None:
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
    assert size["arena"] == size["plan"]
    assert size["flash"] == size["text"] + size["data"]
    observer = Observer(broker)
    start = [*command, "emulate", size["elf"], "--gateway", "--broker", f"{broker[0]}:{broker[1]}"]
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


# ------------------------------------------------------------------------------------------------ bad input


def test_an_unknown_board_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no board named 'uno'.*microbit, mps2-an385, mps2-an386"):
        catalogue.load_board("uno")


def test_a_board_without_firmware_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no firmware is built for board 'raspberry-pi-4'.*mps2-an386"):
        build.build("raspberry-pi-4", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(
        UserError, match=r"no driver for that of board 'microbit'; boards with one: mps2-an385, mps2-an3"
    ):
        build.build("microbit", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(UserError, match=r"there is no emulator for board 'raspberry-pi-4'"):
        emulate.Emulator(catalogue.load_board("raspberry-pi-4"), tmp_path / "none.elf")


def test_a_damaged_board_file_is_refused_with_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    good = (catalogue.FOLDER / "mps2-an386.toml").read_text()
    path.write_text(good.replace("ram_bytes = 4_194_304", 'ram_bytes = "4 MB"'))
    with pytest.raises(UserError, match=r"x\.toml: 'ram_bytes' must be a int.*'4 MB'"):
        catalogue.read_board_file(path)


@pytest.mark.parametrize(("fleet", "id"), [("home/garden", ID), (FLEET, "#"), (FLEET, "")])
def test_a_name_that_cannot_be_in_a_topic_is_refused(fleet: str, id: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name is 1 to 32 letters"):
        build.build("mps2-an386", mlp(), samples(), fleet, id, tmp_path)


def test_a_missing_compiler_or_emulator_is_named_with_its_package(
    firmware: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elf = firmware("mps2-an386")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"):
        build.build("mps2-an386", mlp(), samples(), FLEET, ID, tmp_path)
    with pytest.raises(UserError, match=r"apt-get install qemu-system-arm"):
        emulate.Emulator(catalogue.load_board("mps2-an386"), elf)


def test_a_program_larger_than_the_board_is_refused_by_how_much(tmp_path: Path) -> None:
    data = ClientData(np.zeros((12, 1000), np.uint8), np.arange(0, 13, 2, dtype=np.uint32), 1.0, 5)
    large = layers.build([layers.Dense(1100), layers.ReLU(), layers.Dense(5)], (1000,), "softmax_cross_entropy")
    with pytest.raises(UserError, match=r"too large for board 'mps2-an386'.* [\d,]+ bytes more RAM than its 4,194,304"):
        build.build("mps2-an386", large, data, FLEET, ID, tmp_path)
    many = ClientData(np.zeros((70_000, 64), np.uint8), np.array([0, 35_000, 70_000], np.uint32), 1.0, 2)
    with pytest.raises(UserError, match=r" [\d,]+ bytes more flash than its 4,194,304"):
        build.build("mps2-an386", mlp(), many, FLEET, ID, tmp_path)


def test_samples_of_another_size_than_the_model_takes_are_refused(tmp_path: Path) -> None:
    other = layers.build([layers.Dense(5)], (32,), "softmax_cross_entropy")
    with pytest.raises(UserError, match=r"the samples have 64 features and the model takes 32"):
        build.build("mps2-an386", other, samples(), FLEET, ID, tmp_path)


def test_what_is_not_firmware_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "readme.txt"
    text.write_text("hello")
    for path in (text, Path("/bin/sh"), tmp_path / "nothing.elf"):
        with pytest.raises(UserError, match=r"tinyfleet firmware build"):
            read_size(path)


def test_a_hostile_board_reaches_no_topic_but_its_own(broker: tuple[str, int]) -> None:
    observer = Observer(broker)
    observer.session.subscribe("tinyfleet/#")
    other = Topics(FLEET).status("other")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        gateway, stop = Gateway(f"socket://127.0.0.1:{listener.getsockname()[1]}", broker), threading.Event()
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


def test_the_known_boards_go_into_the_graph(tmp_path: Path) -> None:
    with FleetServer(tmp_path, "test", port=0) as server:
        words = ["-m", "tinyfleet", "firmware", "boards", "--add-to-graph", "--json", "--data", str(tmp_path)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
        assert {board["id"] for board in json.loads(done.stdout)} == set(catalogue.board_ids())
        rows = server.store.query(
            "PREFIX tf: <https://w3id.org/tinyfleet#> SELECT ?ram { ?b tf:boardId 'mps2-an386' ; tf:ramBytes ?ram }"
        )
        assert rows.column("ram") == [4_194_304]


def test_a_line_or_broker_that_is_not_there_is_named(firmware: Callable[[str], Path]) -> None:
    nowhere = free_port()
    with pytest.raises(UserError, match=rf"cannot open the serial line socket://127\.0\.0\.1:{nowhere}"):
        Gateway(f"socket://127.0.0.1:{nowhere}", ("127.0.0.1", 1883)).run(threading.Event())
    with pytest.raises(UserError, match=r"cannot open the serial line /dev/none"):
        Gateway("/dev/none", ("127.0.0.1", 1883)).run(threading.Event())
    with (
        emulate.Emulator(catalogue.load_board("mps2-an386"), firmware("mps2-an386")) as emulator,
        pytest.raises(UserError, match=rf"no MQTT broker answers at 127\.0\.0\.1:{nowhere}"),
    ):
        Gateway(emulator.url, ("127.0.0.1", nowhere)).run(threading.Event())
