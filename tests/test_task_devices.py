"""Every task on devices: virtual microcontroller, learner in Python and emulated board learn the same from the same."""

import socket
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord
from plain_commands import plain

from tinyfleet.edge import datasets, tasks
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.tasks import Task, keywords
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Sha256, TrainTask, UpdateFormat
from tinyfleet.edge.wire.flower_records import to_metrics, vector_to_arrays
from tinyfleet.edge.wire.messages import Success, decode_reply
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate
from tinyfleet.firmware_tools.firmware.size import read_size
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.named_strategies import make_strategy

FLEET, ID = "test", "device-1"
TOPICS = Topics(FLEET)
LIMIT = 60.0


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(datasets.local(name) is None, reason=f"{name} is not in TINYFLEET_DATA")


ALL = [
    "sine",
    "digits",
    pytest.param("omniglot", marks=needs("omniglot")),
    pytest.param("keywords", marks=needs(keywords.FOLDER)),
    pytest.param("presence", marks=needs("occupancy")),
]
_load = cache(tasks.load)


def order(task: Task) -> TrainTask:
    phases = (Phase(ALL_LAYERS, 60, task.meta.rate),)
    weights = Sha256.of(task.program.initial(1).astype("<f4").tobytes())
    return TrainTask(
        1, "train", 1, 1, task.program.model_id, 5, phases, 12, UpdateFormat(ALL_LAYERS, False, 0.5), weights
    )


def replies(node: Node, task: Task) -> list[bytes]:
    """What a node says to one order, of a fresh start."""
    work, said = order(task), []
    node.connected()
    list(node.poll())
    node.receive(TOPICS.command(ID), plain(work))
    for i, chunk in enumerate(chunks(task.program.initial(1).astype("<f4").tobytes())):
        list(node.poll())
        node.receive(TOPICS.weights(1, 1, i), chunk)
    busy = True
    while busy:
        busy = node.step()
        said += [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == TOPICS.reply(ID)]
    return said


def virtual(task: Task, **options: Any) -> Node:
    arena = task.program.arena_bytes
    return Node(FLEET, ID, {}, task.program, DatasetStream(task.client(2, 12)), arena_bytes=arena, **options)


@pytest.mark.parametrize("name", ALL)
def test_a_learner_in_python_learns_what_the_virtual_microcontroller_learns(name: str) -> None:
    task = _load(name)
    said = replies(virtual(task), task)
    assert said == replies(virtual(task, learner=MoteLearner), task)
    first = decode_reply(said[0])
    assert isinstance(first, Success) and first.metrics is not None
    assert first.metrics.samples == 60 and first.metrics.queried == 12
    record = to_metrics(first.metrics, "train", 0, task.program)
    assert ("accuracy" in record) == (name != "sine"), "a regression has no accuracy"
    assert record["query-loss"] > 0  # type: ignore[operator]


@pytest.mark.parametrize("name", ["sine", pytest.param("presence", marks=needs("occupancy"))])
def test_a_fleet_learns_it_over_a_broker(name: str, broker: BrokerAddress) -> None:
    """FedAvg on virtual devices lowers the loss that they report; of a regression they report no accuracy."""
    task = _load(name)
    devices = [virtual_device(broker, FLEET, f"device-{i}", task.program, task.client(i, 3)) for i in range(3)]
    for device in devices:
        device.start()
    how = make_strategy("fedavg", task, rounds=6, clients=3)
    try:
        with MqttGrid(broker, FLEET, task.program) as grid:
            assert len(grid.wait_for_nodes(3, LIMIT)) == 3
            start = vector_to_arrays(task.program.initial(1), task.program)
            config = ConfigRecord({**how.train_config, "seed": 1})  # the same samples in every round
            result = how.strategy.start(grid, start, 6, LIMIT, train_config=config)
    finally:
        for device in devices:
            device.stop()
        assert all(device.join(LIMIT) for device in devices)
    rounds = [result.train_metrics_clientapp[number] for number in range(1, 7)]
    assert rounds[-1]["loss"] < rounds[0]["loss"]  # type: ignore[operator]
    assert all(("accuracy" in metrics) == (name == "presence") for metrics in rounds)


@pytest.mark.skipif(not build.available() or not emulate.available(), reason="needs gcc-arm-none-eabi and QEMU")
@pytest.mark.parametrize("name", ["sine", pytest.param("presence", marks=needs("occupancy"))])
def test_an_emulated_board_learns_what_the_virtual_microcontroller_learns(name: str, tmp_path: Path) -> None:
    """Over its serial line: numbers for features and targets (sine), numbers and fixed labels (presence)."""
    task = _load(name)
    elf = build.build("mps2-an386", task.program, task.client(2, 12), FLEET, ID, tmp_path)
    assert read_size(elf).held["features"] == task.client(2, 12).features.nbytes
    expected = replies(virtual(task, out_bytes=1024 + 128), task)
    with emulate.Emulator(catalogue.load_board("mps2-an386"), elf) as emulator:
        assert over_the_line(emulator.url, task, len(expected)) == expected


def over_the_line(url: str, task: Task, count: int) -> list[bytes]:
    """What a board says to the same order, in so many messages: the part of gateway and broker is played here."""
    host, port = url.removeprefix("socket://").split(":")
    weights = list(chunks(task.program.initial(1).astype("<f4").tobytes()))
    reader, said = serial_frames.FrameReader(), []
    with socket.create_connection((host, int(port)), timeout=LIMIT) as line:

        def send(*sent: serial_frames.Frame) -> None:
            line.sendall(b"".join(map(serial_frames.encode, sent)))

        send(
            serial_frames.Frame(serial_frames.CONNECTED),
            serial_frames.Frame(serial_frames.MESSAGE, TOPICS.command(ID), plain(order(task), nonce=bytes(8))),
        )
        while len(said) < count:
            received = line.recv(4096)
            assert received, "the board has hung up"
            for frame in reader.feed(received):
                if frame.kind == serial_frames.SUBSCRIBE and frame.topic == TOPICS.weights(1, 1):
                    send(
                        *(
                            serial_frames.Frame(serial_frames.MESSAGE, TOPICS.weights(1, 1, i), w)
                            for i, w in enumerate(weights)
                        )
                    )
                elif frame.kind == serial_frames.PUBLISH and frame.topic == TOPICS.reply(ID):
                    said.append(frame.payload)
    return said
