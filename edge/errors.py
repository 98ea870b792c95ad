"""The one kind of error that is meant for the person at the terminal."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong and what to do; no traceback is shown."""


class ProgramError(UserError):
    """A model that the engine cannot run, or bytes that are not a program."""
