"""Commands on the server's side: their numbers, who is sent what and when, and what is not sent."""

from __future__ import annotations

import queue
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyfleet.__main__ import main
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import load
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.commands import (
    Action,
    Forget,
    NewKeys,
    Reboot,
    Refusal,
    Submission,
    Submitted,
    TrainTask,
    decode_refusal,
    encode_action,
    encode_submission,
)
from tinyfleet.edge.wire.identity import call_server
from tinyfleet.edge.wire.keys import Keys
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Status, Success, decode_status
from tinyfleet.edge.wire.mqtt_session import Message, Session
from tinyfleet.edge.wire.server_info import find_broker, find_device_brokers, require_server
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.authority.authority import Authority
from tinyfleet.server.authority.fleet_keys import write_root_key
from tinyfleet.server.commands import scheduler as scheduling
from tinyfleet.server.commands.counters import AHEAD, BLOCK, Counters
from tinyfleet.server.commands.scheduler import LINGER, RESEND, CommandScheduler, Out, Outstanding
from tinyfleet.server.commands.service import CommandService
from tinyfleet.server.fleet_server import FleetServer

NOW = 1_800_000_000_000
MODEL = bytes(8)
TOPICS = Topics("home")


# Counters


def test_counters_follow_the_time_and_never_go_back(tmp_path: Path) -> None:
    now = [NOW]
    counters = Counters(tmp_path / "counter", lambda: now[0])
    assert [counters.next("a"), counters.next("a"), counters.next("b")] == [NOW, NOW + 1, NOW]
    now[0] -= 3_600_000  # the clock is set back
    assert counters.next("a") == NOW + 2
    again = Counters(tmp_path / "counter", lambda: now[0])  # after a crash
    assert NOW + 2 < again.next("a") <= NOW + 2 + BLOCK + 1 and again.next("c") > NOW + 2


def test_a_restored_backup_does_not_bring_counters_back(tmp_path: Path) -> None:
    now, file = [NOW], tmp_path / "counter"
    Counters(file, lambda: now[0]).next("a")
    backup = file.read_bytes()
    now[0] += 600_000
    last = Counters(file, lambda: now[0]).next("a")
    file.write_bytes(backup)
    now[0] += 1000
    assert Counters(file, lambda: now[0]).next("a") > last


def test_a_clean_end_gives_back_what_was_not_used(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "counter", lambda: NOW)
    counters.next("a")
    counters.close()
    assert Counters(tmp_path / "counter", lambda: NOW).next("a") == NOW + 1


def test_a_report_moves_the_devices_own_counter_alone(tmp_path: Path) -> None:
    counters = Counters(tmp_path / "counter", lambda: NOW)
    assert counters.next("a", NOW + 1000) == NOW + 1001
    assert counters.next("b") == NOW
    assert counters.next("c", NOW + AHEAD + 1) == NOW, "nor is one followed that no device takes"
    counters.next("d", NOW + AHEAD)
    assert Counters(tmp_path / "counter", lambda: NOW).next("e") <= NOW + BLOCK + 2


def test_damaged_counters_are_named(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("many")
    with pytest.raises(UserError, match="counters of commands"):
        Counters(tmp_path / "counter")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-5000, 5000), st.booleans()), max_size=60))
def test_every_number_is_higher_than_all_before_on_its_topic(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, bool]]
) -> None:
    file, now = tmp_path_factory.mktemp("counters") / "counter", [NOW]
    counters, last = Counters(file, lambda: now[0]), dict.fromkeys("abc", 0)
    for topic, step, crash in history:
        now[0] += step
        number = counters.next(topic)
        assert number > last[topic] and number >= now[0]
        last[topic] = number
        if crash:
            counters = Counters(file, lambda: now[0])


# The scheduler


class Scheduled:
    """A scheduler with a clock that a test moves, and seals that can be read."""

    def __init__(self) -> None:
        self.time = 0.0
        self.scheduler = CommandScheduler(
            Counters(None, lambda: NOW).next, self._seal, lambda: NOW, monotonic=lambda: self.time
        )

    @staticmethod
    def _seal(to: str, command: Outstanding) -> bytes:
        return f"{to} {command.counter - NOW} {command.action.id} {(command.nonce or b'-').decode()}".encode()

    def submit(self, action: Action, to: str = "a", life: int = 600_000) -> list[Out]:
        return list(self.scheduler.submit(to, life, action, encode_action(action)))

    def later(self, seconds: float) -> list[Out]:
        self.time += seconds
        return list(self.scheduler.due())

    def status(self, device: str = "a", **fields: object) -> list[Out]:
        return list(self.scheduler.on_status(device, replace(Status(True, MODEL), **fields)))  # type: ignore[arg-type]


