"""What the commands have in common: the form of their help, and the options that mean the same in several of them.

A command module imports only this and what needs no extra; everything else is imported inside the command, so that
`--help` is fast and works whatever is installed.
"""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import click
import typer
import typer.core
from typer.utils import get_params_from_function

from tinyfleet.edge.errors import UserError

if TYPE_CHECKING:
    from tinyfleet.edge.wire.broker_address import BrokerAddress


def _write_parameters(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    parameters = command.get_params(ctx)
    for title, kind in (("Arguments", click.Argument), ("Options", click.Option)):
        records = [parameter.get_help_record(ctx) for parameter in parameters if isinstance(parameter, kind)]
        # Typer escapes brackets for Rich, which doesn't format this help.
        rows = [(record[0], record[1].replace("\\[", "[")) for record in records if record]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


class Command(typer.core.TyperCommand):
    """A command whose docstring ends with a section `Examples:`, which is shown as it is, after the options."""

    def __init__(self, name: str | None, *, help: str | None = None, **settings: Any) -> None:
        about, _, self.examples = (help or "").partition("\n\nExamples:\n")
        super().__init__(name, help=about, **settings)
        declared = get_params_from_function(inspect.unwrap(settings["callback"]))
        for parameter in self.params:  # an argument's help: click 8.5's constructor overwrites typer 0.20's
            if isinstance(parameter, typer.core.TyperArgument):
                parameter.help = declared[str(parameter.name)].default.help

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless a number is not finite: comparisons with the ends of a range let NaN through."""
        for parameter in self.params:
            value = ctx.params.get(str(parameter.name))
            if isinstance(value, float) and not math.isfinite(value):
                raise click.BadParameter(f"{value} is not a finite number.", ctx, parameter)
        return super().invoke(ctx)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Nothing: they come with the options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_parameters(self, ctx, formatter)
        formatter.write(f"\nExamples:\n{self.examples.rstrip()}\n")


class Group(typer.core.TyperGroup):
    """A group of commands, with the help of `Command`; the error for an unknown command names the nearest one."""

    def __init__(self, *, help: str | None = None, **settings: Any) -> None:
        about, _, self.examples = (help or "").partition("\n\nExamples:\n")
        super().__init__(help=about, **settings)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_parameters(self, ctx, formatter)
        self.format_commands(ctx, formatter)
        formatter.write(f"\nExamples:\n{self.examples.rstrip()}\n")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, (command.help or "").split("\n")[0]) for name, command in commands.items() if command]
            )

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            nearest = difflib.get_close_matches(args[0], known, n=1)
            hint = f"did you mean '{nearest[0]}'?" if nearest else f"choose one of {', '.join(known)}."
            ctx.fail(f"there is no command '{args[0]}'; {hint}")
        return click.Group.resolve_command(self, ctx, args)


class CommandGroup(typer.Typer):
    """The commands of one noun, such as `tinyfleet model`.

    Parameters
    ----------
    help
        A summary, and a section `Examples:`.
    """

    def __init__(self, help: str) -> None:
        super().__init__(cls=Group, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
        self.callback()(lambda: None)  # else typer makes a group with one command into that command

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """As typer's, with the help of `Command`."""
        return super().command(name, cls=Command, **settings)


def as_command(function: Callable[..., None], name: str) -> click.Command:
    """A command that is in no group, from a function with typer's annotations."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, cls=Command)(function)
    return typer.main.get_command(app)


# Options. Where their type differs between commands, only the option itself is here.

DATA = Path(".tinyfleet")

FLEET = typer.Option("--fleet", metavar="NAME", help="Fleet name.", show_default="the running server's, else home")
FLEET_SIZE = typer.Option(
    "--fleet-size", metavar="N", min=1, help="Number of devices in the fleet, which share the task's samples."
)
DEVICE_ID = typer.Option("--device-id", metavar="ID", help="Device ID in the fleet.")
BOARD = typer.Option("--board", metavar="ID", help="Board ID; see `tinyfleet firmware boards`.")
MODEL = typer.Option("--model", metavar="MODEL", help="The model.")

FleetOption = Annotated[str | None, FLEET]
DataOption = Annotated[Path, typer.Option("--data", metavar="DIR", help="Data folder of the server on this machine.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task", metavar="NAME", help="Learning task; see `tinyfleet task list`. Or the path of a Python file."
    ),
]
ClientIndexOption = Annotated[
    int,
    typer.Option("--client-index", metavar="N", min=0, help="The device's number in the fleet: its share of samples."),
]
DevicesOption = Annotated[int, typer.Option("--devices", metavar="N", min=1, help="Number of virtual devices.")]
SlotOption = Annotated[
    int,
    typer.Option("--model-slot-bytes", metavar="N", min=0, help="RAM for a model sent over the air; 0 accepts none."),
]
RoundsOption = Annotated[int, typer.Option("--rounds", metavar="N", min=1, help="Number of rounds.")]
ClientsOption = Annotated[
    int, typer.Option("--clients-per-round", metavar="N", min=1, help="Devices that take part in each round.")
]
StrategyOption = Annotated[str, typer.Option("--strategy", metavar="NAME", help="Strategy; the names are above.")]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, max=2**32 - 1, help="Random seed of initial parameters, tasks and selection."
    ),
]
InitializationOption = Annotated[
    Path | None,
    typer.Option(
        "--initialization", metavar="FILE.npz", help="Initial parameters, as --out writes.", show_default="random"
    ),
]
SelectOption = Annotated[
    str,
    typer.Option("--select", metavar="QUERY", help="Devices: a SPARQL file with a column ?id, or a library query."),
]


@dataclass(frozen=True)
class Connection:
    """What the options say about the broker; see `with_connection`."""

    broker: Annotated[
        str | None,
        typer.Option(
            "--broker", metavar="URL", help="MQTT broker: mqtts://[USER@]HOST[:PORT].", show_default="the server's"
        ),
    ] = None
    ca: Annotated[
        Path | None,
        typer.Option(
            "--ca", metavar="FILE.pem", help="Authority of the broker's certificate.", show_default="the system's"
        ),
    ] = None
    cert: Annotated[
        Path | None, typer.Option("--cert", metavar="FILE.pem", help="Client certificate, for the broker.")
    ] = None
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE.pem", help="Private key of --cert.")] = None
    password_file: Annotated[
        Path | None,
        typer.Option(
            "--password-file",
            metavar="FILE",
            help="Password of the broker's user.",
            show_default="the variable TINYFLEET_BROKER_PASSWORD",
        ),
    ] = None
    enrolment: Annotated[
        str | None,
        typer.Option("--enrol", metavar="TOKEN", help="Join the fleet with a token of `tinyfleet device enrol`."),
    ] = None
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept a broker without encryption, on this machine only.")
    ] = False

    def join(self, data: Path, names: Sequence[str] = ()) -> None:
        """Use the enrolment token, if there is one: for these devices, else for the operator that it is for."""
        from tinyfleet.edge.wire.server_info import use_token

        if self.enrolment is not None:
            use_token(self.enrolment, data, names)

    def find(self, data: Path, fleet: str) -> BrokerAddress:
        """The broker for an operator; see `server_info.find_broker`. It is checked."""
        from tinyfleet.edge.wire.broker_check import check_operator
        from tinyfleet.edge.wire.server_info import find_broker

        found = find_broker(data=data, **asdict(self))
        check_operator(found, fleet)
        return found

    def find_for_devices(self, names: Sequence[str], data: Path, fleet: str) -> list[BrokerAddress]:
        """The broker for each of these devices; see `server_info.find_device_brokers`. It is checked for the first: the
        others are allowed the same, and hundreds may start at once."""
        from tinyfleet.edge.wire.broker_check import check_device
        from tinyfleet.edge.wire.server_info import find_device_brokers, keep_renewed

        found = find_device_brokers(names, data=data, **asdict(self))
        check_device(found[0], fleet, names[0])
        keep_renewed(names, data)
        return found


CONNECTION = Connection()


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Connection` in place of its parameter `connection`."""
    options = {field.name: field for field in fields(Connection)}
    hints = get_type_hints(Connection, include_extras=True)

    def called(**given: Any) -> None:
        command(connection=Connection(**{name: given.pop(name) for name in options}), **given)

    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in own.parameters.values():
        if parameter.name == "connection":
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters += [
                inspect.Parameter(name, keyword, default=field.default, annotation=hints[name])
                for name, field in options.items()
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    called.__name__, called.__doc__, called.__module__ = command.__name__, command.__doc__, command.__module__
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


def check_output(*files: Path | None) -> None:
    """Raise UserError for a file that could not be written at the end, before the work that makes it."""
    for file in filter(None, files):
        if not file.parent.is_dir():
            raise UserError(f"there is no folder {file.parent} to write {file.name} into; create it first")
        if file.is_dir():
            raise UserError(f"{file} is a folder; name a file")
        if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
            raise UserError(f"cannot write {file}: permission denied; choose another place")


def out_option(metavar: str) -> Any:
    """The option --out of a command that writes such a file or folder."""
    return typer.Option("--out", metavar=metavar, help="Where to write the result.")
