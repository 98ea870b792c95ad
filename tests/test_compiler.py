"""Keras models as programs: the same outputs, the same learning step, clear words for what the engine cannot run."""

from __future__ import annotations

import numpy as np
import pytest
from keras_nets import (
    L,
    branchy,
    cnn,
    flat,
    image,
    keras,
    mlp,
    nested,
    normalised,
    randomise,
    regression,
    sample,
    scores,
    sequence,
    soft_values,
    values,
    yes_or_no,
)

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import LOSSES
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.firmware_tools.compiler import compile as compiler
from tinyfleet.firmware_tools.readers import keras_reader
from tinyfleet.firmware_tools.readers.common import CompileError

SIMPLE = [mlp, cnn, nested, regression, scores]


@pytest.mark.parametrize("make", [*SIMPLE, branchy, sequence, normalised, values, yes_or_no, soft_values])
def test_a_program_computes_what_keras_computes(make):
    model = randomise(make())
    learner = MoteLearner(compiler.compile_model(model))
    for seed in range(5):
        x = sample(model, seed)
        expected = model(x[None]).numpy()[0]
        if make is scores:  # the engine's output is the softmax of the scores
            expected = np.exp(expected) / np.exp(expected).sum()
        if make is yes_or_no:  # or the sigmoid
            expected = 1 / (1 + np.exp(-expected))
        np.testing.assert_allclose(learner.infer(x), expected, rtol=0, atol=1e-6 if make in SIMPLE else 1e-5)


TARGETS = {
    regression: [0.5, -1.0],
    values: [0.1, -2.0, 0.5],
    yes_or_no: [1.0, 0.0, 1.0],
    soft_values: [0.2, 0.5, 0.3],
}


@pytest.mark.parametrize("make", [mlp, cnn, nested, regression, branchy, values, yes_or_no, soft_values])
def test_steps_on_the_device_are_steps_in_keras(make):
    model = randomise(make())
    learner = MoteLearner(compiler.compile_model(model))
    compiled = model.loss if make in TARGETS else "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.1), compiled)
    y = np.float32(TARGETS[make]) if make in TARGETS else np.int64(2)
    steps = 12 if make is branchy else 3
    for seed in range(steps):
        x = sample(model, seed)
        if make is branchy:
            y = np.int64(seed % 3)
            expected = train_without_dropout(model, x, y)
        else:
            expected = model.train_on_batch(x[None], y[None])
        assert learner.learn(x, y, 0.1) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    after = keras_reader.weights_from_keras(model)
    for name, value in learner.program.split(learner.parameters).items():
        np.testing.assert_allclose(value, after[name], rtol=0, atol=2e-6 if steps == 3 else 1e-5, err_msg=name)


def train_without_dropout(model, x, y):
    """A step of TensorFlow's on the model as it is in inference."""
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = keras.losses.sparse_categorical_crossentropy(y[None], model(x[None], training=False))[0]
    model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    return float(loss)


def test_a_file_gives_the_same_program_as_the_model(tmp_path):
    model = randomise(nested())
    model.save(tmp_path / "model.keras")
    assert compiler.compile_model(tmp_path / "model.keras") == compiler.compile_model(model)


def test_what_trains_is_what_keras_trains_or_what_is_asked_for():
    model = randomise(cnn())
    assert compiler.compile_model(model).n_params == model.count_params()
    head = compiler.compile_model(model, train_from=model.layers[-2].name)
    assert [name for name, _ in head.parameters] == ["dense_3/weights", "dense_3/bias"]
    x = sample(model)
    np.testing.assert_allclose(MoteLearner(head).infer(x), model(x[None])[0], rtol=0, atol=1e-6)
    assert [name for name, _ in compiler.compile_model(nested()).parameters] == ["dense_1/weights", "dense_1/bias"]
    with pytest.raises(CompileError, match="named 'tail'; the model has: conv2d"):
        compiler.compile_model(model, train_from="tail")
    biases = compiler.compile_model(branchy(), train_from="point", bias_only=True)
    assert [name for name, _ in biases.parameters] == [f"{layer}/bias" for layer in
                                                       ("conv2d_2", "conv2d_3", "conv2d_4", "dense_5")]  # fmt: skip
    with pytest.raises(CompileError, match="bias-only training needs the layer"):
        compiler.compile_model(model, bias_only=True)