def test_a_command_is_sent_again_with_identical_bytes_until_its_reply() -> None:
    s = Scheduled()
    (first,) = s.submit(Reboot(1))
    assert s.later(RESEND / 2) == [] and s.later(RESEND) == [first]
    assert s.later(RESEND) == [] and s.later(RESEND * 1.1) == [first], "at growing intervals"
    s.scheduler.on_reply("a", Success(2))
    s.scheduler.on_reply("b", Success(1))
    s.scheduler.on_reply("a", Success(1, 0, 2))
    assert s.scheduler.outstanding("a") is not None, "another command's, another device's, or half a reply"
    s.scheduler.on_reply("a", Success(1, 1, 2))
    assert s.scheduler.outstanding("a") is None
    assert s.later(LINGER) == [Out("a", b"")] and s.later(1e5) == []


def test_who_has_not_got_the_reply_asks_again_and_gets_it() -> None:
    s = Scheduled()
    (first,) = s.submit(Reboot(1))
    assert s.submit(Reboot(1)) == [first]
    s.scheduler.on_reply("a", Failure(1, ErrorCode.SAMPLES))
    assert s.later(LINGER) == [Out("a", b"")]
    assert s.submit(Reboot(1)) == [first], "the same bytes, so that the device does not do it twice"


def test_a_newer_command_replaces_the_older() -> None:
    s = Scheduled()
    s.submit(Reboot(1))
    (second,) = s.submit(Reboot(2))
    assert second.payload == b"a 1 2 -"
    s.scheduler.on_reply("a", Success(1))
    assert s.later(RESEND) == [second]


def test_a_command_expires_and_can_be_taken_back() -> None:
    s = Scheduled()
    s.submit(Reboot(1), life=5000)
    assert s.later(6) == [Out("a", b"")] and s.scheduler.outstanding("a") is None
    s.submit(Reboot(2))
    assert s.submit(Reboot(3), life=0) == [], "another one"
    assert s.submit(Reboot(2), life=0) == [] and s.scheduler.outstanding("a") is None
    assert s.later(LINGER) == [Out("a", b"")]


def test_a_device_that_starts_again_is_sent_its_command_under_a_number_that_it_takes() -> None:
    s = Scheduled()
    s.status(nonce=b"12345678")
    assert s.submit(Reboot(1)) == [Out("a", b"a 0 1 12345678")]
    assert s.status(nonce=b"12345678", ceiling=NOW) == [], "it has taken it"
    assert s.status(nonce=b"abcdefgh", ceiling=NOW + 500) == [Out("a", b"a 501 1 abcdefgh")]
    assert s.status(nonce=None, ceiling=NOW + 501) == [Out("a", b"a 502 1 -")], "it knows the time now"
    assert s.status(ceiling=NOW + 400) == []
    assert s.status(online=False, ceiling=NOW + 900) == []
    assert s.status("b", ceiling=NOW + 900) == []


def test_a_broker_that_forgot_gets_what_is_outstanding_alone() -> None:
    s = Scheduled()
    (first,) = s.submit(Reboot(1))
    s.submit(Reboot(2), "b")
    s.scheduler.on_reply("b", Success(2))
    assert list(s.scheduler.resend_all()) == [first, Out("b", b"")]
    assert s.submit(Reboot(3), "groups/all")[0].to == "groups/all"
    assert s.later(RESEND) == [first], "a group's is there for all who come"


def test_without_a_number_nothing_is_sent_and_it_is_tried_again() -> None:
    numbers: Iterator[int | None] = iter([None, 7])
    scheduler = CommandScheduler(lambda to, above: next(numbers), lambda to, c: b"x", lambda: NOW, lambda: time[0])
    time = [0.0]
    assert list(scheduler.submit("a", 60_000, Reboot(1), b"1")) == []
    time[0] = RESEND + 0.1
    assert list(scheduler.due()) == [Out("a", b"x")]


