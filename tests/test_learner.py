"""Learning beyond the plain step: momentum, decay and clipping, growing heads, int8 models, many devices at once, and
numbers at the ends of what a float can be."""

import math
from typing import Any

import numpy as np
import pytest
import small_models
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyfleet.edge._mote import lib
from tinyfleet.edge.model.graph import LOSSES, Loss
from tinyfleet.edge.model.layers import (
    AvgPool2D,
    Conv2D,
    Dense,
    DepthwiseConv2D,
    Flatten,
    Layer,
    LayerNorm,
    LeakyReLU,
    MaxPool2D,
    ReLU6,
    Sigmoid,
    Softmax,
    Tanh,
    build,
)
from tinyfleet.edge.model.learner import LearnerError, MoteLearner, learn_many
from tinyfleet.edge.model.program import Program

Vector = NDArray[np.float32]
LAYERS: list[Layer] = [Dense(5), Tanh(), Dense(3)]
MLP = build(LAYERS, (4,), "softmax_cross_entropy")


def heavy(loss: Loss = "softmax_cross_entropy") -> Program:
    return build(LAYERS, (4,), loss, momentum=True)


def gradient(program: Program, parameters: Vector, x: Vector, y: int) -> NDArray[np.float64]:
    """What a plain step of rate 1 takes away."""
    learner = MoteLearner(program)
    learner.set_parameters(parameters)
    learner.learn(x, y, 1.0)
    return parameters.astype(np.float64) - learner.parameters


# Momentum, weight decay, clipping


