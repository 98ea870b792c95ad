"""The C engine through its Python learner: gradients, masks, determinism, and everything that it must refuse."""

import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nets import HEADER, TENSOR, Net, forward, gradient, graphs, hostile, nets, random_weights, sealed, with_weights
from nets import loss as reference_loss
from numpy.typing import NDArray
from small_models import MODELS

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.errors import ProgramError, UserError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.layers import AvgPool2D, Conv2D, Dense, Flatten, Layer, MaxPool2D, ReLU, Tanh, build
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.model.memory_plan import with_training
from tinyfleet.edge.model.program import Program

Vector = NDArray[np.float32]
MLP = build([Dense(32), ReLU(), Dense(10)], (64,), "softmax_cross_entropy")
CNN = build([Conv2D(4), Tanh(), MaxPool2D(), Flatten(), Dense(3)], (8, 8, 1), "mse")


def sample(program: Program, seed: int) -> tuple[Vector, Vector]:
    """A random input and a target that fits."""
    random = np.random.default_rng(seed)
    x = random.normal(size=program.input_shape).astype(np.float32)
    outputs = math.prod(program.output_shape)
    if program.loss == "softmax_cross_entropy":
        return x, np.array([random.integers(outputs)], np.float32)
    if program.loss == "binary_cross_entropy":
        return x, random.integers(0, 2, outputs).astype(np.float32)
    return x, random.normal(size=outputs).astype(np.float32)


def pooled(*layers: Layer) -> Net:
    return Net((Conv2D(2, 2), *layers, Flatten(), Dense(3)), (6, 6, 2), "softmax_cross_entropy")


@given(nets(), st.integers(0, 2**32 - 1))
@example(pooled(MaxPool2D(2)), 1)  # with a row and a column that no window covers
@example(pooled(MaxPool2D((3, 2), 1, "same"), Tanh()), 1)
@example(pooled(MaxPool2D(1, 2), AvgPool2D(2, 1, "same")), 1)
@example(pooled(AvgPool2D((2, 3)), ReLU()), 1)
@example(pooled(Tanh(), Conv2D(3, (3, 2), (2, 1), "same"), Tanh()), 1)
@settings(max_examples=150, deadline=None)
def test_a_step_follows_the_gradient(net: Net, seed: int) -> None:
    weights = random_weights(net.whole(), seed)
    program = net.build(weights)
    learner = MoteLearner(program)
    before = program.split(learner.parameters)
    x, y = sample(program, seed)
    exact = {name: array.astype(np.float64) for name, array in weights.items()}
    output = forward(net, exact, x.astype(np.float64))
    if net.loss == "softmax_cross_entropy":
        output = np.exp(output - output.max())
        output /= output.sum()
    elif net.loss == "binary_cross_entropy":
        output = 1 / (1 + np.exp(-output))
    assert np.allclose(learner.infer(x), output, rtol=1e-5, atol=1e-6)
    loss = reference_loss(net, exact, x.astype(np.float64), y.astype(np.float64))
    assert learner.loss(x, y) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert np.array_equal(learner.parameters, program.join(before)), "asking for the loss must not teach"

    rate = 0.5
    assert learner.learn(x, y, rate) == pytest.approx(loss, rel=1e-5, abs=1e-6)
    after = program.split(learner.parameters)
    for name in after:
        slope = gradient(net, exact, x.astype(np.float64), y.astype(np.float64), name)
        change = (before[name].astype(np.float64) - after[name]) / rate
        # Relative to the largest slope, beside what rounding the weights themselves does.
        assert np.allclose(change, slope, rtol=0, atol=1e-5 * max(np.abs(slope).max(), np.abs(before[name]).max(), 0.1))


@given(nets(), st.integers(0, 1000), st.data())
@settings(max_examples=100, deadline=None)
def test_a_mask_trains_its_layers_alone_and_as_if_all_trained(net: Net, seed: int, data: st.DataObject) -> None:
    weights = random_weights(net.whole(), seed)
    whole = MoteLearner(build(net.layers, net.input_shape, net.loss, weights=weights))
    masked = MoteLearner(whole.program)
    if masked.mask:
        masked.mask = data.draw(st.integers(0, masked.mask))
    x, y = sample(whole.program, seed)
    assert whole.learn(x, y, 0.1) == masked.learn(x, y, 0.1)
    trained = whole.program.split(whole.parameters)
    part = whole.program.split(masked.parameters)
    for i, layer in enumerate(layer for layer in whole.program.layers if layer.params):
        for name in (f"{layer.name}/weights", f"{layer.name}/bias"):
            expected = trained[name] if masked.mask >> i & 1 else weights[name]
            assert np.array_equal(part[name], expected), name


