"""What inference and a training step cost on a microcontroller: instructions, and bytes of flash and RAM.

    python benchmarks/instructions.py [--board mps2-an386 ...] [--profile exact ...] [--models MLP ...] [--json]

Every model is built into a benchmark program and run in QEMU with its clock driven by instructions, so the counts are
exact and the same on every run. A step is forward, backward and update on one sample. How many instructions it takes
depends on the sample (a unit that is silent has nothing to update): the mean, the least and the most of 500 are given
for small models. "plain C" is the same step written by hand as loops over arrays (plain_*.c), compiled the same.

The int8 models are those of MLPerf Tiny, from $TINYFLEET_DATA; without it they are left out. The one with a head has
its last layer in float32, for four classes of its own, and only that trains (TinyOL).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.layers import Conv2D, Dense, Flatten, Layer, MaxPool2D, ReLU
from tinyfleet.edge.model.layers import build as build_program
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate
from tinyfleet.firmware_tools.firmware.size import read_size

HERE = Path(__file__).parent
PROFILES: tuple[build.Profile, ...] = ("exact", "fast")


def small(layers: list[Layer], shape: tuple[int, ...]) -> Program:
    """A classifier with random weights."""
    blank = build_program(layers, shape, "softmax_cross_entropy")
    return build_program(layers, shape, "softmax_cross_entropy", weights=blank.split(blank.initial(3)))


def mlp() -> Program:
    return small([Dense(32), ReLU(), Dense(10)], (64,))


def cnn() -> Program:
    body: list[Layer] = [Conv2D(8, 3), ReLU(), MaxPool2D(2), Flatten()]
    return small([*body, Dense(10)], (12, 12, 1))


def tflite(name: str) -> Callable[[], Program]:
    """A .tflite file's model, to run."""

    def make() -> Program:
        from tinyfleet.firmware_tools.readers import tflite_reader

        return assemble(tflite_reader.read_tflite(_file(name)))

    return make


def with_head() -> Program:
    """Keyword spotting under a float32 head of four classes that trains."""
    from tinyfleet.firmware_tools.compiler import transfer
    from tinyfleet.firmware_tools.readers import tflite_reader

    graph = tflite_reader.read_tflite(_file("kws_ref_model"))
    last = [op.name for op in graph.ops if op.weights is not None][-1]
    return assemble(transfer.train_from(graph, last, classes=4))


def _file(name: str) -> Path:
    return Path(os.environ["TINYFLEET_DATA"]) / "tflite" / f"mlperf_tiny__{name}.tflite"


@dataclass(frozen=True)
class Subject:
    """A model, how many steps are measured of it, and the same in plain C if there is one."""

    name: str
    make: Callable[[], Program]
    steps: int
    plain: str | None = None

    @property
    def is_there(self) -> bool:
        """Whether it needs no data, or the data are here."""
        return self.make in (mlp, cnn) or "TINYFLEET_DATA" in os.environ


SUBJECTS = (
    Subject("MLP 64-32-10", mlp, 500, "plain_mlp.c"),
    Subject("conv 3x3x8, max pool, dense 10 on 12x12", cnn, 500, "plain_cnn.c"),
    Subject("DS-CNN, keyword spotting, int8", tflite("kws_ref_model"), 3),
    Subject("DS-CNN, int8, with a head of 4 classes", with_head, 8),
    Subject("MobileNet, visual wake words, int8", tflite("vww_96_int8"), 2),
    Subject("ResNet, image classification, int8", tflite("pretrainedResnet_quant"), 2),
    Subject("autoencoder, anomaly detection, int8", tflite("ad01_int8"), 3),
)


