"""Programs for the mote engine: from a list of layers to the checked binary that a device reads in place.

`build` infers the shapes, plans where every value and gradient lives, and writes the binary; `Program` is that binary
with what can be read from it. The layout of the binary is described in mote/mote_internal.h.

The plan is by lifetimes. Time counts the steps of one training sample: op t forward for t < n, the loss for t = n, op
2n - t backward for t > n. Two tensors may share memory if their lifetimes do not meet; activations, flattens, the
loss's gradient, and max pooling's with windows that do not overlap, work in place.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge.errors import UserError

Shape = tuple[int, ...]
Vector = NDArray[np.float32]
Loss = Literal["softmax_cross_entropy", "mse"]
Padding = Literal["valid", "same"]

LOSSES: tuple[Loss, ...] = ("softmax_cross_entropy", "mse")
KINDS = ("dense", "conv2d", "avgpool", "maxpool", "flatten", "relu", "tanh")
MAX_OPS = 256
MAX_LAYERS = 32  # with parameters: the bits of a mask
MAX_FLOATS = 0x0FFFFFFF
NONE = 0xFFFFFFFF

_HEADER = struct.Struct("<4sHHIIHBBHHHHIIII")
_OP = struct.Struct("<8B6HIII")
_UNSUMMED = 16  # bytes before those that the CRC covers


class ProgramError(UserError):
    """A model that the engine cannot run, or bytes that are no program."""


@dataclass(frozen=True)
class Dense:
    """y = W x + b on a flat input; weights [units, inputs], bias [units]."""

    units: int


@dataclass(frozen=True)
class Conv2D:
    """2-D convolution of [h, w, c]; weights [filters, kernel h, kernel w, c], bias [filters]."""

    filters: int
    kernel: int | tuple[int, int] = 3
    strides: int | tuple[int, int] = 1
    padding: Padding = "valid"


@dataclass(frozen=True)
class AvgPool2D:
    """The mean of every window, of the elements inside the input; strides default to the size."""

    size: int | tuple[int, int] = 2
    strides: int | tuple[int, int] | None = None
    padding: Padding = "valid"


@dataclass(frozen=True)
class MaxPool2D:
    """The largest element of every window; strides default to the size."""

    size: int | tuple[int, int] = 2
    strides: int | tuple[int, int] | None = None
    padding: Padding = "valid"


@dataclass(frozen=True)
class Flatten:
    """[h, w, c] as one row."""


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)"""


@dataclass(frozen=True)
class Tanh:
    """The hyperbolic tangent."""


