"""`tinyfleet model`: compile Keras models for the engine, see what they take, describe and export them."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edge.cli import DataOption
from edge.errors import UserError
from edge.program import Program
from firmware_tools import compiler

if TYPE_CHECKING:
    from ontology.describe import ModelDescription

app = typer.Typer(
    help="Compile, plan, describe and export Keras 3 models (.keras) and .tflite files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.keras", help="A Keras 3 model, saved with model.save().")]
AnyModel = Annotated[Path, typer.Argument(metavar="MODEL", help="A Keras 3 model (.keras) or a .tflite file.")]
Out = Annotated[Path, typer.Option(help="The file to write.")]
TrainFrom = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER", help="The layer from which on layers train; default: those that Keras has as trainable."
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(help="softmax_cross_entropy or mse; default: as the model ends in a softmax, or as it was compiled."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("compile")
def compile_(
    model: AnyModel,
    out: Out = Path("model.mote"),
    train_from: TrainFrom = None,
    loss: Loss = None,
    architecture_only: Annotated[
        bool,
        typer.Option(
            "--architecture-only",
            help="Leave out the initial weights of the layers that train: a fleet sends them in every round.",
        ),
    ] = False,
    classes: Annotated[
        int | None, typer.Option(min=1, help="A new last layer with so many classes (.tflite).", show_default=False)
    ] = None,
    max_classes: Annotated[
        int | None, typer.Option(min=1, help="Room for so many, to be taken into use one by one.", show_default=False)
    ] = None,
    momentum: Annotated[bool, typer.Option("--momentum", help="Keep room for the optimiser's (.tflite).")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a Keras model or a .tflite file to a program for the engine.

    \b
    Examples:
      tinyfleet model compile model.keras --out model.mote --train-from head
      tinyfleet model compile kws.tflite --train-from dense --classes 4 --max-classes 8
    """
    with _quiet():
        if model.suffix == ".tflite":
            if architecture_only:
                raise UserError("--architecture-only is for .keras files; a head cut from a .tflite file begins at 0")
            program = compiler.compile_tflite(
                model, train_from=train_from, classes=classes, max_classes=max_classes, loss=loss, momentum=momentum
            )
        elif classes is not None or max_classes is not None or momentum:
            raise UserError(
                "--classes, --max-classes and --momentum are for .tflite files; build it into the Keras model"
            )
        else:
            program = compiler.compile_model(
                model, train_from=train_from, loss=loss, architecture_only=architecture_only
            )
    _write(out, program.data)
    facts: dict[str, Any] = {
        "file": str(out),
        "model": program.model_id.hex(),
        "flash_bytes": len(program.data),
        "ram_bytes": program.arena_bytes,
        "trainable_parameters": program.n_params,
        "loss": program.loss,
    }
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"{out}: model {facts['model']}, {len(program.data):,} B of flash, {program.arena_bytes:,} B of RAM, "
            f"{program.n_params:,} parameters train"
        )


