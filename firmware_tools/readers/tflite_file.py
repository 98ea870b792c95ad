"""The tables of a .tflite file (FlatBuffers, the schema of TensorFlow Lite 3): its operators and tensors, checked.

No interpreter is opened, so a file that would crash one is read or rejected like any other. Everything in it may be
wrong: offsets, sizes, indices, shapes. What is well formed but not supported by the engine is not an error here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tflite  # type: ignore[import-untyped]
from numpy.typing import NDArray

from tinyfleet.edge.errors import printable
from tinyfleet.edge.model.graph import Shape, Shape3
from tinyfleet.firmware_tools.readers.common import MAX_SIDE, CompileError, ReadError

_MAX_ITEMS = 20_000  # tensors and buffers
_MAX_OPERATORS = 5_000
_MAX_OPERANDS = 256
_MAX_RANK = 8
_MAX_NAME = 1_000
_BITS = {
    "FLOAT16": 16, "FLOAT32": 32, "FLOAT64": 64, "BFLOAT16": 16, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8,
    "INT16": 16, "UINT16": 16, "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8,
}  # fmt: skip
_NUMBERS = {"FLOAT32": "<f4", "INT8": "<i1", "INT32": "<i4", "INT64": "<i8"}


def shown(name: str) -> str:
    """A tensor's name, for an error."""
    return f"'{printable(name, 60)}'"


def _names(enumeration: type) -> dict[int, str]:
    return {number: name for name, number in vars(enumeration).items() if not name.startswith("_")}


_TYPES = _names(tflite.TensorType)
OPERATORS = _names(tflite.BuiltinOperator)
_ACTIVATIONS = _names(tflite.ActivationFunctionType)


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file. free: the axes without a fixed size, of which `shape` has 1; listed_shape has -1 there,
    except for the batch. scales: empty unless it is quantised; axis: what they run along if there are several.
    constant: it has data in the file; data: these bytes, in place; None where they lie outside of the tables, as in
    files above 2 GB, or there are none."""

    name: str
    type: str
    shape: Shape
    listed_shape: Shape
    scales: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int
    constant: bool
    data: NDArray[np.uint8] | None
    sparse: bool

    def error(self, problem: str) -> CompileError:
        return CompileError(f"tensor {shown(self.name)} {problem}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def sample(self) -> Shape3:
        """(h, w, c) of one sample. Raises CompileError if the engine has no such tensors."""
        shape = self.shape
        if len(shape) > 4 or any(n < 1 for n in shape):
            raise self.error(f"has the shape {list(shape)}; supported are one to four axes of fixed size")
        if len(shape) > 1 and shape[0] != 1:
            raise self.error(f"has the shape {list(shape)}, a batch of {shape[0]}; supported is a batch of one sample")
        h, w, c = ((1, 1, 1) + (shape[1:] if len(shape) > 1 else shape))[-3:]
        if max(h, w, c) > MAX_SIDE:
            raise self.error(f"has the shape {list(shape)}; supported are up to {MAX_SIDE} along an axis")
        return h, w, c

    @property
    def array(self) -> NDArray[Any]:
        """The constant's numbers. Raises CompileError if it is not a constant."""
        if self.data is None:
            raise self.error("is computed by the model; only a constant is supported in its place")
        if self.type not in _NUMBERS:
            raise self.error(f"is a constant of {self.type}; supported are FLOAT32, INT8 and INT32")
        return np.frombuffer(self.data.tobytes(), _NUMBERS[self.type]).reshape(self.shape)

    @property
    def numbers(self) -> list[int]:
        """A constant of whole numbers: axes, sizes, ..."""
        if self.type not in ("INT32", "INT64"):
            raise self.error(f"is {self.type}; INT32 is wanted in its place")
        return [int(n) for n in self.array.reshape(-1)]


