"""`tinyfleet model`: compile Keras models for the engine, see what they take, export them for a Raspberry Pi."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edge.errors import UserError
from firmware_tools import compiler

app = typer.Typer(
    help="Compile, plan and export models. Reads Keras 3 models (.keras); .tflite files cannot be compiled yet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL.keras", help="A Keras 3 model, saved with model.save().")]
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
    model: Model,
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
    as_json: AsJson = False,
) -> None:
    """Compile a Keras model to a program for the engine.

    Example: tinyfleet model compile model.keras --out model.mote --train-from head
    """
    with _quiet():
        program = compiler.compile_model(model, train_from=train_from, loss=loss, architecture_only=architecture_only)
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
def plan(model: Model, loss: Loss = None, as_json: AsJson = False) -> None:
    """Print what a Keras model takes: to run, and to train from each of its layers to the end.

    Example: tinyfleet model plan model.keras
    """
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
