"""Brokers of others: with TLS and a password or a certificate, and brokers that refuse something or cannot do it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from broker_fixtures import PASSWORD, USER, connection_options, make_certificates, secured_broker

from tinyfleet.__main__ import main
from tinyfleet.edge import tasks
from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense, build
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.broker_address import PASSWORD_VARIABLE, BrokerAddress
from tinyfleet.edge.wire.broker_check import NameTaken, check_device, check_operator
from tinyfleet.edge.wire.identity import identity_folder
from tinyfleet.edge.wire.mqtt_session import Session
from tinyfleet.edge.wire.server_info import find_broker, find_device_brokers
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.fleet_server import FleetServer

ROOT = Path(__file__).parents[1]
TOPICS = Topics("home")
SOON = 0.5
"""Seconds to wait for a message that is denied."""
FILTERS = {kind: f"tinyfleet/home/devices/+/{kind}" for kind in ("td", "status", "reply", "command")} | {
    kind: f"tinyfleet/home/{kind}/#" for kind in ("runs", "models", "drivers")
}
CHECKS: dict[str, Callable[..., None]] = {
    "device": partial(check_device, fleet="home", device="dev-1"),
    "operator": partial(check_operator, fleet="home"),
}


def device(broker: BrokerAddress, id: str) -> Device:
    program = build([Dense(2)], (3,), "softmax_cross_entropy")
    return virtual_device(broker, "home", id, program, ClientData.of([np.zeros((4, 3))] * 2, 1.0, 2))


@pytest.mark.parametrize("by", ["certificate", "password"])
def test_a_broker_that_allows_what_is_needed_is_left_as_it_was(by: str, tmp_path: Path) -> None:
    with secured_broker(tmp_path, by=by, access=["topic readwrite tinyfleet/home/#"]) as broker:
        for check in CHECKS.values():
            check(broker)
        kept: list[str] = []
        end = threading.Event()

        def hear(topic: str, _payload: bytes) -> None:
            kept.append(topic)
            if topic.endswith("/end"):
                end.set()

        observer = Session(broker, "observer", on_message=hear)
        observer.subscribe("tinyfleet/home/#")
        observer.publish("tinyfleet/home/end", b"")
        assert end.wait(10)
        assert kept == [TOPICS.echo("dev-1"), "tinyfleet/home/end"], "a device's mark stays until it ends"
        observer.close()


@pytest.mark.parametrize("denied", ["read", "write"])
@pytest.mark.parametrize("kind", FILTERS)
def test_a_topic_that_is_denied_is_named(kind: str, denied: str, tmp_path: Path) -> None:
    access = [f"topic readwrite {filter}" for name, filter in FILTERS.items() if name != kind]
    access.append(f"topic {denied} {FILTERS[kind]}")
    named = f"not write or not read tinyfleet/home/.*{kind}.* does not come back"
    with secured_broker(tmp_path, access=access) as broker, pytest.raises(UserError, match=named):
        check_operator(broker, "home", timeout=SOON)


def test_what_a_device_may_not_use_is_named(tmp_path: Path) -> None:
    with (
        secured_broker(tmp_path, access=["topic write tinyfleet/home/devices/#"]) as broker,
        pytest.raises(UserError, match=r"tinyfleet/home/devices/dev-1/echo: .* allow it to write and read"),
    ):
        check_device(broker, "home", "dev-1", timeout=SOON)


@pytest.mark.parametrize("role", CHECKS)
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("retain_available false", "does not keep retained messages"),
        ("message_size_limit 4000", "does not deliver messages of 65,536 bytes"),
        ("max_packet_size 4000", "does not deliver messages of 65,536 bytes"),
    ],
)
def test_what_a_broker_cannot_do_is_named(role: str, option: str, said: str, tmp_path: Path) -> None:
    with secured_broker(tmp_path, options=[option]) as broker, pytest.raises(UserError, match=said):
        CHECKS[role](broker, timeout=SOON)


def test_a_second_program_of_one_name_gives_way(tmp_path: Path) -> None:
    with secured_broker(tmp_path) as broker:
        check_device(broker, "home", "dev-1")
        first = device(broker, "dev-1")
        first.start()
        with pytest.raises(NameTaken, match="another program runs as dev-1"):
            check_device(broker, "home", "dev-1")
        first.stop()
        assert first.join(10)
        check_device(broker, "home", "dev-1")  # it has said that it ended


def test_the_name_of_a_program_that_was_killed_is_free(tmp_path: Path) -> None:
    with secured_broker(tmp_path) as broker:
        check_device(broker, "home", "dev-1")
        check_device(broker, "home", "dev-1")


# Commands


Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """Starts the command with these arguments; it ends with the test at the latest."""
    with ExitStack() as stack:

        def start(*words: str, until: str = "") -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "tinyfleet", *words],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
            assert process.stdout is not None
            if until:
                said = []
                for line in process.stdout:
                    said.append(line)
                    if until in line:
                        threading.Thread(target=process.stdout.read, daemon=True).start()
                        return process
                raise AssertionError("".join(said))
            return process

        yield start


@pytest.mark.parametrize("by", ["certificate", "password"])
def test_every_command_works_with_a_broker_of_others(by: str, tmp_path: Path, command: Command) -> None:
    program = tmp_path / "wider.mote"
    task = tasks.load("digits")
    program.write_bytes(build([Dense(8), Dense(5)], task.program.input_shape, "softmax_cross_entropy").data)
    with secured_broker(tmp_path / "broker", by=by, access=["topic readwrite tinyfleet/home/#"]) as broker:
        where = [*connection_options(broker), "--data", str(tmp_path / "data")]
        command("server", "start", *where, until="ready")
        command("device", "simulate", "--devices", "1", *where, until="device-0 is up")
        command("agent", "start", "--device-id", "pi", *where, until="pi is up")
        for words in (
            ["run", "start", "--strategy", "fedavg", "--rounds", "1", "--clients-per-round", "2"],
            ["deploy", str(program), "--yes"],
        ):
            process = command(*words, *where)
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail, and gives the line that it says."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["tinyfleet", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1, said
        return said

    return run


def test_every_command_names_what_a_broker_cannot_do(tmp_path: Path, fails: Callable[..., str]) -> None:
    program = tmp_path / "digits.mote"
    task = tasks.load("digits")
    program.write_bytes(task.program.data)
    data = tmp_path / "data"
    with secured_broker(tmp_path / "broker", options=["retain_available false"]) as broker:
        where = [*connection_options(broker), "--data", str(data)]
        for words in (["server", "start"], ["agent", "start"], ["device", "simulate"]):
            assert "does not keep retained messages" in fails(*words, *where)
        with FleetServer(data, "home", port=0, operator_port=0):
            for words in (["run", "start"], ["deploy", str(program), "--yes"]):
                assert "does not keep retained messages" in fails(*words, *where)


def test_what_is_wrong_with_what_the_broker_is_shown_is_named(tmp_path: Path, fails: Callable[..., str]) -> None:
    start = ["device", "simulate", "--data", str(tmp_path / "data")]
    make_foreign = tmp_path / "foreign"
    make_foreign.mkdir()
    make_certificates(make_foreign)
    with secured_broker(tmp_path / "cert") as broker:
        named = ["--broker", broker.url, "--ca", str(broker.ca)]
        assert "asks for a client certificate; give --cert and --key" in fails(*start, *named)
        foreign = ["--cert", f"{make_foreign}/{USER}.pem", "--key", f"{make_foreign}/{USER}.key"]
        assert "authority that signed the client certificate" in fails(*start, *named, *foreign)
        assert "cannot be trusted" in fails(*start, "--broker", broker.url, "--ca", f"{make_foreign}/ca.pem")
        assert "to accept that, add --insecure" in fails(*start, "--broker", f"mqtt://127.0.0.1:{broker.port}")
        assert broker.key is not None
        broker.key.chmod(0o644)
        assert f"others can read the private key {broker.key}; first: chmod 600" in fails(
            *start, *connection_options(broker)
        )


def test_a_password_comes_from_a_file_or_the_environment_and_nowhere_else(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with secured_broker(tmp_path, by="password") as broker:
        start = ["device", "simulate", "--data", str(tmp_path / "data"), "--ca", str(broker.ca)]
        named = [*start, "--broker", broker.url]
        monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)
        assert find_broker(broker.url, tmp_path, ca=broker.ca) == broker
        monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
        assert "refuses this session: Not authorized" in fails(*named)
        monkeypatch.delenv(PASSWORD_VARIABLE)
        assert "give --password-file" in fails(*named)
        told = fails(*start, "--broker", f"mqtts://{USER}:{PASSWORD.split()[0]}@127.0.0.1:{broker.port}")
        assert "a password in an address can be read by every user" in told
        (tmp_path / "password").chmod(0o640)
        assert "others can read the password" in fails(*named, "--password-file", str(tmp_path / "password"))


def test_a_revoked_device_says_so_and_comes_back_with_a_new_token(tmp_path: Path, fails: Callable[..., str]) -> None:
    data = tmp_path / "device"
    said = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "the client certificate is revoked; enrol again" in record.getMessage():
                said.set()

    with FleetServer(tmp_path / "data", "home", port=0, operator_port=0) as server:

        def new_token(replace: bool) -> str:
            return server.authority.open_token(["dev-1"], "device", server.address, replace=replace).text

        first = new_token(False)
        (broker,) = find_device_brokers(["dev-1"], None, data, enrolment=first)
        (broker,) = find_device_brokers(["dev-1"], None, data, enrolment=first)  # a unit file's command, started again
        running = device(broker, "dev-1")
        running.start()
        listener = Listener()
        logging.getLogger("tinyfleet").addHandler(listener)
        try:
            server.authority.revoke("dev-1")
            assert said.wait(20)
        finally:
            logging.getLogger("tinyfleet").removeHandler(listener)
            running.stop()
            assert running.join(20)
        start = ["agent", "start", "--device-id", "dev-1", "--data", str(data)]
        assert "the client certificate is revoked; enrol again" in fails(*start)
        (broker,) = find_device_brokers(["dev-1"], None, data, enrolment=new_token(True))
        check_device(broker, "home", "dev-1")


def test_an_identity_that_has_ended_says_how_to_get_another(tmp_path: Path) -> None:
    with FleetServer(tmp_path / "data", "home", port=0, operator_port=0) as server:
        token = server.authority.open_token(["dev-1"], "device", server.address).text
        find_device_brokers(["dev-1"], None, tmp_path, enrolment=token)
    file = identity_folder(tmp_path, "dev-1") / "identity.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"issued": 0, "expires": 86_400}))
    with pytest.raises(UserError, match=r"of dev-1 ended on 1970-01-02 .* device enrol dev-1 --replace"):
        find_device_brokers(["dev-1"], None, tmp_path)
