"""`tinyfleet model`: compile Keras models for the engine, plan their memory, describe, export and match them."""

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

from tinyfleet.command_line import (
    DATA,
    DEVICE_ID,
    MODEL,
    CommandGroup,
    DataOption,
    FleetOption,
    JsonOption,
    out_option,
)
from tinyfleet.edge.errors import UserError, printable
from tinyfleet.edge.wire.server_info import fleet_of

if TYPE_CHECKING:
    from rich.table import Table

    from tinyfleet.firmware_tools.compiler.compile import ModelPlan, TrainingSelection
    from tinyfleet.firmware_tools.readers.model_file import ModelFile
    from tinyfleet.ontology.ingest.describe import ModelDescription

app = CommandGroup("""Compile, describe, export and match models.

Examples:
  tinyfleet model plan model.keras
  tinyfleet model compile model.keras --out model.mote
""")

KerasArgument = Annotated[
    Path, typer.Argument(metavar="MODEL.keras", help="A Keras 3 model, as model.save() writes it.")
]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="A Keras 3 model (.keras) or a .tflite file.")]
TrainFromOption = Annotated[
    str | None,
    typer.Option(
        "--train-from",
        metavar="LAYER",
        help="Train this layer and all that follow.",
        show_default="the layers that are trainable in Keras; none of a .tflite",
    ),
]
LossOption = Annotated[
    str | None,
    typer.Option(
        "--loss",
        metavar="NAME",
        help="softmax_cross_entropy, mse, binary_cross_entropy or huber.",
        show_default="by the model's last layer, or as it was compiled",
    ),
]
RamBudgetOption = Annotated[
    str | None,
    typer.Option("--ram-budget", metavar="SIZE", help="RAM budget, such as 256KB: choose what trains so that it fits."),
]
Int8Option = Annotated[
    bool,
    typer.Option(
        "--int8", help="Train int8 weights in place (int8 .tflite files); with --ram-budget, channel by channel."
    ),
]
ClassesOption = Annotated[
    int | None,
    typer.Option("--classes", metavar="N", min=1, help="Replace the last layer by one for N classes, weights 0."),
]
MaxClassesOption = Annotated[
    int | None,
    typer.Option("--max-classes", metavar="N", min=1, help="Reserve memory for N classes, to be added one by one."),
]
MomentumOption = Annotated[bool, typer.Option("--momentum", help="Reserve memory for the optimizer's momentum.")]


