"""Files that may be anyone's: their size and shape are checked before they are read."""

from __future__ import annotations

import io
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyfleet.edge.errors import UserError, printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What zipfile, its decompressors and NumPy raise for damaged and for unusual files.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,  # it is encrypted
    NotImplementedError,
    EOFError,
    ValueError,
    OverflowError,
    MemoryError,  # a header claims an array that is larger than any memory
    SyntaxError,
    TypeError,
    KeyError,
    tokenize.TokenError,
)
_MEMBER = b"PK\x01\x02"  # begins each entry of an archive's list
_MAX_MEMBERS = 10_000
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds what the others unpack to only afterwards


def read_file(path: Path, most: int, advice: str) -> bytes:
    """Read a file.

    Parameters
    ----------
    path
        The file.
    most
        Bytes of the largest file that is read.
    advice
        What to do if it cannot be read, for the error.

    Returns
    -------
    bytes
        Its content.

    Raises
    ------
    UserError
        If it cannot be read, is larger, or is a device or a pipe.
    """
    try:
        with open(path, "rb", buffering=0, opener=_open) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{path} is not a file; {advice}")
            if about.st_size > most:
                raise UserError(f"{path} has {about.st_size:,} bytes; at most {most:,} are read; {advice}")
            return file.read(most)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}; {advice}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to would never be done


@contextmanager
def open_zip(data: bytes, most: int) -> Iterator[zipfile.ZipFile]:
    """Open a ZIP archive whose members all unpack to at most `most` bytes together.

    Raises
    ------
    ValueError
        If it is no such archive, or if what is done with it in the `with` block shows that it is damaged.
    """
    if data.count(_MEMBER) > _MAX_MEMBERS:  # zipfile makes an object for each
        raise ValueError(f"it has more than {_MAX_MEMBERS:,} members")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if any(member.compress_type not in _COMPRESSIONS for member in members):
                raise ValueError("a part of it is compressed in an unusual way")
            if any(member.flag_bits & 1 for member in members):
                raise ValueError("a part of it is encrypted")
            if sum(member.file_size for member in members) > most:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
            yield archive
    except _ZIP_ERRORS as error:
        raise ValueError(printable(str(error), 200) or type(error).__name__) from None


def read_npz(path: Path, most: int, advice: str) -> dict[str, NDArray[Any]]:
    """Read NumPy's arrays from a .npz file.

    Parameters
    ----------
    path
        The file.
    most
        Bytes of the arrays together, at most; the file has no more, either.
    advice
        What to do if it cannot be read, for the error.

    Returns
    -------
    dict of str to ndarray
        The arrays by name; none of Python objects.

    Raises
    ------
    UserError
        If it cannot be read, or is larger.
    ValueError
        If it is no such file; the text says why.
    """
    import numpy as np

    data = read_file(path, most, advice)
    with open_zip(data, most), np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
