"""Builds the C library as a Python extension (cffi, API mode).

`setup.py` runs this at `pip install`; `python edge/mote/build_extension.py` builds in place for work on the C. The
public headers are the only declaration of the interface: Python's view of it is read from them.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import tempfile
from pathlib import Path

import cffi

MODULE = "tinyfleet.edge._mote"

MOTE = Path(__file__).resolve().parent
ROOT = MOTE.parent.parent
GENERATED = Path("build/mote")  # the wire's C

#: Where quoted headers are found: the public ones, and the engine's own, which the other folders of src use too.
INCLUDES = (MOTE / "include", MOTE / "src" / "engine")

# What Python sees, in the order of their dependencies.
HEADERS = [
    "mote.h",
    "mote_host.h",
    "mote_cose.h",
    "mote_store.h",
    "mote_node.h",
    "mote_stream.h",
    "mote_frame.h",
    "mote_mel.h",
]

# What C calls in Python (edge/device/node.py): a mote_source_t, a mote_learner_t, a mote_clock_t, a mote_keep_t
# and (edge/device/store.py) a mote_flash_t.
CALLBACKS = """
extern "Python" {
    int mote_python_open(void *, uint32_t);
    int mote_python_next(void *, int, float *, float *);
    int mote_python_load(void *, const void *, size_t);
    int mote_python_set(void *, const float *, size_t);
    int mote_python_get(void *, float *, size_t);
    int mote_python_learn(void *, const float *, const float *, float, uint32_t, float *);
    int mote_python_score(void *, const float *, const float *, float *, int *);
    uint64_t mote_python_now(void *);
    int mote_python_keep_get(void *, uint32_t, void *, size_t);
    int mote_python_keep_set(void *, uint32_t, const void *, size_t);
    int mote_python_flash_write(void *, uint32_t, const void *, uint32_t);
    int mote_python_flash_erase(void *, uint32_t);
}
"""

# Contraction would let a compiler fuse a product and a sum, and round once where another target rounds twice.
FLAGS = ["-std=c99", "-O2", "-ffp-contract=off"]
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wvla", "-Werror"]


def sources(*folders: str) -> tuple[Path, ...]:
    """The C files in these folders of src, or in all: sorted, so that every build is the same."""
    return tuple(sorted(path for folder in folders or ("*",) for path in (MOTE / "src").glob(f"{folder}/*.c")))


def declarations(header: str) -> str:
    """A header's text as cffi reads it: comments and preprocessor lines gone, integer constants kept."""
    text = re.sub(r"/\*.*?\*/", "", (MOTE / "include" / header).read_text(), flags=re.DOTALL)
    text = re.sub(r"#ifdef __cplusplus\n.*?#endif", "", text, flags=re.DOTALL)
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
    # Run, not imported: while pip builds the package, it can't be imported.
    generated = runpy.run_path(str(MOTE / "codegen.py"))["generate"](GENERATED)
    ffi = cffi.FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header))
    ffi.cdef(CALLBACKS)
    ffi.set_source(
        MODULE,
        "\n".join(f'#include "{header}"' for header in HEADERS),
        sources=[str(path) for path in (*(path.relative_to(ROOT) for path in sources()), *generated)],
        include_dirs=[str(path) for path in (*(path.relative_to(ROOT) for path in INCLUDES), GENERATED)],
        extra_compile_args=FLAGS,
    )
    return ffi


def build() -> Path:
    """Compiles the extension into the package and returns its path."""
    with tempfile.TemporaryDirectory() as scratch:
        # All is made in the scratch folder: a link to the sources keeps the paths as they are.
        os.chdir(scratch)
        (Path(scratch) / "edge").mkdir()
        (Path(scratch) / "edge" / "mote").symlink_to(MOTE)
        built = Path(builder().compile(tmpdir=scratch))
        # cffi keeps to the stable ABI; under the name that pip gives it, none of the two can hide the other.
        target = MOTE.parent / "_mote.abi3.so"
        shutil.copy(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)  # a process that uses the old one keeps it
    return target


if __name__ == "__main__":
    print(build())
