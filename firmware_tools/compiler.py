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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.errors import UserError
from edge.graph import LOSSES, Loss
from edge.plan import Takes, takes
from edge.program import AvgPool2D, Conv2D, Dense, Flatten, Layer, MaxPool2D, Program, ReLU, Tanh, assemble, build

CROSS_ENTROPY, MSE = LOSSES[:2]

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

    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    loss: Loss
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
        """The program with these layers trainable (None: all) and these weights, as in `edge.program.build`."""
        return build(self.layers, self.input_shape, self.loss, trainable=trainable, weights=weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight and bias by the program's names, e.g. {"dense_0/weights": (32, 64)}."""
        return dict(self.program().all_parameters)

    def frozen(
        self, trainable: Collection[int], weights: Mapping[str, NDArray[np.float32]]
    ) -> dict[str, NDArray[np.float32]]:
        """Those of the weights, by the program's names, that do not train."""
        ours = list(self.layer_names().values())
        return {name: w for name, w in weights.items() if ours.index(name.rpartition("/")[0]) not in trainable}

    def layer_names(self) -> dict[str, str]:
        """Keras's layer name -> the program's, e.g. {"hidden": "dense_0"}."""
        ours = dict.fromkeys(name.rpartition("/")[0] for name in self.shapes())
        return dict(zip(self.names, ours, strict=True))


@dataclass(frozen=True)
class Memory:
    """What a network takes on a device when certain of its layers may train; all other weights stay in flash.

    parameters: floats that train (and travel). ram_bytes: the whole arena. flash_bytes: the program without the initial
    values of what trains; initial_bytes: with them.
    """

    parameters: int
    ram_bytes: int
    flash_bytes: int
    initial_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a model takes: to run only, to train what is trainable in Keras, to train from each layer to the end."""

    parameters: int
    macs: int
    run: Memory
    trainable: Memory
    train_from: dict[str, Memory]


def read_network(model: Any, loss: str | None = None) -> Network:
    """A Keras model's layers in the engine's terms.

    model: a Keras 3 model (Sequential or functional, built), or the path of a .keras file.
    loss: "softmax_cross_entropy" or "mse"; None takes it from the model: softmax at the end, or the loss that it was
    compiled with. Raises CompileError, or ProgramError if it is too large for the engine.
    """
    description = _describe(model)
    network, softmax = _read(description)
    network = replace(network, loss=_loss(softmax, loss, description.get("compile_config") or {}))
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
    Raises CompileError, or ProgramError if it is too large for the engine.
    """
    network = read_network(model, loss)
    trainable = network.trainable if train_from is None else network.suffix(train_from)
    weights = weights_from_keras(model)
    return network.program(trainable, network.frozen(trainable, weights) if architecture_only else weights)


def compile_tflite(
    model: Path,
    *,
    train_from: str | None = None,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: str | None = None,
    momentum: bool = False,
) -> Program:
    """A .tflite file (float32 or int8) as a program for the engine.

    train_from: the layer from which on it becomes float32 and trains, over what comes before, frozen; None: it only
    runs. classes, max_classes, loss, momentum: as in `transfer.train_from`.
    Raises CompileError, or ProgramError if it is too large for the engine.
    """
    from firmware_tools import tflite_reader, transfer

    graph = tflite_reader.read(model)
    if train_from is None:
        if classes is not None or max_classes is not None or momentum or loss is not None:
            raise CompileError(
                "classes, a loss and momentum are for a model that trains; name a layer with --train-from"
            )
        return assemble(graph)
    chosen = next((known for known in LOSSES if known == loss), None)
    if loss is not None and chosen is None:
        raise CompileError(f"unknown loss '{loss}'; supported: {', '.join(LOSSES)}")
    return assemble(
        transfer.train_from(graph, train_from, classes=classes, max_classes=max_classes, loss=chosen, momentum=momentum)
    )


def plan_tflite(model: Path) -> dict[str, Takes]:
    """Exact RAM of a .tflite file: to run it, and to train it, or its biases alone, from each of its layers on. The
    keys are "run only", "train from 'LAYER'" and "biases from 'LAYER'"."""
    from firmware_tools import tflite_reader, transfer

    graph = tflite_reader.read(model)
    rows = {"run only": takes(graph)}
    for layer in dict.fromkeys(op.name for op in graph.ops if op.weights is not None):
        for what, bias_only in (("train", False), ("biases", True)):
            try:
                rows[f"{what} from '{layer}'"] = takes(transfer.train_from(graph, layer, bias_only=bias_only))
            except UserError:  # an operation behind it that no gradient passes
                continue
    return rows


def plan(network: Network) -> Plan:
    """RAM and flash of running the network, and of training it. Needs no weights, only their shapes."""
    zeros = {name: np.zeros(shape, np.float32) for name, shape in network.shapes().items()}
    run = network.program((), zeros)
    return Plan(
        parameters=sum(layer.params for layer in run.layers),
        macs=sum(layer.macs for layer in run.layers),
        run=_memory(network, frozenset(), zeros),
        trainable=_memory(network, network.trainable, zeros),
        train_from={name: _memory(network, network.suffix(name), zeros) for name in network.names},
    )


def _memory(network: Network, trainable: frozenset[int], weights: Mapping[str, NDArray[np.float32]]) -> Memory:
    lean = network.program(trainable, network.frozen(trainable, weights))
    full = network.program(trainable, weights)
    return Memory(lean.n_params, lean.arena_bytes, len(lean.data), len(full.data))


def weights_from_keras(model: Any) -> dict[str, NDArray[np.float32]]:
    """All weights of a Keras model (object, or path of a .keras file) by the program's names, in the engine's layouts:
    dense [out][in], conv [out][kh][kw][in]. Raises CompileError."""
    network = _read(_describe(model))[0]
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
    network = _read(_describe(model))[0]
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


@dataclass(frozen=True)
class _Layer:
    """One layer of a Keras model's description: qualified name, class, settings, and whether Keras has it trainable."""

    name: str
    kind: str
    config: Mapping[str, Any]
    trainable: bool

    def error(self, problem: str) -> CompileError:
        return CompileError(f"layer '{self.name}' ({self.kind}) {problem}")


def _describe(model: Any) -> dict[str, Any]:
    """The JSON description of a Keras model, as in a .keras file."""
    if not isinstance(model, str | Path):
        try:
            described: dict[str, Any] = json.loads(model.to_json())
        except NotImplementedError as e:
            raise CompileError(
                f"a {type(model).__name__} that computes in its own call() cannot be compiled; build the model with "
                "keras.Sequential or the functional API"
            ) from e
        except AttributeError as e:
            raise CompileError(
                f"expected a Keras model or the path of a .keras file, got {type(model).__name__}"
            ) from e
        return described
    path = Path(model)
    if not path.is_file():
        raise CompileError(f"there is no file '{path}'")
    try:
        with zipfile.ZipFile(path) as archive:
            described = json.loads(archive.read("config.json"))
            version = json.loads(archive.read("metadata.json"))["keras_version"]
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as e:
        raise CompileError(f"'{path}' is not a .keras file; save the model with model.save('name.keras')") from e
    if not str(version).startswith("3."):
        raise CompileError(f"'{path}' was saved by Keras {version}; load it and save it again with Keras 3")
    return described


def _load(path: Path) -> Any:
    """The model of a .keras file, without its optimiser and loss."""
    try:
        import keras  # type: ignore[import-untyped]
    except ImportError as e:
        raise CompileError("reading a model's weights needs Keras; pip install 'tinyfleet[keras]'") from e
    try:
        return keras.saving.load_model(path, compile=False)
    except Exception as e:  # Keras raises whatever its parts raise
        raise CompileError(f"Keras cannot load '{path}': {str(e).strip().splitlines()[0]}") from e


def _find(model: Any, name: str) -> Any:
    """The layer with a qualified name (`backbone/conv`)."""
    for part in name.split("/"):
        model = model.get_layer(part)
    return model


def _straight_line(description: Mapping[str, Any], prefix: str = "", trainable: bool = True) -> Iterator[_Layer]:
    """The layers of a (nested) model, in order. Raises CompileError where they branch, join or are shared."""
    kind, config = description["class_name"], description["config"]
    if kind not in ("Sequential", "Functional"):
        raise CompileError(f"the model is a {kind}; build it with keras.Sequential or the functional API")
    trainable = trainable and config.get("trainable", True)
    before = None
    for entry in config["layers"]:
        name = entry["config"]["name"]
        if kind == "Functional":
            sources = _sources(entry)
            if sources != ([] if before is None else [before]):
                raise CompileError(
                    f"layer '{prefix}{name}' ({entry['class_name']}) does not simply follow the layer before it; only "
                    "models whose layers form one straight line can be compiled"
                )
            before = name
        if entry["class_name"] in ("Sequential", "Functional"):
            yield from _straight_line(entry, f"{prefix}{name}/", trainable)
        elif entry["class_name"] != "InputLayer" or not prefix:
            yield _Layer(
                prefix + name,
                entry["class_name"],
                entry["config"],
                trainable and entry["config"].get("trainable", True),
            )

    if kind == "Functional":
        outputs = config["output_layers"]
        if [o[0] for o in ([outputs] if isinstance(outputs[0], str) else outputs)] != [before]:
            raise CompileError(
                f"the model '{config['name']}' has other outputs than its last layer's; give it one output"
            )


def _sources(entry: Mapping[str, Any]) -> list[str]:
    """The layers whose outputs a layer of a functional model takes, once for every use."""
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
            found.append(value["config"]["keras_history"][0])
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)
        elif isinstance(value, list):
            for part in value:
                visit(part)

    visit(entry["inbound_nodes"])
    return found


