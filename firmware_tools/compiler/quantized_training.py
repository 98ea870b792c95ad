"""Training of int8 models as they are: int8 weights that learn in place, and the choice of those under a memory budget.

After "On-Device Training Under 256KB Memory" (Lin et al. 2022): quantisation-aware scaling, which is the engine's (see
edge/mote/src/int8/mote_trained_int8.c), and the sparse update, which is chosen here: of which layers the biases learn,
and of how many output channels the weights do too.

Rates: a step is that of gradient descent on the real weights, so what suits the float32 model suits this one, within
limits. With a weight's step far below 1 / 2^24 of its scale nothing happens; with steps beyond some tenths of it the
rounding is noise as large as the weights' own resolution. 0.001 to 0.05 for one sample at a time is a good range; begin
with half of what trains the float32 model, and let it fall.
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

#: How much of a layer's output channels the choice considers.
FRACTIONS = (1 / 8, 1 / 4, 1 / 2, 1.0)

_HEAD_RATE = 0.01  # of a new head, as the others' gradients are about to be measured
_TRAINED = dict(zip(INT8_WEIGHTED, TRAINED_INT8, strict=True))
_POOLS = (Kind.INT8_AVGPOOL, Kind.INT8_MAXPOOL, Kind.INT8_MEAN)
_OPAQUE = (Kind.SLICE, Kind.QUANTIZE, Kind.INT8_MUL, Kind.INT8_SOFTMAX, Kind.INT8_TABLE)
# What a loss does by itself, so that a model's end of it goes.
_ENDS: dict[Loss, tuple[Kind, ...]] = {
    "softmax_cross_entropy": (Kind.DEQUANTIZE, Kind.QUANTIZE, Kind.SOFTMAX, Kind.INT8_SOFTMAX),
    "binary_cross_entropy": (Kind.DEQUANTIZE, Kind.QUANTIZE, Kind.SIGMOID),
    "mse": (Kind.DEQUANTIZE,),
    "huber": (Kind.DEQUANTIZE,),
}


@dataclass(frozen=True)
class LayerUpdate:
    """What of a layer trains: of its first `channels` output channels the bias, or "all", weights and bias."""

    trains: Literal["bias", "all"]
    channels: int


#: What trains, by the names of the graph's layers.
Selection = Mapping[str, LayerUpdate]


@dataclass(frozen=True)
class Importance:
    """What training a layer is worth, by output channel, of any unit that can be added: [channels] each."""

    bias: NDArray[np.float64]
    weights: NDArray[np.float64]

    def of(self, update: LayerUpdate) -> float:
        """What an update is worth."""
        parts = (self.bias, self.weights) if update.trains == "all" else (self.bias,)
        return float(sum(part[: update.channels].sum() for part in parts))


def train_int8(
    graph: Graph, selection: Selection | str, *, classes: int | None = None, loss: Loss = "softmax_cross_entropy"
) -> Graph:
    """A model that runs in int8 as one that trains in int8.

    selection: what trains; a layer's name: all from it on. The loss's part of the model's end (softmax, or a logistic
    function under binary cross-entropy) goes, and the outputs are dequantised: the new model's are float32.

    classes: a new last layer for so many, in int8, in place of the old one. Its weights begin at 0. Their scale is the
    largest of the old layer's, so that they can become as large as the old ones; the outputs' scale is the old one with
    the zero point 0: a softmax cares for differences, and those have the old range then.

    Raises CompileError if a layer is not there, is not int8, or no gradient gets to it.
    """
    graph = _with_loss(graph, classes, loss)
    if isinstance(selection, str):
        selection = select_all_from(graph, selection)
    return _trained(graph, selection)


def select_all_from(graph: Graph, layer: str, *, bias_only: bool = False) -> Selection:
    """The selection of all of the int8 layers from one on, or of their biases, in the order of execution."""
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
    """The loss that goes with a model's end: softmax or logistic function; without these, the squared error, or softmax
    cross-entropy if there are new classes."""
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
    """The graph of a loss with the kinds of op that pass gradients down to what trains."""
    known = [op.name for op in graph.ops if _has_weights(op)]
    for name in selection:
        if name not in known:
            raise _unknown(name, known)
    moves: set[int] = set()  # tensors that depend on what trains
    ops = []
    for op in graph.ops:
        passes = any(root(graph.tensors, i) in moves for i in op.inputs)
        update = selection.get(op.name) if _has_weights(op) else None
        if passes and (op.kind in _OPAQUE or (op.kind in _POOLS and (op.low, op.high) != (-128, 127))):
            what = f"{op.kind.name}{' with an activation' if op.kind in _POOLS else ''}"
            raise CompileError(
                f"layer '{op.name}' ({what}) passes no gradient on to the layers before it; train from a later one"
            )
        if passes or update is not None:
            moves.add(root(graph.tensors, op.output))
        if update is not None:
            if not 1 <= update.channels <= _channels(graph, op):
                raise CompileError(
                    f"layer '{op.name}' has {_channels(graph, op)} channels; {update.channels} cannot train"
                )
            op = replace(op, trains=update.trains, trained=update.channels)
        if (passes or update is not None) and op.kind in INT8_WEIGHTED:
            bias = np.zeros(_channels(graph, op), np.int32) if op.bias is None else op.bias
            op = replace(op, kind=_TRAINED[op.kind], bias=bias)
        ops.append(op)
    if root(graph.tensors, graph.output) not in moves:
        raise CompileError("nothing trains that the model's output depends on")
    return replace(graph, ops=tuple(ops))


def _with_loss(graph: Graph, classes: int | None, loss: Loss) -> Graph:
    """The graph with its outputs as float32 before the loss, nothing of which trains yet."""
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
    """The op that writes a tensor, if it is one."""
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


# The choice


def select_update(
    graph: Graph,
    budget_bytes: int,
    importance: Mapping[str, Importance] | None = None,
    *,
    classes: int | None = None,
    loss: Loss = "softmax_cross_entropy",
) -> Selection:
    """What to train of an int8 model in an arena of at most budget_bytes; classes and loss as in `train_int8`.

    importance: of layers, by name, as `measure_importance` finds it with samples; default: `estimate_importance`.

    The arena of a choice is the planner's, to the byte. Searched are, for every lowest layer that learns, the biases of
    all layers from it on, then more and more channels of weights, the most worth for its bytes first, with several
    limits on what one layer may take. The best of these that fits is chosen: not necessarily the best of all choices,
    but no less with more memory, and the same at every call.

    Raises CompileError if not even the least fits; the message says what that takes.
    """
    graph = _with_loss(graph, classes, loss)
    worth = estimate_importance(graph) if importance is None else importance
    return _Search(graph, worth, new_head=classes is not None).best(budget_bytes)


def _reachable(graph: Graph) -> list[Op]:
    """The layers that a gradient gets to, in order; the last ones, if more than a program can train."""
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
    """What layers are worth if nothing is known but the graph.

    Lin et al. found by training: later layers are worth more than earlier ones, pointwise convolutions more than
    depthwise ones, biases alone little, and more channels ever less. Here a layer at depth d (up to 1 at the end) has
    d^2 for its weights, half of it if it is depthwise, of which a fraction f of its channels gets the square root of f;
    and a tenth of d^2 for its biases.
    """
    layers = [op for op in graph.ops if _has_weights(op)]
    found = {}
    for i, op in enumerate(layers):
        channels = _channels(graph, op)
        total = ((i + 1) / len(layers)) ** 2 * (0.5 if op.kind == Kind.INT8_DEPTHWISE else 1.0)
        so_far = np.sqrt(np.arange(channels + 1) / channels)
        found[op.name] = Importance(np.full(channels, 0.1 * total / channels), total * np.diff(so_far))
    return found


#: For the layers that train, from the lowest on: of how many channels the weights do, too; 0: the biases alone.
_Levels = tuple[int, ...]


def measure_importance(
    graph: Graph,
    samples: Iterable[ArrayLike],
    targets: Iterable[ArrayLike],
    *,
    classes: int | None = None,
    loss: Loss = "softmax_cross_entropy",
) -> dict[str, Importance]:
    """What layers are worth on samples of what is to be learned: the sum of the squared gradients of each channel, in
    the dequantised model. To first order that is what a small step on these parameters takes off the loss.

    Some 100 samples do. A new head learns alone first, for as long as its weights are 0 no gradient gets below it.
    Raises CompileError if a layer has no float32 form.
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
    start = learner.parameters
    total = np.zeros(start.size)
    for x, y in pairs:
        learner.set_parameters(start)
        learner.learn(x, y, 1.0)
        total += (start - learner.parameters).astype(np.float64) ** 2
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
    """The choices between layers, and what they take. new_head: the last layer's weights are 0, and always train."""

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
        """The selection of most worth that fits."""
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
        """Choices, each with more channels than the one before, the most worth for its bytes first, where no layer's
        weights take more than the limit."""
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
        """About how many bytes of RAM more: parameters, and the input if it must be kept for the backward pass now."""
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
        """To the byte. How many of a layer's channels train makes no difference to the activations."""
        weights = tuple(n > 0 for n in levels)
        if weights not in self.activations:
            self.activations[weights] = resource_use(_trained(self.graph, self.selection(levels))).activations
        return self.activations[weights] + self.params(levels)

    def selection(self, levels: _Levels) -> Selection:
        return {self.layers[i].name: self.update(i, n) for i, n in enumerate(levels, self.lowest(levels))}

    def update(self, i: int, level: int) -> LayerUpdate:
        return LayerUpdate("all", level) if level else LayerUpdate("bias", self.channels[i])
