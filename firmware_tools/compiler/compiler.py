"""Models in, mote programs out: what of a model can train, what each choice takes, and the program of one of them.

One path for Keras 3 models (objects, or .keras files) and .tflite files: a reader makes a graph (keras_reader,
tflite_reader), `transfer` or `quantized_training` says what of it trains, `edge.program.assemble` writes it down. A
plan needs only the shapes of weights, so planning a .keras file needs neither Keras nor TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import LOSSES, Graph, Loss
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, macs, resource_use, weight_counts
from tinyfleet.edge.model.program import Program, assemble, check, named_arrays
from tinyfleet.firmware_tools.compiler import quantized_training, transfer
from tinyfleet.firmware_tools.compiler.quantized_training import LayerUpdate, Selection
from tinyfleet.firmware_tools.readers import keras_reader, tflite_reader
from tinyfleet.firmware_tools.readers.keras_reader import KerasGraph
from tinyfleet.firmware_tools.readers.common import CompileError as CompileError


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a model takes on a device when certain of its layers may train; all other weights stay in flash.

    parameters: numbers that train (and travel). ram_bytes: the whole arena, which is params_bytes of what trains,
    momentum_bytes for the optimiser, and activation_bytes; least_ram_bytes: no plan can go below it. flash_bytes: the
    program without the initial values of what trains; initial_bytes: with them.
    """

    parameters: int
    params_bytes: int
    momentum_bytes: int
    activation_bytes: int
    ram_bytes: int
    least_ram_bytes: int
    flash_bytes: int
    initial_bytes: int


@dataclass(frozen=True)
class TrainingSelection:
    """What trains within a budget: the layers from train_from on, or their biases alone; of int8 weights, the layers
    `selection` and how many of their channels. memory: what that takes."""

    train_from: str | None
    bias_only: bool
    selection: Mapping[str, LayerUpdate] | None
    memory: MemoryUse


@dataclass(frozen=True)
class ModelPlan:
    """What a model takes: to run only; to train what is trainable in Keras; to train from each layer to the end; to
    train the biases alone from each layer to the end.

    parameters, macs: of the model as it is. chosen: within a budget, if there is one. notes: what cannot train, why.
    """

    parameters: int
    macs: int
    run: MemoryUse
    trainable: MemoryUse | None
    train_from: dict[str, MemoryUse]
    bias_from: dict[str, MemoryUse]
    chosen: TrainingSelection | None
    notes: tuple[str, ...]


def compile_model(
    model: Any,
    *,
    train_from: str | None = None,
    bias_only: bool = False,
    selection: Selection | None = None,
    int8: bool = False,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: str | None = None,
    momentum: bool = False,
    architecture_only: bool = False,
) -> Program:
    """A model (Keras object, path of a .keras or .tflite file) as a program for the engine.

    train_from: the layer from which on layers train on the device; None: those that Keras has as trainable, nothing of
    a .tflite file. What comes before stays as it is, int8 or float32. bias_only: of those layers only the biases.
    int8: of an int8 .tflite file int8 weights train, in place; else what trains becomes float32. selection: then, in
    place of train_from, of which layers how many channels.
    classes, max_classes, momentum: as in `transfer.train_from`.
    loss: one of edge.graph.LOSSES; None: as the model ends, or was compiled.
    architecture_only: leave out the initial values of what trains (a fleet sends them every round, and all devices of
    one architecture then have the same model id). Frozen weights are always carried.
    Raises CompileError, or ProgramError if it is too large for the engine.
    """
    if bias_only and train_from is None:
        raise CompileError("bias-only training needs the layer to train from; name one with --train-from")
    source = _SourceModel(model, int8, classes, max_classes, loss, momentum)
    graph = source.training(source.with_weights(), train_from, bias_only, selection)
    return assemble(graph, carry=not architecture_only)


def training_graph(model: Any, *, train_from: str | None = None, loss: str | None = None) -> Graph:
    """A Keras model (object, or path of a .keras file) as the graph of its program; arguments as in `compile_model`."""
    source = _SourceModel(model, loss=loss)
    return source.training(source.with_weights(), train_from, bias_only=False)


def plan_model(
    model: Any,
    *,
    budget: int | None = None,
    int8: bool = False,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: str | None = None,
    momentum: bool = False,
) -> ModelPlan:
    """Exact RAM and flash of running a model, and of training it, or its biases alone, from each of its layers on.

    Arguments as in `compile_model`, whose programs take just that. Layers that cannot be trained from are left out.
    Raises CompileError, also if nothing can train within the budget.
    """
    source = _SourceModel(model, int8, classes, max_classes, loss, momentum)
    graph = source.graph
    return ModelPlan(
        parameters=sum(sum(weight_counts(op, graph.tensors)) for op in graph.ops),
        macs=sum(macs(op, graph.tensors) for op in graph.ops),
        run=source.run(),
        trainable=source.trainable(),
        train_from=source.suffixes(bias_only=False),
        bias_from=source.suffixes(bias_only=True),
        chosen=None if budget is None else source.choose(budget),
        notes=source.notes(),
    )


