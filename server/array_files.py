"""Arrays in .npz files that are there as a whole or not at all."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyfleet.edge.errors import UserError


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write a .npz file; a file that is there is replaced once the new one is complete.

    Raises
    ------
    UserError
        If it cannot be written. A file that was there is left as it was.
    """
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            np.savez(file, **arrays)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise UserError(f"cannot write {path} ({error.strerror or error}); make room, or choose another file") from None
