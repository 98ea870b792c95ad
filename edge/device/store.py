"""What a device keeps through a reset, in a file: the C library's log of records, as on a microcontroller's flash."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.engine_errors import error_name
from tinyfleet.edge.errors import UserError

PAGE = 16_384
"""Bytes of a page; all that a record's place takes are whole ones."""
CAPACITY = 4 << 20
"""Bytes that a store holds by default: two programs and the weights of the largest, and what is written meanwhile."""


class FileStore:
    """Records under small numbers, each written in full or not at all, whenever the process or the power ends.

    Parameters
    ----------
    path
        The file; it is made if it is missing. Only its owner may read it.
    capacity
        Bytes that it holds.

    Raises
    ------
    UserError
        If it cannot be used, or another process uses it.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with FileStore(Path(folder) / "store", 1 << 16) as store:
    ...         store.set(1, b"kept")
    ...     with FileStore(Path(folder) / "store", 1 << 16) as store:
    ...         store.get(1)
    b'kept'
    """

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        self._path = path
        self._pages = max(3, capacity // PAGE + 2)
        self._image = bytearray()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UserError(f"the store {path} cannot be used ({error})") from None
        try:
            self._open()
        except BaseException:
            os.close(self._file)
            raise

    def _open(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process uses the store {self._path}; a device runs once, under one name"
            ) from None
        size = self._pages * PAGE
        self._image = bytearray(os.pread(self._file, size, 0).ljust(size, b"\xff"))
        self._memory: Any = ffi.from_buffer("uint8_t[]", self._image)
        self._handle: Any = ffi.new_handle(self)
        self._host: Any = ffi.new("mote_host_flash_t *", (self._memory, self._handle))
        flash = ffi.new("mote_flash_t *")
        flash.context, flash.read_at = self._host, lib.mote_host_flash_read
        flash.write_at, flash.erase_page = lib.mote_python_flash_write, lib.mote_python_flash_erase
        flash.page_size, flash.pages, flash.unit = PAGE, self._pages, 1
        self._store: Any = ffi.new("mote_store_t *")
        self._check(lib.mote_store_open(self._store, flash))

    def _check(self, error: int) -> None:
        if error < 0:
            raise UserError(f"the store {self._path} failed with {error_name(error)}; is its disk full?")

    def __enter__(self) -> FileStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and let another process use it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def get(self, key: int) -> bytes | None:
        """The record under this key, 1 to 254; None if there is none.

        Raises
        ------
        UserError
            If it cannot be read.
        """
        out = ffi.new("uint8_t[]", len(self._image))
        size = lib.mote_store_get(self._store, key, out, len(self._image))
        self._check(size)
        return bytes(ffi.buffer(out, size)) or None

    def set(self, key: int, data: bytes) -> None:
        """Write a record. Without data: remove it.

        Raises
        ------
        UserError
            If there is no room for it, or it cannot be written.
        """
        self._check(lib.mote_store_set(self._store, key, data or ffi.NULL, len(data)))

    def write(self, at: int, data: bytes) -> None:
        """Write to the file, then to its image: the log is right on disk at any moment."""
        os.pwrite(self._file, data, at)
        os.fdatasync(self._file)
        self._image[at : at + len(data)] = data


def _store_of(context: Any) -> FileStore:
    store: FileStore = ffi.from_handle(ffi.cast("mote_host_flash_t *", context).owner)
    return store


def _callback(function: Callable[..., int]) -> None:
    """Let C call it as mote_python_flash{name}."""
    ffi.def_extern(name=f"mote_python_flash{function.__name__}", error=-10)(function)  # MOTE_ERR_STORE


@_callback
def _write(context: Any, at: int, data: Any, size: int) -> int:
    with contextlib.suppress(OSError):
        _store_of(context).write(at, bytes(ffi.buffer(data, size)))
        return int(lib.MOTE_OK)
    return int(lib.MOTE_ERR_STORE)


@_callback
def _erase(context: Any, page: int) -> int:
    with contextlib.suppress(OSError):
        _store_of(context).write(page * PAGE, b"\xff" * PAGE)
        return int(lib.MOTE_OK)
    return int(lib.MOTE_ERR_STORE)
