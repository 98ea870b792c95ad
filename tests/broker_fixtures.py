"""Brokers for tests: mosquitto with TLS, and clients that show it a password or a certificate."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from conftest import free_port, mosquitto_program, start_mosquitto

from tinyfleet.edge.private_files import write_private
from tinyfleet.edge.wire.broker_address import BrokerAddress

USER = "test"
PASSWORD = "correct horse"


def make_certificates(folder: Path, clients: Sequence[str] = (USER,)) -> None:
    """Files of an authority (ca.pem), a server at 127.0.0.1 (server.pem, server.key), and clients (NAME.pem, .key)."""
    from tinyfleet.server.authority import certificates as x509

    now, key = x509.utc_now(), x509.new_key()
    authority = x509.KeyPair(key, x509.authority_certificate("authority of a test", key, now))
    (folder / "ca.pem").write_bytes(authority.certificate_pem)
    for name in ("server", *clients):
        own = x509.new_key()
        if name == "server":
            certificate = x509.server_certificate(authority, own, ["127.0.0.1", "localhost"], now)
        else:
            certificate = x509.client_certificate(authority, name, own.public_key(), now, timedelta(days=1))
        (folder / f"{name}.pem").write_bytes(x509.certificate_pem(certificate))
        write_private(folder / f"{name}.key", x509.key_pem(own))


@contextmanager
def secured_broker(
    folder: Path,
    *,
    by: str = "certificate",
    access: Sequence[str] = ("topic readwrite #",),
    options: Sequence[str] = (),
) -> Iterator[BrokerAddress]:
    """A mosquitto with TLS that lets one user in, by "certificate" or by "password", and gives access to topics."""
    folder.mkdir(exist_ok=True)
    make_certificates(folder)
    (folder / "access").write_text("\n".join([f"user {USER}", *access, ""]))
    given = ["allow_anonymous false", f"acl_file {folder}/access", *(["user root"] if os.geteuid() == 0 else [])]
    listener = [f"certfile {folder}/server.pem", f"keyfile {folder}/server.key"]
    port = free_port()
    address = BrokerAddress("127.0.0.1", port, ca=folder / "ca.pem")
    if by == "password":
        program = str(mosquitto_program()).replace("sbin", "bin") + "_passwd"
        subprocess.run([program, "-c", "-b", folder / "users", USER, PASSWORD], check=True)
        given.append(f"password_file {folder}/users")
        write_private(folder / "password", PASSWORD)
        address = replace(address, username=USER, password=PASSWORD)
    else:
        listener += [f"cafile {folder}/ca.pem", "require_certificate true", "use_identity_as_username true"]
        address = replace(address, cert=folder / f"{USER}.pem", key=folder / f"{USER}.key")
    process = start_mosquitto(folder, port, [*given, *options], listener)
    try:
        yield address
    finally:
        process.terminate()
        process.wait()


def connection_options(broker: BrokerAddress) -> list[str]:
    """What a command is told about this broker."""
    options = ["--broker", broker.url]
    for name, file in (("--ca", broker.ca), ("--cert", broker.cert), ("--key", broker.key)):
        options += [] if file is None else [name, str(file)]
    if broker.password is not None and broker.ca is not None:
        options += ["--password-file", str(broker.ca.with_name("password"))]
    return options if broker.tls else [*options, "--insecure"]


@contextmanager
def command_services(
    broker: BrokerAddress, fleets: Sequence[str] = ("home", "test", "mixed", "other")
) -> Iterator[None]:
    """What a server does for the commands to devices without keys, in these fleets."""
    from tinyfleet.server.commands.counters import Counters
    from tinyfleet.server.commands.service import CommandService

    with ExitStack() as stack:
        for fleet in fleets:
            stack.enter_context(
                CommandService(
                    broker,
                    fleet,
                    name=f"commands-{fleet}",
                    next_counter=Counters(None).next,
                    signer=None,
                    may_command=lambda token: True,
                    takes_keyless=True,
                )
            )
        yield
