"""The `tinyfleet` command. Each folder brings its own commands, imported only when one of them is called."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import NamedTuple

import click
import typer

import tinyfleet
from tinyfleet.command_line import Group, as_command
from tinyfleet.edge.errors import UserError, printable
from tinyfleet.output import protect_output


class Entry(NamedTuple):
    """Where a command is (its module's attribute is a typer app, or a function), and the extras it always needs."""

    module: str
    attribute: str
    summary: str
    extras: tuple[str, ...] = ()


COMMANDS = {
    "demo": Entry("server.cli", "demo", "Run a whole fleet on this machine.", ("edge", "firmware", "server")),
    "server": Entry("server.server_cli", "server_app", "Run the fleet's server.", ("server",)),
    "run": Entry("server.cli", "run_app", "Train a model with the fleet, or by simulation.", ("edge", "server")),
    "deploy": Entry("server.cli", "deploy", "Send a model to the devices that a query selects.", ("server",)),
    "agent": Entry("edge.cli", "agent_app", "Run this machine as a device that learns.", ("edge",)),
    "device": Entry("edge.device_cli", "device_app", "Run virtual devices, and enrol devices.", ("edge",)),
    "gateway": Entry("firmware_tools.cli", "gateway_app", "Connect boards on serial lines to the fleet.", ("gateway",)),
    "task": Entry("edge.cli", "task_app", "Show what a fleet can learn."),
    "model": Entry("firmware_tools.model_cli", "app", "Compile, describe, export and match models.", ("firmware",)),
    "firmware": Entry("firmware_tools.cli", "app", "Build firmware for a board, and emulate it.", ("firmware",)),
    "graph": Entry("ontology.graph_cli", "app", "Fill the knowledge graph from files.", ("server",)),
    "query": Entry("ontology.cli", "query", "Ask the knowledge graph a question.", ("server",)),
}

MODULE_EXTRAS = {
    "edge": ("sklearn", "pooch", "PIL", "soundfile", "pandas", "river", "tflite_runtime", "ai_edge_litert"),
    "gateway": ("serial", "cobs"),
    "firmware": ("elftools", "tflite", "zcbor"),
    "keras": ("keras", "tensorflow", "jax"),
    "broker": ("amqtt",),
}
"""The extra that brings a module. What is in none of them comes with `server`."""


class Commands(Group):
    """The commands of COMMANDS, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(f"tinyfleet.{entry.module}"), entry.attribute)
        command = typer.main.get_command(found) if isinstance(found, typer.Typer) else as_command(found, cmd_name)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"tinyfleet {tinyfleet.__version__}")
        ctx.exit()


cli = Commands(
    name="tinyfleet",
    help="""Fleets of microcontrollers and Raspberry Pis that keep learning.

Every command has --help with examples.

Examples:
  tinyfleet demo
  tinyfleet server start
  tinyfleet device simulate --devices 4 --task digits
  tinyfleet run start --task digits --rounds 10
""",
    no_args_is_help=True,
    rich_markup_mode=None,
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_print_version,
            help="Show the version and exit.",
        )
    ],
)


def missing_package(module: str, words: list[str]) -> str:
    """The error for a module that is not installed: the extras that the command in `words` and the module need."""
    module = module.split(".")[0]
    extra = next((extra for extra, modules in MODULE_EXTRAS.items() if module in modules), "server")
    command = next((word for word in words if word in COMMANDS), "")
    extras = {extra, *COMMANDS[command].extras} if command else {extra}
    return f"this needs {module}, which is not installed: pip install 'tinyfleet[{','.join(sorted(extras))}]'"


def main() -> None:
    """Runs the command line; an error that is meant for the user is one line on standard error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, as Ctrl-C does
    output = protect_output()
    try:
        try:
            _run()
        finally:
            sys.stdout and sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains as it ends
        sys.exit(1)
    finally:
        if output is not None and output.error is not None:
            click.echo(f"error: the output cannot be written ({output.error.strerror})", err=True)
            sys.exit(1)


def _run() -> None:
    try:
        cli(prog_name="tinyfleet")
    except UserError as error:
        click.echo(f"error: {printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if (error.name or "tinyfleet").split(".")[0] == "tinyfleet":
            raise
        click.echo(f"error: {missing_package(str(error.name), sys.argv[1:])}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
