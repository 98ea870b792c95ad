"""Plans: no tensor is overwritten while it is needed, nothing is allocated that is not, and no plan could do much
better."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import HEADER, Net, graphs, nets, with_weights
from small_models import MODELS

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import LOSSES, Graph, Kind, Op, Shape3, Tensor
from tinyfleet.edge.model.layers import Conv2D, Dense, DepthwiseConv2D, Flatten, GlobalAvgPool2D, Layer, ReLU, network
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.memory_plan import (
    MASKED,
    TRAINED_INT8,
    WEIGHTED,
    Block,
    Gradients,
    MemoryPlan,
    aligned,
    constants_bytes,
    lower_bound,
    pack,
    plan_memory,
    resource_use,
    root,
    with_training,
)

# A training step of a plan on contents instead of numbers, as the engine does it on numbers. Content is whatever can be
# compared: what an op computes from contents is named by the op and by them, so that two tensors are the same content
# only where the engine's numbers are the same.

POINTWISE = (Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU, Kind.TANH, Kind.SIGMOID, Kind.SOFTMAX)
INT8_POINTWISE = (Kind.INT8_ADD, Kind.INT8_MUL, Kind.INT8_TABLE, Kind.INT8_SOFTMAX)
Content = int


class Names:
    """Numbers for contents: the same for the same."""

    def __init__(self) -> None:
        self.numbers: dict[object, Content] = {}
        self.parts: dict[Content, tuple[Content, ...]] = {}

    def of(self, what: object) -> Content:
        return self.numbers.setdefault(what, len(self.numbers))

    def sum(self, a: Content, b: Content) -> Content:
        parts = tuple(sorted(self.parts.get(a, (a,)) + self.parts.get(b, (b,))))
        total = self.of(parts)
        self.parts[total] = parts
        return total


class Memory:
    """The activations by words: which word of which content was written there last."""

    def __init__(self, size: int) -> None:
        self.words: list[tuple[Content, int] | None] = [None] * (size // 4)

    def write(self, content: Content, where: range) -> None:
        assert where.start >= 0 and where.stop <= len(self.words)
        self.words[where.start : where.stop] = [(content, i) for i in range(len(where))]

    def read(self, content: Content, where: range) -> None:
        assert self.words[where.start : where.stop] == [(content, i) for i in range(len(where))], "overwritten"


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


class Replay:
    """One step of a graph's plan. It fails where a tensor is read that is not there any more."""

    def __init__(self, graph: Graph, found: MemoryPlan) -> None:
        self.graph, self.found = graph, found
        self.names, self.memory = Names(), Memory(found.activations)
        self.expected = self.gradients()
        self.forward()
        self.backward()

    def root(self, tensor: int) -> int:
        return root(self.graph.tensors, tensor)

    def where(self, tensor: int) -> range | None:
        """Its words; None: in the model's input."""
        start = self.found.offsets[tensor]
        assert start is None or start % 4 == 0
        return None if start is None else range(start // 4, start // 4 + -(-self.found.tensors[tensor].bytes // 4))

    def written(self, tensor: int | None) -> range:
        where = self.where(tensor) if tensor is not None else None
        assert where is not None
        return where

    def read_value(self, tensor: int) -> range | None:
        where = self.where(tensor)
        if where is None:
            assert self.root(tensor) == 0
        else:
            assert self.root(tensor) != 0
            self.memory.read(self.names.of(("value", self.root(tensor))), where)
        return where

    def through(self, number: int, side: int, dout: Content) -> Content:
        """What op `number` gives to the gradient of an input."""
        return dout if self.graph.ops[number].kind == Kind.ADD else self.names.of(("through", number, side, dout))

    def gradients(self) -> list[tuple[Content, list[bool]] | None]:
        """Of every op that takes part: the gradient that it must find, and which inputs' it must give. Without memory,
        from what depends on what alone."""
        ops, above = self.graph.ops, set[int]()
        for op in ops:
            if op.trains != "nothing" or {self.root(x) for x in op.inputs} & above:
                above.add(self.root(op.output))
        whole: dict[int, Content] = {}
        if self.graph.loss is not None and self.root(self.graph.output) in above:
            whole[self.root(self.graph.output)] = self.names.of("loss")
        expected: list[tuple[Content, list[bool]] | None] = [None] * len(ops)
        for i in reversed(range(len(ops))):
            y = self.root(ops[i].output)
            if y not in whole:
                continue
            wanted = [self.root(x) in above for x in ops[i].inputs]
            if ops[i].trains == "nothing" and not any(wanted):
                continue
            expected[i] = whole[y], wanted
            for side, x in enumerate(map(self.root, ops[i].inputs)):
                if wanted[side]:
                    part = self.through(i, side, whole[y])
                    whole[x] = self.names.sum(whole[x], part) if x in whole else part
        return expected

    def forward(self) -> None:
        begun = set[int]()
        for i, op in enumerate(self.graph.ops):
            out = self.written(op.output)
            for x in op.inputs:
                where = self.read_value(x)
                in_place = op.kind in (*POINTWISE, *INT8_POINTWISE, Kind.ADD, Kind.LAYERNORM)
                assert where is None or not overlap(where, out) or (in_place and where == out)
            if op.output in begun:  # one more part of a concatenation
                self.read_value(op.output)
            begun.add(op.output)
            self.memory.write(self.names.of(("value", op.output)), out)
            if (mask := self.found.gradients[i].mask) is not None:  # made of the output
                assert op.kind in MASKED and not overlap(self.written(mask), out)
                assert self.found.tensors[mask].bytes >= -(-self.graph.tensors[op.output].size // 8)
                self.memory.write(self.names.of(("mask", i)), self.written(mask))
        logits = self.read_value(self.graph.output)
        assert logits is not None
        output, loss = self.found.output, self.graph.loss
        if loss in ("softmax_cross_entropy", "binary_cross_entropy"):
            assert not overlap(logits, self.written(output)) or logits == self.written(output)
            self.memory.write(self.names.of("probabilities"), self.written(output))
        else:
            assert output == self.graph.output
        if not any(self.expected):
            assert self.found.dlogits is None
            return
        dlogits = self.written(self.found.dlogits)
        assert not overlap(dlogits, self.written(output)) or dlogits == self.written(output)
        self.memory.write(self.names.of("loss"), dlogits)

    def backward(self) -> None:
        for i in reversed(range(len(self.graph.ops))):
            expected, found = self.expected[i], self.found.gradients[i]
            if expected is None:
                assert found == Gradients()
            else:
                dout, wanted = expected
                assert [found.din is not None, found.din2 is not None] == [*wanted, False][:2]
                self.back(i, dout, found)

    def back(self, i: int, dout: Content, found: Gradients) -> None:
        op = self.graph.ops[i]
        dy = self.written(found.dout)
        assert found.dout is not None and self.found.tensors[found.dout].dtype == "float32"
        self.memory.read(dout, dy)
        read: list[range] = []
        passes = found.din is not None
        reads_input = (
            passes if op.kind in (Kind.MAXPOOL, Kind.INT8_MAXPOOL) else op.kind == Kind.LAYERNORM and passes
        ) or op.trains == "all"
        if found.mask is not None:
            read.append(self.written(found.mask))
            self.memory.read(self.names.of(("mask", i)), read[-1])
        for tensor, needed in (
            (op.inputs[0], reads_input),
            (op.output, op.kind in (*POINTWISE, *TRAINED_INT8, Kind.INT8_ADD) and found.mask is None),
        ):
            where = self.read_value(tensor) if needed else None
            read += [] if where is None else [where]
        sides = [(found.din, found.adds), (found.din2, found.adds2)][: len(op.inputs)]
        results = []
        for side, (din, adds) in enumerate(sides):
            if din is None:
                continue
            dx = self.written(din)
            assert self.found.tensors[din].size == self.graph.tensors[op.inputs[side]].size
            in_place = op.kind in (*POINTWISE, Kind.ADD, Kind.DEQUANTIZE, Kind.INT8_ADD)
            assert not overlap(dy, dx) or (in_place and dy == dx)
            alone = op.kind == Kind.MAXPOOL and op.kernel == op.strides and not adds
            assert all(not overlap(where, dx) or (alone and where == dx) for where in read)
            results.append((dx, adds, self.through(i, side, dout)))
        if op.kind in TRAINED_INT8:  # what an output's clamp holds back is cleared in place
            self.memory.write(self.names.of(("masked", i)), dy)
        for number, (dx, adds, content) in enumerate(results):
            if adds:
                before = self.memory.words[dx.start]
                assert before is not None
                self.memory.read(before[0], dx)
                content = self.names.sum(before[0], content)
            self.memory.write(content, dx)
            if number == 0 and len(results) == 2 and op.kind == Kind.ADD and results[1][0] != dx:
                self.memory.read(dout, dy)  # the second is computed from it


@given(graphs())
@settings(max_examples=300, deadline=None)
def test_no_tensor_is_overwritten_before_its_last_use(graph: Graph) -> None:
    Replay(graph, plan_memory(graph))


@given(graphs(), st.data())
@settings(max_examples=100, deadline=None)
def test_nor_is_it_when_biases_or_only_the_last_layers_train_or_nothing_does(graph: Graph, data: st.DataObject) -> None:
    weighted = [i for i, op in enumerate(graph.ops) if op.kind in WEIGHTED]
    chosen = with_training(graph, data.draw(st.none() | st.sampled_from(weighted)), bias_only=data.draw(st.booleans()))
    for each in (chosen, replace(with_training(graph, None), loss=None)):
        Replay(each, plan_memory(each))


@given(nets())
@settings(max_examples=100, deadline=None)
def test_nor_is_it_in_a_model_of_layers(net: Net) -> None:
    graph = network(net.layers, net.input_shape, net.loss)
    Replay(graph, plan_memory(graph))


@st.composite
def tangles(draw: st.DrawFn) -> Graph:
    """Ops that take any tensors before them, in float32 or int8, to a float32 loss. Only what a plan needs to know: all
    of one shape, without weights and scales."""
    trains = st.sampled_from(["nothing", "bias", "all"])
    int8 = draw(st.booleans())
    weighted = TRAINED_INT8[1:] if int8 else WEIGHTED[1:]
    alone = (Kind.INT8_AVGPOOL, Kind.INT8_MAXPOOL) if int8 else (Kind.AVGPOOL, Kind.MAXPOOL, Kind.RELU)
    sums = Kind.INT8_ADD if int8 else Kind.ADD
    tensors, ops = [Tensor((4, 4, 3), "int8" if int8 else "float32")], list[Op]()

    def add(kind: Kind, inputs: tuple[int, ...], **more: object) -> int:
        tensors.append(tensors[0] if kind != Kind.DEQUANTIZE else Tensor((4, 4, 3)))
        if kind in weighted:
            more["trains"] = draw(trains)
        ops.append(Op(kind, f"op{len(ops)}", inputs, len(tensors) - 1, **more))  # type: ignore[arg-type]
        return len(tensors) - 1

    add(weighted[0], (0,))
    for _ in range(draw(st.integers(1, 10))):
        last = len(tensors) - 1
        recent = st.integers(max(last - 3, 0), last)
        kind = draw(st.sampled_from([sums, draw(st.sampled_from([*weighted, *alone])), Kind.PLACE]))
        if kind == sums:
            add(kind, (draw(recent), draw(recent)))
        elif kind == Kind.PLACE:  # side by side
            to = add(kind, (draw(recent),))
            ops.append(replace(ops[-1], inputs=(draw(recent),), output=to))
        else:
            add(kind, (draw(recent),), kernel=(2, 2), strides=(2, 2))
    while len(ends := [i for i in range(1, len(tensors)) if not any(i in op.inputs for op in ops)]) > 1:
        add(sums, (ends[0], ends[1]))
    if int8:
        add(Kind.DEQUANTIZE, (len(tensors) - 1,))
    return Graph(tuple(tensors), tuple(ops), len(tensors) - 1, draw(st.sampled_from(LOSSES)))


@given(tangles())
@settings(max_examples=500, deadline=None)
def test_nor_is_it_however_ops_are_joined(graph: Graph) -> None:
    Replay(graph, plan_memory(graph))


@given(graphs(), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_what_a_graph_takes_is_what_its_program_has_and_what_the_engine_uses(
    graph: Graph, momentum: bool, seed: int
) -> None:
    graph = replace(with_weights(graph, np.random.default_rng(seed)), momentum=momentum)
    figures, program = resource_use(graph), assemble(graph)
    assert (figures.params, figures.momentum) == (program.params_bytes, program.momentum_bytes)
    assert figures.activations == program.activation_bytes
    assert figures.arena == program.arena_bytes == MoteLearner(program).ram_bytes
    assert figures.program == len(program.data)


@pytest.mark.parametrize("model", MODELS)
def test_what_every_kind_of_operation_takes_is_what_its_program_has(model: str) -> None:
    program = MODELS[model]()
    assert MoteLearner(program).ram_bytes == program.arena_bytes
    header = HEADER.unpack_from(program.data)
    carried = program.params_bytes if header[8] & 1 else 0
    assert carried + sum(constants_bytes(op, program._tensors) for op in program._ops) == header[17]


# Places in memory


blocks_of = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), max_size=12).map(
    lambda rows: [Block(4 * size, min(a, b), max(a, b)) for size, a, b in rows]
)


@given(blocks_of)
def test_packed_blocks_that_live_together_do_not_overlap(blocks: Sequence[Block]) -> None:
    offsets, size, bound = pack(blocks)
    live = [sum(b.bytes for b in blocks if b.birth <= time <= b.death) for time in range(10)]
    assert max(live) == bound == lower_bound(blocks)
    assert bound <= size <= sum(b.bytes for b in blocks)
    for i, a in enumerate(blocks):
        assert 0 <= offsets[i] <= size - a.bytes and offsets[i] % 4 == 0
        for j, b in enumerate(blocks[:i]):
            if a.birth <= b.death and b.birth <= a.death:
                assert not overlap(range(offsets[i], offsets[i] + a.bytes), range(offsets[j], offsets[j] + b.bytes))


def least(blocks: Sequence[Block]) -> int:
    """The fewest bytes that any plan takes. In some order, each block as low as those before it let it, there is a best
    one: let the blocks of any plan fall, the lowest first."""
    best = sum(b.bytes for b in blocks)
    for order in itertools.permutations(blocks):
        placed: list[tuple[int, Block]] = []
        for b in order:
            others = sorted((at, o.bytes) for at, o in placed if o.birth <= b.death and b.birth <= o.death)
            offset = 0
            for at, size in others:
                if at < offset + b.bytes and offset < at + size:
                    offset = at + size
            placed.append((offset, b))
        best = min(best, max((at + b.bytes for at, b in placed), default=0))
    return best


@given(blocks_of.map(lambda blocks: blocks[:6]))
@settings(max_examples=100, deadline=None)
def test_a_plan_of_a_few_blocks_is_the_best_that_there_is(blocks: Sequence[Block]) -> None:
    _, size, bound = pack(blocks)
    assert bound <= least(blocks) == size


# The four models of MLPerf Tiny, by their layers; their files are in test_tflite_models.py.


def _separable(filters: int, strides: int = 1) -> list[Layer]:
    relu = ReLU()
    return [DepthwiseConv2D(3, strides, "same"), relu, Conv2D(filters, 1, padding="same"), relu]


def keyword_spotting() -> Graph:
    layers: list[Layer] = [Conv2D(64, (10, 4), 2, "same"), ReLU()]
    layers += [layer for _ in range(4) for layer in _separable(64)]
    layers += [GlobalAvgPool2D(), Flatten(), Dense(12)]
    return network(layers, (49, 10, 1), "softmax_cross_entropy")


def visual_wake_words() -> Graph:
    layers: list[Layer] = [Conv2D(8, 3, 2, "same"), ReLU()]
    for filters, strides in [
        (16, 1),
        (32, 2),
        (32, 1),
        (64, 2),
        (64, 1),
        (128, 2),
        *[(128, 1)] * 5,
        (256, 2),
        (256, 1),
    ]:
        layers += _separable(filters, strides)
    layers += [GlobalAvgPool2D(), Flatten(), Dense(2)]
    return network(layers, (96, 96, 3), "softmax_cross_entropy")


def anomaly_detection() -> Graph:
    layers: list[Layer] = []
    for units in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        layers += [Dense(units), ReLU()]
    return network([*layers, Dense(640)], (640,), "mse")


class Branched:
    """A float32 graph as it grows."""

    def __init__(self, shape: Shape3) -> None:
        self.tensors, self.ops = [Tensor(shape)], list[Op]()

    def add(self, kind: Kind, inputs: tuple[int, ...], shape: Shape3, kernel: int = 0, strides: int = 1) -> int:
        self.tensors.append(Tensor(shape))
        trains = "all" if kind in WEIGHTED else "nothing"
        window = {"kernel": (kernel, kernel), "strides": (strides, strides), "dilation": (1, 1)} if kernel else {}
        self.ops.append(Op(kind, f"op{len(self.ops)}", inputs, len(self.tensors) - 1, trains=trains, **window))  # type: ignore[arg-type]
        return len(self.tensors) - 1

    def residual(self, x: int, shape: Shape3, strides: int) -> int:
        y = self.add(Kind.CONV2D, (x,), shape, 3, strides)
        y = self.add(Kind.RELU, (y,), shape)
        y = self.add(Kind.CONV2D, (y,), shape, 3)
        if strides > 1:
            x = self.add(Kind.CONV2D, (x,), shape, 1, strides)
        return self.add(Kind.RELU, (self.add(Kind.ADD, (x, y), shape),), shape)

    def graph(self) -> Graph:
        return Graph(tuple(self.tensors), tuple(self.ops), len(self.tensors) - 1, "softmax_cross_entropy")


def image_classification() -> Graph:
    g = Branched((32, 32, 3))
    x = g.add(Kind.RELU, (g.add(Kind.CONV2D, (0,), (32, 32, 16), 3),), (32, 32, 16))
    for shape, strides in (((32, 32, 16), 1), ((16, 16, 32), 2), ((8, 8, 64), 2)):
        x = g.residual(x, shape, strides)
    x = g.add(Kind.AVGPOOL, (x,), (1, 1, 64), 8, 8)
    g.add(Kind.DENSE, (x,), (1, 1, 10))
    return g.graph()


@pytest.mark.parametrize("model", [keyword_spotting, visual_wake_words, image_classification, anomaly_detection])
def test_plans_of_mlperf_tiny_are_proven_within_5_percent_of_the_best(model: Callable[[], Graph]) -> None:
    """To run, and to train every suffix of the layers, or only its biases."""
    graph = model()
    choices = [replace(with_training(graph, None), loss=None)]
    for first in (i for i, op in enumerate(graph.ops) if op.kind in WEIGHTED):
        choices += [with_training(graph, first), with_training(graph, first, bias_only=True)]
    for choice in choices:
        found = plan_memory(choice)
        assert found.activations <= 1.05 * found.lower_bound
    Replay(graph, plan_memory(graph))


def test_running_keeps_one_layers_input_and_output() -> None:
    graph = replace(with_training(keyword_spotting(), None), loss=None)
    assert resource_use(graph).activations == 2 * 4 * 25 * 5 * 64
    assert resource_use(graph).params == 0


def test_biases_alone_need_no_inputs_and_shrink_with_the_suffix() -> None:
    graph = keyword_spotting()
    whole, biases = resource_use(graph), resource_use(with_training(graph, 0, bias_only=True))
    assert biases.params == 4 * (9 * 64 + 12)
    # Of every ReLU's output a bit for each element stays, where all of it does if weights train: a convolution's input
    # is the output of the ReLU before it. At the last convolution these are eight masks, and its input and output.
    places = 25 * 5
    assert biases.activations == 8 * aligned(places * 64 // 8) + 2 * 4 * places * 64
    assert whole.activations > 4 * biases.activations
    firsts = [i for i, op in enumerate(graph.ops) if op.kind in WEIGHTED]
    arenas = [resource_use(with_training(graph, i)).arena for i in firsts]
    assert arenas == sorted(arenas, reverse=True)


@pytest.mark.parametrize("kind", [Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU])
def test_an_activation_keeps_bits_where_that_takes_less(kind: Kind) -> None:
    """Not where a convolution reads its output again, nor where the peak is elsewhere; and a mask of more bytes than a
    dimension holds has rows."""

    def found(shape: Shape3, last: Kind) -> MemoryPlan:
        g = Branched(shape)
        x = g.add(kind, (g.add(Kind.CONV2D, (0,), shape, 1),), shape)
        y = g.add(kind, (g.add(last, (x,), shape, 1),), shape)
        h, _, c = shape
        g.add(Kind.DENSE, (g.add(Kind.AVGPOOL, (y,), (1, 1, c), h),), (1, 1, 2))
        Replay(g.graph(), plan_memory(g.graph()))
        return plan_memory(g.graph())

    pooled = found((8, 8, 4), Kind.AVGPOOL)
    assert [g.mask is not None for g in pooled.gradients] == [False, True, False, True, False, False]
    # The second convolution reads what the first ReLU gives.
    again = found((8, 8, 4), Kind.CONV2D)
    assert [g.mask is not None for g in again.gradients] == [False, False, False, True, False, False]
    large = found((96, 96, 64), Kind.AVGPOOL)
    mask = large.tensors[large.gradients[1].mask or 0]
    assert mask.bytes >= 96 * 96 * 64 / 8 and max(mask.shape) < 2**16


def test_the_gradients_of_a_residual_block_share_their_memory_until_one_changes() -> None:
    g = Branched((4, 4, 4))
    x = g.add(Kind.CONV2D, (0,), (4, 4, 4), 1)
    y = g.add(Kind.CONV2D, (x,), (4, 4, 4), 1)
    y = g.add(Kind.CONV2D, (y,), (4, 4, 4), 1)
    g.add(Kind.ADD, (x, y), (4, 4, 4))
    found = plan_memory(g.graph())
    size = 4 * 4 * 4 * 4
    # At the block's last convolution: the values that both read, the gradient of the sum, of both of its parts, and of
    # the convolution's input. A second copy of the former would make it five.
    assert found.activations == 4 * size
    Replay(g.graph(), found)


@pytest.mark.parametrize("other", [Kind.TANH, Kind.CONV2D])
def test_max_pooling_leaves_its_input_to_those_that_read_it_again(other: Kind) -> None:
    """To the activation that computed it, or to a convolution that takes it too."""
    g = Branched((4, 4, 3))
    x = g.add(Kind.CONV2D, (0,), (4, 4, 3), 1)
    y = g.add(other, (x,), (4, 4, 3), 1)
    pooled = g.add(Kind.MAXPOOL, (y if other == Kind.TANH else x,), (2, 2, 3), 2, 2)
    if other == Kind.CONV2D:
        g.add(Kind.ADD, (g.add(Kind.AVGPOOL, (y,), (2, 2, 3), 2, 2), pooled), (2, 2, 3))
    Replay(g.graph(), plan_memory(g.graph()))


def test_what_cannot_train_is_named() -> None:
    g = Branched((4, 4, 4))
    x = g.add(Kind.CONV2D, (0,), (4, 4, 4), 1)
    g.add(Kind.CONV2D, (x,), (4, 4, 4), 1)
    g.ops[1] = replace(g.ops[1], kind=Kind.SLICE, trains="nothing")
    g.add(Kind.DENSE, (2,), (1, 1, 2))
    with pytest.raises(ProgramError, match=r"'op1' \(slice\) lets no gradient through"):
        plan_memory(g.graph())
    plan_memory(with_training(g.graph(), 2))
    g.add(Kind.DENSE, (0,), (1, 1, 2))
    with pytest.raises(ProgramError, match="'op2' cannot train: the output does not depend on it"):
        plan_memory(with_training(g.graph(), 2))
    with pytest.raises(ProgramError, match="there is no loss"):
        plan_memory(replace(with_training(g.graph(), 3), loss=None))
