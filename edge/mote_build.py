"""Builds `edge._mote`: the C engine as a Python extension (cffi, API mode).

`setup.py` runs this at `pip install`; `python edge/mote_build.py` builds in place for work on the C. The headers are
the only declaration of the interface: Python's view of it is read from them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import cffi

ROOT = Path(__file__).resolve().parent.parent
MOTE = Path("edge/mote")
GENERATED = Path("build/mote")  # the wire's C, made from protocol.cddl

sys.path.insert(0, str(Path(__file__).parent))  # pip runs this file by itself
from mote_codegen import DEFINES, generate  # type: ignore[import-not-found]  # noqa: E402

# What Python sees, in the order of their dependencies.
HEADERS = ["mote.h", "mote_host.h", "mote_node.h", "mote_stream.h", "mote_frame.h", "mote_mel.h"]
# Our own C: clean under STRICT, which the tests build it with.
SOURCES = ["mote.c", "mote_load.c", "mote_sgd.c", "mote_kernels.c", "mote_math.c", "mote_crc.c", "mote_stream.c"]
SOURCES += ["mote_conv.c", "mote_depthwise.c", "mote_pool.c", "mote_norm.c", "mote_pointwise.c", "mote_place.c"]
SOURCES += ["mote_dense.c", "mote_relu.c", "mote_loss.c", "mote_host.c"]
SOURCES += ["mote_int8_dense.c", "mote_int8_conv2d.c", "mote_int8_depthwise.c", "mote_int8_pool.c"]
SOURCES += ["mote_int8_pointwise.c", "mote_int8_softmax.c", "mote_int8_back.c", "mote_trained_int8.c"]
SOURCES += ["mote_int8_dots.c", "mote_int8_dsp.c", "mote_int8_mve.c", "mote_int8_avx2.c"]
SOURCES += ["mote_node.c", "mote_update.c", "mote_frame.c", "mote_mel.c"]

# Contraction would let a compiler fuse a product and a sum, and round once where another target rounds twice.
FLAGS = ["-std=c99", "-O2", "-ffp-contract=off"]
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wvla", "-Werror"]


def declarations(header: str) -> str:
    """A header's text as cffi reads it: comments and preprocessor lines gone, integer constants kept."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / MOTE / header).read_text(), flags=re.DOTALL)
    lines = []
    for line in text.splitlines():
        constant = re.fullmatch(r"#define (\w+) (0x[0-9a-fA-F]+|\d+)[uU]?\s*", line)
        if constant:
            lines.append(f"#define {constant[1]} {int(constant[2], 0)}")
        elif not line.startswith("#"):
            lines.append(line)
    return "\n".join(lines)


def builder() -> cffi.FFI:
    """The extension's description; its paths are relative to the current folder, the project's root."""
    generated = generate(GENERATED)
    ffi = cffi.FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header))
    ffi.set_source(
        "tinyfleet.edge._mote",
        "\n".join(f'#include "{header}"' for header in HEADERS),
        sources=[str(MOTE / source) for source in SOURCES] + [str(source) for source in generated],
        include_dirs=[str(MOTE), str(GENERATED)],
        define_macros=[(name, None) for name in DEFINES],
        extra_compile_args=FLAGS,
    )
    return ffi


def build() -> Path:
    """Compiles the extension beside this file and returns its path."""
    with tempfile.TemporaryDirectory() as scratch:
        # All is made in the scratch folder: a link to the sources keeps the paths as they are.
        os.chdir(scratch)
        (Path(scratch) / "edge").mkdir()
        (Path(scratch) / MOTE).symlink_to(ROOT / MOTE)
        built = Path(builder().compile(tmpdir=scratch))
        # cffi keeps to the stable ABI; under the name that pip gives it, none of the two can hide the other.
        target = ROOT / "edge" / "_mote.abi3.so"
        shutil.copy(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)  # a process that uses the old one keeps it
    return target


if __name__ == "__main__":
    print(build())
