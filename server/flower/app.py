"""The Flower ServerApp: the same strategies on Flower's simulation engine, and with SuperLink and SuperNodes.

Its settings are the run config in pyproject.toml, section [tool.flwr.app.config]; `flwr run . -c "rounds=10"` changes
them. If they name a broker, the devices of that fleet take part together with the SuperNodes.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from logging import INFO
from pathlib import Path

from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import load
from tinyfleet.edge.wire.broker_address import BrokerAddress
from tinyfleet.edge.wire.broker_check import check_operator
from tinyfleet.edge.wire.flower_records import arrays_to_vector, vector_to_arrays
from tinyfleet.edge.wire.server_info import find_broker
from tinyfleet.server.evaluate import baselines
from tinyfleet.server.flower.composite_grid import CompositeGrid
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import log
from tinyfleet.server.named_strategies import initial_parameters, limit_clients, make_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds, and scores the learned initialization and the baselines on held-out tasks."""
    config = context.run_config

    def number(key: str) -> int:
        return int(config[key])

    task = load(str(config["task"]))
    seed, rounds, clients = number("seed"), number("rounds"), number("clients")
    named_strategy = make_strategy(
        str(config["strategy"]), task, rounds=rounds, clients=clients, query=number("query"), seed=seed
    )
    initialization = initial_parameters(task.program, named_strategy, seed)
    with ExitStack() as stack:
        broker = broker_of(config)
        if broker is not None:
            fleet = str(config["fleet"])
            check_operator(broker, fleet)
            devices = stack.enter_context(MqttGrid(broker, fleet, task.program))
            grid = CompositeGrid([grid, devices])
        nodes = wait_for_nodes(grid, clients, float(config["wait"]))
        limit_clients(named_strategy.strategy, clients, len(nodes))
        result = named_strategy.strategy.start(
            grid,
            vector_to_arrays(initialization, task.program),
            rounds,
            float(config["timeout"]),
            train_config=ConfigRecord(dict(named_strategy.train_config)),
        )
    if not result.arrays:
        raise UserError("no client gave a usable reply in any round; see the log of the clients")
    learned = arrays_to_vector(result.arrays, task.program)
    for name, scores in baselines(task, learned, seed=seed).items():
        for score in scores:
            log(INFO, "%s, %d shots: %s %.3f +- %.3f", name, score.shots, score.metric, score.mean, score.spread)


def broker_of(config: Mapping[str, object]) -> BrokerAddress | None:
    """The MQTT broker that the run config names, or that of the server or the identity in its data folder."""

    def file(key: str) -> Path | None:
        return Path(str(config[key])) if config[key] else None

    data = file("data")
    if not config["broker"] and data is None:
        return None
    return find_broker(
        str(config["broker"]) or None,
        data or Path(),
        insecure=bool(config["insecure"]),
        ca=file("ca"),
        cert=file("cert"),
        key=file("key"),
        password_file=file("password-file"),
    )


def wait_for_nodes(grid: Grid, count: int, timeout: float) -> Sequence[int]:
    """The nodes, once there are `count` of them or after `timeout` seconds. Raises UserError if there are none."""
    deadline = time.monotonic() + timeout
    while len(nodes := list(grid.get_node_ids())) < count and time.monotonic() < deadline:
        time.sleep(0.2)  # Flower's grids can only be polled
    if not nodes:
        raise UserError(f"no client came within {timeout:g} s; start SuperNodes or devices, then run again")
    return nodes
