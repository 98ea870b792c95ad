"""How a command finds the server on this machine: the file in which a running server says where it is."""

from __future__ import annotations

import json
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import BrokerAddress, read_password

SERVER_FILE = "server.json"
"""In the server's data folder, for as long as the server runs."""
DEFAULT_FLEET = "home"


def find_server(data: Path) -> dict[str, str]:
    """Read where the server with this data folder is.

    Parameters
    ----------
    data
        The server's data folder.

    Returns
    -------
    dict
        Broker, SPARQL endpoint, token and fleet; empty if no server runs.

    Raises
    ------
    UserError
        If the file is damaged.

    Examples
    --------
    >>> find_server(Path("/nowhere"))
    {}
    """
    path = data / SERVER_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        return {"endpoint": info["endpoint"], **{str(key): str(value) for key, value in info.items()}}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); start the server again") from None


def require_server(data: Path) -> dict[str, str]:
    """As `find_server`, but a `UserError` if no server runs."""
    server = find_server(data)
    if not server:
        raise UserError(f"no server runs on {data}; start one with: tinyfleet server start --data {data}")
    return server


def fleet_of(fleet: str | None, data: Path) -> str:
    """The fleet that the user named, else the running server's, else the default."""
    return fleet or find_server(data).get("fleet", DEFAULT_FLEET)


def find_broker(broker: str | None, data: Path, *, insecure: bool = False, **shown: Path | None) -> BrokerAddress:
    """Find the MQTT broker.

    Parameters
    ----------
    broker
        Its address, or None for the running server's.
    data
        The server's data folder.
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
        If the address is invalid, no server runs and no broker is named, or the server's file is damaged.

    Examples
    --------
    >>> find_broker("mqtt://[::1]", Path(), insecure=True).url
    'mqtt://[::1]:1883'
    """
    if broker is None:
        server = require_server(data)
        ca, cert, key = (Path(server[name]) if name in server else None for name in ("ca", "cert", "key"))
        return BrokerAddress.parse(server["broker"], ca=ca, cert=cert, key=key)
    password = read_password(shown.pop("password_file", None))
    address = BrokerAddress.parse(broker, password=password, **shown)
    if not address.tls and not insecure:
        raise UserError(
            f"{address.url} is not encrypted, and anyone on this machine may control what is there; to accept that, "
            "add --insecure"
        )
    return address
