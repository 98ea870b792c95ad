"""What mosquitto is told: its listeners, who may do what there, and its limits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tinyfleet.edge.wire.topics import Topics

if TYPE_CHECKING:
    from tinyfleet.server.authority.authority import Authority
    from tinyfleet.server.authority.identities import Role

Options = list[tuple[str, str]]

_GENERAL: Options = [
    ("persistence", "false"),  # devices publish their retained messages again when they reconnect
    ("max_queued_messages", "0"),  # no limits: a round's parameters are many retained chunks at once
    ("max_inflight_messages", "0"),
    ("set_tcp_nodelay", "true"),
    ("connection_messages", "true"),  # the server reads in the log who comes and goes
    ("log_type", "error"),
    ("log_type", "warning"),
    ("log_type", "notice"),
    ("log_type", "information"),
]


def text(options: Options) -> str:
    """A configuration file."""
    return "".join(f"{name} {value}\n" for name, value in options)


def plain(listen: str, port: int) -> Options:
    """A listener that takes any client, without encryption."""
    return [*_GENERAL, ("allow_anonymous", "true"), ("listener", f"{port} {listen}")]


def secured(
    listen: str, device_port: int, operator_port: int, authority: Authority, acl_file: Path, *, as_root: bool
) -> Options:
    """A listener for devices and one for operators, both with TLS and client certificates.

    Parameters
    ----------
    listen
        IP address to listen on.
    device_port, operator_port
        Their ports.
    authority
        Whose certificates count.
    acl_file
        What `access_list` wrote.
    as_root
        Whether mosquitto is started by root: it then stays root, or it could not read the owner's keys again.

    Returns
    -------
    list of tuple
    """
    certificate, key = authority.server_files
    options = [*_GENERAL, ("allow_anonymous", "false"), ("acl_file", str(acl_file.absolute()))]
    if as_root:
        options.append(("user", "root"))
    ports: dict[Role, int] = {"device": device_port, "operator": operator_port}
    for role, port in ports.items():
        options += [
            ("listener", f"{port} {listen}"),
            ("cafile", str(authority.ca_of(role).absolute())),
            ("crlfile", str(authority.crl_of(role).absolute())),
            ("certfile", str(certificate.absolute())),
            ("keyfile", str(key.absolute())),
            ("require_certificate", "true"),
            ("use_identity_as_username", "true"),
            ("tls_version", "tlsv1.2"),  # or later
        ]
        if role == "device":  # otherwise a device could end another's session by taking its client id
            options.append(("use_username_as_clientid", "true"))
    return options


def access_list(fleet: str, operators: Iterable[str]) -> str:
    """Who may write and read which topics; what is not in it is denied.

    A device writes what is its own, and reads the commands to it and what is broadcast. `%u` is the name in its
    certificate. An operator, and the server is one, may do everything in its fleet.

    Parameters
    ----------
    fleet
        The fleet's name.
    operators
        Their names.

    Returns
    -------
    str
        mosquitto's access control list.
    """
    topics = Topics(fleet)
    own = f"tinyfleet/{fleet}/devices/%u"
    lines: list[str] = []
    for operator in operators:
        lines += [f"user {operator}", f"topic readwrite tinyfleet/{fleet}/#"]
    lines += [f"pattern write {own}/{kind}" for kind in ("td", "status", "reply", "event")]
    lines += [f"pattern readwrite {own}/echo", f"pattern read {own}/command"]
    lines += [f"pattern read {topics.root}/{kind}/#" for kind in ("runs", "models")]
    return "\n".join(lines) + "\n"
