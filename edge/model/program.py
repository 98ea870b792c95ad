"""A program for the mote engine: the checked binary that a device reads in place, and what can be read from it.

Its layout is in `edge.model.program_format`; `edge.model.assemble` writes it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import ProgramError, UserError
from tinyfleet.edge.files import read_file
from tinyfleet.edge.model.arrays import named_arrays, trained_shapes
from tinyfleet.edge.model.graph import LOSSES, Kind, Loss, Op, Shape, Shape3, Tensor, Trains
from tinyfleet.edge.model.memory_plan import (
    MASKED,
    TRAINED_INT8,
    WEIGHTED,
    macs,
    params_bytes,
    trained_counts,
    weight_counts,
)
from tinyfleet.edge.model.program_format import (
    BIAS,
    CARRIES,
    HEADER,
    INT8,
    MASKS,
    MAX_BYTES,
    MAX_FILE_BYTES,
    MOMENTUM,
    NONE,
    OP,
    TENSOR,
    TYPES,
    UNSUMMED,
    VERSION,
    WEIGHTS,
    Header,
    OpRecord,
    TensorRecord,
)

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class LayerInfo:
    """One operation of a program.

    Parameters
    ----------
    name, kind
        Such as ``dense_0`` and ``dense``.
    in_shape, out_shape
        (h, w, c) or (n,).
    macs
        Multiply-accumulates of one inference.
    params, trained
        Its parameters, and how many of them train.
    """

    name: str
    kind: str
    in_shape: Shape
    out_shape: Shape
    macs: int
    params: int
    trained: int

    @property
    def trainable(self) -> bool:
        """Whether any of it trains."""
        return self.trained > 0


def short_shape(shape: Shape3) -> Shape:
    """(n,) for (1, 1, n); other shapes as they are."""
    return shape[2:] if shape[:2] == (1, 1) else shape


@dataclass(frozen=True)
class Program:
    """A program for the engine: its bytes, and what they tell. Equal if the bytes are.

    Made by `compile_model`, `edge.model.layers.build` or `Program.parse`.

    Parameters
    ----------
    data : bytes
        The bytes that a device reads in place.

    Examples
    --------
    >>> from tinyfleet.edge.model.layers import Dense, ReLU, build
    >>> program = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
    >>> program.n_params, program.arena_bytes
    (2410, 9936)
    >>> [layer.kind for layer in program.layers]
    ['dense', 'relu', 'dense']
    >>> Program.parse(program.data) == program
    True
    """

    data: bytes

    @classmethod
    def parse(cls, data: bytes) -> Program:
        """A program from its bytes.

        Parameters
        ----------
        data : bytes
            For example a .mote file's content.

        Raises
        ------
        ProgramError
            If they are not a program, are damaged, or are of another version of the format. The engine checks every
            operation when it loads.
        """
        if len(data) < HEADER.size or data[:4] != b"MOTE":
            raise ProgramError("these bytes are not a program for the engine; build one with edge.model.layers.build")
        header = Header(*HEADER.unpack_from(data))
        if (header.version, header.header_bytes) != (VERSION, HEADER.size):
            raise ProgramError(
                f"this program has the format version {header.version}; this engine reads version {VERSION}"
            )
        if header.program_bytes != len(data) or header.crc != zlib.crc32(data[UNSUMMED:]):
            raise ProgramError("this program is damaged (its length or checksum is wrong); transfer it again")
        program = cls(bytes(data))
        if not (program._sizes_agree() and program._records_agree() and program._ops_agree()):
            raise ProgramError("this program contradicts itself; build it again with edge.model.layers.build")
        return program

    def _sizes_agree(self) -> bool:
        h = self._header
        size = HEADER.size + h.tensors * TENSOR.size + h.ops * OP.size + h.constants_bytes
        if size != len(self.data) or not h.tensors or not h.ops or h.loss > len(LOSSES) or h.flags > 7:
            return False
        if max(h.params_bytes, h.activation_bytes, h.constants_bytes) > MAX_BYTES:
            return False
        return not h.flags & CARRIES or h.params_bytes <= h.constants_bytes

    def _records_agree(self) -> bool:
        h = self._header
        if max(h.input, h.logits, h.output) >= h.tensors:
            return False
        for t in self._tensor_records:
            shape = (t.height, t.width, t.channels)
            if t.type not in (1, 2) or not all(shape) or math.prod(shape) > MAX_BYTES // 4:
                return False
        kinds = set(Kind)
        return all(
            r.kind in kinds
            and max(r.input, r.output) < h.tensors
            and (not r.flags & MASKS or (r.kind in MASKED and r.option < h.tensors))
            for r in self._op_records
        )

    def _ops_agree(self) -> bool:
        h, ops, tensors = self._header, self._ops, self._tensors
        for op in ops:
            if op.kind in WEIGHTED + TRAINED_INT8 and tensors[op.output].shape[2] < (op.trained or 0):
                return False
            if op.trains != "nothing" and not weight_counts(op, tensors)[0]:
                return False
            if op.trains != "nothing" and op.kind in TRAINED_INT8 and not h.flags & INT8:
                return False
        return (
            sum(params_bytes(op, tensors) for op in ops) == h.params_bytes and 1 <= h.classes <= tensors[h.logits].size
        )

    @cached_property
    def _header(self) -> Header:
        return Header(*HEADER.unpack_from(self.data))

    @cached_property
    def _tensor_records(self) -> list[TensorRecord]:
        start = HEADER.size
        return [
            TensorRecord(*TENSOR.unpack_from(self.data, start + i * TENSOR.size)) for i in range(self._header.tensors)
        ]

    @cached_property
    def _op_records(self) -> list[OpRecord]:
        start = HEADER.size + self._header.tensors * TENSOR.size
        return [OpRecord(*OP.unpack_from(self.data, start + i * OP.size)) for i in range(self._header.ops)]

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        return tuple(
            Tensor((t.height, t.width, t.channels), TYPES[t.type - 1], t.scale, t.zero_point)
            for t in self._tensor_records
        )

    @cached_property
    def _ops(self) -> list[Op]:
        ops = []
        for i, r in enumerate(self._op_records):
            trains: Trains = "all" if r.flags & WEIGHTS else "bias" if r.flags & BIAS else "nothing"
            ops.append(
                Op(
                    Kind(r.kind),
                    f"op_{i}",
                    (r.input,) if r.input2 == NONE else (r.input, r.input2),
                    r.output,
                    kernel=(r.kernel_height, r.kernel_width),
                    pads=(r.pad_top, r.pad_left),
                    strides=(r.stride_height, r.stride_width),
                    dilation=(r.dilation_height, r.dilation_width),
                    trains=trains,
                    trained=r.trained or None,
                )
            )
        return ops

    @cached_property
    def chain(self) -> tuple[tuple[Op, Shape3, Shape3], ...]:
        """The ops with the shapes of their input and output, where each reads what the one before it wrote, if under
        another shape; see Op for what these ops do not say. Raises ProgramError if the model is no such chain."""
        ops = tuple((op, self._tensors[op.inputs[0]], self._tensors[op.output]) for op in self._ops)
        follows = all(before[2].size == x.size for before, (_, x, _) in itertools.pairwise(ops))
        if not follows or any(len(op.inputs) > 1 for op, _, _ in ops):
            raise ProgramError("this model branches; here its layers must follow each other in one sequence")
        return tuple((op, x.shape, y.shape) for op, x, y in ops)

    @cached_property
    def model_id(self) -> bytes:
        """The first 8 bytes of the SHA-256: the ID of this model in a fleet."""
        return hashlib.sha256(self.data).digest()[:8]

    @property
    def loss(self) -> Loss | None:
        """The loss that it trains with; None if it only runs."""
        return LOSSES[self._header.loss - 1] if self._header.loss else None

    @property
    def input(self) -> Tensor:
        """The model's input: its shape (h, w, c), its type and, if that is int8, its scale and zero point."""
        return self._tensors[self._header.input]

    @property
    def output(self) -> Tensor:
        """The model's output, in the same form."""
        return self._tensors[self._header.output]

    @property
    def input_shape(self) -> Shape:
        """(features,) or (height, width, channels)."""
        return short_shape(self.input.shape)

    @property
    def output_shape(self) -> Shape:
        """Shape of the output, in the same form; class probabilities if the loss is a cross-entropy."""
        return short_shape(self.output.shape)

    @property
    def classes(self) -> int:
        """Outputs in use at first."""
        return self._header.classes

    @property
    def trains_int8(self) -> bool:
        """Whether int8 weights train."""
        return bool(self._header.flags & INT8)

    @cached_property
    def n_params(self) -> int:
        """Numbers that can train: the length of the vector that a fleet exchanges."""
        return sum(math.prod(shape) for _, shape in self.parameters)

    @property
    def params_bytes(self) -> int:
        """RAM of what trains, without its momentum."""
        return self._header.params_bytes

    @property
    def momentum_bytes(self) -> int:
        """RAM of the optimizer's momentum."""
        return self.params_bytes if self._header.flags & MOMENTUM else 0

    @property
    def activation_bytes(self) -> int:
        """RAM of activations and gradients, as planned."""
        return self._header.activation_bytes

    @property
    def arena_bytes(self) -> int:
        """RAM that the engine needs in all: what trains, momentum, activations and gradients."""
        return self.params_bytes + self.momentum_bytes + self.activation_bytes

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of its ops: what an image must hold to run it."""
        return frozenset(op.kind for op in self._ops)

    @cached_property
    def layers(self) -> tuple[LayerInfo, ...]:
        """The ops in order. Those with parameters are numbered together, the others by kind."""
        layers = []
        numbers: dict[str, int] = {}
        for op in self._ops:
            weights, biases = weight_counts(op, self._tensors)
            kind = op.kind.name.lower()
            group = "parameters" if weights else kind
            number = numbers[group] = numbers.get(group, -1) + 1
            x, y = self._tensors[op.inputs[0]].shape, self._tensors[op.output].shape
            layers.append(
                LayerInfo(
                    f"{kind}_{number}",
                    kind,
                    short_shape(x),
                    short_shape(y),
                    macs(op, self._tensors),
                    weights + biases,
                    sum(trained_counts(op, self._tensors)),
                )
            )
        return tuple(layers)

    @cached_property
    def all_parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of every weight and bias, frozen ones too, in the order of the layers."""
        return tuple((name, shape) for name, shape, _ in named_arrays(self._ops, self._tensors))

    @cached_property
    def parameters(self) -> tuple[tuple[str, Shape], ...]:
        """(name, shape) of what can train, in the order of the vector."""
        names = {"all": ("weights", "bias"), "bias": ("bias",), "nothing": ()}
        found: list[tuple[str, Shape]] = []
        for layer, op in zip(self.layers, self._ops, strict=True):
            shapes = trained_shapes(op, self._tensors)
            found += ((f"{layer.name}/{name}", s) for name, s in zip(names[op.trains], shapes, strict=True))
        return tuple(found)

    @property
    def carried(self) -> Vector | None:
        """The initial values that the program carries, or None if it is an architecture alone, or trains int8."""
        if not self._header.flags & CARRIES or self.trains_int8:
            return None
        start = len(self.data) - self._header.constants_bytes
        return np.frombuffer(self.data, "<f4", self.n_params, start).astype(np.float32)

    def initial(self, seed: int) -> Vector:
        """Random parameters: weights uniform after Glorot and Bengio 2010, biases 0, a layer norm's gamma 1."""
        generator = np.random.default_rng(seed)
        vectors = []
        for name, shape in self.parameters:
            if name.startswith("layernorm") and name.endswith("/weights"):
                vectors.append(np.ones(shape[0], np.float32))
            elif len(shape) == 1:
                vectors.append(np.zeros(shape[0], np.float32))
            else:
                fan = _fans(name, shape)
                limit = math.sqrt(6.0 / fan)
                vectors.append(generator.uniform(-limit, limit, math.prod(shape)).astype(np.float32))
        return np.concatenate(vectors) if vectors else np.zeros(0, np.float32)

    @cached_property
    def head(self) -> int:
        """The mask of the last layer that can train; bit i of a mask is the i-th layer that can."""
        return 1 << sum(layer.trainable for layer in self.layers) - 1

    def in_layers(self, mask: int) -> NDArray[np.bool_]:
        """[n_params]: which parameters belong to the layers of a mask."""
        trained = [layer.trained for layer in self.layers if layer.trainable]
        return np.repeat(np.array([mask >> i & 1 for i in range(len(trained))], np.bool_), trained)

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


def read_program(path: Path) -> Program:
    """The program in a .mote file. Raises UserError if there is none."""
    advice = "make one with: tinyfleet model compile"
    data = read_file(path, MAX_FILE_BYTES, advice)
    try:
        return Program.parse(data)
    except ProgramError as error:
        raise UserError(f"{path} is not a program ({error}); {advice}") from None


def _fans(name: str, shape: Shape) -> int:
    """Inputs and outputs that a weight array joins."""
    if "depthwise" in name:
        return 2 * math.prod(shape[:-1])
    return (shape[0] + shape[-1]) * math.prod(shape[1:-1])
