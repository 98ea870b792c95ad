"""From a model to its program: what of it can train, the memory that each choice takes, and the program of one of them.

One path for Keras 3 models (objects, or .keras files) and .tflite files: a reader makes a graph, `transfer` or
`quantized_training` decides what of it trains, and `edge.model.assemble` turns it into bytes. A plan needs only the
shapes of weights, so planning a .keras file needs neither Keras nor TensorFlow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.assemble import assemble, check
from tinyfleet.edge.model.graph import LOSSES, Graph, Loss
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, macs, resource_use, weight_counts
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.compiler import quantized_training, transfer
from tinyfleet.firmware_tools.compiler.quantized_training import LayerUpdate, Selection
from tinyfleet.firmware_tools.readers.common import CompileError
from tinyfleet.firmware_tools.readers.keras_graph import KerasGraph
from tinyfleet.firmware_tools.readers.keras_reader import read_keras_structure
from tinyfleet.firmware_tools.readers.model_file import ModelFile
from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a model takes on a device when certain of its layers may train; all other weights stay in flash.

    Parameters
    ----------
    parameters : int
        Numbers that train, and travel.
    params_bytes, momentum_bytes, activation_bytes : int
        RAM of what trains, of the optimiser's momentum, and of values and gradients.
    ram_bytes : int
        RAM in all: the arena.
    least_ram_bytes : int
        RAM that no memory plan can go below.
    flash_bytes, initial_bytes : int
        Flash of the program without, and with, the initial values of what trains.
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
    """What trains within a RAM budget.

    Parameters
    ----------
    train_from : str or None
        The layer from which on layers train; None where `updates` says it.
    bias_only : bool
        Only the biases of these layers train.
    updates : mapping of str to LayerUpdate, optional
        Of int8 weights: which layers train, and how many of their channels.
    memory : MemoryUse
        What that takes.
    """

    train_from: str | None
    bias_only: bool
    updates: Mapping[str, LayerUpdate] | None
    memory: MemoryUse


@dataclass(frozen=True)
class ModelPlan:
    """The memory that a model takes to run, and to train.

    Parameters
    ----------
    parameters, macs : int
        Learned numbers, and multiply-accumulates of one inference, of the model as it is.
    run : MemoryUse
        To run only.
    trainable : MemoryUse, optional
        To train what is trainable in Keras.
    train_from, bias_from : dict of str to MemoryUse
        To train all weights, or only the biases, from a layer to the end, by the layer's name.
    selection : TrainingSelection, optional
        What trains within the budget, if there is one.
    notes : tuple of str
        What cannot train, and why.

    Examples
    --------
    >>> import keras
    >>> plan = plan_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")]))
    >>> plan.parameters, plan.macs
    (15, 12)
    """

    parameters: int
    macs: int
    run: MemoryUse
    trainable: MemoryUse | None
    train_from: dict[str, MemoryUse]
    bias_from: dict[str, MemoryUse]
    selection: TrainingSelection | None
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
    """Compile a model to a program for the engine.

    Parameters
    ----------
    model : keras.Model, str, Path or ModelFile
        A Keras 3 model, the path of a .keras or .tflite file, or such a file that has been read.
    train_from : str, optional
        The layer from which on layers train on the device. None: those that Keras has as trainable, and nothing of a
        .tflite file. The layers before it stay as they are, int8 or float32.
    bias_only : bool
        Of these layers only the biases train.
    selection : mapping of str to LayerUpdate, optional
        With `int8`, in place of `train_from`: which layers train, and how many of their channels.
    int8 : bool
        Of an int8 .tflite file int8 weights train, in place; otherwise what trains becomes float32.
    classes, max_classes : int, optional
        A new last layer with this many outputs at first, and with room for so many; its weights are 0.
    loss : str, optional
        One of `edge.model.graph.LOSSES`. None: as the model ends, or was compiled.
    momentum : bool
        Keep room for the optimiser's momentum.
    architecture_only : bool
        Leave out the initial values of what trains: a fleet sends them every round, and all devices of one
        architecture then have the same model id. Frozen weights are always included.

    Returns
    -------
    Program

    Raises
    ------
    CompileError
        If the engine cannot run the model, or train what is asked for; names the layer.
    ProgramError
        If the program is too large for the engine.

    Examples
    --------
    >>> import keras
    >>> layers = [keras.Input((4,)), keras.layers.Dense(8, activation="relu")]
    >>> model = keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax", name="head")])
    >>> program = compile_model(model, train_from="head")
    >>> program.n_params, program.loss
    (27, 'softmax_cross_entropy')
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
    """Plan the memory that a model takes: exact RAM and flash to run it, and to train it from each of its layers on.

    Layers that cannot be trained from are left out. Needs neither Keras nor TensorFlow for a file.

    Parameters
    ----------
    model : keras.Model, str, Path or ModelFile
        As in `compile_model`, like the arguments that are not listed here.
    budget : int, optional
        Bytes of RAM; what to train in them is selected.

    Returns
    -------
    ModelPlan
        The programs that `compile_model` makes take exactly this.

    Raises
    ------
    CompileError
        If the engine cannot run the model, or nothing can train within the budget.

    Examples
    --------
    >>> import keras
    >>> layers = [keras.Input((4,)), keras.layers.Dense(8, activation="relu")]
    >>> model = keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax", name="head")])
    >>> plan = plan_model(model)
    >>> plan.macs, plan.train_from["head"].parameters
    (56, 27)
    >>> plan.train_from["head"].ram_bytes == compile_model(model, train_from="head").arena_bytes
    True
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
        selection=None if budget is None else source.select(budget),
        notes=source.notes(),
    )


def select_trained_layers(
    model: Any,
    budget: int,
    *,
    int8: bool = False,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: str | None = None,
    momentum: bool = False,
) -> TrainingSelection:
    """Select what to train within a RAM budget.

    Of int8 weights that is the sparse update that is worth most (Lin et al. 2022; see
    `quantized_training.select_update`), otherwise the layers, or their biases, with the most bytes from one layer to
    the end.

    Parameters
    ----------
    model : keras.Model, str, Path or ModelFile
        As in `compile_model`, like the arguments that are not listed here.
    budget : int
        Bytes of RAM.

    Returns
    -------
    TrainingSelection
        What `compile_model` takes.

    Raises
    ------
    CompileError
        If not even the least fits.
    """
    return _SourceModel(model, int8, classes, max_classes, loss, momentum).select(budget)


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
        self.model = model.path if isinstance(model, ModelFile) else model
        self.int8, self.classes, self.max_classes, self.momentum = int8, classes, max_classes, momentum
        self.loss: Loss | None = next((known for known in LOSSES if known == loss), None)
        if loss is not None and self.loss is None:
            raise CompileError(f"unknown loss '{loss}'; supported: {', '.join(LOSSES)}")
        self.graph, self.keras = _read(model, loss)
        self.fixed = frozenset[str]() if self.keras is None else self.keras.fixed
        if int8 and not any(op.kind in INT8_WEIGHTED for op in self.graph.ops):
            raise CompileError("this model has no int8 layers that could train in int8; leave --int8 out")
        if int8 and (max_classes is not None or momentum):
            raise CompileError("int8 weights train without momentum, and their classes cannot grow; leave both out")
        #: Memories by what trains; planning one takes a while.
        self._rows: dict[bool, dict[str, MemoryUse]] = {}

    def with_weights(self) -> Graph:
        """The graph with its weights."""
        return self.graph if self.keras is None else self.keras.with_weights(self.model)

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
        if train_from is None and self.keras is None:
            if grows or self.loss is not None or self.momentum or self.int8:
                raise CompileError(
                    "classes, a loss, momentum and int8 training are for a model that trains; name a layer with "
                    "--train-from, or give a --ram-budget"
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
        if self.keras is None:
            return trained
        norm = self.keras.untrainable(train_from)
        if norm is not None:
            raise norm.error(
                "would have to train, and one sample has no batch to normalize by; make it trainable = False in Keras, "
                "or train from a layer behind it with --train-from"
            )
        if self.keras.loss_undecided and not grows and any(op.trains != "nothing" for op in trained.ops):
            raise CompileError(self.keras.loss_undecided)
        return trained

    def run(self) -> MemoryUse:
        """To run only."""
        return _memory(_frozen(self.graph))

    def trainable(self) -> MemoryUse | None:
        """To train what is trainable in Keras."""
        if self.keras is None:
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
                except UserError:  # for example where no gradient passes an operation behind it
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

    def select(self, budget: int) -> TrainingSelection:
        """See select_trained_layers."""
        if self.int8:
            loss = self.loss or quantized_training.default_loss(self.graph, classes=self.classes)
            selection = quantized_training.select_update(self.graph, budget, classes=self.classes, loss=loss)
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


def _read(model: Any, loss: str | None) -> tuple[Graph, KerasGraph | None]:
    """The engine's graph of a model; of Keras's without weights, and with where these are. Raises CompileError."""
    if isinstance(model, ModelFile):
        if model.model.graph is None:
            raise CompileError(model.model.unsupported)
        if model.keras is None:
            return model.model.graph, None
        keras = model.keras.with_loss(loss)
    elif isinstance(model, str | Path) and Path(model).suffix == ".tflite":
        return read_tflite(Path(model)), None
    else:
        keras = read_keras_structure(model, loss)
    return keras.graph, keras


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
