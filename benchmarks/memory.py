"""How much memory a device's process takes while it waits for work: resident KiB, beside a server of its own.

python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tinyfleet.server.fleet_server import FleetServer

SETTLES = 2.0
"""Seconds after which a process has done what it does at its start."""


def resident(pid: int) -> int:
    """A process's resident memory in KiB."""
    status = Path("/proc", str(pid), "status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def idle(words: list[str]) -> int:
    """Starts a command that says "is up", and measures it a moment later."""
    command = [sys.executable, "-m", "tinyfleet", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not any("is up" in line for line in process.stdout):
            raise SystemExit(f"tinyfleet {' '.join(words)} ended without saying that it is up")
        time.sleep(SETTLES)
        try:
            return resident(process.pid)
        finally:
            process.terminate()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table(title="Resident memory of a process that waits for work", title_justify="left")
    table.add_column("command")
    table.add_column("KiB", justify="right")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(FleetServer(folder, "home", port=0, operator_port=0))
        start = ["agent", "start", "--data", str(folder)]
        for name, words in (
            ("at its first start, which makes its key", start),
            ("", start),
            ("--online 1", [*start, "--online", "1"]),
        ):
            table.add_row(f"tinyfleet agent start {name}".strip(), f"{idle(words):,}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
