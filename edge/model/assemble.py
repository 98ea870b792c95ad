"""From a graph to the bytes of its program."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model import quantized
from tinyfleet.edge.model.arrays import check_shape, weights_shape
from tinyfleet.edge.model.graph import LOSSES, Graph, Kind, Op, Tensor
from tinyfleet.edge.model.memory_plan import (
    TRAINED_INT8,
    WEIGHTED,
    Gradients,
    MemoryPlan,
    constants_bytes,
    params_bytes,
    plan_memory,
)
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.model.program_format import (
    ADDS,
    ADDS2,
    BIAS,
    CARRIES,
    EXTERNAL,
    FILLS,
    HEADER,
    INT8,
    MASKS,
    MAX_BYTES,
    MAX_LAYERS,
    MOMENTUM,
    NONE,
    OP,
    TENSOR,
    TYPES,
    UNSUMMED,
    VERSION,
    WEIGHTS,
    Header,
)


def check(graph: Graph) -> None:
    """Check that the engine can run and train a graph, without assembling it.

    Parameters
    ----------
    graph
        The model.

    Raises
    ------
    ProgramError
        For what the engine would reject; names the op.
    """
    written = {op.output for op in graph.ops}
    for index, tensor in enumerate(graph.tensors):
        check_shape(tensor.shape, "a tensor")
        if index and tensor.view_of is None and index not in written:
            raise ProgramError(f"no op computes tensor {index} of the graph")
    _check_output(graph)
    _check_training(graph)


def _check_output(graph: Graph) -> None:
    output = graph.tensors[graph.output]
    if graph.loss is not None and output.dtype != "float32":
        raise ProgramError("a loss needs a float32 output; put a DEQUANTIZE at the model's end")
    if graph.classes is not None and not 1 <= graph.classes <= output.size:
        raise ProgramError(f"{graph.classes} classes at first; the model's output has room for 1 to {output.size}")
    if graph.classes not in (None, output.size) and output.shape[2] != output.size:
        raise ProgramError(f"only a flat output can grow; this one has the shape {output.shape}")
    if not 0 < graph.huber_delta < math.inf:
        raise ProgramError(f"the Huber loss's delta is {graph.huber_delta}; it must be more than 0")


def _check_training(graph: Graph) -> None:
    training = [op for op in graph.ops if op.trains != "nothing"]
    if len(training) > MAX_LAYERS:
        raise ProgramError(
            f"{len(training)} layers would train; {MAX_LAYERS} can. Let fewer train (--train-from a later layer)"
        )
    if training and graph.loss is None:
        raise ProgramError("a model that trains needs a loss; choose one of " + ", ".join(LOSSES))
    for op in training:
        if op.kind not in WEIGHTED + TRAINED_INT8 or op.trained == 0:
            raise ProgramError(f"'{op.name}' ({op.kind.name.lower()}) has nothing that could train")
    if len({op.kind in TRAINED_INT8 for op in training}) > 1:
        raise ProgramError("float32 and int8 weights cannot train in one model")
    if graph.momentum and training and training[0].kind in TRAINED_INT8:
        raise ProgramError("int8 weights train without momentum")


def assemble(graph: Graph, *, carry: bool = True) -> Program:
    """Assemble the program of a graph.

    Parameters
    ----------
    graph
        The model.
    carry
        Whether the program carries the initial values of what trains, if the graph has them all.

    Returns
    -------
    Program

    Raises
    ------
    ProgramError
        If the engine cannot run the graph, or if a frozen op has no weights.
    """
    check(graph)
    training = [op for op in graph.ops if op.trains != "nothing"]
    carries = carry and bool(training) and all(op.weights is not None for op in training)
    where = plan_memory(graph)
    params_size = sum(params_bytes(op, graph.tensors) for op in training)
    constants_size = sum(constants_bytes(op, graph.tensors) for op in graph.ops)
    if max(where.activations, params_size + constants_size) > MAX_BYTES:
        raise ProgramError(f"the model needs more than {MAX_BYTES} bytes; make it smaller")
    initial_size = params_size if carries else 0
    records = [
        _record(op, graph.tensors, gradients, place)
        for op, gradients, place in zip(graph.ops, where.gradients, _places(graph, initial_size), strict=True)
    ]
    constants = [_constants(op, graph.tensors) for op in graph.ops]
    initial = [_initial(op, graph.tensors) for op in training] if carries else []
    tensors = [
        TENSOR.pack(TYPES.index(t.dtype) + 1, t.zero_point, *t.shape, EXTERNAL if offset is None else offset, t.scale)
        for t, offset in zip(where.tensors, where.offsets, strict=True)
    ]
    body = b"".join([*tensors, *records, *initial, *constants])
    header = _header(graph, where, carries, len(body), params_size, initial_size + constants_size)
    summed = header[UNSUMMED:] + body
    return Program.parse(header[: UNSUMMED - 4] + struct.pack("<I", zlib.crc32(summed)) + summed)


class _Place(NamedTuple):
    """Which layer of a mask an op is, and the offsets of what trains of it and of its constants, in bytes."""

    layer: int
    params: int
    constants: int


def _places(graph: Graph, first_constant: int) -> Iterator[_Place]:
    layer, params, constants = 0, 0, first_constant
    for op in graph.ops:
        trains = op.trains != "nothing"
        yield _Place(layer, params, constants) if trains else _Place(0, 0, constants)
        layer += trains
        params += params_bytes(op, graph.tensors)
        constants += constants_bytes(op, graph.tensors)


def _header(graph: Graph, where: MemoryPlan, carries: bool, body: int, params: int, constants: int) -> bytes:
    """The header, its checksum still 0. body, params, constants: bytes of these."""
    training = [op for op in graph.ops if op.trains != "nothing"]
    int8 = any(op.kind in TRAINED_INT8 for op in training)
    return HEADER.pack(
        *Header(
            magic=b"MOTE",
            version=VERSION,
            header_bytes=HEADER.size,
            program_bytes=HEADER.size + body,
            crc=0,
            tensors=len(where.tensors),
            ops=len(graph.ops),
            loss=0 if graph.loss is None else LOSSES.index(graph.loss) + 1,
            flags=CARRIES * carries | MOMENTUM * (graph.momentum and bool(training)) | INT8 * int8,
            input=0,
            logits=graph.output,
            output=where.output,
            dlogits=NONE if where.dlogits is None else where.dlogits,
            classes=where.tensors[graph.output].size if graph.classes is None else graph.classes,
            huber_delta=graph.huber_delta,
            params_bytes=params,
            activation_bytes=where.activations,
            constants_bytes=constants,
        )
    )


def _floats(op: Op, tensors: Sequence[Tensor]) -> tuple[bytes, bytes]:
    """An op's float32 weights and bias. Raises ProgramError."""
    shape, channels = weights_shape(op, tensors), tensors[op.output].shape[2]
    if op.weights is None:
        raise ProgramError(f"'{op.name}' has no weights; not all of it trains, so it needs them: pass them too")
    bias = np.zeros(channels, np.float32) if op.bias is None else op.bias
    if op.weights.shape != shape or bias.shape != (channels,):
        raise ProgramError(
            f"'{op.name}' has weights of the shape {op.weights.shape} and a bias of {bias.shape}; it needs {shape} and "
            f"{(channels,)}"
        )
    if not (np.isfinite(op.weights).all() and np.isfinite(bias).all()):
        raise ProgramError(f"the weights of '{op.name}' have numbers that are not finite")
    return np.ascontiguousarray(op.weights, "<f4").tobytes(), np.ascontiguousarray(bias, "<f4").tobytes()


