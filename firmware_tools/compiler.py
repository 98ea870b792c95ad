"""Keras models in, mote programs out: which layers the engine has, their weights in its layouts, what each plan takes.

A model is read from its own description (the JSON that Keras writes into a .keras file), so a plan needs neither Keras
nor TensorFlow; only the weights of a file are read through Keras. Layers may nest (a Sequential in a Sequential), but
must form one straight line.

Plain stochastic gradient descent is what a device does: regularisers, constraints and optimiser settings of the Keras
model are not carried. A model that ends in raw class scores (trained with `from_logits=True`) gets the softmax of the
engine's loss, so the program's output is the softmax of the Keras model's.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import UserError
from edge.program import AvgPool2D, Conv2D, Dense, Flatten, MaxPool2D, Program, ProgramError, ReLU, Tanh, build

#: An operation of the engine.
Op = Dense | Conv2D | AvgPool2D | MaxPool2D | Flatten | ReLU | Tanh

CROSS_ENTROPY = "softmax_cross_entropy"
MSE = "mse"

SUPPORTED = (
    "InputLayer, Dense, Conv2D, AveragePooling2D, MaxPooling2D, Flatten, ReLU, Activation (linear, relu, tanh, "
    "and softmax as the last layer), Softmax as the last layer"
)


class CompileError(UserError):
    """A model that cannot become a program. Names the layer, its type and what is supported."""


@dataclass(frozen=True)
class Network:
    """A Keras model in the engine's terms: what `edge.program.build` takes, and where the layers came from.

    names: Keras's names of the layers with parameters, in order (`backbone/conv` for a layer inside a nested model).
    trainable: indices into `names` of the layers that Keras has as trainable.
    """

    layers: tuple[Op, ...]
    input_shape: tuple[int, ...]
    loss: str
    names: tuple[str, ...]
    trainable: frozenset[int]

    def suffix(self, train_from: str) -> frozenset[int]:
        """The layers with parameters from the Keras layer `train_from` to the end. Raises CompileError if unknown."""
        if train_from not in self.names:
            raise CompileError(f"no layer with weights is named '{train_from}'; the model has: {', '.join(self.names)}")
        return frozenset(range(self.names.index(train_from), len(self.names)))

    def program(
        self, trainable: Collection[int] | None = None, weights: Mapping[str, NDArray[np.float32]] | None = None
    ) -> Program:
        """The program with these layers trainable (None: as in Keras), and these weights. Raises CompileError."""
        chosen = self.trainable if trainable is None else trainable
        try:
            return build(self.layers, self.input_shape, self.loss, trainable=frozenset(chosen), weights=weights)
        except ProgramError as e:
            raise CompileError(str(e)) from e

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of every layer in the program's terms, e.g. {"dense_0/weights": (32, 64)}."""
        every = frozenset(range(len(self.names)))
        return dict(self.program(every).parameters)

    def layer_names(self) -> dict[str, str]:
        """Keras's layer name -> the program's, e.g. {"hidden": "dense_0"}."""
        ours = dict.fromkeys(name.rpartition("/")[0] for name in self.shapes())
        return dict(zip(self.names, ours, strict=True))


