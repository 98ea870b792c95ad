"""The one kind of error that is meant for the person at the terminal, and what may be printed there."""

import re

# What moves the cursor, hides or reorders text: control characters, and Unicode's invisible and bidirectional ones.
# Half of a surrogate pair cannot be written at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; no traceback is shown."""


class ProgramError(UserError):
    """A model that the engine cannot run, or bytes that are not a program."""


def printable(text: str, longest: int = 2000) -> str:
    """Text of anyone's, for a terminal or a log: one line, of bounded length, without what controls a terminal.

    Examples
    --------
    >>> printable("kitchen\\x1b[2J", longest=10)
    'kitchen�[2…'
    """
    cut = text if len(text) <= longest else text[:longest] + "…"
    return _UNPRINTABLE.sub("�", cut)