@app.command("plan")
def plan(
    model: AnyModel,
    loss: Loss = None,
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="RAM, as 256KB: choose what to train in it (.tflite).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print what a model takes: to run, and to train from each of its layers to the end.

    \b
    Examples:
      tinyfleet model plan model.keras
      tinyfleet model plan kws.tflite --budget 128KB
    """
    if model.suffix == ".tflite":
        _plan_tflite(model, None if budget is None else _bytes(budget), as_json)
        return
    if budget is not None:
        raise UserError("--budget is for .tflite files; the table of a .keras file says what fits")
    network = compiler.read_network(model, loss)
    takes = compiler.plan(network)
    if as_json:
        print(json.dumps(asdict(takes), indent=2))
        return
    table = Table(title=f"{model.name}: {takes.parameters:,} parameters, {takes.macs:,} MACs")
    table.add_column("")
    for column in ("parameters\nthat train", "RAM,\nbytes", "flash,\nbytes", "with initial\nweights"):
        table.add_column(column, justify="right")
    rows = {"run only": takes.run} | {f"train from '{name}'": memory for name, memory in takes.train_from.items()}
    for name, memory in rows.items():
        table.add_row(name, *(f"{number:,}" for number in astuple(memory)))
    Console().print(table)


def _bytes(size: str) -> int:
    """Bytes of a size such as 256KB; a KB is 1024 bytes, as in data sheets."""
    found = re.fullmatch(r"(\d+) *(B|KB|KiB|MB|MiB)?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"'{size}' is no size; give one as 65536, 64KB or 1MB")
    power = "BKM".index((found[2] or "B")[0].upper())
    return int(found[1]) * int(1024**power)


def _plan_tflite(model: Path, budget: int | None, as_json: bool) -> None:
    rows = compiler.plan_tflite(model)
    fitting = {name: row for name, row in rows.items() if budget is not None and row.arena <= budget}
    chosen = max(fitting, key=lambda name: rows[name].params, default=None)
    if budget is not None and chosen is None:
        raise UserError(f"{model.name} takes {rows['run only'].arena:,} bytes only to run; {budget:,} are too few")
    if as_json:
        found = {name: asdict(row) | {"arena": row.arena, "chosen": name == chosen} for name, row in rows.items()}
        print(json.dumps(found, indent=2))
        return
    table = Table(title=f"{model.name}: RAM in bytes, exact")
    table.add_column("")
    for column in ("what\ntrains", "values and\ngradients", "arena", "least\npossible"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        least = row.arena - row.activations + row.lower_bound
        style = "bold" if name == chosen else None
        table.add_row(name, *(f"{n:,}" for n in (row.params, row.activations, row.arena, least)), style=style)
    Console().print(table)
    if chosen is not None:
        print(f"In {budget:,} bytes fits most: {chosen}")


@app.command("export")
def export(model: Model, out: Out = Path("model.tflite"), train_from: TrainFrom = None, loss: Loss = None) -> None:
    """Export a Keras model to a .tflite file that trains in TFLite (on a Raspberry Pi), as a fleet's member.

    Example: tinyfleet model export model.keras --out model.tflite
    """
    from firmware_tools.export import export_tflite

    with _quiet():
        content = export_tflite(model, train_from=train_from, loss=loss)
    _write(out, content)
    print(f"{out}: {out.stat().st_size:,} B, signatures train, loss, infer, get, set")


@app.command("describe")
def describe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .keras, .tflite or .mote file.")],
    as_json: AsJson = False,
) -> None:
    """Print what a model is, as RDF (Turtle) or JSON: layers, shapes, MACs, parameters, and the memory it takes.

    Example: tinyfleet model describe model.keras
    """
    import pyoxigraph

    from ontology.describe import put_model
    from ontology.names import PREFIXES
    from ontology.store import EmbeddedStore

    about = description(file)
    for note in about.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        facts = asdict(about) | {"model": about.sha256[:16], "macs": about.macs, "parameters": about.parameters}
        print(json.dumps(facts, indent=2))
        return
    with EmbeddedStore() as store:
        put_model(store, about)
        triples = store.construct("CONSTRUCT WHERE { ?s ?p ?o }")
    model = pyoxigraph.NamedNode(about.iri)
    triples.sort(key=lambda triple: (triple.subject != model, str(triple)))  # the model first, then its parts
    turtle = pyoxigraph.serialize(triples, format=pyoxigraph.RdfFormat.TURTLE, prefixes=PREFIXES) or b""
    print(turtle.decode().rstrip())


@app.command("match")
def match(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="ID|FILE",
            help="A model of the graph by its id (16 hexadecimal digits), or a .keras, .tflite or .mote file, which is "
            "described in the graph first.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="ID", help="A device of the fleet.")] = None,
    why: Annotated[bool, typer.Option("--why", help="Also what does not fit, and which need is missed.")] = False,
    fleet: Annotated[str | None, typer.Option(help="The fleet's name. Default: the running server's.")] = None,
    data: DataOption = Path(".tinyfleet"),
    as_json: AsJson = False,
) -> None:
    """Say which devices can run a model and train how much of it, or which models fit a device, the best first.

    \b
    Examples:
      tinyfleet model match --model model.keras
      tinyfleet model match --model 0123456789abcdef --why
      tinyfleet model match --device kitchen
      tinyfleet model match --model model.mote --device kitchen
    """
    from firmware_tools import show_match as show
    from ontology import match as matching
    from ontology.cli import find_server, open_store
    from ontology.names import fleet_name

    if model is None and device is None:
        raise UserError("give a model with --model, a device with --device, or both")
    name = fleet_name(fleet or find_server(data).get("fleet", "home"))
    with open_store(data) as store:
        about = None
        if model is not None:
            about = matching.known_model(store, model) or matching.describe(store, description(Path(model)))
        if device is not None:
            matching.known_device(store, device, name)
        misses = matching.why_not(store, name, model=about, device=device) if why or (about and device) else {}
        if about is not None:
            fits = [fit for fit in matching.devices(store, about, name) if device in (None, fit.device)]
            show.devices(about, fits, misses, device, as_json)
        else:
            assert device is not None
            show.models(device, matching.models(store, device, name), misses, as_json)


def description(file: Path) -> ModelDescription:
    """What a model's file and the card beside it say, and, if the engine can run it, the exact memory that it takes to
    run and to train from each of its layers on.

    Raises UserError if it is no model's file.
    """
    from ontology.describe import from_file, from_program

    if file.suffix == ".mote":
        try:
            return from_program(Program.parse(file.read_bytes()), file.stem)
        except OSError as e:
            raise UserError(f"cannot read '{file}': {e.strerror}; give the path of a model's file") from e
    about = from_file(file)
    try:
        return replace(about, engine="mote", **_planned(file))
    except UserError as e:
        return replace(about, notes=(*about.notes, f"the engine cannot run it: {e}"))


def _planned(file: Path) -> dict[str, Any]:
    """The fields of a description that the engine's plan tells. Raises UserError if the engine cannot run the model."""
    from ontology.describe import TrainingOption

    def options(rows: Iterable[tuple[str, int, int]], bias_only: bool) -> list[TrainingOption]:
        # From where one can train, one can from every layer behind it: the rows' places count the layers that train.
        given = list(rows)
        return [
            TrainingOption(layer, len(given) - place, bias_only, ram, parameters)
            for place, (layer, ram, parameters) in enumerate(given)
        ]

    if file.suffix == ".keras":
        takes = compiler.plan(compiler.read_network(file))
        rows = ((layer, memory.ram_bytes, memory.parameters) for layer, memory in takes.train_from.items())
        return {
            "run_ram_bytes": takes.run.ram_bytes,
            "train_ram_bytes": takes.trainable.ram_bytes,
            "storage_bytes": takes.trainable.initial_bytes,
            "training_options": tuple(options(rows, False)),
        }
    found = compiler.plan_tflite(file)
    chosen = []
    for what, bias_only in (("train from ", False), ("biases from ", True)):
        named = {name.removeprefix(what)[1:-1]: row for name, row in found.items() if name.startswith(what)}
        chosen += options(((layer, row.arena, row.params // 4) for layer, row in named.items()), bias_only)
    return {
        "run_ram_bytes": found["run only"].arena,
        "storage_bytes": found["run only"].program,
        "training_options": tuple(chosen),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what TensorFlow's C++ parts say on standard error, unless something unforeseen happens."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as said:
        screen = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            said.seek(0)
            os.write(screen, said.read())
            raise
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as e:
        raise UserError(f"cannot write '{path}': {e.strerror}; choose another file with --out") from e
