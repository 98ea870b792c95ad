"""Generates the C node's encoder and decoder from protocol.cddl with zcbor.

Nothing generated is kept in the source tree: whoever compiles the node (mote_build.py, the firmware's build) names a
build folder.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ENTRIES = ["command", "reply", "status", "chunk"]

# What zcbor's run-time needs to know. Canonical: arrays of known length, which is what small CBOR readers expect.
DEFINES = ["ZCBOR_CANONICAL"]


def generate(out: Path) -> list[Path]:
    """Writes the generated and zcbor's run-time sources and headers into `out` (made if missing).

    Returns the C files; `out` is their include folder, and they are compiled with DEFINES.
    """
    out.mkdir(parents=True, exist_ok=True)
    cddl = Path(__file__).resolve().parent / "wire" / "protocol.cddl"
    package = find_spec("zcbor")
    if package is None or package.submodule_search_locations is None:
        raise RuntimeError("zcbor is not installed: pip install zcbor==0.9.1")
    command = [sys.executable, "-c", "import zcbor; zcbor.main()", "code", "--decode", "--encode"]
    command += ["--cddl", str(cddl), "--entry-types", *ENTRIES]
    command += ["--output-c", str(out / "protocol.c"), "--output-h", str(out / "protocol.h")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"zcbor does not accept {cddl}:\n{result.stderr}")
    root = Path(package.submodule_search_locations[0])
    for header in ("common", "decode", "encode", "print", "tags"):
        shutil.copy(root / "include" / f"zcbor_{header}.h", out)
    for source in ("common", "decode", "encode"):
        shutil.copy(root / "src" / f"zcbor_{source}.c", out)
    names = ["protocol_decode.c", "protocol_encode.c", "zcbor_common.c", "zcbor_decode.c", "zcbor_encode.c"]
    return [out / name for name in names]
