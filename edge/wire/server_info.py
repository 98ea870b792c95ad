"""How a command finds its server and broker: what a running server says in its data folder, or a stored identity."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress, read_password
from tinyfleet.edge.wire.enrolment_token import EnrolmentToken
from tinyfleet.edge.wire.identity import (
    IDENTITIES,
    Identity,
    enrol,
    identity_folder,
    open_token,
    secret_hash,
    stored_identities,
)

SERVER_FILE = "server.json"
"""In the server's data folder, for as long as the server runs."""
DEFAULT_FLEET = "home"
_RENEWED: set[Path] = set()  # the folders of the identities that this process keeps renewed
RENEWAL_INTERVAL = 12 * 3600.0
"""Seconds after which a running device looks whether its certificate nears its end."""

log = logging.getLogger(__name__)


def find_server(data: Path) -> dict[str, str]:
    """Find the fleet's server: the one that runs on this data folder, else the one of this machine's operator.

    Parameters
    ----------
    data
        The server's data folder.

    Returns
    -------
    dict
        Addresses of the broker, the HTTP API and SPARQL; files ca, cert and key; token, fleet, and on a broker of
        the server's own submission_token. Empty if there is none.

    Raises
    ------
    UserError
        If the file is damaged.

    Examples
    --------
    >>> find_server(Path("/nowhere"))
    {}
    """
    return _running_server(data) or _operators_server(data)


def _operators_server(data: Path) -> dict[str, str]:
    operators = stored_identities(data, "operator")
    if len(operators) > 1:
        names = ", ".join(each.name for each in operators)
        raise UserError(f"there are several operators in {data / IDENTITIES}: {names}; remove all folders but one")
    if not operators:
        return {}
    each = operators[0].renewed_if_possible()
    files = {"ca": str(each.ca), "cert": str(each.cert), "key": str(each.key)}
    addresses = {"broker": each.broker_url, "http": each.http_url, "endpoint": each.endpoint_url}
    token = each.api_token or ""
    return {**addresses, **files, "fleet": each.fleet, "token": token, "submission_token": token}


def _running_server(data: Path) -> dict[str, str]:
    path = data / SERVER_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return {"endpoint": info["endpoint"], **{str(key): str(value) for key, value in info.items()}}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); start the server again") from None


def require_server(data: Path) -> dict[str, str]:
    """As `find_server`, but a `UserError` if there is none."""
    server = find_server(data)
    if not server:
        raise UserError(
            f"no server runs on {data}; start one with: tinyfleet server start --data {data}. For a server elsewhere, "
            "enrol as an operator there, or name the broker with --broker"
        )
    return server


def fleet_of(fleet: str | None, data: Path) -> str:
    """The fleet that the user named, else the server's, else the one of this machine's devices, else the default."""
    if fleet is not None:
        return fleet
    if (server := find_server(data)) and "fleet" in server:
        return server["fleet"]
    return next((each.fleet for each in stored_identities(data, "device")), DEFAULT_FLEET)


def find_broker(
    broker: str | None, data: Path, *, enrolment: str | None = None, insecure: bool = False, **shown: Path | None
) -> BrokerAddress:
    """Find the MQTT broker, for an operator.

    Parameters
    ----------
    broker
        Its address, or None for the one of the server that runs here or of this machine's identity.
    data
        The data folder.
    enrolment
        An enrolment token, to become an operator with.
    insecure
        Whether the user accepts a broker without encryption on this machine.
    shown
        Files of `BrokerAddress`: `ca`, `cert`, `key`; and `password_file`.

    Returns
    -------
    BrokerAddress

    Raises
    ------
    UserError
        If the address is invalid, no server runs and no broker is named, or a file is damaged.

    Examples
    --------
    >>> find_broker("mqtt://[::1]", Path(), insecure=True).url
    'mqtt://[::1]:1883'
    """
    if enrolment is not None:
        use_token(enrolment, data, [])
    if broker is not None:
        return _named_broker(broker, insecure, shown)
    server = require_server(data)
    ca, cert, key = (Path(server[name]) if name in server else None for name in ("ca", "cert", "key"))
    address = BrokerAddress.parse(server["broker"], ca=ca, cert=cert, key=key)
    return replace(address, api_token=server.get("submission_token"))


