"""The Flower ClientApp: a device on Flower's own transport, on a Raspberry Pi with a SuperNode or in a simulation.

It runs the C node and passes it each message in memory, so the results are the same, to the bit, as over MQTT. The
node config says which part of the data the device holds: partition-id, of num-partitions.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from tinyfleet.edge import tasks
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.tasks import Task
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import Kind, Sha256, TrainTask, encode_action, encode_command
from tinyfleet.edge.wire.flower_records import arrays_to_vector, single_records, to_metrics, vector_to_arrays
from tinyfleet.edge.wire.messages import Failure, Success, decode_reply, error_text
from tinyfleet.edge.wire.round_config import parse_round_config
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.edge.wire.updates import apply_update

Vector = NDArray[np.float32]

NOW = 1
"""The time here, which stands still: Flower's transport says whom to obey, and for how long."""

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train as the message's config says, and reply with parameters and metrics."""
    return _serve(message, context, "train")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate as the message's config says, and reply with metrics."""
    return _serve(message, context, "evaluate")


def _serve(message: Message, context: Context, kind: Kind) -> Message:
    index, fleet_size = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return serve(message, kind, _task(str(context.run_config["task"])), index, fleet_size)


def serve(message: Message, kind: Kind, task: Task, index: int, fleet_size: int) -> Message:
    """The reply of one device to a message.

    Parameters
    ----------
    message
        With one ArrayRecord and one ConfigRecord.
    kind
        "train" or "evaluate".
    task
        What the fleet learns.
    index, fleet_size
        The device's client index, and the number of devices; they decide which samples it holds.

    Returns
    -------
    Message
        Metrics and, after training, parameters.

    Raises
    ------
    RuntimeError
        If the node fails. Flower then sends the server an error.
    """
    arrays, config = single_records(message)
    parameters = arrays_to_vector(arrays, task.program)
    asked = parse_round_config(config, kind, index)
    train_task = TrainTask(1, kind, 1, 1, task.program.model_id, asked.seed, asked.phases, asked.query, asked.update)
    node = Node(
        "flower",
        "node",
        {},
        task.program,
        DatasetStream(task.client(index, fleet_size)),
        arena_bytes=task.program.arena_bytes,
        model_slot_bytes=0,
        clock=lambda: NOW,
    )
    parts = _run(node, train_task, parameters)
    metrics = parts[0].metrics
    assert metrics is not None  # the node's first part has them
    content = RecordDict()
    size = 0
    if kind == "train":
        content["arrays"] = reply = vector_to_arrays(apply_update(parameters, parts), task.program, arrays)
        size = sum(len(array.data) for array in reply.values())  # Flower's own transport is always dense
    content["metrics"] = to_metrics(metrics, kind, size, task.program)
    return Message(content, reply_to=message)


_task = lru_cache(tasks.load)  # a process serves many messages


def _run(node: Node, train_task: TrainTask, parameters: Vector) -> list[Success]:
    """Pass one command and the round's parameters to the node, and return the parts of its reply."""
    topics, data = Topics("flower"), parameters.astype("<f4").tobytes()
    action = encode_action(replace(train_task, weights=Sha256.of(data)))
    node.receive(topics.command(node.id), encode_command(NOW + 1, NOW + 1, None, action))
    list(node.poll())
    for n, chunk in enumerate(chunks(data)):
        node.receive(topics.weights(train_task.run, train_task.round, n), chunk)
    while node.step():
        pass
    replies = [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == topics.reply(node.id)]
    parts = []
    for reply in map(decode_reply, replies):
        if isinstance(reply, Failure):
            raise RuntimeError(f"the node failed: {error_text(reply)}")
        parts.append(reply)
    return parts
