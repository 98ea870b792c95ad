"""The commands `tinyfleet server`."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import CONNECTION, DATA, CommandGroup, Connection, DataOption, FleetOption, with_connection
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import DEFAULT_FLEET, find_server, require_server

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

server_app = CommandGroup("""Run the fleet's server.

Examples:
  tinyfleet server start
  tinyfleet server init --root-key /media/stick/root-key.json
  tinyfleet server rotate-keys --root-key /media/stick/root-key.json
""")


@server_app.command("start")
@with_connection
def start_server(
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="The broker's port for devices; 0: a free one.")
    ] = 8883,
    operator_port: Annotated[
        int | None,
        typer.Option(
            "--operator-port",
            metavar="N",
            min=0,
            max=65535,
            help="The broker's port for operators; 0: a free one.",
            show_default="the next one",
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="ADDRESS", help="IP address to listen on; 0.0.0.0: all of this machine's."),
    ] = "127.0.0.1",
    host_name: Annotated[
        list[str] | None,
        typer.Option(
            "--host-name",
            metavar="NAME",
            help="Name or address by which others find this machine. Repeatable.",
            show_default="its own",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin", metavar="URL", help="Origin whose pages may use the API with a token. Repeatable."
        ),
    ] = None,
    connection: Connection = CONNECTION,
    http_port: Annotated[
        int,
        typer.Option("--http-port", metavar="N", min=0, max=65535, help="Port of the HTTP server; 0: a free one."),
    ] = 0,
    fleet: Annotated[str, typer.Option("--fleet", metavar="NAME", help="Fleet name.")] = DEFAULT_FLEET,
    data: DataOption = DATA,
) -> None:
    """Run the fleet's server until interrupted.

    It starts an MQTT broker that only the fleet's devices and operators may use, keeps the knowledge graph up to date
    with what devices report, and serves SPARQL, the query page and the W3C Thing Description Directory over HTTP. Other
    commands on this machine find it in the data folder; nothing listens on the network without --listen.

    Examples:
      tinyfleet server start
      tinyfleet server start --port 0 --fleet greenhouse --data greenhouse
      tinyfleet server start --listen 0.0.0.0 --host-name fleet.example
      tinyfleet server start --broker mqtts://me@10.0.0.5 --password-file secret
    """
    from tinyfleet.server.authority.fleet_keys import ROOT_KEY
    from tinyfleet.server.fleet_server import FleetServer

    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    address = None if connection.broker is None else connection.find(data, fleet)
    logging.getLogger("tinyfleet.ontology.ingest.registry").setLevel(logging.ERROR)  # rejections are printed below
    failures: list[str] = []

    def fail(reason: str) -> None:
        failures.append(reason)
        stopped.set()

    with FleetServer(
        data,
        fleet,
        broker=address,
        port=port,
        operator_port=operator_port,
        endpoint_port=http_port,
        listen=listen,
        host_names=host_name or (),
        cors_origins=cors_origin or (),
        insecure=connection.insecure,
        on_log=lambda line: typer.echo(line),
        on_failure=fail,
    ) as running:
        if (data / ROOT_KEY).exists():
            typer.echo(
                f"root key: move {data / ROOT_KEY} away from this machine; who has it commands the fleet", err=True
            )
        if connection.insecure:
            typer.echo("INSECURE: any program on this machine can control the fleet", err=True)
        typer.echo(f"broker:   {running.broker_kind} on {running.device_broker.url}")
        typer.echo(f"endpoint: {running.endpoint}")
        typer.echo(f"page:     {running.login_address()} (once; another: tinyfleet server login)")
        typer.echo(f"things:   {running.address}/things")
        typer.echo(f"ready: fleet '{fleet}', data in {data}")
        while not stopped.wait(1.0):  # a wait without a timeout would not let signals through everywhere
            pass
    if failures:
        typer.echo(f"tinyfleet: {failures[0]}", err=True)
        raise typer.Exit(1)
    typer.echo("stopped")


RootKeyOption = Annotated[
    Path,
    typer.Option("--root-key", metavar="FILE", help="The fleet's root key. Keep it where the server cannot read it."),
]


@server_app.command("init")
def init_server(root_key: RootKeyOption, data: DataOption = DATA) -> None:
    """Make a fleet's authority, and write its root key to a file once.

    Devices obey what the fleet's keys sign, and take others when the root key has signed them. Who takes the server
    does not get it. With a FILE that holds a root key already, the new server's keys are of the same root: its first
    `rotate-keys` makes the devices obey it.

    Examples:
      tinyfleet server init --root-key /media/stick/root-key.json
    """
    from tinyfleet.edge.wire import cose
    from tinyfleet.server.authority import fleet_keys
    from tinyfleet.server.authority.authority import Authority
    from tinyfleet.server.fleet_server import AUTHORITY

    folder = data / AUTHORITY
    if fleet_keys.FleetKeys.load(folder) is not None:
        raise UserError(f"there are keys in {folder} already; to change them: tinyfleet server rotate-keys")
    there = root_key.exists()
    key = fleet_keys.read_root_key(root_key) if there else fleet_keys.write_root_key(root_key)
    Authority(folder, root_key=cose.public_key(key)).close()
    typer.echo(f"authority: {folder}")
    typer.echo(f"root key:  {root_key}{' (it was there)' if there else ''}; keep it away from this machine, and a copy")


@server_app.command("rotate-keys")
def rotate_keys(root_key: RootKeyOption, fleet: FleetOption = None, data: DataOption = DATA) -> None:
    """Replace the fleet's keys; the root key signs the change.

    The next key becomes the current one, and a new next one is made. The root key signs that here; the running server
    gets the signature alone, and publishes it to all devices. Devices that are offline take it when they come back. If
    no server runs, the next one that starts publishes it; name the fleet then, unless it is home.

    Examples:
      tinyfleet server rotate-keys --root-key /media/stick/root-key.json
    """
    from tinyfleet.edge.wire import cose
    from tinyfleet.edge.wire.identity import call_server
    from tinyfleet.edge.wire.topics import Topics
    from tinyfleet.server.authority.fleet_keys import FLEET_KEYS, KeyChange, read_root_key
    from tinyfleet.server.fleet_server import AUTHORITY

    key, server = read_root_key(root_key), find_server(data)
    if not server and (data / AUTHORITY / FLEET_KEYS).exists():
        version = _rotate_on_disk(data / AUTHORITY, key, fleet or DEFAULT_FLEET)
        typer.echo(f"the fleet's keys have version {version} now; the server publishes them when it starts")
        return
    server = require_server(data)
    proposed = call_server(server, "GET", "/fleet-keys/proposed")
    current, next = (bytes.fromhex(proposed[name]) for name in ("current", "next"))
    payload = KeyChange(int(proposed["version"]), current, next).payload
    sealed = cose.sign1(payload, key, Topics(server["fleet"]).group_command("keys"))
    said = call_server(server, "POST", "/fleet-keys", {"sealed": sealed.hex()})
    typer.echo(f"the fleet's keys have version {said['version']} now")


def _rotate_on_disk(folder: Path, key: Ed25519PrivateKey, fleet: str) -> int:
    """Change the keys of an authority that no server uses now; returns their version."""
    from tinyfleet.edge.wire import cose
    from tinyfleet.edge.wire.topics import Topics
    from tinyfleet.server.authority.authority import Authority

    authority = Authority(folder)
    try:
        payload = authority.propose_keys().payload
        authority.change_keys(cose.sign1(payload, key, Topics(fleet).group_command("keys")), fleet)
        return authority.keys_version
    finally:
        authority.close()


@server_app.command("login")
def log_in(data: DataOption = DATA) -> None:
    """Print an address that logs a browser in to the server's page, once.

    Examples:
      tinyfleet server login
    """
    from tinyfleet.edge.wire.identity import call_server

    typer.echo(call_server(require_server(data), "POST", "/login-codes")["address"])
