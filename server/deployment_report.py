"""What people see of a deployment: who gets the model and who does not, and what each device answers."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from tinyfleet.edge.model.program import Program
from tinyfleet.ontology.store.store import printable
from tinyfleet.server.deployment import DeploymentPlan, DeploymentResult, TargetResult, TargetStatus
from tinyfleet.server.run_report import Bar

MOST = 20
"""Lines of a table; --json has them all."""


def print_deployment_plan(console: Console, file: Path, program: Program, what: DeploymentPlan) -> None:
    """The model, its targets and who is left out."""
    console.print(
        f"{file}: model {program.model_id.hex()}, {len(program.data):,} B, {program.arena_bytes:,} B of RAM",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("target", "board", "runs now", "RAM left"):
        table.add_column(column, justify="right" if column == "RAM left" else "left", overflow="fold")
    for fit in what.targets[:MOST]:
        table.add_row(fit.device, printable(fit.board), what.running[fit.device], f"{fit.room:,}")
    console.print(table)
    _more(console, len(what.targets))
    if what.left_out:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("left out")
        table.add_column("because")
        for device, reason in list(what.left_out.items())[:MOST]:
            table.add_row(printable(device), printable(reason))
        console.print(table)
        _more(console, len(what.left_out))
    console.print(f"{len(what.targets)} to get it, {len(what.left_out)} left out")


def _more(console: Console, count: int) -> None:
    if count > MOST:
        console.print(f"… and {count - MOST:,} more; --json shows all")


class Results(Bar):
    """Shows what the devices answer as they do: a bar on a terminal, and a line each. Call it with each."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, "deploying", total)
        self._console = console

    def __call__(self, result: TargetResult) -> None:
        self.advance()
        said = f"{result.device}: {result.outcome} after {result.seconds:.1f} s"
        style = None if result.outcome == "confirmed" else "yellow"
        self._console.print(f"{said}{f': {result.reason}' if result.reason else ''}", style=style, soft_wrap=True)


def print_result(console: Console, ended: DeploymentResult) -> None:
    """How many answered what, and where it is written."""
    kinds: tuple[TargetStatus, ...] = ("confirmed", "failed", "no answer")
    console.print(", ".join(f"{len(ended.devices(kind))} {kind}" for kind in kinds))
    console.print(f"in the graph: tinyfleet query deployment-targets --param deployment={ended.iri}", soft_wrap=True)
