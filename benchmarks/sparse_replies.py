"""Server time for each reply that a round aggregates: sparse replies, and the same ones made dense.

python benchmarks/sparse_replies.py [--density 0.1] [--clients 20] [--repeat 9]

The time runs from the bytes of the replies to the new global parameters of Reptile: decode, check, put together,
aggregate. The dense column decodes the same bytes and applies them to a copy of the parameters, as Flower's own
strategies need it. Both give the same bits, which the program checks. No broker and no devices take part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.wire.commands import TrainTask, UpdateFormat
from tinyfleet.edge.wire.flower_records import to_metrics, vector_to_arrays
from tinyfleet.edge.wire.messages import Metrics, Sparse, Success, decode_reply, encode
from tinyfleet.edge.wire.updates import apply_update
from tinyfleet.server.flower.broadcast import SentParameters
from tinyfleet.server.flower.grid import RunGrid
from tinyfleet.server.flower.internals import log_level, new_run
from tinyfleet.server.flower.replies import ReplyParts, reply_content
from tinyfleet.server.flower.strategies import Reptile

Received = Callable[[bytes, SentParameters, Program, TrainTask], RecordDict]


class Nodes(RunGrid):
    """A grid that has nodes and carries nothing."""

    def __init__(self, nodes: Sequence[int]) -> None:
        super().__init__(new_run(1))
        self._nodes = nodes

    def get_node_ids(self) -> Sequence[int]:
        return self._nodes

    def push_messages(self, messages: object) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: object) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: object, *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


def received_sparse(payload: bytes, sent: SentParameters, program: Program, task: TrainTask) -> RecordDict:
    """As the grid receives a reply."""
    success, parts = decode_reply(payload), ReplyParts()
    assert isinstance(success, Success)
    parts.add(success, payload)
    content, _norm = reply_content(parts, task, sent, program)
    return content


def received_dense(payload: bytes, sent: SentParameters, program: Program, task: TrainTask) -> RecordDict:
    """The same with the update made dense."""
    success = decode_reply(payload)
    assert isinstance(success, Success) and success.metrics is not None
    vector = apply_update(sent.vector, [success])
    assert np.isfinite(vector).all()
    metrics = to_metrics(success.metrics, task.kind, len(payload), program)
    return RecordDict({"metrics": metrics, "arrays": vector_to_arrays(vector, program, sent.record)})


def aggregate(
    received: Received, messages: Sequence[Message], payloads: Sequence[bytes], strategy: Reptile, program: Program
) -> ArrayRecord:
    """One round, from the replies' bytes."""
    task = TrainTask(1, "train", 1, 1, program.model_id, 1, (), 0, UpdateFormat(density=0.5))
    (record,) = messages[0].content.array_records.values()
    sent = SentParameters.from_record(record, program)
    replies = [
        Message(received(payload, sent, program, task), reply_to=message)
        for message, payload in zip(messages, payloads, strict=True)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    return arrays


def fastest(function: Callable[[], object], repeat: int) -> float:
    """Processor seconds of the fastest run."""
    times = []
    for _ in range(repeat):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def reply_bytes(random: np.random.Generator, parameters: int, density: float) -> bytes:
    """One sparse reply in one message."""
    count = max(1, int(np.ceil(density * parameters)))
    indices = np.sort(random.choice(parameters, count, replace=False)).astype(np.uint32)
    update = Sparse(indices, random.normal(size=count).astype(np.float32))
    return encode(Success(1, 0, 1, Metrics(16, 1.0, 16, 8, 1.0, 4 * parameters), update))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    log_level(40)
    table = Table("parameters", "us a reply, sparse", "us a reply, dense", "sparse / dense")
    for width in (32, 256, 2048):
        program = build([Dense(width), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
        random = np.random.default_rng(0)
        vector: NDArray[np.float32] = program.initial(0)
        strategy = Reptile(clients=args.clients)
        nodes = Nodes(range(1, args.clients + 1))
        sent = vector_to_arrays(vector, program)
        messages = list(strategy.configure_train(1, sent, ConfigRecord(), nodes))
        payloads = [reply_bytes(random, program.n_params, args.density) for _ in messages]
        times, results = [], []
        for received in (received_sparse, received_dense):
            round_of = partial(aggregate, received, messages, payloads, strategy, program)
            results.append(round_of())
            times.append(1e6 * fastest(round_of, args.repeat) / args.clients)
        assert all(results[0][key].data == results[1][key].data for key in results[0]), "the bits differ"
        sparse, dense = times
        table.add_row(f"{program.n_params:,}", f"{sparse:.0f}", f"{dense:.0f}", f"{sparse / dense:.2f}")
    console = Console(highlight=False)
    console.print(f"Reptile, {args.clients} replies a round, density {args.density:g}, processor time")
    console.print(table)


if __name__ == "__main__":
    main()
