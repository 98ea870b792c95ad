"""Boards and models as facts of the graph, from their own files.

A model becomes a `ModelDescription`, whatever its file's form, and that becomes facts. What a file cannot tell (the
memory that a planner would compute, the shape of an operator that we do not know) is None, and is then left unsaid.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge.errors import UserError
from ontology import shapes
from ontology.names import PROV, RDF, SCHEMA, TD, TF, Iri, board_iri, model_iri
from ontology.store import Binding, Store

Shape = tuple[int, ...]


class DescribeError(UserError):
    """The file cannot be described; the message says why."""


class BoardLike(Protocol):
    """What everyone may know of a kind of board: `edge.thing.Board`."""

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def mcu(self) -> str: ...
    @property
    def clock_hz(self) -> int | None: ...
    @property
    def ram_bytes(self) -> int: ...
    @property
    def flash_bytes(self) -> int: ...
    @property
    def sensors(self) -> Sequence[str]: ...


class LayerLike(Protocol):
    """A layer of a compiled program: `edge.program.LayerInfo`."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def in_shape(self) -> Sequence[int]: ...
    @property
    def out_shape(self) -> Sequence[int]: ...
    @property
    def macs(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def trainable(self) -> bool: ...


class ProgramLike(Protocol):
    """A compiled program: `edge.program.Program`."""

    @property
    def data(self) -> bytes: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def layers(self) -> Sequence[LayerLike]: ...


@dataclass(frozen=True)
class Layer:
    """One operator of a model. Shapes are without the batch axis; trainable is None where there is nothing to train."""

    name: str
    kind: str
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    macs: int | None = None
    parameters: int | None = None
    quantization: str | None = None
    trainable: bool | None = None


@dataclass(frozen=True)
class ModelDescription:
    """What is known of a model, whatever the form of its file.

    run_ram_bytes and train_ram_bytes are bytes of arena, parameters included; storage_bytes of flash on a device. They
    come from whoever plans the model for an engine, and are None until then.
    """

    name: str
    format: str
    """mote, tflite or keras."""
    sha256: str
    file_bytes: int
    layers: tuple[Layer, ...]
    input_shape: Shape | None = None
    output_shape: Shape | None = None
    engine: str | None = None
    """The engine that the file is made for."""
    run_ram_bytes: int | None = None
    train_ram_bytes: int | None = None
    storage_bytes: int | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What could not be told from the file, for the person who asked."""

    @property
    def iri(self) -> Iri:
        return model_iri(self.sha256[:16])

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one inference; None if some layer's are not known."""
        return _total([layer.macs for layer in self.layers])

    @property
    def parameters(self) -> int | None:
        """Learned numbers; None if some layer's are not known."""
        return _total([layer.parameters for layer in self.layers])

    @property
    def trainable_parameters(self) -> int | None:
        """Those of the trainable layers; None if it is not known which layers are."""
        learned = [layer for layer in self.layers if layer.parameters != 0]
        if any(layer.trainable is None for layer in learned):
            return None
        return _total([layer.parameters for layer in learned if layer.trainable])

    @property
    def trainable_layers(self) -> int | None:
        """How many layers can be trained; None if that is not known."""
        learned = [layer for layer in self.layers if layer.parameters != 0]
        if any(layer.trainable is None for layer in learned):
            return None
        return sum(1 for layer in learned if layer.trainable)

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The number types of the weights, each once."""
        return tuple(sorted({layer.quantization for layer in self.layers if layer.quantization is not None}))


def _total(numbers: Sequence[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if len(known) == len(numbers) else None


def board_facts(board: BoardLike) -> dict[Iri, dict[Iri, Binding | None]]:
    """The facts about a board."""
    return {
        board_iri(board.id): {
            RDF.type: TF.Board,
            TD.title: board.title,
            TF.boardId: board.id,
            TF.mcu: board.mcu,
            TF.clockHz: board.clock_hz,
            TF.ramBytes: board.ram_bytes,
            TF.flashBytes: board.flash_bytes,
            TF.sensor: tuple(board.sensors),
        }
    }


def put_board(store: Store, board: BoardLike) -> Iri:
    """Writes a board into the graph, in place of what was said of it. ShapeError if it cannot be right."""
    shapes.admit(store, f"board {board.id!r}", board_facts(board))
    return board_iri(board.id)


def from_program(program: ProgramLike, name: str) -> ModelDescription:
    """A program for mote: its plan is exact, and holds the arena for training and for running alike."""
    layers = tuple(
        Layer(
            name=layer.name,
            kind=layer.kind,
            input_shape=tuple(layer.in_shape),
            output_shape=tuple(layer.out_shape),
            macs=layer.macs,
            parameters=layer.params,
            quantization="float32" if layer.params else None,
            trainable=layer.trainable if layer.params else None,
        )
        for layer in program.layers
    )
    if not layers:
        raise DescribeError(f"the program {name!r} has no layers")
    return ModelDescription(
        name=name,
        format="mote",
        sha256=hashlib.sha256(program.data).hexdigest(),
        file_bytes=len(program.data),
        layers=layers,
        input_shape=layers[0].input_shape,
        output_shape=layers[-1].output_shape,
        engine="mote",
        run_ram_bytes=program.arena_bytes,
        train_ram_bytes=program.arena_bytes,
        storage_bytes=len(program.data),
    )


def from_file(path: str | Path) -> ModelDescription:
    """A .tflite or .keras file. Raises DescribeError if it is neither, or damaged."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DescribeError(f"{path} cannot be read: {error.strerror}; give the path of a model's file") from None
    if path.suffix == ".tflite":
        try:
            from ontology import tflite_file
        except ImportError:
            raise DescribeError(f"{path} needs the package tflite to be read; pip install tflite") from None

        return tflite_file.describe(data, path.stem)
    if path.suffix == ".keras":
        from ontology import keras_file

        return keras_file.describe(data, path.stem)
    raise DescribeError(f"{path} is neither a .tflite nor a .keras file; export the model to one of them")


def model_facts(model: ModelDescription) -> dict[Iri, dict[Iri, Binding | None]]:
    """The facts about a model and its layers. Every node has a name made from the model's, so writing is repeatable."""
    iri = model.iri
    facts: dict[Iri, dict[Iri, Binding | None]] = {
        iri: {
            RDF.type: [TF.Model, PROV.Entity],
            SCHEMA.name: model.name,
            TF.format: model.format,
            TF.sha256: model.sha256,
            TF.fileBytes: model.file_bytes,
            TF.engine: model.engine,
            TF.macs: model.macs,
            TF.parameters: model.parameters,
            TF.trainableParameters: model.trainable_parameters,
            TF.trainableLayers: model.trainable_layers,
            TF.quantization: model.quantizations,
            TF.runRamBytes: model.run_ram_bytes,
            TF.trainRamBytes: model.train_ram_bytes,
            TF.storageBytes: model.storage_bytes,
            TF.inputShape: None,
            TF.outputShape: None,
            TF.layer: [Iri(f"{iri}#layer-{i}") for i in range(len(model.layers))],
        }
    }
    _put_shape(facts, iri, TF.inputShape, f"{iri}#input", model.input_shape)
    _put_shape(facts, iri, TF.outputShape, f"{iri}#output", model.output_shape)
    for i, layer in enumerate(model.layers):
        node = Iri(f"{iri}#layer-{i}")
        facts[node] = {
            RDF.type: TF.Layer,
            TF.index: i,
            SCHEMA.name: layer.name,
            TF.kind: layer.kind,
            TF.macs: layer.macs,
            TF.parameters: layer.parameters,
            TF.quantization: layer.quantization,
            TF.trainable: layer.trainable,
            TF.inputShape: None,
            TF.outputShape: None,
        }
        _put_shape(facts, node, TF.inputShape, f"{node}-in", layer.input_shape)
        _put_shape(facts, node, TF.outputShape, f"{node}-out", layer.output_shape)
    return facts


def _put_shape(
    facts: dict[Iri, dict[Iri, Binding | None]], subject: Iri, predicate: Iri, name: str, shape: Shape | None
) -> None:
    """A shape as an rdf:List whose cells are named, not blank."""
    if shape is None:
        return
    cells = [Iri(f"{name}-{axis}") for axis in range(len(shape))] + [RDF.nil]
    facts[subject][predicate] = cells[0]
    for axis, size in enumerate(shape):
        facts[cells[axis]] = {RDF.first: size, RDF.rest: cells[axis + 1]}


def put_model(store: Store, model: ModelDescription) -> Iri:
    """Writes a model into the graph, in place of what was said of it, but for an earlier plan's figures where this
    description has none. ShapeError if it cannot be right."""
    facts = model_facts(model)
    for planned in (TF.engine, TF.runRamBytes, TF.trainRamBytes, TF.storageBytes):
        if facts[model.iri][planned] is None:
            del facts[model.iri][planned]
    shapes.admit(store, f"model {model.name!r}", facts)
    return model.iri
