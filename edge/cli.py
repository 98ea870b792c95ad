"""The commands `tinyfleet agent`, `tinyfleet device` and `tinyfleet task`."""

from __future__ import annotations

import ast
import json
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import (
    CONNECTION,
    DATA,
    DEVICE_ID,
    FLEET_SIZE,
    ClientIndexOption,
    CommandGroup,
    Connection,
    DataOption,
    DevicesOption,
    FleetOption,
    JsonOption,
    TaskOption,
    with_connection,
)
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import fleet_of

if TYPE_CHECKING:
    from tinyfleet.edge.device.device import Device
    from tinyfleet.edge.device.node import Node

agent_app = CommandGroup("""Run this machine as a device that learns.

Examples:
  tinyfleet agent start
""")
device_app = CommandGroup("""Run virtual devices.

Examples:
  tinyfleet device simulate --devices 4 --task digits
""")
task_app = CommandGroup("""Show what a fleet can learn.

Examples:
  tinyfleet task list
""")


@device_app.command()
@with_connection
def simulate(
    devices: DevicesOption = 1,
    first_index: Annotated[
        int, typer.Option("--first-index", metavar="N", min=0, help="Client index of the first device.")
    ] = 0,
    fleet_size: Annotated[int | None, FLEET_SIZE] = None,
    prefix: Annotated[
        str, typer.Option("--prefix", metavar="NAME", help="Devices are called NAME-0, NAME-1, ...")
    ] = "device",
    task: TaskOption = "digits",
    connection: Connection = CONNECTION,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Run virtual microcontrollers until interrupted.

    They run the firmware's C code natively. Each has its own samples, thread and MQTT session. Without --fleet-size,
    the fleet ends with the last of them.

    Examples:
      tinyfleet device simulate
      tinyfleet device simulate --devices 12 --task omniglot
      tinyfleet device simulate --first-index 12 --devices 4 --fleet-size 16
    """
    from tinyfleet.edge import tasks
    from tinyfleet.edge.device.device import virtual_device
    from tinyfleet.edge.wire.errors import ProtocolError

    learning_task = tasks.load(task)
    broker = connection.find(data)
    indices = range(first_index, first_index + devices)
    size = fleet_size or indices.stop
    if indices.stop > size:
        raise UserError(f"devices {first_index} to {indices.stop - 1} are not in a fleet of {size}; raise --fleet-size")
    name = fleet_of(fleet, data)
    started = []
    try:
        for i in indices:
            samples = learning_task.client(i, size)
            started.append(virtual_device(broker, name, f"{prefix}-{i}", learning_task.program, samples))
    except ProtocolError as error:
        raise UserError(str(error)) from error
    _run(started, as_json)


@agent_app.command()
@with_connection
def start(
    device_id: Annotated[str | None, DEVICE_ID] = None,
    client_index: ClientIndexOption = 0,
    fleet_size: Annotated[int, FLEET_SIZE] = 16,
    tflite: Annotated[
        Path | None,
        typer.Option(
            "--tflite", metavar="FILE.tflite", help="Learn with this model in TFLite's interpreter, not the C engine."
        ),
    ] = None,
    online: Annotated[
        float,
        typer.Option(
            "--online", metavar="SECONDS", min=0, help="Also learn online, one sample every SECONDS; 0 turns it off."
        ),
    ] = 0.0,
    task: TaskOption = "digits",
    connection: Connection = CONNECTION,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Run this machine as a device that learns, until interrupted.

    A Raspberry Pi, for example. The device ID is the host's name unless you give another. With --online it also learns
    from the task's recording of a held-out device, and detects drift. A --tflite model stays the one it runs.

    Examples:
      tinyfleet agent start
      tinyfleet agent start --online 0.1
      tinyfleet agent start --device-id kitchen --broker mqtts://192.168.1.5
      tinyfleet agent start --tflite model.tflite --client-index 3
    """
    from tinyfleet.edge import tasks
    from tinyfleet.edge.device.agent import AgentNode, OnlineLearning
    from tinyfleet.edge.device.device import Device
    from tinyfleet.edge.device.drift import PacedStream, default_drift_response
    from tinyfleet.edge.device.node import Node
    from tinyfleet.edge.device.sources import DatasetStream, RecordedStream
    from tinyfleet.edge.device.thing_description import host_board, thing_description
    from tinyfleet.edge.model.learner import LiteRTLearner
    from tinyfleet.edge.versions import ENGINE_VERSION
    from tinyfleet.edge.wire.errors import ProtocolError

    learning_task = tasks.load(task)
    broker = connection.find(data)
    fleet_name = fleet_of(fleet, data)
    if client_index >= fleet_size:
        raise UserError(f"there is no client {client_index} in a fleet of {fleet_size}; raise --fleet-size")
    id = device_id or re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:32] or "agent"
    stream = DatasetStream(learning_task.client(client_index, fleet_size))
    recording = RecordedStream(learning_task.stream(client_index)) if online else None
    board = host_board()
    engine, version = ("mote", ENGINE_VERSION) if tflite is None else ("tflite", "builtin")
    arena = board.ram_bytes // 4  # the RAM it may learn in; more than any program asks for
    slot = 0 if tflite else 1 << 20
    td = thing_description(fleet_name, id, board, engine, version, arena, learning_task.program.model_id, slot)

    learner = None if tflite is None else lambda _: LiteRTLearner(tflite)

    def node() -> Node:
        where = (fleet_name, id, td, learning_task.program, stream)
        if recording is None:
            return Node(*where, learner=learner, arena_bytes=arena, model_slot_bytes=slot)
        paced, response = PacedStream(recording, online), default_drift_response(learning_task)
        own = OnlineLearning(paced, learning_task.fedavg.rate, response)
        return AgentNode(*where, learner=learner, arena_bytes=arena, model_slot_bytes=slot, online=own)

    try:
        device = Device(node, broker, fleet_name)
    except ProtocolError as error:
        raise UserError(str(error)) from error
    _run([device], as_json)


@task_app.command("list")
def list_tasks(as_json: JsonOption = False) -> None:
    """List the learning tasks.

    Examples:
      tinyfleet task list
      tinyfleet device simulate --task omniglot
    """
    summaries = _task_summaries()
    if as_json:
        typer.echo(json.dumps(summaries, indent=2))
        return
    width = max(map(len, summaries))
    for name, summary in summaries.items():
        typer.echo(f"{name:{width}}  {summary}")


def _task_summaries() -> dict[str, str]:
    """Each task and the first sentence of its file, which is not imported: its data's packages may be missing."""
    files = sorted((Path(__file__).parent / "tasks").glob("[!_]*.py"))
    documents = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return {name: " ".join(text.split("\n\n")[0].split()) for name, text in documents.items()}


def _run(devices: list[Device], as_json: bool) -> None:
    """Runs the devices until SIGINT or SIGTERM; returns when all have said goodbye."""

    def stop(_signal: int, _frame: object) -> None:
        for device in devices:
            device.stop()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for device in devices:
        device.start()
        up = {"device": device.node.id, "model": device.node.model.hex()}
        typer.echo(json.dumps(up) if as_json else f"{device.node.id} is up (model {device.node.model.hex()})")
    for device in devices:
        while not device.join(0.5):
            pass
    if not as_json:
        typer.echo(f"stopped; learned from {sum(device.node.counters.samples for device in devices)} samples")
