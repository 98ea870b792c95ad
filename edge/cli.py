"""The commands `tinyfleet agent` and `tinyfleet task`."""

from __future__ import annotations

import ast
import json
import re
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

KEEP_EVERY = 10
"""Train tasks after which an agent keeps its weights."""

agent_app = CommandGroup("""Run this machine as a device that learns.

Examples:
  tinyfleet agent start
""")
task_app = CommandGroup("""Show what a fleet can learn.

Examples:
  tinyfleet task list
""")


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

    A Raspberry Pi, for example. The device ID is the one of its identity, else the host's name. With --online it also
    learns from the task's recording of a held-out device, and detects drift. A --tflite model stays the one it runs.
    What survives a restart (the model that was confirmed, weights, keys, counters) is in the data folder.

    Examples:
      tinyfleet agent start
      tinyfleet agent start --online 0.1
      tinyfleet agent start --enrol TOKEN
      tinyfleet agent start --broker mqtts://pi@10.0.0.5 --password-file secret
      tinyfleet agent start --tflite model.tflite --client-index 3
    """
    from tinyfleet.edge import tasks
    from tinyfleet.edge.device.agent import AgentNode, OnlineLearning
    from tinyfleet.edge.device.device import Device, groups_of
    from tinyfleet.edge.device.drift import PacedStream, default_drift_response
    from tinyfleet.edge.device.node import Node
    from tinyfleet.edge.device.sources import DatasetStream, RecordedStream
    from tinyfleet.edge.device.store import FileStore
    from tinyfleet.edge.device.thing_description import host_board, thing_description
    from tinyfleet.edge.model.learner import LiteRTLearner
    from tinyfleet.edge.versions import ENGINE_VERSION
    from tinyfleet.edge.wire.errors import ProtocolError
    from tinyfleet.edge.wire.topics import Topics

    learning_task = tasks.load(task)
    if client_index >= fleet_size:
        raise UserError(f"there is no client {client_index} in a fleet of {fleet_size}; raise --fleet-size")
    id = device_id or _own_name(connection, data)
    connection.join(data, [id])
    fleet_name = fleet_of(fleet, data)
    stream = DatasetStream(learning_task.client(client_index, fleet_size))
    recording = None
    if online:
        recorded = learning_task.stream(client_index)
        recorded.check_compatible(learning_task.program)
        recording = RecordedStream(recorded)
    board = host_board()
    engine, version = ("mote", ENGINE_VERSION) if tflite is None else ("tflite", "builtin")
    arena = board.ram_bytes // 4  # the RAM it may learn in; more than any program asks for
    slot = 0 if tflite else 1 << 20
    td = thing_description(fleet_name, id, board, engine, version, arena, learning_task.program.model_id, slot)

    learner = None if tflite is None else lambda _: LiteRTLearner(tflite)

    def node() -> Node:
        where = (fleet_name, id, td, learning_task.program, stream)
        options: dict[str, Any] = {"learner": learner, "arena_bytes": arena, "model_slot_bytes": slot}
        options |= {"keys": address.keys, "groups": groups_of(board), "store": store, "keep_every": KEEP_EVERY}
        if recording is None:
            return Node(*where, **options)
        paced, response = PacedStream(recording, online), default_drift_response(learning_task)
        own = OnlineLearning(paced, learning_task.fedavg.rate, response)
        return AgentNode(*where, online=own, **options)

    try:
        address = connection.find_for_devices([id], data, fleet_name)[0]
        Topics(fleet_name).command(id)  # checks the names
        with FileStore(data / "devices" / f"{fleet_name}.{id}.store") as store:
            run_devices([Device(node, address, fleet_name)], as_json)
    except ProtocolError as error:
        raise UserError(str(error)) from error


def _own_name(connection: Connection, data: Path) -> str:
    """This machine's name in the fleet: the one that it is enrolled with, else its host name."""
    from tinyfleet.edge.wire.enrolment_token import EnrolmentToken
    from tinyfleet.edge.wire.identity import stored_identities

    if connection.enrolment is not None and (name := EnrolmentToken.parse(connection.enrolment).name) is not None:
        return name
    stored = stored_identities(data, "device")
    if len(stored) == 1 and connection.broker is None:
        return stored[0].name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:32] or "agent"


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


def run_devices(devices: list[Device], as_json: bool) -> None:
    """Runs the devices until SIGINT or SIGTERM; returns when all have said goodbye. Exit code 1 if one died."""

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
        skipped = sum(device.node.skipped for device in devices)
        learned = sum(device.node.counters.samples for device in devices)
        typer.echo(f"stopped; learned from {learned} samples" + f", skipped {skipped} damaged ones" * bool(skipped))
    if any(device.error is not None for device in devices):
        raise typer.Exit(1)
