"""Reads what a .tflite file says of its model: operators, shapes, number types, parameters, multiply-accumulates.

Only the file's tables are read (FlatBuffers, schema of TensorFlow Lite 3); no interpreter is opened, so that a file
that would crash one is described or refused like any other. Everything in it may be wrong: offsets, sizes, indices.
"""

import hashlib
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tflite  # type: ignore[import-untyped]
from tinyfleet.ontology.ingest.describe import DescribeError, Layer, ModelDescription, Shape

_MAX_ITEMS = 20_000
"""Tensors and buffers may be so many."""
_MAX_OPERATORS = 5_000
_MAX_OPERANDS = 256
_MAX_RANK = 8
_BITS = {
    "FLOAT16": 16, "FLOAT32": 32, "FLOAT64": 64, "BFLOAT16": 16, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8,
    "INT16": 16, "UINT16": 16, "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8,
}  # fmt: skip
_TYPES = {number: name for name, number in vars(tflite.TensorType).items() if not name.startswith("_")}
_OPERATORS = {number: name for name, number in vars(tflite.BuiltinOperator).items() if not name.startswith("_")}

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
# Operators that end with an activation of their own: the table of their options.
_FUSED = {
    "ADD": tflite.AddOptions,
    "AVERAGE_POOL_2D": tflite.Pool2DOptions,
    "CONV_2D": tflite.Conv2DOptions,
    "DEPTHWISE_CONV_2D": tflite.DepthwiseConv2DOptions,
    "FULLY_CONNECTED": tflite.FullyConnectedOptions,
    "MAX_POOL_2D": tflite.Pool2DOptions,
    "MUL": tflite.MulOptions,
    "SUB": tflite.SubOptions,
    "SVDF": tflite.SVDFOptions,
}
_ACTIVATIONS = {
    number: name.lower()
    for name, number in vars(tflite.ActivationFunctionType).items()
    if not name.startswith("_") and name != "NONE"
}
# What these take and learn is not in the file's tables, or is in another subgraph.
_OPAQUE = {"CUSTOM", "DELEGATE", "IF", "WHILE", "CALL", "CALL_ONCE", "PLACEHOLDER_FOR_GREATER_OP_CODES"}
_OPAQUE |= {name for name in _OPERATORS.values() if name.startswith("STABLEHLO_")}


@dataclass(frozen=True)
class _Tensor:
    name: str
    type: str
    shape: Shape
    constant: bool
    scales: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sample(self) -> Shape | None:
        """The shape without the batch axis; None if an axis is not known."""
        shape = self.shape[1:] if len(self.shape) > 1 else self.shape
        return shape if all(n > 0 for n in shape) else None

    @property
    def quantization(self) -> str:
        kind = self.type.lower()
        return f"{kind} per-{'tensor' if self.scales == 1 else 'channel'}" if self.scales else kind


