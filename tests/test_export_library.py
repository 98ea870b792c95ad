"""The engine as a library for others: a CMake target that is built and learns, an Arduino library that compiles."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import small_models

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote.build_extension import MOTE
from tinyfleet.firmware_tools.firmware import export_library

ROOT = Path(__file__).parents[1]
CORTEX_M4 = ["-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"]


def run(command: Sequence[str | Path], **more: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def needs(*tools: str) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")


def stream(count: int, inputs: int, classes: int) -> str:
    """Samples of classes that can be told apart, as the quick start reads them."""
    random_ = random.Random(1)
    lines = []
    for _ in range(count):
        label = random_.randrange(classes)
        features = [random_.gauss(float(i % classes == label), 0.5) for i in range(inputs)]
        lines.append(" ".join(f"{value:.3f}" for value in [*features, label]))
    return "\n".join(lines)


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_the_quick_start_is_built_by_cmake_and_learns_a_stream(profile: str, tmp_path: Path) -> None:
    needs("cmake", "cc")
    export_library.export("cmake", tmp_path / "mote")
    run(["cmake", "-S", tmp_path / "mote", "-B", tmp_path / "build", f"-DMOTE_PROFILE={profile}"])
    run(["cmake", "--build", tmp_path / "build", "--parallel", "2"])
    said = run([tmp_path / "build" / "quickstart"], input=stream(600, 16, 3))
    right, seen = (int(word) for word in said.split()[:3:2])
    assert seen == 600
    assert right > 500
    assert len((MOTE / "examples" / "quickstart.c").read_text().splitlines()) <= 36


def test_the_quick_start_learns_with_an_int8_backbone(tmp_path: Path) -> None:
    """The model's input is int8: samples are its numbers."""
    needs("cmake", "cc")
    export_library.export("cmake", tmp_path / "mote", small_models.int8_with_head())
    run(["cmake", "-S", tmp_path / "mote", "-B", tmp_path / "build"])
    run(["cmake", "--build", tmp_path / "build", "--parallel", "2"])
    random_ = random.Random(2)
    lines = []
    for _ in range(800):
        label = random_.randrange(4)
        image = [str(60 * label - 90 + random_.randrange(-10, 11)) for _ in range(64)]
        lines.append(" ".join([*image, str(label)]))
    right, seen = (int(word) for word in run([tmp_path / "build" / "quickstart"], input="\n".join(lines)).split()[:3:2])
    assert seen == 800 and right > 500


@pytest.mark.parametrize("model", ["regression", "int8_rest"])
def test_a_model_that_learns_no_classes_comes_without_the_example(model: str, tmp_path: Path) -> None:
    needs("cmake", "cc")
    for kind in ("cmake", "arduino"):
        files = export_library.export(kind, tmp_path / kind, small_models.MODELS[model]())
        assert not any("examples" in path.parts for path in files)
    run(["cmake", "-S", tmp_path / "cmake", "-B", tmp_path / "build"])
    run(["cmake", "--build", tmp_path / "build", "--parallel", "2"])


def test_an_installed_library_is_found_by_another_project(tmp_path: Path) -> None:
    needs("cmake", "cc")
    model = tmp_path / "model.mote"
    model.write_bytes(small_models.cnn().data)
    command = [sys.executable, "-m", "tinyfleet", "firmware", "export", "--format", "cmake"]
    run([*command, "--out", tmp_path / "mote", "--model", model], cwd=ROOT)
    run(["cmake", "-S", tmp_path / "mote", "-B", tmp_path / "build", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}"])
    run(["cmake", "--build", tmp_path / "build", "--target", "install", "--parallel", "2"])
    other = tmp_path / "other"
    other.mkdir()
    (other / "main.c").write_text(
        '#include "model.h"\n#include "mote.h"\n'
        "static uint32_t arena[MODEL_ARENA_BYTES / 4];\n"
        "int main(void) { mote_t m; return -mote_load(&m, model, sizeof model, arena, sizeof arena); }\n"
    )
    (other / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(other LANGUAGES C)\nfind_package(mote REQUIRED)\n"
        "add_executable(other main.c)\ntarget_link_libraries(other PRIVATE mote::mote)\n"
    )
    run(["cmake", "-S", other, "-B", other / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"])
    run(["cmake", "--build", other / "build"])
    run([other / "build" / "other"])


def test_a_library_for_a_model_holds_the_operators_that_it_needs(tmp_path: Path) -> None:
    export_library.export("cmake", tmp_path / "mote", small_models.int8_with_head())
    table = (tmp_path / "mote" / "src" / "engine" / "mote_kernels.c").read_text()
    assert "mote_int8_conv2d" in table and "mote_dense_back" in table and "mote_cross_entropy" in table
    assert "mote_conv2d" not in table and "mote_huber" not in table


def test_the_arduino_library_compiles_with_its_sketch(tmp_path: Path) -> None:
    needs("arm-none-eabi-gcc", "arm-none-eabi-g++", "arm-none-eabi-objdump")
    library = tmp_path / "TinyFleetMote"
    export_library.export("arduino", library)
    lines = (library / "library.properties").read_text().splitlines()
    properties = dict(line.split("=", 1) for line in lines)
    assert {"name", "version", "author", "maintainer", "sentence", "category", "url", "architectures"} <= set(
        properties
    )
    assert all(len(line.split("\t")) == 2 for line in (library / "keywords.txt").read_text().splitlines())
    # As Arduino's cores compile C: for size, in GNU's dialect, in which products and sums are fused unless told.
    objects = []
    for source in sorted((library / "src").glob("*.c")):
        objects.append(tmp_path / f"{source.stem}.o")
        run(["arm-none-eabi-gcc", "-std=gnu11", "-Os", "-Wall", *CORTEX_M4, "-c", source, "-o", objects[-1]])
    assert "vfma" not in run(["arm-none-eabi-objdump", "-d", *objects])
    sketch = tmp_path / "sketch.cpp"
    sketch.write_text(
        "#include <Arduino.h>\n" + (library / "examples" / "LearnOnAStream" / "LearnOnAStream.ino").read_text()
    )
    folders = [f"-I{ROOT / 'tests' / 'c' / 'arduino'}", f"-I{library / 'src'}"]
    flags = ["-std=gnu++17", "-Os", "-Wall", "-fno-exceptions", *CORTEX_M4, *folders]
    run(["arm-none-eabi-g++", *flags, "-c", sketch, "-o", tmp_path / "sketch.o"])


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("already")
    with pytest.raises(UserError, match=r"is not empty; choose another folder with --out"):
        export_library.export("cmake", tmp_path)
    command = [sys.executable, "-m", "tinyfleet", "firmware", "export", "--format"]
    for words, message in (
        (["maven", "--out", tmp_path / "x"], "no format 'maven'"),
        (["cmake", "--out", tmp_path / "x", "--model", tmp_path / "none.mote"], "there is no file"),
        (["cmake", "--out", tmp_path / "x", "--model", tmp_path / "there"], "is not a program"),
    ):
        done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 2
        assert message in done.stderr, done.stderr


def test_model_h_is_the_program(tmp_path: Path) -> None:
    program = small_models.int8_with_head()
    header = export_library.model_header(program)
    words = [int(word.strip(" ,"), 16) for word in header.split() if word.startswith("0x")]
    assert b"".join(word.to_bytes(4, "little") for word in words) == program.data
    assert f"#define MODEL_ARENA_BYTES {program.arena_bytes}\n" in header
    assert Program.parse(program.data).input.dtype == "int8" and "MODEL_INPUTS 64 /* int8 */" in header
