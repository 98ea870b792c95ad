"""What reaches the server in bulk, or cannot be written, costs it neither its memory nor its life."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import plain_broker

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire import mqtt_session, serial_frames
from tinyfleet.edge.wire.log_limit import LogLimit
from tinyfleet.edge.wire.messages import Status, encode
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools import gateway as gateways
from tinyfleet.ontology.store.store import DiskError, EmbeddedStore
from tinyfleet.ontology.vocabulary.namespaces import TF, Iri, device_iri
from tinyfleet.server.fleet_server import FleetServer

TOPICS = Topics("home")
MIB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def junk(number: int) -> Message:
    """Each from another name, and of another kind of junk."""
    kinds = (b"\xff" * 100, b"\x9f" * 50, b"{" * 200, os.urandom(300), b'{"@context": 5, "id": "' + b"x" * 500 + b'"}')
    name = f"junk-{number}"
    return Message(TOPICS.td(name) if number % 2 else TOPICS.status(name), kinds[number % len(kinds)])


@pytest.mark.parametrize("seconds", [20, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read from /proc")
def test_a_thousand_junk_messages_a_second_cost_no_memory_and_few_lines(tmp_path: Path, seconds: int) -> None:
    lines: list[str] = []
    with FleetServer(tmp_path, "home", port=0, insecure=True, on_log=lines.append) as server:
        sender = Session(server.broker, "sender")
        sent, before, begin = 0, 0, time.monotonic()
        for second in range(seconds):
            sender.send([junk(sent + i) for i in range(1000)])
            sent += 1000
            if second == 4:  # what is loaded at the first use has been loaded
                before = resident_bytes()
            threading.Event().wait(max(0.0, begin + second + 1 - time.monotonic()))  # the rate is what is tested
        growth = resident_bytes() - before
        sender.close()
        assert server.registry.rejected > 0.9 * sent
    assert growth < 100 * MIB
    assert len(lines) < 110 * (seconds + 2)
    print(f"{sent:,} messages in {seconds} s: {growth / MIB:+.1f} MiB, {len(lines):,} lines")


def test_lines_of_one_cause_are_limited_and_those_of_another_are_not() -> None:
    now, lines = [0.0], []
    limit = LogLimit(lines.append, 2, lambda: now[0])
    for i in range(5):
        limit("a", f"a {i}")
    limit("b", "b")
    now[0] = 1.5
    limit("a", "a 5")
    assert lines == ["a 0", "a 1", "b", "and 3 more like it", "a 5"]


def test_a_broker_that_sends_a_packet_without_an_end_is_left(tmp_path: Path) -> None:
    """It is an external one: our own limits its packets itself."""
    import socket

    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"\x20\x02\x00\x00")  # CONNACK
                connection.sendall(b"\x30\xff\xff\xff\x7f" + bytes(100))  # a message of 256 MiB begins
                lost.wait(30)

        threading.Thread(target=serve, daemon=True).start()
        session = Session(plain_broker(listening.getsockname()[1]), "a", on_lost=lost.set)
        assert lost.wait(10)
        for _ in range(mqtt_session.MAX_QUEUED + 10):  # without a connection, only so many wait
            session.publish("t", b"x")
        assert len(session._client._out_messages) <= mqtt_session.MAX_QUEUED
        session.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tinyfleet-test", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root on Linux can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(file: Path) -> None:
    handle = os.open(file, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(handle, bytes(4096))
    except OSError:
        os.close(handle)


def test_a_graph_on_a_full_disk_can_be_written_again_once_there_is_room(small_disk: Path) -> None:
    facts = {Iri(f"urn:x:{i}"): {TF.deviceId: "x" * 300 + str(i)} for i in range(1000)}
    with EmbeddedStore(small_disk / "graph") as store:
        store.write({Iri("urn:x:first"): {TF.deviceId: "first"}})
        fill(small_disk / "fill")
        for _ in range(2):
            with pytest.raises(DiskError):
                store.write(facts)
        assert store.query("SELECT ?s { ?s ?p ?o }").column("s") == ["urn:x:first"]
        (small_disk / "fill").unlink()
        store.write(facts)
    with EmbeddedStore(small_disk / "graph") as store:
        assert len(store) == 1001


def test_a_server_on_a_full_disk_waits_until_there_is_room(small_disk: Path) -> None:
    lines: list[str] = []
    full, again = threading.Event(), threading.Event()

    def on_log(line: str) -> None:
        lines.append(line)
        if "until there is room" in line:
            full.set()
        elif "can be written again" in line:
            again.set()

    with FleetServer(small_disk, "home", port=0, insecure=True, on_log=on_log) as server:
        sender = Session(server.broker, "sender")
        fill(small_disk / "fill")
        for i in range(2000):
            sender.publish(TOPICS.status(f"d-{i}"), encode(Status(True, bytes(8), samples=i)))
        assert full.wait(30)
        (small_disk / "fill").unlink()
        assert again.wait(30)
        assert sender.flush(30)
        sender.publish(TOPICS.status("last"), encode(Status(True, bytes(8))))
        deadline = time.monotonic() + 30
        while not server.store.values([device_iri("home", "last")], TF.online) and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        devices = [device_iri("home", f"d-{i}") for i in range(2000)]
        assert set(server.store.values(devices, TF.online).values()) == {True}
        assert len(server.store.values(devices, TF.online)) == 2000
        sender.close()
    assert sum("until there is room" in line for line in lines) == 1


def test_a_second_server_on_the_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    with FleetServer(tmp_path, "home", port=0, insecure=True) as server:
        with pytest.raises(UserError, match="is in use by another process") as refused:
            FleetServer(tmp_path, "home", port=0, insecure=True)
        assert "\n" not in str(refused.value)
        assert json.loads((tmp_path / "server.json").read_text())["http"] == server.address  # the first is untouched
        again = Session(server.broker, "a")
        again.close()


def test_a_server_whose_thread_dies_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()
    reasons: list[str] = []

    def on_failure(reason: str) -> None:
        reasons.append(reason)
        failed.set()

    with FleetServer(tmp_path, "home", port=0, insecure=True, on_failure=on_failure) as server:
        monkeypatch.setattr(server, "_try", None)  # the writer's next step raises
        server._connected()
        assert failed.wait(10)
    assert "has died; start the server again" in reasons[0]


def test_a_board_that_floods_the_line_is_read_no_faster_than_allowed() -> None:
    said: list[str] = []
    flood = serial_frames.encode(serial_frames.Frame(99, "t", b"")) * 1000
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def never(_name: str) -> None:
            raise AssertionError

        gateway = gateways.Gateway(f"socket://127.0.0.1:{listener.getsockname()[1]}", never, report=said.append)  # type: ignore[arg-type]
        stop = threading.Event()
        thread = threading.Thread(target=gateway.run, args=(stop,), daemon=True)
        thread.start()
        line, _ = listener.accept()
        assert line.recv(4096)  # greeted
        line.settimeout(0.2)
        begin = time.monotonic()
        while time.monotonic() - begin < 2:
            with suppress(TimeoutError):
                line.sendall(flood)
        stop.set()
        thread.join(10)
        line.close()
    assert not thread.is_alive()
    in_one_read = 65_536 * 1000 // len(flood)
    assert 0 < gateway.counters.rejected + gateway.counters.damaged <= 3 * (gateways.MAX_RATE + in_one_read)
