"""Training int8 models in place: which int8 weights train, selected under a memory budget.

After "On-Device Training Under 256KB Memory" (Lin et al. 2022). The engine does the quantization-aware scaling (see
edge/mote/src/int8/mote_trained_int8.c). This module selects the sparse update: the layers whose biases train, and the
number of output channels whose weights train, too.

Rates: a step is that of gradient descent on the real weights, so rates for the float32 model work, within limits. A
step far below 1 / 2^24 of a weight's scale changes nothing; with steps beyond some tenths of the scale, the rounding
noise is as large as the weights' resolution. For one sample at a time, 0.001 to 0.05 is a good range; begin with half
the rate of the float32 model, and let it fall.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Loss, Op, Tensor
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, TRAINED_INT8, aligned, resource_use, root, weight_counts
from tinyfleet.edge.model.program_format import MAX_LAYERS
from tinyfleet.edge.model.quantized import logistic_table
from tinyfleet.firmware_tools.compiler.transfer import train_from
from tinyfleet.firmware_tools.readers.common import CompileError, compact

#: The shares of a layer's output channels that the selection considers.
FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)

_HEAD_RATE = 0.01  # of a new head, before the other layers' gradients are measured
_TRAINED = dict(zip(INT8_WEIGHTED, TRAINED_INT8, strict=True))
_POOLS = (Kind.INT8_AVGPOOL, Kind.INT8_MAXPOOL, Kind.INT8_MEAN)
_OPAQUE = (Kind.SLICE, Kind.QUANTIZE, Kind.INT8_MUL, Kind.INT8_SOFTMAX, Kind.INT8_TABLE)
# The last operations of a model that a loss computes itself.
_ENDS: dict[Loss, tuple[Kind, ...]] = {
    "softmax_cross_entropy": (Kind.DEQUANTIZE, Kind.QUANTIZE, Kind.SOFTMAX, Kind.INT8_SOFTMAX),
    "binary_cross_entropy": (Kind.DEQUANTIZE, Kind.QUANTIZE, Kind.SIGMOID),
    "mse": (Kind.DEQUANTIZE,),
    "huber": (Kind.DEQUANTIZE,),
}


@dataclass(frozen=True)
class LayerUpdate:
    """What of a layer trains.

    Parameters
    ----------
    trains
        Only the biases, or weights and biases ("all").
    channels
        Of how many output channels, the first ones.
    """

    trains: Literal["bias", "all"]
    channels: int


#: What trains, by the names of the graph's layers.
Selection = Mapping[str, LayerUpdate]


@dataclass(frozen=True)
class Importance:
    """What training a layer contributes, by output channel, in any additive unit.

    Parameters
    ----------
    bias, weights
        Of each channel's bias and weights, shape (channels,).
    """

    bias: NDArray[np.float64]
    weights: NDArray[np.float64]

    def of(self, update: LayerUpdate) -> float:
        """The importance of an update: the sum over what it trains."""
        parts = (self.bias, self.weights) if update.trains == "all" else (self.bias,)
        return float(sum(part[: update.channels].sum() for part in parts))


def train_int8(
    graph: Graph, selection: Selection | str, *, classes: int | None = None, loss: Loss = "softmax_cross_entropy"
) -> Graph:
    """Turn a model that runs in int8 into one that trains in int8.

    What the loss computes itself (softmax, or a logistic function with binary cross-entropy) is removed from the
    model's end, and the outputs become float32.

    Parameters
    ----------
    graph
        An int8 model.
    selection
        What trains; or the name of a layer, from which on everything does.
    classes
        A new last layer in int8 with so many outputs. Its weights begin at 0; their scale is the largest one of the old
        layer, so that they can grow as large. The outputs keep their scale, with zero point 0: a softmax depends only
        on differences, whose range stays the same.
    loss
        The loss to train with.

    Returns
    -------
    Graph

    Raises
    ------
    CompileError
        If a layer does not exist, is not int8, or no gradient reaches it.
    """
    graph = _with_loss(graph, classes, loss)
    if isinstance(selection, str):
        selection = select_all_from(graph, selection)
    return _trained(graph, selection)


def select_all_from(graph: Graph, layer: str, *, bias_only: bool = False) -> Selection:
    """Select the int8 layers from one to the end, or only their biases. Raises CompileError without such a layer."""
    names = [op.name for op in graph.ops if op.kind in INT8_WEIGHTED]
    if layer not in names:
        raise _unknown(layer, names)
    after = names[names.index(layer) :]
    return {
        op.name: LayerUpdate("bias" if bias_only else "all", _channels(graph, op))
        for op in graph.ops
        if op.name in after and _has_weights(op)
    }


def default_loss(graph: Graph, *, classes: int | None = None) -> Loss:
    """The loss that fits a model's end: softmax or logistic function. Without these, softmax cross-entropy if there are
    new classes, otherwise the squared error."""
    at = root(graph.tensors, graph.output)
    while (end := _writer(graph.ops, at)) is not None:
        if end.kind not in (Kind.QUANTIZE, Kind.DEQUANTIZE):
            ends: list[Loss] = ["softmax_cross_entropy", "binary_cross_entropy"]
            found = next((loss for loss in ends if _is_end(end, list(graph.tensors), loss)), None)
            if found is not None:
                return found
            break
        at = root(graph.tensors, end.inputs[0])
    return "mse" if classes is None else "softmax_cross_entropy"


def _unknown(layer: str, names: Iterable[str]) -> CompileError:
    return CompileError(f"there is no int8 layer '{layer}'; there are {', '.join(names)}")


def _has_weights(op: Op) -> bool:
    return op.kind in INT8_WEIGHTED


def _channels(graph: Graph, op: Op) -> int:
    return graph.tensors[op.output].shape[2]


def _trained(graph: Graph, selection: Selection) -> Graph:
    """The graph with the kinds of op that train, or pass gradients to what trains. The graph has its loss."""
    known = [op.name for op in graph.ops if _has_weights(op)]
    for name in selection:
        if name not in known:
            raise _unknown(name, known)
    learned: set[int] = set()  # tensors that depend on what trains
    ops = []
    for op in graph.ops:
        passes = any(root(graph.tensors, i) in learned for i in op.inputs)
        update = selection.get(op.name) if _has_weights(op) else None
        if passes:
            _check_gradient_passes(op)
        if passes or update is not None:
            learned.add(root(graph.tensors, op.output))
            op = _in_training(op, update, _channels(graph, op))
        ops.append(op)
    if root(graph.tensors, graph.output) not in learned:
        raise CompileError("nothing trains that the model's output depends on")
    return replace(graph, ops=tuple(ops))


def _check_gradient_passes(op: Op) -> None:
    if op.kind in _OPAQUE or (op.kind in _POOLS and (op.low, op.high) != (-128, 127)):
        kind = f"{op.kind.name}{' with an activation' if op.kind in _POOLS else ''}"
        raise CompileError(
            f"layer '{op.name}' ({kind}) passes no gradient on to the layers before it; train from a later one"
        )


def _in_training(op: Op, update: LayerUpdate | None, channels: int) -> Op:
    """The op as it takes part in training: what `update` says of it trains, and nothing with None."""
    if update is not None:
        if not 1 <= update.channels <= channels:
            raise CompileError(f"layer '{op.name}' has {channels} channels; {update.channels} cannot train")
        op = replace(op, trains=update.trains, trained=update.channels)
    if op.kind not in INT8_WEIGHTED:
        return op
    return replace(op, kind=_TRAINED[op.kind], bias=np.zeros(channels, np.int32) if op.bias is None else op.bias)


def _with_loss(graph: Graph, classes: int | None, loss: Loss) -> Graph:
    """The graph with the loss, and with float32 outputs; nothing of it trains yet."""
    tensors, ops = list(graph.tensors), list(graph.ops)
    at = root(tensors, graph.output)
    while (end := _writer(ops, at)) is not None and _is_end(end, tensors, loss):
        ops.remove(end)
        at = root(tensors, end.inputs[0])
    if tensors[at].dtype != "int8":
        raise CompileError("the model does not end in int8, and only int8 layers can train in int8")
    if classes is not None:
        head = _writer(ops, at)
        if head is None or head.kind not in (Kind.INT8_DENSE, Kind.INT8_CONV2D) or tensors[at].shape[:2] != (1, 1):
            raise CompileError("the model does not end in an int8 dense layer that could get other classes")
        tensors[at] = replace(tensors[at], shape=(1, 1, classes), zero_point=0)
        ops[ops.index(head)] = _new_head(head, classes)
    tensors.append(Tensor((1, 1, tensors[at].size)))
    ops.append(Op(Kind.DEQUANTIZE, "logits", (at,), len(tensors) - 1))
    return compact(replace(graph, tensors=tuple(tensors), ops=tuple(ops), output=len(tensors) - 1, loss=loss))


def _writer(ops: Iterable[Op], tensor: int) -> Op | None:
    """The op that writes a tensor; None if several do, or none."""
    writers = [op for op in ops if op.output == tensor]
    return writers[0] if len(writers) == 1 else None


def _is_end(op: Op, tensors: list[Tensor], loss: Loss) -> bool:
    if op.kind == Kind.INT8_TABLE and loss == "binary_cross_entropy":
        return op.table == logistic_table(tensors[op.inputs[0]], tensors[op.output])
    return op.kind in _ENDS[loss]


def _new_head(head: Op, classes: int) -> Op:
    assert head.weights is not None and head.weight_scales is not None
    return replace(
        head,
        weights=np.zeros((classes, *head.weights.shape[1:]), np.int8),
        bias=np.zeros(classes, np.int32),
        weight_scales=np.full(classes, head.weight_scales.max()),
        low=-128,
        high=127,
    )


# The selection under a budget


def select_update(
    graph: Graph,
    budget_bytes: int,
    importance: Mapping[str, Importance] | None = None,
    *,
    classes: int | None = None,
    loss: Loss = "softmax_cross_entropy",
) -> Selection:
    """Select what to train of an int8 model within a RAM budget.

    For every first layer that trains, the search starts with the biases of all layers from it on and adds channels of
    weights, the most important for their bytes first, with several limits on the bytes of one layer. The best of these
    selections that fits is returned: not always the best of all, but never worse with more memory, and the same at
    every call. Its arena is planned to the byte.

    Parameters
    ----------
    graph
        An int8 model.
    budget_bytes
        The largest arena.
    importance
        Of layers, by name, as `measure_importance` returns it. None: `estimate_importance`.
    classes, loss
        As in `train_int8`.

    Returns
    -------
    Selection

    Raises
    ------
    CompileError
        If not even the smallest selection fits; the message has the bytes that it needs.
    """
    graph = _with_loss(graph, classes, loss)
    worth = estimate_importance(graph) if importance is None else importance
    return _Search(graph, worth, new_head=classes is not None).best(budget_bytes)


def _reachable(graph: Graph) -> list[Op]:
    """The layers that a gradient reaches, in order; only the last ones if a program cannot train so many."""
    found = []
    for op in filter(_has_weights, graph.ops):
        try:
            _trained(graph, {op.name: LayerUpdate("bias", 1)})
        except CompileError:
            continue
        found.append(op)
    if not found:
        raise CompileError("no int8 layer of this model can train: no gradient gets to one")
    return found[-MAX_LAYERS:]


def estimate_importance(graph: Graph) -> dict[str, Importance]:
    """Estimate the importance of layers from the graph alone.

    Lin et al. measured: later layers contribute more than earlier ones, pointwise convolutions more than depthwise
    ones, biases alone little, and each further channel less. Here the weights of a layer at depth d (1 at the end)
    count d^2, or half of that if it is depthwise; a share f of its channels gets sqrt(f) of it. The biases count
    d^2 / 10.

    Parameters
    ----------
    graph
        An int8 model.

    Returns
    -------
    dict of str to Importance
        By the layers' names.
    """
    layers = [op for op in graph.ops if _has_weights(op)]
    found = {}
    for i, op in enumerate(layers):
        channels = _channels(graph, op)
        total = ((i + 1) / len(layers)) ** 2 * (0.5 if op.kind == Kind.INT8_DEPTHWISE else 1.0)
        so_far = np.sqrt(np.arange(channels + 1) / channels)
        found[op.name] = Importance(np.full(channels, 0.1 * total / channels), total * np.diff(so_far))
    return found


#: For each layer from the first one that trains: of how many channels the weights train; 0: only the biases.
_Levels = tuple[int, ...]


def measure_importance(
    graph: Graph,
    samples: Iterable[ArrayLike],
    targets: Iterable[ArrayLike],
    *,
    classes: int | None = None,
    loss: Loss = "softmax_cross_entropy",
) -> dict[str, Importance]:
    """Measure the importance of layers on samples: the sum of the squared gradients of each channel.

    To first order this is how much a small step on these parameters lowers the loss. The gradients are those of the
    dequantized model. A new head learns alone first: while its weights are 0, no gradient passes it.

    Parameters
    ----------
    graph
        An int8 model.
    samples, targets
        Some 100 samples of what is to be learned.
    classes, loss
        As in `train_int8`.

    Returns
    -------
    dict of str to Importance
        By the layers' names.

    Raises
    ------
    CompileError
        If a layer has no float32 form.
    """
    layers = _reachable(_with_loss(graph, classes, loss))
    in_float = train_from(graph, layers[0].name, classes=classes, loss=loss, float_input=False)
    learner = MoteLearner(assemble(in_float))
    pairs = list(zip(samples, targets, strict=True))
    if classes is not None:
        everything = learner.mask
        learner.mask = 1 << everything.bit_length() - 1
        for x, y in pairs:
            learner.learn(x, y, _HEAD_RATE)
        learner.mask = everything
    before = learner.parameters
    total = np.zeros(before.size)
    for x, y in pairs:
        learner.set_parameters(before)
        learner.learn(x, y, 1.0)
        total += (before - learner.parameters).astype(np.float64) ** 2
    found, at = {}, 0
    for op in in_float.ops:
        if op.trains == "nothing":
            continue
        assert op.weights is not None and op.bias is not None
        squares = total[at : at + op.weights.size].reshape(op.weights.shape)
        at += op.weights.size
        channels = len(op.bias)
        others = (0, 1) if op.kind == Kind.DEPTHWISE else tuple(range(1, squares.ndim))
        found[op.name] = Importance(total[at : at + channels], squares.sum(others))
        at += channels
    return found


class _Search:
    """The candidates for a selection and their bytes. new_head: the last layer's weights are 0, and always train."""

    def __init__(self, graph: Graph, worth: Mapping[str, Importance], *, new_head: bool) -> None:
        self.graph, self.new_head = graph, new_head
        self.layers = _reachable(graph)
        self.channels = [_channels(graph, op) for op in self.layers]
        self.weights = [
            weight_counts(op, graph.tensors)[0] // n for op, n in zip(self.layers, self.channels, strict=True)
        ]
        # Some of the outputs' weights alone are not worth considering.
        self.levels = [[0, *sorted({math.ceil(f * n) for f in FRACTIONS})] for n in self.channels[:-1]]
        self.levels.append([0, self.channels[-1]])
        self.worth = [
            {n: worth[op.name].of(self.update(i, n)) for n in self.levels[i]} for i, op in enumerate(self.layers)
        ]
        self.activations: dict[tuple[bool, ...], int] = {}

    def best(self, budget: int) -> Selection:
        """The most important selection that fits."""
        candidates = set(self.candidates())
        for levels in sorted(candidates, key=lambda levels: (-self.value(levels), self.params(levels), levels)):
            if self.params(levels) < budget and self.arena(levels) <= budget:
                return self.selection(levels)
        least = self.arena(min(candidates, key=self.params))
        raise CompileError(f"a budget of {budget} B is too small: to train the least of this model takes {least} B")

    def candidates(self) -> Iterator[_Levels]:
        largest = max(self.cost(i, 0, n) for i, n in enumerate(self.channels))
        for lowest in range(len(self.layers)):
            for shift in range(0, 10, 2):
                yield from self.path(lowest, largest >> shift)

    def path(self, lowest: int, limit: int) -> Iterator[_Levels]:
        """Candidates, each with more channels than the one before, the most important for their bytes first; no layer's
        weights take more bytes than the limit."""
        levels = [0] * (len(self.layers) - lowest)
        if self.new_head:
            levels[-1] = self.channels[-1]
        yield tuple(levels)
        while True:
            best, layer, level = 0.0, 0, 0
            for i, before in enumerate(levels, lowest):
                for n in self.levels[i]:
                    if n > before and self.cost(i, 0, n) <= limit:
                        rate = (self.worth[i][n] - self.worth[i][before]) / self.cost(i, before, n)
                        if rate > best:
                            best, layer, level = rate, i, n
            if best == 0.0:
                return
            levels[layer - lowest] = level
            yield tuple(levels)

    def cost(self, i: int, before: int, after: int) -> int:
        """About how many more bytes of RAM: parameters, and the input if the backward pass now needs it."""
        kept = self.graph.tensors[self.layers[i].inputs[0]].bytes if before == 0 else 0
        return (self.weights[i] + 4) * (after - before) + kept

    def lowest(self, levels: _Levels) -> int:
        return len(self.layers) - len(levels)

    def value(self, levels: _Levels) -> float:
        return sum(self.worth[i][n] for i, n in enumerate(levels, self.lowest(levels)))

    def params(self, levels: _Levels) -> int:
        """Bytes of what trains."""
        numbered = enumerate(levels, self.lowest(levels))
        return sum(aligned(self.weights[i] * n) + 4 * n if n else 4 * self.channels[i] for i, n in numbered)

    def arena(self, levels: _Levels) -> int:
        """The arena in bytes, exactly. The number of a layer's channels makes no difference to the activations."""
        weights = tuple(n > 0 for n in levels)
        if weights not in self.activations:
            self.activations[weights] = resource_use(_trained(self.graph, self.selection(levels))).activations
        return self.activations[weights] + self.params(levels)

    def selection(self, levels: _Levels) -> Selection:
        return {self.layers[i].name: self.update(i, n) for i, n in enumerate(levels, self.lowest(levels))}

    def update(self, i: int, level: int) -> LayerUpdate:
        return LayerUpdate("all", level) if level else LayerUpdate("bias", self.channels[i])
