"""Asynchronous rounds: an update is used as soon as it arrives, weighted by its staleness; stragglers hold up nothing.

After FedAsync (Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019), with its polynomial staleness: an
update that was started s versions ago counts (1 + s)^-a times as much as a fresh one. FedAsync mixes parameters; here
the change since the version that the device was sent is added, as a sparse update holds nothing else. FedBuff does the
same (Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", 2022).
"""

import time
from collections.abc import Callable, Iterable
from logging import INFO
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.flower_records import records_of_type
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import log
from tinyfleet.server.flower.strategies.reptile import Change, Reptile, SentArrays

POLL = 0.02
"""Seconds between two looks at a grid that has no way to wait for a reply."""


class _Started(NamedTuple):
    """A device at work: the version that it was sent."""

    node: int
    version: int
    sent: SentArrays


class Asynchronous(Strategy):
    """Runs one of our strategies so that each reply makes a new version at once.

    As many devices as the strategy has clients work at any time; a device that has replied rests until it is drawn
    again. Each update moves the parameters by alpha / clients, so that as many updates as a round has clients move them
    as far as that round would. Each version counts as one of Flower's rounds.

    Parameters
    ----------
    strategy
        Says what the devices do and at which rate the parameters move.
    exponent
        The exponent a of the staleness weight (1 + s)^-a; 0 ignores staleness.
    max_staleness
        Updates that are more versions old than this are not used.

    Raises
    ------
    UserError
        If a number is negative.

    Examples
    --------
    >>> strategy = Asynchronous(Reptile(alpha=1.0, clients=4))
    >>> strategy.weight(server_round=1, staleness=0), strategy.weight(server_round=1, staleness=3)
    (0.25, 0.125)
    """

    def __init__(self, strategy: Reptile, *, exponent: float = 0.5, max_staleness: int = 32) -> None:
        if exponent < 0 or max_staleness < 0:
            raise UserError("the exponent and the greatest staleness can't be negative")
        self.strategy = strategy
        self.exponent = exponent
        self.max_staleness = max_staleness

    def weight(self, server_round: int, staleness: int) -> float:
        """The factor of an update that makes version `server_round` and is `staleness` versions old."""
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
        """Runs until `num_rounds` updates have been used.

        Parameters
        ----------
        grid
            Offers the nodes.
        initial_arrays
            The parameters that the run begins with.
        num_rounds
            Versions to make.
        timeout
            Seconds that a device may take. One that has not replied by then can be drawn again.
        train_config
            Passed on to the devices.
        evaluate_config
            Not used.
        evaluate_fn
            Called with version 0, and with every new version.

        Returns
        -------
        Result
            Flower's record of the run.

        Raises
        ------
        UserError
            If no device is there, or none gives a usable reply.
        """
        self.summary()
        config = train_config or ConfigRecord()
        result, current, version = Result(), SentArrays.from_record(initial_arrays), 0
        if evaluate_fn is not None:
            evaluate_fn(0, initial_arrays)
        working: dict[str, _Started] = {}  # by message id
        failed: set[int] = set()  # nodes, since the last update that was used
        drawn = 0
        try:
            while version < num_rounds:
                idle = sorted({*grid.get_node_ids()} - {started.node for started in working.values()} - failed)
                while idle and len(working) < self.strategy.clients:
                    drawn += 1
                    random = np.random.default_rng([self.strategy.seed, drawn])
                    node = idle.pop(int(random.integers(len(idle))))
                    message = self.strategy.message(version + 1, current.record, config, node, task=drawn, ttl=timeout)
                    (message_id,) = grid.push_messages([message])
                    working[message_id] = _Started(node, version, current)
                if not working:
                    why = "none of the devices gave a usable reply" if failed else "no client is there"
                    raise UserError(f"{why} for round {version + 1}; start devices, or widen the selection")
                reply = _next_reply(grid, working)
                started = working.pop(reply.metadata.reply_to_message_id)
                staleness = version - started.version
                change = self.strategy.change(reply, started.sent)
                if change is None:
                    failed.add(started.node)
                elif staleness > self.max_staleness:
                    log(INFO, "node %d: its update is %d versions old; not used", started.node, staleness)
                else:
                    version += 1
                    failed.clear()
                    current = self._updated(current, change, self.weight(version, staleness))
                    metrics = records_of_type(reply.content, MetricRecord)[0].copy()
                    metrics["staleness"] = staleness
                    result.arrays, result.train_metrics_clientapp[version] = current.record, metrics
                    if evaluate_fn is not None:
                        evaluate_fn(version, current.record)
        finally:
            if isinstance(grid, MqttGrid):
                grid.give_up(working, "the run is over")
        return result

    def _updated(self, current: SentArrays, change: Change, weight: float) -> SentArrays:
        """The next version: the current one, moved by a client's change."""
        total = np.zeros_like(current.vector)
        change.add_to(total)
        return SentArrays.from_record(self.strategy.with_shared(current.record, current.vector + weight * total))

    # The methods of a synchronous round

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
        """Nothing, as no client was told to evaluate."""
        return None

    def summary(self) -> None:
        """Logs the settings."""
        log(INFO, "\tasynchronous: staleness exponent %g, at most %d versions old", self.exponent, self.max_staleness)
        self.strategy.summary()


def _next_reply(grid: Grid, waiting: Iterable[str]) -> Message:
    """Waits for a reply to any of these messages. Every message gets one in time, if only an error."""
    waiting = list(waiting)
    while True:
        if isinstance(grid, MqttGrid):
            (reply,) = grid.pull_messages([grid.wait_for_one(waiting)])
            return reply
        for message_id in waiting:
            for reply in grid.pull_messages([message_id]):
                return reply
        time.sleep(POLL)
