"""What the applications' models and features take of a microcontroller.

    python benchmarks/applications.py [--board mps2-an386] [NAME ...]

RAM to train is what the planner says, which is the arena that the engine needs, to the byte; a node that sends sparse
updates keeps a copy of the parameters beside it. The instructions of the log-mel front end are counted in QEMU, as
benchmarks/instructions.py does. Tasks whose data are not at hand are left out, with a line that says why.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer
from instructions import instructions
from rich.console import Console
from rich.table import Table

from tinyfleet.edge import tasks
from tinyfleet.edge._mote import ffi
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import features
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build
from tinyfleet.firmware_tools.firmware.size import read_size

NAMES = ("sine", "digits", "omniglot", "omniglot-20", "omniglot-5-28", "keywords", "presence")
FLEET = 14


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Tasks. Default: all.")] = None,
    board: Annotated[str, typer.Option(help="The board to count the features' instructions on.")] = "mps2-an386",
) -> None:
    """Show what the applications take."""
    console = Console(highlight=False, width=120)
    table = Table(title=f"models, and the samples of a device in a fleet of {FLEET}")
    for column in ("task", "model", "parameters", "MAC to infer", "RAM to train, B", "with a copy, B", "samples, B"):
        table.add_column(column, justify="left" if column in ("task", "model") else "right")
    for name in names or NAMES:
        try:
            task = tasks.load(name)
        except UserError as error:
            console.print(f"without {name}: {error}")
            continue
        clients = [task.client(index, FLEET) for index in range(FLEET)]
        held = max(data.features.nbytes + (0 if data.targets is None else data.targets.nbytes) for data in clients)
        for model, program in (("program", task.program), ("large", task.large)):
            macs = sum(layer.macs for layer in program.layers)
            numbers = (program.n_params, macs, program.arena_bytes, program.arena_bytes + program.params_bytes, held)
            table.add_row(name, model, *(f"{number:,}" for number in numbers))
    console.print(table)
    if not build.available():
        console.print("without the features' instructions: no cross compiler (gcc-arm-none-eabi)")
        return
    target = catalogue.load_board(board)
    with tempfile.TemporaryDirectory() as folder:
        elf = build.build_mel_benchmark(target, Path(folder) / "mel.elf", steps=100)
        counted, taken = instructions(target, elf), read_size(elf)
    each = counted["infer"]
    console.print(
        f"log-mel features on {target.board.title}: {each:,.0f} instructions a frame ({counted['infer_least']:,.0f} to "
        f"{counted['infer_most']:,.0f}), {each * features.RATE / features.HOP / 1e6:.1f} million a second; "
        f"{sum(taken.mote.values()):,} B of flash; {ffi.sizeof('mote_mel_t'):,} B of RAM, and "
        f"{features.frames(features.RATE) * features.BANDS:,} B for a second of features"
    )


if __name__ == "__main__":
    typer.run(main)
