"""Your own Flower strategy on devices that speak MQTT: a mean that trusts a device by how well it classifies.

    python examples/custom_flower_strategy.py

starts a broker and four virtual devices (the C node of a microcontroller), trains for five rounds, and prints

    round 1: loss 1.42
    round 2: loss 1.03
    round 3: loss 0.81
    round 4: loss 0.67
    round 5: loss 0.57
"""

import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from tinyfleet.edge import tasks
from tinyfleet.edge.device.device import virtual_device
from tinyfleet.edge.device.flower_client import vector_to_arrays
from tinyfleet.server.broker import Broker
from tinyfleet.server.flower.grid import MqttGrid
from tinyfleet.server.flower.internals import log_level


class TrustAccurate(FedAvg):
    """FedAvg, but the weight of a device is its accuracy on samples that it did not learn from."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        answered = [reply for reply in replies if reply.has_content()]
        for metrics in (reply.content["metrics"] for reply in answered):
            metrics["num-examples"] = 1 + round(100 * metrics["accuracy"])
        arrays, metrics = super().aggregate_train(server_round, answered)
        print(f"round {server_round}: loss {metrics['train_loss']:.2f}")
        return arrays, metrics


def main() -> None:
    task = tasks.load("digits")
    log_level(30)  # Flower's own log: warnings only
    with ExitStack() as stack:
        broker = stack.enter_context(Broker(0, Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        for i in range(4):
            samples = task.client(i, 4)
            device = virtual_device(broker.host, broker.port, "home", f"device-{i}", task.program, samples)
            device.start()
            stack.callback(device.stop)
        grid = stack.enter_context(MqttGrid(broker.host, broker.port, "home", task.program))
        grid.wait_for_nodes(4, timeout=30)
        TrustAccurate(fraction_evaluate=0).start(
            grid,
            vector_to_arrays(task.program.initial(0), task.program),
            num_rounds=5,
            train_config=ConfigRecord({"lr": 0.05, "phase-steps": [160], "query": 16, "seed": 1}),
        )


if __name__ == "__main__":
    main()
