"""Reptile: the mean of what the clients learned pulls the start they all learn from.

Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms" (2018), the batched version of algorithm 2:
``g += alpha * mean(g_k - g)``, where g_k is what client k made of g with a few steps of stochastic gradient descent on
a task of its own. At least two steps: with one, this is joint training on the mixture of all tasks.
"""

import math
from collections.abc import Iterable, Sequence
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from tinyfleet.edge.device.flower_client import from_numpy, records_of_type, to_numpy
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.messages import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.edge.wire.round_config import RoundConfig, format_round_config
from tinyfleet.server.flower.internals import log

Numbers = NDArray[np.float64]


class Reptile(Strategy):
    """A batch of clients a round.

    alpha: the server's rate. beta: the devices'. steps: of each client, one sample each, at least 2. clients: how many
    a round, drawn from those that the grid offers (fewer if it offers fewer). query: samples that each client scores
    itself on after it has learned. half: updates come back as f16. seed: draws the clients, and each one's task.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.01,
        steps: int = 16,
        clients: int = 5,
        query: int = 0,
        half: bool = False,
        seed: int = 0,
    ) -> None:
        if steps < 2:
            raise UserError("meta-learning takes at least 2 steps on each client (1 is joint training); raise steps")
        if clients < 1:
            raise UserError("a round needs at least one client; raise clients")
        self.alpha = alpha
        self.beta = beta
        self.clients = clients
        self.query = query
        self.seed = seed
        self.phases: Sequence[Phase] = (Phase(ALL_LAYERS, steps, beta),)
        self.update = UpdateFormat(half=half)
        self._sent = ArrayRecord()

    def rate(self, server_round: int) -> float:
        """The server's rate alpha in this round, which counts from 1."""
        return self.alpha

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The same arrays to every chosen client, with a task seed of its own. Raises UserError if none is there."""
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise UserError(f"no client is there for round {server_round}; start devices, or widen the selection")
        chosen = drawn(len(nodes), self.clients, np.random.default_rng([self.seed, server_round]))
        log(INFO, "configure_train: %d of %d nodes", len(chosen), len(nodes))
        self._sent = arrays
        return [self.message(server_round, arrays, config, nodes[i]) for i in chosen]

    def message(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        node: int,
        *,
        task: int | None = None,
        ttl: float | None = None,
    ) -> Message:
        """What one client is to do. task: what its task's seed comes from, by default the round. ttl: its seconds."""
        seed = task_seed(self.seed, server_round if task is None else task, node)
        round_config = RoundConfig(tuple(self.phases), self.query, self.update, seed)
        instructions = ConfigRecord({**config, "server-round": server_round, **format_round_config(round_config)})
        return Message(RecordDict({"arrays": arrays, "config": instructions}), node, MessageType.TRAIN, ttl=ttl)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new start, and the round's metrics (see `mean_metrics`); (None, None) if no client gave a good reply.

        Replies that are not `usable` are left out. The order in which replies came does not matter: they are added up
        by node id, in float64.
        """
        by_node = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        good = [(reply, learned) for reply in by_node if (learned := self.usable(reply, self._sent)) is not None]
        if not good:
            return None, None
        alpha, sent = self.rate(server_round), flat(self._sent, self._sent)
        change_sum = np.zeros_like(sent)
        for _, learned in good:
            change_sum += learned - sent
        metrics = mean_metrics([records_of_type(reply.content, MetricRecord)[0] for reply, _ in good])
        metrics["alpha"] = alpha
        return self.updated(self._sent, sent + alpha * (change_sum / len(good))), metrics

    def updated(self, arrays: ArrayRecord, numbers: Numbers) -> ArrayRecord:
        """The arrays, but those that are shared with these numbers (see `flat`), as float32."""
        updated, first, values = ArrayRecord(), 0, numbers.astype(np.float32)
        for key, array in arrays.items():
            end = first + math.prod(array.shape)
            updated[key] = from_numpy(values[first:end].reshape(array.shape)) if self.is_shared(key) else array
            first = end
        return updated

    def is_shared(self, key: str) -> bool:
        """Whether this array belongs to the fleet; the others keep their initial values here. Arrays are named as in a
        program: dense_2/weights belongs to layer 2."""
        if self.update.shared == ALL_LAYERS:
            return True
        return bool(self.update.shared >> int(key.partition("/")[0].rpartition("_")[2]) & 1)

    def usable(self, reply: Message, sent: ArrayRecord) -> Numbers | None:
        """What a client has learned, all of its arrays one after the other in the order of those that were sent; None
        if the reply is an error, or if its arrays differ from those in name or shape or are not finite."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            log(INFO, "node %d: %s", node, reply.error.reason)
            return None
        if (
            not len(records_of_type(reply.content, ArrayRecord))
            == len(records_of_type(reply.content, MetricRecord))
            == 1
        ):
            log(WARNING, "node %d: a reply has one ArrayRecord and one MetricRecord; left out", node)
            return None
        arrays = records_of_type(reply.content, ArrayRecord)[0]
        if {key: a.shape for key, a in arrays.items()} != {key: a.shape for key, a in sent.items()}:
            log(WARNING, "node %d: its arrays are not those it was sent; left out", node)
            return None
        learned = flat(arrays, sent)
        if not np.isfinite(learned).all():
            log(WARNING, "node %d: its arrays are not finite; left out (is beta too large?)", node)
            return None
        return learned

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients score themselves on `query` samples as they train, the server on held-out tasks."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nothing was asked."""
        return None

    def summary(self) -> None:
        """Logs the settings."""
        log(INFO, "\talpha %g, beta %g, up to %d clients a round", self.alpha, self.beta, self.clients)
        for phase in self.phases:
            log(INFO, "\tlayers %#x: %d steps at %g", phase.layers, phase.steps, phase.rate)
        log(INFO, "\tupdates: layers %#x, %s", self.update.shared, "f16" if self.update.half else "f32")


def drawn(nodes: int, clients: int, random: np.random.Generator) -> list[int]:
    """Which of so many nodes take part in a round, in their order."""
    chosen: list[int] = np.sort(random.choice(nodes, min(clients, nodes), replace=False)).tolist()
    return chosen


def task_seed(seed: int, number: int, node: int) -> int:
    """Of the task that a node is given in the round of that number."""
    return int(np.random.SeedSequence([seed, number, node]).generate_state(1)[0])


def flat(arrays: ArrayRecord, order: Iterable[str]) -> Numbers:
    """The numbers of the arrays one after the other, in the order of these names."""
    by_key = dict(arrays.items())
    return np.concatenate([to_numpy(by_key[key]).ravel() for key in order], dtype=np.float64)


def mean_metrics(records: Sequence[MetricRecord]) -> MetricRecord:
    """One round's metrics from its clients'.

    clients: how many. num-examples, bytes-up and bytes-dense: summed. arena-bytes: the largest. Every other number that
    all clients report: the mean, weighted by num-examples.
    """
    rows = [dict(record.items()) for record in records]
    weights = np.array([row["num-examples"] for row in rows], dtype=np.float64)
    result = MetricRecord({"clients": len(records)})
    for key in rows[0]:
        values = [value for row in rows if isinstance(value := row.get(key), (int, float))]
        if len(values) < len(records):
            continue
        if key in ("num-examples", "bytes-up", "bytes-dense"):
            result[key] = sum(values)
        elif key == "arena-bytes":
            result[key] = max(values)
        else:
            result[key] = float((np.array(values) * weights).sum() / weights.sum())
    return result
