"""The commands `tinyfleet device`: virtual devices, and who belongs to the fleet."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import typer

from tinyfleet.command_line import (
    CONNECTION,
    DATA,
    FLEET_SIZE,
    CommandGroup,
    Connection,
    DataOption,
    DevicesOption,
    FleetOption,
    JsonOption,
    TaskOption,
    with_connection,
)
from tinyfleet.edge.cli import run_devices
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import fleet_of, require_server

device_app = CommandGroup("""Run virtual devices, and say who belongs to the fleet.

Examples:
  tinyfleet device simulate --devices 4 --task digits
  tinyfleet device enrol kitchen
  tinyfleet device list
  tinyfleet device revoke kitchen
""")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the device, or of the operator.")]


@device_app.command()
@with_connection
def simulate(
    devices: DevicesOption = 1,
    first_index: Annotated[
        int, typer.Option("--first-index", metavar="N", min=0, help="Client index of the first device.")
    ] = 0,
    fleet_size: Annotated[int | None, FLEET_SIZE] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="NAME", help="Devices are called NAME-0, NAME-1, ...")
    ] = "device",
    task: TaskOption = "digits",
    connection: Connection = CONNECTION,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Run virtual microcontrollers until interrupted.

    They run the firmware's C code natively. Each has its own samples, thread and MQTT session. Without --fleet-size,
    the fleet ends with the last of them.

    Examples:
      tinyfleet device simulate
      tinyfleet device simulate --devices 12 --task omniglot
      tinyfleet device simulate --first-index 12 --devices 4 --fleet-size 16
    """
    from tinyfleet.edge import tasks
    from tinyfleet.edge.device.device import virtual_device
    from tinyfleet.edge.wire.errors import ProtocolError

    learning_task = tasks.load(task)
    indices = range(first_index, first_index + devices)
    size = fleet_size or indices.stop
    if indices.stop > size:
        raise UserError(f"devices {first_index} to {indices.stop - 1} are not in a fleet of {size}; raise --fleet-size")
    names = [f"{prefix}-{i}" for i in indices]
    connection.join(data, names)
    fleet_name = fleet_of(fleet, data)
    started = []
    try:
        brokers = connection.find_for_devices(names, data, fleet_name)
        for i, name, broker in zip(indices, names, brokers, strict=True):
            samples = learning_task.client(i, size)
            started.append(virtual_device(broker, fleet_name, name, learning_task.program, samples))
    except ProtocolError as error:
        raise UserError(str(error)) from error
    run_devices(started, as_json)


@device_app.command("enrol")
def enrol_device(
    name: NameArgument,
    count: Annotated[
        int | None,
        typer.Option("--count", metavar="N", min=1, max=10_000, help="One token for NAME-0 to NAME-(N-1)."),
    ] = None,
    role: Annotated[str, typer.Option("--role", metavar="ROLE", help="device or operator.")] = "device",
    expires: Annotated[
        str, typer.Option("--expires", metavar="TIME", help="How long the token can be used: 30m, 12h, 7d.")
    ] = "1h",
    replace: Annotated[
        bool, typer.Option("--replace", help="Enrol a device again that has an identity; the old one ends then.")
    ] = False,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Make a token with which a device, or an operator, joins the fleet once.

    The device makes its own private key when it uses the token. An operator may run, deploy and query from another
    machine. The token is shown once; anyone who has it can join under that name.

    Examples:
      tinyfleet device enrol kitchen
      tinyfleet device enrol sensor --count 12 --expires 7d
      tinyfleet device enrol anna --role operator
    """
    from tinyfleet.edge.wire.identity import open_token

    if role not in ("device", "operator"):
        raise UserError(f"there is no role '{role}'; choose device or operator")
    names = [name] if count is None else [f"{name}-{i}" for i in range(count)]
    token = open_token(require_server(data), names, role, life=_seconds(expires), replace=replace)
    if as_json:
        typer.echo(json.dumps({"names": names, "role": role, "token": token.text}))
        return
    start = f"tinyfleet {'agent start' if role == 'device' else 'run start'} --enrol TOKEN"
    if count is not None:
        start = f"tinyfleet device simulate --prefix {name} --devices {count} --enrol TOKEN"
    typer.echo(token.text)
    typer.echo(
        f"for {names[0] if count is None else f'{names[0]} to {names[-1]}'}, within {expires}: {start}", err=True
    )


@device_app.command("list")
def list_identities(data: DataOption = DATA, as_json: JsonOption = False) -> None:
    """List who belongs to the fleet: devices and operators, and until when.

    Examples:
      tinyfleet device list
      tinyfleet device list --json
    """
    from tinyfleet.edge.wire.identity import call_server

    rows: list[dict[str, Any]] = call_server(require_server(data), "GET", "/identities")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("nobody has joined yet; make a token with: tinyfleet device enrol NAME")
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        state = f"valid until {_day(row['expires'])}"
        if row["revoked"] is not None:
            state = f"revoked on {_day(row['revoked'])}"
        typer.echo(f"{row['name']:{width}}  {row['role']:8}  {state}")


@device_app.command("revoke")
def revoke_device(name: NameArgument, data: DataOption = DATA) -> None:
    """Put a device or an operator out of the fleet.

    At once: its open session ends, and it cannot connect again.

    Examples:
      tinyfleet device revoke kitchen
    """
    from tinyfleet.edge.wire.identity import call_server

    said = call_server(require_server(data), "DELETE", f"/identities/{name}")
    typer.echo(f"{said['role']} {name} is out")


@device_app.command("forget")
def forget_device(name: NameArgument, data: DataOption = DATA) -> None:
    """Remove a device for good.

    Its identity ends, with its session; its description and state leave the graph and the broker. What it took part in
    stays on record.

    Examples:
      tinyfleet device forget kitchen
    """
    from tinyfleet.edge.wire.identity import call_server

    call_server(require_server(data), "DELETE", f"/devices/{name}")
    typer.echo(f"device {name} is forgotten")


@device_app.command("reboot")
def reboot_device(name: NameArgument, data: DataOption = DATA) -> None:
    """Make a device start again.

    The command is signed, and expires after a minute.

    Examples:
      tinyfleet device reboot kitchen
    """
    from tinyfleet.edge.wire.identity import call_server

    call_server(require_server(data), "POST", f"/devices/{name}/commands/reboot")
    typer.echo(f"{name} is told to start again")


@device_app.command("reset")
def reset_device(name: NameArgument, data: DataOption = DATA) -> None:
    """Make a device forget the models and weights that it keeps.

    It runs the program that it was built with then. Its identity, its keys and its counters stay.

    Examples:
      tinyfleet device reset kitchen
    """
    from tinyfleet.edge.wire.identity import call_server

    call_server(require_server(data), "POST", f"/devices/{name}/commands/reset")
    typer.echo(f"{name} is told to forget what it keeps")


def _day(time: str) -> str:
    return datetime.fromisoformat(time).date().isoformat()


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
    try:
        return float(text[:-1]) * units[text[-1:]]
    except (KeyError, ValueError):
        raise UserError(f"'{text}' is not a time; write 30m, 12h or 7d") from None