def find_device_brokers(
    names: Sequence[str],
    broker: str | None,
    data: Path,
    *,
    enrolment: str | None = None,
    insecure: bool = False,
    **shown: Path | None,
) -> list[BrokerAddress]:
    """Find the MQTT broker for devices, each with its own identity.

    An identity comes from the data folder; those that are missing there are enrolled, with the token or, beside the
    server, in its owner's name.

    Parameters
    ----------
    names
        The devices' names.
    broker, data, enrolment, insecure, shown
        As for `find_broker`.

    Returns
    -------
    list of BrokerAddress
        One for each name.

    Raises
    ------
    UserError
        If an address is invalid, or a device has no identity and cannot be enrolled.
    """
    if enrolment is not None:
        use_token(enrolment, data, names)
    if broker is not None:
        return [_named_broker(broker, insecure, shown)] * len(names)
    server = _running_server(data)
    if server and "ca" not in server:  # it runs without identities
        return [BrokerAddress.parse(server["device_broker"])] * len(names)
    identities = {name: Identity.load(identity_folder(data, name)) for name in names}
    missing = [name for name, identity in identities.items() if identity is None]
    if missing and not server:
        raise UserError(
            f"{missing[0]} has no identity in {data}, and no server runs there. Ask the fleet's owner for a token "
            f"(tinyfleet device enrol {missing[0]}) and add --enrol TOKEN; or start a server on this machine"
        )
    if missing:
        token = open_token(server, missing)
        identities |= {name: enrol(token, name, data) for name in missing}
    found = [identity.renewed_if_possible() for identity in identities.values() if identity is not None]
    if server:  # whose ports may be others than when the device was enrolled
        return [each.at(server["device_broker"]) for each in found]
    return [each.broker for each in found]


def keep_renewed(names: Sequence[str], data: Path) -> None:
    """Renew the certificates of these devices in time, for as long as the process runs: a session that connects again
    reads them from their files."""

    first = not _RENEWED
    _RENEWED.update(identity_folder(data, name) for name in names)
    if first:  # a gateway asks for its boards again and again
        threading.Thread(target=_renew, name="renewal", daemon=True).start()


def _renew() -> None:
    while True:
        time.sleep(RENEWAL_INTERVAL)
        for folder in list(_RENEWED):
            if (identity := Identity.load(folder)) is not None:
                identity.renewed_if_possible()


def _named_broker(broker: str, insecure: bool, shown: dict[str, Path | None]) -> BrokerAddress:
    password = read_password(shown.pop("password_file", None))
    address = BrokerAddress.parse(broker, password=password, **shown)
    if not address.tls and not insecure:
        raise UserError(
            f"{address.url} is not encrypted, and anyone on this machine may control what is there; to accept that, "
            "add --insecure"
        )
    return address


def use_token(text: str, data: Path, names: Sequence[str]) -> None:
    """Use a token: for the name that it is for, or for those of these names that have not been enrolled with it. A name
    that has a valid identity keeps it if the token is not for it."""
    token = EnrolmentToken.parse(text)
    wanted = [name for name in names if token.name in (None, name)]
    if not names:
        if token.name is None:
            raise UserError("this token is for several devices; start them with it")
        wanted = [token.name]
    for name in wanted:
        stored = Identity.load(identity_folder(data, name))
        if stored is not None and stored.enrolled_with == secret_hash(token):
            continue  # a command may be started again and again with the same token
        try:
            enrol(token, name, data)
        except UserError as error:
            if stored is None or stored.has_ended:
                raise
            log.warning("%s keeps the identity that it has: %s", name, error)