def instructions(target: catalogue.BoardTarget, elf: Path) -> dict[str, float]:
    """Runs a benchmark program: mean, least and most instructions of an inference and of a step."""
    said = {}
    for line in emulate.run_to_completion(target, elf, counting=True, timeout=600).splitlines():
        name, value = line.split()
        said[name] = int(value)
    if "error" in said:
        raise UserError(f"{elf.name}: the engine's error -{said['error']}")
    per_instruction = said["loop_ticks"] / said["loop_instructions"]
    assert target.board.clock_hz is not None
    expected = emulate.NANOSECONDS_PER_INSTRUCTION * target.board.clock_hz / 1e9
    if abs(per_instruction / expected - 1) > 0.001:
        raise RuntimeError(f"the clock does not count instructions: {per_instruction} ticks each, not {expected}")
    found = {}
    for what in ("infer", "learn"):
        if f"{what}_total" in said:
            found[what] = said[f"{what}_total"] / said["steps"] / per_instruction
            found[f"{what}_least"] = said[f"{what}_least"] / per_instruction
            found[f"{what}_most"] = said[f"{what}_most"] / per_instruction
    return {name: round(value) for name, value in found.items()}


def measure(subject: Subject, board: str, profile: build.Profile) -> dict[str, Any]:
    """One row: what the model takes on that board."""
    target, model = catalogue.load_board(board), subject.make()
    row: dict[str, Any] = {"model": subject.name, "board": board, "core": target.board.mcu, "profile": profile}
    with tempfile.TemporaryDirectory() as folder:
        elf = build.build_benchmark(target, model, Path(folder) / "bench.elf", steps=subject.steps, profile=profile)
        row |= instructions(target, elf)
        size = read_size(elf)
        if subject.plain is not None:
            sources = [build.SOURCES / "main_bench.c", build.SOURCES / "semihost.c", HERE / subject.plain]
            plain = Path(folder) / "plain.elf"
            build.link(target, plain, sources, defines={"steps": subject.steps}, profile=profile)
            by_hand = instructions(target, plain)
            row |= {"reference_infer": by_hand["infer"], "reference": by_hand["learn"]}
    macs = sum(layer.macs for layer in model.layers)
    entry = "mote_learn" if "learn" in row else "mote_infer"
    assert size.arena is not None
    return row | {
        "ratio": round(row["learn"] / row["infer"], 3) if "learn" in row else None,
        "macs": macs,
        "infer_per_mac": round(row["infer"] / macs, 3),
        "mote_text": sum(size.mote.values()),
        "program": len(model.data),
        "arena": size.arena,
        "parameters": model.params_bytes,
        "beyond_parameters": size.arena - model.params_bytes,
        "stack": size.depths[entry].bytes,
    }


COLUMNS = {
    "model": "model",
    "core": "core",
    "profile": "profile",
    "infer": "inference",
    "learn": "step",
    "learn_least": "least",
    "learn_most": "most",
    "ratio": "step / inference",
    "infer_per_mac": "per MAC",
    "reference": "plain C step",
    "mote_text": "text of mote",
    "arena": "arena",
    "beyond_parameters": "beyond parameters",
    "stack": "stack",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Instructions and bytes of inference and training on microcontrollers."
    )
    parser.add_argument("--board", nargs="+", default=["mps2-an386"], help="boards (default: mps2-an386)")
    parser.add_argument("--profile", nargs="+", choices=PROFILES, default=PROFILES, help="default: both")
    parser.add_argument("--models", nargs="+", default=[""], help="those whose name begins so (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    subjects = [s for s in SUBJECTS if s.name.startswith(tuple(chosen.models))]
    rows, left_out = [], [s.name for s in subjects if not s.is_there]
    try:
        for subject in subjects:
            if subject.is_there:
                rows += [measure(subject, board, profile) for board in chosen.board for profile in chosen.profile]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps({"rows": rows, "left_out": left_out}, indent=2))
        return 0
    table = Table(title="Instructions, and bytes")
    for key, head in COLUMNS.items():
        table.add_column(head, justify="left" if key in ("model", "core", "profile") else "right")
    for row in rows:
        cells = [row.get(key) for key in COLUMNS]
        table.add_row(*("" if c is None else f"{c:,}" if isinstance(c, int) else str(c) for c in cells))
    Console(width=200).print(table)
    if left_out:
        print("left out, because TINYFLEET_DATA is not set: " + "; ".join(left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
