"""Programs: the memory plan keeps every tensor whole for as long as it is read; bad models and bytes are refused."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net, hostile, nets, random_weights, sealed

from edge import program as p
from edge.graph import Graph, Kind
from edge.plan import Block, pack, plan

IN_PLACE = (Kind.RELU, Kind.RELU6, Kind.LEAKY_RELU, Kind.TANH, Kind.SIGMOID, Kind.ADD)
READ_OUTPUT = (*IN_PLACE[:-1], Kind.SOFTMAX)


def overlap(a: range, b: range) -> bool:
    return max(a.start, b.start) < min(a.stop, b.stop)


class Memory:
    """The arena with a name in every cell: which tensor was written there last."""

    def __init__(self, size: int) -> None:
        self.cells: list[object] = [None] * size

    def write(self, name: object, where: range) -> None:
        assert where.start >= 0 and where.stop <= len(self.cells)
        self.cells[where.start : where.stop] = [name] * len(where)

    def read(self, name: object, where: range) -> None:
        found = set(self.cells[where.start : where.stop])
        assert found == {name}, f"{name} was overwritten by {found}"


def replay(graph: Graph) -> None:
    """Runs a training step of a graph's plan on names instead of numbers, as the engine does on numbers."""
    found = plan(graph)
    memory = Memory(found.activations)

    def under(tensor: int) -> int:
        view = graph.tensors[tensor].view_of
        return tensor if view is None else under(view)

    def place(index: int) -> range | None:
        start = found.offsets[index]
        return None if start is None else range(start, start + found.tensors[index].bytes)

    def read(kind: str, tensor: int, index: int | None = None) -> range | None:
        where = place(tensor if index is None else index)
        if where is not None:
            memory.read((kind, under(tensor)), where)
        return where

    for op in graph.ops:
        out = place(op.output)
        assert out is not None
        for x in op.inputs:
            where = read("value", x)
            assert where is None or not overlap(where, out) or (op.kind in IN_PLACE and where == out)
        memory.write(("value", op.output), out)
    read("value", graph.output)
    if found.output != graph.output:
        where = place(found.output)
        assert where is not None
        memory.write("probabilities", where)
    if found.dlogits is None:
        assert not any(op.trains != "nothing" for op in graph.ops)
        return
    where = place(found.dlogits)
    assert where is not None
    memory.write(("gradient", under(graph.output)), where)
    for op, g in reversed(list(zip(graph.ops, found.gradients, strict=True))):
        if g.dout is None:
            assert op.trains == "nothing"
            continue
        dy = read("gradient", op.output, g.dout)
        if op.kind in READ_OUTPUT:
            read("value", op.output)
        x = None
        if op.trains == "all" or op.kind == Kind.LAYERNORM or (op.kind == Kind.MAXPOOL and g.din is not None):
            x = read("value", op.inputs[0])
        for tensor, din, adds in zip(op.inputs, (g.din, g.din2), (g.adds, g.adds2), strict=False):
            if din is None:
                continue
            dx = place(din)
            assert dx is not None and dy is not None
            if adds:
                memory.read(("gradient", under(tensor)), dx)
            else:
                assert not overlap(dy, dx) or (op.kind in IN_PLACE and dy == dx)
                alone = op.kind == Kind.MAXPOOL and op.kernel == op.strides
                assert x is None or not overlap(x, dx) or (alone and x == dx)
            memory.write(("gradient", under(tensor)), dx)


@given(nets())
@settings(max_examples=300, deadline=None)
def test_no_tensor_is_overwritten_before_its_last_use(net: Net) -> None:
    weights = random_weights(net.whole(), 0)
    replay(p.network(net.layers, net.input_shape, net.loss, trainable=net.trainable, weights=weights))


