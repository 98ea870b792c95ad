"""The `tinyfleet` command. Each folder brings its own commands, loaded only when one of them is called."""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click
import typer

from tinyfleet.edge.errors import UserError

#: command -> (module in this package, attribute: a typer app or a function, what it is for)
COMMANDS = {
    "demo": ("server.demo", "demo", "Run a whole fleet on this machine: devices, server, graph, results."),
    "server": ("server.cli", "server", "Run the fleet's server: broker, registry, knowledge graph, SPARQL endpoint."),
    "run": ("server.cli", "run", "Run rounds of federated (meta-)learning on the devices that a query selects."),
    "meta-train": ("server.cli", "meta_train", "Meta-train a start without devices, many simulated clients at once."),
    "deploy": ("server.cli", "deploy", "Give a model to the devices that a query selects, over the air."),
    "agent": ("edge.cli", "agent", "Run this machine as a device that learns (a Raspberry Pi, say)."),
    "device": ("edge.cli", "device", "Run virtual devices: the microcontroller's C node and engine, natively."),
    "gateway": ("firmware_tools.cli", "gateway", "Join a board on a serial line to the fleet's broker."),
    "query": ("ontology.cli", "query", "Ask the fleet's knowledge graph a SPARQL question."),
    "graph": ("ontology.graph_cli", "app", "Fill the knowledge graph: boards, descriptions from elsewhere."),
    "model": ("firmware_tools.model_cli", "app", "Compile, plan and describe models."),
    "firmware": ("firmware_tools.cli", "app", "Build, measure and run firmware for a board."),
}


#: folder -> the extras that bring what its commands need
EXTRAS = {"edge": "edge", "server": "edge,server,firmware", "ontology": "server", "firmware_tools": "edge,firmware"}


class Commands(click.Group):
    """The commands of COMMANDS, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        return as_click(getattr(importlib.import_module(f"tinyfleet.{module}"), attribute), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, _, help_) in COMMANDS.items()])


def as_click(command: Any, name: str) -> click.Command:
    """A typer app, or a function with typer's annotations, as a click command of that name."""
    if not isinstance(command, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name)(command)
        command = app
    result = typer.main.get_command(command)
    result.name = name
    return result


cli = Commands(
    "tinyfleet",
    help="Fleets of microcontrollers and Raspberry Pis that keep learning after they are deployed.\n\n"
    "Begin with: tinyfleet demo. Every command has --help with examples.",
)


def main() -> None:
    """Runs the command line; an error that is meant for the user is one line and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, as after Ctrl-C
    try:
        cli()
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ModuleNotFoundError as error:
        needs = next((EXTRAS[COMMANDS[word][0].split(".")[0]] for word in sys.argv[1:] if word in COMMANDS), "dev")
        if (error.name or "").split(".")[0] == "tinyfleet":
            raise
        click.echo(
            f"error: this needs {error.name}, which is not installed: pip install 'tinyfleet[{needs}]'", err=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