Layer = Dense | Conv2D | AvgPool2D | MaxPool2D | Flatten | ReLU | Tanh


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a program. Shapes are (h, w, c) or (n,); macs: multiplications and additions of one inference."""

    name: str
    kind: str
    in_shape: Shape
    out_shape: Shape
    macs: int
    params: int
    trainable: bool


@dataclass(frozen=True)
class _Op:
    """An op record, without its place in memory."""

    kind: str
    in_shape: tuple[int, int, int]
    out_shape: tuple[int, int, int]
    kernel: tuple[int, int] = (0, 0)
    strides: tuple[int, int] = (0, 0)
    pads: tuple[int, int] = (0, 0)
    trainable: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.out_shape)

    @property
    def weights(self) -> Shape:
        """The shape of the weights; () without any."""
        if self.kind == "dense":
            return (self.out_shape[2], self.in_shape[2])
        if self.kind == "conv2d":
            return (self.out_shape[2], *self.kernel, self.in_shape[2])
        return ()

    @property
    def params(self) -> int:
        return math.prod(self.weights) + self.out_shape[2] if self.weights else 0

    @property
    def pointwise(self) -> bool:
        """Backward needs the output, and both ways can work in place."""
        return self.kind in ("relu", "tanh")


# Shapes


def _pair(value: int | tuple[int, int], what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and 1 <= v <= 255 for v in pair):
        raise ProgramError(f"{what} is {value!r}; it must be one or two whole numbers from 1 to 255")
    return pair[0], pair[1]


def _windows(size: int, kernel: int, stride: int, padding: str, what: str) -> tuple[int, int]:
    """How many windows fit in one dimension, and the padding before it (as TensorFlow has them)."""
    if padding == "same":
        count = -(-size // stride)
        return count, max((count - 1) * stride + kernel - size, 0) // 2
    if padding != "valid":
        raise ProgramError(f"{what} has padding {padding!r}; it can be 'valid' or 'same'")
    if kernel > size:
        raise ProgramError(f"{what} is larger ({kernel}) than its input ({size}); use a smaller one or padding='same'")
    return (size - kernel) // stride + 1, 0


def _op(layer: Layer, shape: tuple[int, int, int], index: int) -> _Op:
    """The op of a layer whose input has this shape."""
    here = f"layer {index} ({type(layer).__name__})"
    if isinstance(layer, ReLU | Tanh):
        return _Op(type(layer).__name__.lower(), shape, shape)
    if isinstance(layer, Flatten):
        return _Op("flatten", shape, (1, 1, math.prod(shape)))
    if isinstance(layer, Dense):
        if shape[:2] != (1, 1):
            raise ProgramError(f"{here} takes a flat input, but gets {shape}; put Flatten() before it")
        return _Op("dense", shape, (1, 1, layer.units))
    if isinstance(layer, Conv2D):
        kind, kernel, strides, channels = "conv2d", layer.kernel, layer.strides, layer.filters
    elif isinstance(layer, AvgPool2D | MaxPool2D):
        kind = "avgpool" if isinstance(layer, AvgPool2D) else "maxpool"
        kernel, strides, channels = layer.size, layer.size if layer.strides is None else layer.strides, shape[2]
    else:
        raise ProgramError(
            f"layer {index} is {layer!r}; the engine has Dense, Conv2D, AvgPool2D, MaxPool2D, Flatten, ReLU and Tanh"
        )
    (kh, kw), (sh, sw) = _pair(kernel, f"the window of {here}"), _pair(strides, f"the strides of {here}")
    rows, top = _windows(shape[0], kh, sh, layer.padding, f"the window of {here}")
    columns, left = _windows(shape[1], kw, sw, layer.padding, f"the window of {here}")
    return _Op(kind, shape, (rows, columns, channels), (kh, kw), (sh, sw), (top, left))


def _check_shape(shape: Sequence[int], what: str) -> None:
    if not all(isinstance(v, int) and 1 <= v <= 0xFFFF for v in shape) or math.prod(shape) > MAX_FLOATS:
        raise ProgramError(
            f"{what} has the shape {tuple(shape)}; every dimension must be a whole number from 1 to 65535"
        )


def _full(shape: Shape) -> tuple[int, int, int]:
    if len(shape) == 1:
        return 1, 1, shape[0]
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    raise ProgramError(f"the input shape is {shape}; it must be (features,) or (height, width, channels)")


def _short(shape: tuple[int, int, int]) -> Shape:
    return shape[2:] if shape[:2] == (1, 1) else shape


# The plan


@dataclass
class Tensor:
    """Memory that is wanted from the step `birth` to the step `death`, both included. size: floats."""

    size: int
    birth: int
    death: int


def pack(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Offsets such that tensors that live together do not overlap, and the floats that all need.

    Greedy best fit, by size and by birth, whichever comes out smaller (after Pisarchyk and Lee 2020, "Efficient memory
    management for deep neural net inference").
    """
    orders = (lambda i: (-tensors[i].size, i), lambda i: (tensors[i].birth, -tensors[i].size, i))
    plans = [_best_fit(tensors, sorted(range(len(tensors)), key=order)) for order in orders]
    return min(plans, key=lambda plan: plan[1])


def _best_fit(tensors: Sequence[Tensor], order: Iterable[int]) -> tuple[list[int], int]:
    offsets: dict[int, int] = {}
    total = 0
    for i in order:
        t = tensors[i]
        taken = sorted(
            (offsets[j], offsets[j] + tensors[j].size)
            for j in offsets
            if tensors[j].birth <= t.death and t.birth <= tensors[j].death
        )
        end, best, best_gap = 0, None, math.inf
        for first, last in taken:
            if t.size <= first - end < best_gap:
                best, best_gap = end, first - end
            end = max(end, last)
        offsets[i] = end if best is None else best
        total = max(total, offsets[i] + t.size)
    return [offsets[i] for i in range(len(tensors))], total


@dataclass(frozen=True)
class Plan:
    """Offsets in floats: every op's output, the gradient with respect to it, the model's output; and all in all."""

    out: list[int]
    grad: list[int]
    output: int
    size: int


def _value_death(ops: Sequence[_Op], first: int, i: int) -> int:
    """The last step that reads op i's output. Op i is no flatten; those behind it are the same memory."""
    n = len(ops)
    reader = next((j for j in range(i + 1, n) if ops[j].kind != "flatten"), n)
    if ops[i].pointwise and i > first:
        return 2 * n - i
    if reader < n and (ops[reader].trainable or (ops[reader].kind == "maxpool" and reader > first)):
        return 2 * n - reader
    return reader


