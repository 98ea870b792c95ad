"""Where an MQTT broker is, and how a client proves to it who it is."""

from __future__ import annotations

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.keys import Keys

PASSWORD_VARIABLE = "TINYFLEET_BROKER_PASSWORD"
"""Environment variable with the password of the broker's user."""
_PORTS = {"mqtt": 1883, "mqtts": 8883}
_FORM = "write it as mqtts://HOST:PORT or mqtts://USER@HOST:PORT"


def is_loopback(host: str) -> bool:
    """Whether a host name or an address stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class BrokerAddress:
    """A broker's address, and what a client shows it.

    Parameters
    ----------
    host, port
        Name or IP address, and TCP port.
    tls
        Whether the connection is encrypted and the broker's certificate is checked. Without, only a broker on this
        machine is accepted.
    username, password
        For brokers that ask for them.
    ca
        PEM file with the certificate authority that signed the broker's certificate. Default: the system's authorities.
    cert, key
        PEM files with the client's certificate and its private key, for brokers that ask for one.
    api_token
        What an operator shows the server there, to command devices.
    keys
        Whom a device obeys there; None: anyone who can publish.

    Raises
    ------
    UserError
        If the connection would leave this machine without encryption, or a certificate comes without its key.

    Examples
    --------
    >>> BrokerAddress.parse("mqtts://anna@broker.example:8883", ca=Path("ca.pem")).url
    'mqtts://anna@broker.example:8883'
    >>> BrokerAddress.parse("[::1]")
    BrokerAddress(host='::1', port=8883, tls=True, username=None, ca=None, cert=None, key=None)
    """

    host: str
    port: int
    tls: bool = True
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    api_token: str | None = field(default=None, repr=False)
    keys: Keys | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.tls and not is_loopback(self.host):
            raise UserError(
                f"{self.url} is not encrypted: anyone who can listen on the network could read it and take part; use "
                "mqtts://"
            )
        if (self.cert is None) != (self.key is None):
            raise UserError("a client certificate and its private key come together: give both --cert and --key")

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        password: str | None = None,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
    ) -> BrokerAddress:
        """Read an address.

        Parameters
        ----------
        text
            `mqtts://USER@HOST:PORT`. User and port may be missing, the latter is 8883 then; without a scheme it is
            mqtts. `mqtt://` is without encryption, for a broker on this machine.
        password, ca, cert, key
            See the class.

        Returns
        -------
        BrokerAddress

        Raises
        ------
        UserError
            If it is no such address, or has a password in it.
        """
        scheme = text.split("://")[0] if "://" in text else "mqtts"
        try:
            parts = urlsplit(text if "://" in text else f"mqtts://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if scheme not in _PORTS or not host or port == 0 or parts.path.strip("/") or parts.query or parts.fragment:
            raise UserError(f"{text!r:.100} is not a broker's address; {_FORM}")
        if parts.password is not None:
            raise UserError(
                "a password in an address can be read by every user of this machine; put it into a file that only you "
                f"can read and give --password-file, or into the environment variable {PASSWORD_VARIABLE}"
            )
        username = None if parts.username is None else unquote(parts.username)
        return cls(host, port or _PORTS[scheme], scheme == "mqtts", username, password, ca, cert, key)

    @property
    def url(self) -> str:
        """The address as text, without secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.username is None else f"{self.username}@"
        return f"{'mqtts' if self.tls else 'mqtt'}://{user}{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """What TLS needs to know, read from the files now; None without TLS.

        Raises
        ------
        UserError
            If a file is missing or damaged, or the key is not the certificate's.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
        except OSError as error:
            raise UserError(f"cannot read the certificate authority {self.ca} ({_reason(error)})") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.cert is not None and self.key is not None:
            try:
                _require_private(self.key, "private key")
                context.load_cert_chain(self.cert, self.key, password="")  # "": an encrypted key asks nobody
            except OSError as error:
                raise UserError(
                    f"cannot use the certificate {self.cert} with the key {self.key} ({_reason(error)})"
                ) from error
        return context


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (
            "it is not a PEM file with what it should have"
            if error.reason is None
            else error.reason.lower().replace("_", " ")
        )
    return error.strerror or str(error)


def _require_private(file: Path, what: str) -> None:
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise UserError(f"others can read the {what} {file}; first: chmod 600 {file}")


def read_password(file: Path | None) -> str | None:
    """The broker's password: the first line of the file, else the environment variable's value.

    Raises
    ------
    UserError
        If the file cannot be read, or others than its owner can read it.
    """
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE)
    try:
        _require_private(file, "password in")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the password file {file} ({error})") from error
    return text.split("\n")[0].rstrip("\r")
