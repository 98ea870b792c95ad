"""Where samples come from."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import ClientData, Recording

Sample = tuple[NDArray[np.float32], float | NDArray[np.float32]]
"""Features, and the class or the targets."""


class Stream(Protocol):
    """A source of labelled samples, with which a device learns."""

    def open(self, seed: int) -> None:
        """Start the task of this seed; a sensor may ignore it.

        Raises
        ------
        ValueError
            If there are no samples.
        """
        ...

    def next(self, query: bool) -> Sample | None:
        """The next sample, or None if there is none yet. `query`: one that is never learned from."""
        ...


class RecordedStream:
    """A recording, from its first sample to its last and then again: as a sensor gives samples, whatever the seed."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._at = 0

    def open(self, seed: int) -> None:
        """See Stream."""
        self._at = 0

    def next(self, query: bool) -> Sample:
        """See Stream; query samples are not told apart from the others."""
        x, y = self._recording.x[self._at], self._recording.y[self._at]
        self._at = (self._at + 1) % len(self._recording.y)
        return x, y if isinstance(y, np.ndarray) else float(y)


class DatasetStream:
    """A device's samples, replayed as few-shot tasks: mote_stream.c, which draws the same on every target.

    Parameters
    ----------
    data
        The samples.

    Raises
    ------
    UserError
        If the data can't give a task.

    Examples
    --------
    >>> data = ClientData.of([np.full((8, 1), c, np.float32) for c in range(3)], 1.0, 3, fixed=True)
    >>> stream = DatasetStream(data)
    >>> stream.open(seed=1)
    >>> x, label = stream.next(query=False)
    >>> float(x[0]) == label
    True
    """

    def __init__(self, data: ClientData) -> None:
        classes = len(data.starts) - 1
        if not 1 <= data.ways <= min(lib.MOTE_STREAM_MAX_WAYS, classes):
            raise UserError(
                f"{classes} classes can't give a task of {data.ways} ways; give 1 to "
                f"{min(lib.MOTE_STREAM_MAX_WAYS, classes)}"
            )
        if data.fixed and data.ways != classes:
            raise UserError(f"a task of {data.ways} ways can't give {classes} classes their own labels")
        self.data = data
        self.c: Any = ffi.new("mote_stream_t *")
        self._keep = [ffi.from_buffer("uint32_t[]", data.starts)]  # all that the C code points to
        self.c.starts, self.c.classes = self._keep[0], classes
        if data.features.dtype == np.uint8:
            self._keep.append(ffi.from_buffer("uint8_t[]", data.features))
            self.c.features = self._keep[-1]
        else:
            self._keep.append(ffi.from_buffer("float[]", data.features))
            self.c.values = self._keep[-1]
        if data.targets is not None:
            self._keep.append(ffi.from_buffer("float[]", data.targets))
            self.c.targets, self.c.outputs = self._keep[-1], data.targets.shape[1]
        self.c.size, self.c.scale, self.c.ways, self.c.fixed = data.features.shape[1], data.scale, data.ways, data.fixed

    def open(self, seed: int) -> None:
        """See Stream."""
        if lib.mote_stream_open(self.c, seed & 0xFFFFFFFF) != lib.MOTE_OK:
            raise ValueError("these samples can't give a task")

    def next(self, query: bool) -> Sample:
        """See Stream; there always is a sample once a task is open."""
        x, y = np.empty(self.c.size, np.float32), np.empty(max(self.c.outputs, 1), np.float32)
        lib.mote_stream_next(self.c, query, ffi.from_buffer("float[]", x), ffi.from_buffer("float[]", y))
        return x, y if self.c.outputs else float(y[0])
