"""What the readers of both formats share: their errors, TensorFlow's window arithmetic, and simplifying a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.files import read_file
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor

MAX_SIDE = 0xFFFF
"""The longest axis of a tensor that the engine has."""
MAX_OPERATIONS = 1_000
"""Of a model that is planned, whose time grows with their square; a network for a Raspberry Pi has 100 to 300."""
MAX_FILE_BYTES = 1 << 30
"""Of the largest model file that is read; no device that this is for has so much memory."""


class CompileError(UserError):
    """A model that cannot become a program. Names the layer or operator, and what is supported or wrong."""


class ReadError(CompileError):
    """A file that is damaged, or not of its format: it can be neither described nor compiled."""


def read_model_bytes(path: Path) -> bytes:
    """A model file's content. Raises ReadError."""
    try:
        return read_file(path, MAX_FILE_BYTES, "give the path of a model's file")
    except UserError as error:
        raise ReadError(str(error)) from None


def windows(size: int, kernel: int, stride: int, dilation: int, padding: str) -> tuple[int, int]:
    """How many windows fit in one dimension (0 or less: none), and the padding before it, by TensorFlow's rule.

    padding: "valid", "same" (the odd element goes behind), or "causal" (all goes before).
    """
    reach = (kernel - 1) * dilation + 1
    if padding == "valid":
        return (size - reach) // stride + 1, 0
    count = -(-size // stride)
    if padding == "causal":
        return count, reach - 1
    return count, max((count - 1) * stride + reach - size, 0) // 2


def simplify(graph: Graph) -> Graph:
    """The same numbers, to rounding, with less memory and work: padding with zeros becomes a convolution's own, max
    pooling goes before a ReLU, and tensors that nothing reads or writes are gone."""
    tensors = list(graph.tensors)
    read = Counter(i for op in graph.ops for i in op.inputs)
    read.update(t.view_of for t in tensors if t.view_of is not None)
    read[graph.output] += 1
    ops: dict[int, Op] = {}  # by output; the parts of a concatenation by themselves, below 0
    for number, op in enumerate(graph.ops):
        before = ops.get(op.inputs[0])
        if before is not None and read[before.output] == 1:
            if before.kind == Kind.PLACE and op.kind in _CONVOLUTIONS and _pads(before, op, tensors):
                del ops[before.output]
                pads = (op.pads[0] + before.offsets[0], op.pads[1] + before.offsets[1])
                op = replace(op, inputs=before.inputs, pads=pads)
            elif before.kind in (Kind.RELU, Kind.RELU6) and op.kind == Kind.MAXPOOL:
                tensors[before.output] = tensors[op.output]
                ops[before.output] = replace(op, inputs=before.inputs, output=before.output)
                op = replace(before, inputs=(before.output,), output=op.output)
        ops[op.output if op.kind != Kind.PLACE or op.fills else -1 - number] = op
    return compact(replace(graph, tensors=tuple(tensors), ops=tuple(ops.values())))


_CONVOLUTIONS = (Kind.CONV2D, Kind.DEPTHWISE, Kind.INT8_CONV2D, Kind.INT8_DEPTHWISE)


def _pads(place: Op, op: Op, tensors: Sequence[Tensor]) -> bool:
    """Whether a PLACE only adds rows and columns, such that every window of the convolution behind it still covers an
    element of what it was given."""
    source, padded, result = (tensors[i] for i in (place.inputs[0], place.output, op.output))
    if source.shape[2] != padded.shape[2]:
        return False
    for n, o, k, s, d, p, q in zip(
        source.shape, result.shape, op.kernel, op.strides, op.dilation, op.pads, place.offsets, strict=False
    ):  # fmt: skip
        if not all(any(0 <= i * s - p - q + j * d < n for j in range(k)) for i in range(o)):
            return False
    return True


def compact(graph: Graph) -> Graph:
    """The graph without tensors that nothing reads or writes."""
    used = {0, graph.output} | {i for op in graph.ops for i in (*op.inputs, op.output)}
    used |= {v for i in used if (v := graph.tensors[i].view_of) is not None}
    number = {old: new for new, old in enumerate(sorted(used))}
    return replace(
        graph,
        tensors=tuple(
            t if t.view_of is None else replace(t, view_of=number[t.view_of])
            for i, t in enumerate(graph.tensors)
            if i in used
        ),
        ops=tuple(
            replace(op, inputs=tuple(number[i] for i in op.inputs), output=number[op.output]) for op in graph.ops
        ),
        output=number[graph.output],
    )