def plan(ops: Sequence[_Op], loss: Loss) -> Plan:
    """Where every tensor lives. The lifetimes are those that mote_load.c checks."""
    n = len(ops)
    first = next((i for i, op in enumerate(ops) if op.trainable), n)
    tensors: list[Tensor] = []
    values: list[int | None] = []  # op -> index of its output in `tensors`; None: it is the model's input
    grads: list[int | None] = [None] * n

    def new(size: int, birth: int, death: int) -> int:
        tensors.append(Tensor(size, birth, death))
        return len(tensors) - 1

    for i, op in enumerate(ops):
        before = values[-1] if values else None
        if op.kind == "flatten":
            values.append(before)
        elif op.pointwise and before is not None and tensors[before].death == i:
            values.append(before)
            tensors[before].death = _value_death(ops, first, i)
        else:
            values.append(new(op.size, i, _value_death(ops, first, i)))
    output = values[-1]
    if output is None:
        raise ProgramError("a model needs at least one layer that computes something")
    if loss == "softmax_cross_entropy" and tensors[output].death > n:
        output = new(ops[-1].size, n, n)

    for i in reversed(range(first, n)):
        t = 2 * n - (i + 1)  # when this gradient is computed
        if i + 1 == n:
            source = output if tensors[output].death == n else None
        elif ops[i + 1].kind == "flatten" or ops[i + 1].pointwise:
            source = grads[i + 1]
        elif ops[i + 1].kind == "maxpool" and ops[i + 1].kernel == ops[i + 1].strides:
            value = values[i]
            source = value if value is not None and tensors[value].death == t else None
        else:
            source = None
        if source is None:
            source = new(ops[i].size, t, t)
        tensors[source].death = 2 * n - i
        grads[i] = source

    offsets, size = pack(tensors)

    def places(indices: Sequence[int | None]) -> list[int]:
        return [NONE if i is None else offsets[i] for i in indices]

    return Plan(places(values), places(grads), offsets[output], size)


# Programs


