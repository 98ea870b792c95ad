"""From a .tflite file's operators to the engine's operations: which of them the engine runs, and how."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import tflite  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tinyfleet.edge.model.graph import Graph, Kind, Op, Shape3, Tensor
from tinyfleet.edge.model.program_format import MAX_BYTES
from tinyfleet.edge.model.quantized import (
    constants,
    leaky_relu_table,
    logistic_table,
    relu_table,
    requantize_table,
    tanh_table,
)
from tinyfleet.firmware_tools.readers.common import MAX_OPERATIONS, MAX_SIDE, CompileError, simplify, windows
from tinyfleet.firmware_tools.readers.tflite_file import FileTensor, Operator, TFLiteFile, shown
from tinyfleet.firmware_tools.readers.tflite_names import layer_name

_MAX_STEP = 0xFF
_CLAMPS = {"RELU": (0.0, math.inf), "RELU6": (0.0, 6.0), "RELU_N1_TO_1": (-1.0, 1.0)}
_FLOAT_ACTIVATIONS = {"RELU": Kind.RELU, "RELU6": Kind.RELU6, "TANH": Kind.TANH}


def lower(file: TFLiteFile) -> Graph:
    """The engine's graph of a file, for inference, with all weights. Raises CompileError. Call within `reading`."""
    return _Lowering(file).graph()


class _Lowering:
    """Makes the graph of a file, operator by operator. at: the graph's tensor for each of the file's."""

    def __init__(self, file: TFLiteFile) -> None:
        self.file = file
        self.tensors: list[Tensor] = []
        self.ops: list[Op] = []
        self.at: dict[int, int] = {}
        self.names: set[str] = set()
        self.weight_bytes = 0

    def graph(self) -> Graph:
        source, result = self._ends()
        if len(self.file.operators) > MAX_OPERATIONS:
            raise CompileError(f"it has more than {MAX_OPERATIONS} operators; the engine is for smaller models")
        for tensor in self.file.tensors:
            _check_tensor(tensor)
        for operator in self.file.operators:
            _check_operator(operator)
        if self.file.tensors[source].constant:
            raise self.file.tensors[source].error("is the model's input, but a constant")
        self.at[source] = self.add(self.value(self.file.tensors[source]))
        for operator in self.file.operators:
            if operator.output_index in self.at or operator.output.constant:
                raise operator.error("writes a tensor that is written already; the file is damaged")
            _LOWER[operator.kind](self, operator)
        if result not in self.at:
            raise self.file.tensors[result].error("is the model's output, but no operator writes it")
        output = self.at[result]
        if 0 in (output, self.tensors[output].view_of):
            raise CompileError("its output is its input; it computes nothing")
        for op in self.ops:
            try:
                constants(op, self.tensors)
            except (ValueError, struct.error) as error:
                raise CompileError(f"layer '{op.name}': {error}") from None
        return simplify(Graph(tuple(self.tensors), tuple(self.ops), output))

    def _ends(self) -> tuple[int, int]:
        """The file's tensors that the model reads and writes."""
        file = self.file
        if file.subgraphs != 1:
            raise CompileError(f"it has {file.subgraphs} subgraphs; supported is one")
        for what, ends in (("inputs", file.inputs), ("outputs", file.outputs)):
            if len(ends) != 1 or ends[0] == -1:
                raise CompileError(f"it has {len(ends)} {what}; supported is one")
        return file.inputs[0], file.outputs[0]

    def add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def value(self, tensor: FileTensor, shape: Shape3 | None = None) -> Tensor:
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

    def input(self, operator: Operator, place: int = 0) -> int:
        """The graph's tensor at an operator's input."""
        tensor = operator.input(place)
        if tensor.constant:
            raise operator.error(f"has the constant {shown(tensor.name)} as its input {place}, which is not supported")
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

    def name(self, operator: Operator) -> str:
        base = layer_name(operator)
        name, number = base, 0
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name

    def emit(
        self, operator: Operator, kind: Kind, inputs: tuple[int, ...], activation: str = "NONE", **fields: Any
    ) -> None:
        """An op that writes the operator's output, with the activation that is fused into it."""
        self.weight_bytes += fields["weights"].nbytes if "weights" in fields else 0
        if self.weight_bytes > MAX_BYTES:  # operators may share what the file has once
            raise operator.error(f"makes the model's weights more than the {MAX_BYTES:,} bytes of a program")
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