def test_a_batch_normalization_does_not_train_but_what_is_behind_it_does():
    model = randomise(normalised())
    assert compiler.compile_model(model).n_params > 0  # frozen: folded, and the convolution trains
    alone = compiler.compile_model(model, train_from="conv")
    assert [name for name, _ in alone.parameters] == [
        f"{layer}/{array}" for layer in ("conv2d_1", "depthwise_3", "dense_4") for array in ("weights", "bias")
    ]
    model.get_layer("folded").trainable = True
    words = r"'folded' \(BatchNormalization\) would have to train.*trainable = False.*--train-from"
    for options in ({}, {"train_from": "conv"}, {"train_from": "conv", "bias_only": True}):
        with pytest.raises(CompileError, match=words):
            compiler.compile_model(model, **options)
    head = compiler.compile_model(model, train_from="deep")
    x = sample(model)
    np.testing.assert_allclose(MoteLearner(head).infer(x), model(x[None])[0], rtol=0, atol=1e-5)
    takes = compiler.plan_model(model)
    assert takes.trainable is None
    assert list(takes.train_from) == ["deep", "head"]
    assert any("'folded'" in note for note in takes.notes)


def test_a_keras_head_gets_other_classes_and_momentum():
    model = randomise(branchy())
    old = compiler.compile_model(model, train_from="head")
    x = sample(model)
    new = MoteLearner(compiler.compile_model(model, train_from="head", classes=2, max_classes=5, momentum=True))
    np.testing.assert_array_equal(new.infer(x), np.full(2, 0.5, np.float32))
    assert new.grow() == 3
    assert new.program.momentum_bytes == new.program.params_bytes == 4 * 5 * 9
    roomy = MoteLearner(compiler.compile_model(model, train_from="head", max_classes=4))
    np.testing.assert_array_equal(roomy.infer(x), MoteLearner(old).infer(x))
    whole = compiler.compile_model(model, classes=4, loss="softmax_cross_entropy")
    assert whole.n_params == compiler.compile_model(model).n_params + 9
    biases = compiler.compile_model(model, train_from="side", bias_only=True, classes=4)
    assert biases.parameters[-2][0] == "dense_5/weights"  # a new head's weights are 0: its biases alone would not do


def test_one_architecture_has_one_model_id():
    ids = {compiler.compile_model(randomise(mlp(), s), architecture_only=True).model_id for s in range(3)}
    assert len(ids) == 1
    assert len({compiler.compile_model(randomise(mlp(), s)).model_id for s in range(3)}) == 3


@pytest.mark.parametrize("make", [cnn, branchy, sequence])
@pytest.mark.parametrize("options", [{}, {"momentum": True, "max_classes": 12}, {"loss": "mse"}])
def test_the_plan_is_what_the_programs_take(make, options):
    if make is sequence and options.get("max_classes"):
        options = options | {"max_classes": 2}
    model = make()
    takes = compiler.plan_model(model, **options)
    assert takes.parameters == len(np.concatenate([w.ravel() for w in keras_reader.weights_from_keras(model).values()]))
    weighted = [layer.name for layer in model.layers if layer.weights]
    assert list(takes.train_from) == list(takes.bias_from) == weighted
    for bias_only, rows in ((False, takes.train_from), (True, takes.bias_from)):
        for name, memory in rows.items():
            program = compiler.compile_model(model, train_from=name, bias_only=bias_only, **options)
            assert (memory.parameters, memory.ram_bytes, memory.initial_bytes) == (
                program.n_params,
                program.arena_bytes,
                len(program.data),
            )
            assert memory.params_bytes == program.params_bytes
            assert memory.momentum_bytes == program.momentum_bytes
            assert memory.least_ram_bytes <= memory.ram_bytes
            lean = compiler.compile_model(
                model, train_from=name, bias_only=bias_only, architecture_only=True, **options
            )
            assert memory.flash_bytes == len(lean.data)
    assert takes.trainable == takes.train_from[weighted[0]]
    ram = [memory.ram_bytes for memory in takes.train_from.values()]
    assert ram == sorted(ram, reverse=True)
    assert takes.run.ram_bytes < ram[-1]
    assert all(takes.bias_from[name].ram_bytes <= memory.ram_bytes for name, memory in takes.train_from.items())


