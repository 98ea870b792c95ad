"""The Flower ClientApp: a device on Flower's own transport, be it a Raspberry Pi with a SuperNode or simulated.

It is the C node itself, with the message carried to it in memory: what is asked and answered is the same, to the bit,
as over MQTT. The node config says which part of the data it holds: partition-id, of num-partitions.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from tinyfleet.edge import tasks
from tinyfleet.edge.device.node import MoteNode, Publish
from tinyfleet.edge.tasks import Task
from tinyfleet.edge.wire.flower_records import arrays_to_vector, single_records, to_metrics, vector_to_arrays
from tinyfleet.edge.wire.protocol import (
    Dense,
    Failure,
    Kind,
    Sparse,
    Success,
    Topics,
    TrainTask,
    chunks,
    decode_reply,
    encode,
    error_text,
    parse_round_config,
)

Vector = NDArray[np.float32]

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Learns what the message's config asks for, and replies with the parameters and metrics."""
    return _serve(message, context, "train")


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The same, and replies with metrics alone."""
    return _serve(message, context, "evaluate")


def _serve(message: Message, context: Context, kind: Kind) -> Message:
    index, fleet_size = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    return serve(message, kind, _task(str(context.run_config["task"])), index, fleet_size)


def serve(message: Message, kind: Kind, task: Task, index: int, fleet_size: int) -> Message:
    """What device number `index` of a fleet of `of` replies. Raises RuntimeError if the node fails; Flower sends the
    server an error then."""
    arrays, config = single_records(message)
    start = arrays_to_vector(arrays, task.program)
    plan = parse_round_config(config, kind, index)
    train_task = TrainTask(1, kind, 1, 1, task.program.model_id, plan.seed, plan.phases, plan.query, plan.update)
    node = MoteNode(
        "flower",
        "node",
        {},
        task.program,
        task.client(index, fleet_size),
        arena_bytes=task.program.arena_bytes,
        model_slot_bytes=0,
    )
    parts = _run(node, train_task, start)
    metrics = parts[0].metrics
    assert metrics is not None  # the node's first part has them
    content = RecordDict()
    size = 0
    if kind == "train":
        content["arrays"] = reply = vector_to_arrays(apply_update(start, parts), task.program, arrays)
        size = sum(len(array.data) for array in reply.values())  # Flower's own transport is always dense
    content["metrics"] = to_metrics(metrics, kind, size, task.program)
    return Message(content, reply_to=message)


_task = lru_cache(tasks.load)  # a process serves many messages


def _run(node: MoteNode, train_task: TrainTask, start: Vector) -> list[Success]:
    """Carries one piece of work to the node, and its reply back."""
    topics = Topics("flower")
    node.receive(topics.do(node.id), encode(train_task))
    list(node.poll())
    for n, chunk in enumerate(chunks(start.astype("<f4").tobytes())):
        node.receive(topics.weights(train_task.run, train_task.round, n), chunk)
    while node.step():
        pass
    replies = [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == topics.did(node.id)]
    parts = []
    for did in map(decode_reply, replies):
        if isinstance(did, Failure):
            raise RuntimeError(f"the node failed: {error_text(did)}")
        parts.append(did)
    return parts


def apply_update(start: Vector, parts: Iterable[Success]) -> Vector:
    """What a reply's parts make of the vector that was sent; what they do not mention stays as it was."""
    vector = start.copy()
    for part in parts:
        match part.update:
            case Dense(offset=offset, values=values, change=change):
                part_of = slice(offset, offset + len(values))
                vector[part_of] = start[part_of] + values if change else values
            case Sparse(indices=indices, changes=changes):
                vector[indices] = start[indices] + changes
    return vector