def _check_tensor(tensor: FileTensor) -> None:
    """Raises CompileError for what the engine has no tensors for, whatever reads them."""
    if any(n < 0 for n in tensor.listed_shape[1:]):  # an open batch runs as one sample
        raise tensor.error("has a dynamic shape; convert the model with a fixed input shape")
    if not all(math.isfinite(s) and s > 0 for s in tensor.scales):
        raise tensor.error("has a scale that is not a positive number")
    if tensor.sparse:
        raise tensor.error("is sparse; supported are dense tensors")
    if tensor.constant and tensor.data is None:
        raise tensor.error("has its constants outside of the file's tables; supported are files below 2 GB")


def _check_operator(operator: Operator) -> None:
    """Raises CompileError for an operator that the engine cannot run, or that is malformed."""
    if operator.kind not in _LOWER:
        raise CompileError(f"operator {operator.kind} is not supported. Supported: {', '.join(sorted(_LOWER))}")
    if len(operator.outputs) != 1 or operator.outputs[0] is None or not operator.inputs:
        raise CompileError(
            f"operator {operator.kind} has {len(operator.inputs)} inputs and {len(operator.outputs)} outputs; it is "
            "damaged"
        )


def _clamp(operator: Operator, activation: str, y: Tensor) -> tuple[int, int]:
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


def _one_type(lowering: _Lowering, operator: Operator, *inputs: int) -> bool:
    """Whether the operator is int8. Raises CompileError if its activations are of several types."""
    y = lowering.value(operator.output)
    for i in inputs:
        if lowering.tensors[i].dtype != y.dtype:
            raise operator.error(f"has {lowering.tensors[i].dtype} input, but {y.dtype} output")
    return y.dtype == "int8"


def _same_scale(lowering: _Lowering, operator: Operator, *inputs: int) -> None:
    y = lowering.value(operator.output)
    for x in (lowering.tensors[i] for i in inputs):
        if (x.scale, x.zero_point) != (y.scale, y.zero_point):
            raise operator.error("has an input of another scale or zero point than its output")


def _weights(operator: Operator, x: Tensor, shape: tuple[int, ...], channel_axis: int) -> dict[str, Any]:
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
    fields: dict[str, Any] = {"weights": weights.array, "bias": _bias(operator, channels, int8)}
    if int8:
        fields["weight_scales"] = _weight_scales(weights, channels, channel_axis)
    return fields


def _weight_scales(weights: FileTensor, channels: int, channel_axis: int) -> NDArray[np.float64]:
    """The scale of each output channel's int8 weights."""
    if len(weights.scales) not in (1, channels):
        raise weights.error(f"has {len(weights.scales)} scales; supported is one, or one for each output channel")
    if len(weights.scales) > 1 and weights.axis != channel_axis:
        raise weights.error(
            f"has the quantised dimension {weights.axis}; supported is that of the output channels, {channel_axis}"
        )
    if any(weights.zero_points):
        raise weights.error("has weights with a zero point other than 0; convert the model with symmetric weights")
    return np.broadcast_to(np.array(weights.scales, np.float64), channels).copy()


def _bias(operator: Operator, channels: int, int8: bool) -> NDArray[Any]:
    bias = operator.inputs[2] if len(operator.inputs) > 2 else None
    if bias is None:
        return np.zeros(channels, np.int32 if int8 else np.float32)
    number = "INT32" if int8 else "FLOAT32"
    if bias.type != number or bias.size != channels:
        raise operator.error(f"has a bias of {bias.type} {list(bias.shape)}; supported is {number} [{channels}]")
    return bias.array.reshape(channels)


def _window(operator: Operator, options: Any, x: Tensor, kernel: tuple[int, int], dilation: tuple[int, int]) -> Any:
    """A window's fields, by TensorFlow's rule of padding, checked against the output's shape."""
    strides = (options.StrideH(), options.StrideW())
    if options.Padding() not in (tflite.Padding.SAME, tflite.Padding.VALID):
        raise operator.error("has an unknown padding; the file is damaged")
    if not all(1 <= n <= _MAX_STEP for n in (*strides, *dilation)) or not all(1 <= n <= MAX_SIDE for n in kernel):
        raise operator.error(f"has kernel {kernel}, strides {strides}, dilation {dilation}; supported are 1 to 255")
    padding = "same" if options.Padding() == tflite.Padding.SAME else "valid"
    found = [windows(*sizes, padding) for sizes in zip(x.shape, kernel, strides, dilation, strict=False)]
    if tuple(n for n, _ in found) != operator.output.sample[:2]:
        raise operator.error(f"has the output {list(operator.output.shape)}, which does not follow from its input")
    return {"kernel": kernel, "strides": strides, "dilation": dilation, "pads": (found[0][1], found[1][1])}


