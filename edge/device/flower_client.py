"""The Flower ClientApp: a device on Flower's own transport, be it a Raspberry Pi with a SuperNode or simulated.

It is the C node itself, with the message carried to it in memory: what is asked and answered is the same, to the bit,
as over MQTT. The node config says which part of the data it holds: partition-id, of num-partitions.

Also how Flower's records and the wire's messages map to each other, for both transports. The only file in edge that
imports Flower.
"""

import io
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SType
from numpy.typing import NDArray
from tinyfleet.edge import tasks
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import Task
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.messages import (
    Dense,
    Failure,
    Kind,
    Metrics,
    Sparse,
    Success,
    TrainTask,
    decode_reply,
    encode,
    error_text,
)
from tinyfleet.edge.wire.round_config import parse_round_config
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.edge.wire.updates import apply_update

Vector = NDArray[np.float32]
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

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
    node = Node(
        "flower",
        "node",
        {},
        task.program,
        DatasetStream(task.client(index, fleet_size)),
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


def _run(node: Node, train_task: TrainTask, start: Vector) -> list[Success]:
    """Carries one piece of work to the node, and its reply back."""
    topics = Topics("flower")
    node.receive(topics.command(node.id), encode(train_task))
    list(node.poll())
    for n, chunk in enumerate(chunks(start.astype("<f4").tobytes())):
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


# Records


def single_records(message: Message) -> tuple[ArrayRecord, ConfigRecord]:
    """The message's one ArrayRecord and one ConfigRecord. ValueError if it has not just these."""
    arrays, configs = records_of_type(message.content, ArrayRecord), records_of_type(message.content, ConfigRecord)
    if len(arrays) != 1 or len(configs) != 1:
        raise ValueError("a message to a device carries one ArrayRecord and one ConfigRecord")
    return arrays[0], configs[0]


def records_of_type(content: RecordDict, kind: type[Record]) -> list[Record]:
    """The records of one kind. RecordDict's own properties copy them into a dictionary, key by checked key."""
    return [record for record in content.values() if isinstance(record, kind)]


def arrays_to_vector(record: ArrayRecord, program: Program) -> Vector:
    """The parameters as one vector; arrays that do not have the program's names are taken in their order. ValueError
    if their shapes are not the program's."""
    by_key = dict(record.items())  # a record checks, and casts, each time that it is asked for a key
    arrays = [by_key[key] for key in _keys(record, program)]
    shapes, expected = [tuple(array.shape) for array in arrays], [shape for _, shape in program.parameters]
    if shapes != expected:
        raise ValueError(f"the arrays' shapes {shapes} are not the program's {expected}")
    return np.concatenate([to_numpy(array).astype(np.float32, copy=False).ravel() for array in arrays])


def vector_to_arrays(vector: Vector, program: Program, like: ArrayRecord | None = None) -> ArrayRecord:
    """The vector as arrays, under the names and in the order of `like`; by default, of the program."""
    arrays = program.split(vector)
    by_key = arrays if like is None else dict(zip(_keys(like, program), arrays.values(), strict=True))
    record = ArrayRecord()  # which, given a dictionary, would copy each array
    for key in like or by_key:
        record[key] = from_numpy(by_key[key])
    return record


def to_numpy(array: Array) -> NDArray[Any]:
    """The array's numbers, read-only. As Array.numpy gives them, which parses the npy format's header as Python: of a
    small model it takes more time than all else on the server."""
    header = _npy_header(array.dtype, tuple(array.shape))
    if array.stype != SType.NUMPY or not array.data.startswith(header):
        return array.numpy()
    return np.frombuffer(array.data, array.dtype, offset=len(header)).reshape(array.shape)


def from_numpy(numbers: NDArray[Any]) -> Array:
    """As Array(numbers), without its cost."""
    name, shape = _name(numbers.dtype), numbers.shape
    return Array(name, shape, SType.NUMPY, _npy_header(name, shape) + numbers.tobytes())


_name = cache(str)  # of a dtype: NumPy puts it together anew each time


@cache
def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What np.save writes before the numbers of a C-contiguous array."""
    file, numbers = io.BytesIO(), np.zeros(shape, dtype)
    np.save(file, numbers)
    return file.getvalue()[: -numbers.nbytes or None]


def _keys(record: ArrayRecord, program: Program) -> list[str]:
    names = [name for name, _ in program.parameters]
    return names if set(names) == set(record) else list(record)


def to_metrics(metrics: Metrics, kind: Kind, bytes_up: int, program: Program) -> MetricRecord:
    """A reply's metrics. Unknown is absent: no loss without a sample, no accuracy without a class to be asked."""
    record = MetricRecord(
        {
            "num-examples": metrics.samples if kind == "train" else metrics.queried,
            "bytes-up": bytes_up,
            "bytes-dense": 4 * program.n_params,
            "arena-bytes": metrics.arena_bytes,
        }
    )
    if metrics.samples:
        record["loss"] = metrics.loss
    if metrics.queried:
        if program.loss == "softmax_cross_entropy":
            record["accuracy"] = metrics.correct / metrics.queried
        record["query-loss"] = metrics.query_loss
    return record
