"""The fleet's identities on disk: who has which certificate, which enrolment tokens are open, which API tokens count.

Secrets are kept as their SHA-256 only, but for the devices' command keys, which the server itself uses. What this
module has written is on disk when its methods return.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from tinyfleet.edge.errors import UserError
from tinyfleet.ontology.http.access import Scope

Role = Literal["device", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS identity (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, created INTEGER NOT NULL, revoked INTEGER, command_key BLOB
) STRICT;
CREATE TABLE IF NOT EXISTS certificate (
    serial TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, public_key BLOB NOT NULL, pem TEXT NOT NULL,
    not_after INTEGER NOT NULL, revoked INTEGER
) STRICT;
CREATE INDEX IF NOT EXISTS certificate_name ON certificate (name);
CREATE TABLE IF NOT EXISTS token (
    hash BLOB NOT NULL, name TEXT NOT NULL, role TEXT NOT NULL, expires INTEGER NOT NULL, public_key BLOB,
    PRIMARY KEY (hash, name)
) STRICT;
CREATE TABLE IF NOT EXISTS api_token (
    hash BLOB PRIMARY KEY, name TEXT NOT NULL, scope TEXT NOT NULL, created INTEGER NOT NULL
) STRICT;
"""


class IdentityRecord(NamedTuple):
    """One identity.

    Attributes
    ----------
    name, role
        Its name in the fleet, and whether it is a device or an operator.
    created, expires, revoked
        When it was enrolled, when its certificate ends, and when it was revoked, if it was.
    """

    name: str
    role: Role
    created: datetime
    expires: datetime
    revoked: datetime | None


