"""The standard output of a command, which may be full, closed or of a small character set."""

import errno
import io
import os
import sys


class Output(io.RawIOBase):
    """Standard output that outlives a full disk: what cannot be written is dropped, and the work goes on.

    Attributes
    ----------
    error
        The first error; None as long as everything was written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        """Write bytes, or drop them. Raises BrokenPipeError when the reader, such as head, wants no more."""
        payload = bytes(data)  # type: ignore[call-overload]
        try:
            return os.write(self._descriptor, payload)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            self.error = self.error or error
            return len(payload)


def protect_output() -> Output | None:
    """Put an Output in the place of sys.stdout, and let both streams replace characters that they do not have."""
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="replace")
    if not isinstance(sys.stdout, io.TextIOWrapper):  # closed before the command began
        return None
    try:
        output = Output(sys.stdout.fileno())
    except io.UnsupportedOperation:  # kept in memory: a test's
        return None
    terminal, encoding = output.isatty(), sys.stdout.encoding
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(output), encoding, "replace", line_buffering=terminal)
    return output
