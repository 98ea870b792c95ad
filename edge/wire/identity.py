"""Who this machine is in a fleet: a private key that was made here and never leaves, and the certificate for it.

An identity is a folder in the data folder, `identities/NAME`, that only its owner can enter. `identity.json` is written
last: without it, an enrolment was interrupted, and the next one goes on with the same key.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import make_private_folder, write_private
from tinyfleet.edge.wire.broker_address import BrokerAddress, is_loopback
from tinyfleet.edge.wire.enrolment_token import EnrolmentToken
from tinyfleet.edge.wire.json_text import parse_json
from tinyfleet.edge.wire.keys import Keys

IDENTITIES = "identities"
"""The folder of a machine's identities, in its data folder."""
TIMEOUT = 20.0
"""Seconds that the server may take to answer."""
ATTEMPTS = 3
"""How often a request is sent: an answer can be lost, and the same key may ask again."""
_FILE = "identity.json"
_LONGEST = 100_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """One identity, and how it finds its fleet.

    Parameters
    ----------
    folder
        Where it is.
    name, role, fleet
        Its name; "device" or "operator"; the fleet's name.
    broker_url, http_url, endpoint_url
        The broker for this role, the server's HTTP API, SPARQL.
    issued, expires
        When its certificate was issued and when it ends, Unix time in seconds.
    command_key
        A device's key for the commands to it, as hexadecimal digits.
    api_token
        An operator's token for the HTTP API.
    enrolled_with
        SHA-256 of the enrolment token's secret, as hexadecimal digits.
    fleet_keys, keys_version, root_key
        For a device, the fleet's current and next public key, their version, and the public root key.
    """

    folder: Path
    name: str
    role: str
    fleet: str
    broker_url: str
    http_url: str
    endpoint_url: str
    issued: int
    expires: int
    command_key: str | None = None
    api_token: str | None = None
    enrolled_with: str | None = None
    fleet_keys: list[str] | None = None
    keys_version: int = 0
    root_key: str | None = None

    @property
    def keys(self) -> Keys | None:
        """Whom a device obeys; None for an operator, and for one that was enrolled before there were keys."""
        if self.command_key is None or self.root_key is None or not self.fleet_keys:
            return None
        current, next, *_ = [*map(bytes.fromhex, self.fleet_keys), None]
        assert current is not None
        return Keys(bytes.fromhex(self.command_key), current, next, bytes.fromhex(self.root_key), self.keys_version)

    def at(self, url: str) -> BrokerAddress:
        """A broker at this address, and what this identity shows it."""
        broker = BrokerAddress.parse(url, ca=self.ca, cert=self.cert, key=self.key)
        return replace(broker, api_token=self.api_token, keys=self.keys)

    @property
    def ca(self) -> Path:
        """The authority that the fleet's server must show."""
        return self.folder / "ca.pem"

    @property
    def cert(self) -> Path:
        """Its certificate."""
        return self.folder / "certificate.pem"

    @property
    def key(self) -> Path:
        """Its private key."""
        return self.folder / "key.pem"

    @property
    def broker(self) -> BrokerAddress:
        """The broker, and what this identity shows it."""
        return self.at(self.broker_url)

    @classmethod
    def load(cls, folder: Path) -> Identity | None:
        """The identity in a folder; None if there is none, or its enrolment is not complete.

        Raises
        ------
        UserError
            If it is damaged.
        """
        try:
            fields = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            return cls(folder, **fields)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"the identity in {folder} is damaged ({error}); remove the folder and enrol again"
            ) from None

    def _save(self) -> None:
        fields = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_private(self.folder / _FILE, json.dumps(fields, indent=1))

    def renew_if_due(self, now: float | None = None) -> Identity:
        """Another certificate for the same key, once two thirds of this one's life are over.

        Parameters
        ----------
        now
            Unix time in seconds. Default: the clock's.

        Returns
        -------
        Identity
            This one if nothing is due.

        Raises
        ------
        UserError
            If the server cannot be reached or refuses.
        """
        if (time.time() if now is None else now) < self.issued + (self.expires - self.issued) * 2 / 3:
            return self
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = serialization.load_pem_private_key(self.key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        request = _request(key, self.name)
        signature = base64.b64encode(key.sign(request.encode(), ec.ECDSA(hashes.SHA256()))).decode()
        said = _post(
            f"{self.http_url}/renew",
            {"name": self.name, "request": request, "signature": signature},
            _context(self.http_url, self.ca),
        )
        write_private(self.cert, said["certificate"])
        renewed = replace(self, issued=said["issued"], expires=said["expires"])
        renewed._save()
        return renewed

    @property
    def has_ended(self) -> bool:
        """Whether its certificate is no longer valid."""
        return time.time() >= self.expires

    def renewed_if_possible(self) -> Identity:
        """As `renew_if_due`; this one, with a warning, if the server does not answer or refuses while it is valid.

        Raises
        ------
        UserError
            If its certificate has ended and could not be renewed.
        """
        try:
            return self.renew_if_due()
        except UserError as error:
            if self.has_ended:
                raise UserError(
                    f"the certificate of {self.name} ended on {time.strftime('%Y-%m-%d', time.gmtime(self.expires))} "
                    f"and could not be renewed ({error}); ask the fleet's owner for a token (tinyfleet device enrol "
                    f"{self.name} --replace) and add --enrol TOKEN"
                ) from None
            log.warning("the certificate of %s could not be renewed: %s", self.name, error)
            return self


def secret_hash(token: EnrolmentToken) -> str:
    """What an identity keeps of the token that made it."""
    return hashlib.sha256(token.secret.encode()).hexdigest()


def identity_folder(data: Path, name: str) -> Path:
    """Where the identity of this name is or will be."""
    return data / IDENTITIES / name


def stored_identities(data: Path, role: str) -> list[Identity]:
    """The identities of a role in a data folder, by name."""
    folders = sorted((data / IDENTITIES).glob("*/"))
    return [each for folder in folders if (each := Identity.load(folder)) is not None and each.role == role]


def enrol(token: EnrolmentToken, name: str, data: Path) -> Identity:
    """Turn a token into an identity.

    Parameters
    ----------
    token
        From `tinyfleet device enrol`.
    name
        The identity's name, one of the token's.
    data
        The data folder, for the identity.

    Returns
    -------
    Identity
        Stored, in place of an earlier one of this name.

    Raises
    ------
    UserError
        If the server cannot be reached, is not the one that the token is of, or refuses the token.
    """
    ca = _authority(token)
    folder = identity_folder(data, name)
    make_private_folder(folder)
    pending_key, pending_ca = folder / "new-key.pem", folder / "new-ca.pem"
    write_private(pending_ca, ca)
    key = _pending_key(pending_key)
    said = _post(
        f"{token.url}/enrol",
        {"secret": token.secret, "name": name, "request": _request(key, name)},
        _context(token.url, pending_ca),
    )
    try:
        identity = Identity(
            folder, name, said["role"], said["fleet"], said["broker"], token.url, said["endpoint"], said["issued"],
            said["expires"], said.get("command_key"), said.get("api_token"), secret_hash(token),
            said.get("fleet_keys"), said.get("keys_version", 0), said.get("root_key"),
        )  # fmt: skip
        certificate = said["certificate"]
    except KeyError as error:
        raise UserError(f"the server at {token.url} speaks another version of enrolment: no {error}") from None
    (folder / _FILE).unlink(missing_ok=True)
    pending_key.replace(identity.key)
    pending_ca.replace(identity.ca)
    write_private(identity.cert, certificate)
    identity._save()
    return identity


def open_token(server: dict[str, str], names: Sequence[str], role: str = "device", **more: Any) -> EnrolmentToken:
    """Ask the server for a token.

    Parameters
    ----------
    server
        What `find_server` found; its token must be the owner's.
    names, role
        Who may enrol with it, and as what.
    more
        `life` in seconds; `replace`, whether an identity that exists may be enrolled again; `url`, the address of the
        HTTP API for those who get the token.

    Returns
    -------
    EnrolmentToken

    Raises
    ------
    UserError
        If the server cannot be reached or refuses.
    """
    said = call_server(server, "POST", "/identities/tokens", {"names": list(names), "role": role, **more})
    return EnrolmentToken.parse(said["token"])


def call_server(server: dict[str, str], method: str, path: str, content: object = None) -> Any:
    """One request to the server's HTTP API, with the token of `find_server`.

    Raises
    ------
    UserError
        If the server cannot be reached or refuses.
    """
    ca = Path(server["ca"]) if "ca" in server else None
    return _send(
        f"{server['http']}{path}",
        method,
        content,
        _context(server["http"], ca),
        {"Authorization": f"Bearer {server['token']}"},
    )


def _authority(token: EnrolmentToken) -> str:
    """The certificate of the fleet's authority, from the server. Anyone may answer: its SHA-256 is in the token."""
    anyone = _context(token.url, None)
    if anyone is not None:
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
    pem = _text(f"{token.url}/ca.pem", "GET", None, anyone, {})
    try:
        found = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).digest()
    except ValueError:
        found = b""
    if found != token.fingerprint:
        raise UserError(
            f"the server at {token.url} is not the one that this token is of: its authority is another one. Nothing "
            "was sent to it; ask the fleet's owner for a new token"
        )
    return pem


