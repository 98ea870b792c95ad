"""`tinyfleet model`: compile Keras models for the engine, see what they take, describe and export them."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from tinyfleet.edge.cli import DataOption
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import LOSSES
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.compiler.compile import (
    TrainingSelection,
    compile_model,
    plan_model,
    select_trained_layers,
)
from tinyfleet.firmware_tools.readers.model_file import ModelFile, read_model_file

if TYPE_CHECKING:
    from tinyfleet.ontology.ingest.describe import ModelDescription

app = typer.Typer(
    help="Compile, plan, describe and export Keras 3 models (.keras) and .tflite files.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

KerasModel = Annotated[Path, typer.Argument(metavar="MODEL.keras", help="A Keras 3 model, saved with model.save().")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Keras 3 model (.keras) or a .tflite file.")]
Out = Annotated[Path, typer.Option(help="The file to write.")]
TrainFrom = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER",
        help="The layer from which on layers train; default: those that Keras has as trainable, nothing of a .tflite.",
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(LOSSES[:-1])} or {LOSSES[-1]}; default: as the model ends, or was compiled."),
]
Budget = Annotated[
    str | None, typer.Option(metavar="SIZE", help="RAM, as 256KB: what trains is chosen to fit, and printed.")
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8",
        help="Train int8 weights in place (int8 .tflite files); with --budget, of which layers how many channels.",
    ),
]
Classes = Annotated[
    int | None, typer.Option(min=1, help="A new last layer for so many classes, its weights 0.", show_default=False)
]
MaxClasses = Annotated[
    int | None, typer.Option(min=1, help="Room for so many, to be taken into use one by one.", show_default=False)
]
Momentum = Annotated[bool, typer.Option("--momentum", help="Keep room for the optimiser's momentum.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("compile")
def compile_(
    model: Model,
    out: Out = Path("model.mote"),
    train_from: TrainFrom = None,
    bias_only: Annotated[bool, typer.Option("--bias-only", help="Of these layers, only the biases train.")] = False,
    budget: Budget = None,
    int8: Int8 = False,
    classes: Classes = None,
    max_classes: MaxClasses = None,
    loss: Loss = None,
    momentum: Momentum = False,
    architecture_only: Annotated[
        bool,
        typer.Option(
            "--architecture-only", help="Leave out the initial values of what trains: a fleet sends them every round."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a Keras model or a .tflite file to a program for the engine.

    \b
    Examples:
      tinyfleet model compile model.keras --out model.mote --train-from head
      tinyfleet model compile model.keras --budget 32KB
      tinyfleet model compile kws.tflite --train-from dense --classes 4 --max-classes 8
      tinyfleet model compile kws.tflite --int8 --budget 64KB --classes 4
    """
    if budget is not None and (train_from is not None or bias_only):
        raise UserError("--budget chooses what trains; leave --train-from and --bias-only out, or --budget")
    selected = None
    if budget is not None:
        selected = select_trained_layers(
            model, _bytes(budget), int8=int8, classes=classes, max_classes=max_classes, loss=loss, momentum=momentum
        )
        train_from, bias_only = selected.train_from, selected.bias_only
    with _quiet():
        program = compile_model(
            model,
            train_from=train_from,
            bias_only=bias_only,
            selection=None if selected is None else selected.updates,
            int8=int8,
            classes=classes,
            max_classes=max_classes,
            loss=loss,
            momentum=momentum,
            architecture_only=architecture_only,
        )
    _write(out, program.data)
    facts: dict[str, Any] = {
        "file": str(out),
        "model": program.model_id.hex(),
        "flash_bytes": len(program.data),
        "ram_bytes": program.arena_bytes,
        "trainable_parameters": program.n_params,
        "loss": program.loss,
        "selection": None if selected is None else asdict(selected),
    }
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    print(
        f"{out}: model {facts['model']}, {len(program.data):,} B of flash, {program.arena_bytes:,} B of RAM, "
        f"{program.n_params:,} parameters train"
    )
    if selected is not None and budget is not None:
        print(_selection_text(selected, _bytes(budget)))


