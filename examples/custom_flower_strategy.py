"""Your own Flower strategy on devices that speak MQTT: a mean that trusts a device by how well it classifies.

    python examples/custom_flower_strategy.py

trains four virtual devices, which run a microcontroller's C code, and prints the loss of five rounds: 1.01 to 0.18.
"""

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAvg

from tinyfleet import MqttGrid, load_task
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.edge.device.flower_client import vector_to_arrays
from tinyfleet.server.fleet_server import FleetServer
from tinyfleet.server.flower.internals import log_level


class TrustAccurate(FedAvg):
    """FedAvg, but the weight of a device is its accuracy on samples that it did not learn from."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[Any, Any]:
        answered = [reply for reply in replies if reply.has_content()]
        for reply in answered:
            reply.content["metrics"]["num-examples"] = 1 + round(100 * reply.content["metrics"]["accuracy"])
        arrays, metrics = super().aggregate_train(server_round, answered)
        print(f"round {server_round}: loss {metrics['loss']:.2f}")
        return arrays, metrics


def main() -> None:
    task = load_task("digits")
    log_level(40)  # Flower's own log: errors only
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        address = stack.enter_context(FleetServer(Path(folder), "home", port=0, insecure=True)).broker
        for i in range(4):
            device = virtual_device(address, "home", f"device-{i}", task.program, task.client(i, 4))
            device.start()
            stack.callback(device.stop)
        grid = stack.enter_context(MqttGrid(address, "home", task.program))
        grid.wait_for_nodes(4, timeout=30)
        TrustAccurate(fraction_evaluate=0).start(
            grid,
            vector_to_arrays(task.program.initial(0), task.program),
            num_rounds=5,
            train_config=ConfigRecord({"lr": 0.05, "phase-steps": [160], "query": 16, "seed": 1}),
        )


if __name__ == "__main__":
    main()
