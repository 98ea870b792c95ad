"""Every command on a broker that is not ours: with a password, with a client certificate, and with one that refuses."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import free_port, mosquitto_program, start_mosquitto

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.broker_address import PASSWORD_VARIABLE, BrokerAddress
from tinyfleet.edge.wire.broker_check import check_broker, device_topics, operator_topics
from tinyfleet.edge.wire.identity import _request
from tinyfleet.server.authority import certificates
from tinyfleet.server.authority.authority import Authority

ROOT = Path(__file__).parents[1]
ALL = "topic readwrite tinyfleet/#"
Start = Callable[..., BrokerAddress]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts mosquitto with TLS, the user "pi" with the password "secret", and further lines of configuration."""
    authority = Authority(tmp_path / "authority")
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    program = str(mosquitto_program()).replace("sbin", "bin") + "_passwd"
    subprocess.run([program, "-b", str(passwords), "pi", "secret"], check=True, capture_output=True)
    running = []

    def begin(*lines: str, acl: str = ALL, client_certificates: bool = False) -> BrokerAddress:
        port = free_port()
        certificate, key = authority.server_files
        (tmp_path / "acl").write_text(f"{acl}\n" if client_certificates else f"user pi\n{acl}\n")
        (tmp_path / "acl").chmod(0o600)
        options = [
            *(["user root"] if os.geteuid() == 0 else []),
            f"acl_file {tmp_path / 'acl'}",
            "allow_anonymous false",
            *lines,
        ]
        listener = [f"certfile {certificate}", f"keyfile {key}"]
        if client_certificates:
            listener += [
                f"cafile {authority.ca_of('device')}",
                "require_certificate true",
                "use_identity_as_username true",
            ]
        else:
            options.insert(0, f"password_file {passwords}")
        running.append(start_mosquitto(tmp_path, port, options, listener))
        return BrokerAddress("127.0.0.1", port, username="pi", password="secret", ca=authority.ca_file)

    yield begin
    for process in running:
        process.terminate()
        process.wait()
    authority.close()


def tinyfleet(*words: str, password: str | None = None) -> "subprocess.Popen[str]":
    environment = os.environ | ({} if password is None else {PASSWORD_VARIABLE: password})
    command = [sys.executable, "-m", "tinyfleet", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)


def test_a_fleet_on_a_broker_with_a_password(start: Start, tmp_path: Path) -> None:
    broker = start()
    file = tmp_path / "secret"
    file.write_text("secret\n")
    file.chmod(0o600)
    data = ["--data", str(tmp_path / "data"), "--broker", broker.url, "--ca", str(broker.ca)]
    server = tinyfleet("server", "start", *data, "--password-file", str(file))
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("ready"):
            break
    devices = tinyfleet("device", "simulate", "--devices", "2", *data, password="secret")
    agent = tinyfleet("agent", "start", "--device-id", "pi", "--client-index", "5", *data, password="secret")
    try:
        for process in (devices, agent):
            assert process.stdout is not None
            assert "is up" in process.stdout.readline()
        run = tinyfleet("run", "start", "--rounds", "1", "--clients-per-round", "3", *data, password="secret")
        out, err = run.communicate(timeout=120)
        assert "round 1/1: 3/3 clients" in out, err
        command = Path(f"/proc/{server.pid}/cmdline")
        assert not command.exists() or b"secret\n" not in command.read_bytes()
    finally:
        for process in (devices, agent, server):
            process.terminate()
        for process in (devices, agent, server):
            process.communicate(timeout=30)
    assert (devices.returncode, agent.returncode, server.returncode) == (0, 0, 0)


def test_a_device_on_a_broker_with_client_certificates(start: Start, tmp_path: Path) -> None:
    broker = start(client_certificates=True, acl="pattern readwrite tinyfleet/home/devices/%u/#")
    authority = Authority(tmp_path / "authority")
    key = certificates.new_key()
    token = authority.open_token(["pi"], "device", "http://127.0.0.1:1")
    (tmp_path / "pi.crt").write_text(authority.enrol(token.secret, "pi", _request(key, "pi")).certificate)
    (tmp_path / "pi.key").write_bytes(certificates.key_pem(key))
    authority.close()
    shown = ["--ca", str(broker.ca), "--cert", str(tmp_path / "pi.crt"), "--key", str(tmp_path / "pi.key")]
    address = f"mqtts://127.0.0.1:{broker.port}"
    agent = tinyfleet("agent", "start", "--device-id", "pi", "--broker", address, *shown)
    assert agent.stdout is not None and "pi is up" in agent.stdout.readline()
    agent.terminate()
    assert agent.communicate(timeout=30)[1] == "" and agent.returncode == 0
    other = tinyfleet("agent", "start", "--device-id", "hall", "--broker", address, *shown)
    assert "does not let this client publish to tinyfleet/home/devices/hall/echo" in other.communicate(timeout=60)[1]
    assert other.returncode == 2


@pytest.mark.parametrize(
    ("lines", "acl", "said"),
    [
        ((), ALL, None),
        (("retain_available false",), ALL, "does not retain messages|ends the session|loses"),
        (("message_size_limit 1000",), ALL, "loses a message of 65536 bytes; raise its limit"),
        (("max_packet_size 2000",), ALL, "ends the session after a message of 65536 bytes"),
        (
            (),
            "topic write tinyfleet/#",
            "publish to tinyfleet/home/devices/.*/command and read it",
        ),
        ((), "topic read tinyfleet/#", "does not let this client publish to"),
        ((), "topic readwrite tinyfleet/home/devices/#", "does not let this client publish to tinyfleet/home/runs/"),
        ((), ALL + "\ntopic deny tinyfleet/home/models/#", "publish to tinyfleet/home/models/"),
    ],
)
def test_what_a_broker_refuses_is_named(
    start: Start, lines: tuple[str, ...], acl: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfleet.edge.wire.broker_check.TIMEOUT", 1.0)
    broker = start(*lines, acl=acl)
    if said is None:
        check_broker(broker, "check", operator_topics("home"))
        check_broker(broker, "check", device_topics("home", "kitchen"))
        return
    with pytest.raises(UserError) as error:
        check_broker(broker, "check", operator_topics("home"))
    assert re.search(said, str(error.value)), error.value


@pytest.mark.parametrize(
    "words",
    [
        ("server", "start", "--data", "{data}"),
        ("device", "simulate"),
        ("agent", "start"),
        ("gateway", "start", "--port", "socket://127.0.0.1:1"),
    ],
)
def test_wrong_credentials_are_one_line_in_every_command(start: Start, tmp_path: Path, words: tuple[str, ...]) -> None:
    broker = start()
    words = tuple(word.replace("{data}", str(tmp_path / "data")) for word in words)
    _, err = tinyfleet(*words, "--broker", broker.url, "--ca", str(broker.ca), password="wrong").communicate(timeout=60)
    assert err.count("\n") == 1 and "Traceback" not in err
    assert ("give --password-file" in err) or (words[0] == "gateway" and "cannot open the serial line" in err)


def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("secret")
    file.chmod(0o644)
    agent = tinyfleet("agent", "start", "--broker", "mqtts://pi@127.0.0.1:1", "--password-file", str(file))
    assert "others can read the password" in agent.communicate(timeout=60)[1]
    agent = tinyfleet("agent", "start", "--broker", "mqtts://pi:secret@127.0.0.1:1")
    assert "can be read by every user of this machine" in agent.communicate(timeout=60)[1]