def test_running_takes_what_a_program_without_training_takes():
    model = cnn()
    takes = compiler.plan_model(model)
    assert takes.parameters == model.count_params()
    model.trainable = False
    program = compiler.compile_model(model)
    assert (takes.run.ram_bytes, takes.run.initial_bytes) == (program.arena_bytes, len(program.data))
    assert takes.macs == sum(layer.macs for layer in program.layers)


def test_a_budget_chooses_the_most_that_fits():
    model = branchy()
    takes = compiler.plan_model(model)
    rows = [*takes.train_from.values(), *takes.bias_from.values()]
    for budget in sorted({row.ram_bytes + more for row in rows for more in (-1, 0, 1)}):
        fitting = [row for row in rows if row.ram_bytes <= budget]
        if not fitting:
            with pytest.raises(CompileError, match=f"{budget:,} bytes are too few: {budget + 1:,} is the least"):
                compiler.select_trained_layers(model, budget)
            continue
        chosen = compiler.select_trained_layers(model, budget)
        assert chosen.memory.params_bytes == max(row.params_bytes for row in fitting)
        program = compiler.compile_model(model, train_from=chosen.train_from, bias_only=chosen.bias_only)
        assert program.arena_bytes == chosen.memory.ram_bytes <= budget


def test_weights_go_out_and_back():
    source, target = randomise(nested(), 1), randomise(nested(), 2)
    weights = keras_reader.weights_from_keras(source)
    assert weights["conv2d_0/weights"].shape == (3, 3, 3, 1)
    assert weights["dense_1/weights"].shape == (4, 12)
    keras_reader.weights_to_keras(target, weights)
    for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CompileError, match="no weights 'dense_9/bias'"):
        keras_reader.weights_to_keras(target, {"dense_9/bias": np.zeros(4, np.float32)})
    with pytest.raises(CompileError, match=r"'dense_1/bias' has shape \(5,\), but the model's is \(4,\)"):
        keras_reader.weights_to_keras(target, {"dense_1/bias": np.zeros(5, np.float32)})
    source, target = randomise(branchy(), 1), randomise(branchy(), 2)
    keras_reader.weights_to_keras(target, keras_reader.weights_from_keras(source))
    for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CompileError, match=r"'conv' .* batch normalization 'folded' folded into it"):
        keras_reader.weights_to_keras(normalised(), {"conv2d_1/bias": np.zeros(4, np.float32)})


def test_what_a_device_learned_goes_back_into_keras():
    model = randomise(nested())
    learner = MoteLearner(compiler.compile_model(model))
    x = sample(model)
    learner.learn(x, 1, 0.5)
    keras_reader.weights_to_keras(model, learner.program.split(learner.parameters))
    np.testing.assert_allclose(model(x[None])[0], learner.infer(x), rtol=0, atol=1e-6)


def branching():
    inputs = keras.Input((8,))
    return keras.Model(inputs, L.Dense(3, "softmax")(L.Add()([L.Dense(4)(inputs), L.Dense(4)(inputs)])))


def shared():
    inputs, layer = keras.Input((8,)), L.Dense(8, name="twice")
    return keras.Model(inputs, L.Dense(3, "softmax")(layer(layer(inputs))))


def two_inputs():
    a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
    return keras.Model([a, b], L.Dense(3, "softmax")(L.Concatenate()([a, b])))


def two_outputs():
    inputs = keras.Input((8,))
    hidden = L.Dense(4, name="hidden")(inputs)
    return keras.Model(inputs, [hidden, L.Dense(3, "softmax")(hidden)])


def subclassed():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = L.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Mine()
    model(np.zeros((1, 4), np.float32))
    return model


def wrong_loss():
    model = flat()
    model.compile(loss="kl_divergence")
    return model


def cropped():
    return image(L.Conv2D(2, 3, name="conv"), L.Cropping2D(1, name="cut"))


