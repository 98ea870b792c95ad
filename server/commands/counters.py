"""The numbers of commands, which only rise: over restarts, crashes and restored backups, too."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import write_private

BLOCK = 10_000
"""Numbers that are reserved on disk at once: those of ten seconds."""
AHEAD = 1 << 22
"""How far ahead of the time devices take a number, in milliseconds: as in the C node."""


def unix_ms() -> int:
    """Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


class Counters:
    """A number for each command, higher than any before it on its topic: max(last + 1, Unix time in milliseconds).

    A number is reserved on disk, with others, before it is used. A backup that is restored has an old reservation, but
    the time has gone on since.

    Parameters
    ----------
    file
        Where they are reserved; None: nowhere.
    clock
        Unix time in milliseconds.

    Raises
    ------
    UserError
        If the file is damaged.
    """

    def __init__(self, file: Path | None, clock: Callable[[], int] = unix_ms) -> None:
        self._file = file
        self._clock = clock
        self._lock = threading.Lock()
        self._last: dict[str, int] = {}
        self._floor = self._reserved = self._highest = self._read()

    def _read(self) -> int:
        try:
            return 0 if self._file is None else int(self._file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise UserError(
                f"the counters of commands in {self._file} cannot be read ({error}); remove the file if the clock of "
                "this machine is right"
            ) from None

    def next(self, topic: str, above: int = 0) -> int:
        """The next number.

        Parameters
        ----------
        topic
            Of the command.
        above
            What the device reports that it refuses up to, on its own topic. One that is too far ahead is not followed;
            no other topic's numbers follow it, nor do they after a restart.

        Returns
        -------
        int
        """
        with self._lock:
            now = self._clock()
            number = max(self._last.get(topic, self._floor) + 1, now)
            if number <= above <= now + AHEAD:
                number = above + 1
            else:
                self._reserve(number)
            self._last[topic] = number
            return number

    def _reserve(self, number: int) -> None:
        self._highest = max(self._highest, number)
        if number > self._reserved:
            self._write(number + BLOCK)

    def _write(self, number: int) -> None:
        if self._file is not None:
            write_private(self._file, str(number))
            _sync_folder(self._file.parent)
        self._reserved = number

    def close(self) -> None:
        """Give back what was reserved and not used."""
        with self._lock:
            if self._highest < self._reserved and self._highest > 0:
                self._write(self._highest)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