STEPS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(["a", "b", "groups/all"]), st.integers(1, 3), st.integers(0, 20_000)),
    st.tuples(st.just("later"), st.floats(0.1, 30), st.none(), st.none()),
    st.tuples(st.just("reply"), st.sampled_from("ab"), st.integers(1, 3), st.booleans()),
    st.tuples(st.just("status"), st.sampled_from("ab"), st.sampled_from([None, b"12345678"]), st.integers(0, 99)),
    st.tuples(st.just("forgotten"), st.none(), st.none(), st.none()),
)


@given(st.lists(STEPS, max_size=80))
def test_a_topic_never_goes_back_and_is_empty_in_the_end(steps: list[tuple[str, Any, Any, Any]]) -> None:
    s = Scheduled()
    last: dict[str, tuple[int, bytes]] = {}  # the highest counter of each recipient, and the bytes with it
    there: dict[str, bytes] = {}  # what the broker retains

    def publish(outs: list[Out]) -> None:
        for to, payload in outs:
            there[to] = payload
            if payload:
                counter = int(payload.split()[1])
                highest, bytes_ = last.get(to, (-1, b""))
                assert counter > highest or (counter, payload) == (highest, bytes_), "equal numbers, equal bytes"
                last[to] = counter, payload

    for kind, first, second, third in steps:
        match kind:
            case "submit":
                publish(s.submit(Reboot(second), first, third))
            case "later":
                publish(s.later(first))
            case "reply":
                s.scheduler.on_reply(first, Failure(second, ErrorCode.SAMPLES) if third else Success(second, 0, 2))
            case "status":
                publish(s.status(first, nonce=second, ceiling=NOW + third))
            case _:
                publish(list(s.scheduler.resend_all()))
    publish(s.later(20.0))
    publish(s.later(LINGER))
    assert not any(there.values()) and not s.later(1e5)
    assert not s.scheduler._open


# The server


class Asking:
    """An operator's session."""

    def __init__(self, address: BrokerAddress, token: str | None) -> None:
        self.token = token
        self.refusals: queue.Queue[Refusal] = queue.Queue()
        self.session = Session(address, "asking", on_message=lambda _, said: self.refusals.put(decode_refusal(said)))
        self.session.subscribe(TOPICS.refused("asking"))

    def submit(self, action: Action | bytes, to: str = "one", life: int = 60_000, token: str | None = "") -> None:
        encoded = action if isinstance(action, bytes) else encode_action(action)
        said = Submission(self.token if token == "" else token, (Submitted(to, life, encoded),))
        self.session.send([Message(TOPICS.submission("asking"), encode_submission(said), False)])

    def refused(self) -> str:
        return self.refusals.get(timeout=20).reason


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FleetServer]:
    with FleetServer(tmp_path / "data", "home", port=0) as server:
        yield server


@pytest.fixture
def asking(server: FleetServer) -> Iterator[Asking]:
    address = find_broker(None, server.data)
    asking = Asking(address, address.api_token)
    yield asking
    asking.session.close()


Command = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command with these arguments; returns its exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tinyfleet", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    return run


def wait_until(reached: Callable[[], bool]) -> None:
    statuses = queue.Queue[None]()
    for _ in range(400):
        if reached():
            return
        try:
            statuses.get(timeout=0.05)
        except queue.Empty:
            continue
    raise AssertionError("it has not come to this")


