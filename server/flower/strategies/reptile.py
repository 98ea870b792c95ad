"""Reptile: the mean of the clients' changes moves the initialization that they all learn from.

Nichol, Achiam and Schulman, "On First-Order Meta-Learning Algorithms" (2018), the batched version of algorithm 2:
``g += alpha * mean(g_k - g)``, where g_k are the parameters that client k reaches from g in a few steps of stochastic
gradient descent on its own task. With a single step this would be joint training on the mixture of all tasks.
"""

import math
from collections.abc import Iterable, Sequence
from logging import INFO, WARNING
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.edge.wire.flower_records import SparseArrayRecord, from_numpy, records_of_type, to_numpy
from tinyfleet.edge.wire.round_config import RoundConfig, format_round_config
from tinyfleet.server.flower.internals import log

Vector = NDArray[np.float64]


class SentArrays(NamedTuple):
    """What the clients of a round were sent, as arrays and as one vector [n_params]."""

    record: ArrayRecord
    vector: Vector

    @classmethod
    def from_record(cls, record: ArrayRecord) -> "SentArrays":
        """Concatenates the arrays in their order."""
        return cls(record, flatten(record, record))


class Change(NamedTuple):
    """What one client changed: `amount` at the positions `at` of the vector of all parameters."""

    at: NDArray[np.uint32] | slice
    amount: Vector

    def add_to(self, total: Vector) -> None:
        """Adds the change to a vector [n_params], in place."""
        total[self.at] += self.amount


class Reptile(Strategy):
    """Reptile (Nichol et al. 2018): each round, a batch of clients learns from the same initialization.

    Parameters
    ----------
    alpha
        The server's learning rate.
    beta
        The devices' learning rate.
    steps
        Samples that each client learns from, one a step; at least 2.
    clients
        How many clients to draw in each round from those that the grid offers.
    query
        Query samples that each client scores itself on after it has learned.
    half
        Whether updates travel as float16.
    seed
        Draws the clients of each round, and each client's task.

    Raises
    ------
    UserError
        If there are fewer than 2 steps or no clients.

    Examples
    --------
    >>> strategy = Reptile(alpha=0.5, beta=0.05, steps=8, clients=3)
    >>> strategy.rate(server_round=1)
    0.5
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
        """The server's learning rate in a round; rounds count from 1."""
        return self.alpha

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message to each drawn client: the same arrays, and a task seed of its own.

        Parameters
        ----------
        server_round
            The round, from 1.
        arrays
            The global parameters.
        config
            Passed on to the clients.
        grid
            Offers the nodes.

        Returns
        -------
        iterable of Message

        Raises
        ------
        UserError
            If the grid offers no node.
        """
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise UserError(f"no client is there for round {server_round}; start devices, or widen the selection")
        drawn = draw_nodes(len(nodes), self.clients, np.random.default_rng([self.seed, server_round]))
        log(INFO, "configure_train: %d of %d nodes", len(drawn), len(nodes))
        self._sent = arrays
        return [self.message(server_round, arrays, config, nodes[i]) for i in drawn]

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
        """The message that tells one client to train.

        Parameters
        ----------
        server_round, arrays, config
            As for `configure_train`.
        node
            The client's node id.
        task
            Number that the seed of the client's task is derived from. Default: the round.
        ttl
            Seconds until the message expires.

        Returns
        -------
        Message
        """
        seed = task_seed(self.seed, server_round if task is None else task, node)
        round_config = RoundConfig(tuple(self.phases), self.query, self.update, seed)
        instructions = ConfigRecord({**config, "server-round": server_round, **format_round_config(round_config)})
        return Message(RecordDict({"arrays": arrays, "config": instructions}), node, MessageType.TRAIN, ttl=ttl)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Moves the initialization by alpha times the mean change.

        Parameters
        ----------
        server_round
            The round, from 1.
        replies
            In any order; they are added up by node id, in float64. Unusable ones are logged and left out.

        Returns
        -------
        tuple of ArrayRecord or None, and MetricRecord or None
            The new initialization, and the round's metrics (see `mean_metrics`). None if no reply is usable.
        """
        sent = SentArrays.from_record(self._sent)
        by_node = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        usable = [(reply, change) for reply in by_node if (change := self.change(reply, sent)) is not None]
        if not usable:
            return None, None
        alpha, change_sum = self.rate(server_round), np.zeros_like(sent.vector)
        for _, change in usable:
            change.add_to(change_sum)
        metrics = mean_metrics([records_of_type(reply.content, MetricRecord)[0] for reply, _ in usable])
        metrics["alpha"] = alpha
        return self.with_shared(sent.record, sent.vector + alpha * (change_sum / len(usable))), metrics

    def with_shared(self, arrays: ArrayRecord, parameters: Vector) -> ArrayRecord:
        """The arrays, with the shared ones replaced by these parameters [n_params], as float32."""
        result, first, values = ArrayRecord(), 0, parameters.astype(np.float32)
        for key, array in arrays.items():
            end = first + math.prod(array.shape)
            result[key] = from_numpy(values[first:end].reshape(array.shape)) if self.is_shared(key) else array
            first = end
        return result

    def is_shared(self, key: str) -> bool:
        """Whether the fleet shares this array; others keep their initial values on the server. Arrays are named as in a
        program: dense_2/weights belongs to layer 2."""
        if self.update.shared == ALL_LAYERS:
            return True
        return bool(self.update.shared >> int(key.partition("/")[0].rpartition("_")[2]) & 1)

    def change(self, reply: Message, sent: SentArrays) -> Change | None:
        """What a client changed of the parameters that it was sent.

        Parameters
        ----------
        reply
            The client's reply.
        sent
            What the client was sent.

        Returns
        -------
        Change or None
            At the changed positions only if the reply carries a sparse update, which is not made dense. None, with a
            line in the log, if the reply is an error, or if its arrays differ from those sent in name or shape or are
            not finite.
        """
        node = reply.metadata.src_node_id
        if reply.has_error():
            log(INFO, "node %d: %s", node, reply.error.reason)
            return None
        records = records_of_type(reply.content, ArrayRecord)
        if not len(records) == len(records_of_type(reply.content, MetricRecord)) == 1:
            log(WARNING, "node %d: a reply has one ArrayRecord and one MetricRecord; left out", node)
            return None
        (arrays,) = records
        if isinstance(arrays, SparseArrayRecord) and arrays.is_sparse and arrays.sent is sent.record:
            learned, at = arrays.new_values.astype(np.float64), arrays.indices
            return Change(at, learned - sent.vector[at])
        if {key: a.shape for key, a in arrays.items()} != {key: a.shape for key, a in sent.record.items()}:
            log(WARNING, "node %d: its arrays are not those it was sent; left out", node)
            return None
        learned = flatten(arrays, sent.record)
        if not np.isfinite(learned).all():
            log(WARNING, "node %d: its arrays are not finite; left out (is beta too large?)", node)
            return None
        return Change(slice(None), learned - sent.vector)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: clients score themselves on `query` samples as they train, the server on held-out tasks."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as no client was told to evaluate."""
        return None

    def summary(self) -> None:
        """Logs the settings."""
        log(INFO, "\talpha %g, beta %g, up to %d clients a round", self.alpha, self.beta, self.clients)
        for phase in self.phases:
            log(INFO, "\tlayers %#x: %d steps at %g", phase.layers, phase.steps, phase.rate)
        log(INFO, "\tupdates: layers %#x, %s", self.update.shared, "f16" if self.update.half else "f32")


