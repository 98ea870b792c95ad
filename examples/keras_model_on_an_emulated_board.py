"""A Keras model, compiled and trained on an emulated Cortex-M4F board.

    python examples/keras_model_on_an_emulated_board.py

starts the board in QEMU behind a gateway, with a small classifier of digits in its firmware, and prints

    1685 parameters train in 6,952 B of RAM
    ...
    round 5: loss 0.121, accuracy 81%
"""

import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from keras import Input, Sequential, layers

from tinyfleet import compile_model, load_task
from tinyfleet.firmware_tools.boards.catalogue import load_board
from tinyfleet.firmware_tools.firmware.build import build
from tinyfleet.firmware_tools.firmware.emulate import Emulator
from tinyfleet.firmware_tools.gateway import Gateway
from tinyfleet.server.fleet_server import FleetServer
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.named_strategies import make_strategy
from tinyfleet.server.training_run import run


def main() -> None:
    log_level(40)  # Flower's own log: errors only
    program = compile_model(Sequential([Input((64,)), layers.Dense(24, "relu"), layers.Dense(5, "softmax")]))
    task = replace(load_task("digits"), name="keras-digits", program=program)
    samples = replace(task.client(0, 1), fixed=True)  # a label is a digit, in every round
    print(f"{program.n_params} parameters train in {program.arena_bytes:,} B of RAM")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        elf = build("mps2-an386", program, samples, "home", "board-01", folder / "firmware")
        server = stack.enter_context(FleetServer(folder / "data", "home", port=0, insecure=True))
        board = stack.enter_context(Emulator(load_board("mps2-an386"), elf))
        stop, gateway = threading.Event(), Gateway(board.url, lambda *_: server.broker)
        threading.Thread(target=gateway.run, args=(stop,)).start()
        stack.callback(stop.set)
        run(
            task,
            make_strategy("fedavg", task, rounds=5, clients=1),
            broker=server.broker,
            fleet="home",
            store=server.store,
            rounds=5,
            wait=30,
            on_round=lambda this: print(f"round {this.number}: loss {this.loss:.3f}, accuracy {this.accuracy:.0%}"),
        )


if __name__ == "__main__":
    main()