def _pending_key(path: Path) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError):
        key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_private(path, pem)
    return key


def _request(key: Any, name: str) -> str:
    """A certificate request, PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def _context(url: str, ca: Path | None) -> ssl.SSLContext | None:
    if url.startswith("https:"):
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context
    host = (urllib.parse.urlsplit(url).hostname or "") if url.startswith("http:") else ""
    if not is_loopback(host):
        raise UserError(f"{url} is not encrypted, and not on this machine; the server must be at an https address")
    return None


def _post(url: str, content: object, context: ssl.SSLContext | None) -> Any:
    return _send(url, "POST", content, context, {})


def _send(url: str, method: str, content: object, context: ssl.SSLContext | None, headers: dict[str, str]) -> Any:
    text = _text(url, method, None if content is None else json.dumps(content).encode(), context, headers)
    try:
        return parse_json(text.encode(), max_values=50_000, max_depth=8) if text else None
    except ValueError as error:
        raise UserError(f"the answer of {url} cannot be read: {error}") from None


def _text(url: str, method: str, content: bytes | None, context: ssl.SSLContext | None, headers: dict[str, str]) -> str:
    headers = {"Content-Type": "application/json", **headers}
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(attempt)
        request = urllib.request.Request(url, content, headers, method=method)
        try:
            with _opener(url, context).open(request, timeout=TIMEOUT) as answer:
                return str(answer.read(_LONGEST * 50).decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            raise UserError(f"the server refuses: {_detail(error)}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"the server at {url} shows a certificate that cannot be trusted: {reason.verify_message}"
                ) from None
            problem = str(getattr(reason, "strerror", None) or reason)
    raise UserError(f"the fleet's server does not answer at {url} ({problem})")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is sent to the fleet's server is for it alone."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(url: str, context: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    if is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))  # one from the environment is not meant for this machine
    return urllib.request.build_opener(*handlers)


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        said = parse_json(error.read(_LONGEST), max_values=1000, max_depth=8)
        return str(said["detail"])[:500]
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code}"
