"""How a command finds the server on this machine: the file in which a running server says where it is."""

from __future__ import annotations

import json
from pathlib import Path

from tinyfleet.edge.errors import UserError

SERVER_FILE = "server.json"
"""In the server's data folder, for as long as the server runs."""
DEFAULT_BROKER = "127.0.0.1:1883"
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
        Broker (HOST:PORT), SPARQL endpoint, token and fleet; empty if no server runs.

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


def broker_address(broker: str | None, data: Path) -> tuple[str, int]:
    """Find the MQTT broker.

    Parameters
    ----------
    broker
        HOST:PORT, or None for the running server's, else the default.
    data
        The server's data folder.

    Returns
    -------
    tuple
        Host and port.

    Raises
    ------
    UserError
        If the address is invalid, or the server's file is damaged.

    Examples
    --------
    >>> broker_address("[::1]:1883", Path())
    ('::1', 1883)
    """
    address = broker or find_server(data).get("broker", DEFAULT_BROKER)
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"'{address}' is not a broker address; write HOST:PORT, such as {DEFAULT_BROKER}")
    return host.strip("[]"), int(port)
