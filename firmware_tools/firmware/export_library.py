"""Exports the engine as a library for other projects: an Arduino library or a CMake project.

Both have the engine's C sources unchanged, a model's program as a C array (model.h) and, if the model learns classes,
an example that learns them from a stream. With a model, the library has the operators that the model needs. Without
one it has all operators, and model.h is a small network. The CMake project is edge/mote with the wire's code already
generated, so that it builds a node without Python; the Arduino library is the engine, in one folder.
"""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Literal, get_args

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, Layer, ReLU
from tinyfleet.edge.model.layers import build as build_program
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote import codegen
from tinyfleet.edge.mote.build_extension import MOTE, ROOT
from tinyfleet.firmware_tools.firmware import kernel_table
from tinyfleet.firmware_tools.firmware.build import ENGINE

Format = Literal["arduino", "cmake"]
FORMATS: tuple[Format, ...] = get_args(Format)
LIBRARY = Path(__file__).parent / "library"

#: Arduino sets the compiler's options for a board. This one is in each file, for the same bits as on every target.
_EXACT_PRAGMA = '#pragma GCC optimize("fp-contract=off")\n'


def version() -> str:
    """The engine's version, from mote.h."""
    found = re.search(r'#define MOTE_VERSION "([^"]+)"', (MOTE / "include" / "mote.h").read_text())
    assert found is not None
    return found[1]


def first_model() -> Program:
    """A small network with random weights, as an example: 16 readings, 3 classes."""
    layers: list[Layer] = [Dense(12), ReLU(), Dense(3)]
    blank = build_program(layers, (16,), "softmax_cross_entropy")
    return build_program(layers, (16,), "softmax_cross_entropy", weights=blank.split(blank.initial(1)))


def model_header(program: Program) -> str:
    """The text of model.h: the program as a C array, aligned as mote_load needs it, and the sizes that callers need."""
    data = program.data
    words = [f"0x{int.from_bytes(data[i : i + 4], 'little'):08x}" for i in range(0, len(data), 4)]
    lines = [", ".join(words[i : i + 10]) + "," for i in range(0, len(words), 10)]
    return "\n".join(
        [
            f"/* Generated: model {program.model_id.hex()}, {len(data)} bytes. */",
            "#ifndef MODEL_H",
            "#define MODEL_H",
            "",
            "#include <stdint.h>",
            "",
            f"#define MODEL_ARENA_BYTES {program.arena_bytes}",
            f"#define MODEL_INPUTS {program.input.size} /* {program.input.dtype} */",
            f"#define MODEL_OUTPUTS {program.output.size} /* {program.output.dtype} */",
            f"typedef {'int8_t' if program.input.dtype == 'int8' else 'float'} model_input_t;",
            "",
            "static const uint32_t model[] = {",
            *(f"    {line}" for line in lines),
            "};",
            "",
            "#endif",
            "",
        ]
    )


def export(format: Format, out: Path, program: Program | None = None) -> list[Path]:
    """Write the library to a folder.

    Parameters
    ----------
    format
        "arduino" or "cmake".
    out
        The folder, new or empty.
    program
        The model that it comes with; None for an example.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    UserError
        If the folder is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder with --out")
    kernels = kernel_table.source(kernel_table.whole() if program is None else kernel_table.needed([program.data]))
    model = first_model() if program is None else program
    learns_classes = model.loss == "softmax_cross_entropy"
    if format == "arduino":
        _arduino(out, kernels, model_header(model), learns_classes)
    else:
        _cmake(out, kernels, model_header(model), learns_classes)
    (out / "LICENSE").write_text(_license())
    return sorted(path for path in out.rglob("*") if path.is_file())


def _license() -> str:
    checkout = ROOT / "LICENSE"
    if checkout.exists():
        return checkout.read_text()
    installed = metadata.distribution("tinyfleet").read_text("licenses/LICENSE")
    assert installed is not None, "the wheel has no licence"
    return installed


def _headers(sources: tuple[Path, ...]) -> list[Path]:
    """The library's headers that these files include, directly or not."""
    headers = {path.name: path for path in MOTE.rglob("*.h")}
    found: set[Path] = set()
    wanted = list(sources)
    while wanted:
        for name in re.findall(r'#include "(\w+\.h)"', wanted.pop().read_text()):
            if (header := headers[name]) not in found:
                found.add(header)
                wanted.append(header)
    return sorted(found)


def _arduino(out: Path, kernels: str, model: str, example: bool) -> None:
    sources = out / "src"
    sources.mkdir(parents=True)
    for path in ENGINE:
        text = kernels if path == kernel_table.SOURCE else path.read_text()
        (sources / path.name).write_text(_EXACT_PRAGMA + text)
    for header in _headers(ENGINE):
        shutil.copyfile(header, sources / header.name)
    (sources / "model.h").write_text(model)
    properties = Template((LIBRARY / "library.properties.in").read_text())
    (out / "library.properties").write_text(properties.substitute(version=version()))
    shutil.copyfile(LIBRARY / "keywords.txt", out / "keywords.txt")
    if example:
        folder = out / "examples" / "LearnOnAStream"
        folder.mkdir(parents=True)
        shutil.copyfile(LIBRARY / "LearnOnAStream.ino", folder / "LearnOnAStream.ino")


def _cmake(out: Path, kernels: str, model: str, example: bool) -> None:
    for folder in ("include", "src"):
        shutil.copytree(MOTE / folder, out / folder)
    for name in ("CMakeLists.txt", "README.md"):
        shutil.copyfile(MOTE / name, out / name)
    (out / kernel_table.SOURCE.relative_to(MOTE)).write_text(kernels)
    (out / "include" / "model.h").write_text(model)
    codegen.generate(out / "wire")
    if example:
        (out / "examples").mkdir()
        shutil.copyfile(MOTE / "examples" / "quickstart.c", out / "examples" / "quickstart.c")
