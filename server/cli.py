"""The commands `tinyfleet run`, `tinyfleet deploy` and `tinyfleet demo`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import (
    CONNECTION,
    DATA,
    FLEET_SIZE,
    ClientsOption,
    CommandGroup,
    Connection,
    DataOption,
    DevicesOption,
    FleetOption,
    InitializationOption,
    JsonOption,
    RoundsOption,
    SeedOption,
    SelectOption,
    StrategyOption,
    TaskOption,
    check_output,
    out_option,
    with_connection,
)
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import fleet_of, require_server

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console

    from tinyfleet.edge.model.program import Program
    from tinyfleet.server.evaluate import Score
    from tinyfleet.server.simulator import SimulationResult
    from tinyfleet.server.training_run import Round

run_app = CommandGroup("""Train a model with the fleet, or by simulation.

Examples:
  tinyfleet run start --task digits --rounds 20
  tinyfleet run simulate --task digits --out initialization.npz
""")


@run_app.command("start")
@with_connection
def start_run(
    strategy: StrategyOption = "tinymetafed",
    task: TaskOption = "digits",
    rounds: RoundsOption = 20,
    clients_per_round: ClientsOption = 5,
    select: SelectOption = "clients",
    initialization: InitializationOption = None,
    out: Annotated[Path | None, out_option("FILE.npz")] = None,
    round_timeout: Annotated[
        float, typer.Option("--round-timeout", metavar="SECONDS", min=0.1, max=1e8, help="Maximum duration of a round.")
    ] = 60.0,
    max_norm_ratio: Annotated[
        float | None,
        typer.Option(
            "--max-norm-ratio",
            metavar="FACTOR",
            min=1,
            help="Refuse a device's change that is more than this many times as long as the round's median.",
            show_default="the task's",
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            max=1e8,
            help="How long to wait for enough devices before the first round.",
        ),
    ] = 10.0,
    seed: SeedOption = 0,
    asynchronous: Annotated[
        bool,
        typer.Option("--asynchronous", help="Apply each update as it arrives; --rounds then counts updates."),
    ] = False,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            metavar="SHARE",
            min=0,
            max=1,
            help="Share of the parameter changes that a device sends.",
            show_default="the task's",
        ),
    ] = None,
    local_head: Annotated[
        bool | None,
        typer.Option(
            "--local-head/--no-local-head", help="TinyMetaFed: keep the model's head on the device.", show_default="on"
        ),
    ] = None,
    anneal: Annotated[
        bool | None,
        typer.Option("--anneal/--no-anneal", help="TinyMetaFed: lower the server's learning rate.", show_default="on"),
    ] = None,
    proximal_mu: Annotated[
        float | None,
        typer.Option(
            "--proximal-mu", metavar="MU", min=0, help="FedProx: weight of the proximal term.", show_default="0.1"
        ),
    ] = None,
    dp_clip_norm: Annotated[
        float,
        typer.Option(
            "--dp-clip-norm",
            metavar="NORM",
            min=0,
            help="Differential privacy: maximum L2 norm of a device's change; 0 turns it off.",
        ),
    ] = 0.0,
    dp_noise_multiplier: Annotated[
        float | None,
        typer.Option(
            "--dp-noise-multiplier",
            metavar="FACTOR",
            min=0,
            help="Differential privacy: standard deviation of the noise, as a multiple of --dp-clip-norm.",
            show_default="1",
        ),
    ] = None,
    dp_on_device: Annotated[
        bool,
        typer.Option("--dp-on-device", help="Clip on the devices: the server never sees an unclipped change."),
    ] = False,
    connection: Connection = CONNECTION,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Train on the devices that a query selects, in rounds.

    Strategies: tinymetafed, tinyreptile (one device at a time), reptile, fomaml, or one of Flower's, such as fedavg or
    krum. --density is for tinymetafed and Flower's. With --json, there is a line for each round and a last one.

    Examples:
      tinyfleet run start
      tinyfleet run start --strategy fedavg --rounds 10 --clients-per-round 8
      tinyfleet run start --strategy reptile --asynchronous --rounds 100
      tinyfleet run start --strategy fedavg --dp-clip-norm 1
      tinyfleet run start --select my-clients.rq --out initialization.npz
    """
    from rich.console import Console

    from tinyfleet.edge import tasks
    from tinyfleet.ontology.cli import read_query
    from tinyfleet.ontology.store.data_folder import remote_store
    from tinyfleet.ontology.vocabulary.namespaces import fleet_name
    from tinyfleet.server import run_report
    from tinyfleet.server.array_files import save_arrays
    from tinyfleet.server.evaluate import baselines
    from tinyfleet.server.flower.internals import log_level
    from tinyfleet.server.named_strategies import StrategyOptions, make_strategy
    from tinyfleet.server.training_run import run as run_rounds

    log_level(logging.ERROR)  # the rounds are shown below
    check_output(out)
    learning_task = tasks.load(task)
    options = StrategyOptions(
        local_head,
        anneal,
        density,
        proximal_mu,
        asynchronous,
        dp_clip_norm,
        dp_noise_multiplier,
        dp_on_device,
        max_norm_ratio,
    )
    named_strategy = make_strategy(
        strategy, learning_task, rounds=rounds, clients=clients_per_round, seed=seed, options=options
    )
    parameters = None if initialization is None else _parameters(initialization, learning_task.program)
    connection.join(data)
    server = require_server(data)
    sparql = read_query(select)
    console = Console(highlight=False, quiet=as_json)
    with (
        remote_store(server) as store,
        run_report.Rounds(console, named_strategy.name, rounds) as bar,
    ):
        outcome = run_rounds(
            learning_task,
            named_strategy,
            broker=connection.find(data, fleet_name(fleet_of(fleet, data))),
            fleet=fleet_name(fleet_of(fleet, data)),
            store=store,
            rounds=rounds,
            query=sparql,
            initialization=parameters,
            seed=seed,
            clients=clients_per_round,
            wait=wait,
            timeout=round_timeout,
            on_round=_print_round if as_json else bar,
        )
    if out is not None:
        save_arrays(out, learning_task.program.split(outcome.parameters))
    scores = baselines(learning_task, outcome.parameters, seed=seed)
    if as_json:
        means = {name: {str(s.shots): s.mean for s in row} for name, row in scores.items()}
        metric = scores["learned"][0].metric
        typer.echo(json.dumps({"run": outcome.run, f"{metric.replace(' ', '-')}-by-shots": means}))
    else:
        console.print(run_report.scores(scores))
        console.print(f"run {outcome.run}; its lineage: tinyfleet query lineage --data {data}")


