"""The C engine compiled by itself: strict warnings, sanitizers, equal bits from every compiler, no libc behind it."""

import shutil
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import small_models
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from nets import int8_operations, nets, random_weights, spoilt

from tinyfleet.edge.model.layers import AvgPool2D, Conv2D, Dense, Flatten, MaxPool2D, ReLU, Tanh, build
from tinyfleet.edge.mote.build_extension import FLAGS, INCLUDES, STRICT, sources

ROOT = Path(__file__).parents[1]
ENGINE = sources("engine", "int8")
INCLUDE = [f"-I{folder}" for folder in INCLUDES]
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]


def compiler(*names: str) -> str:
    """The first of these that is installed; else the test is skipped."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.skip(f"{names[0]} is not installed")


CLANG = ("clang", *(f"clang-{version}" for version in range(21, 12, -1)))


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compiled(cc: str, flags: Sequence[str], folder: Path) -> list[Path]:
    """The engine's objects, in a folder of their own; two compilers at a time."""
    folder.mkdir()
    objects = [folder / f"{source.stem}.o" for source in ENGINE]
    with ThreadPoolExecutor(2) as pool:
        commands = (
            [cc, *flags, *INCLUDE, "-c", source, "-o", out] for source, out in zip(ENGINE, objects, strict=True)
        )
        list(pool.map(run, commands))
    return objects


def linked(cc: str, flags: Sequence[str], main: str, folder: Path) -> Path:
    """The program of tests/c/{main} with the engine."""
    objects = compiled(cc, flags, folder)
    out = folder / "program"
    run([cc, *flags, *INCLUDE, ROOT / "tests" / "c" / main, *objects, "-lm", "-o", out])
    return out


def corpus(path: Path, programs: Sequence[bytes]) -> Path:
    path.write_bytes(b"".join(struct.pack("<I", len(data)) + data for data in programs))
    return path


def collect(strategy: st.SearchStrategy[bytes], count: int) -> list[bytes]:
    """The same programs at every run."""
    found: list[bytes] = []

    @seed(1)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def add(data: bytes) -> None:
        found.append(data)

    add()
    return found


@pytest.fixture(scope="module")
def good() -> list[bytes]:
    random = collect(nets().map(lambda net: net.build(random_weights(net.whole(), 1)).data), 150)
    return random + collect(int8_operations(), 150) + [model().data for model in small_models.MODELS.values()]


SPOILT = [
    build([AvgPool2D(1), Tanh()], (2, 2, 2), "mse"),
    build([Tanh(), AvgPool2D(2), Flatten(), Dense(9)], (2, 2, 1), "mse"),
    build([AvgPool2D(2), MaxPool2D(1)], (2, 2, 2), "softmax_cross_entropy"),
    build([Dense(3), Tanh(), Dense(3)], (4,), "softmax_cross_entropy"),
    build([Conv2D(2, 2, 1, "same"), Tanh(), MaxPool2D(2), Flatten(), Tanh()], (4, 4, 1), "mse"),
    build(
        [Conv2D(1, 3, 2, "same"), AvgPool2D(2, 1), Conv2D(1, 1), MaxPool2D(2, 1), ReLU(), Flatten()],
        (6, 6, 1),
        "mse",
        trainable={1},
        weights={"conv2d_0/weights": np.ones((1, 3, 3, 1)), "conv2d_0/bias": np.ones(1)},
    ),
]


def hostile() -> list[bytes]:
    """Programs of which something is wrong: all ways for the simple ones, every fifth for those with all operators."""
    found = [data for program in SPOILT for data in spoilt(program.data)]
    for model in small_models.MODELS.values():
        found += islice(spoilt(model().data), 0, None, 5)
    return found


@pytest.fixture(scope="module")
def bad() -> list[bytes]:
    return hostile()


@pytest.mark.parametrize("sanitizing", [CLANG, ("gcc",)], ids=["clang", "gcc"])
def test_sanitizers_find_nothing_in_good_and_hostile_programs(
    sanitizing: tuple[str, ...], good: list[bytes], bad: list[bytes], tmp_path: Path
) -> None:
    cc = compiler(*sanitizing)
    flags = ["-std=c99", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = linked(cc, flags, "programs.c", tmp_path / "build")
    lines = run([program, corpus(tmp_path / "corpus", good + bad), "5"]).splitlines()
    assert len(lines) == len(good) + len(bad)
    assert all(line.startswith("0 ") for line in lines[: len(good)])
    assert len(bad) > 5000 and sum(line.startswith("-") for line in lines[len(good) :]) > len(bad) / 2


def test_every_compiler_and_level_gives_the_same_bits(good: list[bytes], tmp_path: Path) -> None:
    """Freestanding is without what only a processor that is asked for it has."""
    path = corpus(tmp_path / "corpus", good)
    outputs = {}
    for cc in (compiler("gcc"), shutil.which("clang") or shutil.which("clang-14")):
        for level in (["-O0"], ["-O2"], ["-O3", "-march=native"], ["-O2", "-ffreestanding"]):
            if cc is None:
                continue
            flags = ["-std=c99", "-ffp-contract=off", *level]
            program = linked(cc, flags, "programs.c", tmp_path / "".join([Path(cc).stem, *level]))
            outputs[" ".join([cc, *level])] = run([program, path, "20"])
    assert len(set(outputs.values())) == 1, outputs.keys()
    assert len(set(next(iter(outputs.values())).splitlines())) > 50


def test_exponential_logarithm_tanh_and_root_are_right_to_the_last_bits(tmp_path: Path) -> None:
    program = linked(compiler("gcc", *CLANG), FLAGS, "accuracy.c", tmp_path / "build")
    found = dict(line.split() for line in run([program]).splitlines())
    assert found.pop("edges") == "right"
    assert all(float(error) < 1.4e-7 for error in found.values()), found


#: On a host, what the compiler's library knows of the processor.
PROCESSOR = {"__cpu_model", "_GLOBAL_OFFSET_TABLE_"}


@pytest.mark.parametrize(
    ("names", "flags", "more"),
    [
        (("gcc",), [], PROCESSOR),
        (("gcc",), ["-ffreestanding"], set()),
        (CLANG, [], PROCESSOR),
        (("arm-none-eabi-gcc",), CORTEX_M4, set()),
    ],
    ids=["gcc", "freestanding", "clang", "cortex-m4"],
)
def test_the_engine_is_clean_and_needs_nothing_but_memory_functions(
    names: tuple[str, ...], flags: list[str], more: set[str], tmp_path: Path
) -> None:
    cc = compiler(*names)
    objects = compiled(cc, [*FLAGS, *STRICT, *flags], tmp_path / "build")
    nm = cc.removesuffix("gcc") + "nm" if "arm" in names[0] else compiler("nm", "llvm-nm-14")
    listing = [line.split() for line in run([nm, *objects]).splitlines() if line.strip()]
    defined = {words[-1] for words in listing if len(words) == 3 and words[1] in "TDBR"}
    wanted = {words[-1] for words in listing if len(words) == 2 and words[0] == "U"}
    assert all(name.startswith("mote_") for name in defined), defined
    assert wanted - defined <= {"memcpy", "memmove", "memset", "memcmp"} | more
    tables = {"mote_kernels", "mote_losses"}  # constants, which a loader fills in where code can be anywhere
    variables = {words[-1] for words in listing if len(words) == 3 and words[1] in "dDbBcC"} - tables
    assert not variables, variables
