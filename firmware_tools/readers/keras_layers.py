"""The layers of a Keras model as the graph describes them: shapes, number types, parameters, multiply-accumulates.

Every layer is listed, also those that the engine cannot run; one of a kind that is not known here has no figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tinyfleet.edge.model.graph import Layer, Shape
from tinyfleet.firmware_tools.readers.common import ReadError, windows
from tinyfleet.firmware_tools.readers.keras_file import DESCRIPTION_ERRORS, KerasDescription, check_name, shown

_MAX_DEPTH = 8
"""Models may be nested so deep in each other."""
_MAX_RANK = 8
_MAX_NUMBER = 2**31 - 1

Config = dict[str, Any]


class _Figures(NamedTuple):
    """What one layer makes of its input: the shape of its output, its parameters and its multiply-accumulates."""

    output: Shape | None
    parameters: int = 0
    macs: int = 0


class KerasLayers(NamedTuple):
    """A model's layers in the description's order, those of models in it too; notes on what cannot be told of them."""

    layers: tuple[Layer, ...]
    input_shape: Shape | None
    output_shape: Shape | None
    notes: tuple[str, ...]


def keras_layers(description: KerasDescription) -> KerasLayers:
    """The layers of a model's description. Raises ReadError if it is not as Keras 3 writes it."""
    walk = _Walk()
    try:
        last = walk.model(description.config, None, True, 0)
    except ReadError as error:
        raise ReadError(f"{description.name}: {error}") from None
    except DESCRIPTION_ERRORS as error:
        raise ReadError(f"{description.name} is damaged, or of a Keras before 3: {shown(error)}") from None
    if not walk.layers:
        raise ReadError(f"{description.name}: it has no layer")
    return KerasLayers(tuple(walk.layers), walk.input, last, tuple(dict.fromkeys(walk.notes)))


class _Walk:
    """Walks through a description's layers in their order."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.notes: list[str] = []
        self.input: Shape | None = None

    def model(self, config: Config, given: Shape | None, trainable: bool, depth: int) -> Shape | None:
        """Adds a model's layers, those of models in it too; the shape of its output."""
        if depth > _MAX_DEPTH:
            raise ReadError(f"models are nested deeper than {_MAX_DEPTH}")
        if config["class_name"] not in ("Sequential", "Functional"):
            raise ReadError(f"a {config['class_name']} model has no list of layers; make it Sequential or Functional")
        trainable = trainable and config["config"].get("trainable", True)
        outputs: dict[str, Shape | None] = {}
        shape = given
        for entry in config["config"]["layers"]:
            kind, about = str(entry["class_name"]), entry["config"]
            if kind == "InputLayer":
                shape = given if given is not None else _shape(about.get("batch_shape"))
                if self.input is None:
                    self.input = shape
                outputs[about["name"]] = shape
                continue
            sources = _inputs(entry)
            if sources:  # a graph of layers: every input's shape is written where it is used
                shape = sources[0]
            if kind in ("Sequential", "Functional"):
                shape = self.model(entry, shape, trainable, depth + 1)
            else:
                shape = self._layer(entry, shape, sources, trainable)
            outputs[about["name"]] = shape
        ends = config["config"].get("output_layers")
        if not ends:
            return shape
        return outputs.get(ends[0] if isinstance(ends[0], str) else ends[0][0])

    def _layer(self, entry: Config, shape: Shape | None, sources: list[Shape | None], trainable: bool) -> Shape | None:
        """Adds one layer; the shape of its output."""
        kind, about = str(entry["class_name"]), entry["config"]
        if shape is None:
            shape = _shape(entry.get("build_config", {}).get("input_shape"))
        if self.input is None:
            self.input = shape
        sources = sources or [shape]
        figures = None if shape is None else _figures(kind, about, shape, sources)
        if figures is None:
            self.notes.append(f"the figures of {kind} are not known" + ("" if shape else ": the model is not built"))
        learned = figures is None or figures.parameters > 0
        self.layers.append(
            Layer(
                name=check_name(about["name"]),
                kind=kind,
                input_shape=shape,
                output_shape=figures.output if figures else None,
                macs=figures.macs if figures else None,
                parameters=figures.parameters if figures else None,
                quantization=_number_type(about.get("dtype")) if figures and learned else None,
                trainable=bool(trainable and about.get("trainable", True)) if learned else None,
                activation=_activation(about.get("activation")),
            )
        )
        return figures.output if figures else None