@given(nets(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_a_plan_for_some_layers_learns_the_same_bits_in_no_more_memory(net: Net, seed: int) -> None:
    weights = random_weights(net.whole(), seed)
    whole = MoteLearner(build(net.layers, net.input_shape, net.loss, weights=weights))
    part = MoteLearner(net.build(weights))
    frozen = set(whole.program.parameters) - set(part.program.parameters)
    layers = [layer for layer in part.program.layers if layer.params]
    whole.mask = sum(1 << i for i, layer in enumerate(layers) if layer.trainable)
    assert part.mask == (1 << sum(layer.trainable for layer in layers)) - 1
    assert part.ram_bytes == part.program.arena_bytes
    for step in range(3):
        x, y = sample(whole.program, seed + step)
        losses = [loss_or_none(learner, x, y) for learner in (part, whole)]
        assert losses[0] == losses[1]
        ours, theirs = output_or_none(part, x), output_or_none(whole, x)
        if losses[0] is None or ours is None or theirs is None:
            assert ours is theirs is None or losses[0] is None
            return
        assert np.array_equal(ours, theirs)
    learned = whole.program.split(whole.parameters)
    for name, array in part.program.split(part.parameters).items():
        assert np.array_equal(array, learned[name])
    for name, _ in frozen:
        assert np.array_equal(learned[name], weights[name])


def loss_or_none(learner: MoteLearner, x: Vector, y: Vector, rate: float = 0.1) -> float | None:
    """None if it diverges, as deep linear nets may."""
    try:
        return learner.learn(x, y, rate)
    except LearnerError:
        return None


@given(graphs(), st.booleans(), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_masks_teach_the_same_bits_as_outputs(graph: Graph, bias_only: bool, seed: int) -> None:
    graph = with_weights(with_training(graph, 0, bias_only=bias_only), np.random.default_rng(seed))
    masked = assemble(graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyfleet.edge.model.memory_plan.MASKED", ())
        whole = assemble(graph)
    assert masked.activation_bytes <= whole.activation_bytes
    learns_the_same(masked, whole, seed)


def test_every_kind_of_relu_teaches_the_same_bits_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    program = MODELS["masked"]()
    assert sum(record.flags & 32 > 0 for record in program._op_records) == 3
    monkeypatch.setattr("tinyfleet.edge.model.memory_plan.MASKED", ())
    whole = MODELS["masked"]()
    assert not any(record.flags & 32 for record in whole._op_records)
    assert program.activation_bytes < whole.activation_bytes
    for seed in range(20):
        learns_the_same(program, whole, seed)


def learns_the_same(one: Program, other: Program, seed: int) -> None:
    """Bit for bit, also with a limit on the gradient, which takes two backward passes."""
    for limit in (0.0, 0.1):
        first, second = (MoteLearner(program, clip_norm=limit) for program in (one, other))
        for step in range(3):
            x, y = sample(one, seed + step)
            loss = loss_or_none(first, 3 * x, y, 0.02)
            assert loss_or_none(second, 3 * x, y, 0.02) == loss
            np.testing.assert_array_equal(first.parameters, second.parameters)
            if loss is None:
                break
            outputs = [output_or_none(learner, x) for learner in (first, second)]
            np.testing.assert_equal(*outputs)
            if outputs[0] is None:
                break


def output_or_none(learner: MoteLearner, x: Vector) -> Vector | None:
    """None if the step before left parameters so large that the output overflows."""
    try:
        return learner.infer(x)
    except LearnerError as error:
        assert error.code == lib.MOTE_ERR_DIVERGED
        return None


def test_a_mask_that_does_not_fit_is_refused() -> None:
    data = MODELS["masked"]().data
    assert load(data) == lib.MOTE_OK
    header = HEADER.unpack_from(data)
    ops = HEADER.size + header[5] * TENSOR.size
    record = next(at for at in range(ops, ops + header[6] * 40, 40) if data[at + 1] & 32)
    (number,) = struct.unpack_from("<H", data, record + 28)
    mask = HEADER.size + number * TENSOR.size

    def changed(at: int, new: bytes) -> int:
        return load(sealed(data[:at] + new + data[at + len(new) :]))

    elements = 4 * 4 * 5
    assert struct.unpack_from("<3H", data, mask + 2) == (1, 1, elements // 8)
    assert changed(mask + 6, struct.pack("<H", elements // 8 - 1)) == lib.MOTE_ERR_FORMAT
    assert changed(mask, b"\1") == lib.MOTE_ERR_FORMAT  # float32
    assert changed(mask + 8, b"\xff" * 4) == lib.MOTE_ERR_FORMAT  # in the input
    assert changed(record + 28, struct.pack("<H", header[5])) == lib.MOTE_ERR_FORMAT
    assert changed(record + 28, b"\xff\xff") == lib.MOTE_ERR_FORMAT
    assert changed(record, bytes([int(Kind.TANH)])) == lib.MOTE_ERR_FORMAT
    assert changed(record + 1, bytes([data[record + 1] | 64])) == lib.MOTE_ERR_FORMAT
    with pytest.raises(ProgramError, match="contradicts itself"):
        Program.parse(sealed(data[: record + 28] + b"\xff\xff" + data[record + 30 :]))


def test_online_learning_tells_ten_patterns_apart() -> None:
    random = np.random.default_rng(0)
    patterns = random.normal(size=(10, 64))
    learner = MoteLearner(MLP)
    learner.set_parameters(MLP.initial(0))

    def noisy(label: int) -> Vector:
        return (patterns[label] + 0.5 * random.normal(size=64)).astype(np.float32)

    for step in range(1000):
        learner.learn(noisy(step % 10), step % 10, 0.02)
    right = sum(int(learner.infer(noisy(i % 10)).argmax()) == i % 10 for i in range(200))
    assert right >= 195


def test_the_same_samples_give_the_same_bits() -> None:
    hashes = set()
    for _ in range(2):
        learner = MoteLearner(MLP)
        learner.set_parameters(MLP.initial(1))
        for step in range(50):
            learner.learn(*sample(MLP, step), 0.05)
        hashes.add(learner.parameters.tobytes())
    assert len(hashes) == 1


def pinned(program: Program) -> str:
    """The checksum of all parameters after 500 steps; samples and initial parameters need no arithmetic."""
    random = np.random.default_rng(2)
    learner = MoteLearner(program)
    learner.set_parameters(random.integers(-200, 200, program.n_params) / 1024)
    for _ in range(500):
        x = random.integers(-128, 128, program.input_shape) / 128
        y = random.integers(10) if program.loss == "softmax_cross_entropy" else random.integers(-9, 9, 3) / 8
        learner.learn(x, y, 0.02)
    return f"{zlib.crc32(learner.parameters.tobytes()):08x}"


def test_the_arithmetic_is_part_of_the_format() -> None:
    """Another result here means that devices in the field and the server no longer agree: a new format version."""
    average = [Conv2D(3, 5, 2, "same"), ReLU(), AvgPool2D(3, 2), Flatten(), Dense(10)]
    assert [
        pinned(MLP),
        pinned(CNN),
        pinned(build(average, (12, 12, 2), "softmax_cross_entropy")),
    ] == ["5b6a2ac8", "473dbddc", "52948909"]


def test_probabilities_and_loss_stay_finite_where_one_class_is_certain() -> None:
    program = build([Dense(2)], (1,), "softmax_cross_entropy")
    learner = MoteLearner(program)
    learner.set_parameters([200.0, -200.0, 0.0, 0.0])
    assert learner.infer([1.0]).tolist() == [1.0, 0.0]
    assert learner.loss([1.0], 1) == pytest.approx(400.0)
    assert learner.learn([1.0], 1, 0.5) == pytest.approx(400.0)
    assert learner.parameters.tolist() == [199.5, -199.5, -0.5, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("program", [MLP, CNN], ids=["mlp", "cnn"])
def test_a_number_that_is_not_finite_teaches_nothing(program: Program, bad: float) -> None:
    learner = MoteLearner(program)
    learner.set_parameters(program.initial(1))
    before = learner.parameters
    x, y = sample(program, 0)
    spoilt = x.copy()
    spoilt.flat[-1] = bad
    for call in (
        lambda: learner.learn(spoilt, y, 0.1),
        lambda: learner.loss(spoilt, y),
        lambda: learner.infer(spoilt),
        lambda: learner.learn(x, y, bad),
        lambda: learner.learn(x, np.full_like(y, bad), 0.1),
        lambda: learner.set_parameters(np.full_like(before, bad)),
    ):
        with pytest.raises(UserError, match=r"finite|class"):
            call()
    assert np.array_equal(learner.parameters, before)


def test_a_diverged_loss_is_an_error_and_leaves_the_parameters() -> None:
    learner = MoteLearner(CNN)
    learner.set_parameters(np.full(CNN.n_params, 1e30, np.float32))
    x, y = sample(CNN, 0)
    with pytest.raises(UserError, match="lower the rate"):
        learner.learn(x, y, 0.1)
    assert (learner.parameters == np.float32(1e30)).all()


def steep(slope: float, ops: int) -> Graph:
    """Two dense layers, between them as many leaky ReLUs."""
    tensors = [Tensor((1, 1, 2)), *(Tensor((1, 1, 2)) for _ in range(ops + 1)), Tensor((1, 1, 1))]
    between = [Op(Kind.LEAKY_RELU, f"r{i}", (i + 1,), i + 2, slope=slope) for i in range(ops)]
    first = Op(Kind.DENSE, "first", (0,), 1, trains="all")
    last = Op(Kind.DENSE, "last", (ops + 1,), ops + 2, trains="all")
    return Graph(tuple(tensors), (first, *between, last), ops + 2, "mse")


def doubled(ops: int) -> Graph:
    """Two dense layers, and between them a value that is added to itself as often."""
    tensors = [Tensor((1, 1, 2)), *(Tensor((1, 1, 2)) for _ in range(ops + 1)), Tensor((1, 1, 1))]
    between = [Op(Kind.ADD, f"a{i}", (i + 1, i + 1), i + 2) for i in range(ops)]
    first = Op(Kind.DENSE, "first", (0,), 1, trains="all")
    last = Op(Kind.DENSE, "last", (ops + 1,), ops + 2, trains="all")
    return Graph(tuple(tensors), (first, *between, last), ops + 2, "mse")


@pytest.mark.parametrize("graph", [steep(1e10, 4), steep(1e20, 2), doubled(140)])
def test_a_gradient_that_grows_on_its_way_back_makes_no_parameter_infinite(graph: Graph) -> None:
    """All values are small: only the way back overflows."""
    program = assemble(graph)
    learner = MoteLearner(program)
    learner.set_parameters(np.array([1e-42] * 6 + [1, 1, 0], np.float32))
    with pytest.raises(LearnerError, match="diverged"):
        learner.learn([-1, -1], [1.0], 1.0)
    assert np.isfinite(learner.parameters).all()


@pytest.mark.parametrize("label", [-1, 10, 0.5, 1e20])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    learner = MoteLearner(MLP)
    with pytest.raises(UserError, match="no class"):
        learner.learn(np.zeros(64), label, 0.1)
    assert not learner.parameters.any()


def test_wrong_sizes_are_refused() -> None:
    learner = MoteLearner(CNN)
    x, y = sample(CNN, 0)
    with pytest.raises(UserError, match="63 features; this model takes 64"):
        learner.infer(x.ravel()[1:])
    with pytest.raises(UserError, match="2 numbers; this model takes 3"):
        learner.learn(x, y[1:], 0.1)
    with pytest.raises(UserError, match="this model has"):
        learner.set_parameters(np.zeros(CNN.n_params + 1))


def test_a_mask_beyond_the_plan_is_refused() -> None:
    learner = MoteLearner(build([Dense(1), Dense(1)], (1,), "mse", trainable={1}, weights=_ones(0)))
    assert learner.mask == 1
    with pytest.raises(UserError, match="not planned for that"):
        learner.mask = 3
    assert learner.mask == 1


def _ones(layer: int) -> dict[str, Vector]:
    return {f"dense_{layer}/weights": np.ones((1, 1), np.float32), f"dense_{layer}/bias": np.ones(1, np.float32)}


def test_where_a_layer_lies_in_the_vector() -> None:
    program = build([Dense(3), Dense(2), Dense(1)], (4,), "mse", trainable={0, 2}, weights=_frozen_middle())
    mote, arena = ffi.new("mote_t *"), ffi.new("float[]", program.arena_bytes // 4)
    assert lib.mote_load(mote, ffi.from_buffer(program.data), len(program.data), arena, program.arena_bytes) == 0
    first, count = ffi.new("size_t *"), ffi.new("size_t *")
    found = []
    for layer in range(2):
        assert lib.mote_layer(mote, layer, first, count) == lib.MOTE_OK
        found.append((first[0], count[0]))
    assert found == [(0, 15), (15, 3)]
    assert lib.mote_layer(mote, 2, first, count) == lib.MOTE_ERR_ARGUMENT
    assert (mote.layers, mote.trainable, mote.mask) == (2, 0b11, 0b11)


def _frozen_middle() -> dict[str, Vector]:
    return {"dense_1/weights": np.ones((2, 3), np.float32), "dense_1/bias": np.ones(2, np.float32)}


def load(data: bytes, arena_bytes: int | None = None) -> int:
    """What mote_load says to these bytes."""
    mote = ffi.new("mote_t *")
    buffer = ffi.from_buffer(data)
    need = lib.mote_arena_bytes(buffer, len(data)) if arena_bytes is None else arena_bytes
    return int(lib.mote_load(mote, buffer, len(data), ffi.new("float[]", need // 4 + 1), need))


def test_each_wrong_program_has_its_error() -> None:
    data = MLP.data
    assert load(data) == lib.MOTE_OK
    assert lib.mote_arena_bytes(ffi.from_buffer(data), len(data)) == MLP.arena_bytes
    assert lib.mote_arena_bytes(ffi.from_buffer(data), len(data) - 1) == 0
    assert load(data, MLP.arena_bytes - 1) == lib.MOTE_ERR_ARENA
    assert load(data[:-1] + bytes([data[-1] ^ 1])) == lib.MOTE_ERR_CRC
    for cut in range(len(data)):
        assert load(data[:cut]) == lib.MOTE_ERR_FORMAT
    assert load(b"") == lib.MOTE_ERR_FORMAT
    mote, arena = ffi.new("mote_t *"), ffi.new("float[]", MLP.arena_bytes // 4 + 1)
    shifted = ffi.new("char[]", b"?" + data)
    assert lib.mote_load(mote, shifted + 1, len(data), arena, MLP.arena_bytes) == lib.MOTE_ERR_ARGUMENT
    buffer = ffi.from_buffer(data)
    assert lib.mote_load(mote, buffer, len(data), ffi.cast("char *", arena) + 1, MLP.arena_bytes) == lib.MOTE_ERR_ARENA
    assert lib.mote_load(mote, ffi.NULL, len(data), arena, MLP.arena_bytes) == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_load(ffi.NULL, buffer, len(data), arena, MLP.arena_bytes) == lib.MOTE_ERR_ARGUMENT


def test_more_layers_than_a_mask_has_bits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfleet.edge.model.assemble.MAX_LAYERS", 1000)
    assert load(build([Dense(1)] * 32, (1,), "mse").data) == lib.MOTE_OK
    assert load(build([Dense(1)] * 33, (1,), "mse").data) == lib.MOTE_ERR_FORMAT


@given(hostile(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_a_hostile_program_is_refused_or_stays_in_its_arena(data: bytes, seed: int) -> None:
    buffer = ffi.from_buffer(data)
    need = lib.mote_arena_bytes(buffer, len(data))
    assert need % 4 == 0
    if need > 1 << 20:
        return
    guard = 64
    arena = np.full(need // 4 + 2 * guard, 7.0, np.float32)
    mote = ffi.new("mote_t *")
    start = ffi.cast("float *", ffi.from_buffer(arena)) + guard
    code = lib.mote_load(mote, buffer, len(data), start, need)
    if code == lib.MOTE_OK:
        x = np.random.default_rng(seed).normal(size=lib.mote_inputs(mote)).astype(np.float32)
        y = np.zeros(lib.mote_targets(mote), np.float32)
        loss, out = ffi.new("float *"), ffi.new("const void **")
        inferred = lib.mote_infer(mote, ffi.from_buffer("float[]", x), out)
        assert inferred in (lib.MOTE_OK, lib.MOTE_ERR_DIVERGED)
        pointers = ffi.from_buffer("float[]", x), ffi.from_buffer("float[]", y)
        for mask in {mote.trainable, mote.trainable & seed, 0}:
            assert lib.mote_train_mask(mote, mask, 0) == lib.MOTE_OK
            assert lib.mote_learn(mote, *pointers, 0.1, loss) in (lib.MOTE_OK, lib.MOTE_ERR_DIVERGED)
        outside = np.concatenate([arena[:guard], arena[len(arena) - guard :]])
    else:
        assert code in (lib.MOTE_ERR_FORMAT, lib.MOTE_ERR_CRC, lib.MOTE_ERR_UNSUPPORTED)
        outside = arena
    assert (outside == 7.0).all()


@given(st.binary(max_size=300))
def test_the_checksum_is_that_of_zlib(data: bytes) -> None:
    assert lib.mote_crc32(0, data, len(data)) == zlib.crc32(data)
    half = len(data) // 2
    assert lib.mote_crc32(lib.mote_crc32(0, data[:half], half), data[half:], len(data) - half) == zlib.crc32(data)


# The stream


def stream(counts: list[int], ways: int) -> tuple[object, object]:
    """A stream whose feature is the row's number, and what must be kept alive for it."""
    starts = np.cumsum([0, *counts]).astype(np.uint32)
    features = np.arange(starts[-1], dtype=np.uint8)
    s = ffi.new("mote_stream_t *")
    keep = ffi.from_buffer("uint8_t[]", features), ffi.from_buffer("uint32_t[]", starts)
    s.features, s.starts = keep
    s.classes, s.size, s.scale, s.ways = len(counts), 1, 1.0, ways
    return s, keep


def draw(s: object, query: int) -> tuple[int, int]:
    x, y = ffi.new("float *"), ffi.new("float *")
    lib.mote_stream_next(s, query, x, y)
    return int(x[0]), int(y[0])


@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_a_stream_draws_tasks_and_keeps_queries_apart(counts: list[int], ways: int, seed: int) -> None:
    s, _keep = stream(counts, ways)
    if ways > len(counts):
        assert lib.mote_stream_open(s, seed) == lib.MOTE_ERR_ARGUMENT
        return
    assert lib.mote_stream_open(s, seed) == lib.MOTE_OK
    chosen = list(s.chosen)[:ways]
    assert len(set(chosen)) == ways and all(c < len(counts) for c in chosen)
    starts = np.cumsum([0, *counts])
    for query in (0, 1):
        for _ in range(30):
            row, label = draw(s, query)
            first, last = starts[chosen[label]], starts[chosen[label] + 1]
            kept = max(1, (last - first) // 4)
            assert (last - kept <= row < last) if query else (first <= row < last - kept)


def test_a_seed_names_a_task() -> None:
    s, _keep = stream([4] * 50, 5)
    tasks = []
    for seed in [*range(200), *range(200)]:
        assert lib.mote_stream_open(s, seed) == lib.MOTE_OK
        tasks.append((tuple(list(s.chosen)[:5]), tuple(draw(s, 0) for _ in range(5))))
    assert tasks[:200] == tasks[200:]
    assert len(set(tasks)) == 200
    drawn = [c for task, _ in tasks[:200] for c in task]
    assert len(set(drawn)) == 50 and max(np.bincount(drawn)) < 45  # 20 each on average


def test_a_stream_refuses_a_class_of_one_sample() -> None:
    s, _keep = stream([4, 1, 4], 2)
    assert lib.mote_stream_open(s, 1) == lib.MOTE_ERR_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", ffi.NULL),
        ("starts", ffi.NULL),
        ("size", 0),
        ("ways", 0),
        ("ways", lib.MOTE_STREAM_MAX_WAYS + 1),
        ("scale", math.nan),
        ("scale", math.inf),
        ("fixed", 1),  # two of fifty classes
        ("values", ffi.new("float *")),  # beside the bytes
        ("targets", ffi.new("float *")),  # of no outputs
    ],
)
def test_a_stream_that_cannot_be_is_refused(field: str, value: object) -> None:
    s, _keep = stream([4] * 50, 2)
    assert lib.mote_stream_open(s, 1) == lib.MOTE_OK
    setattr(s, field, value)
    assert lib.mote_stream_open(s, 1) == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_stream_open(ffi.NULL, 1) == lib.MOTE_ERR_ARGUMENT


def test_a_stream_whose_classes_run_backwards_is_refused() -> None:
    s, keep = stream([4, 4, 4], 2)
    keep[1][1] = 9
    assert lib.mote_stream_open(s, 1) == lib.MOTE_ERR_ARGUMENT