@app.command("compile")
def compile_(
    model: ModelArgument,
    out: Annotated[Path, out_option("FILE.mote")] = Path("model.mote"),
    train_from: TrainFromOption = None,
    bias_only: Annotated[bool, typer.Option("--bias-only", help="Train only the biases of these layers.")] = False,
    ram_budget: RamBudgetOption = None,
    int8: Int8Option = False,
    classes: ClassesOption = None,
    max_classes: MaxClassesOption = None,
    loss: LossOption = None,
    momentum: MomentumOption = False,
    no_initial_values: Annotated[
        bool,
        typer.Option(
            "--no-initial-values", help="Leave out initial values of trained layers; a fleet sends them every round."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a model to a program for the engine.

    Examples:
      tinyfleet model compile model.keras --out model.mote --train-from head
      tinyfleet model compile model.keras --ram-budget 32KB
      tinyfleet model compile kws.tflite --train-from dense --classes 4
      tinyfleet model compile kws.tflite --int8 --ram-budget 64KB --classes 4
    """
    from tinyfleet.firmware_tools.compiler.compile import compile_model, select_trained_layers

    if ram_budget is not None and (train_from is not None or bias_only):
        raise UserError("--ram-budget chooses what trains; leave out --train-from and --bias-only, or --ram-budget")
    selected = None
    if ram_budget is not None:
        selected = select_trained_layers(
            model, _bytes(ram_budget), int8=int8, classes=classes, max_classes=max_classes, loss=loss, momentum=momentum
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
            architecture_only=no_initial_values,
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
    if selected is not None and ram_budget is not None:
        print(_selection_text(selected, _bytes(ram_budget)))


@app.command()
def plan(
    model: ModelArgument,
    ram_budget: RamBudgetOption = None,
    int8: Int8Option = False,
    classes: ClassesOption = None,
    max_classes: MaxClassesOption = None,
    loss: LossOption = None,
    momentum: MomentumOption = False,
    as_json: JsonOption = False,
) -> None:
    """Print the RAM and flash that a model needs to run and to train.

    There is a row for training from each layer to the end, and for only the biases of these. RAM is exact: parameters
    that train, momentum, activations and gradients. "Least possible" is a bound that no memory plan can go below.

    Examples:
      tinyfleet model plan model.keras
      tinyfleet model plan kws.tflite --ram-budget 128KB --classes 4
      tinyfleet model plan kws.tflite --int8 --ram-budget 64KB
    """
    from tinyfleet.firmware_tools.compiler.compile import plan_model

    size = None if ram_budget is None else _bytes(ram_budget)
    model_plan = plan_model(
        model, budget=size, int8=int8, classes=classes, max_classes=max_classes, loss=loss, momentum=momentum
    )
    for note in model_plan.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(model_plan), indent=2))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(_plan_table(model.name, model_plan))
    if model_plan.selection is not None and size is not None:
        print(_selection_text(model_plan.selection, size))


def _plan_table(name: str, plan: ModelPlan) -> Table:
    from rich.table import Table

    table = Table(title=f"{name}: {plan.parameters:,} parameters, {plan.macs:,} MACs; bytes, exact")
    table.add_column("", no_wrap=True)
    for column in ("parameters\nthat train", "RAM", "least\npossible", "flash", "with initial\nvalues"):
        table.add_column(column, justify="right")
    rows = {"run only": plan.run}
    rows |= {f"train from '{layer}'": row for layer, row in plan.train_from.items()}
    rows |= {f"biases from '{layer}'": row for layer, row in plan.bias_from.items()}
    best = None if plan.selection is None else plan.selection.memory
    if plan.selection is not None and plan.selection.updates is not None:
        rows["selected channels"] = plan.selection.memory
    for title, row in rows.items():
        figures = (row.parameters, row.ram_bytes, row.least_ram_bytes, row.flash_bytes, row.initial_bytes)
        table.add_row(title, *(f"{number:,}" for number in figures), style="bold" if row is best else None)
    return table


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
        raise UserError(f"'{size}' is not a size; write it as 65536, 64KB or 1MB")
    power = "BKM".index((found[2] or "B")[0].upper())
    return int(found[1]) * int(1024**power)


@app.command()
def export(
    model: KerasArgument,
    out: Annotated[Path, out_option("FILE.tflite")] = Path("model.tflite"),
    train_from: TrainFromOption = None,
    loss: LossOption = None,
) -> None:
    """Export a Keras model to a .tflite file that trains on a Raspberry Pi.

    The file has the signatures that `tinyfleet agent start --tflite` needs.

    Examples:
      tinyfleet model export model.keras --out model.tflite
    """
    from tinyfleet.firmware_tools.compiler.export import export_tflite

    with _quiet():
        content = export_tflite(model, train_from=train_from, loss=loss)
    _write(out, content)
    print(f"{out}: {out.stat().st_size:,} B, signatures train, loss, infer, get, set")


@app.command()
def describe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .keras, .tflite or .mote file.")],
    as_json: JsonOption = False,
) -> None:
    """Print a model's description as RDF (Turtle) or JSON.

    Its layers, shapes, MACs and parameters, and the memory that it needs to run and to train.

    Examples:
      tinyfleet model describe model.keras
    """
    import pyoxigraph

    from tinyfleet.ontology.ingest.describe import put_model
    from tinyfleet.ontology.store.store import EmbeddedStore
    from tinyfleet.ontology.vocabulary.namespaces import PREFIXES

    about = description(file)
    for note in about.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
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


@app.command()
def match(
    model: Annotated[str | None, MODEL] = None,
    device_id: Annotated[str | None, DEVICE_ID] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also list what does not match, and the unmet requirement.")
    ] = False,
    fleet: FleetOption = None,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Match models and devices: who can run what, and train how much of it.

    Give a model, a device or both; the best match comes first. MODEL is the ID of a model in the graph (16 hexadecimal
    digits), or a .keras, .tflite or .mote file, which is added to the graph first.

    Examples:
      tinyfleet model match --model model.keras
      tinyfleet model match --model 0123456789abcdef --explain
      tinyfleet model match --device-id kitchen
      tinyfleet model match --model model.mote --device-id kitchen
    """
    from tinyfleet.firmware_tools import match_report as report
    from tinyfleet.ontology.queries import matching
    from tinyfleet.ontology.store.data_folder import open_store
    from tinyfleet.ontology.vocabulary.namespaces import fleet_name

    if model is None and device_id is None:
        raise UserError("give a model with --model, a device with --device-id, or both")
    name = fleet_name(fleet_of(fleet, data))
    with open_store(data) as store:
        iri = None
        if model is not None:
            iri = matching.require_model(store, model) or matching.describe(store, description(Path(model)))
        if device_id is not None:
            matching.require_device(store, device_id, name)
        both = iri is not None and device_id is not None
        unmet = matching.unmet_requirements(store, name, model=iri, device=device_id) if explain or both else {}
        if iri is not None:
            found = [m for m in matching.match_devices(store, iri, name) if device_id in (None, m.device)]
            report.devices(iri, found, unmet, device_id, as_json)
        else:
            assert device_id is not None
            report.models(device_id, matching.match_models(store, device_id, name), unmet, as_json)


def description(file: Path) -> ModelDescription:
    """Describe a model from its file and the model card beside it.

    If the engine can run the model, the description has the exact memory that it needs to run, and to train from each
    of its layers on.

    Raises
    ------
    UserError
        If the file is not a model.
    """
    from tinyfleet.edge.model.program import read_program
    from tinyfleet.firmware_tools.readers.model_file import read_model_file
    from tinyfleet.ontology.ingest.describe import from_graph, from_program
    from tinyfleet.ontology.ingest.model_card import find_model_card

    if file.suffix == ".mote":
        return from_program(read_program(file), file.stem)
    read = read_model_file(file)
    about = from_graph(read.model, find_model_card(file))
    try:
        planned = _planned(read)
    except UserError as e:
        return replace(about, notes=(*about.notes, f"the engine cannot run it: {e}"))
    return replace(about, engine="mote", **planned | {"notes": (*about.notes, *planned["notes"])})


def _planned(file: ModelFile) -> dict[str, Any]:
    """The fields of a description that the engine's plan tells. Raises UserError if the engine cannot run the model."""
    from tinyfleet.firmware_tools.compiler.compile import plan_model
    from tinyfleet.ontology.ingest.describe import TrainingOption

    model_plan = plan_model(file)
    options = [
        # From where one can train, one can from every layer behind it: the rows' places count the layers that train.
        TrainingOption(layer, len(rows) - place, bias_only, memory.ram_bytes, memory.parameters)
        for bias_only, rows in ((False, model_plan.train_from), (True, model_plan.bias_from))
        for place, (layer, memory) in enumerate(rows.items())
    ]
    training = model_plan.trainable
    return {
        "run_ram_bytes": model_plan.run.ram_bytes,
        "train_ram_bytes": None if training is None else training.ram_bytes,
        "storage_bytes": (training or model_plan.run).initial_bytes,
        "training_options": tuple(options),
        "notes": model_plan.notes,
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
