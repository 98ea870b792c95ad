"""Programs say what was built; bad models and bytes are refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import hostile, random_weights, sealed, with_weights

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.layers import (
    AvgPool2D,
    Conv2D,
    Dense,
    DepthwiseConv2D,
    Flatten,
    LayerNorm,
    MaxPool2D,
    ReLU,
    ReLU6,
    Softmax,
    Tanh,
    build,
    network,
)
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.memory_plan import with_training
from tinyfleet.edge.model.program import Program


def test_the_plan_of_a_small_mlp_takes_two_hidden_vectors_and_one_output() -> None:
    program = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
    assert program.activation_bytes == 4 * (32 + 32 + 10) == 296
    assert program.arena_bytes == 296 + 4 * (64 * 32 + 32 + 32 * 10 + 10)


def test_a_frozen_backbone_needs_no_gradients() -> None:
    layers = [Conv2D(8), ReLU(), MaxPool2D(), Flatten(), Dense(10)]
    whole = build(layers, (12, 12, 1), "softmax_cross_entropy")
    head = build(layers, (12, 12, 1), "softmax_cross_entropy", trainable={1}, weights=only(whole, "conv2d_0"))
    assert head.activation_bytes == 4 * (800 + 200)  # the convolution's output, then the pool's; the rest fits under it
    assert whole.activation_bytes == 4 * (800 + 200 + 10 + 200)
    assert head.n_params == 200 * 10 + 10
    assert [layer.trainable for layer in head.layers if layer.params] == [False, True]


def only(program: Program, layer: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in random_weights(program, 0).items() if name.startswith(layer + "/")}


def test_a_program_says_what_was_built() -> None:
    layers = [Conv2D(4, (3, 2), 2, "same"), Tanh(), AvgPool2D(2), Flatten(), Dense(5)]
    program = Program.parse(build(layers, (8, 6, 2), "mse").data)
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
    layers = [Dense(4)]
    one, two = build(layers, (3,), "mse"), build(layers, (3,), "mse")
    assert one == two and one.model_id == two.model_id and len(one.model_id) == 8
    assert build(layers, (3,), "softmax_cross_entropy").model_id != one.model_id


def test_split_and_join_are_inverse() -> None:
    program = build([Dense(4), ReLU(), Dense(2)], (3,), "mse")
    vector = program.initial(7)
    assert np.array_equal(program.join(program.split(vector)), vector)
    with pytest.raises(ProgramError, match=r"needs \(26,\)"):
        program.split(vector[1:])
    with pytest.raises(ProgramError, match="dense_1/bias"):
        program.join({k: v for k, v in program.split(vector).items() if k != "dense_1/bias"})


def test_initial_parameters_are_glorot_uniform_with_zero_biases() -> None:
    program = build([Dense(100)], (50,), "mse")
    arrays = program.split(program.initial(3))
    limit = np.sqrt(6 / 150)
    assert np.abs(arrays["dense_0/weights"]).max() <= limit
    assert abs(arrays["dense_0/weights"].std() - limit / np.sqrt(3)) < 0.01 * limit
    assert not arrays["dense_0/bias"].any()
    assert np.array_equal(program.initial(3), program.initial(3))
    assert not np.array_equal(program.initial(3), program.initial(4))


def test_a_program_carries_initial_values_if_it_is_given_them() -> None:
    bare = build([Dense(2), Tanh(), Dense(2)], (3,), "mse")
    weights = random_weights(bare, 5)
    full = build([Dense(2), Tanh(), Dense(2)], (3,), "mse", weights=weights)
    assert bare.carried is None and full.carried is not None
    assert np.array_equal(full.carried, bare.join(weights))


def test_relu_is_moved_behind_max_pooling() -> None:
    after = build([Conv2D(2), MaxPool2D(), ReLU(), Flatten(), Dense(2)], (6, 6, 1), "mse")
    before = build([Conv2D(2), ReLU(), MaxPool2D(), Flatten(), Dense(2)], (6, 6, 1), "mse")
    assert before == after


BAD_MODELS = {
    "no layers": ([], (4,), "mse", {}, "computes something"),
    "only a flatten": ([Flatten()], (2, 2, 1), "mse", {}, "computes something"),
    "a loss that is not there": ([Dense(1)], (4,), "hinge", {}, "hinge"),
    "an input of two dimensions": ([Dense(1)], (4, 4), "mse", {}, "height, width, channels"),
    "an empty input": ([Dense(1)], (0,), "mse", {}, "65535"),
    "too large an input": ([Dense(1)], (65536,), "mse", {}, "65535"),
    "too large a flatten": ([Flatten()], (256, 256, 1), "mse", {}, "65535"),
    "a dense layer on an image": ([Dense(1)], (4, 4, 1), "mse", {}, "Flatten"),
    "no units": ([Dense(0)], (4,), "mse", {}, "65535"),
    "more parameters than a field can count": ([Dense(65535)] * 3, (65535,), "mse", {}, "smaller"),
    "a kernel larger than its input": ([Conv2D(1, 5)], (4, 4, 1), "mse", {}, "padding='same'"),
    "a stride of 0": ([Conv2D(1, 3, 0)], (4, 4, 1), "mse", {}, "1 to 255"),
    "a padding that is not there": ([MaxPool2D(2, 2, "full")], (4, 4, 1), "mse", {}, "'valid' or 'same'"),  # type: ignore[arg-type]
    "a layer of another kind": ([Dense(2), "softmax"], (4,), "mse", {}, "softmax"),
    "too many layers with parameters": ([Dense(1)] * 33, (4,), "mse", {}, "32"),
    "a trainable layer that is not there": ([Dense(1)], (4,), "mse", {"trainable": {1}}, "layer 1"),
    "a frozen layer without weights": ([Dense(1)], (4,), "mse", {"trainable": ()}, "frozen"),
    "weights of no layer": ([Dense(1)], (4,), "mse", {"weights": {"dense_9/bias": np.zeros(1)}}, "dense_9"),
    "weights for half of a model": ([Dense(1)], (4,), "mse", {"weights": {"dense_0/bias": np.zeros(1)}}, "pass them"),
    "weights of another shape": ([Dense(1)], (4,), "mse", {"weights": {"dense_0/weights": np.zeros(4)}}, r"\(1, 4\)"),
    "weights that are not finite": (
        [Dense(1)],
        (4,),
        "mse",
        {"weights": {"dense_0/weights": np.full((1, 4), np.nan), "dense_0/bias": np.zeros(1)}},
        "not finite",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_gets_an_error_that_says_why(case: str) -> None:
    layers, shape, loss, options, reason = BAD_MODELS[case]
    with pytest.raises(ProgramError, match=reason):
        build(layers, shape, loss, **options)  # type: ignore[arg-type]


def test_a_program_says_how_it_trains() -> None:
    layers = [Conv2D(4, 3, dilation=2), ReLU6(), DepthwiseConv2D(3, multiplier=2), LayerNorm(), Flatten()]
    program = build([*layers, Dense(6)], (9, 9, 1), "huber", momentum=True, classes=2)
    assert [layer.kind for layer in program.layers] == ["conv2d", "relu6", "depthwise", "layernorm", "dense"]
    assert [layer.out_shape for layer in program.layers] == [(5, 5, 4), (5, 5, 4), (3, 3, 8), (3, 3, 8), (6,)]
    assert [layer.macs for layer in program.layers] == [25 * 36, 0, 9 * 9 * 8, 0, 72 * 6]
    assert program.momentum_bytes == program.params_bytes == 4 * program.n_params
    assert program.arena_bytes == 2 * program.params_bytes + program.activation_bytes
    assert (program.classes, program.loss, program.trains_int8) == (2, "huber", False)
    assert program.input == Tensor((9, 9, 1)) and program.output.dtype == "float32"


def test_of_an_op_only_the_bias_can_train() -> None:
    net = network([Dense(3), Tanh(), Dense(2)], (4,), "mse")
    graph = with_training(with_weights(net, np.random.default_rng(0)), 0, bias_only=True)
    program = assemble(graph)
    assert program.parameters == (("dense_0/bias", (3,)), ("dense_1/bias", (2,)))
    assert program.n_params == 5 and program.carried is not None
    assert np.array_equal(program.carried, np.concatenate([op.bias for op in graph.ops if op.bias is not None]))
    assert assemble(graph, carry=False).carried is None


def test_a_model_that_only_runs_has_nothing_that_trains() -> None:
    net = network(
        [Dense(3), Softmax()], (4,), None, weights={"dense_0/weights": np.ones((3, 4)), "dense_0/bias": np.zeros(3)}
    )
    program = assemble(net)
    assert program.loss is None and program.n_params == 0 and program.arena_bytes == program.activation_bytes == 12
    assert np.allclose(MoteLearner(program).infer(np.ones(4)), 1 / 3)


def dense(**changes: object) -> Graph:
    """One dense layer."""
    graph = with_weights(network([Dense(3)], (4,), "mse"), np.random.default_rng(0))
    of_op = {k: v for k, v in changes.items() if k in Op.__dataclass_fields__}
    of_graph = {k: v for k, v in changes.items() if k not in of_op}
    return replace(graph, ops=(replace(graph.ops[0], **of_op),), **of_graph)  # type: ignore[arg-type]


BAD_GRAPHS = {
    "more classes than outputs": (dense(classes=4), "1 to 3"),
    "no delta": (dense(huber_delta=0.0), "delta"),
    "training without a loss": (dense(loss=None), "needs a loss"),
    "an int8 output under a loss": (dense(tensors=(Tensor((1, 1, 4)), Tensor((1, 1, 3), "int8"))), "float32 output"),
    "a tensor from nowhere": (dense(tensors=(Tensor((1, 1, 4)), Tensor((1, 1, 3)), Tensor((1, 1, 3)))), "tensor 2"),
    "weights of another shape": (dense(weights=np.zeros((4, 3))), r"needs \(3, 4\)"),
    "what has no weights": (dense(kind=Kind.RELU), "nothing that could train"),
    "no channel of int8": (dense(kind=Kind.TRAINED_INT8_DENSE, trained=0), "nothing that could train"),
    "int8 with momentum": (dense(kind=Kind.TRAINED_INT8_DENSE, momentum=True), "without momentum"),
    "a stride that no field holds": (dense(strides=(1, 300)), "too large"),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_a_bad_graph_gets_an_error_that_says_why(case: str) -> None:
    graph, reason = BAD_GRAPHS[case]
    with pytest.raises(ProgramError, match=reason):
        assemble(graph)


def test_damaged_bytes_are_no_program() -> None:
    data = build([Dense(2)], (3,), "mse").data
    with pytest.raises(ProgramError, match="not a program"):
        Program.parse(b"")
    with pytest.raises(ProgramError, match="not a program"):
        Program.parse(b"X" + data[1:])
    with pytest.raises(ProgramError, match="damaged"):
        Program.parse(data[:-1])
    with pytest.raises(ProgramError, match="damaged"):
        Program.parse(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ProgramError, match="version 3"):
        Program.parse(sealed(data[:4] + b"\x03\x00" + data[6:]))
    with pytest.raises(ProgramError, match="contradicts"):
        Program.parse(sealed(data + bytes(4)))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_parsing_anything_gives_a_program_or_a_program_error(data: st.DataObject) -> None:
    try:
        program = Program.parse(data.draw(hostile()))
    except ProgramError:
        return
    assert program.arena_bytes >= 0 and len(program.layers) > 0 and program.initial(0).shape == (program.n_params,)


def test_a_mask_says_which_parameters_belong_to_its_layers() -> None:
    layers = [Conv2D(3), ReLU(), Flatten(), Dense(4), ReLU(), Dense(2)]
    program = build(layers, (5, 5, 1), "softmax_cross_entropy")
    names = [name.partition("/")[0] for name, shape in program.parameters for _ in range(math.prod(shape))]
    trained = list(dict.fromkeys(names))
    for mask in range(8):
        wanted = [mask >> trained.index(name) & 1 for name in names]
        assert program.in_layers(mask).tolist() == wanted
    assert program.head == 4 and program.in_layers(program.head).sum() == 4 * 2 + 2
