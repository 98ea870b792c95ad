"""What one training step costs on a microcontroller: instructions, and bytes of flash and RAM.

    python benchmarks/instructions.py [--board mps2-an386] [--profile exact|fast] [--json]

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


def _begun(layers: list[program.Layer], shape: tuple[int, ...]) -> program.Program:
    """A classifier with random weights: from zeros nothing would pass a ReLU, and a step would cost too little."""
    blank = program.build(layers, shape, "softmax_cross_entropy")
    return program.build(layers, shape, "softmax_cross_entropy", weights=blank.split(blank.initial(0)))


MODELS = {
    "MLP 64-32-10": _begun([program.Dense(32), program.ReLU(), program.Dense(10)], (64,)),
    "conv 3x3x8, max pool, dense 10 on 12x12": _begun(
        [program.Conv2D(8, 3), program.ReLU(), program.MaxPool2D(2), program.Flatten(), program.Dense(10)], (12, 12, 1)
    ),
}
STEPS = 500


def measure(board: str, model: program.Program, profile: build.Profile = "exact") -> dict[str, float]:
    """Instructions of an inference and of a step of `model` (least, mean, most), and bytes of what measured it."""
    target = boards.load(board)
    with tempfile.TemporaryDirectory() as folder:
        elf = build.bench(target, model, Path(folder) / "bench.elf", steps=STEPS, profile=profile)
        size = build.size(elf)
        lines = dict(line.split() for line in emulate.run(target, elf, counting=True).splitlines())
    said = {name: int(value) for name, value in lines.items()}
    per_instruction = said["loop_ticks"] / said["loop_instructions"]
    expected = emulate.NANOSECONDS_PER_INSTRUCTION * target.board.clock_hz / 1e9
    if abs(per_instruction / expected - 1) > 0.001:
        raise RuntimeError(f"the clock does not count instructions: {per_instruction} ticks each, not {expected}")
    assert size.arena is not None
    inference = said["infer_total"] / said["steps"] / per_instruction
    mean = said["learn_total"] / said["steps"] / per_instruction
    return {
        "inference": round(inference),
        "least": round(said["learn_least"] / per_instruction),
        "mean": round(mean),
        "most": round(said["learn_most"] / per_instruction),
        "ratio": round(mean / inference, 2),
        "text": size.text,
        "data": size.data,
        "bss": size.bss,
        "arena": size.arena,
        "beyond_parameters": size.arena - 4 * model.n_params,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Instructions and bytes of one training step on a microcontroller.")
    parser.add_argument("--board", default="mps2-an386", help="a board with an emulator (default: %(default)s)")
    parser.add_argument(
        "--profile", default="exact", choices=["exact", "fast"], help="arithmetic (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        results = {name: measure(arguments.board, model, arguments.profile) for name, model in MODELS.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps({"board": arguments.board, "profile": arguments.profile, "models": results}, indent=2))
        return 0
    table = Table(title=f"Instructions and bytes of training on {arguments.board}, {arguments.profile}")
    table.add_column("model")
    heads = [
        "inference",
        "step: least",
        "mean",
        "most",
        "step / inference",
        "text",
        "data",
        "bss",
        "arena",
        "beyond parameters",
    ]
    for head in heads:
        table.add_column(head, justify="right")
    for name, row in results.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
