"""The one kind of error that is meant for the person at the terminal."""

from tinyfleet.edge._mote import ffi, lib


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong and what to do; no traceback is shown."""


class ProgramError(UserError):
    """A model that the engine cannot run, or bytes that are not a valid program."""


def error_name(code: int) -> str:
    """The name of one of the C library's errors.

    Examples
    --------
    >>> error_name(-3)
    'MOTE_ERR_CRC'
    """
    return str(ffi.string(lib.mote_error_name(code)).decode())