def choose(
    model: Any,
    budget: int,
    *,
    int8: bool = False,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: str | None = None,
    momentum: bool = False,
) -> TrainingSelection:
    """What to train in `budget` bytes of RAM: of int8 weights the sparse update that is worth most (Lin et al. 2022;
    see `quantized_training.choose`), else the layers, or their biases, with the most bytes from one layer to the end.

    Other arguments as in `compile_model`, which takes what is chosen. Raises CompileError if not even the least fits.
    """
    return _SourceModel(model, int8, classes, max_classes, loss, momentum).choose(budget)


def memory(model: Any) -> tuple[MemoryUse, MemoryUse | None]:
    """What a model takes to run, and to train what is trainable in Keras; None if nothing is, or it cannot train."""
    source = _SourceModel(model)
    return source.run(), source.trainable()


class _SourceModel:
    """A model as read, without weights if it is Keras's, and how it is to train, whatever of it does."""

    def __init__(
        self,
        model: Any,
        int8: bool = False,
        classes: int | None = None,
        max_classes: int | None = None,
        loss: str | None = None,
        momentum: bool = False,
    ) -> None:
        self.model, self.int8, self.classes, self.max_classes, self.momentum = (
            model,
            int8,
            classes,
            max_classes,
            momentum,
        )
        self.loss: Loss | None = next((known for known in LOSSES if known == loss), None)
        if loss is not None and self.loss is None:
            raise CompileError(f"unknown loss '{loss}'; supported: {', '.join(LOSSES)}")
        self.reading: KerasGraph | None = None
        if isinstance(model, str | Path) and Path(model).suffix == ".tflite":
            self.graph = tflite_reader.read_tflite(Path(model))
        else:
            self.reading = keras_reader.read_keras_structure(model, loss)
            self.graph = self.reading.graph
        self.fixed = frozenset[str]() if self.reading is None else self.reading.fixed
        if int8 and not any(op.kind in INT8_WEIGHTED for op in self.graph.ops):
            raise CompileError("this model has no int8 layers that could train in int8; leave --int8 out")
        if int8 and (max_classes is not None or momentum):
            raise CompileError("int8 weights train without momentum, and their classes cannot grow; leave both out")
        #: Memories by what trains; planning one takes a while.
        self._rows: dict[bool, dict[str, MemoryUse]] = {}

    def with_weights(self) -> Graph:
        """The graph with its weights."""
        return self.graph if self.reading is None else self.reading.with_weights(self.model)

    def training(
        self, graph: Graph, train_from: str | None, bias_only: bool, selection: Selection | None = None
    ) -> Graph:
        """The graph, with weights or without, as it trains. Raises CompileError if it cannot."""
        if self.int8 and (train_from is not None or selection is not None):
            if selection is None:
                assert train_from is not None
                selection = quantized_training.select_all_from(graph, train_from, bias_only=bias_only)
            loss = self.loss or quantized_training.default_loss(graph, classes=self.classes)
            return quantized_training.train_int8(graph, selection, classes=self.classes, loss=loss)
        grows = self.classes is not None or self.max_classes is not None
        if train_from is None and self.reading is None:
            if grows or self.loss is not None or self.momentum or self.int8:
                raise CompileError(
                    "classes, a loss, momentum and int8 training are for a model that trains; name a layer with "
                    "--train-from, or give a --budget"
                )
            return graph
        trained = transfer.train_from(
            graph,
            train_from,
            classes=self.classes,
            max_classes=self.max_classes,
            loss=self.loss,
            momentum=self.momentum,
            bias_only=bias_only,
            fixed=self.fixed,
        )
        if self.reading is None:
            return trained
        norm = self.reading.untrainable(train_from)
        if norm is not None:
            raise norm.error(
                "would have to train, and one sample has no batch to normalize by; make it trainable = False in Keras, "
                "or train from a layer behind it with --train-from"
            )
        if self.reading.unsettled and not grows and any(op.trains != "nothing" for op in trained.ops):
            raise CompileError(self.reading.unsettled)
        return trained

    def run(self) -> MemoryUse:
        """To run only."""
        return _memory(_frozen(self.graph))

    def trainable(self) -> MemoryUse | None:
        """To train what is trainable in Keras."""
        if self.reading is None:
            return None
        try:
            graph = self.training(self.graph, None, False)
            check(graph)
            return _memory(graph) if any(op.trains != "nothing" for op in graph.ops) else None
        except UserError:
            return None

    def suffixes(self, *, bias_only: bool) -> dict[str, MemoryUse]:
        """To train from each layer to the end, of those that can be trained from."""
        if bias_only not in self._rows:
            rows = {}
            for layer in self.layers():
                try:
                    graph = self.training(self.graph, layer, bias_only)
                    check(graph)
                    rows[layer] = _memory(graph)
                except UserError:  # an operation behind it that no gradient passes, say
                    continue
            self._rows[bias_only] = rows
        return self._rows[bias_only]

    def layers(self) -> list[str]:
        """Those with weights that could train, in the order of execution."""
        named = dict.fromkeys(op.name for op in self.graph.ops if op.weights is not None)
        return [name for name in named if name not in self.fixed]

    def notes(self) -> tuple[str, ...]:
        """Why not all layers can be trained from."""
        missing = [layer for layer in self.layers() if layer not in self.suffixes(bias_only=False)]
        found = []
        for layer in missing[-1:]:
            try:
                check(self.training(self.graph, layer, False))
            except UserError as e:
                found.append(f"cannot train from '{layer}'{' or before' if len(missing) > 1 else ''}: {e}")
        return tuple(found)

    def choose(self, budget: int) -> TrainingSelection:
        """See compiler.choose."""
        if self.int8:
            loss = self.loss or quantized_training.default_loss(self.graph, classes=self.classes)
            selection = quantized_training.choose(self.graph, budget, classes=self.classes, loss=loss)
            return TrainingSelection(None, False, selection, _memory(self.training(self.graph, None, False, selection)))
        rows = [
            TrainingSelection(layer, bias_only, None, row)
            for bias_only in (False, True)
            for layer, row in self.suffixes(bias_only=bias_only).items()
        ]
        if not rows:
            raise CompileError("; ".join(self.notes()) or "the model has nothing that could train")
        fitting = [row for row in rows if row.memory.ram_bytes <= budget]
        if not fitting:
            least = min(rows, key=lambda row: row.memory.ram_bytes)
            raise CompileError(
                f"{budget:,} bytes are too few: {least.memory.ram_bytes:,} is the least that training takes, "
                f"{self.run().ram_bytes:,} running alone"
            )
        return max(fitting, key=lambda row: row.memory.params_bytes)


