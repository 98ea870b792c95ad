"""`tinyfleet demo`: a complete fleet on this machine, from devices that announce themselves to results.

The devices are processes of their own, started with the commands that users start them with.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from tinyfleet.edge import tasks
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import Task
from tinyfleet.ontology.cli import print_rows
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.vocabulary.namespaces import Iri, model_iri
from tinyfleet.server import run_report
from tinyfleet.server.evaluate import SHOTS, one_pass
from tinyfleet.server.fleet_server import FleetServer
from tinyfleet.server.flower.internals import log_level
from tinyfleet.server.mosquitto import find_program
from tinyfleet.server.named_strategies import make_strategy
from tinyfleet.server.training_run import Round, RunResult, run

FLEET = "demo"
BOARD = "mps2-an386"
ANNOUNCE_TIMEOUT = 45.0


def run_demo(*, task_name: str, rounds: int, clients: int, devices: int, board: bool, data: Path, seed: int) -> None:
    """Runs a whole fleet on this machine, and prints what it does and learns.

    Parameters
    ----------
    task_name
        What is learned.
    rounds
        Rounds of each strategy.
    clients
        Devices that take part in a round.
    devices
        Virtual devices; an agent and, if `board`, an emulated board come on top.
    board
        Build firmware and run it on an emulated Cortex-M4F.
    data
        Folder for the graph and the plot; what an earlier demo left there is deleted.
    seed
        Of the initial parameters, the tasks and the selection of clients.

    Raises
    ------
    UserError
        If the folder holds anything else than an earlier demo, or a device does not start.
    """
    console = Console(highlight=False)
    log_level(logging.ERROR)  # the rounds are shown below
    began = time.monotonic()
    task = tasks.load(task_name)
    _clear(data)
    with ExitStack() as stack:
        log_lines = threading.Event()
        insecure = find_program() is None  # amqtt, this machine alone: a demo is all that it is for
        server = stack.enter_context(
            FleetServer(data, FLEET, port=0, operator_port=0, insecure=insecure, on_log=lambda _: log_lines.set())
        )
        console.print(f"broker      {server.broker_kind} on {server.device_broker.url}")
        if insecure:
            console.print("            without encryption and identities: mosquitto is not installed")
        console.print(f"graph       {data}, SPARQL at {server.endpoint}")
        emulator = why_no_board() if board else "--no-board was given"
        fleet = _Fleet(task, devices, board=emulator is None, data=data)
        stack.enter_context(fleet.running())
        console.print(f"devices     {devices} virtual ones: the C node and engine, natively, an MQTT session each")
        if emulator is None:
            console.print(f"            1 {BOARD} in QEMU: the same C as firmware, behind its UART and a gateway")
        else:
            console.print(f"            no emulated board: {emulator}")
        console.print("            1 Python agent, as on a Raspberry Pi")
        _wait_until_announced(server, log_lines, fleet)
        console.print(f"            all {fleet.size} announced themselves; their descriptions passed the shapes\n")

        sparql = library.text("clients")
        console.print("The clients of every round are what this query selects:")
        console.print(Syntax(sparql.strip(), "sparql", background_color="default", word_wrap=True))
        console.print()

        runs = {
            name: _learn(
                console, server, task, strategy, rounds, clients, seed, began if name == "TinyMetaFed" else None
            )
            for name, strategy in (("TinyMetaFed", "tinymetafed"), ("FedAvg", "fedavg"))
        }
        initializations = {
            "meta-learned (TinyMetaFed)": runs["TinyMetaFed"].parameters,
            "random weights": task.program.initial(seed),
            "random weights, head at 0": runs["TinyMetaFed"].initialization,  # better at few shots
            "FedAvg's global model": runs["FedAvg"].parameters,
        }
        with console.status("adapting every initialization to held-out tasks"):
            results = {
                name: [one_pass(task, parameters, shots=shots, seed=seed) for shots in SHOTS]
                for name, parameters in initializations.items()
            }
        console.print()
        console.print(run_report.scores(results))
        console.print(_costs(task, runs))
        picture = data / f"{task.name}.png"
        run_report.plot(
            picture,
            f"{task.name}: {fleet.size} devices, {rounds} rounds",
            {name: outcome.rounds for name, outcome in runs.items()},
            results,
        )
        console.print(f"\nplot        {picture}\n")

        model = model_iri(task.program.model_id)
        number = runs["TinyMetaFed"].run
        questions: tuple[tuple[str, str, dict[str, Iri | int]], ...] = (
            ("Which devices can train this model?", "trainable", {"model": model}),
            ("Which ran the last round, and with what loss?", "last-round", {"run": number}),
            ("Where does the model come from?", "lineage", {"run": number}),
        )
        for question, query, parameters in questions:
            options = "".join(f" --param {name}={value}" for name, value in parameters.items())
            console.print(f"[bold]{question}[/]  tinyfleet query {query}{options} --data {data}", soft_wrap=True)
            print_rows(server.store.query(library.text(query), **parameters), most=14)
            console.print()
    console.print(f"done in {time.monotonic() - began:.0f} s")


def _clear(data: Path) -> None:
    """Empties the folder of an earlier demo. Raises UserError if it holds anything else."""
    mark = data / "demo.txt"
    if data.exists() and not mark.exists() and any(data.iterdir()):
        raise UserError(f"{data} is not empty, and not of an earlier demo; name another folder with --data")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    mark.write_text("Written by `tinyfleet demo`. The next demo in this folder deletes it.\n")


# ------------------------------------------------------------------------------------------------------------- devices


@dataclass(frozen=True)
class _Fleet:
    """The processes of the demo's devices. Every device has a client index of its own, and so its own samples."""

    task: Task
    virtual: int
    board: bool
    data: Path

    @property
    def size(self) -> int:
        return self.virtual + 1 + self.board

    def commands(self) -> list[list[str]]:
        """Each device's command line."""
        common = ["--fleet", FLEET, "--task", self.task.name, "--fleet-size", str(self.size), "--data", str(self.data)]
        virtual = ["device", "simulate", "--devices", str(self.virtual), "--first-index", "0", *common]
        agent = ["agent", "start", "--device-id", "pi", "--client-index", str(self.virtual), *common]
        return [virtual, agent]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Starts the devices, and stops them at the end. Their output goes to files in the data folder."""
        with ExitStack() as stack:
            for command in self.commands():
                stack.enter_context(_process(command, self.data / f"{command[0]}.log"))
            if self.board:
                image = self.data / "firmware"
                build = ["firmware", "build", "--board", BOARD, "--task", self.task.name, "--fleet", FLEET]
                build += [
                    "--client-index",
                    str(self.virtual + 1),
                    "--fleet-size",
                    str(self.size),
                    "--device-id",
                    "board",
                    "--out",
                    str(image),
                ]
                built = subprocess.run(_tinyfleet(build), capture_output=True, text=True, check=False)
                if built.returncode:
                    raise UserError(f"the firmware could not be built: {built.stderr.strip()}; go on with --no-board")
                start = ["firmware", "emulate", str(image / "firmware.elf"), "--gateway"]
                stack.enter_context(_process([*start, "--data", str(self.data)], self.data / "board.log"))
            yield


def _tinyfleet(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "tinyfleet", *command]


@contextmanager
def _process(command: Sequence[str], log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(_tinyfleet(command), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def why_no_board() -> str | None:
    """What is missing on this machine to emulate the board, and how to install it; None if nothing."""
    tools = {"arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi", "qemu-system-arm": "qemu-system-arm"}
    missing = [tool for tool in tools if shutil.which(tool) is None]
    packages = " ".join(tools[tool] for tool in missing)
    return f"{' and '.join(missing)} not installed (apt-get install {packages})" if missing else None


def _wait_until_announced(server: FleetServer, log_lines: threading.Event, fleet: _Fleet) -> None:
    announced = f"""PREFIX tf: <https://w3id.org/tinyfleet#>
        SELECT ?id {{ ?device tf:fleet "{FLEET}" ; tf:deviceId ?id ; tf:board ?board ; tf:online true }}"""
    deadline = time.monotonic() + ANNOUNCE_TIMEOUT
    while True:
        log_lines.clear()
        there = len(server.store.query(announced))
        if there >= fleet.size:
            return
        if not log_lines.wait(deadline - time.monotonic()):
            logs = ", ".join(str(path) for path in sorted(fleet.data.glob("*.log")))
            raise UserError(
                f"only {there} of {fleet.size} devices announced themselves in {ANNOUNCE_TIMEOUT:.0f} s; see {logs}"
            )


# ------------------------------------------------------------------------------------------------------------ learning


def _learn(
    console: Console,
    server: FleetServer,
    task: Task,
    strategy: str,
    rounds: int,
    clients: int,
    seed: int,
    began: float | None,
) -> RunResult:
    """Trains with one strategy. `began`: when the demo was started, if this is its first run."""
    named_strategy = make_strategy(strategy, task, rounds=rounds, clients=clients, seed=seed)
    with run_report.Rounds(console, named_strategy.name, rounds) as progress:

        def on_round(ended: Round) -> None:
            if began is not None and ended.number == 1:
                console.print(f"first round {time.monotonic() - began:.1f} s after the start")
            progress(ended)

        return run(
            task,
            named_strategy,
            broker=server.broker,
            fleet=FLEET,
            store=server.store,
            rounds=rounds,
            seed=seed,
            clients=clients,
            on_round=on_round,
        )


def _costs(task: Task, runs: dict[str, RunResult]) -> Table:
    table = Table(title="What a round costs a device")
    for column in ("", "bytes up", "of the dense float32 size", "RAM of the engine", "of it beside the parameters"):
        table.add_column(column, justify="right" if column else "left")
    dense = 4 * task.program.n_params
    for name, outcome in runs.items():
        sent = [part.bytes_up for ended in outcome.rounds for part in ended.participations if part.bytes_up]
        mean = sum(sent) / len(sent) if sent else float("nan")
        ram = max(ended.arena_bytes or 0 for ended in outcome.rounds)  # as the devices say
        beside = ram - dense
        table.add_row(name, f"{mean:,.0f} B", f"{mean / dense:.1%} of {dense:,} B", f"{ram:,} B", f"{beside:,} B")
    return table