def _figures(kind: str, about: Config, shape: Shape, sources: list[Shape | None]) -> _Figures | None:
    """A layer's figures; None if they are not known."""
    if kind not in _KINDS or about.get("data_format", "channels_last") == "channels_first":
        return None
    return _KINDS[kind](about, shape, sources)


def _shape(batch_shape: Any) -> Shape | None:
    """A shape without its batch axis; None if an axis is free."""
    if not isinstance(batch_shape, list) or not 1 <= len(batch_shape) <= _MAX_RANK:
        return None
    axes = batch_shape[1:]
    return tuple(axes) if all(type(n) is int and 0 < n <= _MAX_NUMBER for n in axes) else None


def _inputs(entry: Config) -> list[Shape | None]:
    """The shapes of what goes into a layer of a Functional model, at its first use."""

    def tensors(node: Any) -> Iterator[Shape | None]:
        if isinstance(node, dict):
            if node.get("class_name") == "__keras_tensor__":
                yield _shape(node["config"]["shape"])
            else:
                for inner in node.values():
                    yield from tensors(inner)
        elif isinstance(node, list):
            for inner in node:
                yield from tensors(inner)

    return list(tensors(entry.get("inbound_nodes", [])[:1]))


def _activation(said: Any) -> str | None:
    """The function's name; None if there is none, or it is no plain one."""
    return said if isinstance(said, str) and said != "linear" else None


def _number_type(dtype: Any) -> str:
    """The type that weights are kept in under a dtype policy."""
    name = str(dtype["config"]["name"] if isinstance(dtype, dict) else dtype or "float32")
    return "float32" if name.startswith("mixed_") else name.split("_")[0]


# ------------------------------------------------------------------------------------- layers, as in keras.layers


