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

ENTRIES = ["do", "did", "status", "chunk"]

# What zcbor's run-time needs to know. CANONICAL: arrays of known length, as every CBOR reader expects.
# STOP_ON_ERROR and VERBOSE stay off: a failed decoding is one return value.
DEFINES = ["ZCBOR_CANONICAL"]


def generate(out: Path) -> list[Path]:
    """Writes the generated and zcbor's run-time sources and headers into `out` (made if missing).

    Returns the C files; `out` is their include folder, and they are compiled with DEFINES.
    """
    out.mkdir(parents=True, exist_ok=True)
    cddl = Path(__file__).resolve().parent / "protocol.cddl"
    package = find_spec("zcbor")
    if package is None or package.submodule_search_locations is None:
        raise RuntimeError("zcbor is not installed: pip install zcbor==0.9.1")
    command = ["code", "--cddl", cddl, "--entry-types", *ENTRIES, "--decode", "--encode"]
    command += ["--output-c", out / "protocol.c", "--output-h", out / "protocol.h"]
    result = subprocess.run([sys.executable, "-c", "import zcbor; zcbor.main()", *command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"zcbor does not accept {cddl}:\n{result.stderr}")
    root = Path(package.submodule_search_locations[0])
    for header in ("common", "decode", "encode", "print", "tags"):
        shutil.copy(root / "include" / f"zcbor_{header}.h", out)
    for source in ("common", "decode", "encode"):
        shutil.copy(root / "src" / f"zcbor_{source}.c", out)
    names = ["protocol_decode.c", "protocol_encode.c", "zcbor_common.c", "zcbor_decode.c", "zcbor_encode.c"]
    return [out / name for name in names]