def _read(description: Mapping[str, Any]) -> tuple[Network, bool]:
    """The network, its loss not settled yet, and whether it ends in a softmax."""
    try:
        return _lower_all(list(_straight_line(description)))
    except (KeyError, TypeError) as e:
        raise CompileError(f"the model's description is not as Keras 3 writes it ({e!r}); save the model again") from e


def _lower_all(layers: list[_Layer]) -> tuple[Network, bool]:
    if not layers or layers[0].kind != "InputLayer":
        raise CompileError("the model does not say its input's shape; begin it with keras.Input(shape)")
    first, *rest = layers
    _, *given = first.config["batch_shape"]
    if not 1 <= len(given) <= 3 or None in given:
        raise first.error(
            f"takes shape {tuple(given)}; supported are features (n,) and images (height, width, channels)"
        )
    input_shape = shape = tuple(given) if len(given) != 2 else (*given, 1)
    grid = len(given) == 2  # only Flatten gives a matrix a meaning here
    ops: list[Layer] = []
    names: list[str] = []
    trainable: set[int] = set()
    softmax = False
    for layer in rest:
        if softmax:
            raise layer.error("comes after a softmax; a softmax must be the last layer")
        if grid and layer.kind != "Flatten":
            raise layer.error(
                f"would read {shape[:2]} as a matrix; give keras.Input a third axis, or put Flatten before it"
            )
        grid = False
        new, shape, softmax = _lower(layer, shape)
        ops += new
        if new and isinstance(new[0], Dense | Conv2D):
            if layer.trainable:
                trainable.add(len(names))
            names.append(layer.name)
    if not names:
        raise CompileError("the model has no layer with weights; there is nothing to run or to train")
    return Network(tuple(ops), input_shape, MSE, tuple(names), frozenset(trainable)), softmax


