"""An MQTT broker for one machine: mosquitto if it is installed, otherwise amqtt in this process."""

import asyncio
import contextlib
import logging
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Literal

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress

_PLACES = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin"


class Broker:
    """A running broker that accepts any client on this machine; loopback only. Use it in a `with`, or stop it.

    Parameters
    ----------
    port
        0 picks a free one.
    folder
        For its configuration.
    kind
        Which broker it must be. Default: mosquitto if it is installed.

    Raises
    ------
    UserError
        If the port is taken, or no broker is installed.
    """

    host = "127.0.0.1"

    def __init__(self, port: int, folder: Path, kind: Literal["mosquitto", "amqtt"] | None = None) -> None:
        self.port = _free_port(self.host, port)
        self._mosquitto: subprocess.Popen[str] | None = None
        self._amqtt: _Amqtt | None = None
        program = None
        if kind != "amqtt":
            program = shutil.which("mosquitto") or shutil.which("mosquitto", path=_PLACES)
        self.kind = "amqtt" if program is None else "mosquitto"
        if program is not None:
            self._mosquitto = _start_mosquitto(program, self.host, self.port, folder)
        elif kind == "mosquitto":
            raise UserError("mosquitto is not installed; apt-get install mosquitto")
        else:
            self._amqtt = _Amqtt(self.host, self.port)

    @property
    def address(self) -> BrokerAddress:
        """Where clients find it."""
        return BrokerAddress(self.host, self.port, tls=False)

    def __enter__(self) -> "Broker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the broker; its clients lose their connections."""
        if self._mosquitto is not None:
            self._mosquitto.terminate()
            self._mosquitto.wait()
        if self._amqtt is not None:
            self._amqtt.stop()


def _free_port(host: str, port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise _taken(host, port) from error
        return int(probe.getsockname()[1])


def _taken(host: str, port: int) -> UserError:
    return UserError(
        f"port {port} on {host} is taken; use the broker that listens there with --broker {host}:{port}, "
        "or another port with --port"
    )


def _start_mosquitto(program: str, host: str, port: int, folder: Path) -> "subprocess.Popen[str]":
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "mosquitto.conf"
    options = {
        "listener": f"{port} {host}",
        "allow_anonymous": "true",
        "persistence": "false",  # devices publish their retained messages again when they reconnect
        "max_queued_messages": "0",  # no limits: a round's parameters are many retained chunks at once
        "max_inflight_messages": "0",
        "set_tcp_nodelay": "true",
    }
    config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if " running" in line:
            break
    else:
        process.wait()
        if any("Address already in use" in line for line in lines):
            raise _taken(host, port)
        raise UserError(f"mosquitto did not start: {''.join(lines).strip()}")
    threading.Thread(target=process.stderr.read, name="mosquitto log", daemon=True).start()  # keeps its pipe empty
    return process


class _Amqtt:
    """amqtt on an event loop of its own, in a thread."""

    def __init__(self, host: str, port: int) -> None:
        try:
            from amqtt.broker import Broker as AmqttBroker  # type: ignore[import-untyped]
        except ImportError as error:
            raise UserError(
                "there is no MQTT broker on this machine; install mosquitto (apt-get install mosquitto), or one in "
                "pure Python (pip install 'tinyfleet[broker]'), or name one elsewhere with --broker mqtts://HOST:PORT"
            ) from error
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="broker", daemon=True)
        self._thread.start()

        async def begin() -> AmqttBroker:
            broker = AmqttBroker(
                {
                    "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
                    "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
                }
            )
            await broker.start()
            return broker

        self._broker = asyncio.run_coroutine_threadsafe(begin(), self._loop).result()

    def stop(self) -> None:
        with contextlib.suppress(Exception):  # its loop is stopped anyway
            asyncio.run_coroutine_threadsafe(self._broker.shutdown(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