def _dense(lowering: _Lowering, operator: Operator) -> None:
    options = operator.options("FullyConnectedOptions")
    if options.WeightsFormat() != tflite.FullyConnectedOptionsWeightsFormat.DEFAULT:
        raise operator.error("has shuffled weights; supported are weights in their plain order")
    i = lowering.input(operator)
    int8 = _one_type(lowering, operator, i)
    flat = lowering.view(i, _flat(lowering.tensors[i]))
    fields = _weights(operator, lowering.tensors[flat], (0, lowering.tensors[flat].shape[2]), 0)
    if operator.output.sample != (1, 1, len(fields["bias"])):
        raise operator.error(f"has the output {list(operator.output.shape)}; supported is [1, {len(fields['bias'])}]")
    lowering.emit(operator, Kind.INT8_DENSE if int8 else Kind.DENSE, (flat,), operator.activation(options), **fields)


def _flat(x: Tensor) -> Shape3:
    if x.size > MAX_SIDE:
        raise CompileError(f"a dense layer's input of {x.size} numbers is too large; supported are up to {MAX_SIDE}")
    return 1, 1, x.size


def _convolution(lowering: _Lowering, operator: Operator) -> None:
    options = operator.options("Conv2DOptions")
    i = lowering.input(operator)
    int8, x = _one_type(lowering, operator, i), lowering.tensors[i]
    shape = operator.input(1).shape
    if len(shape) == 4 and shape[3] != x.shape[2] and shape[3] > 0 and x.shape[2] % shape[3] == 0:
        raise operator.error(f"is grouped ({x.shape[2] // shape[3]} groups); supported are ungrouped and depthwise")
    fields = _weights(operator, x, (operator.output.sample[2], 0, 0, x.shape[2]), 0)
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    fields |= _window(operator, options, x, (shape[1], shape[2]), dilation)
    kind = Kind.INT8_CONV2D if int8 else Kind.CONV2D
    lowering.emit(operator, kind, (i,), operator.activation(options), **fields)


def _depthwise(lowering: _Lowering, operator: Operator) -> None:
    options = operator.options("DepthwiseConv2DOptions")
    i = lowering.input(operator)
    int8, x = _one_type(lowering, operator, i), lowering.tensors[i]
    channels = operator.output.sample[2]
    fields = _weights(operator, x, (1, 0, 0, channels), 3)
    if channels % x.shape[2]:
        raise operator.error(f"makes {channels} channels of {x.shape[2]}; supported are multiples")
    fields["weights"] = fields["weights"][0]
    kernel = operator.input(1).shape[1:3]
    dilation = (options.DilationHFactor(), options.DilationWFactor())
    fields |= _window(operator, options, x, (kernel[0], kernel[1]), dilation)
    kind = Kind.INT8_DEPTHWISE if int8 else Kind.DEPTHWISE
    lowering.emit(operator, kind, (i,), operator.activation(options), **fields)


def _pool(lowering: _Lowering, operator: Operator) -> None:
    options = operator.options("Pool2DOptions")
    i = lowering.input(operator)
    int8, x = _one_type(lowering, operator, i), lowering.tensors[i]
    if int8:
        _same_scale(lowering, operator, i)
    if operator.output.sample[2] != x.shape[2]:
        raise operator.error("has another number of channels than its input; the file is damaged")
    kernel = (options.FilterHeight(), options.FilterWidth())
    fields = _window(operator, options, x, kernel, (1, 1))
    average = operator.kind == "AVERAGE_POOL_2D"
    kind = (Kind.INT8_AVGPOOL if average else Kind.INT8_MAXPOOL) if int8 else Kind.AVGPOOL if average else Kind.MAXPOOL
    lowering.emit(operator, kind, (i,), operator.activation(options), **fields)


