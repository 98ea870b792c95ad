"""The names of the C library's error codes."""

from __future__ import annotations

from tinyfleet.edge._mote import ffi, lib


def error_name(code: int) -> str:
    """The name of one of the C library's errors.

    Parameters
    ----------
    code
        What a function of the library returned.

    Examples
    --------
    >>> error_name(-3)
    'MOTE_ERR_CRC'
    """
    return str(ffi.string(lib.mote_error_name(code)).decode())