@app.command("plan")
def plan(
    model: Model,
    budget: Budget = None,
    int8: Int8 = False,
    classes: Classes = None,
    max_classes: MaxClasses = None,
    loss: Loss = None,
    momentum: Momentum = False,
    as_json: AsJson = False,
) -> None:
    """Print what a model takes: to run, and to train, or only its biases, from each of its layers to the end.

    RAM is exact: what trains, its momentum, values and gradients; "least possible" is what no plan can go below.

    \b
    Examples:
      tinyfleet model plan model.keras
      tinyfleet model plan kws.tflite --budget 128KB --classes 4
      tinyfleet model plan kws.tflite --int8 --budget 64KB
    """
    size = None if budget is None else _bytes(budget)
    takes = plan_model(
        model, budget=size, int8=int8, classes=classes, max_classes=max_classes, loss=loss, momentum=momentum
    )
    for note in takes.notes:
        print(f"note: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(takes), indent=2))
        return
    table = Table(title=f"{model.name}: {takes.parameters:,} parameters, {takes.macs:,} MACs; bytes, exact")
    table.add_column("", no_wrap=True)
    for column in ("parameters\nthat train", "RAM", "least\npossible", "flash", "with initial\nweights"):
        table.add_column(column, justify="right")
    rows = {"run only": takes.run}
    rows |= {f"train from '{name}'": row for name, row in takes.train_from.items()}
    rows |= {f"biases from '{name}'": row for name, row in takes.bias_from.items()}
    if takes.selection is not None and takes.selection.updates is not None:
        rows["selected channels"] = takes.selection.memory
    for name, row in rows.items():
        figures = (row.parameters, row.ram_bytes, row.least_ram_bytes, row.flash_bytes, row.initial_bytes)
        best = takes.selection is not None and row is takes.selection.memory
        table.add_row(name, *(f"{number:,}" for number in figures), style="bold" if best else None)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if takes.selection is not None and size is not None:
        print(_selection_text(takes.selection, size))


def _selection_text(selected: TrainingSelection, budget: int) -> str:
    """What trains within a budget, in words."""
    first = f"In {budget:,} bytes, of which it takes {selected.memory.ram_bytes:,},"
    if selected.updates is None:
        what = "the biases alone" if selected.bias_only else "all layers"
        return f"{first} train {what} from '{selected.train_from}' on"
    parts = [
        f"  {name}: " + ("the biases" if update.trains == "bias" else f"{update.channels} channels")
        for name, update in selected.updates.items()
    ]
    return "\n".join([f"{first} train in int8", *parts])


def _bytes(size: str) -> int:
    """Bytes of a size such as 256KB; a KB is 1024 bytes, as in data sheets."""
    found = re.fullmatch(r"(\d+) *(B|KB|KiB|MB|MiB)?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(f"'{size}' is no size; give one as 65536, 64KB or 1MB")
    power = "BKM".index((found[2] or "B")[0].upper())
    return int(found[1]) * int(1024**power)


@app.command("export")
def export(model: KerasModel, out: Out = Path("model.tflite"), train_from: TrainFrom = None, loss: Loss = None) -> None:
    """Export a Keras model to a .tflite file that trains in TFLite (on a Raspberry Pi), as a fleet's member.

    Example: tinyfleet model export model.keras --out model.tflite
    """
    from tinyfleet.firmware_tools.compiler.export import export_tflite

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
    from tinyfleet.ontology.ingest.describe import put_model
    from tinyfleet.ontology.store.store import EmbeddedStore
    from tinyfleet.ontology.vocabulary.namespaces import PREFIXES

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
    from tinyfleet.firmware_tools import show_match as show
    from tinyfleet.ontology.cli import find_server, open_store
    from tinyfleet.ontology.queries import match as matching
    from tinyfleet.ontology.vocabulary.namespaces import fleet_name

    if model is None and device is None:
        raise UserError("give a model with --model, a device with --device, or both")
    name = fleet_name(fleet or find_server(data).get("fleet", "home"))
    with open_store(data) as store:
        about = None
        if model is not None:
            about = matching.known_model(store, model) or matching.describe(store, description(Path(model)))
        if device is not None:
            matching.known_device(store, device, name)
        misses = (
            matching.unmet_requirements(store, name, model=about, device=device) if why or (about and device) else {}
        )
        if about is not None:
            fits = [fit for fit in matching.match_devices(store, about, name) if device in (None, fit.device)]
            show.devices(about, fits, misses, device, as_json)
        else:
            assert device is not None
            show.models(device, matching.match_models(store, device, name), misses, as_json)


def description(file: Path) -> ModelDescription:
    """What a model's file and the card beside it say, and, if the engine can run it, the exact memory that it takes to
    run and to train from each of its layers on.

    Raises UserError if it is no model's file.
    """
    from tinyfleet.ontology.ingest.describe import from_graph, from_program
    from tinyfleet.ontology.ingest.model_card import find_model_card

    if file.suffix == ".mote":
        try:
            return from_program(Program.parse(file.read_bytes()), file.stem)
        except OSError as e:
            raise UserError(f"cannot read '{file}': {e.strerror}; give the path of a model's file") from e
    read = read_model_file(file)
    about = from_graph(read.model, find_model_card(file))
    try:
        planned = _planned(read)
    except UserError as e:
        return replace(about, notes=(*about.notes, f"the engine cannot run it: {e}"))
    return replace(about, engine="mote", **planned | {"notes": (*about.notes, *planned["notes"])})


def _planned(file: ModelFile) -> dict[str, Any]:
    """The fields of a description that the engine's plan tells. Raises UserError if the engine cannot run the model."""
    from tinyfleet.ontology.ingest.describe import TrainingOption

    takes = plan_model(file)
    options = [
        # From where one can train, one can from every layer behind it: the rows' places count the layers that train.
        TrainingOption(layer, len(rows) - place, bias_only, memory.ram_bytes, memory.parameters)
        for bias_only, rows in ((False, takes.train_from), (True, takes.bias_from))
        for place, (layer, memory) in enumerate(rows.items())
    ]
    training = takes.trainable
    return {
        "run_ram_bytes": takes.run.ram_bytes,
        "train_ram_bytes": None if training is None else training.ram_bytes,
        "storage_bytes": (training or takes.run).initial_bytes,
        "training_options": tuple(options),
        "notes": takes.notes,
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
