"""The node's C compiled by itself: strict warnings, and no libc behind it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from fuzzing import CLANG

from tinyfleet.edge.mote.build_extension import FLAGS, INCLUDES, STRICT, sources
from tinyfleet.edge.mote.codegen import generate
from tinyfleet.firmware_tools.firmware.build import ENGINE

NODE = sources("crypto", "node", "store")
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]


def compiler(*names: str) -> str:
    """The first of these that is installed; else the test is skipped."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{names[0]} is not installed")


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wire's C files; their folder is the include folder."""
    return generate(tmp_path_factory.mktemp("generated"))


def includes(generated: list[Path]) -> list[str]:
    # As a system's folder: zcbor's C is not ours to warn about.
    return [*(f"-I{folder}" for folder in INCLUDES), f"-isystem{generated[0].parent}"]


@pytest.mark.parametrize("names", [("gcc",), CLANG, ("arm-none-eabi-gcc",)], ids=lambda names: names[0])
def test_it_compiles_without_a_warning(names: tuple[str, ...], generated: list[Path], tmp_path: Path) -> None:
    for source in NODE:
        run([compiler(*names), *FLAGS, *STRICT, *includes(generated), "-c", source, "-o", tmp_path / "out.o"])


def test_it_needs_no_heap_and_no_stdio(generated: list[Path], tmp_path: Path) -> None:
    """Linked for a Cortex-M4 with what a node calls, nothing else of libc is wanted than copying and comparing."""
    cc = compiler("arm-none-eabi-gcc")
    main = tmp_path / "main.c"
    main.write_text(
        '#include "mote_node.h"\nmote_node_t n; mote_node_config_t c; mote_out_t o;\n'
        "int main(void) { mote_node_init(&n, &c); mote_node_connected(&n); mote_node_will(&n, &o);\n"
        'mote_node_receive(&n, "t", 1, (const uint8_t *)"", 0); mote_node_step(&n); return mote_node_poll(&n, &o); }\n'
    )
    flags = [*FLAGS, *CORTEX_M4, "-ffunction-sections", "-fdata-sections", *includes(generated)]
    linked = tmp_path / "node.elf"
    link = ["-r", "-nostdlib", "-Wl,--gc-sections,--entry=main"]
    run([cc, *flags, *link, main, *NODE, *ENGINE, *generated, "-o", linked])
    wanted = {line.split()[-1] for line in run(["arm-none-eabi-nm", "-u", linked]).splitlines()}
    others = {name for name in wanted if not name.startswith("__aeabi_")}  # the compiler's own arithmetic
    assert others <= {"memcpy", "memmove", "memset", "memcmp", "strlen"}