@dataclass(frozen=True)
class Operator:
    """An operator of the file. inputs, outputs: None where an optional one is left out; indices: of these tensors."""

    kind: str
    table: Any
    inputs: tuple[FileTensor | None, ...]
    input_indices: tuple[int, ...]
    outputs: tuple[FileTensor | None, ...]
    output_indices: tuple[int, ...]

    @property
    def output(self) -> FileTensor:
        """The output of an operator that has one."""
        output = self.outputs[0]
        assert output is not None
        return output

    @property
    def output_index(self) -> int:
        return self.output_indices[0]

    def error(self, problem: str) -> CompileError:
        return CompileError(f"operator {self.kind} (output {shown(self.output.name)}) {problem}")

    def input(self, place: int) -> FileTensor:
        tensor = self.inputs[place] if place < len(self.inputs) else None
        if tensor is None:
            raise self.error(f"lacks its input {place}")
        return tensor

    def options(self, name: str) -> Any:
        table = self.table.BuiltinOptions()
        if table is None or self.table.BuiltinOptionsType() != getattr(tflite.BuiltinOptions, name):
            raise self.error(f"lacks its {name}; the file is damaged")
        return options_of(table, name)

    def activation(self, options: Any) -> str:
        name = activation_name(options)
        if name is None:
            raise self.error("has an unknown fused activation; the file is damaged")
        return name


def options_of(table: Any, name: str) -> Any:
    """An operator's table of options, as the schema's table of that name."""
    options = getattr(tflite, name)()
    options.Init(table.Bytes, table.Pos)
    return options


def activation_name(options: Any) -> str | None:
    """The activation that an operator's options fuse into it, such as NONE or RELU; None if it is not known."""
    return _ACTIVATIONS.get(options.FusedActivationFunction())


