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

MAX_PACKET = 131_072
"""Bytes of a packet at most; who sends a larger one is disconnected."""
MAX_CONNECTIONS = 20_000
"""Clients of one listener. A process may usually have fewer files open, and then that is the limit."""

OPERATOR_KINDS = ("runs", "models", "drivers", "submissions")
"""What operators write."""
OPERATOR_READS = ("devices", "groups", "runs", "models", "drivers", "refused", "time")
"""What operators read: not submissions, as each holds its sender's token."""

_GENERAL: Options = [
    ("persistence", "false"),  # devices publish their retained messages again when they reconnect
    # A description has at most 64 KiB, a chunk of weights 1 KiB: twice the larger, with its topic.
    ("max_packet_size", str(MAX_PACKET)),
    ("message_size_limit", str(MAX_PACKET)),
    # What may wait for one client, or it loses messages. The server, when its session is new, is sent the description
    # (1.5 KiB) and the status (0.1 KiB) of every device: of a million, 2 million messages and 1.6 GiB. A device gets at
    # most the chunks of a few rounds (1 MiB each); what waits for several devices is there once.
    ("max_queued_messages", "2500000"),
    ("max_queued_bytes", str(2 << 30)),
    ("max_inflight_messages", "20000"),  # twice what the server takes before it has written any
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


def plain(listen: str, port: int, *, as_root: bool) -> Options:
    """A listener that takes any client, without encryption. The arguments are those of `secured`."""
    listener = [("listener", f"{port} {listen}"), ("max_connections", str(MAX_CONNECTIONS))]
    return [*_GENERAL, *_user(as_root), ("allow_anonymous", "true"), *listener]


def _user(as_root: bool) -> Options:
    """Started by root it stays root. As another user it could not read the owner's keys again, and the kernel would
    no longer end it together with the server."""
    return [("user", "root")] if as_root else []


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
        Whether root starts mosquitto.

    Returns
    -------
    list of tuple
    """
    certificate, key = authority.server_files
    options = [*_GENERAL, *_user(as_root), ("allow_anonymous", "false"), ("acl_file", str(acl_file.absolute()))]
    ports: dict[Role, int] = {"device": device_port, "operator": operator_port}
    for role, port in ports.items():
        options += [
            ("listener", f"{port} {listen}"),
            ("max_connections", str(MAX_CONNECTIONS)),
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


def access_list(fleet: str, server: Iterable[str], operators: Iterable[str]) -> str:
    """Who may write and read which topics; what is not in it is denied.

    A device writes what is its own, and reads the commands to it and what is broadcast. `%u` is the name in its
    certificate. An operator may read all in the fleet but submissions, and write models, weights and submissions, which
    ask the server for commands. The server alone writes commands, and may do everything.

    Parameters
    ----------
    fleet
        The fleet's name.
    server, operators
        User names of the server and of its operators.

    Returns
    -------
    str
        mosquitto's access control list.
    """
    topics = Topics(fleet)
    own = f"{topics.root}/devices/%u"
    lines: list[str] = []
    for user in server:
        lines += [f"user {user}", f"topic readwrite {topics.root}/#"]
    for user in operators:
        lines.append(f"user {user}")
        lines += [f"topic read {topics.root}/{kind}/#" for kind in OPERATOR_READS]
        lines += [f"topic write {topics.root}/{kind}/#" for kind in OPERATOR_KINDS]
    lines += [f"pattern write {own}/{kind}" for kind in ("td", "status", "reply", "event")]
    lines += [f"pattern readwrite {own}/echo", f"pattern read {own}/command"]
    lines += [f"pattern read {topics.root}/{kind}/#" for kind in ("runs", "models", "groups")]
    lines.append(f"pattern read {topics.time}")
    return "\n".join(lines) + "\n"
