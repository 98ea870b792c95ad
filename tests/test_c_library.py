"""The C library as its users get it: built by CMake from a clone, its headers in C++, its errors by name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import small_models
from numpy.typing import NDArray

from tinyfleet.edge._mote import lib
from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.model.graph import Loss
from tinyfleet.edge.model.layers import Dense, Tanh
from tinyfleet.edge.model.layers import build as build_program
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote.build_extension import HEADERS, INCLUDES, MOTE, sources
from tinyfleet.firmware_tools.firmware import export_library
from tinyfleet.firmware_tools.firmware.build import PROFILES

ROOT = Path(__file__).parents[1]


def run(command: Sequence[str | Path], **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload, no-any-return]


def needs(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def configure(build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(["cmake", "-S", MOTE, "-B", build, f"-DPython3_EXECUTABLE={sys.executable}", *options])


def test_a_clone_is_built_and_tested_by_cmake(tmp_path: Path) -> None:
    """Under the sanitizers, and without a warning of our own sources."""
    needs("cmake", "cc")
    flags = "-Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all"
    done = configure(tmp_path, f"-DCMAKE_C_FLAGS={flags}")
    assert done.returncode == 0, done.stderr
    done = run(["cmake", "--build", tmp_path, "--parallel", "2"])
    assert done.returncode == 0, done.stderr
    assert "edge/mote" not in done.stderr, done.stderr
    done = run(["ctest", "--test-dir", tmp_path, "--output-on-failure"])
    assert done.returncode == 0, done.stdout
    assert "100% tests passed" in done.stdout
    done = run([tmp_path / "quickstart"], input="")
    assert done.stdout.startswith("0 of 0 predicted right")


def test_without_zcbor_it_says_what_to_install(tmp_path: Path) -> None:
    needs("cmake", "cc")
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # no site-packages
    (tmp_path / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["cmake", "-S", MOTE, "-B", tmp_path / "build", f"-DPython3_EXECUTABLE={tmp_path / 'python'}"]
    done = run(command, env=environment)
    assert done.returncode != 0
    assert "zcbor" in done.stderr and "-m pip install zcbor==" in done.stderr and "-DMOTE_NODE=OFF" in done.stderr
    assert run([*command, "-DMOTE_NODE=OFF"], env=environment).returncode == 0


def test_cmake_and_the_firmware_compile_alike() -> None:
    text = (MOTE / "CMakeLists.txt").read_text()
    for flags in PROFILES.values():
        assert f"PRIVATE {' '.join(flag for flag in flags if not flag.startswith('-std'))})" in text


def test_every_source_is_in_the_readme_s_folders() -> None:
    folders = {path.parent.name for path in sources()}
    text = (MOTE / "README.md").read_text()
    assert all(f"`src/{folder}/`" in text for folder in folders) and all(f"`{name}`" in text for name in HEADERS)


def test_the_example_s_model_is_the_exporter_s() -> None:
    made = export_library.model_header(export_library.first_model())
    assert (MOTE / "examples" / "model.h").read_text() == made


def test_the_headers_are_for_c_plus_plus(tmp_path: Path) -> None:
    needs("g++")
    names = sorted(path.name for path in INCLUDES[0].glob("*.h"))
    assert names == sorted(HEADERS)
    source = tmp_path / "main.cpp"
    lines = [f'#include "{name}"' for name in names]
    source.write_text("\n".join([*lines, "int main() { return mote_error_name(0)[0] != 'M'; }", ""]))
    (tmp_path / "error.o").unlink(missing_ok=True)
    error = MOTE / "src" / "engine" / "mote_error.c"
    assert run(["gcc", "-c", error, f"-I{INCLUDES[0]}", "-o", tmp_path / "error.o"]).returncode == 0
    command = ["g++", "-std=c++11", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDES[0]}", source, tmp_path / "error.o"]
    done = run([*command, "-o", tmp_path / "main"])
    assert done.returncode == 0, done.stderr
    assert run([tmp_path / "main"]).returncode == 0


def test_python_says_errors_by_the_library_s_names() -> None:
    codes = [getattr(lib, name) for name in dir(lib) if name.startswith("MOTE_ERR_")]
    assert len(codes) == 10
    for name in dir(lib):
        if name.startswith("MOTE_ERR_"):
            assert error_name(getattr(lib, name)) == name
    assert error_name(min(codes) - 1) == error_name(1) == "an unknown error"


#: Prints what a sketch prints, and ends when it waits for the third time.
ARDUINO = """
#include <Arduino.h>
#include <stdio.h>
#include <stdlib.h>
Printer Serial;
void Printer::begin(unsigned long) {}
void Printer::print(const char *text) { printf("%s", text); }
void Printer::print(int value) { printf("%d", value); }
void Printer::println(const char *text) { printf("%s\\n", text); }
void Printer::println(int value) { printf("%d\\n", value); }
void Printer::println(double value) { printf("%f\\n", value); }
void pinMode(int, int) {}
int digitalRead(int) { return 1; }
int analogRead(int) { return 100; }
void delay(unsigned long) { static int waits; if (++waits == 50) exit(0); }
void setup(); void loop();
int main() { setup(); for (;;) loop(); }
"""


@pytest.mark.parametrize(("damaged", "said"), [(False, "class "), (True, "mote_load: MOTE_ERR_CRC\n")])
def test_the_sketch_stops_after_a_load_error(damaged: bool, said: str, tmp_path: Path) -> None:
    needs("g++", "gcc")
    library = tmp_path / "library"
    export_library.export("arduino", library)
    if damaged:
        header = library / "src" / "model.h"
        text = header.read_text()
        last = text.rindex("0x")
        header.write_text(text[:last] + f"0x{int(text[last + 2 : last + 10], 16) ^ 1:08x}" + text[last + 10 :])
    sketch = (library / "examples" / "LearnOnAStream" / "LearnOnAStream.ino").read_text()
    (tmp_path / "sketch.cpp").write_text(ARDUINO + sketch)
    folders = [f"-I{ROOT / 'tests' / 'c' / 'arduino'}", f"-I{library / 'src'}"]
    assert run(["gcc", "-c", *sorted((library / "src").glob("*.c"))], cwd=tmp_path).returncode == 0
    done = run(["g++", *folders, tmp_path / "sketch.cpp", *sorted(tmp_path.glob("*.o")), "-o", tmp_path / "sketch"])
    assert done.returncode == 0, done.stderr
    output = run([tmp_path / "sketch"], timeout=20).stdout
    assert output == said if damaged else output.startswith(said)


# ------------------------------------------------------------------------------------------- what is not finite


def deep(loss: Loss = "softmax_cross_entropy", momentum: bool = False) -> Program:
    return build_program([Dense(4), Tanh(), Dense(3), Dense(3)], (2,), loss, momentum=momentum)


def split(program: Program, vector: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """By layer, the weights and the bias as one."""
    sizes = np.cumsum([2 * 4 + 4, 4 * 3 + 3])
    assert program.n_params == sizes[-1] + 3 * 3 + 3
    return np.split(vector, sizes)


def overflowing(program: Program) -> NDArray[np.float32]:
    """Parameters with which the loss is finite, since the inner layer's weights cancel, and its gradient is not."""
    first, inner, last = split(program, program.initial(1).copy())
    first[:] = 0.0
    inner[:12] = 3e38
    inner[12:] = 0.0
    last[:9] = [1, -1, 1, -1, 1, -1, 1, 1, 1]
    return np.concatenate([first, inner, last])