def describe(data: bytes, name: str) -> ModelDescription:
    """Describes the main subgraph of a .tflite file. Raises DescribeError if it is not one, or damaged."""
    if len(data) < 16 or data[4:8] != b"TFL3":
        raise DescribeError(f"{name} is no .tflite file (no TFL3 at its start); convert the model again")
    try:
        return _describe(data, name)
    except DescribeError as error:
        raise DescribeError(f"{name}: {error}") from None
    except (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        raise DescribeError(f"{name} is damaged: its tables point outside the file ({error})") from None


def _describe(data: bytes, name: str) -> ModelDescription:
    model = tflite.Model.GetRootAs(data, 0)
    if model.Version() != 3:
        raise DescribeError(f"version {model.Version()} of the format is not known, only 3")
    if _count(model.SubgraphsLength(), "subgraphs") == 0:
        raise DescribeError("it has no subgraph, so no model")
    graph = model.Subgraphs(0)
    kinds = [_kind(model.OperatorCodes(i)) for i in range(_count(model.OperatorCodesLength(), "operator codes"))]
    buffers = [_buffer(model.Buffers(i), len(data)) for i in range(_count(model.BuffersLength(), "buffers"))]
    tensors = [_tensor(graph.Tensors(i), buffers) for i in range(_count(graph.TensorsLength(), "tensors"))]
    layers, notes = [], []
    for i in range(_count(graph.OperatorsLength(), "operators", _MAX_OPERATORS)):
        operator = graph.Operators(i)
        kind = kinds[_index(operator.OpcodeIndex(), len(kinds), "operator code")]
        inputs = [
            _pick(tensors, operator.Inputs(j)) for j in range(_count(operator.InputsLength(), "inputs", _MAX_OPERANDS))
        ]
        outputs = [
            _pick(tensors, operator.Outputs(j))
            for j in range(_count(operator.OutputsLength(), "outputs", _MAX_OPERANDS))
        ]
        layer = _layer(kind, inputs, outputs, operator)
        layers.append(layer)
        if layer.macs is None:
            notes.append(f"the multiply-accumulates of {kind} are not known")
    if not layers:
        raise DescribeError("it has no operator, so nothing to run")
    if graph.InputsLength() < 1 or graph.OutputsLength() < 1:
        raise DescribeError("it has no input or no output")
    first, last = _pick(tensors, graph.Inputs(0)), _pick(tensors, graph.Outputs(0))
    return ModelDescription(
        name=name,
        format="tflite",
        sha256=hashlib.sha256(data).hexdigest(),
        file_bytes=len(data),
        layers=tuple(layers),
        input_shape=first.sample if first else None,
        output_shape=last.sample if last else None,
        storage_bytes=len(data),
        notes=tuple(dict.fromkeys(notes)),
    )


def _count(number: int, what: str, most: int = _MAX_ITEMS) -> int:
    if not 0 <= number <= most:
        raise DescribeError(f"it has {number} {what}, more than {most}; it is damaged, or no model for a small device")
    return number


def _index(number: int, length: int, what: str) -> int:
    if not 0 <= number < length:
        raise DescribeError(f"it is damaged: {what} {number} of {length}")
    return number


def _pick(tensors: list[_Tensor], index: int) -> _Tensor | None:
    return None if index == -1 else tensors[_index(index, len(tensors), "tensor")]


def _kind(code: Any) -> str:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number not in _OPERATORS:
        raise DescribeError(f"operator {number} is not known; the file is newer than this reader, or damaged")
    return str(_OPERATORS[number])


def _buffer(buffer: Any, size: int) -> int:
    """Bytes of constant data that a buffer holds."""
    length = int(buffer.DataLength() or buffer.Size())
    if length > size:
        raise DescribeError(f"it is damaged: a buffer of {length} bytes in a file of {size}")
    return length


def _tensor(tensor: Any, buffers: list[int]) -> _Tensor:
    name = (tensor.Name() or b"").decode("utf-8", errors="replace")
    rank = tensor.ShapeLength()
    if rank > _MAX_RANK:
        raise DescribeError(f"it is damaged: tensor {name!r:.60} has {rank} axes")
    shape = tuple(int(tensor.Shape(axis)) for axis in range(rank))
    if tensor.ShapeSignatureLength() == rank:  # -1 where an axis is free; shape says 1 there
        batch = shape[:1]
        shape = batch + tuple(int(tensor.ShapeSignature(axis)) for axis in range(1, rank))
    kind = _TYPES.get(tensor.Type())
    if kind is None:
        raise DescribeError(f"number type {tensor.Type()} of tensor {name!r:.60} is not known")
    held = buffers[_index(tensor.Buffer(), len(buffers), "buffer")]
    bits = _BITS.get(kind)
    sparse = tensor.Sparsity() is not None
    if any(n < -1 for n in shape) or (held and -1 in shape):
        raise DescribeError(f"it is damaged: tensor {name!r:.60} has the shape {list(shape)}")
    if held and bits and not sparse and held != (math.prod(shape) * bits + 7) // 8:
        raise DescribeError(
            f"it is damaged: tensor {name!r:.60} is {kind} {list(shape)}, but carries {held} bytes of constants"
        )
    quantization = tensor.Quantization()
    scales = _count(quantization.ScaleLength(), "scales") if quantization is not None else 0
    if scales > 1:
        axis = _index(quantization.QuantizedDimension(), rank, f"quantised axis of tensor {name!r:.60}:")
        if shape[axis] != scales:
            raise DescribeError(f"it is damaged: tensor {name!r:.60} has {scales} scales for an axis of {shape[axis]}")
    return _Tensor(name, kind, shape, held > 0, scales)


def _layer(kind: str, inputs: list[_Tensor | None], outputs: list[_Tensor | None], operator: Any) -> Layer:
    given = [t for t in inputs if t is not None and not t.constant]
    source, result = (given[0] if given else None), (outputs[0] if outputs else None)
    learned = _learned(kind, inputs)
    weights = max(learned, key=lambda t: t.size) if learned else None
    return Layer(
        name=result.name if result else "",
        kind=kind,
        input_shape=source.sample if source else None,
        output_shape=result.sample if result else None,
        macs=_macs(kind, inputs, result, operator),
        parameters=None if kind in _OPAQUE else sum(t.size for t in learned),
        quantization=weights.quantization if weights else None,
        activation=_activation(kind, operator),
    )


def _activation(kind: str, operator: Any) -> str | None:
    table = operator.BuiltinOptions() if kind in _FUSED else None
    if table is None:
        return None
    options = _FUSED[kind]()
    options.Init(table.Bytes, table.Pos)
    return _ACTIVATIONS.get(options.FusedActivationFunction())


def _learned(kind: str, inputs: list[_Tensor | None]) -> list[_Tensor]:
    if kind not in _LEARNED:
        return []
    places = _LEARNED[kind]
    chosen = inputs if places is None else [inputs[i] for i in places if i < len(inputs)]
    return [t for t in chosen if t is not None and t.constant]


def _macs(kind: str, inputs: list[_Tensor | None], result: _Tensor | None, operator: Any) -> int | None:
    """Multiply-accumulates of one inference of one sample; None where they cannot be told."""
    if kind in _OPAQUE:
        return None
    rule = _RULES.get(kind)
    if rule is None:
        return 0  # activations, pooling, reshaping, element by element: no products that are summed
    tensors = [t.shape if t is not None else () for t in inputs]
    out = result.sample if result is not None else None
    if out is None or any(n <= 0 for shape in tensors for n in shape[1:]):
        return None
    return rule(tensors, out, operator)


def _lstm_macs(shapes: list[Shape], _: Shape, operator: Any) -> int:
    options = tflite.UnidirectionalSequenceLSTMOptions()
    table = operator.BuiltinOptions()
    options.Init(table.Bytes, table.Pos)
    axis = 0 if options.TimeMajor() else 1
    # Inputs 1 to 8 are the gates' matrices, 16 the projection's.
    matrices = [shapes[i] for i in (*range(1, 9), 16) if i < len(shapes)]
    per_step: int = sum(math.prod(shape) for shape in matrices if len(shape) == 2)
    return shapes[0][axis] * per_step


# (input shapes, output shape of one sample, operator) -> multiply-accumulates. Layouts: TensorFlow Lite's kernels.
_RULES: dict[str, Callable[[list[Shape], Shape, Any], int]] = {
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
_NOT_COUNTED = {"UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_RNN"}
_OPAQUE |= _NOT_COUNTED
