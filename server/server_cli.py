"""The commands `tinyfleet server`."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Annotated

import typer

from tinyfleet.command_line import CONNECTION, DATA, CommandGroup, Connection, DataOption, with_connection
from tinyfleet.edge.wire.server_info import DEFAULT_FLEET, require_server

server_app = CommandGroup("""Run the fleet's server.

Examples:
  tinyfleet server start
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


@server_app.command("login")
def log_in(data: DataOption = DATA) -> None:
    """Print an address that logs a browser in to the server's page, once.

    Examples:
      tinyfleet server login
    """
    from tinyfleet.edge.wire.identity import call_server

    typer.echo(call_server(require_server(data), "POST", "/login-codes")["address"])