@pytest.mark.parametrize("optimiser", [{}, {"weight_decay": 0.01}, {"momentum": 0.9}, {"clip_norm": 1.0}])
def test_a_gradient_that_overflows_on_its_way_back_is_an_error(optimiser: dict[str, float]) -> None:
    """No parameter is lost; with momentum, or a limit of the norm, none has changed."""
    program = deep(momentum="momentum" in optimiser)
    learner = MoteLearner(program, **optimiser)
    learner.set_parameters(overflowing(program))
    before = learner.parameters
    for _ in range(3):
        with pytest.raises(LearnerError) as error:
            learner.learn([1.0, -0.5], 1, 0.1)
        assert error.value.code == lib.MOTE_ERR_DIVERGED
    after = learner.parameters
    assert np.isfinite(after).all()
    assert np.array_equal(split(program, after)[0], split(program, before)[0])
    if "momentum" in optimiser or "clip_norm" in optimiser:
        assert np.array_equal(after, before)
    learner.set_parameters(program.initial(1))
    assert np.isfinite(learner.learn([1.0, -0.5], 1, 0.1))


@pytest.mark.parametrize("name", ["mlp", "cnn", "separable", "regression", "branches"])
@pytest.mark.parametrize("size", [1e10, 1e18, 1e22, 1e30, 1e38])
def test_finite_parameters_stay_finite(name: str, size: float) -> None:
    """Whatever the sample, the weights and the rate."""
    program = small_models.MODELS[name]()
    learner, random = MoteLearner(program), np.random.default_rng(1)
    classes = program.loss == "softmax_cross_entropy"
    for trial in range(20):
        weights = random.normal(size=program.n_params) * size ** (trial % 3 / 2)
        learner.set_parameters(weights.clip(-3e38, 3e38).astype(np.float32))
        x = (random.normal(size=program.input.size) * size ** (trial % 4 / 3)).clip(-3e38, 3e38).astype(np.float32)
        y = 1 if classes else random.random(program.output.size).astype(np.float32)
        try:
            learner.learn(x, y, float(lib.MOTE_MAX_RATE))
        except LearnerError as error:
            assert error.code == lib.MOTE_ERR_DIVERGED
        assert np.isfinite(learner.parameters).all()


def test_an_output_that_is_not_finite_is_an_error() -> None:
    program = deep("mse")
    learner = MoteLearner(program)
    learner.set_parameters(np.full(program.n_params, 1e30, np.float32))
    with pytest.raises(LearnerError) as error:
        learner.infer([1.0, 1.0])
    assert error.value.code == lib.MOTE_ERR_DIVERGED
    learner.set_parameters(program.initial(1))
    assert np.isfinite(learner.infer([1.0, 1.0])).all()


@pytest.mark.parametrize("rate", [-0.1, -1e-30, float("nan"), float("inf"), 1e7])
def test_a_rate_that_is_none_is_an_error(rate: float) -> None:
    learner = MoteLearner(deep())
    before = learner.parameters
    with pytest.raises(LearnerError, match=r"the rate is not from 0 to 1,000,000") as error:
        learner.learn([1.0, 1.0], 1, rate)
    assert error.value.code == lib.MOTE_ERR_ARGUMENT
    assert np.array_equal(learner.parameters, before)
    assert learner.learn([1.0, 1.0], 1, 0.0) > 0.0