def _whole(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_NUMBER:
        raise ValueError(f"there is no whole number from 1 to {_MAX_NUMBER} where one should be")
    return value


def _axes(value: Any, n: int) -> Shape:
    return tuple(_whole(v) for v in ([value] * n if type(value) is int else value))


def _windows(about: Config, shape: Shape, size: Shape, strides: Shape, dilation: Shape) -> Shape:
    """How many places fit along each axis of space."""
    sides = zip(shape[:-1], size, strides, dilation, strict=True)
    out = tuple(windows(*side, about["padding"])[0] for side in sides)
    if min(out) < 1:
        raise ValueError(f"a window of {size} over {shape[:-1]}")
    return out


def _convolution(about: Config, shape: Shape) -> tuple[Shape, Shape, int]:
    n = len(shape) - 1
    kernel = _axes(about["kernel_size"], n)
    strides, dilation = _axes(about["strides"], n), _axes(about.get("dilation_rate", 1), n)
    return kernel, _windows(about, shape, kernel, strides, dilation), shape[-1]


def _dense(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    units = _whole(about["units"])
    out = (*shape[:-1], units)
    return _Figures(out, shape[-1] * units + units * bool(about["use_bias"]), math.prod(out) * shape[-1])


def _conv(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    kernel, places, channels = _convolution(about, shape)
    filters, groups = _whole(about["filters"]), _whole(about.get("groups", 1))
    weights = math.prod(kernel) * (channels // groups) * filters
    return _Figures((*places, filters), weights + filters * bool(about["use_bias"]), math.prod(places) * weights)


def _depthwise(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    kernel, places, channels = _convolution(about, shape)
    filters = channels * _whole(about["depth_multiplier"])
    weights = math.prod(kernel) * filters
    return _Figures((*places, filters), weights + filters * bool(about["use_bias"]), math.prod(places) * weights)


def _separable(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    kernel, places, channels = _convolution(about, shape)
    between, filters = channels * _whole(about["depth_multiplier"]), _whole(about["filters"])
    weights = math.prod(kernel) * between + between * filters
    return _Figures((*places, filters), weights + filters * bool(about["use_bias"]), math.prod(places) * weights)


def _transposed(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures | None:
    n = len(shape) - 1
    kernel, strides, filters = _axes(about["kernel_size"], n), _axes(about["strides"], n), _whole(about["filters"])
    if about.get("output_padding") is not None or max(_axes(about.get("dilation_rate", 1), n)) > 1:
        return None
    space = tuple(
        i * s if about["padding"] == "same" else i * s + max(k - s, 0)
        for i, s, k in zip(shape[:-1], strides, kernel, strict=True)
    )
    weights = math.prod(kernel) * shape[-1] * filters
    return _Figures((*space, filters), weights + filters * bool(about["use_bias"]), math.prod(shape[:-1]) * weights)


def _pool(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    n = len(shape) - 1
    size = _axes(about["pool_size"], n)
    return _Figures(
        (*_windows(about, shape, size, _axes(about["strides"] or about["pool_size"], n), (1,) * n), shape[-1])
    )


def _global_pool(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    return _Figures((*((1,) * (len(shape) - 1) if about.get("keepdims") else ()), shape[-1]))


def _same(_: Config, shape: Shape, __: list[Shape | None]) -> _Figures:
    return _Figures(shape)


def _flatten(_: Config, shape: Shape, __: list[Shape | None]) -> _Figures:
    return _Figures((math.prod(shape),))


def _reshape(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    target = tuple(about["target_shape"])[:_MAX_RANK]
    known = math.prod(_whole(n) for n in target if n != -1)
    return _Figures(tuple(math.prod(shape) // known if n == -1 else n for n in target))


def _normalization(extra: int) -> Callable[[Config, Shape, list[Shape | None]], _Figures | None]:
    def figures(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures | None:
        axis = about.get("axis", -1)
        if (axis[0] if isinstance(axis, list) and len(axis) == 1 else axis) not in (-1, len(shape)):
            return None
        vectors = bool(about.get("scale", True)) + bool(about.get("center", True)) + extra
        return _Figures(shape, vectors * shape[-1])

    return figures


def _padding(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    sides = about["padding"]
    sides = [sides] if len(shape) == 2 else sides
    padding = [(p, p) if type(p) is int else tuple(p) for p in sides]
    return _Figures((*(n + a + b for n, (a, b) in zip(shape[:-1], padding, strict=True)), shape[-1]))


def _merge(_: Config, shape: Shape, sources: list[Shape | None]) -> _Figures | None:
    return _Figures(shape) if all(source == shape for source in sources) else None


def _concatenate(about: Config, shape: Shape, sources: list[Shape | None]) -> _Figures | None:
    if about.get("axis", -1) not in (-1, len(shape)):
        return None
    last = [source[-1] for source in sources if source is not None]
    return _Figures((*shape[:-1], sum(last))) if len(last) == len(sources) else None


def _recurrent(gates: int, biases: int) -> Callable[[Config, Shape, list[Shape | None]], _Figures]:
    def figures(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
        steps, features = shape
        units = _whole(about["units"])
        weights = gates * units * (features + units)
        vectors = 2 if biases == 2 and about.get("reset_after", True) else 1
        bias = gates * units * vectors if about["use_bias"] else 0
        return _Figures((steps, units) if about["return_sequences"] else (units,), weights + bias, steps * weights)

    return figures


def _embedding(about: Config, shape: Shape, _: list[Shape | None]) -> _Figures:
    size = _whole(about["output_dim"])
    return _Figures((*shape, size), _whole(about["input_dim"]) * size)


_KINDS: dict[str, Callable[[Config, Shape, list[Shape | None]], _Figures | None]] = {
    "Dense": _dense,
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _conv),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _separable),
    **dict.fromkeys(("Conv1DTranspose", "Conv2DTranspose"), _transposed),
    **dict.fromkeys(("MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D"), _pool),
    **dict.fromkeys(
        ("GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalAveragePooling1D", "GlobalAveragePooling2D"), _global_pool
    ),
    **dict.fromkeys(
        (
            "Activation", "ReLU", "LeakyReLU", "ELU", "Softmax", "Dropout", "SpatialDropout1D", "SpatialDropout2D",
            "GaussianNoise", "GaussianDropout", "ActivityRegularization", "Rescaling", "Identity",
        ),
        _same,
    ),
    "Flatten": _flatten,
    "Reshape": _reshape,
    "BatchNormalization": _normalization(2),
    "LayerNormalization": _normalization(0),
    "ZeroPadding1D": _padding,
    "ZeroPadding2D": _padding,
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _merge),
    "Concatenate": _concatenate,
    "SimpleRNN": _recurrent(1, 1),
    "LSTM": _recurrent(4, 1),
    "GRU": _recurrent(3, 2),
    "Embedding": _embedding,
}  # fmt: skip
