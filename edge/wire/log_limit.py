"""Limits the log lines that one cause can write."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class LogLimit:
    """Passes on at most some lines a second from each cause, and counts the others.

    Parameters
    ----------
    write
        Called with each line that is passed on.
    per_second
        Lines a second of one cause.
    clock
        Returns a time in seconds.

    Examples
    --------
    >>> now = 0.0
    >>> limit = LogLimit(print, 1, lambda: now)
    >>> for name in ("a", "b", "c"):
    ...     limit("rejected", f"{name} is rejected")
    a is rejected
    >>> now = 1.0
    >>> limit("rejected", "d is rejected")
    and 2 more like it
    d is rejected
    """

    def __init__(
        self, write: Callable[[str], None], per_second: int = 20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write = write
        self._per_second = per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._causes: dict[str, tuple[float, int]] = {}  # when its second began, and its lines since

    def __call__(self, cause: str, line: str) -> None:
        """Write a line, or count it.

        Parameters
        ----------
        cause
            One of a few that the program names; never a text from outside.
        line
            The line.
        """
        now, left_out = self._clock(), 0
        with self._lock:
            began, lines = self._causes.get(cause, (now, 0))
            if now - began >= 1:
                began, left_out, lines = now, max(0, lines - self._per_second), 0
            self._causes[cause] = began, lines + 1
        if left_out:
            self._write(f"and {left_out} more like it")
        if lines < self._per_second:
            self._write(line)