class Issued(NamedTuple):
    """A certificate as it is kept."""

    serial: int
    name: str
    role: Role
    public_key: bytes
    pem: str
    not_after: int


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _time(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


class Identities:
    """The identities in a file; any thread may use it.

    Parameters
    ----------
    path
        The SQLite database; it is made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.chmod(0o600)
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on disk at the end, or nothing after an error."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _read(self, sql: str, *values: object) -> list[tuple[object, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    # Enrolment

    def add_token(self, secret: str, names: Sequence[str], role: Role, expires: int) -> None:
        """Open a token, with which each of these names can be enrolled once until `expires` (Unix time, seconds)."""
        with self._write() as db:
            db.execute("DELETE FROM token WHERE expires < ?", (expires - 40_000_000,))
            rows = [(_hash(secret), name, role, expires) for name in names]
            db.executemany("INSERT INTO token (hash, name, role, expires) VALUES (?, ?, ?, ?)", rows)

    def token_role(self, secret: str, name: str, public_key: bytes, now: int) -> tuple[Role, Issued | None]:
        """What a token allows.

        Returns
        -------
        tuple
            The role; and the certificate that this key was given with the token before, if its owner asks once more
            because the answer was lost.

        Raises
        ------
        UserError
            If the token is unknown, expired, or was used by another key.
        """
        wanted = _hash(secret)
        rows = self._read("SELECT role, expires, public_key FROM token WHERE hash = ? AND name = ?", wanted, name)
        if not rows:
            known = self._read("SELECT name FROM token WHERE hash = ? LIMIT 2", wanted)
            if not known:
                raise UserError("the server does not know this enrolment token")
            more = " and others" if len(known) > 1 else ""
            raise UserError(f"this enrolment token is not for that name, but for {known[0][0]}{more}")
        role, expires, used = rows[0]
        assert isinstance(expires, int)
        if expires < now:
            raise UserError("this enrolment token has expired; ask for a new one")
        if used is not None and used != public_key:
            raise UserError(f"this enrolment token has been used for {name} already; ask for a new one")
        return role, self.issued(name, public_key) if used is not None else None  # type: ignore[return-value]

    def enrol(self, secret: str, issued: Issued, command_key: bytes | None, now: int) -> Issued:
        """Take the token's use for this name, and keep its certificate in one step.

        An identity of this name that exists ends with it: its certificates are revoked.

        Returns
        -------
        Issued
            The certificate that counts: another one if the same key was enrolled at the same time.

        Raises
        ------
        UserError
            If another key has used the token meanwhile.
        """
        with self._write() as db:
            done = db.execute(
                "UPDATE token SET public_key = ? WHERE hash = ? AND name = ? AND public_key IS NULL",
                (issued.public_key, _hash(secret), issued.name),
            ).rowcount
            if done:
                # Another token for this name was made when nobody had it: it must not take the name over.
                db.execute("DELETE FROM token WHERE name = ? AND public_key IS NULL", (issued.name,))
                self._replace(db, issued, command_key, now)
                return issued
        _, before = self.token_role(secret, issued.name, issued.public_key, now)
        if before is None:
            raise UserError(f"this enrolment token has been used for {issued.name} already; ask for a new one")
        return before

    def put(self, issued: Issued, command_key: bytes | None, now: int) -> None:
        """Keep an identity that needs no token: the server's own."""
        with self._write() as db:
            self._replace(db, issued, command_key, now)

    def _replace(self, db: sqlite3.Connection, issued: Issued, command_key: bytes | None, now: int) -> None:
        db.execute("UPDATE certificate SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, issued.name))
        db.execute("DELETE FROM api_token WHERE name = ?", (issued.name,))
        db.execute(
            "INSERT OR REPLACE INTO identity (name, role, created, command_key) VALUES (?, ?, ?, ?)",
            (issued.name, issued.role, now, command_key),
        )
        self._insert(db, issued)

    def _insert(self, db: sqlite3.Connection, issued: Issued) -> None:
        db.execute(
            "INSERT INTO certificate (serial, name, role, public_key, pem, not_after) VALUES (?, ?, ?, ?, ?, ?)",
            (str(issued.serial), issued.name, issued.role, issued.public_key, issued.pem, issued.not_after),
        )

    def renew(self, issued: Issued, by: bytes) -> None:
        """Keep another certificate of an identity, which the owner of the public key `by` has asked for. The one before
        stays valid until it ends: its owner may not get the answer.

        Raises
        ------
        UserError
            If that key's certificates have been revoked meanwhile.
        """
        with self._write() as db:
            valid = "SELECT 1 FROM certificate WHERE name = ? AND public_key = ? AND revoked IS NULL"
            if not db.execute(valid, (issued.name, by)).fetchone():
                raise UserError(f"the identity {issued.name} has been revoked; enrol again")
            self._insert(db, issued)

    def revoke(self, name: str, now: int) -> Role:
        """End an identity: its certificates, tokens, and API tokens.

        Raises
        ------
        UserError
            If there is no identity of that name.
        """
        with self._write() as db:
            row = db.execute("SELECT role FROM identity WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise UserError(f"there is no identity {name}; see `tinyfleet device list`")
            db.execute("UPDATE identity SET revoked = ?, command_key = NULL WHERE name = ?", (now, name))
            db.execute("UPDATE certificate SET revoked = ? WHERE name = ? AND revoked IS NULL", (now, name))
            db.execute("DELETE FROM api_token WHERE name = ?", (name,))
            db.execute("DELETE FROM token WHERE name = ?", (name,))
            role: Role = row[0]
            return role

    def remove(self, name: str) -> None:
        """Forget a revoked identity; its certificates stay revoked."""
        with self._write() as db:
            db.execute("DELETE FROM identity WHERE name = ? AND revoked IS NOT NULL", (name,))

    # Looking up

    def issued(self, name: str, public_key: bytes) -> Issued | None:
        """The newest valid certificate of a name with this key."""
        rows = self._read(
            "SELECT serial, name, role, public_key, pem, not_after FROM certificate "
            "WHERE name = ? AND public_key = ? AND revoked IS NULL ORDER BY not_after DESC LIMIT 1", name, public_key,
        )  # fmt: skip
        return Issued(int(str(rows[0][0])), *rows[0][1:]) if rows else None  # type: ignore[arg-type]

    def public_keys(self, name: str, now: int) -> list[bytes]:
        """The public keys with which a name can prove now who it is."""
        rows = self._read(
            "SELECT public_key FROM certificate WHERE name = ? AND revoked IS NULL AND not_after > ?", name, now
        )
        return [key for (key,) in rows if isinstance(key, bytes)]

    def role(self, name: str) -> Role | None:
        """The role of a valid identity, or None."""
        rows = self._read("SELECT role FROM identity WHERE name = ? AND revoked IS NULL", name)
        return rows[0][0] if rows else None  # type: ignore[return-value]

    def command_key(self, name: str) -> bytes | None:
        """The key of the commands to a device; None if it is no valid identity."""
        rows = self._read("SELECT command_key FROM identity WHERE name = ? AND revoked IS NULL", name)
        return rows[0][0] if rows else None  # type: ignore[return-value]

    def records(self) -> list[IdentityRecord]:
        """All identities, by name."""
        rows = self._read(
            "SELECT name, role, created, (SELECT max(not_after) FROM certificate c WHERE c.name = i.name), revoked "
            "FROM identity i ORDER BY name"
        )
        return [
            IdentityRecord(name, role, _time(created), _time(expires), _time(revoked))  # type: ignore[arg-type]
            for name, role, created, expires, revoked in rows
        ]

    def revoked_serials(self, role: Role, now: int) -> list[int]:
        """The serial numbers of revoked certificates that would be valid otherwise."""
        rows = self._read(
            "SELECT serial FROM certificate WHERE role = ? AND revoked IS NOT NULL AND not_after > ?", role, now
        )
        return [int(str(serial)) for (serial,) in rows]

    def operators(self) -> list[tuple[str, bytes]]:
        """The names of the valid operators, with each key that has a certificate."""
        rows = self._read(
            "SELECT DISTINCT name, public_key FROM certificate WHERE role = 'operator' AND revoked IS NULL "
            "ORDER BY name, public_key"
        )
        return rows  # type: ignore[return-value]

    # API tokens

    def add_api_token(self, secret: str, owner: Issued, scope: Scope, now: int) -> None:
        """Keep the token of the HTTP API of the operator with this certificate, in place of an earlier one.

        Raises
        ------
        UserError
            If the certificate has been revoked meanwhile.
        """
        with self._write() as db:
            valid = "SELECT 1 FROM certificate WHERE serial = ? AND revoked IS NULL"
            if not db.execute(valid, (str(owner.serial),)).fetchone():
                raise UserError(f"the identity {owner.name} has been revoked; enrol again")
            db.execute("DELETE FROM api_token WHERE name = ?", (owner.name,))
            db.execute("INSERT INTO api_token VALUES (?, ?, ?, ?)", (_hash(secret), owner.name, scope, now))

    def scope_of(self, secret: str) -> tuple[str, Scope] | None:
        """Whose API token it is, and what it allows; None if it is unknown.

        It is looked up by its hash, so that the time that takes tells nothing about a token.
        """
        rows = self._read("SELECT name, scope FROM api_token WHERE hash = ?", _hash(secret))
        return (str(rows[0][0]), rows[0][1]) if rows else None  # type: ignore[return-value]
