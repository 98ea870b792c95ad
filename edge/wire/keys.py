"""Whom a device obeys."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Keys:
    """A device's keys.

    Parameters
    ----------
    command
        32 bytes that it shares with the server: train tasks are sealed with it.
    current, next
        The fleet's public keys, 32 bytes each: all other commands are signed by one of the two. next may be None.
    root
        The public key that a change of these two is signed with.
    version
        Of these two, at least 1; it rises with every change.
    """

    command: bytes = field(repr=False)
    current: bytes
    next: bytes | None
    root: bytes
    version: int
