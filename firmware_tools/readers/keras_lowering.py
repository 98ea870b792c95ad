"""From the layers of a Keras model to the engine's operations: which of them the engine runs, and how.

What the engine does in another way than Keras:
    - BatchNormalization is what it is in inference: a scale and a shift, folded into the layer before it, or an
      operation of its own (a depthwise 1x1 convolution that is frozen) where there is none to fold it into.
    - A layer without a bias has one of 0. Where the layer trains, its bias does too.
    - Dropout and the noise layers do nothing.
    - Of a loss only its kind counts: Keras does not save a Huber loss's delta, so it is 1. Regularisers, constraints
      and the optimiser's settings are not carried.
    - A model that ends in raw class scores (`from_logits=True`) gets the softmax, or the sigmoid, of the engine's loss.
    - Sequences [steps, channels] are images of one row.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyfleet.edge.model.graph import Graph, Kind, Op, Shape, Shape3, Tensor
from tinyfleet.edge.model.program_format import MAX_BYTES
from tinyfleet.firmware_tools.readers.common import MAX_OPERATIONS, MAX_SIDE, CompileError, simplify, windows
from tinyfleet.firmware_tools.readers.keras_file import (
    DESCRIPTION_ERRORS,
    KerasDescription,
    check_name,
    histories,
    model_ends,
    shown,
)
from tinyfleet.firmware_tools.readers.keras_graph import KerasGraph, KerasLayer, WeightSource

SUPPORTED = (
    "Dense, Conv1D, Conv2D, DepthwiseConv1D, DepthwiseConv2D, SeparableConv1D, SeparableConv2D, AveragePooling, "
    "MaxPooling, GlobalAveragePooling and GlobalMaxPooling (1D, 2D), BatchNormalization, LayerNormalization, Add, "
    "Concatenate, Flatten, Reshape, ZeroPadding and Cropping (1D, 2D), Rescaling, Normalization, Activation, ReLU, "
    "LeakyReLU, Softmax, Dropout and noise layers"
)
#: What does nothing when a model runs.
IDENTITIES = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise",
    "ActivityRegularization", "Identity",
)  # fmt: skip
#: Operations by activation functions' names. Keras's own slope is leaky_relu's.
ACTIVATIONS = {
    "relu": Kind.RELU, "relu6": Kind.RELU6, "leaky_relu": Kind.LEAKY_RELU, "tanh": Kind.TANH, "sigmoid": Kind.SIGMOID,
    "softmax": Kind.SOFTMAX,
}  # fmt: skip
LEAKY_RELU_SLOPE = 0.2


def lower(description: KerasDescription) -> KerasGraph:
    """The engine's graph of a model, its loss still open. Raises CompileError if the engine cannot run it."""
    description.check_version()
    try:
        builder = _Builder()
        output = builder.whole(description.config)
        compiled = {**(description.config.get("compile_config") or {})}
    except DESCRIPTION_ERRORS as e:
        raise CompileError(
            f"the model's description is not as Keras 3 writes it ({shown(e)}); save the model again"
        ) from e
    ops, sources = _fold(builder, output)
    graph = simplify(Graph(tuple(builder.tensors), tuple(ops), output))
    return KerasGraph(graph, tuple(sources), compiled)


@dataclass(frozen=True)
class _Value:
    """What a layer gives: the graph's tensor, and its shape in Keras."""

    tensor: int
    shape: Shape


def _shape3(shape: Shape) -> Shape3:
    """The engine's [h][w][c] of a shape of one to three dimensions: a sequence is an image of one row."""
    h, w, c = (*[1] * (3 - len(shape)), *shape)
    return h, w, c


def _pair(value: Any) -> tuple[int, int]:
    """A setting of one or two dimensions, as that of rows and columns."""
    numbers = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