def build(
    layers: Sequence[Layer],
    input_shape: Sequence[int],
    loss: Loss,
    *,
    trainable: Collection[int] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Program:
    """The program of a model.

    input_shape: (features,) or (height, width, channels). trainable: which layers may train, counting layers with
    parameters from 0; None for all. weights: arrays by the names of `Program.all_parameters`; a frozen layer needs its
    own; if trainable layers have theirs, the program carries them as initial values (then all must), else it is the
    architecture alone.

    ReLU before max pooling is built as max pooling before ReLU: the same numbers, with less memory and work.

    Raises ProgramError.
    """
    if loss not in LOSSES:
        raise ProgramError(f"the loss is {loss!r}; the engine has {' and '.join(LOSSES)}")
    layers = list(layers)
    if not 1 <= len(layers) <= MAX_OPS:
        raise ProgramError(f"the model has {len(layers)} layers; it can have 1 to {MAX_OPS}")
    for i in range(len(layers) - 1, 0, -1):
        for j in range(i, len(layers)):
            if not (isinstance(layers[j - 1], ReLU) and isinstance(layers[j], MaxPool2D)):
                break
            layers[j - 1], layers[j] = layers[j], layers[j - 1]

    shape = _full(tuple(int(v) for v in input_shape))
    _check_shape(shape, "the input")
    ops: list[_Op] = []
    for i, layer in enumerate(layers):
        op = _op(layer, shape, i)
        _check_shape(op.out_shape, f"the output of layer {i} ({type(layer).__name__})")
        ops.append(op)
        shape = op.out_shape

    numbers = [i for i, op in enumerate(ops) if op.params]
    if len(numbers) > MAX_LAYERS:
        raise ProgramError(f"the model has {len(numbers)} layers with parameters; it can have {MAX_LAYERS}")
    chosen = range(len(numbers)) if trainable is None else trainable
    for number in chosen:
        if not 0 <= number < len(numbers):
            raise ProgramError(f"layer {number} cannot train: the model has {len(numbers)} layers with parameters")
        op = ops[numbers[number]]
        ops[numbers[number]] = _Op(op.kind, op.in_shape, op.out_shape, op.kernel, op.strides, op.pads, True)
    return Program.parse(_assemble(ops, loss, weights or {}))


def _arrays(ops: Sequence[_Op]) -> list[tuple[str, Shape, bool]]:
    """(name, shape, trains) of every weight and bias, in the order of the layers."""
    arrays: list[tuple[str, Shape, bool]] = []
    for number, op in enumerate(op for op in ops if op.params):
        arrays.append((f"{op.kind}_{number}/weights", op.weights, op.trainable))
        arrays.append((f"{op.kind}_{number}/bias", op.out_shape[2:], op.trainable))
    return arrays


def _assemble(ops: Sequence[_Op], loss: Loss, weights: Mapping[str, NDArray[Any]]) -> bytes:
    arrays = _arrays(ops)
    unknown = sorted(set(weights) - {name for name, _, _ in arrays})
    if unknown:
        known = ", ".join(name for name, _, _ in arrays)
        raise ProgramError(f"no layer takes the weights '{unknown[0]}'; the model has {known or 'none'}")
    carries = any(trains and name in weights for name, _, trains in arrays)
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name, shape, trains in arrays:
        if trains and not carries:
            continue
        if name not in weights:
            why = "the other trainable layers have" if trains else "it is frozen, so it needs"
            raise ProgramError(f"'{name}' has no weights; {why} them: pass them too")
        array = np.asarray(weights[name], dtype="<f4")
        if array.shape != shape:
            raise ProgramError(f"'{name}' has the shape {array.shape}; the model needs {shape}")
        if not np.isfinite(array).all():
            raise ProgramError(f"'{name}' has numbers that are not finite")
        parts[trains].append(array.tobytes())

    where = plan(ops, loss)
    sizes = [sum(op.params for op in ops if op.trainable is trains) for trains in (True, False)]
    if max(*sizes, where.size) > MAX_FLOATS:
        raise ProgramError(f"the model needs more than {MAX_FLOATS} floats; make it smaller")
    counts = {True: 0, False: 0}
    records = []
    for i, op in enumerate(ops):
        records.append(
            _OP.pack(
                KINDS.index(op.kind) + 1, int(op.trainable), *op.kernel, *op.strides, *op.pads, *op.in_shape,
                *op.out_shape, counts[op.trainable] if op.params else 0, where.out[i], where.grad[i],
            )
        )  # fmt: skip
        counts[op.trainable] += op.params
    body = b"".join([*records, *parts[True], *parts[False]])
    rest = struct.pack(
        "<HBBHHHHIIII", len(ops), LOSSES.index(loss) + 1, int(carries), *ops[0].in_shape, 0, counts[True],
        counts[False], where.size, where.output,
    )  # fmt: skip
    start = struct.pack("<4sHHI", b"MOTE", 1, _HEADER.size, _HEADER.size + len(body))
    return start + struct.pack("<I", zlib.crc32(rest + body)) + rest + body


@dataclass(frozen=True)
class Program:
    """A program's bytes, and what they say. Equal if the bytes are."""

    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Program:
        """A program from its bytes. Raises ProgramError if they are none; the engine checks the plan as it loads."""
        header = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else None
        if header is None or header[0] != b"MOTE":
            raise ProgramError("these bytes are no program for the engine; build one with edge.program.build")
        if header[1:3] != (1, _HEADER.size):
            raise ProgramError(f"this program has the format version {header[1]}; this engine reads version 1")
        if header[3] != len(data) or header[4] != zlib.crc32(data[_UNSUMMED:]):
            raise ProgramError("this program is damaged (its length or checksum is wrong); transfer it again")
        program = cls(bytes(data))
        n_ops, loss, flags, n_params, n_constants = header[5], header[6], header[7], header[12], header[13]
        floats = n_constants + (n_params if flags & 1 else 0)
        consistent = (
            1 <= n_ops <= MAX_OPS
            and 1 <= loss <= len(LOSSES)
            and _HEADER.size + n_ops * _OP.size + 4 * floats == len(data)
            and all(1 <= r[0] <= len(KINDS) and all(r[8:14]) for r in program._records)
            and max(n_params, n_constants, header[14]) <= MAX_FLOATS
            and sum(op.params for op in program._ops if op.trainable) == n_params
            and sum(op.params for op in program._ops if not op.trainable) == n_constants
        )
        if not consistent:
            raise ProgramError("this program contradicts itself; build it anew with edge.program.build")
        return program

    @cached_property
    def _header(self) -> tuple[Any, ...]:
        return _HEADER.unpack_from(self.data)

    @cached_property
    def _records(self) -> list[tuple[int, ...]]:
        return [_OP.unpack_from(self.data, _HEADER.size + i * _OP.size) for i in range(self._header[5])]

    @cached_property
    def _ops(self) -> list[_Op]:
        return [
            _Op(KINDS[r[0] - 1], r[8:11], r[11:14], r[2:4], r[4:6], r[6:8], bool(r[1]))  # type: ignore[arg-type]
            for r in self._records
        ]

    @cached_property
    def model_id(self) -> bytes:
        """The first 8 bytes of the SHA-256: how a fleet calls this model."""
        return hashlib.sha256(self.data).digest()[:8]

    @property
    def loss(self) -> Loss:
        """What the model is trained to make small."""
        loss: Loss = LOSSES[self._header[6] - 1]
        return loss

    @property
    def input_shape(self) -> Shape:
        """(features,) or (height, width, channels)."""
        return _short(self._header[8:11])

    @property
    def output_shape(self) -> Shape:
        """The same of the output: class probabilities under softmax cross-entropy."""
        return _short(self._ops[-1].out_shape)

    @property
    def n_params(self) -> int:
        """Floats that can train: the length of the vector that a fleet exchanges."""
        return int(self._header[12])

    @property
    def activation_bytes(self) -> int:
        """RAM of the planned values and gradients."""
        return 4 * int(self._header[14])

    @property
    def arena_bytes(self) -> int:
        """RAM that the engine needs for it, in all: parameters, values and gradients."""
        return 4 * self.n_params + self.activation_bytes

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers in order. Those with parameters are numbered together, the others by kind."""
        layers = []
        numbers: dict[str, int] = {}
        for op in self._ops:
            group = "parameters" if op.params else op.kind
            number = numbers[group] = numbers.get(group, -1) + 1
            macs = math.prod(op.weights) * op.out_shape[0] * op.out_shape[1] if op.params else 0
            layers.append(
                LayerInfo(f"{op.kind}_{number}", op.kind, _short(op.in_shape), _short(op.out_shape), macs, op.params,
                          op.trainable)
            )  # fmt: skip
        return tuple(layers)

    @cached_property
    def all_parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of every weight and bias, frozen ones too, in the order of the layers."""
        return tuple((name, shape) for name, shape, _ in _arrays(self._ops))

    @cached_property
    def parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of what can train, in the order of the vector."""
        return tuple((name, shape) for name, shape, trains in _arrays(self._ops) if trains)

    @property
    def carried(self) -> Vector | None:
        """The initial values that the program carries, or None if it is an architecture alone."""
        if not self._header[7] & 1:
            return None
        start = _HEADER.size + len(self._ops) * _OP.size
        return np.frombuffer(self.data, "<f4", self.n_params, start).astype(np.float32)

    def initial(self, seed: int) -> Vector:
        """Random parameters: weights uniform after Glorot and Bengio 2010, biases 0."""
        random = np.random.default_rng(seed)
        vectors = []
        for _, shape in self.parameters:
            if len(shape) == 1:
                vectors.append(np.zeros(shape[0], np.float32))
            else:
                field = math.prod(shape[1:-1])
                limit = math.sqrt(6.0 / ((shape[0] + shape[-1]) * field))
                vectors.append(random.uniform(-limit, limit, math.prod(shape)).astype(np.float32))
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)

    def split(self, vector: NDArray[Any]) -> dict[str, Vector]:
        """Views of a parameter vector [n_params] as arrays by name. Raises ProgramError on another length."""
        vector = np.asarray(vector, np.float32)
        if vector.shape != (self.n_params,):
            raise ProgramError(f"the parameters have the shape {vector.shape}; this model needs ({self.n_params},)")
        arrays: dict[str, Vector] = {}
        first = 0
        for name, shape in self.parameters:
            count = math.prod(shape)
            arrays[name] = vector[first : first + count].reshape(shape)
            first += count
        return arrays

    def join(self, arrays: Mapping[str, NDArray[Any]]) -> Vector:
        """The parameter vector [n_params] of arrays by name. Raises ProgramError if one is missing or misshapen."""
        vectors = []
        for name, shape in self.parameters:
            if name not in arrays or np.shape(arrays[name]) != shape:
                got = np.shape(arrays[name]) if name in arrays else "nothing"
                raise ProgramError(f"'{name}' needs the shape {shape}, but got {got}")
            vectors.append(np.asarray(arrays[name], np.float32).ravel())
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)
