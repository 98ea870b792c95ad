""".tflite files in: float32 and int8 models as graphs of the engine.

Only the file's tables are read (FlatBuffers, the schema of TensorFlow Lite 3); no interpreter is opened, so a file that
would crash one is read or refused like any other. Everything in it may be wrong: offsets, sizes, indices, shapes.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tflite  # type: ignore[import-untyped]
from numpy.typing import NDArray
from tinyfleet.edge.model.graph import Graph, Kind, Op, Shape3, Tensor
from tinyfleet.edge.model.quantized import (
    constants,
    leaky_relu_table,
    logistic_table,
    relu_table,
    requantize_table,
    tanh_table,
)
from tinyfleet.firmware_tools.readers.simplify import CompileError, simplify, windows

_MAX_ITEMS = 20_000
_MAX_SIDE = 0xFFFF
_MAX_STEP = 0xFF
_TYPES = {number: name for name, number in vars(tflite.TensorType).items() if not name.startswith("_")}
_OPERATORS = {number: name for name, number in vars(tflite.BuiltinOperator).items() if not name.startswith("_")}
_ACTIVATIONS = {n: name for name, n in vars(tflite.ActivationFunctionType).items() if not name.startswith("_")}
_NUMBERS = {"FLOAT32": "<f4", "INT8": "<i1", "INT32": "<i4", "INT64": "<i8"}
_CLAMPS = {"RELU": (0.0, math.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
_FLOAT_ACTIVATIONS = {"RELU": Kind.RELU, "RELU6": Kind.RELU6, "TANH": Kind.TANH}


def read_tflite(model: Path | bytes) -> Graph:
    """The graph of a .tflite file (or of its bytes), for inference, with all weights.

    A batch of one sample; tensors [1, n], [1, t, c] and [1, h, w, c] become (1, 1, n), (1, t, c) and (h, w, c). Ops are
    named after the layers that the file's tensor names tell of; activations that are fused in the file belong to their
    layer. Raises CompileError, in one line, naming the operator or the defect.
    """
    if isinstance(model, Path) and not model.is_file():
        raise CompileError(f"there is no file '{model}'")
    data = model.read_bytes() if isinstance(model, Path) else model
    name = f"'{model.name}'" if isinstance(model, Path) else "the model"
    if len(data) < 16 or data[4:8] != b"TFL3":
        raise CompileError(f"{name} is no .tflite file (no TFL3 at its start)")
    try:
        return _Reader(_file(data)).graph()
    except CompileError as error:
        raise CompileError(f"{name}: {error}") from None
    except (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        detail = str(error).splitlines()[:1] or [type(error).__name__]
        raise CompileError(f"{name} is damaged: its tables do not fit together ({detail[0]})") from None


# The file


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file. scales: none unless it is quantised; axis: what they run along if there are several."""

    name: str
    type: str
    shape: tuple[int, ...]
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int
    data: bytes | None

    def error(self, problem: str) -> CompileError:
        return CompileError(f"tensor {self.name!r:.80} {problem}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def sample(self) -> Shape3:
        """(h, w, c) of one sample."""
        shape = self.shape
        if len(shape) > 4 or any(n < 1 for n in shape):
            raise self.error(f"has the shape {list(shape)}; supported are one to four axes of fixed size")
        if len(shape) > 1 and shape[0] != 1:
            raise self.error(f"has the shape {list(shape)}, a batch of {shape[0]}; supported is a batch of one sample")
        h, w, c = ((1, 1, 1) + (shape[1:] if len(shape) > 1 else shape))[-3:]
        if max(h, w, c) > _MAX_SIDE:
            raise self.error(f"has the shape {list(shape)}; supported are up to {_MAX_SIDE} along an axis")
        return h, w, c

    @property
    def array(self) -> NDArray[Any]:
        """The constant's numbers. Raises CompileError if it is none."""
        if self.data is None:
            raise self.error("is computed by the model; only a constant is supported in its place")
        if self.type not in _NUMBERS:
            raise self.error(f"is a constant of {self.type}; supported are FLOAT32, INT8 and INT32")
        return np.frombuffer(self.data, _NUMBERS[self.type]).reshape(self.shape)

    @property
    def numbers(self) -> list[int]:
        """A constant of whole numbers: axes, sizes, ..."""
        if self.type not in ("INT32", "INT64"):
            raise self.error(f"is {self.type}; INT32 is wanted in its place")
        return [int(n) for n in self.array.reshape(-1)]


@dataclass(frozen=True)
class _Operator:
    kind: str
    table: Any
    inputs: tuple[_Tensor | None, ...]
    input_indices: tuple[int, ...]
    output: _Tensor
    output_index: int

    def error(self, problem: str) -> CompileError:
        return CompileError(f"operator {self.kind} (output {self.output.name!r:.80}) {problem}")

    def input(self, place: int) -> _Tensor:
        tensor = self.inputs[place] if place < len(self.inputs) else None
        if tensor is None:
            raise self.error(f"lacks its input {place}")
        return tensor

    def options(self, name: str) -> Any:
        table = self.table.BuiltinOptions()
        if table is None or self.table.BuiltinOptionsType() != getattr(tflite.BuiltinOptions, name):
            raise self.error(f"lacks its {name}; the file is damaged")
        options = getattr(tflite, name)()
        options.Init(table.Bytes, table.Pos)
        return options

    def activation(self, options: Any) -> str:
        name = _ACTIVATIONS.get(options.FusedActivationFunction())
        if name is None:
            raise self.error("has an unknown fused activation; the file is damaged")
        return str(name)


@dataclass(frozen=True)
class _File:
    operators: tuple[_Operator, ...]
    tensors: tuple[_Tensor, ...]
    input: int
    output: int


def _count(number: int, what: str, most: int = _MAX_ITEMS) -> int:
    if not 0 <= number <= most:
        raise CompileError(f"it is damaged: {number} {what}")
    return number


def _index(number: int, length: int, what: str) -> int:
    if not 0 <= number < length:
        raise CompileError(f"it is damaged: {what} {number} of {length}")
    return number


def _file(data: bytes) -> _File:
    model = tflite.Model.GetRootAs(data, 0)
    if model.Version() != 3:
        raise CompileError(f"version {model.Version()} of the format is not known, only 3")
    if model.SubgraphsLength() != 1:
        raise CompileError(f"it has {model.SubgraphsLength()} subgraphs; supported is one")
    graph = model.Subgraphs(0)
    kinds = [_kind(model.OperatorCodes(i)) for i in range(_count(model.OperatorCodesLength(), "operator codes"))]
    tensors = [_tensor(model, graph.Tensors(i), len(data)) for i in range(_count(graph.TensorsLength(), "tensors"))]
    operators = [
        _operator(graph.Operators(i), kinds, tensors) for i in range(_count(graph.OperatorsLength(), "operators"))
    ]
    if not operators:
        raise CompileError("it has no operator, so nothing to run")
    for what, count in (("inputs", graph.InputsLength()), ("outputs", graph.OutputsLength())):
        if count != 1:
            raise CompileError(f"it has {count} {what}; supported is one")
    ends = (_index(i, len(tensors), "tensor") for i in (graph.Inputs(0), graph.Outputs(0)))
    return _File(tuple(operators), tuple(tensors), *ends)


def _kind(code: Any) -> str:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    return str(_OPERATORS.get(number, f"number {number}"))


def _tensor(model: Any, tensor: Any, file_size: int) -> _Tensor:
    name = (tensor.Name() or b"").decode("utf-8", errors="replace")
    shape = tuple(int(tensor.Shape(i)) for i in range(_count(tensor.ShapeLength(), "axes of a tensor", 8)))
    if tensor.ShapeSignatureLength() == len(shape) and any(
        tensor.ShapeSignature(i) < 0 for i in range(1, len(shape))
    ):  # an open batch runs as one sample
        raise CompileError(f"tensor {name!r:.80} has a dynamic shape; convert the model with a fixed input shape")
    kind = str(_TYPES.get(tensor.Type(), f"number type {tensor.Type()}"))
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis = 0
    quantization = tensor.Quantization()
    if quantization is not None:
        scales = tuple(float(quantization.Scale(i)) for i in range(_count(quantization.ScaleLength(), "scales")))
        zero_points = tuple(
            int(quantization.ZeroPoint(i)) for i in range(_count(quantization.ZeroPointLength(), "zero points"))
        )
        axis = quantization.QuantizedDimension()
        if len(scales) > 1 and not 0 <= axis < len(shape):
            raise CompileError(f"tensor {name!r:.80} has the quantised dimension {axis}, but {len(shape)} dimensions")
        if len(scales) > 1 and len(scales) != shape[axis]:
            raise CompileError(f"tensor {name!r:.80} has {len(scales)} scales for an axis of {shape[axis]}")
        if not all(math.isfinite(s) and s > 0 for s in scales):
            raise CompileError(f"tensor {name!r:.80} has a scale that is not a positive number")
    if tensor.Sparsity() is not None:
        raise CompileError(f"tensor {name!r:.80} is sparse; supported are dense tensors")
    data = _buffer(model, tensor, file_size)
    if data is not None and kind in _NUMBERS and len(data) != math.prod(shape) * np.dtype(_NUMBERS[kind]).itemsize:
        raise CompileError(f"tensor {name!r:.80} is {kind} {list(shape)}, but has {len(data)} bytes of constants")
    return _Tensor(name, kind, shape, scales, zero_points, axis, data)


def _buffer(model: Any, tensor: Any, file_size: int) -> bytes | None:
    """A constant tensor's bytes."""
    buffer = model.Buffers(_index(tensor.Buffer(), _count(model.BuffersLength(), "buffers"), "buffer"))
    length = int(buffer.DataLength())
    if length > file_size or buffer.Size() > 1:
        raise CompileError("it is damaged, or above 2 GB: a buffer is not inside of its tables")
    return buffer.DataAsNumpy().tobytes() if length else None


def _operator(operator: Any, kinds: list[str], tensors: list[_Tensor]) -> _Operator:
    kind = kinds[_index(operator.OpcodeIndex(), len(kinds), "operator code")]
    inputs = [operator.Inputs(i) for i in range(_count(operator.InputsLength(), "inputs of an operator", 256))]
    outputs = [operator.Outputs(i) for i in range(_count(operator.OutputsLength(), "outputs of an operator", 256))]
    if kind not in _LOWER:
        raise CompileError(f"operator {kind} is not supported. Supported: {', '.join(sorted(_LOWER))}")
    if len(outputs) != 1 or not inputs:
        raise CompileError(f"operator {kind} has {len(inputs)} inputs and {len(outputs)} outputs; it is damaged")
    output = _index(outputs[0], len(tensors), "tensor")
    given = tuple(None if i == -1 else tensors[_index(i, len(tensors), "tensor")] for i in inputs)
    return _Operator(kind, operator, given, tuple(inputs), tensors[output], output)


# Names

_CALLS = re.compile(r"^(Stateful)?PartitionedCall(_\d+)?(:\d+)?(_int8)?$")
#: What TensorFlow and its converter put behind a layer's name, or give to what has none.
_NO_LAYER = re.compile(
    r"^(Identity|BiasAdd|ReadVariableOp|resource|read|MatMul|Conv2D|convolution|depthwise|Relu6?|Softmax|Sigmoid|Tanh|LeakyRelu"
    r"|add|Add|AddV2|mul|Mul|AvgPool|MaxPool(2d)?|Mean|Pad|PadV2|Reshape|Squeeze|ExpandDims|concat|FusedBatchNormV3|batchnorm"
    r"|transpose|kernel|bias|strided_slice|unknown|tfl\..*|std\..*|arith\..*|)(_\d+|\d+)?(:\d+)?(_int8|_bias)?$"
)
_OF_WEIGHTS = re.compile(r"_(weights|kernel|bias)$")
_ADD = re.compile(r"^add(_\d+)?$")  # Keras names layers so
_ODD = re.compile(r"[^\w.:+-]", re.ASCII)
_MINOR = re.compile(r"^(activation|re_lu|batch_normalization)(_\d+)?$")
#: The TensorFlow operations that an operator with weights is made of.
_MADE_OF = {"FULLY_CONNECTED": r"/MatMul", "CONV_2D": r"/(Conv2D|convolution)", "DEPTHWISE_CONV_2D": r"/depthwise"}
_PLAIN = {"FULLY_CONNECTED": "dense", "CONV_2D": "conv2d", "DEPTHWISE_CONV_2D": "depthwise_conv2d"}


def _layer_of(path: str) -> str | None:
    """The layer in a name like "model/dense/MatMul"; None if it tells of none."""
    parts = [part for part in path.split("/") if not _CALLS.match(part)]
    if len(parts) > 1 and _NO_LAYER.match(parts[-1]):
        parts.pop()
    while len(parts) > 1 and _NO_LAYER.match(parts[-1]) and not _ADD.match(parts[-1]):
        parts.pop()
    if not parts or (len(parts) == 1 and _NO_LAYER.match(parts[0])):
        return None
    return _ODD.sub("_", _OF_WEIGHTS.sub("", parts[-1]))[:64]


def _name(operator: _Operator) -> str:
    """A readable name for the layer that an operator is: its weights' tell most surely."""
    word = _MADE_OF.get(operator.kind)
    tensors = (*operator.inputs[1:2], operator.output, *operator.inputs[2:3]) if word else (operator.output,)
    paths = [path for tensor in tensors if tensor is not None for path in tensor.name.split(";")]
    paths.sort(key=lambda path: not word or not re.search(word, path))
    found = [layer for path in paths if (layer := _layer_of(path))]
    major = [layer for layer in found if not _MINOR.match(layer)]
    return next(iter(major or found), _PLAIN.get(operator.kind, operator.kind.lower()))


# The graph


class _Reader:
    """Makes the graph of a file, operator by operator. at: the graph's tensor for each of the file's."""

    def __init__(self, file: _File) -> None:
        self.file = file
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.at: dict[int, int] = {}
        self.names: set[str] = set()

    def graph(self) -> Graph:
        source = self.file.tensors[self.file.input]
        if source.data is not None:
            raise source.error("is the model's input, but a constant")
        self.at[self.file.input] = self.add(self.value(source))
        for operator in self.file.operators:
            if operator.output_index in self.at or operator.output.data is not None:
                raise operator.error("writes a tensor that is written already; the file is damaged")
            _LOWER[operator.kind](self, operator)
        if self.file.output not in self.at:
            raise self.file.tensors[self.file.output].error("is the model's output, but no operator writes it")
        output = self.at[self.file.output]
        if 0 in (output, self.tensors[output].view_of):
            raise CompileError("its output is its input; it computes nothing")
        for op in self.ops:
            try:
                constants(op, self.tensors)
            except (ValueError, struct.error) as error:
                raise CompileError(f"layer '{op.name}': {error}") from None
        return simplify(Graph(tuple(self.tensors), tuple(self.ops), output))

    def add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def value(self, tensor: _Tensor, shape: Shape3 | None = None) -> Tensor:
        """An activation as a tensor of the graph."""
        shape = tensor.sample if shape is None else shape
        if tensor.type == "FLOAT32":
            return Tensor(shape)
        if tensor.type != "INT8":
            raise tensor.error(f"is {tensor.type}; supported are FLOAT32 and INT8")
        if len(tensor.scales) != 1 or len(tensor.zero_points) > 1:
            raise tensor.error("is INT8 without exactly one scale; supported are activations quantised per tensor")
        zero_point = tensor.zero_points[0] if tensor.zero_points else 0
        if not -128 <= zero_point <= 127:
            raise tensor.error(f"has the zero point {zero_point}, which no INT8 can be")
        return Tensor(shape, "int8", tensor.scales[0], zero_point)

    def input(self, operator: _Operator, place: int = 0) -> int:
        """The graph's tensor at an operator's input."""
        tensor = operator.input(place)
        if tensor.data is not None:
            raise operator.error(f"has the constant {tensor.name!r:.60} as its input {place}, which is not supported")
        index = operator.input_indices[place]
        if index not in self.at:
            raise operator.error(f"reads tensor {index} before it is written; the file is damaged")
        return self.at[index]

    def view(self, index: int, shape: Shape3) -> int:
        """A tensor under another shape."""
        tensor = self.tensors[index]
        if tensor.shape == shape:
            return index
        root = index if tensor.view_of is None else tensor.view_of
        return self.add(replace(tensor, shape=shape, view_of=root))

    def name(self, operator: _Operator) -> str:
        base = _name(operator)
        name, number = base, 0
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name

    def emit(
        self, operator: _Operator, kind: Kind, inputs: tuple[int, ...], activation: str = "NONE", **fields: Any
    ) -> None:
        """An op that writes the operator's output, with the activation that is fused into it."""
        name = self.name(operator)
        y = self.value(operator.output)
        if y.dtype == "int8" or activation == "NONE":
            self.at[operator.output_index] = out = self.add(y)
            if activation != "NONE":
                fields["low"], fields["high"] = _clamp(operator, activation, y)
            self.ops.append(Op(kind, name, inputs, out, **fields))
            return
        if activation not in _FLOAT_ACTIVATIONS:
            raise operator.error(
                f"has the fused activation {activation}; supported are {', '.join(_FLOAT_ACTIVATIONS)}"
            )
        between = self.add(y)
        self.at[operator.output_index] = out = self.add(y)
        self.ops.append(Op(kind, name, inputs, between, **fields))
        self.ops.append(Op(_FLOAT_ACTIVATIONS[activation], name, (between,), out))


def _clamp(operator: _Operator, activation: str, y: Tensor) -> tuple[int, int]:
    """What an int8 output is clamped to, as TFLite's CalculateActivationRangeQuantized."""
    if activation not in _CLAMPS:
        raise operator.error(f"has the fused activation {activation}; supported are {', '.join(_CLAMPS)}")

    def bound(real: float) -> int:
        ratio = float(np.float32(real) / np.float32(y.scale))
        return y.zero_point + int(math.copysign(math.floor(abs(ratio) + 0.5), ratio))

    low, high = _CLAMPS[activation]
    least, most = max(-128, bound(low)), 127 if high == math.inf else min(127, bound(high))
    if not -128 <= least <= most <= 127:
        raise operator.error(f"has the fused activation {activation}, of which no value fits its output's scale")
    return least, most


def _one_type(reader: _Reader, operator: _Operator, *inputs: int) -> bool:
    """Whether the operator is int8. Raises CompileError if its activations are of several types."""
    y = reader.value(operator.output)
    for i in inputs:
        if reader.tensors[i].dtype != y.dtype:
            raise operator.error(f"has {reader.tensors[i].dtype} input, but {y.dtype} output")
    return y.dtype == "int8"


def _same_scale(reader: _Reader, operator: _Operator, *inputs: int) -> None:
    y = reader.value(operator.output)
    for x in (reader.tensors[i] for i in inputs):
        if (x.scale, x.zero_point) != (y.scale, y.zero_point):
            raise operator.error("has an input of another scale or zero point than its output")


def _weights(operator: _Operator, x: Tensor, shape: tuple[int, ...], channel_axis: int) -> dict[str, Any]:
    """Weights, bias and scales. shape: what the weights must have, None where anything is right."""
    weights = operator.input(1)
    channels = weights.shape[channel_axis] if channel_axis < len(weights.shape) else 0
    int8 = x.dtype == "int8"
    wanted = "INT8" if int8 else "FLOAT32"
    if weights.type != wanted:
        mixture = "hybrid: float activations with quantised weights" if not int8 else "int8 activations"
        raise operator.error(f"has {weights.type} weights ({mixture}); supported are {wanted} weights")
    if len(weights.shape) != len(shape) or any(s not in (0, n) for s, n in zip(shape, weights.shape, strict=True)):
        raise operator.error(f"has weights of shape {list(weights.shape)}, which do not fit its input {list(x.shape)}")
    fields: dict[str, Any] = {"weights": weights.array}
    if int8:
        if len(weights.scales) not in (1, channels):
            raise weights.error(f"has {len(weights.scales)} scales; supported is one, or one for each output channel")
        if len(weights.scales) > 1 and weights.axis != channel_axis:
            raise weights.error(
                f"has the quantised dimension {weights.axis}; supported is that of the output channels, {channel_axis}"
            )
        if any(weights.zero_points):
            raise weights.error("has weights with a zero point other than 0; convert the model with symmetric weights")
        fields["weight_scales"] = np.broadcast_to(np.array(weights.scales, np.float64), channels).copy()
    bias = operator.inputs[2] if len(operator.inputs) > 2 else None
    number = "INT32" if int8 else "FLOAT32"
    if bias is None:
        fields["bias"] = np.zeros(channels, np.int32 if int8 else np.float32)
    elif bias.type != number or bias.size != channels:
        raise operator.error(f"has a bias of {bias.type} {list(bias.shape)}; supported is {number} [{channels}]")
    else:
        fields["bias"] = bias.array.reshape(channels)
    return fields


def _window(operator: _Operator, options: Any, x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Any:
    """A window's fields, by TensorFlow's rule of padding, checked against the output's shape."""
    strides = (options.StrideH(), options.StrideW())
    if options.Padding() not in (tflite.Padding.SAME, tflite.Padding.VALID):
        raise operator.error("has an unknown padding; the file is damaged")
    if not all(1 <= n <= _MAX_STEP for n in (*strides, *dilation)) or not all(1 <= n <= _MAX_SIDE for n in kernel):
        raise operator.error(f"has kernel {kernel}, strides {strides}, dilation {dilation}; supported are 1 to 255")
    padding = "same" if options.Padding() == tflite.Padding.SAME else "valid"
    found = [windows(*sizes, padding) for sizes in zip(x.shape, kernel, strides, dilation, strict=False)]
    if tuple(n for n, _ in found) != operator.output.sample[:2]:
        raise operator.error(f"has the output {list(operator.output.shape)}, which does not follow from its input")
    return {"kernel": kernel, "strides": strides, "dilation": dilation, "pads": (found[0][1], found[1][1])}


def _dense(reader: _Reader, operator: _Operator) -> None:
    options = operator.options("FullyConnectedOptions")
    if options.WeightsFormat() != tflite.FullyConnectedOptionsWeightsFormat.DEFAULT:
        raise operator.error("has shuffled weights; supported are weights in their plain order")
    i = reader.input(operator)
    int8 = _one_type(reader, operator, i)
    flat = reader.view(i, _flat(reader.tensors[i]))
    fields = _weights(operator, reader.tensors[flat], (0, reader.tensors[flat].shape[2]), 0)
    if operator.output.sample != (1, 1, len(fields["bias"])):
        raise operator.error(f"has the output {list(operator.output.shape)}; supported is [1, {len(fields['bias'])}]")
    reader.emit(operator, Kind.INT8_DENSE if int8 else Kind.DENSE, (flat,), operator.activation(options), **fields)


def _flat(x: Tensor) -> Shape3:
    if x.size > _MAX_SIDE:
        raise CompileError(f"a dense layer's input of {x.size} numbers is too large; supported are up to {_MAX_SIDE}")
    return 1, 1, x.size


def _convolution(reader: _Reader, operator: _Operator) -> None:
    options = operator.options("Conv2DOptions")
    i = reader.input(operator)
    int8, x = _one_type(reader, operator, i), reader.tensors[i]
    shape = operator.input(1).shape
    if len(shape) == 4 and shape[3] != x.shape[2] and shape[3] > 0 and x.shape[2] % shape[3] == 0:
        raise operator.error(f"is grouped ({x.shape[2] // shape[3]} groups); supported are ungrouped and depthwise")
    fields = _weights(operator, x, (operator.output.sample[2], 0, 0, x.shape[2]), 0)
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    fields |= _window(operator, options, x, (shape[1], shape[2]), dilation)
    kind = Kind.INT8_CONV2D if int8 else Kind.CONV2D
    reader.emit(operator, kind, (i,), operator.activation(options), **fields)


def _depthwise(reader: _Reader, operator: _Operator) -> None:
    options = operator.options("DepthwiseConv2DOptions")
    i = reader.input(operator)
    int8, x = _one_type(reader, operator, i), reader.tensors[i]
    channels = operator.output.sample[2]
    fields = _weights(operator, x, (1, 0, 0, channels), 3)
    if channels % x.shape[2]:
        raise operator.error(f"makes {channels} channels of {x.shape[2]}; supported are multiples")
    fields["weights"] = fields["weights"][0]
    kernel = operator.input(1).shape[1:3]
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    fields |= _window(operator, options, x, (kernel[0], kernel[1]), dilation)
    kind = Kind.INT8_DEPTHWISE if int8 else Kind.DEPTHWISE
    reader.emit(operator, kind, (i,), operator.activation(options), **fields)


def _pool(reader: _Reader, operator: _Operator) -> None:
    options = operator.options("Pool2DOptions")
    i = reader.input(operator)
    int8, x = _one_type(reader, operator, i), reader.tensors[i]
    if int8:
        _same_scale(reader, operator, i)
    if operator.output.sample[2] != x.shape[2]:
        raise operator.error("has another number of channels than its input; the file is damaged")
    kernel = (options.FilterHeight(), options.FilterWidth())
    fields = _window(operator, options, x, kernel, (1, 1))
    average = operator.kind == "AVERAGE_POOL_2D"
    kind = (Kind.INT8_AVGPOOL if average else Kind.INT8_MAXPOOL) if int8 else Kind.AVGPOOL if average else Kind.MAXPOOL
    reader.emit(operator, kind, (i,), operator.activation(options), **fields)


def _mean(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    int8, x = _one_type(reader, operator, i), reader.tensors[i]
    rank = len(operator.input(0).shape)
    axes = {n % rank + 3 - rank for n in operator.input(1).numbers if -rank <= n < rank}
    left = {axis for axis in (0, 1) if x.shape[axis] > 1} - axes
    if left or not axes <= {0, 1} or operator.output.sample != (1, 1, x.shape[2]):
        raise operator.error("is over other axes; supported is the mean over rows and columns")
    if int8:
        reader.emit(operator, Kind.INT8_MEAN, (i,))
    else:
        reader.emit(operator, Kind.AVGPOOL, (i,), kernel=x.shape[:2], strides=(1, 1), dilation=(1, 1))


def _sum_or_product(reader: _Reader, operator: _Operator) -> None:
    adds = operator.kind == "ADD"
    activation = operator.activation(operator.options("AddOptions" if adds else "MulOptions"))
    if operator.output.type == "FLOAT32" and any(t is not None and t.data is not None for t in operator.inputs):
        return _scale_or_shift(reader, operator, activation)
    pair = (reader.input(operator, 0), reader.input(operator, 1))
    int8 = _one_type(reader, operator, *pair)
    shapes = [reader.tensors[i].shape for i in pair]
    if shapes != [operator.output.sample] * 2:
        raise operator.error(f"has inputs of shapes {shapes[0]} and {shapes[1]}; supported are two of one shape")
    if not int8 and not adds:
        raise operator.error("multiplies two float32 tensors; supported are int8 ones, or one by a constant")
    kind = Kind.ADD if not int8 else Kind.INT8_ADD if adds else Kind.INT8_MUL
    reader.emit(operator, kind, pair, activation)
    return None


def _scale_or_shift(reader: _Reader, operator: _Operator, activation: str) -> None:
    """A float32 sum or product with a constant for each channel: a depthwise convolution of 1 x 1."""
    place = 1 if operator.input(1).data is not None else 0
    i, constant = reader.input(operator, 1 - place), operator.input(place)
    x = reader.tensors[i]
    channels = x.shape[2]
    if (
        constant.type != "FLOAT32"
        or constant.size not in (1, channels)
        or constant.shape[-1:] not in ((channels,), (1,), ())
    ):
        raise operator.error("has a constant that is not one number, or one for each channel")
    if x.dtype != "float32" or operator.output.sample != x.shape:
        raise operator.error("has an output of another type or shape than its input")
    values = np.broadcast_to(constant.array.reshape(-1), channels)
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    weights, bias = (ones, values.copy()) if operator.kind == "ADD" else (values, zeros)
    one = (1, 1)
    reader.emit(
        operator, Kind.DEPTHWISE, (i,), activation, kernel=one, strides=one, dilation=one,
        weights=weights.reshape(1, 1, channels).copy(), bias=bias,
    )  # fmt: skip


def _concatenation(reader: _Reader, operator: _Operator) -> None:
    options = operator.options("ConcatenationOptions")
    if operator.activation(options) != "NONE":
        raise operator.error("has a fused activation, which is not supported")
    parts = [reader.input(operator, place) for place in range(len(operator.inputs))]
    if _one_type(reader, operator, *parts):
        _same_scale(reader, operator, *parts)
    rank = len(operator.output.shape)
    axis = options.Axis() % rank + 3 - rank if -rank <= options.Axis() < rank else -1
    shapes = [reader.tensors[i].shape for i in parts]
    whole = operator.output.sample
    if axis not in (0, 1, 2) or sum(s[axis] for s in shapes) != whole[axis]:
        raise operator.error(f"joins shapes {shapes} along axis {options.Axis()}, which does not give its output")
    if any(s[n] != whole[n] for s in shapes for n in range(3) if n != axis):
        raise operator.error(f"joins shapes {shapes}, which differ in other axes than {options.Axis()}")
    name = reader.name(operator)
    reader.at[operator.output_index] = out = reader.add(reader.value(operator.output))
    first = [0, 0, 0]
    for i, shape in zip(parts, shapes, strict=True):
        reader.ops.append(Op(Kind.PLACE, name, (i,), out, offsets=(first[0], first[1], first[2])))
        first[axis] += shape[axis]


def _pad(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    if _one_type(reader, operator, i):
        _same_scale(reader, operator, i)
    x, y = reader.tensors[i], reader.value(operator.output)
    rank = len(operator.input(0).shape)
    pads = operator.input(1).numbers
    if operator.kind == "PADV2":
        value = operator.input(2).array.reshape(-1)
        if value.tolist() != [y.zero_point]:
            raise operator.error("pads with another value than 0, which is not supported")
    if len(pads) != 2 * rank or min(pads) < 0 or (rank > 1 and any(pads[:2])):
        raise operator.error(f"has the padding {pads}; supported are none below 0, and none of the batch")
    inner = [(0, 0)] * 3 + list(zip(pads[::2], pads[1::2], strict=True))[rank > 1 :]
    (t, b), (l, r), (f, e) = inner[-3:]  # noqa: E741
    h, w, c = x.shape
    if y.shape != (t + h + b, l + w + r, f + c + e):
        raise operator.error(f"has the output {list(operator.output.shape)}, which does not follow from its input")
    reader.emit(operator, Kind.PLACE, (i,), offsets=(t, l, f), fills=True)


def _reshape(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    _one_type(reader, operator, i)
    x, y = reader.tensors[i], reader.value(operator.output)
    if x.size != y.size:
        raise operator.error(f"makes {list(operator.output.shape)} of {x.size} numbers; the file is damaged")
    if (x.scale, x.zero_point) != (y.scale, y.zero_point):
        raise operator.error("has an input of another scale or zero point than its output")
    reader.at[operator.output_index] = reader.view(i, y.shape)


def _softmax(reader: _Reader, operator: _Operator) -> None:
    beta = float(operator.options("SoftmaxOptions").Beta())
    i = reader.input(operator)
    int8, y = _one_type(reader, operator, i), reader.value(operator.output)
    if y.shape != reader.tensors[i].shape:
        raise operator.error("has another shape than its input; the file is damaged")
    if int8 and (y.scale, y.zero_point) != (1 / 256, -128):
        raise operator.error("has an output that is not of scale 1/256 and zero point -128")
    if not int8 and beta != 1.0:
        raise operator.error(f"has beta {beta}; supported is 1 in float32")
    reader.emit(operator, Kind.INT8_SOFTMAX if int8 else Kind.SOFTMAX, (i,), beta=beta)


_UNARY: dict[str, tuple[Kind, Callable[[Tensor, Tensor], bytes]]] = {
    "LOGISTIC": (Kind.SIGMOID, logistic_table),
    "TANH": (Kind.TANH, tanh_table),
    "RELU": (Kind.RELU, relu_table),
    "RELU6": (Kind.RELU6, lambda x, y: relu_table(x, y, 0.0, 6.0)),
}


def _unary(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    int8, x, y = _one_type(reader, operator, i), reader.tensors[i], reader.value(operator.output)
    if x.shape != y.shape:
        raise operator.error("has another shape than its input; the file is damaged")
    slope = 0.0
    if operator.kind == "LEAKY_RELU":
        slope = float(operator.options("LeakyReluOptions").Alpha())
        if not 0 <= slope < math.inf:
            raise operator.error(f"has the slope {slope}; supported are slopes from 0")
        kind, table = Kind.LEAKY_RELU, leaky_relu_table(x, y, slope) if int8 else b""
    else:
        kind, make = _UNARY[operator.kind]
        table = make(x, y) if int8 else b""
    if int8:
        reader.emit(operator, Kind.INT8_TABLE, (i,), table=table, slope=slope)
    else:
        reader.emit(operator, kind, (i,), slope=slope)


def _quantize(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    x, y = reader.tensors[i], reader.value(operator.output)
    if x.shape != y.shape or y.dtype != "int8":
        raise operator.error("has another shape than its input, or does not give INT8")
    if x.dtype == "int8":
        reader.emit(operator, Kind.INT8_TABLE, (i,), table=requantize_table(x, y))
    else:
        reader.emit(operator, Kind.QUANTIZE, (i,))


def _dequantize(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    x, y = reader.tensors[i], reader.value(operator.output)
    if x.shape != y.shape or (x.dtype, y.dtype) != ("int8", "float32"):
        raise operator.error("has another shape than its input, or does not go from INT8 to FLOAT32")
    reader.emit(operator, Kind.DEQUANTIZE, (i,))


def _slice(reader: _Reader, operator: _Operator) -> None:
    i = reader.input(operator)
    if _one_type(reader, operator, i):
        _same_scale(reader, operator, i)
    x = reader.tensors[i]
    axes = list(_strided(operator) if operator.kind == "STRIDED_SLICE" else _sliced(operator))
    if len(axes) > 1 and axes.pop(0) != (0, 1, 1):
        raise operator.error("slices the batch, which is not supported")
    axes = ([(0, 1, 1)] * 3 + axes)[-3:]
    begin, count, steps = zip(*axes, strict=True)
    for n, (b, k, s) in zip(x.shape, axes, strict=True):
        if not (0 <= b < n and k >= 1 and 1 <= s <= _MAX_SIDE and b + (k - 1) * s < n):
            raise operator.error(f"takes {k} of {n} from {b} by {s}; supported are slices inside the input, forwards")
    y = reader.value(operator.output)
    if math.prod(count) != y.size:
        raise operator.error(f"has the output {list(operator.output.shape)}, which does not follow from its input")
    out = reader.add(replace(y, shape=count))
    reader.ops.append(Op(Kind.SLICE, reader.name(operator), (i,), out, begin=begin, steps=steps))
    reader.at[operator.output_index] = reader.view(out, y.shape)


def _sliced(operator: _Operator) -> Iterator[tuple[int, int, int]]:
    """(begin, count, step) of every axis of a SLICE."""
    shape, begin, size = operator.input(0).shape, operator.input(1).numbers, operator.input(2).numbers
    if not len(shape) == len(begin) == len(size):
        raise operator.error("has a begin or size for another number of axes; the file is damaged")
    for n, b, k in zip(shape, begin, size, strict=True):
        yield b, n - b if k == -1 else k, 1


def _strided(operator: _Operator) -> Iterator[tuple[int, int, int]]:
    """(begin, count, step) of every axis of a STRIDED_SLICE."""
    options = operator.options("StridedSliceOptions")
    if options.EllipsisMask() or options.NewAxisMask():
        raise operator.error("has an ellipsis or a new axis, which are not supported")
    shape = operator.input(0).shape
    begin, end, steps = (operator.input(place).numbers for place in (1, 2, 3))
    if not len(begin) == len(end) == len(steps) <= len(shape):
        raise operator.error("has a begin, end or stride for another number of axes; the file is damaged")
    for axis, n in enumerate(shape):
        if axis >= len(begin):
            yield 0, n, 1
            continue
        bit, step = 1 << axis, steps[axis]
        if step < 1:
            raise operator.error(f"has the stride {step}; supported are strides from 1")
        b = 0 if options.BeginMask() & bit else min(max(begin[axis] + (n if begin[axis] < 0 else 0), 0), n)
        e = n if options.EndMask() & bit else min(max(end[axis] + (n if end[axis] < 0 else 0), 0), n)
        yield b, 1 if options.ShrinkAxisMask() & bit else -(-(e - b) // step), step


_LOWER: dict[str, Callable[[_Reader, _Operator], None]] = {
    "FULLY_CONNECTED": _dense,
    "CONV_2D": _convolution,
    "DEPTHWISE_CONV_2D": _depthwise,
    "AVERAGE_POOL_2D": _pool,
    "MAX_POOL_2D": _pool,
    "MEAN": _mean,
    "ADD": _sum_or_product,
    "MUL": _sum_or_product,
    "CONCATENATION": _concatenation,
    "PAD": _pad,
    "PADV2": _pad,
    "RESHAPE": _reshape,
    "SQUEEZE": _reshape,
    "EXPAND_DIMS": _reshape,
    "SOFTMAX": _softmax,
    "LOGISTIC": _unary,
    "TANH": _unary,
    "RELU": _unary,
    "RELU6": _unary,
    "LEAKY_RELU": _unary,
    "QUANTIZE": _quantize,
    "DEQUANTIZE": _dequantize,
    "STRIDED_SLICE": _slice,
    "SLICE": _slice,
}
