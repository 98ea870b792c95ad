"""The fleet's MQTT broker: mosquitto, or without security also amqtt in this process."""

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import make_private_folder, write_private
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.server import broker_config
from tinyfleet.server.authority.authority import Authority
from tinyfleet.server.authority.identities import Role
from tinyfleet.server.mosquitto import Mosquitto, find_program

LOOPBACK = "127.0.0.1"


class Secured(NamedTuple):
    """What a secured broker needs.

    Attributes
    ----------
    authority
        Whose identities it lets in.
    fleet
        The fleet's name.
    operator_port
        TCP port of the listener for operators; 0 picks a free one.
    listen
        IP address to listen on. Default: this machine only.
    """

    authority: Authority
    fleet: str
    operator_port: int = 0
    listen: str = "127.0.0.1"


class Broker:
    """A running broker. Use it in a `with`, or stop it.

    Parameters
    ----------
    port
        TCP port, of the listener for devices if it is secured; 0 picks a free one.
    folder
        For its configuration.
    secured
        Who may do what. Without it, any client on this machine may do anything, and no other machine can connect.
    kind
        Which broker it must be. Default: mosquitto if it is installed; amqtt, which cannot be secured, otherwise.
    on_failure
        Called with the reason if mosquitto dies and cannot be started again.

    Attributes
    ----------
    kind : str
        "mosquitto" or "amqtt".
    address, device_address : BrokerAddress
        Where this process's own clients find it; where devices find it, without a certificate of theirs.
    mosquitto : Mosquitto or None
        Its process, if that is the kind.

    Raises
    ------
    UserError
        If a port is taken, or no broker is installed.
    """

    def __init__(
        self,
        port: int,
        folder: Path,
        *,
        secured: Secured | None = None,
        kind: Literal["mosquitto", "amqtt"] | None = None,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        listen = LOOPBACK if secured is None else secured.listen
        make_private_folder(folder)
        Mosquitto.kill_left_over(folder)  # before its ports are looked at
        port = _free_port(listen, port)
        self._secured = secured
        self._folder = folder
        self.mosquitto: Mosquitto | None = None
        self._amqtt: _Amqtt | None = None
        program = None if kind == "amqtt" else find_program()
        self.kind = "amqtt" if program is None else "mosquitto"
        if secured is None:
            self.address = self.device_address = BrokerAddress(LOOPBACK, port, tls=False)
            options = broker_config.plain(LOOPBACK, port, as_root=os.geteuid() == 0)
        else:
            operator_port = _free_port(listen, secured.operator_port)
            certificate, key = secured.authority.client_files
            reached = LOOPBACK if ipaddress.ip_address(listen).is_unspecified else listen
            ca = secured.authority.ca_file
            self.address = BrokerAddress(reached, operator_port, ca=ca, cert=certificate, key=key)
            self.device_address = BrokerAddress(reached, port, ca=ca)
            options = broker_config.secured(
                listen, port, operator_port, secured.authority, self._acl_file, as_root=os.geteuid() == 0
            )
            self._write_access_list()
        if program is not None:
            self.mosquitto = Mosquitto(program, options, folder, on_failure)
        elif kind == "mosquitto" or secured is not None:
            raise UserError(
                "mosquitto is not installed; apt-get install mosquitto. Without it there is only --insecure, with "
                "amqtt: no encryption, no identities, for this machine alone"
            )
        else:
            self._amqtt = _Amqtt(LOOPBACK, port)
        if secured is not None:
            secured.authority.on_change(self._reload, self._end_sessions)

    @property
    def _acl_file(self) -> Path:
        return self._folder / "access"

    def _write_access_list(self) -> None:
        assert self._secured is not None
        server, operators = self._secured.authority.broker_users()
        write_private(self._acl_file, broker_config.access_list(self._secured.fleet, server, operators))

    def _reload(self) -> None:
        """Identities have changed: mosquitto reads who may do what, and who is revoked, once more."""
        self._write_access_list()
        if self.mosquitto is not None:
            self.mosquitto.reload()

    def _end_sessions(self, name: str, role: Role) -> None:
        """End a revoked device's session by opening one with its name: mosquitto lets a session that is open go on. An
        operator's goes on too, but without the access list it can neither write nor read anything."""
        if role == "operator" or self._secured is None:
            return
        key, certificate = self._secured.authority.takeover(name)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            files = Path(folder) / "key", Path(folder) / "certificate"
            write_private(files[0], key)
            write_private(files[1], certificate)
            with contextlib.suppress(UserError):  # no broker, no session
                Session(dataclasses.replace(self.device_address, key=files[0], cert=files[1]), name).close()

    def __enter__(self) -> "Broker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stops the broker; its clients lose their connections."""
        if self.mosquitto is not None:
            self.mosquitto.stop()
        if self._amqtt is not None:
            self._amqtt.stop()


def _free_port(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise UserError(f"only root may listen on port {port}; choose one above 1023 with --port") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"{host} is not an address of this machine; choose another with --listen") from error
            raise UserError(
                f"port {port} on {host} is taken; is a server of yours running already? Choose another with --port "
                "or --operator-port"
            ) from error
        return int(probe.getsockname()[1])


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