@given(
    st.sampled_from([0.0, 0.5, 0.9]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([0.0, 0.1, 1.0, 100.0]),
    st.sampled_from([(0b11, 0b00), (0b10, 0b00), (0b01, 0b00), (0b11, 0b01), (0b11, 0b11)]),
    st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_a_step_is_that_of_the_formula(
    momentum: float, decay: float, clip: float, what: tuple[int, int], seed: int
) -> None:
    random = np.random.default_rng(seed)
    program = heavy()
    learner = MoteLearner(program, momentum=momentum, weight_decay=decay, clip_norm=clip)
    learner.mask, learner.biases_only = what
    sizes = [math.prod(shape) for _, shape in program.parameters]
    trains = np.repeat(
        [what[0] >> i & 1 and not (what[1] >> i & 1 and kind == 0) for i in (0, 1) for kind in (0, 1)], sizes
    )
    parameters = program.initial(seed).astype(np.float32)
    learner.set_parameters(parameters)
    velocity = np.zeros(program.n_params)
    for _ in range(4):
        x, y = random.normal(size=4).astype(np.float32), int(random.integers(3))
        before = learner.parameters
        g = gradient(program, before, x, y) * trains
        norm = np.linalg.norm(g)
        if clip and norm > clip:
            g *= clip / norm
        velocity = momentum * velocity + (g + decay * before) * trains
        learner.learn(x, y, 0.2)
        assert np.allclose(learner.parameters, before - 0.2 * velocity, rtol=0, atol=2e-6)
        assert np.array_equal(learner.parameters[trains == 0], before[trains == 0])


def test_a_limit_that_is_not_reached_changes_no_bit() -> None:
    free, limited = MoteLearner(MLP), MoteLearner(MLP, clip_norm=1e6)
    random = np.random.default_rng(3)
    for learner in (free, limited):
        learner.set_parameters(MLP.initial(3))
    for _ in range(10):
        x, y = random.normal(size=4), random.integers(3)
        assert free.learn(x, y, 0.1) == limited.learn(x, y, 0.1)
    assert np.array_equal(free.parameters, limited.parameters)


def test_set_parameters_stops_the_momentum() -> None:
    learner, fresh = (MoteLearner(heavy(), momentum=0.9) for _ in range(2))
    x = np.ones(4, np.float32)
    for _ in range(3):
        learner.learn(x, 1, 0.1)
    for each in (learner, fresh):
        each.set_parameters(MLP.initial(1))
        each.learn(x, 2, 0.1)
    assert np.array_equal(learner.parameters, fresh.parameters)


@pytest.mark.parametrize(
    ("program", "settings_", "code"),
    [
        (MLP, {"momentum": 0.9}, lib.MOTE_ERR_FROZEN),
        (small_models.quantised_training(), {"clip_norm": 1.0}, lib.MOTE_ERR_FROZEN),
        (heavy(), {"momentum": 1.0}, lib.MOTE_ERR_ARGUMENT),
        (heavy(), {"momentum": -0.1}, lib.MOTE_ERR_ARGUMENT),
        (heavy(), {"momentum": math.nan}, lib.MOTE_ERR_ARGUMENT),
        (heavy(), {"weight_decay": 10.0}, lib.MOTE_ERR_ARGUMENT),
        (heavy(), {"weight_decay": -0.1}, lib.MOTE_ERR_ARGUMENT),
        (heavy(), {"clip_norm": math.nan}, lib.MOTE_ERR_ARGUMENT),
    ],
)
def test_an_optimiser_that_cannot_be_is_refused(program: Program, settings_: dict[str, float], code: int) -> None:
    learner = MoteLearner(program, **settings_)
    before = learner.parameters
    x = np.ones(program.input_shape, np.int8 if program.input.dtype == "int8" else np.float32)
    with pytest.raises(LearnerError) as error:
        learner.learn(x, 1, 0.1)
    assert error.value.code == code
    assert np.array_equal(learner.parameters, before)


# Growing


def test_a_head_grows_a_class_and_learns_it() -> None:
    program = build([Dense(4)], (8,), "softmax_cross_entropy", classes=2)
    learner = MoteLearner(program)
    random = np.random.default_rng(0)
    patterns = random.normal(size=(4, 8))
    for classes in (2, 3, 4):
        assert learner.outputs == classes == learner.infer(patterns[0]).size
        with pytest.raises(LearnerError, match="no class"):
            learner.learn(patterns[0], classes, 0.1)
        for step in range(60 * classes):
            label = step % classes
            learner.learn(patterns[label] + 0.2 * random.normal(size=8), label, 0.2)
        assert [int(learner.infer(pattern).argmax()) for pattern in patterns[:classes]] == list(range(classes))
        unused = program.split(learner.parameters)["dense_0/weights"][classes:]
        assert not unused.any(), "a class that is not there yet is not touched"
        if classes < 4:
            assert learner.grow() == classes + 1
    with pytest.raises(LearnerError, match="another class") as error:
        learner.grow()
    assert error.value.code == lib.MOTE_ERR_FROZEN


def test_a_small_head_is_to_the_bit_a_grown_one_less_a_class() -> None:
    """A program that keeps room behaves as one built for just the classes in use."""
    whole = MoteLearner(build([Dense(3)], (8,), "mse", classes=2))
    small = MoteLearner(build([Dense(2)], (8,), "mse"))
    random = np.random.default_rng(1)
    for _ in range(20):
        x, y = random.normal(size=8), random.normal(size=2)
        assert whole.learn(x, y, 0.05) == small.learn(x, y, 0.05)
        assert np.array_equal(whole.infer(x), small.infer(x))
    assert whole.grow() == 3
    with pytest.raises(LearnerError, match="2 numbers; this model takes 3"):
        whole.learn(x, y, 0.05)


# int8


def test_int8_models_take_and_give_int8() -> None:
    program = small_models.int8_rest()
    learner = MoteLearner(program)
    output = learner.infer(np.ones(program.input_shape, np.int8))
    assert output.dtype == np.int8 and output.shape == (3,)
    for other in (np.ones(program.input_shape, np.float32), np.ones(program.input_shape, int)):
        with pytest.raises(LearnerError, match="takes int8"):
            learner.infer(other)
    with pytest.raises(LearnerError) as error:
        learner.learn(np.ones(program.input_shape, np.int8), np.zeros(3), 0.1)
    assert error.value.code == lib.MOTE_ERR_FROZEN, "it has no loss"


@pytest.mark.parametrize("name", small_models.MODELS)
def test_parameters_have_the_programs_shapes_and_go_back_as_they_came(name: str) -> None:
    learner = MoteLearner(small_models.MODELS[name]())
    vector = learner.parameters
    assert vector.shape == (learner.program.n_params,)
    learner.program.split(vector)
    carried = learner._arena[: learner.program.params_bytes].copy()
    learner.set_parameters(vector)
    assert np.array_equal(learner._arena[: learner.program.params_bytes], carried)


def test_int8_weights_are_real_numbers_outside() -> None:
    program = small_models.quantised_training()
    learner = MoteLearner(program)
    names = program.split(learner.parameters)
    weights = next(name for name, shape in program.parameters if shape == (4, 8))
    steps = np.array(
        [np.diff(np.unique(row)).min() for row in names[weights]]
    )  # a channel's scale, if two are neighbours
    far = {**names, weights: np.where(names[weights] > 0, 100.0, -100.0).astype(np.float32)}
    learner.set_parameters(program.join(far))
    held = program.split(learner.parameters)[weights]
    assert np.array_equal(np.sign(held), np.sign(far[weights]))
    scales = np.abs(held[:, 0]) / 127
    assert np.allclose(np.abs(held), 127 * scales[:, None]), "saturated"
    assert (np.round(steps / scales) >= 1).all() and np.allclose(steps / scales, np.round(steps / scales), atol=1e-3)
    near = {**names, weights: (names[weights] + 0.4 * scales[:, None]).astype(np.float32)}
    learner.set_parameters(program.join(near))
    kept = np.abs(program.split(learner.parameters)[weights] - names[weights])
    assert (kept < 0.01 * scales[:, None]).all(), "rounded to the nearest"


# Many devices


def fleet(count: int) -> list[MoteLearner]:
    learners = [MoteLearner(MLP) for _ in range(count)]
    for i, learner in enumerate(learners):
        learner.set_parameters(MLP.initial(i))
    return learners


@pytest.mark.parametrize("threads", [1, 2, 5, None])
def test_many_devices_learn_the_bits_of_each_by_itself(threads: int | None) -> None:
    random = np.random.default_rng(0)
    xs, ys = random.normal(size=(7, 20, 4)).astype(np.float32), random.integers(0, 3, (7, 20))
    together, alone = fleet(7), fleet(7)
    losses = learn_many(together, xs, ys, 0.1, threads=threads)
    expected = [
        [learner.learn(x, y, 0.1) for x, y in zip(*s, strict=True)]
        for learner, s in zip(alone, zip(xs, ys, strict=True), strict=True)
    ]
    assert np.array_equal(losses, np.float32(expected))
    for a, b in zip(together, alone, strict=True):
        assert np.array_equal(a.parameters, b.parameters)


def test_many_devices_of_int8_and_of_several_targets() -> None:
    program = small_models.int8_with_head()
    learners = [MoteLearner(program) for _ in range(2)]
    xs = np.random.default_rng(0).integers(-128, 128, (2, 3, *program.input_shape)).astype(np.int8)
    assert learn_many(learners, xs, [[0, 1, 2], [3, 2, 1]], 0.1).shape == (2, 3)
    assert not np.array_equal(learners[0].parameters, learners[1].parameters)
    regression = MoteLearner(build(LAYERS, (4,), "mse"))
    assert learn_many([regression], np.ones((1, 2, 4)), np.ones((1, 2, 3)), 0.1)[0, 1] < 1.0


def test_what_many_devices_cannot_learn_is_refused_and_the_others_learn() -> None:
    learners = fleet(2)
    xs, ys = np.ones((2, 3, 4), np.float32), np.zeros((2, 3))
    for wrong_xs, wrong_ys in ((xs[:1], ys), (xs[..., :3], ys), (xs, ys[:, :2]), (xs[0], ys)):
        with pytest.raises(LearnerError, match=r"take \(2, steps, 4\)"):
            learn_many(learners, wrong_xs, wrong_ys, 0.1)
    with pytest.raises(LearnerError, match="twice"):
        learn_many([learners[0]] * 2, xs, ys, 0.1)
    with pytest.raises(LearnerError, match="differ"):
        learn_many([learners[0], MoteLearner(build([Dense(3)], (5,), "softmax_cross_entropy"))], xs, ys, 0.1)
    with pytest.raises(LearnerError, match="at least one"):
        learn_many([], xs, ys, 0.1)
    before = [learner.parameters for learner in learners]
    xs[0, 1, 2] = np.nan
    with pytest.raises(LearnerError) as error:
        learn_many(learners, xs, ys, 0.1)
    assert error.value.code == lib.MOTE_ERR_ARGUMENT
    assert all(not np.array_equal(learner.parameters, b) for learner, b in zip(learners, before, strict=True))


# Numbers at the ends


def everything(loss: Loss) -> Program:
    """A model of every kind of float32 layer, with room for the momentum."""
    layers: list[Layer] = [
        Conv2D(3, 2, padding="same"),
        LeakyReLU(0.1),
        DepthwiseConv2D(2),
        Sigmoid(),
        MaxPool2D(2, 1),
        LayerNorm(),
        AvgPool2D(2, 1, "same"),
        Flatten(),
        Dense(5),
        Softmax(),
        Dense(4),
        ReLU6(),
        Dense(3),
        Tanh(),
    ]
    return build(layers, (4, 4, 2), loss, momentum=True)


OPTIMISERS: dict[str, dict[str, float]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "clipped": {"clip_norm": 0.1},
}
CASES = [(everything(loss), name) for loss in LOSSES for name in OPTIMISERS]
CASES += [(make(), "plain") for make in (small_models.int8_weights, small_models.quantised_training)]
CASES += [(small_models.int8_with_head(), name) for name in ("plain", "clipped")]


@pytest.mark.parametrize(
    ("program", "optimiser"),
    CASES,
    ids=[f"{program.loss}, {program.input.dtype}, {name}" for program, name in CASES],
)
def test_what_is_not_a_number_is_an_error_and_leaves_no_trace(program: Program, optimiser: str) -> None:
    """Such samples, targets and rates between good ones change nothing, bit by bit: weights, momentum and the
    generator that rounds are as they were."""
    clean, tried = (MoteLearner(program, **OPTIMISERS[optimiser]) for _ in range(2))
    random = np.random.default_rng(0)
    if not program.data[21] & 1:  # carries no initial values
        for learner in (clean, tried):
            learner.set_parameters(program.initial(1))
    is_float = program.input.dtype == "float32"
    targets, kept = tried._targets, program.params_bytes + program.momentum_bytes
    for step in range(6):
        x = random.normal(size=program.input_shape).astype(np.float32)
        x = x if is_float else (x * 60).clip(-128, 127).astype(np.int8)
        y = np.float32([step % 3]) if program.loss == "softmax_cross_entropy" else random.random(targets, np.float32)
        for bad in (math.nan, math.inf, -math.inf):
            wrong: list[tuple[Any, Any, float]] = [
                (x, y, bad),
                (x, np.where(np.arange(targets) == step % targets, bad, y), 0.1),
            ]
            if is_float:
                spoilt = x.copy()
                spoilt.flat[random.integers(x.size)] = bad
                wrong.append((spoilt, y, 0.1))
            before = tried._arena[:kept].tobytes()
            for x_, y_, rate in wrong:
                with pytest.raises(LearnerError) as error:
                    tried.learn(x_, y_, rate)
                assert error.value.code in (lib.MOTE_ERR_ARGUMENT, lib.MOTE_ERR_TARGET)
                assert tried._arena[:kept].tobytes() == before
        start = clean.parameters.tobytes()
        assert clean.learn(x, y, 0.1) == tried.learn(x, y, 0.1)
        assert clean._arena[:kept].tobytes() == tried._arena[:kept].tobytes()
        assert clean.parameters.tobytes() != start


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_loss_that_is_not_finite_leaves_weights_and_momentum(loss: Loss, optimiser: str) -> None:
    """Weights so large that the logits, or their squares, are not finite."""
    learner = MoteLearner(build([Dense(4), Dense(3)], (2,), loss, momentum=True), **OPTIMISERS[optimiser])
    learner.set_parameters(np.full(27, 1e30, np.float32))
    before = learner._arena[: 2 * 27 * 4].tobytes()
    y = 1 if loss == "softmax_cross_entropy" else [1.0, 0.0, 1.0]
    with pytest.raises(LearnerError) as error:
        learner.learn([1.0, -0.5], y, 0.1)
    assert error.value.code == lib.MOTE_ERR_DIVERGED
    assert learner._arena[: 2 * 27 * 4].tobytes() == before


@pytest.mark.parametrize("loss", LOSSES)
def test_inputs_and_weights_at_the_small_end_learn_finite_numbers(loss: Loss) -> None:
    """Denormal samples, denormal weights, all-zero samples: through layer norm, softmax and every activation."""
    program = everything(loss)
    learner = MoteLearner(program)
    y = np.float32([1]) if loss == "softmax_cross_entropy" else np.float32([1.0, 0.0, 0.5])
    for weights in (program.initial(2), np.full(program.n_params, 1e-40, np.float32), np.zeros(program.n_params)):
        learner.set_parameters(weights)
        for size in (0.0, 1e-45, 1e-39, 1e-20):
            assert math.isfinite(learner.learn(np.full(program.input_shape, size, np.float32), y, 0.1))
            assert np.isfinite(learner.parameters).all() and np.isfinite(learner.infer(np.zeros((4, 4, 2)))).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [1e4, 1e20, 1e38])
def test_large_logits_give_a_loss_or_an_error_and_never_spoil_the_weights(loss: Loss, size: float) -> None:
    learner = MoteLearner(build([Dense(3)], (2,), loss))
    learner.set_parameters([size, -size, -size, size, size, size, 0, 0, 0])
    before = learner.parameters
    y = 1 if loss == "softmax_cross_entropy" else [1.0, 0.0, 1.0]
    try:
        learner.learn([1.0, -1.0], y, 1e-3)
    except LearnerError as error:
        assert (error.code == lib.MOTE_ERR_DIVERGED and size == 1e38) or loss in ("mse", "huber")
        assert np.array_equal(learner.parameters, before)
    assert np.isfinite(learner.parameters).all()
    output = learner.infer([1.0, -1.0])
    if loss in ("softmax_cross_entropy", "binary_cross_entropy"):
        assert np.isnan(output).any() or ((output >= 0) & (output <= 1)).all()


def test_the_binary_loss_is_right_where_the_output_has_rounded_to_0_or_1() -> None:
    learner = MoteLearner(build([Dense(1)], (1,), "binary_cross_entropy"))
    for z in (-80.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, 80.0):
        learner.set_parameters([z, 0.0])
        for t in (0.0, 0.25, 1.0):
            exact = max(z, 0.0) - z * t + math.log1p(math.exp(-abs(z)))
            assert learner.loss([1.0], t) == pytest.approx(exact, rel=1e-6)
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(LearnerError, match="labels"):
            learner.loss([1.0], wrong)


def test_denormal_numbers_count() -> None:
    """A device that took them for 0 would learn other bits than one that does not."""
    tiny = np.float32(1e-39)
    learner = MoteLearner(build([Dense(1)], (4,), "mse"))
    learner.set_parameters([tiny, 2 * tiny, 3 * tiny, 4 * tiny, 0.0])
    assert learner.infer(np.ones(4))[0] == np.float32(tiny + 3 * tiny) + np.float32(2 * tiny + 4 * tiny) > 0
    learner.set_parameters(np.zeros(5))
    learner.learn(np.full(4, tiny), [1.0], 0.25)
    assert learner.parameters.tolist() == [np.float32(0.5) * tiny] * 4 + [0.5]


def test_a_gradient_too_large_for_its_norm_is_an_error_and_teaches_nothing() -> None:
    learner = MoteLearner(build([Dense(1)], (4,), "mse"), clip_norm=1.0)
    x = np.full(4, 1e18, np.float32)
    with pytest.raises(LearnerError) as error:
        learner.learn(x, [1e18], 0.1)
    assert error.value.code == lib.MOTE_ERR_DIVERGED
    assert not learner.parameters.any()
