"""How long the commands take until they are of use: seconds from typing one to the line that says so.

python benchmarks/startup.py
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

TINYFLEET = [sys.executable, "-m", "tinyfleet"]
RUNS = 3


def until(words: list[str], sign: str, stack: ExitStack) -> float:
    """Starts a command, which the stack ends; the seconds until a line of its output has the sign."""
    began = time.perf_counter()
    process = stack.enter_context(subprocess.Popen([*TINYFLEET, *words], stdout=subprocess.PIPE, text=True))
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if sign in line:
            return time.perf_counter() - began
    raise SystemExit(f"tinyfleet {' '.join(words)} ended without saying '{sign}'")


def once(data: Path) -> dict[str, float]:
    """Each command's seconds."""
    with ExitStack() as stack:
        help_ = until(["--help"], "Commands", stack)
        server = until(["server", "start", "--port", "0", "--data", str(data)], "ready", stack)
        where = ["--data", str(data)]
        device = until(["device", "simulate", "--devices", "4", *where], "device-3 is up", stack)
        agent = until(["agent", "start", "--device-id", "pi", *where], "is up", stack)
        run = until(
            ["run", "start", "--rounds", "1", "--clients-per-round", "5", "--json", *where], '"round": 1', stack
        )
        query = until(["query", "clients", *where], "5 rows", stack)
    return {
        "tinyfleet --help": help_,
        "tinyfleet server start: ready": server,
        "tinyfleet device simulate --devices 4: all are up": device,
        "tinyfleet agent start: is up": agent,
        "tinyfleet run start: first round is over": run,
        "tinyfleet query: answer": query,
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table(title=f"Seconds until a command is of use, least of {RUNS} runs", title_justify="left")
    table.add_column("command")
    table.add_column("s", justify="right")
    runs = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as data:
            runs.append(once(Path(data)))
    for name in runs[0]:
        table.add_row(name, f"{min(run[name] for run in runs):.2f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
