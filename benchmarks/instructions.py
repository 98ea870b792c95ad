"""What one training step costs on a microcontroller: instructions, and bytes of flash and RAM.

    python benchmarks/instructions.py [--board mps2-an386] [--json]

Every model is built into a benchmark program and run in QEMU with its clock driven by instructions, so the counts are
exact and the same on every run. A step is forward, backward and update on one sample. How many instructions it takes
depends on the sample (a unit that is silent has nothing to update): the least, the mean and the most of 500 are given.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge import program
from edge.errors import UserError
from firmware_tools import boards, build, emulate

MODELS = {
    "MLP 64-32-10": program.build(
        [program.Dense(32), program.ReLU(), program.Dense(10)], (64,), "softmax_cross_entropy"
    ),
    "conv 3x3x8, max pool, dense 10 on 12x12": program.build(
        [program.Conv2D(8, 3), program.ReLU(), program.MaxPool2D(2), program.Flatten(), program.Dense(10)],
        (12, 12, 1),
        "softmax_cross_entropy",
    ),
}


def measure(board: str, model: program.Program) -> dict[str, float]:
    """Instructions (least, mean, most) of a step of `model`, and bytes of the program that measured it."""
    target = boards.load(board)
    with tempfile.TemporaryDirectory() as folder:
        elf = build.bench(target, model, Path(folder) / "bench.elf")
        size = build.size(elf)
        lines = dict(line.split() for line in emulate.run(target, elf, counting=True).splitlines())
    said = {name: int(value) for name, value in lines.items()}
    per_instruction = said["loop_ticks"] / said["loop_instructions"]
    expected = emulate.NANOSECONDS_PER_INSTRUCTION * target.board.clock_hz / 1e9
    if abs(per_instruction / expected - 1) > 0.001:
        raise RuntimeError(f"the clock does not count instructions: {per_instruction} ticks each, not {expected}")
    assert size.arena is not None
    return {
        "least": round(said["least_ticks"] / per_instruction),
        "mean": round(said["total_ticks"] / said["steps"] / per_instruction),
        "most": round(said["most_ticks"] / per_instruction),
        "text": size.text,
        "data": size.data,
        "bss": size.bss,
        "arena": size.arena,
        "beyond_parameters": size.arena - 4 * model.n_params,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Instructions and bytes of one training step on a microcontroller.")
    parser.add_argument("--board", default="mps2-an386", help="a board with an emulator (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        results = {name: measure(arguments.board, model) for name, model in MODELS.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"board": arguments.board, "models": results}, indent=2))
        return 0
    table = Table(title=f"One training step on {arguments.board}")
    table.add_column("model")
    heads = ["instructions: least", "mean", "most", "text", "data", "bss", "arena", "beyond parameters"]
    for head in heads:
        table.add_column(head, justify="right")
    for name, row in results.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
