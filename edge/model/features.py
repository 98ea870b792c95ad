"""Features of speech: the log-mel energies that mote_mel.c computes, here as on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib

BANDS: int = lib.MOTE_MEL_BANDS
RATE: int = lib.MOTE_MEL_RATE
WINDOW: int = lib.MOTE_MEL_WINDOW
HOP: int = lib.MOTE_MEL_HOP
VERSION: int = lib.MOTE_MEL_VERSION


def frames(samples: int) -> int:
    """Number of frames in a recording of that many samples."""
    return max(0, (samples - WINDOW) // HOP + 1)


def log_mel(samples: NDArray[np.int16]) -> NDArray[np.uint8]:
    """Energies [frames, BANDS] of speech [n] at 16 kHz, in eighths of an octave (see mote_mel.h)."""
    bands = np.zeros((frames(len(samples)), BANDS), np.uint8)
    mel: Any = ffi.new("mote_mel_t *")
    lib.mote_mel_open(mel)
    data = np.ascontiguousarray(samples, np.int16)
    lib.mote_mel_push(mel, ffi.from_buffer("int16_t[]", data), len(data), ffi.from_buffer("uint8_t[]", bands))
    return bands


def level(bands: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Subtract the mean of all energies; what lies below it becomes 0. Same shape."""
    above = np.array(bands, np.uint8, order="C")
    lib.mote_mel_level(ffi.from_buffer("uint8_t[]", above), above.size)
    return above