def _print_round(ended: Round) -> None:
    from tinyfleet.server.run_report import round_json

    typer.echo(json.dumps(round_json(ended)))


@run_app.command()
def simulate(
    task: TaskOption = "digits",
    strategy: StrategyOption = "reptile",
    rounds: RoundsOption = 200,
    clients_per_round: ClientsOption = 16,
    fleet_size: Annotated[int | None, FLEET_SIZE] = None,
    shots: Annotated[int, typer.Option("--shots", metavar="K", min=1, help="Labelled samples per class.")] = 10,
    initialization: InitializationOption = None,
    out: Annotated[Path | None, out_option("FILE.npz")] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint", metavar="FILE.npz", help="Save the state in this file; resume from it if it exists."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int, typer.Option("--checkpoint-every", metavar="N", min=1, help="Rounds between checkpoints.")
    ] = 50,
    held_out_tasks: Annotated[
        int, typer.Option("--held-out-tasks", metavar="N", min=1, help="Number of held-out tasks to evaluate on.")
    ] = 500,
    mixed_precision: Annotated[
        bool, typer.Option("--mixed-precision", help="Compute in bfloat16; parameters stay float32.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compute with the C engine, bit-identical to a device.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Where to draw the learning curve.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Train with simulated clients, many at once, on GPUs or the CPU.

    Clients are tasks drawn with --shots samples per class, or with --fleet-size the devices of a fleet. TensorFlow
    computes, or JAX with KERAS_BACKEND=jax.

    Strategies: tinymetafed, tinyreptile (one client at a time), reptile, fomaml, fedavg, fedprox, fedavg-finetuned,
    tinyol, scratch.

    Examples:
      tinyfleet run simulate --task digits --out initialization.npz
      tinyfleet run simulate --task omniglot --strategy tinymetafed --fleet-size 100
      KERAS_BACKEND=jax tinyfleet run simulate --task omniglot --checkpoint run.npz
      tinyfleet run start --initialization initialization.npz
    """
    # The clients are shared by cores; threads of their own for small products of matrices cost a quarter of the speed.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    from rich.console import Console

    from tinyfleet.edge import tasks
    from tinyfleet.server import run_report, simulator
    from tinyfleet.server.array_files import save_arrays
    from tinyfleet.server.evaluate import QUERIES, SHOTS, Score

    check_output(out, checkpoint, plot)
    learning_task = tasks.load(task)
    try:  # before the rounds, not after them
        if fleet_size is None:
            learning_task.draw("training", [seed], shots, 1)
        learning_task.draw("held_out", [seed], max(SHOTS), QUERIES)
    except ValueError as error:
        raise UserError(f"{task}: {error}; lower --shots, or choose a task with more samples") from error
    named_strategy = simulator.strategy_settings(strategy, learning_task, clients=clients_per_round)
    backend = simulator.Backend(learning_task.program, precision="mixed" if mixed_precision else "float32", exact=exact)
    if initialization is None:
        parameters = simulator.initial_parameters(learning_task.program, named_strategy, seed)
    else:
        parameters = _parameters(initialization, learning_task.program)
    if fleet_size is None:
        source = simulator.server_tasks(learning_task, shots)
    else:
        source = simulator.simulated_fleet(learning_task, fleet_size)
    console = Console(highlight=False, quiet=as_json)
    console.print(f"{strategy} on {task}; computed on {', '.join(backend.devices)}")
    with _simulated_rounds(console, strategy, rounds) as bar:
        outcome = simulator.simulate(
            backend,
            source,
            named_strategy,
            parameters,
            rounds=rounds,
            seed=seed,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            on_round=_print_simulated_round if as_json else bar,
        )
    if out is not None:
        save_arrays(out, learning_task.program.split(outcome.parameters))

    def score(vector: NDArray[np.float32], shots: int) -> Score:
        values = simulator.evaluate(
            backend,
            learning_task.draw,
            vector,
            named_strategy.adapts,
            shots=shots,
            tasks=held_out_tasks,
            queries=QUERIES,
            seed=seed,
        )
        return Score(shots, values, "mean squared error" if learning_task.program.loss == "mse" else "accuracy")

    initializations = {"learned": outcome.parameters, "random": learning_task.program.initial(seed)}
    scores = {name: [score(vector, k) for k in SHOTS] for name, vector in initializations.items()}
    if plot is not None:
        run_report.plot(plot, f"{strategy} on {task}", {"learned": outcome.rounds}, scores, by_round=True)
    if as_json:
        means = {name: {s.shots: s.mean for s in row} for name, row in scores.items()}
        typer.echo(json.dumps({"devices": backend.devices, "held-out-by-shots": means}))
    else:
        console.print(run_report.scores(scores))


@contextmanager
def _simulated_rounds(console: Console, name: str, rounds: int) -> Iterator[Callable[[SimulationResult], None]]:
    """Shows the rounds of a simulation as they end: a bar on a terminal, else ten lines. Call it with the result."""
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task(name, total=rounds)

        def report(so_far: SimulationResult) -> None:
            this = so_far.rounds[-1]
            bar.update(shown, completed=this.number, description=f"{name}, loss {this.loss:.3f}")
            if not console.is_terminal and this.number % -(-rounds // 10) == 0:
                console.print(f"round {this.number}/{rounds}: loss {this.loss:.3f}, up {this.bytes_up} B")

        yield report


def _print_simulated_round(so_far: SimulationResult) -> None:
    typer.echo(json.dumps(asdict(so_far.rounds[-1])))


def _parameters(path: Path, program: Program) -> NDArray[np.float32]:
    import numpy as np

    from tinyfleet.edge.errors import ProgramError
    from tinyfleet.edge.files import read_npz

    advice = "give a file that `tinyfleet run start --out` wrote"
    try:
        vector = program.join(read_npz(path, 16 * program.n_params + (1 << 20), advice))  # they may be of 64 bits
        if not np.isfinite(vector).all():
            raise ValueError("numbers in it are not finite")
        return vector
    except ProgramError as error:
        raise UserError(f"{path} has other parameters than the model ({error}); give a file of the same task") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} has no parameters ({error}); {advice}") from None


def demo(
    task: TaskOption = "digits",
    rounds: RoundsOption = 40,
    clients_per_round: ClientsOption = 8,
    devices: DevicesOption = 12,
    no_board: Annotated[bool, typer.Option("--no-board", help="Leave out the emulated Cortex-M4F board.")] = False,
    data: DataOption = DATA / "demo",
    seed: SeedOption = 0,
) -> None:
    """Run a whole fleet on this machine.

    It starts a server, virtual devices, an agent and an emulated board, trains with two strategies and shows the
    results. What an earlier demo left in the data folder is deleted.

    Examples:
      tinyfleet demo
      tinyfleet demo --task omniglot --rounds 60
    """
    from tinyfleet.server.demo import run_demo

    run_demo(
        task_name=task,
        rounds=rounds,
        clients=clients_per_round,
        devices=devices,
        board=not no_board,
        data=data,
        seed=seed,
    )


@with_connection
def deploy(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.mote", help="A program, as `tinyfleet model compile` writes it.")
    ],
    select: SelectOption = "runnable",
    yes: Annotated[bool, typer.Option("--yes", help="Send the model. Without it, only show the devices.")] = False,
    device_timeout: Annotated[
        float,
        typer.Option("--device-timeout", metavar="SECONDS", min=0.1, max=1e8, help="How long to wait for each device."),
    ] = 60.0,
    test_samples: Annotated[
        int,
        typer.Option("--test-samples", metavar="N", min=0, max=1_000_000, help="Samples to score the model on first."),
    ] = 0,
    probation: Annotated[
        int,
        typer.Option("--probation", metavar="N", min=0, max=1_000_000, help="Samples to learn before it is confirmed."),
    ] = 0,
    max_loss: Annotated[
        float,
        typer.Option("--max-loss", metavar="LOSS", min=0, help="Mean loss at most, or a device goes back; 0: any."),
    ] = 0.0,
    connection: Connection = CONNECTION,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Send a model over the air to the devices that a query selects.

    Devices that have no memory for the model, run it already or are offline are excluded. A device tries the model
    before it keeps it, and goes back to the one before if it does worse than it may. The exit status is 1 if a device
    runs another model.

    Examples:
      tinyfleet deploy model.mote
      tinyfleet deploy model.mote --test-samples 100 --max-loss 0.5 --yes
      tinyfleet deploy model.mote --select drifted --yes
      tinyfleet deploy model.mote --select my-devices.rq --yes --json
    """
    from rich.console import Console

    from tinyfleet.ontology.cli import read_query
    from tinyfleet.ontology.queries import library
    from tinyfleet.ontology.store.data_folder import remote_store
    from tinyfleet.ontology.vocabulary.namespaces import fleet_name
    from tinyfleet.server import deployment as deployments
    from tinyfleet.server import deployment_report

    program = deployments.read_program(model)
    connection.join(data)
    server = require_server(data)
    sparql = read_query(select)
    name = fleet_name(fleet_of(fleet, data))
    address = connection.find(data, name)
    console = Console(highlight=False, quiet=as_json)
    with remote_store(server) as store:
        plan = deployments.plan_deployment(store, program, model.stem, sparql, name)
        summary: dict[str, object] = {
            "model": plan.model,
            "targets": [match.device for match in plan.targets],
            "excluded": dict(plan.excluded),
        }
        deployment_report.print_deployment_plan(console, model, program, plan)
        if not yes:
            console.print("Nothing was sent. To send it, add --yes", soft_wrap=True)
            ended = None
        else:
            with deployment_report.Results(console, len(plan.targets)) as on_result:
                ended = deployments.deploy(
                    store,
                    program,
                    plan,
                    broker=address,
                    fleet=name,
                    selected_by=select if select in library.names() else sparql,
                    timeout=device_timeout,
                    trial=deployments.TrialConditions(test_samples, probation, max_loss),
                    on_result=on_result,
                )
            summary |= {"deployment": ended.iri, "results": [asdict(result) for result in ended.results]}
            deployment_report.print_result(console, ended)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    runs_it = [] if ended is None else ended.devices("confirmed") + ended.devices("on trial")
    if ended is not None and not runs_it + ended.devices("failed"):
        typer.echo("error: no device replied; none is known to run the model", err=True)
    if ended is not None and len(runs_it) < len(plan.targets):
        raise typer.Exit(1)
