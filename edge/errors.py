"""The one kind of error that is meant for the person at the terminal, and what may be printed there."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; no traceback is shown."""

    exit_code = 2
    """Of the command."""


class ProgramError(UserError):
    """A model that the engine cannot run, or bytes that are not a program."""


def printable(text: str, longest: int = 2000) -> str:
    """Text of anyone's, for a terminal or a log: one line, of bounded length, without what controls a terminal.

    Control characters, line separators, half surrogate pairs, and what is invisible or turns text around become �.

    Examples
    --------
    >>> printable("kitchen\\x1b[2J", longest=10)
    'kitchen�[2…'
    """
    cut = text if len(text) <= longest else text[:longest] + "…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "�" for c in cut)
