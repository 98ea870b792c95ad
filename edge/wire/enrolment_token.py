"""The text that lets its owner join a fleet once: `tinyfleet device enrol` prints it, `--enrol` takes it."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from tinyfleet.edge.errors import UserError

_PREFIX = "tinyfleet1."
_LONGEST = 2000
_SECRET = re.compile(r"[A-Za-z0-9_-]{20,100}")


@dataclass(frozen=True)
class EnrolmentToken:
    """What a token says.

    Parameters
    ----------
    url
        Address of the server's HTTP API.
    fingerprint
        SHA-256 of the fleet's authority, whose certificate the server must show.
    secret
        What the server knows the token by.
    name
        Whom it is for, if it is for one.

    Examples
    --------
    >>> token = EnrolmentToken("https://fleet.example:8443", bytes(32), "A" * 32)
    >>> EnrolmentToken.parse(token.text) == token
    True
    """

    url: str
    fingerprint: bytes
    secret: str
    name: str | None = None

    @property
    def text(self) -> str:
        """The token as one word."""
        content = json.dumps([self.url, self.fingerprint.hex(), self.secret, self.name], separators=(",", ":"))
        return _PREFIX + base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> EnrolmentToken:
        """Read a token.

        Raises
        ------
        UserError
            If it is damaged, or something else.
        """
        problem = UserError("that is no enrolment token; copy the whole line that `tinyfleet device enrol` printed")
        word = text.strip()
        if not word.startswith(_PREFIX) or len(word) > _LONGEST:
            raise problem
        body = word.removeprefix(_PREFIX)
        try:
            url, fingerprint, secret, name = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            parts = urlsplit(url)
            token = cls(url, bytes.fromhex(fingerprint), secret, name)
            if parts.scheme not in ("http", "https") or not parts.hostname or len(token.fingerprint) != 32:
                raise ValueError
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            raise problem from error
        if not isinstance(secret, str) or not _SECRET.fullmatch(secret) or not isinstance(name, (str, type(None))):
            raise problem
        return token
