"""What many tests share: a real broker on a free loopback port, and fixtures that more than one file uses."""

import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from directory_fixtures import Here

# tflite-runtime only opens an interpreter in a process that imported it before tensorflow, whichever test comes first.
with contextlib.suppress(ImportError):
    import tflite_runtime.interpreter  # noqa: F401

settings.register_profile("tinyfleet", deadline=None)  # a busy machine is no error
settings.load_profile("tinyfleet")


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_mosquitto(folder: Path, port: int) -> "subprocess.Popen[str]":
    """Starts mosquitto and returns once it takes connections."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    config = folder / "mosquitto.conf"
    options = [f"listener {port} 127.0.0.1", "allow_anonymous true", "persistence false", "max_queued_messages 0"]
    config.write_text("\n".join([*options, "set_tcp_nodelay true", ""]))
    broker = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.PIPE, text=True)
    assert broker.stderr is not None
    for line in broker.stderr:
        if " running" in line:
            break
    else:
        raise RuntimeError(f"mosquitto ended with {broker.wait()}")
    threading.Thread(target=broker.stderr.read, daemon=True).start()  # a full pipe must not stop it
    return broker


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """(host, port) of a fresh mosquitto without authentication or persistence."""
    port = free_port()
    process = start_mosquitto(tmp_path, port)
    yield "127.0.0.1", port
    process.terminate()
    process.wait()


@pytest.fixture
def directory() -> Iterator["Here"]:
    """A Thing Description Directory that is served in this process, and a client of it."""
    from directory_fixtures import open_directory  # only here: it needs the graph's packages

    with open_directory() as here:
        yield here