class _Builder:
    """Collects tensors and operations. sources: of the operations with weights, by their outputs."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.sources: dict[int, WeightSource] = {}
        self.layers: set[str] = set()
        self.calls = 0
        self.weight_bytes = 0

    def whole(self, description: Mapping[str, Any]) -> int:
        """Reads the whole model; its output's tensor."""
        kind, config = description["class_name"], description["config"]
        if kind == "Functional":
            for name, ends in (("inputs", config["input_layers"]), ("outputs", config["output_layers"])):
                if len(model_ends(ends)) != 1:
                    raise CompileError(
                        f"the model has {len(model_ends(ends))} {name}; the engine's have one: leave one"
                    )
        layers = config.get("layers") or [{"class_name": ""}]
        first = layers[0] if kind != "Functional" else self._entry(config, model_ends(config["input_layers"])[0][0])
        if kind in ("Sequential", "Functional") and first["class_name"] != "InputLayer":
            raise CompileError("the model does not say its input's shape; begin it with keras.Input(shape)")
        given = tuple(first["config"]["batch_shape"][1:]) if kind in ("Sequential", "Functional") else (1,)
        if not 1 <= len(given) <= 3 or not all(isinstance(n, int) and n > 0 for n in given):
            raise CompileError(
                f"layer '{first['config']['name']}' (InputLayer) takes shape {given}; supported are features (n,), "
                "sequences (steps, channels) and images (height, width, channels), without None"
            )
        self.tensors.append(Tensor(_shape3(given)))
        (output,) = self._model(description, [_Value(0, given)], "", True)
        if not any(op.weights is not None for op in self.ops):
            raise CompileError("the model has no layer with weights; there is nothing to run or to train")
        return output.tensor

    @staticmethod
    def _entry(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        entries: dict[Any, Mapping[str, Any]] = {entry["config"]["name"]: entry for entry in config["layers"]}
        return entries[name]

    def _model(self, entry: Mapping[str, Any], inputs: list[_Value], prefix: str, trainable: bool) -> list[_Value]:
        """Reads a (nested) model on these inputs; its outputs."""
        kind, config = entry["class_name"], entry["config"]
        trainable = trainable and config.get("trainable", True)
        if kind == "Sequential":
            for part in config["layers"]:
                if part["class_name"] != "InputLayer":
                    inputs = self._call(part, inputs, prefix, trainable)
            return inputs
        if kind != "Functional":
            raise CompileError(f"the model is a {kind}; build it with keras.Sequential or the functional API")
        known = dict(zip(model_ends(config["input_layers"]), inputs, strict=True))
        uses = [
            (part, number, list(histories(node)))
            for part in config["layers"]
            for number, node in enumerate(part["inbound_nodes"])
        ]
        # The first use whose tensors are known is next: a layer that is used again can stand before what it takes.
        missing = [{take for take in takes if take not in known} for _, _, takes in uses]
        readers: dict[tuple[str, int, int], list[int]] = {}
        for use, lacking in enumerate(missing):
            for take in lacking:
                readers.setdefault(take, []).append(use)
        ready = [use for use, lacking in enumerate(missing) if not lacking]
        while ready:
            part, number, takes = uses[heapq.heappop(ready)]
            outputs = self._call(part, [known[t] for t in takes], prefix, trainable)
            for i, value in enumerate(outputs):
                given = (part["config"]["name"], number, i)
                known[given] = value
                for use in readers.pop(given, ()):
                    missing[use].discard(given)
                    if not missing[use]:
                        heapq.heappush(ready, use)
        return [known[end] for end in model_ends(config["output_layers"])]

    def _call(self, entry: Mapping[str, Any], inputs: list[_Value], prefix: str, trainable: bool) -> list[_Value]:
        """Reads one layer, or nested model, on these inputs."""
        config = entry["config"]
        name, kind = f"{prefix}{check_name(config['name'])}", entry["class_name"]
        self.calls += 1
        if self.calls > MAX_OPERATIONS:
            raise CompileError(f"the model calls more than {MAX_OPERATIONS} layers; the engine is for smaller ones")
        if kind in ("Sequential", "Functional"):
            return self._model(entry, inputs, f"{name}/", trainable)
        ours = str(entry.get("module", "keras")).split(".")[0] == "keras"
        layer = KerasLayer(
            name, kind if ours else f"{entry['module']}>{kind}", config, trainable and config.get("trainable", True)
        )
        ops = len(self.ops)
        value = self._lower(layer, inputs)
        if any(op.weights is not None for op in self.ops[ops:]):
            if name in self.layers:
                raise layer.error("is used more than once; the engine's layers do not share weights: use one for each")
            self.layers.add(name)
        return [value]

    def _lower(self, layer: KerasLayer, inputs: list[_Value]) -> _Value:
        config = layer.config
        dtype = config.get("dtype", "float32")
        dtype = dtype["config"].get("name") if isinstance(dtype, dict) else dtype
        if dtype != "float32" or config.get("quantization_config"):
            raise layer.error(f"computes in {dtype}; the engine computes Keras models in float32")
        if config.get("data_format", "channels_last") != "channels_last":
            raise layer.error("has its channels first; the engine wants channels_last")
        if layer.kind in ("Add", "Concatenate"):
            if len(inputs) < 2:
                raise layer.error("takes a constant, which is not supported; give it two tensors of the model")
            return self._add(layer, inputs) if layer.kind == "Add" else self._concatenate(layer, inputs)
        lower = _LAYERS.get(layer.kind.removesuffix("1D").removesuffix("2D"))
        if lower is None or layer.kind.endswith("3D"):
            raise layer.error(f"is not supported. Supported: {SUPPORTED}")
        if len(inputs) != 1:
            raise layer.error(f"takes {len(inputs)} inputs; only Add and Concatenate may")
        needed = 2 if layer.kind.endswith("1D") else 3 if layer.kind.endswith("2D") else len(inputs[0].shape)
        if len(inputs[0].shape) != needed:
            what = "a sequence (steps, channels)" if needed == 2 else "an image (height, width, channels)"
            raise layer.error(f"needs {what}, but gets shape {inputs[0].shape}")
        return lower(self, layer, inputs[0])

    def op(self, kind: Kind, layer: KerasLayer, inputs: Sequence[_Value], shape: Shape, **fields: Any) -> _Value:
        """One more operation, whose output has this shape."""
        if min(shape) < 1:
            raise layer.error(f"leaves nothing of its input {inputs[0].shape}; make its window or its cut smaller")
        if max(shape) > MAX_SIDE:
            raise layer.error(f"gives the shape {shape}; supported are up to {MAX_SIDE} along an axis")
        self.tensors.append(Tensor(_shape3(shape)))
        output = len(self.tensors) - 1
        self.ops.append(Op(kind, layer.name, tuple(v.tensor for v in inputs), output, **fields))
        return _Value(output, shape)

    def weighted(
        self,
        kind: Kind,
        source: WeightSource,
        x: _Value,
        shape: Shape,
        weights: Shape,
        frozen: bool = False,
        **fields: Any,
    ) -> _Value:
        """One more operation with weights of this shape and a bias, all 0 until they are read."""
        if min(weights) < 1:
            raise source.layer.error(f"has weights of the shape {weights}; save the model again")
        self.weight_bytes += 4 * (math.prod(weights) + shape[-1])
        if self.weight_bytes > MAX_BYTES:
            raise source.layer.error(f"makes the model's weights more than the {MAX_BYTES:,} bytes of a program")
        y = self.op(
            kind,
            source.layer,
            [x],
            shape,
            weights=np.zeros(weights, np.float32),
            bias=np.zeros(shape[-1], np.float32),
            trains="all" if source.layer.trainable and not frozen else "nothing",
            **fields,
        )
        self.sources[y.tensor] = source
        return y

    def view(self, x: _Value, shape: Shape) -> _Value:
        """The same elements under another shape."""
        if _shape3(shape) == self.tensors[x.tensor].shape:
            return _Value(x.tensor, shape)
        root = self.tensors[x.tensor].view_of
        self.tensors.append(Tensor(_shape3(shape), view_of=x.tensor if root is None else root))
        return _Value(len(self.tensors) - 1, shape)

    def activation(self, layer: KerasLayer, function: Any, x: _Value) -> _Value:
        """A layer's activation: by its name, or as a layer in its place."""
        if isinstance(function, dict) and function.get("class_name") in ("ReLU", "LeakyReLU", "Softmax"):
            inner = KerasLayer(layer.name, function["class_name"], function["config"], False)
            return _LAYERS[inner.kind](self, inner, x)
        if isinstance(function, dict):
            name = function.get("config")
            function = name if isinstance(name, str) else function.get("class_name", "of its own")
        if function == "linear":
            return x
        if function not in ACTIVATIONS:
            raise layer.error(
                f"has the activation {function}, which is not supported. Supported: linear, {', '.join(ACTIVATIONS)}"
            )
        return self.op(ACTIVATIONS[function], layer, [x], x.shape, slope=LEAKY_RELU_SLOPE * (function == "leaky_relu"))

    def window(
        self, layer: KerasLayer, x: _Value, size: Any, strides: Any, padding: str, dilation: Any = (1, 1)
    ) -> tuple[Shape, dict[str, Any]]:
        """Rows and columns of what a sliding window gives (only columns for a sequence), and the operation's fields."""
        kernel, stride, dilation = _pair(size), _pair(strides), _pair(dilation)
        sides = [
            windows(n, k, s, d, padding)
            for n, k, s, d in zip(_shape3(x.shape), kernel, stride, dilation, strict=False)
        ]  # fmt: skip
        shape = tuple(count for count, _ in sides)[3 - len(x.shape) :]
        pads = (sides[0][1], sides[1][1])
        if len(x.shape) == 2:
            pads = (0, pads[1])
        return shape, {"kernel": kernel, "strides": stride, "dilation": dilation, "pads": pads}

    # Layers of several inputs

    def _add(self, layer: KerasLayer, inputs: list[_Value]) -> _Value:
        total = inputs[0]
        for value in inputs[1:]:
            if value.shape != total.shape:
                raise layer.error(f"adds shapes {total.shape} and {value.shape}; the engine adds tensors of one shape")
            total = self.op(Kind.ADD, layer, [total, value], total.shape)
        return total

    def _concatenate(self, layer: KerasLayer, inputs: list[_Value]) -> _Value:
        rank = len(inputs[0].shape)
        axis = layer.config["axis"]
        axis = axis + rank if axis < 0 else axis - 1  # the batch is axis 0
        if not 0 <= axis < rank:
            raise layer.error("joins samples of a batch; the engine has one sample")
        shape = list(inputs[0].shape)
        shape[axis] = sum(v.shape[axis] for v in inputs)
        output = None
        begin = 0
        for value in inputs:
            offsets = [0, 0, 0]
            offsets[3 - rank + axis] = begin
            begin += value.shape[axis]
            if output is None:
                output = self.op(Kind.PLACE, layer, [value], tuple(shape))
            else:
                self.ops.append(
                    Op(
                        Kind.PLACE,
                        layer.name,
                        (value.tensor,),
                        output.tensor,
                        offsets=(offsets[0], offsets[1], offsets[2]),
                    )
                )
        assert output is not None
        return output


# One layer each: the operations that it becomes, and what they give


def _dense(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    units = layer.config["units"]
    shape = (*x.shape[:-1], units)
    if len(x.shape) == 1:
        y = b.weighted(Kind.DENSE, WeightSource(layer), x, shape, (units, x.shape[0]))
    else:  # of every place by itself
        fields: dict[str, Any] = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
        y = b.weighted(Kind.CONV2D, WeightSource(layer), x, shape, (units, 1, 1, x.shape[-1]), **fields)
    return b.activation(layer, layer.config["activation"], y)


def _conv(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    config = layer.config
    if config["groups"] != 1:
        raise layer.error("is grouped; supported are groups=1, and a DepthwiseConv2D")
    y = _convolution(b, WeightSource(layer), x, config["filters"])
    return b.activation(layer, config["activation"], y)


def _convolution(b: _Builder, source: WeightSource, x: _Value, filters: int) -> _Value:
    config = source.layer.config
    places, fields = b.window(
        source.layer, x, config["kernel_size"], config["strides"], config["padding"], config["dilation_rate"]
    )
    return b.weighted(Kind.CONV2D, source, x, (*places, filters), (filters, *fields["kernel"], x.shape[-1]), **fields)


def _depthwise_conv(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    return b.activation(layer, layer.config["activation"], _depthwise(b, WeightSource(layer), x))


def _depthwise(b: _Builder, source: WeightSource, x: _Value) -> _Value:
    config = source.layer.config
    places, fields = b.window(
        source.layer, x, config["kernel_size"], config["strides"], config["padding"], config["dilation_rate"]
    )
    channels = x.shape[-1] * config["depth_multiplier"]
    return b.weighted(Kind.DEPTHWISE, source, x, (*places, channels), (*fields["kernel"], channels), **fields)


def _separable_conv(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    deep = _depthwise(b, WeightSource(layer, part=0), x)
    filters = layer.config["filters"]
    fields: dict[str, Any] = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
    shape, weights = (*deep.shape[:-1], filters), (filters, 1, 1, deep.shape[-1])
    y = b.weighted(Kind.CONV2D, WeightSource(layer, part=1), deep, shape, weights, **fields)
    return b.activation(layer, layer.config["activation"], y)


def _pooling(kind: Kind) -> Callable[[_Builder, KerasLayer, _Value], _Value]:
    def lower(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
        config = layer.config
        places, fields = b.window(layer, x, config["pool_size"], config["strides"], config["padding"])
        return b.op(kind, layer, [x], (*places, x.shape[-1]), **fields)

    return lower


def _global_pooling(kind: Kind) -> Callable[[_Builder, KerasLayer, _Value], _Value]:
    def lower(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
        rows, columns, channels = _shape3(x.shape)
        strides = (min(rows, 255), min(columns, 255))  # one window only: any would do
        fields = {"kernel": (rows, columns), "strides": strides, "dilation": (1, 1)}
        shape = (*[1] * (len(x.shape) - 1), channels) if layer.config["keepdims"] else (channels,)
        return b.op(kind, layer, [x], shape, **fields)

    return lower


def _of_channels(layer: KerasLayer, axis: Any, x: _Value) -> None:
    """Raises CompileError unless a normalization goes by the last axis."""
    axes = axis if isinstance(axis, list | tuple) else [axis]
    if len(axes) != 1 or axes[0] not in (-1, len(x.shape)):
        raise layer.error(f"goes over axis {axis}; supported is the last one")


def _scaled(b: _Builder, layer: KerasLayer, source: WeightSource, x: _Value) -> _Value:
    """A frozen scale and shift of every channel."""
    fields: dict[str, Any] = {"kernel": (1, 1), "strides": (1, 1), "dilation": (1, 1)}
    return b.weighted(Kind.DEPTHWISE, source, x, x.shape, (1, 1, x.shape[-1]), frozen=True, **fields)


def _batch_norm(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    _of_channels(layer, layer.config["axis"], x)
    if layer.config.get("renorm"):
        raise layer.error("renormalizes; supported is renorm=False")
    return _scaled(b, layer, WeightSource(layer, norms=(layer,)), x)


def _rescaling(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    for name in ("scale", "offset"):
        value = np.asarray(layer.config[name])
        if value.size not in (1, x.shape[-1]) or value.dtype.kind not in "fi":
            raise layer.error(f"has a {name} that is neither one number nor one for each channel")
    return _scaled(b, layer, WeightSource(layer), x)


def _normalization(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    if layer.config["axis"] not in (None, [], ()):
        _of_channels(layer, layer.config["axis"], x)
    if layer.config["invert"]:
        raise layer.error("goes backwards; supported is invert=False")
    return _scaled(b, layer, WeightSource(layer), x)


def _layer_norm(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    config = layer.config
    _of_channels(layer, config["axis"], x)
    if config.get("rms_scaling"):
        raise layer.error("scales by the root mean square; supported is rms_scaling=False")
    return b.weighted(Kind.LAYERNORM, WeightSource(layer), x, x.shape, (x.shape[-1],), epsilon=config["epsilon"])


def _flatten(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    return b.view(x, (math.prod(x.shape),))


def _reshape(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    target = list(layer.config["target_shape"])
    if target.count(-1) == 1:
        target[target.index(-1)] = math.prod(x.shape) // -math.prod(target)
    if math.prod(target) != math.prod(x.shape) or not 1 <= len(target) <= 3:
        raise layer.error(f"makes {x.shape} to {tuple(target)}; supported are one to three dimensions")
    return b.view(x, tuple(target))


def _around(value: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(before, after) of rows and columns, of what is padded or cropped."""
    if isinstance(value[0], int):
        return (0, 0), (value[0], value[1])
    (top, bottom), (left, right) = value
    return (top, bottom), (left, right)


def _zero_padding(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    rows, columns = _around(layer.config["padding"])
    h, w, c = _shape3(x.shape)
    shape = (h + sum(rows), w + sum(columns), c)[3 - len(x.shape) :]
    return b.op(Kind.PLACE, layer, [x], shape, offsets=(rows[0], columns[0], 0), fills=True)


def _cropping(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    rows, columns = _around(layer.config["cropping"])
    h, w, c = _shape3(x.shape)
    shape = (h - sum(rows), w - sum(columns), c)[3 - len(x.shape) :]
    return b.op(Kind.SLICE, layer, [x], shape, begin=(rows[0], columns[0], 0))


def _activation_layer(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    return b.activation(layer, layer.config["activation"], x)


def _relu(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    config = layer.config
    slope, most = config["negative_slope"], config["max_value"]
    if config["threshold"] or most not in (None, 6) or (slope and most):
        raise layer.error("has another maximum than 6, a maximum and a slope, or a threshold; supported are the plain "
                          "ReLU(), ReLU(6) and ReLU(negative_slope=...)")  # fmt: skip
    kind = Kind.RELU6 if most else Kind.LEAKY_RELU if slope else Kind.RELU
    return b.op(kind, layer, [x], x.shape, slope=slope or 0.0)


def _leaky_relu(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    return b.op(Kind.LEAKY_RELU, layer, [x], x.shape, slope=layer.config["negative_slope"])


def _softmax(b: _Builder, layer: KerasLayer, x: _Value) -> _Value:
    axis = layer.config["axis"]
    if axis not in (-1, len(x.shape)):
        raise layer.error(f"goes over axis {axis}; supported is the last one")
    return b.op(Kind.SOFTMAX, layer, [x], x.shape)


def _simple(kind: Kind) -> Callable[[_Builder, KerasLayer, _Value], _Value]:
    return lambda b, layer, x: b.op(kind, layer, [x], x.shape)


#: By Keras's class names, without 1D and 2D.
_LAYERS: dict[str, Callable[[_Builder, KerasLayer, _Value], _Value]] = {
    "Dense": _dense,
    "Conv": _conv,
    "DepthwiseConv": _depthwise_conv,
    "SeparableConv": _separable_conv,
    "AveragePooling": _pooling(Kind.AVGPOOL),
    "MaxPooling": _pooling(Kind.MAXPOOL),
    "GlobalAveragePooling": _global_pooling(Kind.AVGPOOL),
    "GlobalMaxPooling": _global_pooling(Kind.MAXPOOL),
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "ZeroPadding": _zero_padding,
    "Cropping": _cropping,
    "Activation": _activation_layer,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "Softmax": _softmax,
    "Relu": _simple(Kind.RELU),  # keras.ops.relu, and so on
    "Relu6": _simple(Kind.RELU6),
    **{name.removesuffix("1D").removesuffix("2D"): lambda b, layer, x: x for name in IDENTITIES},
}


def _fold(builder: _Builder, output: int) -> tuple[list[Op], list[WeightSource]]:
    """The operations, with every batch normalization that alone reads what an operation with weights gives made part of
    that; and the sources of those with weights."""
    read = Counter(i for op in builder.ops for i in op.inputs)
    read.update(t.view_of for t in builder.tensors if t.view_of is not None)
    read[output] += 1
    ops: list[Op] = []
    sources: dict[int, WeightSource] = {}  # by place among the operations
    place: dict[int, int] = {}  # of those with weights, by output
    for op in builder.ops:
        source = builder.sources.get(op.output)
        before = place.get(op.inputs[0])
        if (
            source is not None
            and source.kind == "BatchNormalization"
            and before is not None
            and read[op.inputs[0]] == 1
        ):
            ops[before] = replace(ops[before], output=op.output)
            sources[before] = replace(sources[before], norms=sources[before].norms + source.norms)
            place[op.output] = before
            continue
        if source is not None:
            place[op.output] = len(ops)
            sources[len(ops)] = source
        ops.append(op)
    return ops, [sources[i] for i in sorted(sources)]