def _lower(layer: _Layer, shape: tuple[int, ...]) -> tuple[list[Layer], tuple[int, ...], bool]:
    """The engine's layers for a Keras layer on an input of this shape, the output's shape, if it ends in softmax."""
    config = layer.config
    dtype = config.get("dtype", "float32")
    dtype = dtype["config"].get("name") if isinstance(dtype, dict) else dtype
    if dtype != "float32" or config.get("quantization_config"):
        raise layer.error(f"computes in {dtype}; the engine computes in float32")
    if config.get("data_format", "channels_last") != "channels_last":
        raise layer.error("has its channels first; the engine wants channels_last")
    match layer.kind:
        case "Dense":
            if len(shape) != 1:
                raise layer.error(f"gets an input of shape {shape}; put a Flatten before it")
            _need_bias(layer)
            units = config["units"]
            after, softmax = _activation(layer, config["activation"])
            return [Dense(units), *after], (units,), softmax
        case "Conv2D":
            _need_image(layer, shape)
            _need_bias(layer)
            if tuple(config["dilation_rate"]) != (1, 1) or config["groups"] != 1:
                raise layer.error("is dilated or grouped; supported are dilation_rate=1 and groups=1")
            kernel, strides = tuple(config["kernel_size"]), tuple(config["strides"])
            after, softmax = _activation(layer, config["activation"])
            if softmax:
                raise layer.error("ends in a softmax over channels; supported is a softmax over classes, after a Dense")
            filters, padding = config["filters"], config["padding"]
            out = (*_window(shape, kernel, strides, padding), filters)
            return [Conv2D(filters, kernel, strides, padding), *after], out, False
        case "AveragePooling2D" | "MaxPooling2D":
            _need_image(layer, shape)
            size, strides, padding = tuple(config["pool_size"]), tuple(config["strides"]), config["padding"]
            pool = AvgPool2D if layer.kind == "AveragePooling2D" else MaxPool2D
            return [pool(size, strides, padding)], (*_window(shape, size, strides, padding), shape[2]), False
        case "Flatten":
            return [Flatten()], (int(np.prod(shape)),), False
        case "ReLU":
            if config["max_value"] is not None or config["negative_slope"] or config["threshold"]:
                raise layer.error("has a maximum, a slope or a threshold; supported is the plain ReLU()")
            return [ReLU()], shape, False
        case "Activation" | "Softmax":
            if layer.kind == "Softmax" and config["axis"] not in (-1, len(shape)):
                raise layer.error("runs over another axis than the last; supported is a softmax over classes")
            after, softmax = _activation(layer, "softmax" if layer.kind == "Softmax" else config["activation"])
            if softmax and len(shape) != 1:
                raise layer.error(f"gets an input of shape {shape}; supported is a softmax over classes, after a Dense")
            return after, shape, softmax
        case _:
            raise layer.error(f"is not supported. Supported: {SUPPORTED}")


