"""Commands for devices without keys, for tests that speak to a device as the server does."""

from __future__ import annotations

import itertools
import time

from tinyfleet.edge.wire.commands import Action, encode_action, encode_command

_numbers = itertools.count(1)


def plain(action: Action, *, nonce: bytes | None = None) -> bytes:
    """A command that no seal protects. A second call is another command.

    Parameters
    ----------
    action
        What to do.
    nonce
        That of the device's status, where it does not know the time: that of a board without keys is of zeros.
    """
    now = time.time_ns() // 1_000_000
    return encode_command(now + 1000 + next(_numbers), now + 3_600_000, nonce, encode_action(action))