@dataclass(frozen=True)
class TFLiteFile:
    """The main subgraph of a file: operators in the order of their execution, and the indices of its inputs and
    outputs, -1 for one that is left out. subgraphs: how many the file has."""

    operators: tuple[Operator, ...]
    tensors: tuple[FileTensor, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    subgraphs: int


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns what a damaged file's tables lead to into a ReadError that names the file."""
    try:
        yield
    except CompileError as error:
        raise type(error)(f"{name}: {error}") from None
    except (struct.error, IndexError, ValueError, TypeError, OverflowError, AttributeError, MemoryError) as error:
        detail = str(error).splitlines()[:1] or [type(error).__name__]
        raise ReadError(f"{name} is damaged: its tables do not fit together ({detail[0]})") from None


def parse_tflite(data: bytes) -> TFLiteFile:
    """The tables of a file's bytes. Call within `reading`; raises ReadError, or what `reading` turns into one."""
    if len(data) < 16 or data[4:8] != b"TFL3":
        raise ReadError("it is not a .tflite file, or damaged (no TFL3 at its start); convert the model again")
    model = tflite.Model.GetRootAs(data, 0)
    if model.Version() != 3:
        raise ReadError(f"version {model.Version()} of the format is not known, only 3; it is newer, or damaged")
    if _count(model.SubgraphsLength(), "subgraphs") == 0:
        raise ReadError("it is damaged: it has no subgraph, so no model")
    graph = model.Subgraphs(0)
    kinds = [_kind(model.OperatorCodes(i)) for i in range(_count(model.OperatorCodesLength(), "operator codes"))]
    buffers = [_buffer(model.Buffers(i), len(data)) for i in range(_count(model.BuffersLength(), "buffers"))]
    budget = _Budget(len(data))
    tensors = [_tensor(graph.Tensors(i), buffers, budget) for i in range(_count(graph.TensorsLength(), "tensors"))]
    count = _count(graph.OperatorsLength(), "operators", _MAX_OPERATORS)
    operators = [_operator(graph.Operators(i), kinds, tensors, budget) for i in range(count)]
    if not operators:
        raise ReadError("it is damaged: it has no operator, so nothing to run")
    inputs = _ends(graph.Inputs, graph.InputsLength(), tensors)
    outputs = _ends(graph.Outputs, graph.OutputsLength(), tensors)
    if not inputs or not outputs:
        raise ReadError("it is damaged: it has no input or no output")
    return TFLiteFile(tuple(operators), tuple(tensors), inputs, outputs, model.SubgraphsLength())


class _Budget:
    """What is still read of a file: its tables may share parts, so a small one could say more than fits memory."""

    def __init__(self, size: int) -> None:
        self._left = 4 * size + _MAX_ITEMS

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise ReadError("it is damaged: its tables say more than a file of its size can hold")


def _count(number: int, what: str, most: int = _MAX_ITEMS) -> int:
    if not 0 <= number <= most:
        raise ReadError(f"it has {number} {what}, more than {most}; it is damaged, or not a model for a small device")
    return number


def _index(number: int, length: int, what: str) -> int:
    if not 0 <= number < length:
        raise ReadError(f"it is damaged: {what} {number} of {length}")
    return number


def _kind(code: Any) -> str:
    number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
    if number not in OPERATORS:
        raise ReadError(f"operator {number} is not known; the file is newer than this reader, or damaged")
    return OPERATORS[number]


def _buffer(buffer: Any, file_size: int) -> tuple[int, NDArray[np.uint8] | None]:
    """How many bytes of constant data a buffer holds, and these in place if they lie inside of the tables."""
    inside = int(buffer.DataLength())
    length = inside or int(buffer.Size())
    if length > file_size:
        raise ReadError(f"it is damaged: a buffer of {length} bytes in a file of {file_size}")
    return length, buffer.DataAsNumpy() if inside else None


def _tensor(tensor: Any, buffers: list[tuple[int, NDArray[np.uint8] | None]], budget: _Budget) -> FileTensor:
    text = tensor.Name() or b""
    budget.take(len(text))
    name = printable(text.decode("utf-8", errors="replace"), _MAX_NAME)
    rank = tensor.ShapeLength()
    if rank > _MAX_RANK:
        raise ReadError(f"it is damaged: tensor {shown(name)} has {rank} axes")
    shape = tuple(int(tensor.Shape(axis)) for axis in range(rank))
    listed = shape
    if tensor.ShapeSignatureLength() == rank:  # -1 where an axis is free; shape says 1 there
        listed = shape[:1] + tuple(int(tensor.ShapeSignature(axis)) for axis in range(1, rank))
    kind = _TYPES.get(tensor.Type())
    if kind is None:
        raise ReadError(f"number type {tensor.Type()} of tensor {shown(name)} is not known; it is newer, or damaged")
    held, data = buffers[_index(tensor.Buffer(), len(buffers), "buffer")]
    sparse = tensor.Sparsity() is not None
    bits = _BITS.get(kind)
    if any(n < -1 for n in listed) or (held and -1 in listed):
        raise ReadError(f"it is damaged: tensor {shown(name)} has the shape {list(listed)}")
    if held and bits and not sparse and held != (math.prod(listed) * bits + 7) // 8:
        raise ReadError(
            f"it is damaged: tensor {shown(name)} is {kind} {list(listed)}, but carries {held} bytes of constants"
        )
    scales, zero_points, axis = _quantization(tensor.Quantization(), name, listed, budget)
    return FileTensor(name, kind, shape, listed, scales, zero_points, axis, held > 0, data, sparse)


def _quantization(
    table: Any, name: str, shape: Shape, budget: _Budget
) -> tuple[tuple[float, ...], tuple[int, ...], int]:
    """Scales, zero points, and the axis that they run along."""
    if table is None:
        return (), (), 0
    budget.take(_count(table.ScaleLength(), "scales") + _count(table.ZeroPointLength(), "zero points"))
    scales = tuple(table.ScaleAsNumpy().tolist()) if table.ScaleLength() else ()
    zero_points = tuple(table.ZeroPointAsNumpy().tolist()) if table.ZeroPointLength() else ()
    axis = table.QuantizedDimension()
    if len(scales) > 1 and not 0 <= axis < len(shape):
        raise ReadError(
            f"it is damaged: the quantised axis of tensor {shown(name)} is quantised dimension {axis} of {len(shape)}"
        )
    if len(scales) > 1 and len(scales) != shape[axis]:
        raise ReadError(f"it is damaged: tensor {shown(name)} has {len(scales)} scales for an axis of {shape[axis]}")
    return scales, zero_points, axis


def _operator(operator: Any, kinds: list[str], tensors: list[FileTensor], budget: _Budget) -> Operator:
    kind = kinds[_index(operator.OpcodeIndex(), len(kinds), "operator code")]
    sides = []
    for at, length, what in (
        (operator.Inputs, operator.InputsLength(), "inputs"),
        (operator.Outputs, operator.OutputsLength(), "outputs"),
    ):
        budget.take(length)
        sides.append(tuple(int(at(i)) for i in range(_count(length, f"{what} of an operator", _MAX_OPERANDS))))
    inputs, outputs = ([_pick(tensors, index) for index in side] for side in sides)
    return Operator(kind, operator, tuple(inputs), sides[0], tuple(outputs), sides[1])


def _pick(tensors: list[FileTensor], index: int) -> FileTensor | None:
    return None if index == -1 else tensors[_index(index, len(tensors), "tensor")]


def _ends(at: Any, length: int, tensors: list[FileTensor]) -> tuple[int, ...]:
    indices = tuple(int(at(i)) for i in range(_count(length, "inputs or outputs")))
    for index in indices:
        _pick(tensors, index)
    return indices
