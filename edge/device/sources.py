"""Where samples come from."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge.tasks import ClientData, Recording

Sample = tuple[NDArray[np.float32], float | NDArray[np.float32]]
"""Features, and the class or the targets."""

MAX_WAYS = 32


class Stream(Protocol):
    """A source of labelled samples for an agent."""

    def open(self, seed: int) -> None:
        """Starts the task of this seed; a sensor may ignore it. Raises ValueError if there are no samples."""
        ...

    def next(self, query: bool) -> Sample | None:
        """The next sample, or None if there is none yet. `query`: one that is never learned from."""
        ...


class RecordedStream:
    """A recording, from its first sample on, and at its end again: as a sensor gives samples, whatever the seed."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._at = 0

    def open(self, seed: int) -> None:
        """See Stream."""
        self._at = 0

    def next(self, query: bool) -> Sample:
        """See Stream; what is for queries is not told apart from the rest."""
        x, y = self._recording.x[self._at], self._recording.y[self._at]
        self._at = (self._at + 1) % len(self._recording.y)
        return x, y if isinstance(y, np.ndarray) else float(y)


class DatasetStream:
    """mote_stream.c in Python: the same seed gives the same task and the same samples, to the bit."""

    def __init__(self, data: ClientData) -> None:
        """Raises ValueError if the data can't give a task."""
        sizes = np.diff(data.starts.astype(np.int64))
        if not 1 <= data.ways <= min(MAX_WAYS, len(sizes)) or sizes.min() < 2 or not np.isfinite(data.scale):
            raise ValueError(f"{len(sizes)} classes, at least 2 samples each, can't give a task of {data.ways} ways")
        if data.fixed and data.ways != len(sizes):
            raise ValueError(f"a task of {data.ways} ways can't give {len(sizes)} classes their own labels")
        if data.starts[0] != 0 or data.starts[-1] != len(data.features):
            raise ValueError("the classes are not all the samples")
        self._data = data
        self._scale = np.float32(data.scale)
        self._random = 1
        self._chosen: list[int] = []

    def _below(self, n: int) -> int:
        """0 .. n-1: xorshift32 (Marsaglia 2003), scaled by a product (Lemire 2019)."""
        r = self._random
        r ^= r << 13 & 0xFFFFFFFF
        r ^= r >> 17
        r ^= r << 5 & 0xFFFFFFFF
        self._random = r
        return r * n >> 32

    def open(self, seed: int) -> None:
        """See Stream."""
        seed &= 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            seed = (seed ^ seed >> shift) * factor & 0xFFFFFFFF
        self._random = seed or 0x9E3779B9
        ways, classes = self._data.ways, len(self._data.starts) - 1
        if self._data.fixed:
            self._chosen = list(range(ways))
            return
        chosen: list[int] = []
        for i in range(ways):
            last = classes - ways + i
            drawn = self._below(last + 1)
            chosen.append(last if drawn in chosen else drawn)
        for i in range(ways - 1, 0, -1):
            j = self._below(i + 1)
            chosen[i], chosen[j] = chosen[j], chosen[i]
        self._chosen = chosen

    def next(self, query: bool) -> Sample:
        """See Stream; there always is a sample once a task is open."""
        label = self._below(self._data.ways)
        first, end = (int(row) for row in self._data.starts[self._chosen[label] : self._chosen[label] + 2])
        count = end - first
        kept = 1 if count < 8 else count // 4
        row = first + count - kept + self._below(kept) if query else first + self._below(count - kept)
        features, targets = self._data.features[row], self._data.targets
        x = features if features.dtype == np.float32 else features.astype(np.float32) * self._scale
        return x, float(label) if targets is None else targets[row]
