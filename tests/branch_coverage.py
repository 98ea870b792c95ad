"""How much of the C engine the tests reach: branches taken, by file.

    python tests/branch_coverage.py [--missing] [--least 95]

The engine is compiled with gcc's instrumentation, as Python's extension and under the C drivers; then the tests that
run it in their own process, the fuzzers' corpora, and test_engine_native.py's good and hostile programs go through it.
What only other targets compile (instructions of Cortex-M) is not in it. Ends with 1 if fewer branches than --least per
cent are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fuzzing
import small_models
import test_engine_native as native
from nets import int8_operations
from rich.console import Console
from rich.table import Table

from tinyfleet.edge.mote import build_extension, codegen

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "coverage"
PORTABLE = FOLDER / "portable"  # without what only this processor has
#: Tests that run the engine in their own process, and reach the most of it in the shortest time.
TESTS = (
    "test_load.py",
    "test_engine.py",
    "test_learner.py",
    "test_gradients.py",
    "test_int8_kernels.py",
    "test_quantized_training.py",
    "test_node.py",
    "test_node_updates.py",
    "test_node_models.py",
    "test_node_callbacks.py",
    "test_node_hostile_input.py",
    "test_frames.py",
    "test_streams.py",
    "test_program.py",
    "test_plan.py",
)

Branches = dict[tuple[int, int], int]
"""(line, number in the line) -> how often it was taken."""


def run(command: Sequence[str | Path], **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **more)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done


def build() -> tuple[Path, dict[str, Path]]:
    """Compiles the engine; returns the extension, and the fuzzers' drivers by the name of their corpus, "programs" and
    "portable"."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    os.chdir(ROOT)
    build_extension.builder().emit_c_code(str(FOLDER / "_mote.c"))
    generated = codegen.generate(FOLDER / "wire")
    words = ",".join(str(word) for (word,) in struct.iter_unpack("<I", fuzzing.PROGRAM.data))
    (FOLDER / "fuzz_program.h").write_text(f"static const uint32_t program[] = {{{words}}};\n")
    (FOLDER / "main.c").write_text(DRIVER)
    folders = [*build_extension.INCLUDES, FOLDER, generated[0].parent, sysconfig.get_paths()["include"]]
    flags = ["-O0", "-g", "-fPIC", "-ffp-contract=off", *(f"-I{folder}" for folder in folders)]
    engine = list(build_extension.sources())
    drivers = [ROOT / "tests" / "c" / f"fuzz_{name}.c" for name in fuzzing.TARGETS]
    programs = ROOT / "tests" / "c" / "programs.c"
    others = [*generated, FOLDER / "_mote.c", FOLDER / "main.c", *drivers, programs]

    def compiled(sources: list[Path], folder: Path, *more: str) -> dict[Path, Path]:
        def compile_(source: Path) -> Path:
            target = folder / f"{source.stem}.o"
            run(["gcc", *flags, *more, *["--coverage"] * (source in engine), "-c", source, "-o", target])
            return target

        with ThreadPoolExecutor() as pool:
            return dict(zip(sources, pool.map(compile_, sources), strict=True))

    objects = compiled([*engine, *others], FOLDER)
    library = [objects[source] for source in (*engine, *generated)]
    extension = FOLDER / "_mote.so"
    run(["gcc", "--coverage", "-shared", objects[FOLDER / "_mote.c"], *library, "-o", extension])
    binaries = {"programs": FOLDER / "programs", "portable": PORTABLE / "programs"}
    run(["gcc", "--coverage", objects[programs], *library, "-o", binaries["programs"]])
    PORTABLE.mkdir()
    portable = compiled([*engine, programs, *generated], PORTABLE, "-ffreestanding").values()
    run(["gcc", "--coverage", *portable, "-o", binaries["portable"]])
    for name, driver in zip(fuzzing.TARGETS, drivers, strict=True):
        binaries[name] = FOLDER / f"fuzz_{name}"
        run(["gcc", "--coverage", objects[driver], objects[FOLDER / "main.c"], *library, "-o", binaries[name]])
    return extension, binaries


#: In libFuzzer's place: every file once.
DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int main(int argc, char **argv)
{
    static uint8_t data[1 << 20];
    for (int i = 1; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        size_t size = file ? fread(data, 1, sizeof data, file) : 0;
        (void)LLVMFuzzerTestOneInput(data, size);
        fclose(file);
    }
    return 0;
}
"""


def taken() -> dict[str, Branches]:
    """What gcov says, by file of edge/mote; an inline function's branches are taken if they are anywhere."""
    found: dict[str, Branches] = {}
    for data in sorted(FOLDER.rglob("*.gcda")):
        said = json.loads(
            run(["gcov", "--json-format", "--stdout", "--branch-probabilities", data.name], cwd=data.parent).stdout
        )
        for file in said["files"]:
            path = Path(file["file"])
            if not path.is_relative_to(build_extension.MOTE):
                continue
            branches = found.setdefault(str(path.relative_to(build_extension.MOTE)), {})
            for line in file["lines"]:
                for i, branch in enumerate(line["branches"]):
                    key = line["line_number"], i
                    branches[key] = branches.get(key, 0) + branch["count"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="print the lines with branches that nothing takes")
    parser.add_argument("--least", type=float, default=95.0, help="per cent of all branches (default: %(default)g)")
    chosen = parser.parse_args()
    extension, drivers = build()
    for name in fuzzing.TARGETS:
        run([drivers[name], *sorted((fuzzing.CORPUS / name).iterdir())])
    good = [make().data for make in small_models.MODELS.values()]
    good += native.collect(int8_operations(), 150)
    run([drivers["programs"], native.corpus(FOLDER / "programs.bin", good + native.hostile()), "12"])
    run([drivers["portable"], native.corpus(FOLDER / "portable.bin", good), "12"])
    tests = [f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()]
    environment = {**os.environ, "MOTE_EXTENSION": str(extension), "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    only = ["-k", "not compilers_agree"]  # that runs other builds
    command = [sys.executable, "-m", "pytest", "-q", "-p", "instrumented", *only, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    print(done.stdout.splitlines()[-1])

    files = taken()
    table = Table(title="Branches of edge/mote that the tests take")
    table.add_column("file")
    for head in ("branches", "taken", "%"):
        table.add_column(head, justify="right")
    total = reached = 0
    for name, branches in sorted(files.items()):
        hit = sum(count > 0 for count in branches.values())
        total, reached = total + len(branches), reached + hit
        if branches:
            table.add_row(name, str(len(branches)), str(hit), f"{hit / len(branches):.1%}")
    table.add_section()
    table.add_row("all", str(total), str(reached), f"{reached / total:.1%}")
    Console().print(table)
    if chosen.missing:
        for name, branches in sorted(files.items()):
            text = (build_extension.MOTE / name).read_text().splitlines()
            for number in sorted({line for (line, _), count in branches.items() if count == 0}):
                print(f"{name}:{number}: {text[number - 1].strip()}")
    return 0 if 100 * reached / total >= chosen.least else 1


if __name__ == "__main__":
    sys.exit(main())
