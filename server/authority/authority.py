"""The fleet's authority: its keys on disk, the certificates it issues, and what the broker needs to know of them."""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import make_private_folder, write_private
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.broker_address import is_loopback
from tinyfleet.edge.wire.enrolment_token import EnrolmentToken
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.ontology.http.access import Scope
from tinyfleet.server.authority import certificates
from tinyfleet.server.authority.certificates import KeyPair
from tinyfleet.server.authority.fleet_keys import ROOT_KEY, FleetKeys, KeyChange, read_root_key, write_root_key
from tinyfleet.server.authority.identities import Identities, IdentityRecord, Issued, Role

SERVER = "server"
"""The server's own identity, an operator. No other may have its name."""
LIFE: dict[Role, timedelta] = {"device": timedelta(days=730), "operator": timedelta(days=365)}
"""How long a certificate is valid; its owner renews it before."""
OPERATOR_SCOPE: Scope = "operate"
TOKEN_LIFE = timedelta(hours=1)
COMMAND_KEY_BYTES = 32

_NAME = re.compile(r"[A-Za-z0-9._-]{1,32}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


class Enrolment(NamedTuple):
    """What a new identity gets.

    Attributes
    ----------
    certificate, issued, expires
        PEM, and its times, Unix time in seconds.
    role
        Device or operator.
    command_key
        A device's key for the commands to it, 32 bytes.
    api_token
        An operator's token for the HTTP API.
    keys
        The fleet's keys, whose public parts a device is told.
    """

    certificate: str
    issued: int
    expires: int
    role: Role
    command_key: bytes | None
    api_token: str | None
    keys: FleetKeys


class Authority:
    """Made in its folder at the first start, and the same ever after.

    Three certificate authorities sign: one the server's certificate, which all clients trust; one the devices' and one
    the operators' certificates, each for a listener of the broker.

    Parameters
    ----------
    folder
        Its folder; only its owner may enter.
    host_names
        Host names and IP addresses under which clients on the network find the server.
    root_key
        The public root key, for keys that are made now. Default: one is made, and left beside the folder.
    clock
        The time.

    Raises
    ------
    UserError
        If a host name is not valid, or a file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        host_names: Iterable[str] = (),
        *,
        root_key: bytes | None = None,
        clock: Callable[[], datetime] = certificates.utc_now,
    ) -> None:
        self.folder = folder
        self._clock = clock
        self._lock = threading.Lock()  # one change at a time writes the broker's files
        self._changed: Callable[[], None] = lambda: None
        self._ended: Callable[[str, Role], None] = lambda name, role: None
        make_private_folder(folder)
        self.ca_file = folder / "fleet-ca.crt"
        self._fleet = self._own("fleet-ca", "TinyFleet authority")
        self._clients: dict[Role, KeyPair] = {
            "device": self._own("device-ca", "TinyFleet devices"),
            "operator": self._own("operator-ca", "TinyFleet operators"),
        }
        self.identities = Identities(folder / "identities.sqlite")
        self.server_files = folder / "server.crt", folder / "server.key"
        self._names = {"localhost", "127.0.0.1", "::1", *map(_host_name, host_names)}
        self._certify_server(self._names)
        self.client_files = folder / "client.crt", folder / "client.key"
        self._certify_client()
        self.write_broker_files()
        self.fleet_keys = FleetKeys.load(folder) or self._make_keys(root_key)
        self._keys_next: FleetKeys | None = None  # proposed, and not signed yet

    def _make_keys(self, root_key: bytes | None) -> FleetKeys:
        if root_key is None:
            file = self.folder.parent / ROOT_KEY
            root_key = cose.public_key(read_root_key(file) if file.exists() else write_root_key(file))
        return FleetKeys.make(self.folder, root_key)

    def renew_own(self) -> bool:
        """Make the server's own certificates again where they near their end; the broker reads them then.

        Returns
        -------
        bool
            Whether the HTTP server has to read its certificate again.
        """
        before = [file.read_bytes() for file in (self.server_files[0], self.client_files[0])]
        self._certify_server(self._names)
        self._certify_client()
        after = [file.read_bytes() for file in (self.server_files[0], self.client_files[0])]
        if after != before:
            self._publish()
        return after[0] != before[0]

    def close(self) -> None:
        """Close the identities' file."""
        self.identities.close()

    def on_change(self, changed: Callable[[], None], ended: Callable[[str, Role], None]) -> None:
        """Set who is told: `changed`, when the broker must read its files again; then `ended`, with the name and role
        of an identity whose sessions must end."""
        self._changed, self._ended = changed, ended

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate that all clients trust."""
        return certificates.fingerprint(self._fleet.certificate)

    # Its own keys and certificates

    def _own(self, name: str, common_name: str) -> KeyPair:
        """An authority's key and certificate; what is missing is made, so that an interrupted start is completed."""
        key_file, file = self.folder / f"{name}.key", self.folder / f"{name}.crt"
        try:
            if not key_file.exists():
                if file.exists():
                    raise ValueError(f"{key_file.name} is missing")
                write_private(key_file, certificates.key_pem(certificates.new_key()))
            key = certificates.load_key(key_file.read_bytes())
            if not file.exists():
                certificate = certificates.authority_certificate(common_name, key, self._clock())
                write_private(file, certificates.certificate_pem(certificate))
            pair = KeyPair(key, x509.load_pem_x509_certificate(file.read_bytes()))
            if pair.certificate.public_key() != key.public_key():
                raise ValueError(f"{file.name} is not of {key_file.name}")
        except (ValueError, TypeError, OSError) as error:
            raise UserError(
                f"the fleet's authority in {self.folder} is damaged ({error}); restore it from a backup, or remove the "
                "folder and enrol every device again"
            ) from error
        return pair

    def _certify_server(self, names: set[str]) -> None:
        """Makes the certificate of broker and HTTP server, unless the one that is there still does."""
        file, key_file = self.server_files
        now = self._clock()
        try:
            there = x509.load_pem_x509_certificate(file.read_bytes())
            key = certificates.load_key(key_file.read_bytes())
            if (
                names <= certificates.server_names(there)
                and there.public_key() == key.public_key()
                and there.not_valid_before_utc <= now < there.not_valid_after_utc - certificates.SERVER_LIFE / 3
            ):
                return
        except (ValueError, OSError, x509.ExtensionNotFound):
            key = certificates.new_key()
        write_private(key_file, certificates.key_pem(key))
        certificate = certificates.server_certificate(self._fleet, key, sorted(names), now)
        write_private(file, certificates.certificate_pem(certificate))

    def _certify_client(self) -> None:
        """Makes the certificate with which the server itself, and its owner's commands, go to the broker."""
        file, key_file = self.client_files
        try:
            key = certificates.load_key(key_file.read_bytes())
            there = self.identities.issued(SERVER, certificates.public_bytes(key.public_key()))
            enough = self._seconds() + int(LIFE["operator"].total_seconds()) // 3
            if there is not None and there.not_after > enough and file.read_text() == there.pem:
                return
        except (ValueError, OSError):
            key = certificates.new_key()
        issued = self._issue(SERVER, "operator", certificates.public_bytes(key.public_key()))
        write_private(key_file, certificates.key_pem(key))
        self.identities.put(issued, None, self._seconds())
        write_private(file, issued.pem)

    def _seconds(self) -> int:
        return int(self._clock().timestamp())

    def _issue(self, name: str, role: Role, public_key: bytes) -> Issued:
        key = certificates.load_public_key(public_key)
        user = _operator_user(name, public_key) if role == "operator" else name
        certificate = certificates.client_certificate(self._clients[role], user, key, self._clock(), LIFE[role])
        pem = certificates.certificate_pem(certificate).decode()
        return Issued(
            certificate.serial_number, name, role, public_key, pem, int(certificate.not_valid_after_utc.timestamp())
        )

    # What the broker reads

    def ca_of(self, role: Role) -> Path:
        """The file of the authority of these clients' certificates."""
        return self.folder / f"{role}-ca.crt"

    def crl_of(self, role: Role) -> Path:
        """The file of that authority's revoked certificates."""
        return self.folder / f"{role}.crl"

    def broker_users(self) -> tuple[list[str], list[str]]:
        """The server itself and the valid operators, as the broker knows them."""
        users = [(name, _operator_user(name, key)) for name, key in self.identities.operators()]
        return [user for name, user in users if name == SERVER], [user for name, user in users if name != SERVER]

    def write_broker_files(self) -> None:
        """Write the lists of revoked certificates."""
        for role, pair in self._clients.items():
            serials = self.identities.revoked_serials(role, self._seconds())
            write_private(self.crl_of(role), certificates.revocation_list(pair, serials, self._clock()))

    def _publish(self) -> None:
        with self._lock:
            self.write_broker_files()
            self._changed()

    # Identities

    def open_token(
        self, names: Sequence[str], role: Role, url: str, life: timedelta = TOKEN_LIFE, *, replace: bool = False
    ) -> EnrolmentToken:
        """Make a token with which each of these names can be enrolled once.

        Parameters
        ----------
        names
            Names of devices or operators.
        role
            What they become.
        url
            Address of the HTTP API for those who hold the token.
        life
            How long it can be used.
        replace
            Whether an identity that exists may be enrolled again; the old one ends then.

        Returns
        -------
        EnrolmentToken

        Raises
        ------
        UserError
            If a name is not valid, or taken.
        """
        for name in names:
            if not _NAME.fullmatch(name) or name == SERVER:
                raise UserError(
                    f"{name!r:.50} cannot be a name: 1 to 32 letters, digits, '.', '_' or '-', not 'server'"
                )
            taken = self.identities.role(name)
            if taken is not None and not (replace and taken == role):
                raise UserError(
                    f"there is {'an' if taken == 'operator' else 'a'} {taken} {name} already; choose another name, or "
                    f"revoke that one first: tinyfleet device revoke {name}"
                )
        secret = secrets.token_urlsafe(24)
        self.identities.add_token(secret, names, role, self._seconds() + int(life.total_seconds()))
        return EnrolmentToken(url, self.fingerprint, secret, names[0] if len(names) == 1 else None)

    def enrol(self, secret: str, name: str, request: str) -> Enrolment:
        """Turn a token into an identity.

        Parameters
        ----------
        secret
            The token's secret.
        name
            The name to enrol.
        request
            A certificate request, PEM.

        Returns
        -------
        Enrolment
            The same certificate if the same key asks again, as after an answer that was lost.

        Raises
        ------
        UserError
            If the token does not allow it, or the request is not valid.
        """
        key = certificates.public_bytes(certificates.requested_key(request))
        now = self._seconds()
        role, issued = self.identities.token_role(secret, name, key, now)
        if issued is None:
            replaced = self.identities.role(name) is not None
            command_key = secrets.token_bytes(COMMAND_KEY_BYTES) if role == "device" else None
            issued = self.identities.enrol(secret, self._issue(name, role, key), command_key, now)
            if replaced or role == "operator":
                self._publish()
            if replaced:
                self._ended(name, role)
        token = None
        if role == "operator":
            token = secrets.token_urlsafe(32)
            self.identities.add_api_token(token, issued, OPERATOR_SCOPE, now)
        return Enrolment(
            issued.pem, now, issued.not_after, role, self.identities.command_key(name), token, self.fleet_keys
        )

    def renew(self, name: str, request: str, signature: bytes) -> Issued:
        """Another certificate for an identity.

        Parameters
        ----------
        name
            The identity.
        request
            A certificate request, PEM, of a new key or the present one.
        signature
            Of the request by the identity's present key.

        Returns
        -------
        Issued
            The certificate.

        Raises
        ------
        UserError
            If the signature is not by a valid key of this identity, or the request is not valid.
        """
        role = self.identities.role(name)
        keys = self.identities.public_keys(name, self._seconds())
        by = next((key for key in keys if certificates.is_signed_by(key, signature, request.encode())), None)
        if role is None or by is None:
            raise UserError(f"the request is not signed by a valid key of {name:.32}; enrol again")
        issued = self._issue(name, role, certificates.public_bytes(certificates.requested_key(request)))
        self.identities.renew(issued, by)
        if role == "operator":  # whose rights at the broker are its key's
            self._publish()
        return issued

    def revoke(self, name: str) -> Role:
        """End an identity now, its open sessions included.

        Raises
        ------
        UserError
            If there is none, or it is the server's own.
        """
        if name == SERVER:
            raise UserError("the server's own identity cannot be revoked")
        role = self.identities.revoke(name, self._seconds())
        self._publish()
        self._ended(name, role)
        return role

    # Commands

    def command_key(self, device: str) -> bytes | None:
        """The key that a device shares with the server; None if it is not enrolled."""
        return self.identities.command_key(device)

    def sign(self, payload: bytes, topic: str) -> bytes:
        """A COSE_Sign1 with the fleet's current key."""
        return cose.sign1(payload, self.fleet_keys.current, topic)

    @property
    def keys_version(self) -> int:
        """The version of the fleet's keys."""
        return self.fleet_keys.version

    @property
    def new_keys(self) -> bytes | None:
        """The last change of the fleet's keys, sealed with the root key."""
        return self.fleet_keys.new_keys

    def propose_keys(self) -> KeyChange:
        """The next change of keys, for the root key to sign."""
        with self._lock:
            change, self._keys_next = self.fleet_keys.propose()
            return change

    def change_keys(self, sealed: bytes, fleet: str) -> None:
        """Take the proposed keys.

        Raises
        ------
        UserError
            If nothing was proposed, or it is not signed by the root key for this fleet.
        """
        with self._lock:
            if self._keys_next is None:
                raise UserError("no change of keys was proposed; ask again")
            keys = self._keys_next.signed(sealed, Topics(fleet).group_command("keys"))
            keys.save()
            self.fleet_keys, self._keys_next = keys, None

    def takeover(self, name: str) -> tuple[bytes, bytes]:
        """A key and a certificate in a device's name, valid for minutes and kept nowhere: connecting with them ends the
        device's session.

        Returns
        -------
        tuple
            PEM of both.
        """
        key = certificates.new_key()
        pair, now = self._clients["device"], self._clock()
        certificate = certificates.client_certificate(pair, name, key.public_key(), now, timedelta(minutes=5))
        return certificates.key_pem(key), certificates.certificate_pem(certificate)

    def records(self) -> list[IdentityRecord]:
        """All identities but the server's own, by name."""
        return [record for record in self.identities.records() if record.name != SERVER]


def _operator_user(name: str, public_key: bytes) -> str:
    """An operator's user name at the broker. It names the key, too: a session that was open when the identity ended
    goes on, and must not get back its rights when the name is enrolled again. No device can have a name with "/"."""
    return f"{name}/{hashlib.sha256(public_key).hexdigest()[:24]}"


def _host_name(name: str) -> str:
    """A host name or IP address that a certificate can hold."""
    if is_loopback(name) or ":" in name or _HOST.fullmatch(name):
        return name
    raise UserError(f"{name!r:.100} is not a host name or an IP address")


def own_addresses() -> list[str]:
    """The addresses and names by which others on the network may know this machine, the most reliable one first."""
    found: list[str] = []
    for family, probe in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as route:  # sends nothing: it asks the routing table
                route.connect((probe, 9))
                found.append(str(route.getsockname()[0]))
        except OSError:  # no network of this kind
            continue
    name = socket.gethostname()
    found += [each for each in (name, socket.getfqdn(), f"{name}.local") if _HOST.fullmatch(each)]
    return list(dict.fromkeys(found))