def draw_nodes(nodes: int, clients: int, random: np.random.Generator) -> list[int]:
    """The indices of the nodes that take part in a round, ascending: `clients` of them, or all if there are fewer."""
    drawn: list[int] = np.sort(random.choice(nodes, min(clients, nodes), replace=False)).tolist()
    return drawn


def task_seed(seed: int, number: int, node: int) -> int:
    """The seed of the task that a node is given in the round of this number."""
    return int(np.random.SeedSequence([seed, number, node]).generate_state(1)[0])


def flatten(arrays: ArrayRecord, order: Iterable[str]) -> Vector:
    """The arrays' values as one vector, the arrays in the order of these names."""
    by_key = dict(arrays.items())
    return np.concatenate([to_numpy(by_key[key]).ravel() for key in order], dtype=np.float64)


def mean_metrics(records: Sequence[MetricRecord]) -> MetricRecord:
    """A round's metrics from those of its clients.

    Parameters
    ----------
    records
        One of each client; `num-examples` in each.

    Returns
    -------
    MetricRecord
        `clients`: their number. `num-examples`, `bytes-up` and `bytes-dense`: the sum. `arena-bytes`: the largest.
        Every other number that all clients report: the mean, weighted by `num-examples`.

    Examples
    --------
    >>> means = mean_metrics(
    ...     [MetricRecord({"num-examples": 1, "loss": 1.0}), MetricRecord({"num-examples": 3, "loss": 2.0})]
    ... )
    >>> means["clients"], means["num-examples"], means["loss"]
    (2, 4, 1.75)
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
