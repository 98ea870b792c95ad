"""The server keeps its broker running, takes it along when it dies, and says so when it cannot go on."""

import os
import queue
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.server import mosquitto
from tinyfleet.server.broker import Broker
from tinyfleet.server.broker_config import MAX_PACKET

pytestmark = pytest.mark.skipif(mosquitto.find_program() is None, reason="mosquitto is not installed")
TIMEOUT = 20


def pid_of_broker(folder: Path) -> int:
    return int((folder / "mosquitto.pid").read_text())


def test_the_broker_is_started_again_on_the_same_port(tmp_path: Path) -> None:
    connected = threading.Semaphore(0)
    with Broker(0, tmp_path) as broker:
        session = Session(broker.address, "a", on_connect=connected.release)
        assert connected.acquire(timeout=TIMEOUT)
        os.kill(pid_of_broker(tmp_path), signal.SIGKILL)
        assert connected.acquire(timeout=TIMEOUT)
        session.close()
        assert broker.mosquitto is not None and broker.mosquitto.restarts == 1
    assert not (tmp_path / "mosquitto.pid").exists()


def test_a_broker_that_cannot_be_started_again_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosquitto, "RETRY", (0.01, 0.01))
    failed, reasons = threading.Event(), []

    def on_failure(reason: str) -> None:
        reasons.append(reason)
        failed.set()

    with Broker(0, tmp_path, on_failure=on_failure):
        (tmp_path / "mosquitto.conf").write_text("no such option\n")
        os.kill(pid_of_broker(tmp_path), signal.SIGKILL)
        assert failed.wait(TIMEOUT)
    assert "does not start again" in reasons[0] and "\n" not in reasons[0]


def start_server(data: Path, *options: str) -> "tuple[subprocess.Popen[str], str]":
    """A server process, and its broker's address."""
    command = [sys.executable, "-m", "tinyfleet", "server", "start", "--insecure", "--data", str(data), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said, address = [], ""
    for line in process.stdout:
        said.append(line)
        if line.startswith("broker:"):
            address = line.split()[-1]
        if line.startswith("ready"):
            return process, address
    raise AssertionError("".join(said))


def test_a_killed_server_takes_its_broker_along_and_the_same_command_starts_again(tmp_path: Path) -> None:
    server, address = start_server(tmp_path, "--port", "0")
    port = address.rsplit(":", 1)[-1]
    server.kill()
    server.wait()
    server, again = start_server(tmp_path, "--port", port)  # without the kernel's help: what is left over is killed
    assert again == address
    server.terminate()
    assert server.wait(TIMEOUT) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process together with its parent")
def test_the_kernel_ends_the_broker_of_a_killed_server(tmp_path: Path) -> None:
    server, _ = start_server(tmp_path, "--port", "0")
    broker = os.pidfd_open(pid_of_broker(tmp_path / "broker"))
    server.kill()
    server.wait()
    poll = select.poll()
    poll.register(broker)
    assert poll.poll(1000 * TIMEOUT)  # readable once the process has ended
    os.close(broker)


def test_a_broker_that_was_left_over_is_killed(tmp_path: Path) -> None:
    with Broker(0, tmp_path) as broker:
        config = tmp_path / "mosquitto.conf"
        text = config.read_text().replace(str(broker.address.port), "0")
    config.write_text(text.replace("listener 0", f"listener {broker.address.port}"))
    command = [str(mosquitto.find_program()), "-c", str(config)]
    left_over = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert left_over.stderr is not None and any(" running" in line for line in left_over.stderr)
    (tmp_path / "mosquitto.pid").write_text(str(left_over.pid))
    with Broker(broker.address.port, tmp_path):
        assert left_over.wait(TIMEOUT) == -signal.SIGKILL


def test_a_server_whose_broker_cannot_be_started_again_ends_with_exit_code_1(tmp_path: Path) -> None:
    server, _ = start_server(tmp_path, "--port", "0")
    (tmp_path / "broker" / "mosquitto.conf").write_text("no such option\n")
    os.kill(pid_of_broker(tmp_path / "broker"), signal.SIGKILL)
    output, _ = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "does not start again" in output.splitlines()[-1] and "Traceback" not in output


def test_who_sends_a_packet_that_is_too_large_is_disconnected_and_nobody_else(tmp_path: Path) -> None:
    arrived: queue.Queue[bytes] = queue.Queue()
    lost = threading.Event()
    with Broker(0, tmp_path) as broker:
        listener = Session(broker.address, "listener", on_message=lambda _, payload: arrived.put(payload))
        listener.subscribe("t")
        sender = Session(broker.address, "sender", on_lost=lost.set)
        sender.publish("t", bytes(65_536))
        assert arrived.get(timeout=TIMEOUT) == bytes(65_536)
        sender.send([Message("t", bytes(MAX_PACKET + 1))])
        assert lost.wait(TIMEOUT)
        sender.close()
        other = Session(broker.address, "other")
        other.publish("t", b"after it")
        assert arrived.get(timeout=TIMEOUT) == b"after it"
        other.close()
        listener.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use any port")
def test_a_port_that_only_root_may_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only root may listen on port 1; choose one above 1023"):
        Broker(1, tmp_path)
