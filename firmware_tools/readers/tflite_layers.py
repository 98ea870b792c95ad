"""The layers of a .tflite file as the graph describes them: shapes, number types, parameters, multiply-accumulates.

Every operator of the format is listed, also those that the engine cannot run; what cannot be told of one is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tinyfleet.edge.model.graph import Layer, Shape
from tinyfleet.firmware_tools.readers.tflite_file import (
    OPERATORS,
    FileTensor,
    Operator,
    TFLiteFile,
    activation_name,
    options_of,
)

# Where an operator's learned numbers are: the indices of its inputs, None for all that are constant.
_LEARNED: dict[str, tuple[int, ...] | None] = {
    "CONV_2D": (1, 2),
    "DEPTHWISE_CONV_2D": (1, 2),
    "CONV_3D": (1, 2),
    "TRANSPOSE_CONV": (1, 3),
    "FULLY_CONNECTED": (1, 2),
    "SVDF": (1, 2, 3),
    "RNN": (1, 2, 3),
    "UNIDIRECTIONAL_SEQUENCE_RNN": (1, 2, 3),
    "EMBEDDING_LOOKUP": (1,),
    "PRELU": (1,),
    "LSTM": None,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": None,
    "BIDIRECTIONAL_SEQUENCE_LSTM": None,
    "BIDIRECTIONAL_SEQUENCE_RNN": None,
    "BATCH_MATMUL": None,
    "ADD": None,
    "SUB": None,
    "MUL": None,
    "DIV": None,
}
# Operators that end with an activation of their own: the name of their table of options.
_FUSED = {
    "ADD": "AddOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "MUL": "MulOptions",
    "SUB": "SubOptions",
    "SVDF": "SVDFOptions",
}
# What these take and learn is not in the file's tables, or is in another subgraph.
_OPAQUE = {
    "CUSTOM", "DELEGATE", "IF", "WHILE", "CALL", "CALL_ONCE", "PLACEHOLDER_FOR_GREATER_OP_CODES",
    "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN",
    *(name for name in OPERATORS.values() if name.startswith("STABLEHLO_")),
}  # fmt: skip


def tflite_layers(file: TFLiteFile) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """A file's operators as layers, and notes on what cannot be told of them."""
    layers = tuple(_layer(operator) for operator in file.operators)
    unknown = dict.fromkeys(layer.kind for layer in layers if layer.macs is None)
    return layers, tuple(f"the multiply-accumulates of {kind} are not known" for kind in unknown)


def sample_shape(tensor: FileTensor | None) -> Shape | None:
    """The shape without the batch axis; None if an axis is not known."""
    if tensor is None:
        return None
    shape = tensor.listed_shape[1:] if len(tensor.listed_shape) > 1 else tensor.listed_shape
    return shape if all(n > 0 for n in shape) else None


def _layer(operator: Operator) -> Layer:
    computed = [t for t in operator.inputs if t is not None and not t.constant]
    result = operator.outputs[0] if operator.outputs else None
    learned = _learned(operator)
    weights = max(learned, key=_size) if learned else None
    return Layer(
        name=result.name if result else "",
        kind=operator.kind,
        input_shape=sample_shape(computed[0] if computed else None),
        output_shape=sample_shape(result),
        macs=_macs(operator, sample_shape(result)),
        parameters=None if operator.kind in _OPAQUE else sum(map(_size, learned)),
        quantization=_quantization(weights) if weights else None,
        activation=_activation(operator),
    )


def _size(tensor: FileTensor) -> int:
    return math.prod(tensor.listed_shape)


def _quantization(tensor: FileTensor) -> str:
    kind = tensor.type.lower()
    if not tensor.scales:
        return kind
    return f"{kind} per-{'tensor' if len(tensor.scales) == 1 else 'channel'}"


def _activation(operator: Operator) -> str | None:
    table = operator.table.BuiltinOptions() if operator.kind in _FUSED else None
    if table is None:
        return None
    name = activation_name(options_of(table, _FUSED[operator.kind]))
    return None if name in (None, "NONE") else str(name).lower()


def _learned(operator: Operator) -> list[FileTensor]:
    if operator.kind not in _LEARNED:
        return []
    inputs, places = operator.inputs, _LEARNED[operator.kind]
    candidates = inputs if places is None else [inputs[i] for i in places if i < len(inputs)]
    return [t for t in candidates if t is not None and t.constant]


def _macs(operator: Operator, out: Shape | None) -> int | None:
    """Multiply-accumulates of one inference of one sample; None where they cannot be told."""
    if operator.kind in _OPAQUE:
        return None
    rule = _RULES.get(operator.kind)
    if rule is None:
        return 0  # activations, pooling, reshaping, element by element: no products that are summed
    shapes = [t.listed_shape if t is not None else () for t in operator.inputs]
    if out is None or any(n <= 0 for shape in shapes for n in shape[1:]):
        return None
    return rule(shapes, out, operator)


def _lstm_macs(shapes: list[Shape], _: Shape, operator: Operator) -> int:
    options = options_of(operator.table.BuiltinOptions(), "UnidirectionalSequenceLSTMOptions")
    axis = 0 if options.TimeMajor() else 1
    # Inputs 1 to 8 are the gates' matrices, 16 the projection's.
    matrices = [shapes[i] for i in (*range(1, 9), 16) if i < len(shapes)]
    per_step: int = sum(math.prod(shape) for shape in matrices if len(shape) == 2)
    return shapes[0][axis] * per_step


# (input shapes, output shape of one sample, operator) -> multiply-accumulates. Layouts: TensorFlow Lite's kernels.
_RULES: dict[str, Callable[[list[Shape], Shape, Operator], int]] = {
    # weights [out, height, width, in / groups]
    "CONV_2D": lambda shapes, out, _: math.prod(out) * math.prod(shapes[1][1:]),
    # weights [1, height, width, out]
    "DEPTHWISE_CONV_2D": lambda shapes, out, _: math.prod(out) * math.prod(shapes[1][1:3]),
    # weights [depth, height, width, in, out]
    "CONV_3D": lambda shapes, out, _: math.prod(out) * math.prod(shapes[1][:4]),
    # inputs: output shape, weights [out, height, width, in], data
    "TRANSPOSE_CONV": lambda shapes, _, __: math.prod(shapes[2][1:]) * math.prod(shapes[1][:3]),
    # weights [out, in]
    "FULLY_CONNECTED": lambda shapes, out, _: math.prod(out) * shapes[1][1],
    "BATCH_MATMUL": lambda shapes, out, _: math.prod(out) * shapes[0][-1],
    # feature weights [filters, in], time weights [filters, memory]
    "SVDF": lambda shapes, _, __: math.prod(shapes[1]) + math.prod(shapes[2]),
    # weights [out, in], recurrent weights [out, out]
    "RNN": lambda shapes, _, __: math.prod(shapes[1]) + math.prod(shapes[2]),
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _lstm_macs,
    "LSTM": lambda shapes, _, __: sum(math.prod(shapes[i]) for i in range(1, 9) if i < len(shapes)),
}
