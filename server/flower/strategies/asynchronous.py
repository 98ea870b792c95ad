"""Asynchronous rounds: an update is used when it comes, weighted by its staleness, and nobody waits for a straggler.

After FedAsync (Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019), with its polynomial staleness: an
update that was begun s versions ago counts (1 + s)^-a times as much as a fresh one. FedAsync mixes weights; as a sparse
update only says what has changed, here the change since the version that the device was given is added, as FedBuff
does (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", 2022).
"""

import time
from collections.abc import Callable, Iterable
from logging import INFO

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from tinyfleet.edge.device.flower_client import records_of_type
from tinyfleet.edge.errors import UserError
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import log
from tinyfleet.server.flower.strategies.reptile import Reptile, flat

POLL = 0.02
"""Seconds between two looks at a grid that can't say when a reply is there."""


class Asynchronous(Strategy):
    """Runs one of our strategies so that each reply makes a new version at once.

    As many devices as the strategy has clients work at any time; a device that has replied rests until it is drawn
    again. Each update moves the version by alpha / clients, so that as many updates as a round has clients move it as
    far as that round. exponent: a above; 0: staleness does not matter. max_staleness: an update that is older is not
    used. A device that has not replied when its time (`timeout` of `start`) is up can be drawn again.

    A "round" of `start` is one version, so one update.
    """

    def __init__(self, strategy: Reptile, *, exponent: float = 0.5, max_staleness: int = 32) -> None:
        if exponent < 0 or max_staleness < 0:
            raise UserError("the exponent and the greatest staleness can't be negative")
        self.strategy = strategy
        self.exponent = exponent
        self.max_staleness = max_staleness

    def weight(self, server_round: int, staleness: int) -> float:
        """What an update that makes version `server_round` is multiplied by."""
        share = self.strategy.rate(server_round) / self.strategy.clients
        return float(share * (1 + staleness) ** -self.exponent)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """See Flower's Strategy. timeout: seconds that a device may take. evaluate_fn: called with version 0, and with
        every version that an update makes. Raises UserError if no device is there, or if none gives a usable reply."""
        self.summary()
        config = train_config or ConfigRecord()
        result, arrays, version = Result(), initial_arrays, 0
        if evaluate_fn is not None:
            evaluate_fn(0, arrays)
        begun: dict[str, tuple[int, int, ArrayRecord]] = {}  # message id -> node, version, what it was given
        failed: set[int] = set()  # since the last update that was of use
        drawn = 0
        try:
            while version < num_rounds:
                idle = sorted({*grid.get_node_ids()} - {node for node, *_ in begun.values()} - failed)
                while idle and len(begun) < self.strategy.clients:
                    drawn += 1
                    random = np.random.default_rng([self.strategy.seed, drawn])
                    node = idle.pop(int(random.integers(len(idle))))
                    message = self.strategy.message(version + 1, arrays, config, node, task=drawn, ttl=timeout)
                    (sent,) = grid.push_messages([message])
                    begun[sent] = node, version, arrays
                if not begun:
                    why = "none of the devices gave a usable reply" if failed else "no client is there"
                    raise UserError(f"{why} for round {version + 1}; start devices, or widen the selection")
                reply = _next_reply(grid, begun)
                node, given, base = begun.pop(reply.metadata.reply_to_message_id)
                staleness = version - given
                learned = self.strategy.usable(reply, base)
                if learned is None:
                    failed.add(node)
                elif staleness > self.max_staleness:
                    log(INFO, "node %d: its update is %d versions old; not used", node, staleness)
                else:
                    version += 1
                    failed.clear()
                    moved = flat(arrays, base) + self.weight(version, staleness) * (learned - flat(base, base))
                    arrays = self.strategy.updated(arrays, moved)
                    metrics = records_of_type(reply.content, MetricRecord)[0].copy()
                    metrics["staleness"] = staleness
                    result.arrays, result.train_metrics_clientapp[version] = arrays, metrics
                    if evaluate_fn is not None:
                        evaluate_fn(version, arrays)
        finally:
            if isinstance(grid, MqttGrid):
                grid.give_up(begun, "the run is over")
        return result

    # What a synchronous round would do

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The strategy's own."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The strategy's own."""
        return self.strategy.aggregate_train(server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing, as nothing was asked."""
        return None

    def summary(self) -> None:
        """Logs the settings."""
        log(INFO, "\tasynchronous: staleness exponent %g, at most %d versions old", self.exponent, self.max_staleness)
        self.strategy.summary()


def _next_reply(grid: Grid, waiting: Iterable[str]) -> Message:
    """Waits for one reply to any of these messages. Every message gets one in time, if only an error."""
    waiting = list(waiting)
    while True:
        if isinstance(grid, MqttGrid):
            (reply,) = grid.pull_messages([grid.wait_for_one(waiting)])
            return reply
        for message_id in waiting:
            for reply in grid.pull_messages([message_id]):
                return reply
        time.sleep(POLL)
