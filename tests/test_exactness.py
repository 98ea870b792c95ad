"""The same bits everywhere: what 500 steps teach, and int8 outputs, on every core, architecture and compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_models

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote.build_extension import FLAGS, INCLUDES, STRICT
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate, kernel_table
from tinyfleet.firmware_tools.readers import tflite_reader

ROOT = Path(__file__).parents[1]
BOARDS = {
    "Cortex-M0": "microbit",
    "Cortex-M3": "mps2-an385",
    "Cortex-M4F": "mps2-an386",
    "Cortex-M7F": "mps2-an500",
    "Cortex-M33": "mps2-an505",
    "Cortex-M55": "mps3-an547",
}
#: Compiler, its options, and what runs its programs.
LINUX = {
    "x86-64 gcc": ("gcc", ["-march=native"], []),
    "x86-64 clang": ("clang", ["-march=native", "-O3"], []),
    "aarch64": ("aarch64-linux-gnu-gcc", ["-static", "-O3"], ["qemu-aarch64"]),
    "armhf": ("arm-linux-gnueabihf-gcc", ["-static", "-O3"], ["qemu-arm"]),
}
CASES = {
    "mlp": build.TrainingCase(small_models.mlp(), 0.02, momentum=0.9, weight_decay=0.01, clip_norm=0.5),
    "cnn": build.TrainingCase(small_models.cnn(), 0.05),
    "separable": build.TrainingCase(small_models.separable(), 0.05),
    "int8_with_head": build.TrainingCase(small_models.int8_with_head(), 0.05),
    "quantised_training": build.TrainingCase(small_models.quantised_training(), 0.05),
}
LIMIT = 60.0  # seconds


def samples(program: Program, seed: int) -> Callable[[], tuple[bytes, float]]:
    """src/main_exactness.c's samples."""
    state, classes, size = seed, program.classes, program.input.size

    def random() -> int:
        nonlocal state
        state ^= state << 13 & 0xFFFFFFFF
        state ^= state >> 17
        state ^= state << 5 & 0xFFFFFFFF
        return state

    def draw() -> tuple[bytes, float]:
        chosen = (random() >> 8) % classes
        noise = np.array([(random() >> 25) - 64 + 48 * (i % classes == chosen) for i in range(size)])
        if program.input.dtype == "int8":
            return noise.astype(np.int8).tobytes(), float(chosen)
        return (noise.astype(np.float32) / np.float32(128)).tobytes(), float(chosen)

    return draw