def _frozen(graph: Graph) -> Graph:
    """As it runs only."""
    return replace(graph, ops=tuple(replace(op, trains="nothing") for op in graph.ops))


def _memory(graph: Graph) -> MemoryUse:
    found = resource_use(graph)
    return MemoryUse(
        parameters=found.numbers,
        params_bytes=found.params,
        momentum_bytes=found.momentum,
        activation_bytes=found.activations,
        ram_bytes=found.arena,
        least_ram_bytes=found.arena - found.activations + found.lower_bound,
        flash_bytes=found.program - found.params,
        initial_bytes=found.program,
    )


# Weights


def weights_from_keras(model: Any) -> dict[str, NDArray[np.float32]]:
    """All weights of a Keras model (object, or path of a .keras file) by the program's names (`dense_0/weights`), in
    the engine's layouts, batch normalizations folded in. Raises CompileError."""
    graph = keras_reader.read_keras(model)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, _, op in named_arrays(graph.ops, graph.tensors):
        array = op.weights if name.endswith("/weights") else op.bias
        assert array is not None  # of a Keras model all have both
        weights[name] = array
    return weights


def weights_to_keras(model: Any, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Writes weights by the program's names (e.g. `program.split(learner.parameters)`) into a Keras model; layers that
    are not named keep theirs. Raises CompileError for a name or shape that the model does not have, and for a layer
    with a batch normalization folded into it."""
    reading = keras_reader.read_keras_structure(model)
    shapes = {name: shape for name, shape, _ in named_arrays(reading.graph.ops, reading.graph.tensors)}
    for name, value in weights.items():
        if name not in shapes:
            raise CompileError(f"the model has no weights '{name}'; it has: {', '.join(shapes)}")
        if value.shape != shapes[name]:
            raise CompileError(f"'{name}' has shape {value.shape}, but the model's is {shapes[name]}")
    names = dict.fromkeys(name.rpartition("/")[0] for name in shapes)
    for name, source in zip(names, reading.sources, strict=True):
        given = weights.get(f"{name}/weights"), weights.get(f"{name}/bias")
        if any(array is not None for array in given):
            source.write(model, *given)