@dataclass(frozen=True)
class Training:
    """What it takes to train from one layer to the end.

    parameters: floats that train (and travel). ram_bytes: the whole arena. flash_bytes: the program, with the weights of
    the frozen layers; initial_bytes: the same with the initial weights of the trained layers too.
    """

    train_from: str
    parameters: int
    ram_bytes: int
    flash_bytes: int
    initial_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a model takes: to run (all weights in flash), and to train from each layer with weights to the end."""

    parameters: int
    macs: int
    inference_ram_bytes: int
    inference_flash_bytes: int
    training: tuple[Training, ...]


def read_network(model: Any, loss: str | None = None) -> Network:
    """A Keras model's layers in the engine's terms.

    model: a Keras 3 model (Sequential or functional, built), or the path of a .keras file.
    loss: "softmax_cross_entropy" or "mse"; None takes it from the model: softmax at the end, or the loss that it was
    compiled with. Raises CompileError.
    """
    description = _from_file(Path(model)) if isinstance(model, str | Path) else _from_object(model)
    layers = list(_straight_line(description))
    shape = _input_shape(layers)
    ops: list[Op] = []
    names: list[str] = []
    trainable: set[int] = set()
    softmax = False
    for layer in layers:
        if softmax:
            raise CompileError(f"layer '{layer.name}' ({layer.kind}) comes after a softmax; softmax must be the last layer")
        new, shape, softmax = _lower(layer, shape)
        ops += new
        if isinstance(new[0] if new else None, Dense | Conv2D):
            if layer.trainable:
                trainable.add(len(names))
            names.append(layer.name)
    if not names:
        raise CompileError("the model has no layer with weights; there is nothing to run or to train")
    network = Network(
        layers=tuple(ops),
        input_shape=_input_shape(layers),
        loss=_loss(softmax, loss, description.get("compile_config") or {}),
        names=tuple(names),
        trainable=frozenset(trainable),
    )
    network.program()
    return network


def compile_model(
    model: Any, *, train_from: str | None = None, loss: str | None = None, architecture_only: bool = False
) -> Program:
    """A Keras model (object, or path of a .keras file) as a program for the engine.

    train_from: the Keras layer from which on layers train on the device; None: those that Keras has as trainable.
    loss: as in read_network.
    architecture_only: leave out the initial weights of trainable layers (a fleet sends them every round, and all
    devices of one architecture then have the same model id). The weights of frozen layers are always carried.
    Raises CompileError.
    """
    network = read_network(model, loss)
    trainable = network.trainable if train_from is None else network.suffix(train_from)
    weights = weights_from_keras(model)
    if architecture_only:
        ours = list(network.layer_names().values())
        kept = {name for index, name in enumerate(ours) if index not in trainable}
        weights = {name: value for name, value in weights.items() if name.rpartition("/")[0] in kept}
    return network.program(trainable, weights)


def plan(network: Network) -> Plan:
    """RAM and flash of running the network, and of training each of its suffixes. Needs no weights."""
    shapes = network.shapes()
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    ours = list(network.layer_names().values())
    run = network.program((), zeros)
    training = []
    for first, name in enumerate(network.names):
        suffix = network.suffix(name)
        frozen = {n: w for n, w in zeros.items() if ours.index(n.rpartition("/")[0]) < first}
        lean = network.program(suffix, frozen)
        training.append(
            Training(name, lean.n_params, lean.arena_bytes, len(lean.data), len(network.program(suffix, zeros).data))
        )
    return Plan(
        parameters=sum(int(np.prod(shape)) for shape in shapes.values()),
        macs=sum(layer.macs for layer in run.layers),
        inference_ram_bytes=run.arena_bytes,
        inference_flash_bytes=len(run.data),
        training=tuple(training),
    )


def weights_from_keras(model: Any) -> dict[str, NDArray[np.float32]]:
    """All weights of a Keras model (object, or path of a .keras file) by the program's names, in the engine's layouts:
    dense [out][in], conv [out][kh][kw][in]. Raises CompileError."""
    network = read_network(model, loss=CROSS_ENTROPY if _ends_in_softmax(model) else MSE)
    keras_model = _load(Path(model)) if isinstance(model, str | Path) else model
    weights: dict[str, NDArray[np.float32]] = {}
    for name, ours in network.layer_names().items():
        kernel, bias = (np.asarray(w, np.float32) for w in _find(keras_model, name).get_weights())
        weights[f"{ours}/weights"] = np.ascontiguousarray(np.moveaxis(kernel, -1, 0))
        weights[f"{ours}/bias"] = bias
    return weights


def weights_to_keras(model: Any, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Writes weights by the program's names (e.g. `program.split(learner.parameters)`) into a Keras model; layers that
    are not named keep theirs. Raises CompileError for a name or shape that the model does not have."""
    network = read_network(model, loss=CROSS_ENTROPY if _ends_in_softmax(model) else MSE)
    shapes = network.shapes()
    for name, value in weights.items():
        if name not in shapes:
            raise CompileError(f"the model has no weights '{name}'; it has: {', '.join(shapes)}")
        if value.shape != shapes[name]:
            raise CompileError(f"'{name}' has shape {value.shape}, but the model's is {shapes[name]}")
    for name, ours in network.layer_names().items():
        layer = _find(model, name)
        kernel, bias = layer.get_weights()
        if f"{ours}/weights" in weights:
            kernel = np.moveaxis(weights[f"{ours}/weights"], 0, -1)
        layer.set_weights([kernel, weights.get(f"{ours}/bias", bias)])