SUPPORTED = "Supported: Dense, Conv1D, Conv2D"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: image(L.BatchNormalization(name="norm")), ["'norm'", "BatchNormalization", "have to train"]),
        (lambda: image(L.BatchNormalization(axis=1, name="norm")), ["'norm'", "axis 1", "the last one"]),
        (lambda: image(L.Conv2DTranspose(3, 3, name="up")), ["'up'", "Conv2DTranspose", SUPPORTED]),
        (lambda: flat(L.ReLU(5, name="five")), ["'five'", "ReLU", "plain ReLU()"]),
        (lambda: flat(L.Dense(4, "gelu", name="g")), ["'g'", "gelu", "Supported: linear, relu"]),
        (lambda: flat(L.Dense(4, lambda x: x * 2, name="mine")), ["'mine'", "not supported"]),
        (lambda: flat(L.Dense(4, L.PReLU(), name="layer")), ["'layer'", "PReLU", "Supported: linear, relu"]),
        (lambda: image(L.Conv2D(2, 3, groups=2, name="split")), ["'split'", "groups=1"]),
        (lambda: image(L.Conv2D(2, 1, data_format="channels_first", name="cf")), ["'cf'", "channels_last"]),
        (lambda: image(L.Conv2D(2, 3, dtype="mixed_float16", name="half")), ["'half'", "mixed_float16", "float32"]),
        (lambda: keras.Sequential([keras.Input((None, 8, 1)), L.Conv2D(2, 3)]), ["input", "None", "(height, width"]),
        (lambda: keras.Sequential([L.Dense(3)]), ["keras.Input(shape)"]),
        (lambda: keras.Sequential([keras.Input((4,)), L.ReLU()]), ["no layer with weights"]),
        (lambda: keras.Sequential([keras.Input((4,)), L.Dense(3)]), ["no softmax", "softmax_cross_entropy", "mse"]),
        (wrong_loss, ["ends in a softmax", "kl_divergence", "choose the loss softmax_cross_entropy"]),
        (cropped, ["'cut'", "lets no gradient through"]),
        (shared, ["'twice'", "used more than once"]),
        (two_inputs, ["2 inputs"]),
        (two_outputs, ["2 outputs"]),
        (subclassed, ["Mine", "keras.Sequential or the functional API"]),
        (lambda: 42, ["expected a Keras model", "int"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_model_that_cannot_be_compiled_is_refused_in_one_line(make, words):
    with pytest.raises(UserError) as refusal:
        compiler.compile_model(make())
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "make",
    [
        lambda: image(L.DepthwiseConv2D(3, depth_multiplier=2, strides=2), L.SeparableConv2D(3, 2, padding="same")),
        lambda: image(L.Conv2D(2, 3, dilation_rate=2), L.SpatialDropout2D(0.5)),
        lambda: image(L.Conv2D(3, 3, activation="softmax"), L.Dense(4, "relu")),
        lambda: image(L.ZeroPadding2D(1), L.MaxPooling2D(3, 2, padding="same"), L.Reshape((2, -1)), L.Conv1D(2, 2)),
        lambda: image(L.GlobalAveragePooling2D(keepdims=True), L.Conv2D(2, 1, activation=L.LeakyReLU(0.05))),
        lambda: flat(L.Dropout(0.5), L.Dense(4, use_bias=False), L.LeakyReLU(), L.GaussianNoise(1.0)),
        lambda: flat(L.ReLU(6), L.Dense(4), L.ReLU(negative_slope=0.2), L.Softmax(), L.LayerNormalization()),
        lambda: keras.Sequential([keras.Input((4, 4)), L.Dense(3, "softmax"), L.Flatten(), L.Dense(2, "softmax")]),
        branching,
    ],
)
def test_layers_of_many_kinds_compute_what_keras_computes(make):
    model = randomise(make())
    learner = MoteLearner(compiler.compile_model(model))
    for seed in range(3):
        x = sample(model, seed)
        np.testing.assert_allclose(learner.infer(x), np.ravel(model(x[None])), rtol=0, atol=1e-5)


def test_a_chosen_loss_settles_what_the_model_leaves_open():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    assert compiler.compile_model(model, loss="mse").loss == "mse"
    for loss in LOSSES:
        assert compiler.compile_model(model, loss=loss).loss == loss
    with pytest.raises(CompileError, match="unknown loss 'hinge'"):
        compiler.compile_model(model, loss="hinge")
    with pytest.raises(CompileError, match="ends in a softmax"):
        compiler.compile_model(mlp(), loss="binary_cross_entropy")
