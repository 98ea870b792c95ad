"""Serial visits a second, and seconds until the first one is over: TinyReptile on virtual devices over a real broker.

python benchmarks/rounds.py [--task digits] [--steps 16] [--visits 1000] [--devices 8]

A visit is everything that TinyReptile does with one client: the weights are published and the device asked, it learns
`steps` samples in the C engine, replies with all of its weights, the server moves the start, and what was published is
taken back. The next visit begins when all of it is done. Broker (mosquitto), devices and server are a process each. On
a busy machine the CPU's seconds say more than those of the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tinyfleet.edge.wire.broker_address import BrokerAddress

FLEET = "rounds"


def visits(task_name: str, broker: BrokerAddress, steps: int, count: int, devices: int) -> dict[str, Any]:
    """What a process that has just started does: imports, the first round, then `count` more."""
    from tinyfleet.edge import tasks
    from tinyfleet.edge.wire.flower_records import vector_to_arrays
    from tinyfleet.server.flower.grid import MqttGrid
    from tinyfleet.server.flower.internals import log_level
    from tinyfleet.server.flower.strategies import TinyReptile

    log_level(40)
    task = tasks.load(task_name)
    ended: list[float] = []
    used: list[float] = []
    strategy = TinyReptile(steps=steps, beta=0.01)
    with MqttGrid(broker, FLEET, task.program) as grid:
        grid.wait_for_nodes(1, 10)
        grid.wait_for_nodes(devices, 10)
        start = vector_to_arrays(task.program.initial(0), task.program)

        def close(_number: int, _arrays: object) -> None:
            ended.append(time.time())
            used.append(time.process_time())

        strategy.start(grid, start, count + 1, 60, evaluate_fn=close)
        traffic = grid.traffic
    return {
        "first": ended[1],  # ended[0] is the start itself
        "first-cpu": used[1],
        "rate": (len(ended) - 2) / (ended[-1] - ended[1]),
        "cpu": (used[-1] - used[1]) / (len(used) - 2),
        "up": traffic.bytes_up / count,
        "down": traffic.bytes_down / count,
        "tensorflow": "tensorflow" in sys.modules,
    }


def measure(task: str, steps: int, count: int, devices: int, runs: int) -> list[dict[str, Any]]:
    """The same with a broker and devices around it, `runs` times; `first` in seconds since the process was started."""
    from tinyfleet.server.broker import Broker
    from tinyfleet.server.commands.counters import Counters
    from tinyfleet.server.commands.service import CommandService

    results = []
    with ExitStack() as stack:
        folder, counting = (stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(2))
        broker = stack.enter_context(Broker(0, Path(folder), kind="mosquitto"))
        where = broker.address.url
        stack.enter_context(
            CommandService(
                broker.address,
                FLEET,
                name="commands",
                next_counter=Counters(Path(counting) / "counter").next,
                signer=None,
                may_command=lambda _token: True,
                takes_keyless=True,
            )
        )
        command = [sys.executable, "-m", "tinyfleet", "device", "simulate", "--devices", str(devices), "--task", task]
        fleet = subprocess.Popen(
            [*command, "--fleet", FLEET, "--broker", where, "--insecure"], stdout=subprocess.PIPE, text=True
        )
        stack.callback(fleet.wait)
        stack.callback(fleet.terminate)
        assert fleet.stdout is not None
        for _ in range(devices):
            fleet.stdout.readline()
        again = [sys.executable, __file__, "--inside", where, "--task", task, "--steps", str(steps)]
        for _ in range(runs):
            began = time.time()
            said = subprocess.run(
                [*again, "--visits", str(count), "--devices", str(devices)], check=True, capture_output=True, text=True
            )
            results.append(json.loads(said.stdout))
            results[-1]["first"] -= began
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="digits")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--visits", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--inside", metavar="URL", help="be the server's process (the benchmark starts it)")
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(visits(args.task, BrokerAddress.parse(args.inside), args.steps, args.visits, args.devices)))
        return
    results = measure(args.task, args.steps, args.visits, args.devices, args.runs)
    best = max(results, key=lambda result: float(result["rate"]))
    what = f"TinyReptile, {args.task}, {args.steps} steps a visit, {args.devices} devices"
    table = Table("what", "best", "all runs")
    table.add_row("visits a second", f"{best['rate']:.0f}", ", ".join(f"{r['rate']:.0f}" for r in results))
    firsts = [r["first"] for r in results]
    table.add_row("s from start to first round", f"{min(firsts):.2f}", ", ".join(f"{first:.2f}" for first in firsts))
    cpu = [1000 * r["cpu"] for r in results]
    table.add_row("ms of the server's CPU a visit", f"{min(cpu):.2f}", ", ".join(f"{c:.2f}" for c in cpu))
    cpu = [r["first-cpu"] for r in results]
    table.add_row("s of its CPU to first round", f"{min(cpu):.2f}", ", ".join(f"{c:.2f}" for c in cpu))
    table.add_row("bytes up, down a visit", f"{best['up']:.0f}, {best['down']:.0f}", "")
    table.add_row("TensorFlow imported", "yes" if any(r["tensorflow"] for r in results) else "no", "")
    console = Console(highlight=False)
    console.print(f"{what}, mosquitto on loopback")
    console.print(table)


if __name__ == "__main__":
    main()
