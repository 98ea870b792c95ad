"""Where data sets come from: your own folder, or their authors' address, with a checksum either way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from tinyfleet.edge.errors import UserError


def local(name: str) -> Path | None:
    """The file or folder of that name in TINYFLEET_DATA; None if it is not there, or if that is not set."""
    folder = os.environ.get("TINYFLEET_DATA")
    path = Path(folder, name) if folder else None
    return path if path is not None and path.exists() else None


def digest(paths: Iterable[Path]) -> str:
    """SHA-256, in hexadecimal, of the files' bytes one after the other."""
    sha = hashlib.sha256()
    for path in paths:
        sha.update(path.read_bytes())
    return sha.hexdigest()


def check(paths: Iterable[Path], sha256: str, name: str) -> None:
    """Raises UserError unless the files, one after the other, have this SHA-256."""
    paths = list(paths)
    if digest(paths) != sha256:
        raise UserError(
            f"{name} in {paths[0].parent} is not as it was published (its SHA-256 is another); copy it there again"
        )


def download(url: str, sha256: str, name: str, instead: str) -> Path:
    """The file at that address, from the user's cache if it was downloaded before. `instead`: what TINYFLEET_DATA may
    hold in its place. Raises UserError."""
    try:
        import pooch

        return Path(pooch.retrieve(url, f"sha256:{sha256}"))
    except ImportError as error:
        raise UserError(f"downloading {name} needs pooch: pip install 'tinyfleet[edge]'") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name} could not be downloaded from {url} ({error}); try again, or set TINYFLEET_DATA to a folder "
            f"that has {instead}"
        ) from error


def cache() -> Path:
    """The user's folder for what was downloaded, or computed from it. Raises UserError."""
    try:
        import pooch
    except ImportError as error:
        raise UserError("finding the cache folder needs pooch: pip install 'tinyfleet[edge]'") from error
    folder = Path(pooch.os_cache("tinyfleet"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
