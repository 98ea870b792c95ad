"""A deployment on the terminal: which devices get the model and which do not, and their results."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinyfleet.edge.errors import printable
from tinyfleet.edge.model.program import Program
from tinyfleet.server.deployment import DeploymentPlan, DeploymentResult, TargetResult, TargetStatus
from tinyfleet.server.run_report import Bar

MAX_ROWS = 20
"""Of a table; --json has them all."""


def print_deployment_plan(console: Console, file: Path, program: Program, deployment_plan: DeploymentPlan) -> None:
    """The model, its targets and the excluded devices."""
    console.print(
        f"{file}: model {program.model_id.hex()}, {len(program.data):,} B, {program.arena_bytes:,} B of RAM",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("target", "board", "runs now", "RAM left"):
        table.add_column(column, justify="right" if column == "RAM left" else "left", overflow="fold")
    for match in deployment_plan.targets[:MAX_ROWS]:
        table.add_row(match.device, printable(match.board), deployment_plan.running[match.device], f"{match.free:,}")
    console.print(table)
    _more(console, len(deployment_plan.targets))
    if deployment_plan.excluded:
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("excluded")
        table.add_column("because")
        for device, reason in list(deployment_plan.excluded.items())[:MAX_ROWS]:
            table.add_row(printable(device), printable(reason))
        console.print(table)
        _more(console, len(deployment_plan.excluded))
    console.print(f"{len(deployment_plan.targets)} to get it, {len(deployment_plan.excluded)} excluded")


def _more(console: Console, count: int) -> None:
    if count > MAX_ROWS:
        console.print(f"… and {count - MAX_ROWS:,} more; --json shows all")


class Results(Bar):
    """Shows the results as they arrive: a bar on a terminal, and a line each. Call it with each result."""

    def __init__(self, console: Console, total: int) -> None:
        super().__init__(console, "deploying", total)
        self._console = console

    def __call__(self, result: TargetResult) -> None:
        self.advance()
        line = f"{result.device}: {result.outcome} after {result.seconds:.1f} s"
        style = None if result.outcome in ("confirmed", "on trial") else "yellow"
        self._console.print(f"{line}{f': {result.reason}' if result.reason else ''}", style=style, soft_wrap=True)


def print_result(console: Console, ended: DeploymentResult) -> None:
    """How many targets had which result, and how to ask the graph for them."""
    kinds: tuple[TargetStatus, ...] = ("confirmed", "on trial", "failed", "no answer")
    counts = [(len(ended.devices(kind)), kind) for kind in kinds]
    console.print(", ".join(f"{count} {kind}" for count, kind in counts if count or kind != "on trial"))
    console.print(f"in the graph: tinyfleet query deployment-targets --param deployment={ended.iri}", soft_wrap=True)