def _activation(layer: _Layer, function: Any) -> tuple[list[Layer], bool]:
    """The operations of an activation function, and whether it is the softmax (which the loss brings along)."""
    known: dict[str, list[Layer]] = {"linear": [], "softmax": [], "relu": [ReLU()], "tanh": [Tanh()]}
    if not isinstance(function, str) or function not in known:
        if isinstance(function, dict):  # a function by its name, or a layer in its place
            name = function.get("config")
            function = name if isinstance(name, str) else function.get("class_name", "of its own")
        raise layer.error(f"has the activation {function}, which is not supported. Supported: {', '.join(known)}")
    return known[function], function == "softmax"


def _need_bias(layer: _Layer) -> None:
    if not layer.config["use_bias"]:
        raise layer.error("has no bias; supported is use_bias=True")


def _need_image(layer: _Layer, shape: tuple[int, ...]) -> None:
    if len(shape) != 3:
        raise layer.error(f"needs an image (height, width, channels), but gets shape {shape}")


def _window(shape: tuple[int, ...], size: tuple[int, ...], strides: tuple[int, ...], padding: str) -> tuple[int, ...]:
    """Height and width of what a sliding window gives."""
    cut = (0, 0) if padding == "same" else (size[0] - 1, size[1] - 1)
    return tuple(-((c - n) // s) for n, s, c in zip(shape, strides, cut, strict=False))


def _loss(softmax: bool, asked: str | None, compiled: Mapping[str, Any]) -> Loss:
    """The loss to train with: as asked, else as the model ends, else as it was compiled."""
    wanted = next((loss for loss in (CROSS_ENTROPY, MSE) if loss == asked), None)
    if asked is not None and wanted is None:
        raise CompileError(f"unknown loss '{asked}'; supported: {CROSS_ENTROPY}, {MSE}")
    given = compiled.get("loss")
    name = given if isinstance(given, str) else given["class_name"] if isinstance(given, dict) else None
    logits = isinstance(given, dict) and bool((given.get("config") or {}).get("from_logits"))
    known: dict[str, Loss] = {
        "sparse_categorical_crossentropy": CROSS_ENTROPY,
        "SparseCategoricalCrossentropy": CROSS_ENTROPY,
        "categorical_crossentropy": CROSS_ENTROPY,
        "CategoricalCrossentropy": CROSS_ENTROPY,
        "mse": MSE,
        "mean_squared_error": MSE,
        "MeanSquaredError": MSE,
    }
    if softmax:
        if asked == MSE or (asked is None and name is not None and known.get(name) != CROSS_ENTROPY):
            raise CompileError(
                f"the model ends in a softmax, which the engine trains with cross-entropy only, not with "
                f"{asked or name}; choose the loss {CROSS_ENTROPY}"
            )
        return CROSS_ENTROPY
    if wanted is not None:
        return wanted
    if name is None:
        raise CompileError(
            f"the model has no softmax at its end and is not compiled with a loss; choose the loss {CROSS_ENTROPY} "
            f"(its outputs are class scores) or {MSE} (its outputs are values)"
        )
    if name not in known or (known[name] == CROSS_ENTROPY and not logits):
        raise CompileError(
            f"the model is compiled with the loss {name}, which does not fit its outputs; without a softmax at the "
            f"end these do: cross-entropy with from_logits=True, mean squared error. Choose {CROSS_ENTROPY} or {MSE}"
        )
    return known[name]
