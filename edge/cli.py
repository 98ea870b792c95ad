"""The commands of a device: `tinyfleet agent` and `tinyfleet device`."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path
from typing import Annotated

import typer
from tinyfleet.edge import tasks
from tinyfleet.edge.device.agent import AgentNode, OnlineLearning
from tinyfleet.edge.device.device import Device, virtual_device
from tinyfleet.edge.device.drift import PacedStream, default_drift_response
from tinyfleet.edge.device.node import Node
from tinyfleet.edge.device.sources import DatasetStream, RecordedStream
from tinyfleet.edge.device.thing_description import host_board, thing_description
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.learner import LiteRTLearner
from tinyfleet.edge.versions import ENGINE_VERSION
from tinyfleet.edge.wire.errors import ProtocolError

BrokerOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="The MQTT broker. Default: the running server's, else 127.0.0.1:1883."),
]
FleetOption = Annotated[str, typer.Option(help="The fleet to join.")]
TaskOption = Annotated[
    str, typer.Option(help=f"What to learn: {', '.join(tasks.NAMES)}, or the path of a file that has a task.")
]
DataOption = Annotated[Path, typer.Option(help="The folder of a server on this machine, to find its broker.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object for each device that is up.")]


def broker_address(broker: str | None, data: Path) -> tuple[str, int]:
    """(host, port) of --broker, of the server whose folder `data` is, or the default. Raises UserError."""
    if broker is None:
        running = data / "server.json"
        broker = "127.0.0.1:1883"
        if running.exists():
            try:
                broker = str(json.loads(running.read_text())["broker"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{running} is damaged; name the broker with --broker HOST:PORT") from error
    host, _, port = broker.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"'{broker}' is no broker's address; write HOST:PORT, such as 127.0.0.1:1883")
    return host.strip("[]"), int(port)


def device(
    count: Annotated[int, typer.Option(min=1, help="How many, in this process.")] = 1,
    first: Annotated[int, typer.Option(min=0, help="The number of the first: it decides which samples it holds.")] = 0,
    fleet_size: Annotated[int | None, typer.Option(min=1, help="The fleet's size. Default: --first + --count.")] = None,
    prefix: Annotated[str, typer.Option(help="Devices are called PREFIX-0, PREFIX-1, ...")] = "device",
    task: TaskOption = "digits",
    broker: BrokerOption = None,
    fleet: FleetOption = "home",
    data: DataOption = Path(".tinyfleet"),
    as_json: JsonOption = False,
) -> None:
    """Run virtual microcontrollers: the firmware's C node and engine, natively, until interrupted.

    Each has its own samples, thread and MQTT session.

    \b
    Examples:
      tinyfleet device
      tinyfleet device --count 12 --task omniglot
      tinyfleet device --broker 192.168.1.5:1883 --first 12 --count 4 --fleet-size 16
    """
    learning_task = tasks.load(task)
    host, port = broker_address(broker, data)
    size = first + count if fleet_size is None else fleet_size
    if first + count > size:
        raise UserError(f"devices {first} to {first + count - 1} are not in a fleet of {size}; raise --fleet-size")
    devices = []
    try:
        for i in range(first, first + count):
            samples = learning_task.client(i, size)
            devices.append(virtual_device(host, port, fleet, f"{prefix}-{i}", learning_task.program, samples))
    except ProtocolError as error:
        raise UserError(str(error)) from error
    run(devices, as_json)


def agent(
    id: Annotated[str | None, typer.Option(help="The device's name in the fleet. Default: the host's.")] = None,
    client: Annotated[int, typer.Option(min=0, help="Its number in the fleet: it decides which samples it holds.")] = 0,
    fleet_size: Annotated[int, typer.Option(min=1, help="The fleet's size.")] = 16,
    tflite: Annotated[
        Path | None,
        typer.Option(help="Learn with this .tflite model in TFLite's interpreter, instead of the C engine."),
    ] = None,
    online: Annotated[
        float,
        typer.Option(
            min=0,
            help="Learn for itself, too, from the task's recording of a held-out device: a sample every so many "
            "seconds. 0: only when asked.",
        ),
    ] = 0.0,
    task: TaskOption = "digits",
    broker: BrokerOption = None,
    fleet: FleetOption = "home",
    data: DataOption = Path(".tinyfleet"),
    as_json: JsonOption = False,
) -> None:
    """Run this machine as a device that learns, a Raspberry Pi say, until interrupted.

    \b
    Examples:
      tinyfleet agent
      tinyfleet agent --online 0.1
      tinyfleet agent --id kitchen --broker 192.168.1.5:1883
      tinyfleet agent --tflite model.tflite --client 3
    """
    learning_task = tasks.load(task)
    host, port = broker_address(broker, data)
    if client >= fleet_size:
        raise UserError(f"there is no client {client} in a fleet of {fleet_size}; raise --fleet-size")
    id = id or re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:32] or "agent"
    stream = DatasetStream(learning_task.client(client, fleet_size))
    recording = RecordedStream(learning_task.stream(client)) if online else None
    board = host_board()
    engine, version = ("mote", ENGINE_VERSION) if tflite is None else ("tflite", "builtin")
    arena = board.ram_bytes // 4  # what it may learn in; more than any program asks for
    room = 0 if tflite else 1 << 20
    td = thing_description(fleet, id, board, engine, version, arena, learning_task.program.model_id, room)

    learner = None if tflite is None else lambda _: LiteRTLearner(tflite)

    def node() -> Node:
        where = (fleet, id, td, learning_task.program, stream)
        if recording is None:
            return Node(*where, learner=learner, arena_bytes=arena, model_slot_bytes=room)
        paced, response = PacedStream(recording, online), default_drift_response(learning_task)
        own = OnlineLearning(paced, learning_task.fedavg.rate, response)
        return AgentNode(*where, learner=learner, arena_bytes=arena, model_slot_bytes=room, online=own)

    try:
        one = Device(node, host, port, fleet)
    except ProtocolError as error:
        raise UserError(str(error)) from error
    run([one], as_json)


def run(devices: list[Device], as_json: bool) -> None:
    """Runs them until SIGINT or SIGTERM; all say goodbye before this returns."""

    def stop(_signal: int, _frame: object) -> None:
        for one in devices:
            one.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for one in devices:
        one.start()
        up = {"device": one.node.id, "model": one.node.model.hex()}
        typer.echo(json.dumps(up) if as_json else f"{one.node.id} is up (model {one.node.model.hex()})")
    for one in devices:
        while not one.join(0.5):
            pass
    if not as_json:
        typer.echo(f"stopped; {sum(one.node.counters.samples for one in devices)} samples learned from")
