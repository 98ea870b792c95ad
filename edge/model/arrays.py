"""The arrays of a graph's operations: their names and shapes, in the order of the operations."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.graph import Kind, Op, Shape, Tensor
from tinyfleet.edge.model.memory_plan import TRAINED_INT8, weight_counts
from tinyfleet.edge.model.program_format import MAX_BYTES


def check_shape(shape: Sequence[int], name: str) -> None:
    if not all(isinstance(v, int) and 1 <= v <= 0xFFFF for v in shape) or math.prod(shape) > MAX_BYTES // 4:
        raise ProgramError(
            f"{name} has the shape {tuple(shape)}; every dimension must be a whole number from 1 to 65535"
        )


def named_arrays(ops: Sequence[Op], tensors: Sequence[Tensor]) -> list[tuple[str, Shape, Op]]:
    """(name, shape, op) of every weight and bias, in the order of the ops; the names are `dense_0/weights`, ..."""
    arrays: list[tuple[str, Shape, Op]] = []
    number = 0
    for op in ops:
        weights, biases = weight_counts(op, tensors)
        if not weights:
            continue
        kind = op.kind.name.lower()
        arrays.append((f"{kind}_{number}/weights", weights_shape(op, tensors), op))
        arrays.append((f"{kind}_{number}/bias", (biases,), op))
        number += 1
    return arrays


def weights_shape(op: Op, tensors: Sequence[Tensor]) -> Shape:
    x, channels = tensors[op.inputs[0]], tensors[op.output].shape[2]
    if op.kind == Kind.LAYERNORM:
        return (channels,)
    if op.kind in (Kind.DENSE, Kind.INT8_DENSE, Kind.TRAINED_INT8_DENSE):
        return channels, x.size
    if op.kind in (Kind.CONV2D, Kind.INT8_CONV2D, Kind.TRAINED_INT8_CONV2D):
        return channels, *op.kernel, x.shape[2]
    return *op.kernel, channels


def trained_shapes(op: Op, tensors: Sequence[Tensor]) -> list[Shape]:
    """The shapes of what trains of an op: its weights, its bias."""
    if op.trains == "nothing":
        return []
    shape = weights_shape(op, tensors)
    channels = tensors[op.output].shape[2]
    if op.kind in TRAINED_INT8 and op.trained is not None:
        channels = op.trained
        shape = (*shape[:-1], channels) if op.kind == Kind.TRAINED_INT8_DEPTHWISE else (channels, *shape[1:])
    return [shape, (channels,)] if op.trains == "all" else [(channels,)]
