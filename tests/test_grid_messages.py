"""The grid, over a real broker, against a device that does what a test wants: replies lost, doubled, cut, forged."""

import logging
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import paho.mqtt.client as paho
import pytest
from broker_fixtures import command_services
from conftest import free_port, plain_broker, start_mosquitto
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import layers
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import decode_chunk
from tinyfleet.edge.wire.commands import TrainTask, decode_command
from tinyfleet.edge.wire.messages import Dense, ErrorCode, Failure, Metrics, Reply, Sparse, Status, Success, encode
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.server.flower.devices import node_id
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.requests import RoundEvent

PROGRAM = layers.build([layers.Dense(16), layers.ReLU(), layers.Dense(3)], (20,), "softmax_cross_entropy")
SIZE = PROGRAM.n_params
START = PROGRAM.initial(1)
TOPICS = Topics("test")
METRICS = Metrics(samples=8, loss=0.5, queried=4, correct=3, query_loss=0.25, arena_bytes=PROGRAM.arena_bytes)


class Puppet:
    """A device of which a test holds the strings."""

    def __init__(self, broker: BrokerAddress, name: str) -> None:
        self.name = name
        self.requests: queue.Queue[TrainTask] = queue.Queue()
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=name)
        self._client.on_message = self._on_message
        self._weights: dict[int, bytes] = {}
        self._complete = threading.Event()
        self._client.will_set(TOPICS.status(name), encode(Status(False, PROGRAM.model_id)), qos=1, retain=True)
        self._client.on_connect = lambda client, *_: client.subscribe(TOPICS.command(name), qos=1)
        if (context := broker.tls_context()) is not None:
            self._client.tls_set_context(context)
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        self.say(Status(True, PROGRAM.model_id))

    def _on_message(self, _client: object, _data: object, message: paho.MQTTMessage) -> None:
        if message.topic == TOPICS.command(self.name):
            if message.payload:
                work = decode_command(message.payload).action
                assert isinstance(work, TrainTask)
                self.requests.put(work)
        elif message.payload:
            self._weights.update([decode_chunk(message.payload)])
            if sum(map(len, self._weights.values())) == 4 * SIZE:
                self._complete.set()

    def say(self, status: Status) -> None:
        self._client.publish(TOPICS.status(self.name), encode(status), qos=1, retain=True).wait_for_publish(15)

    def work(self) -> TrainTask:
        return self.requests.get(timeout=15)

    def weights(self, work: TrainTask) -> NDArray[np.float32]:
        """What is in the command, or what the broker has retained for this work."""
        if isinstance(work.weights, bytes):
            return np.frombuffer(work.weights, "<f4")
        self._weights = {}
        self._complete.clear()
        self._client.subscribe(TOPICS.weights(work.run, work.round), qos=1)
        assert self._complete.wait(15)
        self._client.unsubscribe(TOPICS.weights(work.run, work.round))
        return np.frombuffer(b"".join(data for _, data in sorted(self._weights.items())), "<f4")

    def reply(self, did: Reply | bytes, as_: str | None = None) -> None:
        payload = did if isinstance(did, bytes) else encode(did)
        self._client.publish(TOPICS.reply(as_ or self.name), payload, qos=1).wait_for_publish(15)

    def reply_until(self, result: Future[list[Message]], did: Reply) -> None:
        """Replies, and again to each repeated command, as devices do: the grid may not have been listening yet."""
        self.reply(did)
        while not result.done():
            with suppress(queue.Empty):
                self.requests.get(timeout=0.2)
                self.reply(did)

    def vanish(self) -> None:
        """Breaks the connection, so that the broker publishes the will."""
        self._client._sock_close()  # paho has no public way to die
        self._client.loop_stop()

    def leave(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


Start = Callable[[str], Puppet]


@pytest.fixture
def puppet(broker: BrokerAddress) -> Iterator[Start]:
    puppets: list[Puppet] = []

    def start(name: str) -> Puppet:
        puppets.append(Puppet(broker, name))
        return puppets[-1]

    yield start
    for started in puppets:
        started.leave()


@pytest.fixture
def events() -> list[RoundEvent]:
    return []


@pytest.fixture
def grid(broker: BrokerAddress, events: list[RoundEvent]) -> Iterator[MqttGrid]:
    with MqttGrid(broker, "test", PROGRAM, on_event=events.append, resend_interval=0.2, offline_grace=0.1) as grid:
        yield grid


def record(vector: NDArray[np.float32]) -> ArrayRecord:
    return ArrayRecord({key: Array(array) for key, array in PROGRAM.split(vector).items()})


def flat(message: Message) -> NDArray[np.float32]:
    (arrays,) = message.content.array_records.values()
    return PROGRAM.join({key: array.numpy() for key, array in arrays.items()})


def message(device: str, arrays: ArrayRecord, config: Mapping[str, Any] | None = None) -> Message:
    content = RecordDict(
        {"arrays": arrays, "config": ConfigRecord({"server-round": 1, "query": METRICS.queried, **(config or {})})}
    )
    return Message(content, node_id(device), MessageType.TRAIN)


@contextmanager
def asked(grid: MqttGrid, *messages: Message, timeout: float = 10.0) -> Iterator[Future[list[Message]]]:
    """A round on its way, in another thread."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(grid.send_and_receive, messages, timeout=timeout)


def dense(work: TrainTask, values: NDArray[np.float32], parts: int = 1, half: bool = False) -> list[Success]:
    pieces = np.array_split(values, parts)
    offsets = np.cumsum([0, *map(len, pieces)])
    return [
        Success(work.id, i, parts, METRICS if i == 0 else None, Dense(int(offsets[i]), piece, half))
        for i, piece in enumerate(pieces)
    ]


def test_a_reply_in_parts_arrives_in_any_order_and_more_than_once(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    assert grid.wait_for_nodes(1, 5) == [node_id("a")]
    learned = START + np.float32(0.5)
    with asked(grid, message("a", record(START))) as result:
        work = device.work()
        assert device.weights(work).tolist() == START.tolist()
        first, second, third = dense(work, learned, parts=3)
        for part in (third, first, third, first, second):
            device.reply(part)
        (reply,) = result.result(5)
    assert flat(reply).tolist() == learned.tolist()
    metrics = reply.content.metric_records["metrics"]
    assert metrics["num-examples"] == 8 and metrics["accuracy"] == 0.75 and metrics["query-loss"] == 0.25
    assert metrics["bytes-up"] == sum(len(encode(part)) for part in (first, second, third))
    assert metrics["bytes-dense"] == 4 * SIZE
    assert grid.traffic.stale >= 2 and grid.traffic.malformed == 0


def test_a_lost_request_or_reply_is_made_good_by_asking_again(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START))) as result:
        first = device.work()  # not answered, as if it or its reply were lost
        second = device.work()
        assert second == first, "the same work under the same id, so that a device does it once"
        device.reply(dense(second, START)[0])
        assert len(result.result(5)) == 1


def test_malformed_replies_are_counted_and_dropped(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START))) as result:
        work = device.work()
        good = encode(dense(work, START)[0])
        bad = [
            b"",
            b"\xff\xff",
            good[:-1],  # cut
            good + b"\x00",
        ]
        for payload in bad:
            device.reply(payload)
        device.reply(good)
        assert not result.result(5)[0].has_error()
    assert grid.traffic.malformed == len(bad)


def sparse(indices: Sequence[int]) -> Sparse:
    return Sparse(np.array(indices, np.uint32), np.ones(len(indices), np.float32))


HALF = SIZE // 2
OUT_OF_BOUNDS: dict[str, tuple[list[tuple[Metrics | None, Dense | Sparse | None]], float]] = {
    # What is sent, in parts, and the density that was asked for.
    "an index beyond the end": ([(METRICS, sparse([SIZE]))], 0.01),
    "values beyond the end": ([(METRICS, Dense(1, START))], 1),
    "more changes than asked for": ([(METRICS, sparse([0, 1, 2, 3, 4]))], 0.01),
    "more changes than asked for, in parts": ([(METRICS, sparse([0, 1, 2])), (None, sparse([3, 4]))], 0.01),
    "an index twice": ([(METRICS, sparse([1, 2])), (None, sparse([2]))], 0.01),
    "indices out of order": ([(METRICS, sparse([5, 6])), (None, sparse([2]))], 0.01),
    "all parameters, asked for some": ([(METRICS, Dense(0, START))], 0.01),
    "too few parameters": ([(METRICS, Dense(0, START[:-1]))], 1),
    "parameters twice": ([(METRICS, Dense(0, START[:HALF])), (None, Dense(0, START[HALF:]))], 1),
    "both kinds of update": ([(METRICS, Dense(0, START[:-1])), (None, sparse([SIZE - 1]))], 1),
    "no update": ([(METRICS, None)], 1),
    "no metrics": ([(None, Dense(0, START))], 1),
    "more samples than asked for": ([(replace(METRICS, samples=33), Dense(0, START))], 1),
    "the most samples that the wire holds": ([(replace(METRICS, samples=2**32 - 1), Dense(0, START))], 1),
    "no sample": ([(replace(METRICS, samples=0), Dense(0, START))], 1),
    "more queries than asked for": ([(replace(METRICS, queried=5), Dense(0, START))], 1),
    "no query": ([(replace(METRICS, queried=0, correct=0), Dense(0, START))], 1),
    "more right than queried": ([(replace(METRICS, correct=5), Dense(0, START))], 1),
    "a loss that is not a number": ([(replace(METRICS, loss=float("nan")), Dense(0, START))], 1),
}


@pytest.mark.parametrize("kind", OUT_OF_BOUNDS)
def test_a_reply_out_of_bounds_is_an_error_at_once_and_counted(
    grid: MqttGrid, puppet: Start, events: list[RoundEvent], kind: str
) -> None:
    parts, density = OUT_OF_BOUNDS[kind]
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START), {"density": density}), timeout=600) as result:
        work = device.work()
        for number, (metrics, update) in enumerate(parts):
            device.reply(Success(work.id, number, len(parts), metrics, update))
        (reply,) = result.result(60)
    assert reply.has_error() and str(reply.error.reason).startswith("a: replied ")
    assert grid.traffic.refused == 1
    assert [(event.device, f"a: {event.reason}") for event in events if event.kind == "refused"] == [
        ("a", reply.error.reason)
    ]


def test_a_reply_of_too_many_parts_is_refused_with_the_first(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START)), timeout=600) as result:
        device.reply(Success(device.work().id, 0, 2**31, METRICS, Dense(0, START)))
        assert result.result(60)[0].has_error()


def test_a_change_far_longer_than_the_others_is_refused(
    grid: MqttGrid, puppet: Start, events: list[RoundEvent]
) -> None:
    devices = [puppet(name) for name in "abcd"]
    grid.wait_for_nodes(4, 5)
    with asked(grid, *(message(name, record(START)) for name in "abcd"), timeout=600) as result:
        for device, length in zip(devices, (1.0, 2.0, 4.0, 16.0), strict=True):  # 5 times the median of 3 is 15
            learned = START.copy()
            learned[0] += length
            device.reply(dense(device.work(), learned)[0])
        replies = {grid.device(reply.metadata.src_node_id): reply for reply in result.result(60)}
    assert {device: reply.has_error() for device, reply in replies.items()} == {
        **dict.fromkeys("abc", False),
        "d": True,
    }
    assert [event.device for event in events if event.kind == "refused"] == ["d"]
    with asked(grid, message("d", record(START)), timeout=600) as result:  # alone: beside the others' last
        learned = START.copy()
        learned[0] += 16
        devices[3].reply(dense(devices[3].work(), learned)[0])
        assert result.result(60)[0].has_error()


def test_stale_and_forged_replies_change_nothing(grid: MqttGrid, puppet: Start) -> None:
    a, b = puppet("a"), puppet("b")
    grid.wait_for_nodes(2, 5)
    with asked(grid, message("a", record(START)), message("b", record(START))) as result:
        for_a, for_b = a.work(), b.work()
        b.reply(dense(for_a, START + np.float32(9))[0])  # on its own topic, with another's id
        a.reply(Success(for_a.id ^ 1 << 31, 0, 1, METRICS, Dense(0, START)))  # of a round that nobody knows
        a.reply(dense(for_a, START)[0])
        b.reply(dense(for_b, START)[0])
        replies = result.result(5)
    assert [flat(reply).tolist() for reply in replies] == [START.tolist()] * 2
    assert grid.traffic.malformed == 1 and grid.traffic.stale == 1
    with asked(grid, message("a", record(START))) as result:
        a.reply(dense(for_a, START + np.float32(9))[0])  # the last round's, once more
        again = a.work()
        assert again.round > for_a.round
        a.reply(dense(again, START)[0])
        assert flat(result.result(5)[0]).tolist() == START.tolist()


def test_a_device_that_starts_anew_is_asked_anew_and_its_halves_are_not_mixed(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    device.say(Status(True, PROGRAM.model_id, samples=50))
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START))) as result:
        work = device.work()
        device.reply(dense(work, START + np.float32(1), parts=2)[0])
        device.say(Status(True, PROGRAM.model_id, samples=0))
        assert device.work() == work
        for part in dense(work, START + np.float32(2), parts=2):
            device.reply(part)
        assert flat(result.result(5)[0]).tolist() == (START + np.float32(2)).tolist()


@pytest.mark.parametrize("half", [False, True])
def test_sparse_changes_are_added_to_what_was_sent(grid: MqttGrid, puppet: Start, half: bool) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    indices = np.array([0, 7, 130, SIZE - 1], np.uint32)
    changes = np.array([0.5, -0.25, 1e-3, 2.0], np.float32)
    with asked(grid, message("a", record(START), {"density": 0.01, "half": half})) as result:
        work = device.work()
        assert work.update is not None and work.update.density == pytest.approx(0.01) and work.update.half is half
        device.reply(Success(work.id, 0, 2, METRICS, Sparse(indices[:2], changes[:2], half)))
        device.reply(Success(work.id, 1, 2, None, Sparse(indices[2:], changes[2:], half)))
        (reply,) = result.result(5)
    expected = START.copy()
    expected[indices] += changes.astype(np.float16).astype(np.float32) if half else changes
    assert flat(reply).tolist() == expected.tolist()
    assert reply.content.metric_records["metrics"]["bytes-up"] < 100


def test_the_weights_go_out_once_and_are_gone_after_the_round(
    grid: MqttGrid, puppet: Start, events: list[RoundEvent], broker: BrokerAddress
) -> None:
    devices = [puppet(name) for name in "abc"]
    grid.wait_for_nodes(3, 5)
    # Equal arrays, not the same object: what a strategy that copies them sends.
    with asked(grid, *(message(device.name, record(START)) for device in devices)) as result:
        works = [device.work() for device in devices]
        assert len({(work.run, work.round) for work in works}) == 1
        for device, work in zip(devices, works, strict=True):
            assert device.weights(work).tolist() == START.tolist()
            device.reply(dense(work, START)[0])
        assert len(result.result(5)) == 3
    assert 4 * SIZE < grid.traffic.bytes_down < 4 * SIZE + 2400, "one broadcast, and three short requests"
    assert [event.kind for event in events].count("broadcast") == 1
    grid.close()
    assert retained(broker) == {TOPICS.status(name) for name in "abc"}


def retained(broker: BrokerAddress) -> set[str]:
    """The topics that hold a retained message, but for announcements and what the server says; a message of our own
    marks the end of them."""
    topics: set[str] = set()
    over = threading.Event()

    def on_message(_client: object, _data: object, message: paho.MQTTMessage) -> None:
        others = message.topic.endswith(("/command", "/time")) or "/drivers/" in message.topic
        if message.retain and message.topic.startswith("tinyfleet/") and not others:
            topics.add(message.topic)
        elif message.topic == "over":
            over.set()

    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_message = on_message
    client.on_subscribe = lambda *_: client.publish("over", b"")
    if (context := broker.tls_context()) is not None:
        client.tls_set_context(context)
    client.connect(broker.host, broker.port)
    client.loop_start()
    client.subscribe("#", qos=1)
    assert over.wait(5)
    client.disconnect()
    client.loop_stop()
    return topics


def test_a_device_that_vanishes_costs_its_own_reply_only(
    grid: MqttGrid, puppet: Start, events: list[RoundEvent], broker: BrokerAddress
) -> None:
    steady, weak = puppet("steady"), puppet("weak")
    grid.wait_for_nodes(2, 5)
    with asked(grid, message("steady", record(START)), message("weak", record(START)), timeout=60) as result:
        weak.work()
        weak.vanish()
        work = steady.work()
        steady.reply(dense(work, START)[0])
        replies = result.result(5)  # far less than the timeout: the will says that it is gone
    assert sorted(reply.has_error() for reply in replies) == [False, True]
    (error,) = [reply.error.reason for reply in replies if reply.has_error()]
    assert error == "weak: went offline"
    assert [(event.device, event.reason) for event in events if event.kind == "no_reply"] == [("weak", "went offline")]
    assert list(grid.get_node_ids()) == [node_id("steady")]
    grid.close()
    assert retained(broker) == {TOPICS.status("steady"), TOPICS.status("weak")}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ErrorCode.DIVERGED, r"a: diverged \(MOTE_ERR_DIVERGED\): .*lower the rate"),
        (ErrorCode.WRONG_MODEL, r"a: wrong_model \(.*\): it runs another model .*; start it with this model"),
    ],
)
def test_a_device_that_says_it_failed_is_believed(grid: MqttGrid, puppet: Start, error: ErrorCode, said: str) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START))) as result:
        device.reply(Failure(device.work().id, error, -7))
        (reply,) = result.result(5)
    assert reply.has_error() and re.match(said, reply.error.reason)


def test_numbers_that_are_not_finite_never_reach_a_strategy(grid: MqttGrid, puppet: Start) -> None:
    device = puppet("a")
    grid.wait_for_nodes(1, 5)
    with asked(grid, message("a", record(START))) as result:
        poison = START.copy()
        poison[3] = np.nan
        device.reply(dense(device.work(), poison)[0])
        (reply,) = result.result(5)
    assert reply.has_error() and "not finite" in str(reply.error.reason)


def test_silence_ends_with_the_timeout(grid: MqttGrid, puppet: Start, broker: BrokerAddress) -> None:
    puppet("a")
    grid.wait_for_nodes(1, 5)
    (reply,) = grid.send_and_receive([message("a", record(START))], timeout=0.3)
    assert reply.has_error() and reply.error.reason == "a: no reply within 0.3 s"
    assert retained(broker) == {TOPICS.status("a")}


def test_a_broker_that_restarts_costs_no_reply(tmp_path: Path) -> None:
    port = free_port()
    broker = start_mosquitto(tmp_path, port)
    device = Puppet(plain_broker(port), "a")
    with (
        command_services(plain_broker(port), ["test"]),
        MqttGrid(plain_broker(port), "test", PROGRAM, resend_interval=0.2, offline_grace=30) as grid,
    ):
        grid.wait_for_nodes(1, 5)
        with asked(grid, message("a", record(START)), timeout=60) as result:
            work = device.work()
            broker.terminate()
            broker.wait()
            broker = start_mosquitto(tmp_path, port)  # it has forgotten everything
            assert device.work() == work
            assert device.weights(work).tolist() == START.tolist(), "the grid has published them again"
            device.reply_until(result, dense(work, START)[0])
            assert not result.result(15)[0].has_error()
    device.leave()
    broker.terminate()
    broker.wait()


def test_what_a_broken_connection_may_have_lost_is_sent_again_at_once(broker: BrokerAddress, puppet: Start) -> None:
    device = puppet("a")
    with MqttGrid(broker, "test", PROGRAM, resend_interval=600) as grid:
        grid.wait_for_nodes(1, 5)
        with asked(grid, message("a", record(START)), timeout=60) as result:
            work = device.work()
            assert grid._session is not None
            grid._session._client.wire._sock.shutdown(socket.SHUT_RDWR)  # there is no public way to lose it
            assert device.work() == work
            assert device.weights(work).tolist() == START.tolist()
            device.reply_until(result, dense(work, START)[0])
            assert not result.result(15)[0].has_error()
    assert retained(broker) == {TOPICS.status("a")}


def test_only_selected_devices_that_run_the_program_are_nodes(broker: BrokerAddress, puppet: Start) -> None:
    for name in ("a", "b"):
        puppet(name)
    puppet("other").say(Status(True, b"another!"))
    selected = ["a", "other", "unheard-of"]
    with MqttGrid(broker, "test", PROGRAM, select_devices=lambda: selected) as grid:
        assert grid.wait_for_nodes(1, 5) == [node_id("a")]
        selected.append("b")
        assert grid.wait_for_nodes(2, 5) == sorted([node_id("a"), node_id("b")])


def test_a_device_of_another_wire_version_is_named_and_left_out(
    grid: MqttGrid, puppet: Start, caplog: pytest.LogCaptureFixture
) -> None:
    device, other = puppet("older"), puppet("b")
    assert grid.wait_for_nodes(2, 5) == sorted([node_id("older"), node_id("b")])
    version_1 = cbor2.dumps([True, PROGRAM.model_id, 0, 0, 0, None, None])
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        device._client.publish(TOPICS.status("older"), version_1, qos=1, retain=True).wait_for_publish(15)
        other.say(Status(True, PROGRAM.model_id, samples=1))
        deadline = time.monotonic() + 10
        while node_id("older") in grid.wait_for_nodes(1, 5) and time.monotonic() < deadline:
            pass
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert grid.get_node_ids() == [node_id("b")]
    assert "older is left out: the device speaks wire version 1, this server speaks 3" in caplog.text
    assert grid.traffic.malformed == 0


def test_what_no_device_can_be_asked_is_refused_before_anything_is_published(grid: MqttGrid, puppet: Start) -> None:
    puppet("a")
    grid.wait_for_nodes(1, 5)
    good = message("a", record(START))
    for bad in (
        message("a", ArrayRecord([START])),
        message("nobody", record(START)),
        message("a", record(START), {"phase-steps": [1, 2, 3, 4, 5]}),
        message("a", record(START), {"density": 0.0}),
        message("a", record(START), {"lr": 1e39}),
        Message(RecordDict({"arrays": record(START)}), node_id("a"), MessageType.TRAIN),
    ):
        with pytest.raises(ValueError):
            grid.push_messages([good, bad])
    assert grid.traffic.bytes_down == 0


def test_a_broker_that_is_not_there_is_one_clear_error() -> None:
    port = free_port()
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port}"):
        MqttGrid(plain_broker(port), "test", PROGRAM)