def test_an_enrolled_device_obeys_the_server_and_nobody_else(
    server: FleetServer, asking: Asking, run: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load("sine")
    (address,) = find_device_brokers(["one"], None, server.data)
    assert address.keys is not None and address.keys.version == server.authority.keys_version
    device = virtual_device(address, "home", "one", task.program, task.client(0, 16))
    first = device.node
    device.start()
    try:
        wait_until(lambda: server.commands is not None and server.commands._scheduler.status_of("one") is not None)
        assert decode_status(first.will().payload).keys == address.keys.version
        asking.submit(Reboot(1))
        wait_until(lambda: device.node is not first)
        # What the server refuses.
        keys = NewKeys(2, 9, bytes(32))
        asking.submit(keys)
        assert "signed by the root key" in asking.refused()
        asking.submit(Reboot(3), token="stolen")
        assert "may not command" in asking.refused()
        asking.submit(Reboot(3), token=None)
        assert "may not command" in asking.refused()
        asking.submit(Reboot(3), life=10 * 365 * 86_400_000 & 0xFFFFFFFF)
        assert "60 minutes at most" in asking.refused()
        asking.submit(b"\x82\x18\x63\x01")
        assert "no action has this number" in asking.refused()
        asking.submit(Reboot(3), to="no/name")
        assert "name" in asking.refused()
        asking.submit(Reboot(3), to="a-stranger")
        assert "not enrolled here" in asking.refused()
        # Keys are rotated by the root key, which the server left beside its folder.
        current = device.node
        rotate = "server", "rotate-keys", "--data", str(server.data), "--root-key"
        assert run(*rotate, str(server.data / "root-key.json")) == 0
        assert "the fleet's keys have version" in capsys.readouterr().out
        wait_until(lambda: decode_status(current.will().payload).keys == server.authority.keys_version)
        assert server.authority.keys_version > address.keys.version
        asking.submit(Forget(4))
        wait_until(lambda: server.commands is not None and server.commands._scheduler.outstanding("one") is None)
        assert current.counters.refused == current.counters.malformed == 0
        # A stranger with a key of its own.
        other = str(server.data.parent / "other-root.json")
        assert run("server", "init", "--data", str(server.data.parent / "other"), "--root-key", other) == 0
        assert run(*rotate, other) == 2
        assert "not the fleet's root key" in capsys.readouterr().err
    finally:
        device.stop()
        assert device.join(20)


def test_what_is_shown_at_the_broker_cannot_administer(server: FleetServer) -> None:
    token = find_broker(None, server.data).api_token
    assert token is not None and token != server.token
    assert server._token_owner(token) == ("owner", "operate")
    with pytest.raises(UserError, match=r"403|scope|may not"):
        call_server({**require_server(server.data), "token": token}, "GET", "/fleet-keys/proposed")


def test_no_token_goes_to_a_broker_that_others_run(tmp_path: Path, own_broker: BrokerAddress) -> None:
    with FleetServer(tmp_path / "data", "home", broker=own_broker) as server:
        assert find_broker(None, server.data).api_token is None


def test_a_device_without_keys_is_not_commanded(server: FleetServer, asking: Asking) -> None:
    (address,) = find_device_brokers(["one"], None, server.data)
    task = load("sine")
    device = virtual_device(replace(address, keys=None), "home", "one", task.program, task.client(0, 16))
    device.start()
    try:
        wait_until(lambda: server.commands is not None and server.commands._scheduler.status_of("one") is not None)
        asking.submit(TrainTask(1, "train", 1, 1, task.program.model_id, 1, ()))
        assert "built without keys" in asking.refused()
        with pytest.raises(UserError, match="built without keys"):
            assert server.commands is not None
            server.commands.command("one", Reboot(5))
    finally:
        device.stop()
        assert device.join(20)


def test_a_server_that_is_lost_is_replaced_by_one_with_the_same_root_key(
    tmp_path: Path, own_broker: BrokerAddress, run: Command
) -> None:
    root, data = tmp_path / "root.json", tmp_path / "new"
    lost = Authority(tmp_path / "lost", root_key=cose.public_key(write_root_key(root)))
    change = lost.fleet_keys.change
    lost.close()
    keys = Keys(bytes(range(32)), change.current, change.next, lost.fleet_keys.root, change.version - 1000)
    task = load("sine")
    device = virtual_device(replace(own_broker, keys=keys), "home", "one", task.program, task.client(0, 16))
    node = device.node
    device.start()
    try:
        options = "--root-key", str(root), "--data", str(data)
        assert run("server", "init", *options) == 0
        with FleetServer(data, "home", broker=own_broker) as server:
            asking = Asking(own_broker, None)
            commands = server.commands
            assert commands is not None
            wait_until(lambda: commands._scheduler.status_of("one") is not None)
            asking.submit(Reboot(1))
            assert "rotate-keys" in asking.refused()
        assert run("server", "rotate-keys", *options) == 0, "while no server runs"
        with FleetServer(data, "home", broker=own_broker) as server:
            version = server.authority.keys_version
            wait_until(lambda: decode_status(node.will().payload).keys == version)
            commands = server.commands
            assert commands is not None
            wait_until(lambda: (status := commands._scheduler.status_of("one")) is not None and status.keys == version)
            asking.submit(TrainTask(2, "train", 1, 1, bytes(8), 1, ()))
            wait_until(lambda: "one" in commands._scheduler._open and commands._scheduler.outstanding("one") is None)
            assert node.counters.refused == 0
            asking.session.close()
    finally:
        device.stop()
        assert device.join(20)


def knows_one(commands: CommandService) -> bool:
    return commands._scheduler.status_of("one") is not None


def test_a_server_of_a_restored_backup_is_obeyed_and_a_replay_is_not(tmp_path: Path, own_broker: BrokerAddress) -> None:
    data, backup = tmp_path / "data", tmp_path / "backup"
    seen: queue.Queue[bytes] = queue.Queue()
    task = load("sine")
    with FleetServer(data, "home", broker=own_broker) as server:
        change, root = server.authority.fleet_keys.change, server.authority.fleet_keys.root
    shutil.copytree(data, backup)
    keys = Keys(bytes(32), change.current, change.next, root, change.version)
    listening = Session(own_broker, "listening", on_message=lambda _, payload: seen.put(payload))
    listening.subscribe(TOPICS.command("one"))
    device = virtual_device(replace(own_broker, keys=keys), "home", "one", task.program, task.client(0, 16))
    nodes = [device.node]
    device.start()
    try:
        for folder in (data, backup):
            with FleetServer(folder, "home", broker=own_broker) as server:
                assert server.commands is not None
                wait_until(partial(knows_one, server.commands))
                asking = Asking(own_broker, None)
                asking.session.send([Message(TOPICS.submission("asking"), b"\x82\xf6\x99\x03\xe8", False)])
                asking.submit(Reboot(len(nodes)))
                wait_until(lambda: device.node not in nodes)
                nodes.append(device.node)
                asking.session.close()
        replayed = {payload for payload in seen.queue if payload}
        assert len(replayed) == 2

        def replay() -> bool:  # again and again: until it has subscribed, the device gets nothing
            for payload in replayed:
                listening.publish(TOPICS.command("one"), payload)
            counters = nodes[-1].counters  # as they are now
            return counters.stale + counters.refused >= 6

        wait_until(replay)
        assert device.node is nodes[-1], "it has not started again"
    finally:
        listening.close()
        device.stop()
        assert device.join(20)


def test_a_groups_command_reaches_its_devices_and_new_ones(server: FleetServer, asking: Asking) -> None:
    (address,) = find_device_brokers(["one"], None, server.data)
    task = load("sine")
    asking.submit(Reboot(9), to="groups/all")
    commands = server.commands
    assert commands is not None
    wait_until(lambda: commands._scheduler.outstanding("groups/all") is not None)
    device = virtual_device(address, "home", "one", task.program, task.client(0, 16))
    first = device.node
    device.start()
    try:
        wait_until(lambda: first.counters.stale + first.counters.refused > 0 or device.node is not first)
        assert device.node is first, "the command is from before its start"
        asking.submit(Reboot(10), to="groups/all")
        wait_until(lambda: device.node is not first)
    finally:
        device.stop()
        assert device.join(20)


def test_commands_have_a_bound_and_those_that_are_done_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "MAX_OPEN", 2)
    s = Scheduled()
    s.submit(Reboot(1), "a")
    s.submit(Reboot(1), "b")
    assert s.scheduler.has_room("a") and not s.scheduler.has_room("c")
    s.scheduler.on_reply("a", Success(1))
    assert not s.scheduler.has_room("c"), "it is at the broker still"
    assert Out("a", b"") in s.later(LINGER)
    assert s.scheduler.has_room("c") and s.scheduler.outstanding("b") is not None


def test_without_a_server_a_run_says_so(own_broker: BrokerAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    from tinyfleet.server.commands import client
    from tinyfleet.server.flower.grid import MqttGrid

    monkeypatch.setattr(client.CommandClient.require_server, "__defaults__", (0.2,))
    with pytest.raises(UserError, match=r"no server commands the fleet 'home'.*tinyfleet server start"):
        MqttGrid(own_broker, "home", load("sine").program)


def test_the_root_key_is_written_once(tmp_path: Path, run: Command) -> None:
    def init(root: Path, data: Path) -> int:
        return run("server", "init", "--root-key", str(root), "--data", str(data))

    root, data = tmp_path / "root.json", tmp_path / "data"
    assert init(root, data) == 0
    assert root.stat().st_mode & 0o077 == 0
    secret = root.read_text().split('"')[3]
    assert all(secret not in path.read_text(errors="ignore") for path in data.rglob("*") if path.is_file())
    assert init(tmp_path / "second.json", data) == 2
    assert init(root, tmp_path / "other") == 0, "a server that takes over with the same root"
