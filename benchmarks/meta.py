"""How fast the meta-training backend adapts clients, beside Flower's simulation engine and a loop in NumPy; its memory.

    python benchmarks/meta.py [--json] [--only tensorflow|jax|numpy|flower|fleet]

The work: sine waves, 32 steps of batch 10 on 1-32-32-1 with tanh, which each client does from the same start. Each part
runs in a process of its own, one after the other. Rates are of the fastest of several calls; `by processor` is what two
cores would do that had nothing else to do: from the processor's time, which other programs on the machine stretch
less. `compile` is the first call, less one later call. `peak`: the share of what the same device does in one large
product of matrices. The fleet: 100,000 clients, of whom 1 % take part in each round of TinyMetaFed; peak memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tinyfleet.edge.tasks import sine
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat

MODEL = sine.PROGRAM
STEPS, BATCH, RATE = 32, 10, 0.02
CLIENTS = 256  # at once
FLEET, ROUNDS = 100_000, 6

Array = NDArray[np.float32]


def sines(seeds: Sequence[int], samples: int) -> tuple[Array, Array]:
    """Training waves: x and y [waves, samples, 1]."""
    some = sine.draw("training", seeds, samples, 1)
    return some.support_x, np.asarray(some.support_y, np.float32)


def fastest(work: Callable[[], object], seconds: float = 8.0) -> dict[str, float]:
    """Of a call: seconds of the first, and the least of later ones, by the clock and by the processor."""
    began = time.perf_counter()
    work()
    first, wall, processor = time.perf_counter() - began, float("inf"), float("inf")
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        at, used = time.perf_counter(), time.process_time()
        work()
        wall, processor = min(wall, time.perf_counter() - at), min(processor, time.process_time() - used)
    return {"first": first, "wall": wall, "processor": processor}


def backend() -> dict[str, Any]:
    """Keras's backend of this process."""
    from keras import ops  # type: ignore[import-untyped]

    from tinyfleet.server import simulator
    from tinyfleet.server.simulator.keras_backend import compile_function

    x, y = sines(range(CLIENTS), STEPS * BATCH)
    here, phases = simulator.Backend(MODEL), [Phase(ALL_LAYERS, STEPS, RATE)]
    clients = CLIENTS * (1 if here.devices == ["cpu:0"] else 64)
    x, y = (np.tile(a, (clients // CLIENTS, 1, 1)) for a in (x, y))
    took = fastest(lambda: here.adapt(MODEL.initial(0), x, y, phases, batch=BATCH))
    side = 2048
    square = ops.ones((side, side), "float32")
    product = compile_function(lambda a: ops.sum(ops.matmul(a, a)))
    peak = 2 * side**3 / fastest(lambda: ops.convert_to_numpy(product(square)), 3.0)["wall"]
    operations = 6 * here.network.macs * STEPS * BATCH  # two for a multiply-add, of which a step has three forwards
    return {
        "device": ", ".join(here.devices), "a second": clients / took["wall"],
        "by processor": 2 * clients / took["processor"], "compile": took["first"] - took["wall"],
        "peak": clients / took["wall"] * operations / peak,
    }  # fmt: skip


def adapt(start: Sequence[Array], x: Array, y: Array) -> list[Array]:
    """One client, in NumPy."""
    w1, b1, w2, b2, w3, b3 = (array.copy() for array in start)
    for s in range(STEPS):
        bx, by = x[s * BATCH : (s + 1) * BATCH], y[s * BATCH : (s + 1) * BATCH]
        h1 = np.tanh(bx @ w1.T + b1)
        h2 = np.tanh(h1 @ w2.T + b2)
        d3 = 2 / BATCH * (h2 @ w3.T + b3 - by)
        d2 = d3 @ w3 * (1 - h2 * h2)
        d1 = d2 @ w2 * (1 - h1 * h1)
        for w, b, d, h in ((w3, b3, d3, h2), (w2, b2, d2, h1), (w1, b1, d1, bx)):
            w -= RATE * (d.T @ h)
            b -= RATE * d.sum(0)
    return [w1, b1, w2, b2, w3, b3]


def numpy_loop() -> dict[str, Any]:
    x, y = sines(range(64), STEPS * BATCH)
    start = list(MODEL.split(MODEL.initial(0)).values())
    took = fastest(lambda: [adapt(start, *own) for own in zip(x, y, strict=True)], 4.0)
    return {"device": "cpu", "a second": 64 / took["wall"], "by processor": 2 * 64 / took["processor"]}


def flower() -> dict[str, Any]:
    """Flower's engine with that same NumPy client: the fastest of its rounds."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    nodes, ended = 60, list[float]()
    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        x, y = sines([int(context.node_config["partition-id"])], STEPS * BATCH)
        learned = adapt(message.content.array_records["arrays"].to_numpy_ndarrays(), x[0], y[0])
        metrics = MetricRecord({"num-examples": STEPS * BATCH})
        return Message(RecordDict({"arrays": ArrayRecord(learned), "metrics": metrics}), reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord(list(MODEL.split(MODEL.initial(0)).values()))
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=nodes)
        strategy.start(grid, start, 4, evaluate_fn=lambda *_: ended.append(time.perf_counter()))

    run_simulation(server, client, nodes, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return {"device": "cpu", "a second": nodes / min(b - a for a, b in itertools.pairwise(ended))}


def fleet() -> dict[str, Any]:
    """Megabytes that the process had taken at most after each round, beside what it had before the first."""
    from tinyfleet.server import simulator

    def taken() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    phases = (Phase(4, 8, RATE), Phase(ALL_LAYERS, STEPS, RATE))
    update = UpdateFormat(ALL_LAYERS & ~4, half=True, density=0.1)
    how = simulator.MethodSettings(
        "tinymetafed", phases, phases, clients=FLEET // 100, batch=BATCH, alpha_end=0.0, update=update
    )
    source = simulator.ClientSource(FLEET, lambda _, seeds, count: sines(seeds, count), stores_samples=False)
    begin, after = taken(), list[int]()
    outcome = simulator.simulate(
        simulator.Backend(MODEL), source, how, simulator.initial_parameters(MODEL, how), rounds=ROUNDS,
        on_round=lambda _: after.append(taken()),
    )  # fmt: skip
    seconds = min(this.seconds for this in outcome.rounds)
    return {"device": "cpu", "a second": how.clients / seconds, "before MB": begin, "MB by round": after}


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "tensorflow": backend,
    "jax": backend,
    "numpy": numpy_loop,
    "flower": flower,
    "fleet": fleet,
}


def in_a_process(part: str) -> dict[str, Any]:
    flags = {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }  # as tinyfleet run simulate
    environment = {**flags, **os.environ}
    if part in ("tensorflow", "jax"):
        environment["KERAS_BACKEND"] = part
    root = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, __file__, "--part", part]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="leave out the others")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return
    found = {part: in_a_process(part) for part in options.only or PARTS}
    if options.json:
        print(json.dumps(found))
        return
    console = Console(highlight=False)
    table = Table("", "device", "clients a second", "by processor", "compile, s", "peak", title="Adaptations")
    for part, row in found.items():
        shown = (("a second", ",.0f"), ("by processor", ",.0f"), ("compile", ".1f"), ("peak", ".1%"))
        numbers = [format(row[key], form) if key in row else "" for key, form in shown]
        table.add_row(part, row.get("device", str(row.get("failed"))), *numbers)
    console.print(table)
    if "MB by round" in (memory := found.get("fleet", {})):
        console.print(
            f"a fleet of {FLEET:,}, {FLEET // 100:,} a round: {memory['before MB']} MB before the first, at most "
            f"{', '.join(map(str, memory['MB by round']))} MB by the end of each"
        )


if __name__ == "__main__":
    main()