def _mean(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    int8, x = _one_type(lowering, operator, i), lowering.tensors[i]
    rank = len(operator.input(0).shape)
    axes = {n % rank + 3 - rank for n in operator.input(1).numbers if -rank <= n < rank}
    left = {axis for axis in (0, 1) if x.shape[axis] > 1} - axes
    if left or not axes <= {0, 1} or operator.output.sample != (1, 1, x.shape[2]):
        raise operator.error("is over other axes; supported is the mean over rows and columns")
    if int8:
        lowering.emit(operator, Kind.INT8_MEAN, (i,))
    else:
        lowering.emit(operator, Kind.AVGPOOL, (i,), kernel=x.shape[:2], strides=(1, 1), dilation=(1, 1))


def _sum_or_product(lowering: _Lowering, operator: Operator) -> None:
    adds = operator.kind == "ADD"
    activation = operator.activation(operator.options("AddOptions" if adds else "MulOptions"))
    if operator.output.type == "FLOAT32" and any(t is not None and t.constant for t in operator.inputs):
        return _scale_or_shift(lowering, operator, activation)
    pair = (lowering.input(operator, 0), lowering.input(operator, 1))
    int8 = _one_type(lowering, operator, *pair)
    shapes = [lowering.tensors[i].shape for i in pair]
    if shapes != [operator.output.sample] * 2:
        raise operator.error(f"has inputs of shapes {shapes[0]} and {shapes[1]}; supported are two of one shape")
    if not int8 and not adds:
        raise operator.error("multiplies two float32 tensors; supported are int8 ones, or one by a constant")
    kind = Kind.ADD if not int8 else Kind.INT8_ADD if adds else Kind.INT8_MUL
    lowering.emit(operator, kind, pair, activation)
    return None


def _scale_or_shift(lowering: _Lowering, operator: Operator, activation: str) -> None:
    """A float32 sum or product with a constant for each channel: a depthwise convolution of 1 x 1."""
    place = 1 if operator.input(1).constant else 0
    i, constant = lowering.input(operator, 1 - place), operator.input(place)
    x = lowering.tensors[i]
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
    lowering.emit(
        operator, Kind.DEPTHWISE, (i,), activation, kernel=one, strides=one, dilation=one,
        weights=weights.reshape(1, 1, channels).copy(), bias=bias,
    )  # fmt: skip


def _concatenation(lowering: _Lowering, operator: Operator) -> None:
    options = operator.options("ConcatenationOptions")
    if operator.activation(options) != "NONE":
        raise operator.error("has a fused activation, which is not supported")
    parts = [lowering.input(operator, place) for place in range(len(operator.inputs))]
    if _one_type(lowering, operator, *parts):
        _same_scale(lowering, operator, *parts)
    rank = len(operator.output.shape)
    axis = options.Axis() % rank + 3 - rank if -rank <= options.Axis() < rank else -1
    shapes = [lowering.tensors[i].shape for i in parts]
    whole = operator.output.sample
    if axis not in (0, 1, 2) or sum(s[axis] for s in shapes) != whole[axis]:
        raise operator.error(f"joins shapes {shapes} along axis {options.Axis()}, which does not give its output")
    if any(s[n] != whole[n] for s in shapes for n in range(3) if n != axis):
        raise operator.error(f"joins shapes {shapes}, which differ in other axes than {options.Axis()}")
    name = lowering.name(operator)
    lowering.at[operator.output_index] = out = lowering.add(lowering.value(operator.output))
    first = [0, 0, 0]
    for i, shape in zip(parts, shapes, strict=True):
        lowering.ops.append(Op(Kind.PLACE, name, (i,), out, offsets=(first[0], first[1], first[2])))
        first[axis] += shape[axis]


def _pad(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    if _one_type(lowering, operator, i):
        _same_scale(lowering, operator, i)
    x, y = lowering.tensors[i], lowering.value(operator.output)
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
    lowering.emit(operator, Kind.PLACE, (i,), offsets=(t, l, f), fills=True)


def _reshape(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    _one_type(lowering, operator, i)
    x, y = lowering.tensors[i], lowering.value(operator.output)
    if x.size != y.size:
        raise operator.error(f"makes {list(operator.output.shape)} of {x.size} numbers; the file is damaged")
    if (x.scale, x.zero_point) != (y.scale, y.zero_point):
        raise operator.error("has an input of another scale or zero point than its output")
    lowering.at[operator.output_index] = lowering.view(i, y.shape)


def _softmax(lowering: _Lowering, operator: Operator) -> None:
    beta = float(operator.options("SoftmaxOptions").Beta())
    i = lowering.input(operator)
    int8, y = _one_type(lowering, operator, i), lowering.value(operator.output)
    if y.shape != lowering.tensors[i].shape:
        raise operator.error("has another shape than its input; the file is damaged")
    if int8 and (y.scale, y.zero_point) != (1 / 256, -128):
        raise operator.error("has an output that is not of scale 1/256 and zero point -128")
    if not int8 and beta != 1.0:
        raise operator.error(f"has beta {beta}; supported is 1 in float32")
    lowering.emit(operator, Kind.INT8_SOFTMAX if int8 else Kind.SOFTMAX, (i,), beta=beta)


_UNARY: dict[str, tuple[Kind, Callable[[Tensor, Tensor], bytes]]] = {
    "LOGISTIC": (Kind.SIGMOID, logistic_table),
    "TANH": (Kind.TANH, tanh_table),
    "RELU": (Kind.RELU, relu_table),
    "RELU6": (Kind.RELU6, lambda x, y: relu_table(x, y, 0.0, 6.0)),
}


def _unary(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    int8, x, y = _one_type(lowering, operator, i), lowering.tensors[i], lowering.value(operator.output)
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
        lowering.emit(operator, Kind.INT8_TABLE, (i,), table=table, slope=slope)
    else:
        lowering.emit(operator, kind, (i,), slope=slope)


def _quantize(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    x, y = lowering.tensors[i], lowering.value(operator.output)
    if x.shape != y.shape or y.dtype != "int8":
        raise operator.error("has another shape than its input, or does not give INT8")
    if x.dtype == "int8":
        lowering.emit(operator, Kind.INT8_TABLE, (i,), table=requantize_table(x, y))
    else:
        lowering.emit(operator, Kind.QUANTIZE, (i,))


def _dequantize(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    x, y = lowering.tensors[i], lowering.value(operator.output)
    if x.shape != y.shape or (x.dtype, y.dtype) != ("int8", "float32"):
        raise operator.error("has another shape than its input, or does not go from INT8 to FLOAT32")
    lowering.emit(operator, Kind.DEQUANTIZE, (i,))


def _slice(lowering: _Lowering, operator: Operator) -> None:
    i = lowering.input(operator)
    if _one_type(lowering, operator, i):
        _same_scale(lowering, operator, i)
    x = lowering.tensors[i]
    axes = list(_strided(operator) if operator.kind == "STRIDED_SLICE" else _sliced(operator))
    if len(axes) > 1 and axes.pop(0) != (0, 1, 1):
        raise operator.error("slices the batch, which is not supported")
    axes = ([(0, 1, 1)] * 3 + axes)[-3:]
    begin, count, steps = zip(*axes, strict=True)
    for n, (b, k, s) in zip(x.shape, axes, strict=True):
        if not (0 <= b < n and k >= 1 and 1 <= s <= MAX_SIDE and b + (k - 1) * s < n):
            raise operator.error(f"takes {k} of {n} from {b} by {s}; supported are slices inside the input, forwards")
    y = lowering.value(operator.output)
    if math.prod(count) != y.size:
        raise operator.error(f"has the output {list(operator.output.shape)}, which does not follow from its input")
    out = lowering.add(replace(y, shape=count))
    lowering.ops.append(Op(Kind.SLICE, lowering.name(operator), (i,), out, begin=begin, steps=steps))
    lowering.at[operator.output_index] = lowering.view(out, y.shape)


def _sliced(operator: Operator) -> Iterator[tuple[int, int, int]]:
    """(begin, count, step) of every axis of a SLICE."""
    shape, begin, size = operator.input(0).shape, operator.input(1).numbers, operator.input(2).numbers
    if not len(shape) == len(begin) == len(size):
        raise operator.error("has a begin or size for another number of axes; the file is damaged")
    for n, b, k in zip(shape, begin, size, strict=True):
        yield b, n - b if k == -1 else k, 1


def _strided(operator: Operator) -> Iterator[tuple[int, int, int]]:
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


_LOWER: dict[str, Callable[[_Lowering, Operator], None]] = {
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
