"""The node's C compiled by itself: strict warnings, a fuzzer under sanitizers, its size, and no libc behind it."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edge import frames
from edge.mote_build import FLAGS, STRICT
from edge.mote_codegen import DEFINES, generate
from edge.program import Dense, ReLU, build
from edge.protocol import ALL_LAYERS, Adopt, Phase, Reboot, UpdateFormat, Work, chunks, encode

ROOT = Path(__file__).parents[1]
MOTE = ROOT / "edge" / "mote"
ENGINE = [MOTE / f"mote{part}.c" for part in ("", "_load", "_kernels", "_math", "_crc")]
NODE = [MOTE / "mote_node.c", MOTE / "mote_update.c", MOTE / "mote_frame.c"]
CLANG = ("clang", *(f"clang-{version}" for version in range(21, 12, -1)))
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]
PROGRAM = build([Dense(9), ReLU(), Dense(4)], (6,), "softmax_cross_entropy")
OTHER = build([Dense(20), ReLU(), Dense(4)], (6,), "softmax_cross_entropy")


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
    return [f"-I{MOTE}", f"-isystem{generated[0].parent}", *(f"-D{name}" for name in DEFINES)]


@pytest.mark.parametrize("names", [("gcc",), CLANG, ("arm-none-eabi-gcc",)], ids=lambda names: names[0])
def test_it_compiles_without_a_warning(names: tuple[str, ...], generated: list[Path], tmp_path: Path) -> None:
    for source in NODE:
        run([compiler(*names), *FLAGS, *STRICT, *includes(generated), "-c", source, "-o", tmp_path / "out.o"])


def message(what: int, data: bytes) -> bytes:
    return bytes([what]) + struct.pack("<H", len(data)) + data


def seeds() -> list[bytes]:
    """What a fleet may send, as the fuzzer's actions: it goes on from here."""
    model = bytes(7) + b"\1"
    updates = [None, UpdateFormat(), UpdateFormat(1, True, 1.0), UpdateFormat(ALL_LAYERS, False, 0.2)]
    updates += [UpdateFormat(2, True, 0.5)]
    weights = message(0xA0, PROGRAM.initial(1).tobytes())
    orders = [
        Work(1 + i, "train", 5, 1, model, i, (Phase(2, 3, 0.1), Phase(3, 9, 0.1)), 4, update)
        for i, update in enumerate(updates)
    ]
    adopt = Adopt(9, bytes(7) + b"\2", len(OTHER.data), zlib.crc32(OTHER.data))
    assert len(OTHER.data) <= 1024
    found = [message(0x80, encode(order)) + weights + b"\x3f" * 8 + b"\x40\x3f" for order in orders]
    found += [message(0x80, encode(adopt)) + message(0xC0, OTHER.data) + found[0], message(0x80, encode(Reboot(3)))]
    found += [message(0xE0, chunk) for chunk in chunks(np.zeros(103, np.float32).tobytes())]
    line = b"".join(frames.encode(frames.Frame(frames.MESSAGE, "a topic", seed[:200])) for seed in found)
    return [*found, b"".join(found), line]


def test_no_message_makes_it_read_or_write_outside(generated: list[Path], tmp_path: Path) -> None:
    """AddressSanitizer and UBSan watch while a fuzzer bends real messages, for a few seconds."""
    clang = compiler(*CLANG)
    words = struct.unpack(f"<{len(PROGRAM.data) // 4}I", PROGRAM.data)
    (tmp_path / "fuzz_program.h").write_text(f"static const uint32_t program[] = {{{','.join(map(str, words))}}};\n")
    binary = tmp_path / "fuzz"
    flags = ["-std=c99", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    sources = [*ENGINE, *NODE, *generated, ROOT / "tests" / "c" / "fuzz_node.c"]
    build_ = subprocess.run([clang, *flags, *includes(generated), f"-I{tmp_path}", *sources, "-o", binary])
    if build_.returncode:
        pytest.skip("clang has no libFuzzer here: apt-get install libclang-rt-14-dev")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds()):
        (corpus / str(i)).write_bytes(seed)
    run([binary, "-seed=1", "-runs=20000", "-max_len=4096", "-max_total_time=6", "-verbosity=0", corpus])


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
