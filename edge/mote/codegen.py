"""Generates the C node's encoder and decoder from the wire's CDDL file with zcbor, and puts Monocypher beside them.

    python codegen.py FOLDER    writes them to FOLDER, and prints the CDDL file that they were made from

Nothing generated is kept in the source tree: each build of the node (the Python extension, CMake, the firmware) names a
folder of its own. This file imports nothing of the package, so that a build can run it before anything is installed.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

CDDL = Path(__file__).resolve().parent.parent / "wire" / "protocol.cddl"
ENTRIES = ["command", "time-message", "reply", "status", "chunk"]

# Written at the top of zcbor's common header, so that no build has to define it. Canonical: arrays of known length,
# which is what small CBOR readers expect.
SETTINGS = """/* Changed from zcbor's own file: the setting that follows. */
#ifndef ZCBOR_CANONICAL
#define ZCBOR_CANONICAL
#endif

"""


def generate(out: Path) -> list[Path]:
    """Writes the generated, zcbor's run-time and Monocypher's sources and headers into `out`, made if it is missing.

    Returns the C files; `out` is their include folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    package = find_spec("zcbor")
    if package is None or package.submodule_search_locations is None:
        raise RuntimeError(
            f"zcbor, which generates the wire's C, is not installed for {sys.executable}; install it with: "
            f"{sys.executable} -m pip install zcbor==0.9.1"
        )
    command = [sys.executable, "-c", "import zcbor; zcbor.main()", "code", "--decode", "--encode"]
    command += ["--cddl", str(CDDL), "--entry-types", *ENTRIES]
    command += ["--output-c", str(out / "protocol.c"), "--output-h", str(out / "protocol.h")]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"zcbor does not accept {CDDL}:\n{result.stderr}")
    root = Path(package.submodule_search_locations[0])
    for header in ("common", "decode", "encode", "print", "tags"):
        shutil.copy(root / "include" / f"zcbor_{header}.h", out)
    common = out / "zcbor_common.h"
    common.write_text(SETTINGS + common.read_text())
    for source in ("common", "decode", "encode"):
        shutil.copy(root / "src" / f"zcbor_{source}.c", out)
    names = ["protocol_decode.c", "protocol_encode.c", "zcbor_common.c", "zcbor_decode.c", "zcbor_encode.c"]
    # Run, not imported: a build runs this file by its path.
    copy_monocypher = runpy.run_path(str(Path(__file__).resolve().parent / "monocypher.py"))["copy_to"]
    return [*(out / name for name in names), *copy_monocypher(out)]


if __name__ == "__main__":
    try:
        generate(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(str(error))
    print(CDDL)
