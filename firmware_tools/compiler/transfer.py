"""A trainable float32 head on a frozen backbone: a model cut at a layer, after TinyOL (Ren et al. 2021).

The layers before the cut stay as they are, int8 or float32, in flash. The layers behind it become float32 and train;
each int8 tensor that they read is dequantized once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.graph import Graph, Kind, Loss, Op, Tensor, Trains
from tinyfleet.edge.model.memory_plan import WEIGHTED, root
from tinyfleet.edge.model.quantized import leaky_relu_table, logistic_table, relu_table, requantize_table, tanh_table
from tinyfleet.firmware_tools.readers.common import CompileError, compact

_FLOAT = {
    Kind.INT8_DENSE: Kind.DENSE,
    Kind.INT8_CONV2D: Kind.CONV2D,
    Kind.INT8_DEPTHWISE: Kind.DEPTHWISE,
    Kind.INT8_AVGPOOL: Kind.AVGPOOL,
    Kind.INT8_MAXPOOL: Kind.MAXPOOL,
    Kind.INT8_ADD: Kind.ADD,
    Kind.INT8_MEAN: Kind.AVGPOOL,
    Kind.INT8_SOFTMAX: Kind.SOFTMAX,
}
# The last operation of a model that a loss on logits computes itself.
_LAST: dict[Kind, Loss] = {Kind.SOFTMAX: "softmax_cross_entropy", Kind.SIGMOID: "binary_cross_entropy"}


def train_from(
    graph: Graph,
    layer: str | None,
    *,
    classes: int | None = None,
    max_classes: int | None = None,
    loss: Loss | None = None,
    momentum: bool = False,
    bias_only: bool = False,
    float_input: bool = True,
    fixed: Collection[str] = (),
) -> Graph:
    """Let the layers from one to the end train in float32, and freeze those before it.

    A softmax or logistic function at the model's end is removed if the loss computes it.

    Parameters
    ----------
    graph
        The model.
    layer
        The name of the first layer that trains; None: what trains in the graph.
    classes
        A new last layer with this many outputs at first, its weights 0. None keeps the old one.
    max_classes
        Memory for so many classes, which a device adds one by one. With `classes` or this, the last layer's weights
        train also with `bias_only`.
    loss
        For a graph that has none. None: by the model's end, softmax or logistic function; without these, softmax
        cross-entropy if the classes are new, otherwise the squared error.
    momentum
        Whether to reserve memory for the optimizer's momentum.
    bias_only
        Whether only the biases train.
    float_input
        Whether a model with int8 input takes float32 instead, and quantizes it.
    fixed
        Layers whose weights never train.

    Returns
    -------
    Graph

    Raises
    ------
    CompileError
        If there is no such layer, or a layer from there on has no float32 form, or none has weights.
    """
    cut = len(graph.ops) if layer is None else _find(graph, layer)
    if layer is not None and all(op.bias is None or op.name in fixed for op in graph.ops[cut:]):
        weighted = dict.fromkeys(op.name for op in graph.ops if op.bias is not None and op.name not in fixed)
        raise CompileError(f"nothing from '{layer}' on has weights; layers that have: {', '.join(weighted)}")
    before = [op if layer is None else replace(op, trains="nothing") for op in graph.ops[:cut]]
    head = _Head(graph, list(graph.tensors), before)
    for op in graph.ops[cut:]:
        head.add(op, "nothing" if op.name in fixed else "bias" if bias_only else "all")
    output = head.value(graph.output)
    result = replace(
        graph, tensors=tuple(head.tensors), ops=tuple(head.ops), output=output, classes=None, momentum=momentum
    )
    grows = classes is not None or max_classes is not None
    if graph.loss is None and (layer is not None or grows):
        result = _with_loss(result, loss, grows)
    if grows:
        result = _with_classes(result, classes, max_classes)
    return compact(with_float_input(result) if float_input else result)


def with_float_input(graph: Graph) -> Graph:
    """The model with float32 input, which it quantizes; unchanged if its input is float32."""
    x = graph.tensors[0]
    if x.dtype == "float32":
        return graph
    quantise = Op(Kind.QUANTIZE, "input", (0,), 1)
    ops = tuple(
        replace(op, inputs=tuple(i + 1 for i in op.inputs), output=op.output + 1) for op in graph.ops
    )  # one place further back, behind the new input
    tensors = tuple(t if t.view_of is None else replace(t, view_of=t.view_of + 1) for t in graph.tensors)
    return replace(graph, tensors=(Tensor(x.shape), *tensors), ops=(quantise, *ops), output=graph.output + 1)


def _find(graph: Graph, layer: str) -> int:
    """The first op of a layer."""
    names = [op.name for op in graph.ops]
    if layer not in names:
        raise CompileError(f"no layer is named '{layer}'; the model has: {', '.join(dict.fromkeys(names))}")
    return names.index(layer)


@dataclass
class _Head:
    """Collects the float32 ops behind a cut. `values` maps the model's tensors to float32 tensors."""

    graph: Graph
    tensors: list[Tensor]
    ops: list[Op]
    values: dict[int, int] = field(default_factory=dict)

    def new(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def value(self, index: int) -> int:
        """The float32 tensor for one of the model's: the same one, or dequantized (once)."""
        if index in self.values:
            return self.values[index]
        tensor, source = self.graph.tensors[index], root(self.graph.tensors, index)
        if source != index:
            at = self.value(source)
            at = root(self.tensors, at)
            same = self.tensors[at].shape == tensor.shape
            found = at if same else self.new(Tensor(tensor.shape, view_of=at))
        elif tensor.dtype == "float32":
            found = index
        else:
            found = self.new(Tensor(tensor.shape))
            self.ops.append(Op(Kind.DEQUANTIZE, "dequantize", (index,), found))
        self.values[index] = found
        return found

    def output(self, op: Op) -> int:
        """The float32 tensor that an op writes."""
        if op.output not in self.values:
            tensor = self.graph.tensors[op.output]
            self.values[op.output] = op.output if tensor.dtype == "float32" else self.new(Tensor(tensor.shape))
        return self.values[op.output]

    def add(self, op: Op, trains: Trains) -> None:
        """Add an op in float32, which trains as given."""
        x, y = self.graph.tensors[op.inputs[0]], self.graph.tensors[op.output]
        inputs = tuple(self.value(i) for i in op.inputs)
        kind = _FLOAT.get(op.kind, op.kind)
        if op.kind == Kind.INT8_TABLE:
            kind = _function(op, x, y)
        if op.kind in (Kind.QUANTIZE, Kind.DEQUANTIZE) or (op.kind, kind) == (Kind.INT8_TABLE, Kind.QUANTIZE):
            self.values[op.output] = inputs[0]  # the same numbers
            return
        if kind.name.startswith(("INT8", "TRAINED")):
            raise CompileError(f"layer '{op.name}' ({op.kind.name.lower()}) has no float32 form; cut behind it")
        if op.kind == Kind.INT8_SOFTMAX and op.beta != 1.0:
            raise CompileError(f"layer '{op.name}' is a softmax with beta {op.beta}; in float32 it must be 1")
        changed = replace(op, kind=kind, inputs=inputs, table=b"", low=-128, high=127, weight_scales=None)
        if op.kind == Kind.INT8_MEAN:
            changed = replace(changed, kernel=x.shape[:2], strides=(1, 1), dilation=(1, 1))
        if kind in WEIGHTED:
            changed = _dequantised(changed, op, x)
            changed = replace(changed, trains=trains, trained=None)
        clamp = _clamp(op, y) if op.kind in _CLAMPED else None
        if clamp is None:
            self.ops.append(replace(changed, output=self.output(op)))
            return
        between = self.new(Tensor(y.shape))
        self.ops.append(replace(changed, output=between))
        self.ops.append(Op(clamp, op.name, (between,), self.output(op)))


_CLAMPED = set(_FLOAT) - {Kind.INT8_SOFTMAX}


def _dequantised(changed: Op, op: Op, x: Tensor) -> Op:
    """With float32 weights and bias."""
    if op.weight_scales is None:
        return changed
    assert op.weights is not None and op.bias is not None
    channels_last = op.kind == Kind.INT8_DEPTHWISE
    rows = op.weights if channels_last else np.moveaxis(op.weights, 0, -1)
    weights = (rows * op.weight_scales).astype(np.float32)
    bias: NDArray[np.float32] = (op.bias * (op.weight_scales * x.scale)).astype(np.float32)
    return replace(
        changed, weights=np.ascontiguousarray(weights if channels_last else np.moveaxis(weights, -1, 0)), bias=bias
    )


def _clamp(op: Op, y: Tensor) -> Kind | None:
    """The activation that an int8 op's clamp is; None if it is just the end of the int8 range."""
    rests_on_zero = op.low == y.zero_point
    ends_at_six = abs(y.scale * (op.high - y.zero_point) - 6.0) <= y.scale / 2
    if rests_on_zero and ends_at_six:
        return Kind.RELU6
    if op.high == 127 and (rests_on_zero or op.low == -128):
        return Kind.RELU if rests_on_zero else None
    low, high = (y.scale * (end - y.zero_point) for end in (op.low, op.high))
    raise CompileError(
        f"layer '{op.name}' is clamped to {low:.3g} ... {high:.3g}, which has no float32 form; cut behind it"
    )


def _function(op: Op, x: Tensor, y: Tensor) -> Kind:
    """What a table computes; QUANTIZE for the same number at another scale."""
    if op.table == logistic_table(x, y):
        return Kind.SIGMOID
    if op.table == tanh_table(x, y):
        return Kind.TANH
    if op.table == requantize_table(x, y):
        return Kind.QUANTIZE
    if op.table == relu_table(x, y, 0.0, 6.0) != relu_table(x, y):
        return Kind.RELU6
    if op.table == relu_table(x, y):
        return Kind.RELU
    if op.table == leaky_relu_table(x, y, op.slope):
        return Kind.LEAKY_RELU
    raise CompileError(f"layer '{op.name}' is a table of an unknown function; cut behind it")


def _with_loss(graph: Graph, loss: Loss | None, grows: bool) -> Graph:
    """The graph with a loss, and without the softmax or logistic function at its end that the loss computes."""
    last = graph.ops[-1]
    at_end = _LAST.get(last.kind) if last.output == root(graph.tensors, graph.output) else None
    if loss is None:
        loss = at_end or ("softmax_cross_entropy" if grows else "mse")
    if loss not in _LAST.values():
        return replace(graph, loss=loss)
    if at_end not in (None, loss):
        raise CompileError(f"the model ends in {last.kind.name.lower()}, which does not go with the loss {loss}")
    ops, output = list(graph.ops), graph.output
    if at_end is not None:
        output = ops.pop().inputs[0]
    if ops[-1].kind in (Kind.RELU, Kind.RELU6) and ops[-1].output == root(graph.tensors, output):
        output = ops.pop().inputs[0]  # where the int8 range ends at 0; logits have no activation
    return replace(graph, ops=tuple(ops), output=output, loss=loss)


def _with_classes(graph: Graph, classes: int | None, max_classes: int | None) -> Graph:
    """The graph with another number of outputs: so many at first, room for so many."""
    tensors = list(graph.tensors)
    output = root(tensors, graph.output)
    *before, last = graph.ops
    source = tensors[last.inputs[0]]
    whole = last.kind == Kind.CONV2D and tensors[output].shape[:2] == (1, 1) and last.kernel == source.shape[:2]
    if last.output != output or not (last.kind == Kind.DENSE or whole) or any(last.pads):
        raise CompileError(
            f"the model ends in '{last.name}' ({last.kind.name.lower()}); classes need a dense layer there"
        )
    assert last.weights is not None and last.bias is not None
    old = tensors[output].shape[2]
    count = old if classes is None else classes
    room = count if max_classes is None else max_classes
    if not 1 <= count <= room:
        raise CompileError(f"{count} classes at first and at most {room} do not fit together; both are at least 1")
    kept = old if classes is None else 0
    weights = np.zeros((room, last.weights[0].size), np.float32)
    bias = np.zeros(room, np.float32)
    weights[:kept], bias[:kept] = last.weights.reshape(old, -1)[:kept], last.bias[:kept]
    tensors[output] = Tensor((1, 1, room))
    flat = last.inputs[0]
    if source.shape != (1, 1, source.size):
        tensors.append(Tensor((1, 1, source.size), view_of=root(tensors, flat)))
        flat = len(tensors) - 1
    dense = Op(Kind.DENSE, last.name, (flat,), output, weights=weights, bias=bias, trains="all")
    return replace(
        graph,
        tensors=tuple(tensors),
        ops=(*before, dense),
        output=output,
        classes=count if count < room else None,
    )