def _constants(op: Op, tensors: Sequence[Tensor]) -> bytes:
    """The bytes behind an op's `constants`, a multiple of 4."""
    if op.kind in WEIGHTED:
        weights, bias = (b"", b"") if op.trains == "all" else _floats(op, tensors)
        first = struct.pack("<f", op.epsilon) if op.kind == Kind.LAYERNORM else b""
        return first + weights + (bias if op.trains == "nothing" else b"")
    if op.kind == Kind.LEAKY_RELU:
        return struct.pack("<f", op.slope)
    if op.kind == Kind.SLICE:
        return struct.pack("<6i", *op.begin, *op.steps)
    try:
        return quantized.constants(op, tensors) if op.kind >= Kind.INT8_DENSE else b""
    except ValueError as error:
        raise ProgramError(f"'{op.name}' cannot be computed in int8: {error}") from error


def _initial(op: Op, tensors: Sequence[Tensor]) -> bytes:
    """What trains of an op, as it lies behind `params`."""
    if op.kind in WEIGHTED:
        weights, bias = _floats(op, tensors)
        return (weights if op.trains == "all" else b"") + bias
    assert op.weights is not None
    last = op.kind == Kind.TRAINED_INT8_DEPTHWISE
    data = b""
    if op.trains == "all":
        trained = op.weights[..., : op.trained] if last else op.weights[: op.trained]
        data = np.ascontiguousarray(trained, np.int8).tobytes()
    channels = tensors[op.output].shape[2]
    biases = np.zeros(channels, np.int32) if op.bias is None else op.bias
    return data + bytes(-len(data) % 4) + np.ascontiguousarray(biases[: op.trained], "<i4").tobytes()


def _record(op: Op, tensors: Sequence[Tensor], g: Gradients, place: _Place) -> bytes:
    flags = {"nothing": 0, "bias": BIAS, "all": WEIGHTS | BIAS}[op.trains]
    flags |= ADDS * g.adds | ADDS2 * g.adds2 | FILLS * op.fills | MASKS * (g.mask is not None)
    channels = tensors[op.output].shape[2]
    trained = 0 if op.trains == "nothing" else channels if op.trained is None else op.trained
    inputs = [*op.inputs, NONE][:2]
    around = [NONE if index is None else index for index in (g.dout, g.din, g.din2)]
    pads, option = (op.offsets[:2], op.offsets[2]) if op.kind == Kind.PLACE else (op.pads, g.mask or 0)
    try:
        return OP.pack(
            op.kind, flags, place.layer, 0, *inputs, op.output, *around, *op.kernel, *pads, *op.strides, *op.dilation,
            option, trained, place.params, place.constants,
        )  # fmt: skip
    except struct.error as error:
        raise ProgramError(f"'{op.name}' has a kernel, stride, dilation or padding that is too large") from error
