"""The commands of the server: `tinyfleet server`, `tinyfleet run` and `tinyfleet deploy`."""

import json
import logging
import os
import signal
import threading
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated
from zipfile import BadZipFile

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from tinyfleet.edge import tasks
from tinyfleet.edge.cli import BrokerOption, DataOption, TaskOption, broker_address
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program, ProgramError
from tinyfleet.ontology.cli import find_server, read_query
from tinyfleet.ontology.queries import library
from tinyfleet.ontology.store.store import RemoteStore
from tinyfleet.ontology.vocabulary.namespaces import fleet_name


def server(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the broker to start; 0: a free one.")] = 1883,
    broker: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Use this broker instead of starting one.")
    ] = None,
    endpoint_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the SPARQL endpoint, on loopback; 0: a free one.")
    ] = 0,
    fleet: Annotated[str, typer.Option(help="The fleet's name.")] = "home",
    data: Annotated[Path, typer.Option(help="Folder of the graph, and of what others need to find the server.")] = Path(
        ".tinyfleet"
    ),
) -> None:
    """Run the fleet's server, until interrupted: broker, registry, knowledge graph and, over HTTP on loopback, SPARQL,
    the query page and the Thing Description Directory.

    \b
    Examples:
      tinyfleet server
      tinyfleet server --port 0 --fleet greenhouse --data /var/lib/tinyfleet
      tinyfleet server --broker 192.168.1.5:1883
    """
    from tinyfleet.server.fleet_server import FleetServer

    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    given = None if broker is None else broker_address(broker, data)
    logging.getLogger("tinyfleet.ontology.ingest.registry").setLevel(logging.ERROR)  # refusals are news, below
    with FleetServer(
        data, fleet, broker=given, port=port, endpoint_port=endpoint_port, on_log=lambda line: typer.echo(line)
    ) as running:
        typer.echo(f"broker:   {running.broker_kind} on {running.broker[0]}:{running.broker[1]}")
        typer.echo(f"endpoint: {running.endpoint}")
        typer.echo(f"page:     {running.address}/")
        typer.echo(f"things:   {running.address}/things")
        typer.echo(f"ready: fleet '{fleet}', data in {data}")
        while not stopped.wait(1.0):  # a wait without end would not let signals through everywhere
            pass
    typer.echo("stopped")


def run(
    strategy: Annotated[
        str,
        typer.Option(help="tinymetafed, tinyreptile, reptile, fomaml, or one of Flower's, such as fedavg or krum."),
    ] = "tinymetafed",
    task: TaskOption = "digits",
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 20,
    clients: Annotated[int, typer.Option(min=1, help="Devices a round (TinyReptile: one at a time).")] = 5,
    select: Annotated[
        str, typer.Option(help="Who may take part: a SPARQL file with a column ?id, or a query of the library.")
    ] = "clients",
    start: Annotated[
        Path | None, typer.Option(help="Parameters to begin with (.npz, as --out writes them). Default: random.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the learned parameters (.npz).")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a round may take.")] = 60.0,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for that many devices, at first.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the first parameters, the tasks and the choice of devices.")] = 0,
    asynchronous: Annotated[
        bool, typer.Option("--asynchronous", help="No rounds: each update counts when it comes; --rounds of them.")
    ] = False,
    density: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="TinyMetaFed and Flower's: share of the changes that is sent. Default: the task's."
        ),
    ] = None,
    local: Annotated[
        bool | None,
        typer.Option(
            "--local/--no-local", help="TinyMetaFed: whether the head stays on the devices. Default: it does."
        ),
    ] = None,
    anneal: Annotated[
        bool | None,
        typer.Option("--anneal/--no-anneal", help="TinyMetaFed: whether the server's rate falls. Default: it does."),
    ] = None,
    mu: Annotated[float | None, typer.Option(min=0, help="FedProx: weight of the proximal term. Default: 0.1.")] = None,
    dp_clip: Annotated[
        float, typer.Option(min=0, help="Differential privacy: largest norm of a device's change. 0: none of it.")
    ] = 0.0,
    dp_noise: Annotated[
        float | None, typer.Option(min=0, help="Its noise on the sum, in units of --dp-clip. Default: 1.")
    ] = None,
    dp_on_device: Annotated[
        bool, typer.Option("--dp-on-device", help="The devices clip, so that the server sees no change as it was.")
    ] = False,
    broker: BrokerOption = None,
    fleet: Annotated[str | None, typer.Option(help="The fleet's name. Default: the running server's.")] = None,
    data: DataOption = Path(".tinyfleet"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each round, and one more.")] = False,
) -> None:
    """Run rounds of federated (meta-)learning on the devices that a query selects, with the running server's graph.

    \b
    Examples:
      tinyfleet run
      tinyfleet run --strategy fedavg --rounds 10 --clients 8
      tinyfleet run --strategy reptile --asynchronous --rounds 100
      tinyfleet run --strategy fedavg --dp-clip 1 --dp-noise 0.5
      tinyfleet run --select my-clients.rq --out start.npz
    """
    from tinyfleet.server import run_report
    from tinyfleet.server.evaluate import baselines
    from tinyfleet.server.flower.internals import log_level
    from tinyfleet.server.named_strategies import StrategyOptions, make_strategy
    from tinyfleet.server.training_run import Round
    from tinyfleet.server.training_run import run as run_rounds

    log_level(logging.ERROR)  # the rounds are shown below
    if out is not None and not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} into; make it, or choose another --out")
    learning_task = tasks.load(task)
    options = StrategyOptions(local, anneal, density, mu, asynchronous, dp_clip, dp_noise, dp_on_device)
    named_strategy = make_strategy(strategy, learning_task, rounds=rounds, clients=clients, seed=seed, options=options)
    initialization = None if start is None else _parameters(start, learning_task.program)
    found = find_server(data)
    if not found:
        raise UserError(f"no server runs on {data}; start one with `tinyfleet server --data {data}`")
    sparql = read_query(select)
    console = Console(highlight=False, quiet=as_json)

    def report(this: Round) -> None:
        line = {
            "round": this.number, "asked": this.selected, "clients": [part.device for part in this.participations],
            "staleness": [part.staleness for part in this.participations], "lost": dict(this.no_reply),
            "loss": this.loss, "accuracy": this.accuracy, "bytes-up": this.bytes_up, "bytes-down": this.bytes_down,
            "seconds": round(this.seconds, 3),
        }  # fmt: skip
        typer.echo(json.dumps(line))

    with (
        RemoteStore(found["endpoint"], found.get("token")) as store,
        run_report.Rounds(console, named_strategy.name, rounds) as bar,
    ):
        outcome = run_rounds(
            learning_task,
            named_strategy,
            broker=broker_address(broker, data),
            fleet=fleet_name(fleet or found.get("fleet", "home")),
            store=store,
            rounds=rounds,
            query=sparql,
            initialization=initialization,
            seed=seed,
            clients=clients,
            wait=wait,
            timeout=timeout,
            on_round=report if as_json else bar,
        )
    if out is not None:
        np.savez(out, **learning_task.program.split(outcome.parameters))
    scores = baselines(learning_task, outcome.parameters, seed=seed)
    if as_json:
        means = {name: {str(s.shots): s.mean for s in row} for name, row in scores.items()}
        metric = scores["learned"][0].metric
        typer.echo(json.dumps({"run": outcome.run, f"{metric.replace(' ', '-')}-by-shots": means}))
    else:
        console.print(run_report.scores(scores))
        console.print(f"run {outcome.run}; its lineage: tinyfleet query lineage --data {data}")


