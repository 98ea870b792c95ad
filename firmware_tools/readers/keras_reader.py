"""Keras 3 models in: their layers, and Sequential and functional models as graphs of the engine.

A model is read from its own description (the JSON that Keras writes into a .keras file), so its layers and its graph
need neither Keras nor TensorFlow; only the weights of a file are read through Keras.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.arrays import named_arrays
from tinyfleet.edge.model.graph import Graph, ModelGraph
from tinyfleet.firmware_tools.readers.common import CompileError, read_model_bytes
from tinyfleet.firmware_tools.readers.keras_file import describe_object, parse_keras
from tinyfleet.firmware_tools.readers.keras_graph import KerasGraph
from tinyfleet.firmware_tools.readers.keras_layers import keras_layers
from tinyfleet.firmware_tools.readers.keras_lowering import lower


def read_keras_model(data: bytes, name: str) -> tuple[ModelGraph, KerasGraph | None]:
    """Read a .keras file: its layers, and the engine's graph of them if the engine can run them all.

    Parameters
    ----------
    data : bytes
        The file's content.
    name : str
        The file's name without its ending.

    Returns
    -------
    model : ModelGraph
        With `unsupported` in place of a graph where the engine lacks a layer. The graph's loss is open.
    keras : KerasGraph or None
        The same graph, with where its weights are in the Keras model.

    Raises
    ------
    ReadError
        If the file is damaged or is not a .keras file.
    """
    description = parse_keras(data, f"'{name}.keras'")
    layers = keras_layers(description)
    keras, unsupported = None, ""
    try:
        keras = lower(description)
    except CompileError as error:
        unsupported = str(error)
    model = ModelGraph(
        name=name,
        format="keras",
        sha256=hashlib.sha256(data).hexdigest(),
        file_bytes=len(data),
        layers=layers.layers,
        input_shape=layers.input_shape,
        output_shape=layers.output_shape,
        graph=None if keras is None else keras.graph,
        unsupported=unsupported,
        notes=layers.notes,
    )
    return model, keras


def read_keras(model: Any, loss: str | None = None) -> Graph:
    """A Keras 3 model as a graph with its weights; arguments as in `read_keras_structure`. Raises CompileError."""
    return read_keras_structure(model, loss).with_weights(model)


def read_keras_structure(model: Any, loss: str | None = None) -> KerasGraph:
    """Read a Keras 3 model without its weights, which needs no Keras.

    Parameters
    ----------
    model : keras.Model, str or Path
        A Sequential or functional model that is built, or the path of a .keras file.
    loss : str, optional
        As in `resolve_loss`.

    Returns
    -------
    KerasGraph
        Its operations train as Keras has their layers trainable.

    Raises
    ------
    CompileError
        If the engine cannot run the model, or the file cannot be read.
    """
    if isinstance(model, str | Path):
        description = parse_keras(read_model_bytes(Path(model)), f"'{model}'")
    else:
        description = describe_object(model)
    return lower(description).with_loss(loss)


def weights_from_keras(model: Any) -> dict[str, NDArray[np.float32]]:
    """All weights of a Keras model, in the engine's layouts, with batch normalizations folded in.

    Parameters
    ----------
    model : keras.Model, str or Path
        A model, or the path of a .keras file.

    Returns
    -------
    dict of str to ndarray
        Float32 arrays by the program's names, such as ``dense_0/weights``.

    Raises
    ------
    CompileError
        If the engine cannot run the model.
    """
    graph = read_keras(model)
    weights: dict[str, NDArray[np.float32]] = {}
    for name, _, op in named_arrays(graph.ops, graph.tensors):
        array = op.weights if name.endswith("/weights") else op.bias
        assert array is not None  # of a Keras model all have both
        weights[name] = array
    return weights


def weights_to_keras(model: Any, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Write weights into a Keras model; layers that are not named keep theirs.

    Parameters
    ----------
    model : keras.Model
        The model that the program was compiled from.
    weights : mapping of str to ndarray
        Arrays by the program's names, such as ``program.split(learner.parameters)``.

    Raises
    ------
    CompileError
        For a name or shape that the model does not have, and for a layer with a batch normalization folded into it.
    """
    keras = read_keras_structure(model)
    shapes = {name: shape for name, shape, _ in named_arrays(keras.graph.ops, keras.graph.tensors)}
    for name, value in weights.items():
        if name not in shapes:
            raise CompileError(f"the model has no weights '{name}'; it has: {', '.join(shapes)}")
        if value.shape != shapes[name]:
            raise CompileError(f"'{name}' has shape {value.shape}, but the model's is {shapes[name]}")
    names = dict.fromkeys(name.rpartition("/")[0] for name in shapes)
    for name, source in zip(names, keras.sources, strict=True):
        new = weights.get(f"{name}/weights"), weights.get(f"{name}/bias")
        if any(array is not None for array in new):
            source.write(model, *new)