@given(st.lists(st.builds(Block, st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_packed_blocks_that_live_together_do_not_overlap(blocks: Sequence[Block]) -> None:
    for b in blocks:
        b.birth, b.death = min(b.birth, b.death), max(b.birth, b.death)
    offsets, size, bound = pack(blocks)
    live = [sum(b.bytes for b in blocks if b.birth <= time <= b.death) for time in range(10)]
    assert max(live) == bound <= size <= sum(b.bytes for b in blocks)
    for i, a in enumerate(blocks):
        assert 0 <= offsets[i] <= size - a.bytes
        for j, b in enumerate(blocks[:i]):
            if a.birth <= b.death and b.birth <= a.death:
                assert not overlap(range(offsets[i], offsets[i] + a.bytes), range(offsets[j], offsets[j] + b.bytes))


def test_the_plan_of_a_small_mlp_takes_two_hidden_vectors_and_one_output() -> None:
    program = p.build([p.Dense(32), p.ReLU(), p.Dense(10)], (64,), "softmax_cross_entropy")
    assert program.activation_bytes == 4 * (32 + 32 + 10) == 296
    assert program.arena_bytes == 296 + 4 * (64 * 32 + 32 + 32 * 10 + 10)


def test_a_frozen_backbone_needs_no_gradients() -> None:
    layers = [p.Conv2D(8), p.ReLU(), p.MaxPool2D(), p.Flatten(), p.Dense(10)]
    whole = p.build(layers, (12, 12, 1), "softmax_cross_entropy")
    head = p.build(layers, (12, 12, 1), "softmax_cross_entropy", trainable={1}, weights=only(whole, "conv2d_0"))
    assert head.activation_bytes == 4 * (800 + 200)  # the convolution's output, then the pool's; the rest fits under it
    assert whole.activation_bytes == 4 * (800 + 200 + 10 + 200)
    assert head.n_params == 200 * 10 + 10
    assert [layer.trainable for layer in head.layers if layer.params] == [False, True]


def only(program: p.Program, layer: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in random_weights(program, 0).items() if name.startswith(layer + "/")}


def test_a_program_says_what_was_built() -> None:
    layers = [p.Conv2D(4, (3, 2), 2, "same"), p.Tanh(), p.AvgPool2D(2), p.Flatten(), p.Dense(5)]
    program = p.Program.parse(p.build(layers, (8, 6, 2), "mse").data)
    assert program.input_shape == (8, 6, 2) and program.output_shape == (5,) and program.loss == "mse"
    conv, tanh, pool, dense = program.layers
    assert (conv.name, conv.out_shape, conv.params, conv.macs) == ("conv2d_0", (4, 3, 4), 52, 4 * 3 * 48)
    assert (tanh.name, tanh.params, tanh.macs) == ("tanh_0", 0, 0)
    assert (pool.name, pool.out_shape) == ("avgpool_0", (2, 1, 4))
    assert (dense.name, dense.in_shape, dense.macs) == ("dense_1", (8,), 40)
    assert program.parameters == (
        ("conv2d_0/weights", (4, 3, 2, 2)),
        ("conv2d_0/bias", (4,)),
        ("dense_1/weights", (5, 8)),
        ("dense_1/bias", (5,)),
    )
    assert program.n_params == 52 + 45


def test_a_model_id_names_the_architecture() -> None:
    layers = [p.Dense(4)]
    one, two = p.build(layers, (3,), "mse"), p.build(layers, (3,), "mse")
    assert one == two and one.model_id == two.model_id and len(one.model_id) == 8
    assert p.build(layers, (3,), "softmax_cross_entropy").model_id != one.model_id


def test_split_and_join_are_inverse() -> None:
    program = p.build([p.Dense(4), p.ReLU(), p.Dense(2)], (3,), "mse")
    vector = program.initial(7)
    assert np.array_equal(program.join(program.split(vector)), vector)
    with pytest.raises(p.ProgramError, match=r"needs \(26,\)"):
        program.split(vector[1:])
    with pytest.raises(p.ProgramError, match="dense_1/bias"):
        program.join({k: v for k, v in program.split(vector).items() if k != "dense_1/bias"})


def test_initial_parameters_are_glorot_uniform_with_zero_biases() -> None:
    program = p.build([p.Dense(100)], (50,), "mse")
    arrays = program.split(program.initial(3))
    limit = np.sqrt(6 / 150)
    assert np.abs(arrays["dense_0/weights"]).max() <= limit
    assert abs(arrays["dense_0/weights"].std() - limit / np.sqrt(3)) < 0.01 * limit
    assert not arrays["dense_0/bias"].any()
    assert np.array_equal(program.initial(3), program.initial(3))
    assert not np.array_equal(program.initial(3), program.initial(4))


def test_a_program_carries_initial_values_if_it_is_given_them() -> None:
    bare = p.build([p.Dense(2), p.Tanh(), p.Dense(2)], (3,), "mse")
    weights = random_weights(bare, 5)
    full = p.build([p.Dense(2), p.Tanh(), p.Dense(2)], (3,), "mse", weights=weights)
    assert bare.carried is None and full.carried is not None
    assert np.array_equal(full.carried, bare.join(weights))


def test_relu_is_moved_behind_max_pooling() -> None:
    after = p.build([p.Conv2D(2), p.MaxPool2D(), p.ReLU(), p.Flatten(), p.Dense(2)], (6, 6, 1), "mse")
    before = p.build([p.Conv2D(2), p.ReLU(), p.MaxPool2D(), p.Flatten(), p.Dense(2)], (6, 6, 1), "mse")
    assert before == after


BAD_MODELS = {
    "no layers": ([], (4,), "mse", {}, "computes something"),
    "only a flatten": ([p.Flatten()], (2, 2, 1), "mse", {}, "computes something"),
    "a loss that is not there": ([p.Dense(1)], (4,), "hinge", {}, "hinge"),
    "an input of two dimensions": ([p.Dense(1)], (4, 4), "mse", {}, "height, width, channels"),
    "an empty input": ([p.Dense(1)], (0,), "mse", {}, "65535"),
    "too large an input": ([p.Dense(1)], (65536,), "mse", {}, "65535"),
    "too large a flatten": ([p.Flatten()], (256, 256, 1), "mse", {}, "65535"),
    "a dense layer on an image": ([p.Dense(1)], (4, 4, 1), "mse", {}, "Flatten"),
    "no units": ([p.Dense(0)], (4,), "mse", {}, "65535"),
    "more parameters than a field can count": ([p.Dense(65535)] * 3, (65535,), "mse", {}, "smaller"),
    "a kernel larger than its input": ([p.Conv2D(1, 5)], (4, 4, 1), "mse", {}, "padding='same'"),
    "a stride of 0": ([p.Conv2D(1, 3, 0)], (4, 4, 1), "mse", {}, "1 to 255"),
    "a padding that is not there": ([p.MaxPool2D(2, 2, "full")], (4, 4, 1), "mse", {}, "'valid' or 'same'"),  # type: ignore[arg-type]
    "a layer of another kind": ([p.Dense(2), "softmax"], (4,), "mse", {}, "softmax"),
    "too many layers with parameters": ([p.Dense(1)] * 33, (4,), "mse", {}, "32"),
    "a trainable layer that is not there": ([p.Dense(1)], (4,), "mse", {"trainable": {1}}, "layer 1"),
    "a frozen layer without weights": ([p.Dense(1)], (4,), "mse", {"trainable": ()}, "frozen"),
    "weights of no layer": ([p.Dense(1)], (4,), "mse", {"weights": {"dense_9/bias": np.zeros(1)}}, "dense_9"),
    "weights for half of a model": ([p.Dense(1)], (4,), "mse", {"weights": {"dense_0/bias": np.zeros(1)}}, "pass them"),
    "weights of another shape": ([p.Dense(1)], (4,), "mse", {"weights": {"dense_0/weights": np.zeros(4)}}, r"\(1, 4\)"),
    "weights that are not finite": (
        [p.Dense(1)],
        (4,),
        "mse",
        {"weights": {"dense_0/weights": np.full((1, 4), np.nan), "dense_0/bias": np.zeros(1)}},
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_gets_an_error_that_says_why(case: str) -> None:
    layers, shape, loss, options, reason = BAD_MODELS[case]
    with pytest.raises(p.ProgramError, match=reason):
        p.build(layers, shape, loss, **options)  # type: ignore[arg-type]


def test_damaged_bytes_are_no_program() -> None:
    data = p.build([p.Dense(2)], (3,), "mse").data
    with pytest.raises(p.ProgramError, match="no program"):
        p.Program.parse(b"")
    with pytest.raises(p.ProgramError, match="no program"):
        p.Program.parse(b"X" + data[1:])
    with pytest.raises(p.ProgramError, match="damaged"):
        p.Program.parse(data[:-1])
    with pytest.raises(p.ProgramError, match="damaged"):
        p.Program.parse(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(p.ProgramError, match="version 3"):
        p.Program.parse(sealed(data[:4] + b"\x03\x00" + data[6:]))
    with pytest.raises(p.ProgramError, match="contradicts"):
        p.Program.parse(sealed(data + bytes(4)))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_parsing_anything_gives_a_program_or_a_program_error(data: st.DataObject) -> None:
    try:
        program = p.Program.parse(data.draw(hostile()))
    except p.ProgramError:
        return
    assert program.arena_bytes >= 0 and len(program.layers) > 0 and program.initial(0).shape == (program.n_params,)