def learn_here(case: build.TrainingCase) -> str:
    """What the extension in this process learns: `bytes CRC-32 loss-bits`, as the C program prints it."""
    program = case.program
    data = ffi.new("uint32_t[]", len(program.data) // 4)
    ffi.memmove(data, program.data, len(program.data))
    arena, m, loss = ffi.new("uint32_t[]", program.arena_bytes // 4), ffi.new("mote_t *"), ffi.new("float *")
    assert lib.mote_load(m, data, len(program.data), arena, program.arena_bytes) == lib.MOTE_OK
    before = bytes(ffi.buffer(arena, program.params_bytes))
    how = ffi.new("mote_sgd_t *", [case.rate, case.momentum, case.weight_decay, case.clip_norm])
    draw, target = samples(program, case.seed), ffi.new("float *")
    for _ in range(case.steps):
        x, target[0] = draw()
        if case.momentum > 0:
            assert lib.mote_learn_with(m, x, target, how, loss) == lib.MOTE_OK
        else:
            assert lib.mote_learn(m, x, target, case.rate, loss) == lib.MOTE_OK
    learned = bytes(ffi.buffer(arena, program.params_bytes))
    assert learned != before
    return f"{len(learned):x} {zlib.crc32(learned):x} {int(np.float32(loss[0]).view(np.uint32)):x}"


def infer_here(case: build.TrainingCase) -> str:
    """What the extension in this process infers: `bytes CRC-32 0`, as the C program prints it."""
    learner, state, crc, count = MoteLearner(case.program), case.seed, 0, 0
    for step in range(case.steps):
        x = np.full(case.program.input.size, 127, np.int8)
        for i in range(x.size if step > 0 else 0):
            state ^= state << 13 & 0xFFFFFFFF
            state ^= state >> 17
            state ^= state << 5 & 0xFFFFFFFF
            x[i] = (state >> 24) - 256 * (state >> 31)
        y = np.asarray(learner.infer(x)).tobytes()
        crc, count = zlib.crc32(y, crc), count + len(y)
    return f"{count:x} {crc:x} 0"


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What this process learns of every model, in 500 steps: an MLP, a CNN, a depthwise-separable network in float32,
    one in int8 under a float32 head, and one whose int8 weights learn."""
    assert all(case.steps == 500 for case in CASES.values())
    return [learn_here(case) for case in CASES.values()]


@pytest.mark.parametrize("core", BOARDS)
def test_a_core_learns_the_same_bits(core: str, expected: list[str], tmp_path: Path) -> None:
    if not build.available() or not emulate.available():
        pytest.skip("needs gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm")
    target = catalogue.load_board(BOARDS[core])
    elf = build.build_exactness_check(target, list(CASES.values()), tmp_path / "exact.elf")
    assert dict(zip(CASES, emulate.run_to_completion(target, elf, timeout=LIMIT).splitlines(), strict=True)) == dict(
        zip(CASES, expected, strict=True)
    )


@pytest.mark.parametrize("architecture", LINUX)
def test_an_architecture_learns_the_same_bits(architecture: str, expected: list[str], tmp_path: Path) -> None:
    said = run_on_linux(architecture, list(CASES.values()), tmp_path)
    assert dict(zip(CASES, said, strict=True)) == dict(zip(CASES, expected, strict=True))


def run_on_linux(architecture: str, cases: list[build.TrainingCase], tmp_path: Path) -> list[str]:
    """What the C program prints, compiled for a Linux of another kind; skips if its tools are not here."""
    cc, flags, runner = LINUX[architecture]
    for tool in (cc, *runner):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    data = b"".join(case.data for case in cases)
    words = ",".join(str(word) for word in np.frombuffer(data, "<u4"))
    (tmp_path / "device.h").write_text(
        build.header({}, build.training_case_defines(cases))
        + f"static const uint32_t device_cases[] = {{{words}}};\n#define DEVICE_CASES_BYTES {len(data)}u\n"
    )
    (tmp_path / "mote_kernels.c").write_text(
        kernel_table.source(kernel_table.needed(case.program.data for case in cases))
    )
    folders = [f"-I{folder}" for folder in (tmp_path, build.SOURCES, *INCLUDES)]
    sources = [path for path in build.ENGINE if path.name != "mote_kernels.c"]
    sources += [build.SOURCES / "main_exactness.c", ROOT / "tests" / "c" / "semihost_linux.c"]
    command = [cc, *FLAGS, *STRICT, *flags, *folders, tmp_path / "mote_kernels.c", *sources, "-o", tmp_path / "exact"]
    subprocess.run(command, check=True)
    done = subprocess.run([*runner, tmp_path / "exact"], check=True, capture_output=True, text=True, timeout=LIMIT)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def int8_cases() -> dict[str, build.TrainingCase]:
    """Single int8 operations of many shapes, three samples of each."""
    programs = {f"{number} {name}": program for number, (name, program) in enumerate(small_models.int8_operations(11))}
    return {name: build.TrainingCase(program, steps=3) for name, program in programs.items()}


@pytest.fixture(scope="module")
def int8_expected(int8_cases: dict[str, build.TrainingCase]) -> dict[str, str]:
    """What this process infers; tests/test_int8_kernels.py compares that with TFLite."""
    return {name: infer_here(case) for name, case in int8_cases.items()}


@pytest.mark.parametrize(
    ("core", "profile"),
    [
        ("Cortex-M3", "exact"),
        ("Cortex-M4F", "exact"),
        ("Cortex-M4F", "fast"),
        ("Cortex-M33", "exact"),
        ("Cortex-M55", "exact"),
        ("Cortex-M55", "fast"),
    ],
)
def test_a_core_infers_the_same_int8(
    core: str,
    profile: build.Profile,
    int8_cases: dict[str, build.TrainingCase],
    int8_expected: dict[str, str],
    tmp_path: Path,
) -> None:
    if not build.available() or not emulate.available():
        pytest.skip("needs gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm")
    target = catalogue.load_board(BOARDS[core])
    elf = build.build_exactness_check(target, list(int8_cases.values()), tmp_path / "exact.elf", profile=profile)
    said = emulate.run_to_completion(target, elf, timeout=LIMIT).splitlines()
    assert dict(zip(int8_cases, said, strict=True)) == int8_expected


@pytest.mark.parametrize("architecture", LINUX)
def test_an_architecture_infers_the_same_int8(
    architecture: str, int8_cases: dict[str, build.TrainingCase], int8_expected: dict[str, str], tmp_path: Path
) -> None:
    said = run_on_linux(architecture, list(int8_cases.values()), tmp_path)
    assert dict(zip(int8_cases, said, strict=True)) == int8_expected


@pytest.mark.skipif("TINYFLEET_DATA" not in os.environ, reason="needs MLPerf Tiny's models in $TINYFLEET_DATA")
@pytest.mark.parametrize("core", ["Cortex-M4F", "Cortex-M33", "Cortex-M55"])
@pytest.mark.parametrize("model", ["kws_ref_model", "vww_96_int8", "pretrainedResnet_quant", "ad01_int8"])
def test_a_core_infers_the_same_of_mlperf_tiny(core: str, model: str, tmp_path: Path) -> None:
    if not build.available() or not emulate.available():
        pytest.skip("needs gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm")
    file = Path(os.environ["TINYFLEET_DATA"]) / "tflite" / f"mlperf_tiny__{model}.tflite"
    case, target = (
        build.TrainingCase(assemble(tflite_reader.read_tflite(file)), steps=2),
        catalogue.load_board(BOARDS[core]),
    )
    elf = build.build_exactness_check(target, [case], tmp_path / "exact.elf")
    assert emulate.run_to_completion(target, elf, timeout=LIMIT).splitlines() == [infer_here(case)]
