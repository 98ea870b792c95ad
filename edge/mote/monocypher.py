"""Fetches Monocypher, whose curve checks Ed25519 signatures, from the source distribution of `pymonocypher`.

    python monocypher.py FOLDER    writes monocypher.c, monocypher.h and their licence to FOLDER

It is fetched once, and kept beside this file; it is no part of the repository. This file imports nothing of the
package, so that a build can run it before anything is installed.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

VERSION = "4.0.3.4"
#: SHA-256 of what is taken from it.
FILES = {
    "monocypher.c": "57eb914fc88136119bd41655cccb8c250048bf54d470540625186f8ab16f64be",
    "monocypher.h": "c494da712122da7ff679fdcf318a5317e84972b6c950fe9d896212947797facd",
    "LICENSE.txt": "d3a6d889033e22c8ee30bb2891f0787a3288fc594994cd04c885761c4475e30f",
}
KEPT = Path(__file__).resolve().parent / "monocypher"


def copy_to(folder: Path) -> list[Path]:
    """Write Monocypher's files into `folder`, which is made if it is missing. Returns the C files."""
    if not all(_is_right(KEPT / name) for name in FILES):
        _fetch()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(KEPT / name, folder / ("monocypher-licence.txt" if name == "LICENSE.txt" else name))
    return [folder / "monocypher.c"]


def _is_right(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == FILES[file.name]


def _fetch() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
        ]
        command += [":all:", "--dest", scratch, f"pymonocypher=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(scratch).glob("*.tar.gz"))
        if not archives:
            raise RuntimeError(
                f"Monocypher, which checks signatures on devices, can't be fetched: it comes from the source "
                f"distribution of pymonocypher {VERSION}, and pip says:\n{result.stderr.strip()}"
            )
        with tarfile.open(archives[0]) as archive:
            for name, digest in FILES.items():
                member = archive.extractfile(f"pymonocypher-{VERSION}/{name}")
                content = b"" if member is None else member.read()
                if hashlib.sha256(content).hexdigest() != digest:
                    raise RuntimeError(f"{name} of pymonocypher {VERSION} is not the one that was checked")
                KEPT.mkdir(exist_ok=True)
                partial = KEPT / f"{name}.part-{Path(scratch).name}"
                partial.write_bytes(content)
                partial.replace(KEPT / name)


if __name__ == "__main__":
    try:
        copy_to(Path(sys.argv[1]))
    except RuntimeError as error:
        sys.exit(str(error))