def meta_train(
    task: Annotated[str, typer.Argument(metavar="TASK", help=f"What to learn: {', '.join(tasks.NAMES)}.")],
    method: Annotated[
        str,
        typer.Option(
            help="tinymetafed, tinyreptile, reptile, fomaml, fedavg, fedprox, fedavg-finetuned, tinyol or scratch."
        ),
    ] = "reptile",
    rounds: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Tasks, or devices, a round (TinyReptile: one at a time).")] = 16,
    fleet: Annotated[
        int | None, typer.Option(min=1, help="Simulate a fleet of so many devices. Default: the server's own tasks.")
    ] = None,
    shots: Annotated[int, typer.Option(min=1, help="Samples a class of each of the server's own tasks.")] = 10,
    start: Annotated[
        Path | None, typer.Option(help="Parameters to begin with (.npz, as --out writes them). Default: random.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the learned parameters (.npz).")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Keep the state in this file; where it exists, go on from it.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Rounds between checkpoints.")] = 50,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out tasks to score on.")] = 500,
    mixed: Annotated[bool, typer.Option("--mixed", help="Compute in bfloat16; parameters stay float32.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="With the C engine: to the bit what devices do.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Where to draw the learning curve (.png).")] = None,
    seed: Annotated[int, typer.Option(help="Of the first parameters, the tasks and the choice of devices.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each round, and one more.")] = False,
) -> None:
    """Meta-train a start without devices: on the server's own tasks, or on a simulated fleet, many clients at once.

    Runs on every visible GPU, else on the CPU, with TensorFlow; with JAX under KERAS_BACKEND=jax.

    \b
    Examples:
      tinyfleet meta-train digits --out start.npz
      tinyfleet meta-train omniglot --method tinymetafed --fleet 100 --rounds 500 --plot curve.png
      KERAS_BACKEND=jax tinyfleet meta-train omniglot --method reptile --rounds 2000 --checkpoint run.npz
      tinyfleet run --start start.npz
    """
    # The clients are shared by cores; threads of their own for small products of matrices cost a quarter of the speed.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    try:
        from tinyfleet.server import run_report, simulator
        from tinyfleet.server.evaluate import QUERIES, SHOTS, Score
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("keras", "tensorflow", "jax"):
            raise
        raise UserError(f"meta-training needs {error.name}: pip install 'tinyfleet[keras]'") from None
    from rich.progress import Progress

    for path in (out, checkpoint, plot):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"there is no folder {path.parent} to write {path.name} into; make it, or choose another")
    learning_task = tasks.load(task)
    try:  # now, and not when it has learned
        if fleet is None:
            learning_task.draw("training", [seed], shots, 1)
        learning_task.draw("held_out", [seed], max(SHOTS), QUERIES)
    except ValueError as error:
        raise UserError(f"{task}: {error}; lower --shots, or choose a task with more") from error
    named_strategy = simulator.strategy_settings(method, learning_task, clients=clients)
    backend = simulator.Backend(learning_task.program, precision="mixed" if mixed else "float32", exact=exact)
    initialization = (
        simulator.initial_parameters(learning_task.program, named_strategy, seed)
        if start is None
        else _parameters(start, learning_task.program)
    )
    source = (
        simulator.server_tasks(learning_task, shots)
        if fleet is None
        else simulator.simulated_fleet(learning_task, fleet)
    )
    console = Console(highlight=False, quiet=as_json)
    console.print(f"{method} on {task}; computed on {', '.join(backend.devices)}")
    with Progress(console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task(method, total=rounds)

        def report(so_far: simulator.SimulationResult) -> None:
            this = so_far.rounds[-1]
            bar.update(shown, completed=this.number, description=f"{method}, loss {this.loss:.3f}")
            if as_json:
                typer.echo(json.dumps(asdict(this)))
            elif not console.is_terminal and this.number % -(-rounds // 10) == 0:
                console.print(f"round {this.number}/{rounds}: loss {this.loss:.3f}, up {this.bytes_up} B")

        outcome = simulator.simulate(
            backend,
            source,
            named_strategy,
            initialization,
            rounds=rounds,
            seed=seed,
            checkpoint=checkpoint,
            checkpoint_every=every,
            on_round=report,
        )
    if out is not None:
        np.savez(out, **learning_task.program.split(outcome.parameters))

    def score(start: NDArray[np.float32], shots: int) -> Score:
        values = simulator.evaluate(
            backend,
            learning_task.draw,
            start,
            named_strategy.adapts,
            shots=shots,
            tasks=held_out,
            queries=QUERIES,
            seed=seed,
        )
        return Score(shots, values, "mean squared error" if learning_task.program.loss == "mse" else "accuracy")

    initializations = {"learned": outcome.parameters, "random": learning_task.program.initial(seed)}
    scores = {name: [score(vector, k) for k in SHOTS] for name, vector in initializations.items()}
    if plot is not None:
        run_report.plot(plot, f"{method} on {task}", {"learned": outcome.rounds}, scores, by_round=True)
    if as_json:
        means = {name: {s.shots: s.mean for s in row} for name, row in scores.items()}
        typer.echo(json.dumps({"devices": backend.devices, "held-out-by-shots": means}))
    else:
        console.print(run_report.scores(scores))


def _parameters(path: Path, program: Program) -> NDArray[np.float32]:
    try:
        with np.load(path) as arrays:
            return program.join(arrays)
    except ProgramError as error:
        raise UserError(f"{path} has other parameters than the model ({error}); give a file of the same task") from None
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} has no parameters ({error}); give a file that `tinyfleet run --out` wrote") from None


def deploy(
    model: Annotated[Path, typer.Argument(metavar="MODEL.mote", help="A program, made by `tinyfleet model compile`.")],
    select: Annotated[
        str, typer.Option(help="Who is to get it: a SPARQL file with a column ?id, or a query of the library.")
    ] = "runnable",
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Default: only show who would get it.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a device may take.")] = 60.0,
    broker: BrokerOption = None,
    fleet: Annotated[str | None, typer.Option(help="The fleet's name. Default: the running server's.")] = None,
    data: DataOption = Path(".tinyfleet"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Give a model to the devices that a query selects, over the air. Without --yes it only shows who would get it.

    Devices that cannot hold the model, run it already or are offline are left out. Ends with 1 if not all confirmed.

    \b
    Examples:
      tinyfleet deploy model.mote
      tinyfleet deploy model.mote --select drifted --yes
      tinyfleet deploy model.mote --select my-devices.rq --yes --json
    """
    from tinyfleet.server import deployment as deployments
    from tinyfleet.server import deployment_report

    program = deployments.read_program(model)
    found = find_server(data)
    if not found:
        raise UserError(f"no server runs on {data}; start one with `tinyfleet server --data {data}`")
    sparql = read_query(select)
    name = fleet_name(fleet or found.get("fleet", "home"))
    address = broker_address(broker, data)
    console = Console(highlight=False, quiet=as_json)
    with RemoteStore(found["endpoint"], found.get("token")) as store:
        plan = deployments.plan_deployment(store, program, model.stem, sparql, name)
        summary: dict[str, object] = {
            "model": plan.model,
            "targets": [fit.device for fit in plan.targets],
            "left_out": dict(plan.left_out),
        }
        deployment_report.print_deployment_plan(console, model, program, plan)
        if not yes:
            console.print("Nothing was sent. To give it to them, add --yes", soft_wrap=True)
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
                    timeout=timeout,
                    on_result=on_result,
                )
            summary |= {"deployment": ended.iri, "results": [asdict(result) for result in ended.results]}
            deployment_report.print_result(console, ended)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    if ended is not None and len(ended.devices("confirmed")) < len(plan.targets):
        raise typer.Exit(1)
