"""Keras models as programs: the same outputs, the same learning step, clear words for what the engine cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
from typer.testing import CliRunner

from edge.learner import MoteLearner
from edge.program import Program
from firmware_tools import compiler, model_cli
from firmware_tools.compiler import CompileError

pytest.importorskip("tensorflow", reason="reads Keras models, and Keras computes with TensorFlow, not installed here")
keras = pytest.importorskip("keras")
L = keras.layers


def mlp():
    return keras.Sequential(
        [keras.Input((64,)), L.Dense(32, "relu", name="hidden"), L.Dense(10, "softmax", name="head")]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((13, 11, 2)),
            L.Conv2D(5, 3, strides=(2, 1), padding="same", activation="relu"),
            L.MaxPooling2D(),
            L.Conv2D(4, (2, 3), activation="tanh"),
            L.AveragePooling2D((2, 1), strides=1, padding="same"),
            L.Flatten(),
            L.Dense(7),
            L.ReLU(),
            L.Dense(3),
            L.Softmax(),
        ]
    )


def nested():
    backbone = keras.Sequential(
        [keras.Input((8, 8, 1)), L.Conv2D(3, 3, name="conv"), L.Activation("tanh"), L.MaxPooling2D(3, 2)],
        name="backbone",
    )
    backbone.trainable = False
    inputs = keras.Input((8, 8, 1))
    outputs = L.Dense(4, "softmax", name="head")(L.Flatten()(backbone(inputs)))
    return keras.Model(inputs, outputs)


def regression():
    model = keras.Sequential([keras.Input((5, 3)), L.Flatten(), L.Dense(6, "tanh"), L.Dense(2)])
    model.compile(loss="mse")
    return model


def scores():
    model = keras.Sequential([keras.Input((6,)), L.Dense(5)])
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def randomise(model, seed=0):
    """Biases that are not 0 either."""
    random = np.random.default_rng(seed)
    model.set_weights([random.normal(0, 0.3, w.shape) for w in model.get_weights()])
    return model


def sample(model, seed=1):
    return np.random.default_rng(seed).normal(size=model.input_shape[1:]).astype(np.float32)


@pytest.mark.parametrize("make", [mlp, cnn, nested, regression, scores])
def test_a_program_computes_what_keras_computes(make):
    model = randomise(make())
    learner = MoteLearner(compiler.compile_model(model))
    for seed in range(5):
        x = sample(model, seed)
        expected = model(x[None]).numpy()[0]
        if make is scores:  # the engine's output is the softmax of the scores
            expected = np.exp(expected) / np.exp(expected).sum()
        np.testing.assert_allclose(learner.infer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [mlp, cnn, nested, regression])
def test_a_step_on_the_device_is_a_step_in_keras(make):
    model = randomise(make())
    learner = MoteLearner(compiler.compile_model(model))
    loss = "mse" if make is regression else "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.1), loss)
    y = np.float32([0.5, -1.0]) if make is regression else np.int64(2)
    for seed in range(3):
        x = sample(model, seed)
        expected = model.train_on_batch(x[None], y[None])
        assert learner.learn(x, y, 0.1) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    after = compiler.weights_from_keras(model)
    for name, value in learner.program.split(learner.parameters).items():
        np.testing.assert_allclose(value, after[name], rtol=0, atol=2e-6, err_msg=name)


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


def test_one_architecture_has_one_model_id():
    ids = {compiler.compile_model(randomise(mlp(), s), architecture_only=True).model_id for s in range(3)}
    assert len(ids) == 1
    assert len({compiler.compile_model(randomise(mlp(), s)).model_id for s in range(3)}) == 3


def test_the_plan_is_what_the_programs_take():
    model = cnn()
    network = compiler.read_network(model)
    takes = compiler.plan(network)
    weights = compiler.weights_from_keras(model)
    assert takes.parameters == model.count_params()
    assert takes.run.ram_bytes == network.program((), weights).arena_bytes
    assert list(takes.train_from) == [layer.name for layer in model.layers if layer.weights]
    for name, memory in takes.train_from.items():
        program = compiler.compile_model(model, train_from=name)
        assert (memory.parameters, memory.ram_bytes, memory.initial_bytes) == (
            program.n_params,
            program.arena_bytes,
            len(program.data),
        )
        lean = compiler.compile_model(model, train_from=name, architecture_only=True)
        assert memory.flash_bytes == len(lean.data)
    ram = [memory.ram_bytes for memory in takes.train_from.values()]
    assert ram == sorted(ram, reverse=True)
    assert takes.run.ram_bytes < ram[-1]


def test_weights_go_out_and_back():
    source, target = randomise(nested(), 1), randomise(nested(), 2)
    weights = compiler.weights_from_keras(source)
    assert weights["conv2d_0/weights"].shape == (3, 3, 3, 1)
    assert weights["dense_1/weights"].shape == (4, 12)
    compiler.weights_to_keras(target, weights)
    for a, b in zip(source.get_weights(), target.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CompileError, match="no weights 'dense_9/bias'"):
        compiler.weights_to_keras(target, {"dense_9/bias": np.zeros(4, np.float32)})
    with pytest.raises(CompileError, match=r"'dense_1/bias' has shape \(5,\), but the model's is \(4,\)"):
        compiler.weights_to_keras(target, {"dense_1/bias": np.zeros(5, np.float32)})


def test_what_a_device_learned_goes_back_into_keras():
    model = randomise(nested())
    learner = MoteLearner(compiler.compile_model(model))
    x = sample(model)
    learner.learn(x, 1, 0.5)
    compiler.weights_to_keras(model, learner.program.split(learner.parameters))
    np.testing.assert_allclose(model(x[None])[0], learner.infer(x), rtol=0, atol=1e-6)


def image(*layers):
    return keras.Sequential([keras.Input((8, 8, 2)), *layers, L.Flatten(), L.Dense(3, "softmax")])


def flat(*layers):
    return keras.Sequential([keras.Input((8,)), *layers, L.Dense(3, "softmax")])


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
    model.compile(loss="mse")
    return model


SUPPORTED = "Supported: InputLayer, Dense, Conv2D"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: image(L.BatchNormalization(name="norm")), ["'norm'", "BatchNormalization", SUPPORTED]),
        (lambda: image(L.DepthwiseConv2D(3, name="deep")), ["'deep'", "DepthwiseConv2D", SUPPORTED]),
        (lambda: flat(L.Dropout(0.5, name="drop")), ["'drop'", "Dropout", SUPPORTED]),
        (lambda: flat(L.LeakyReLU(name="leak")), ["'leak'", "LeakyReLU", SUPPORTED]),
        (lambda: flat(L.ReLU(6, name="six")), ["'six'", "ReLU", "plain ReLU()"]),
        (lambda: flat(L.Dense(4, "gelu", name="g")), ["'g'", "gelu", "Supported: linear, softmax, relu, tanh"]),
        (lambda: flat(L.Dense(4, lambda x: x * 2, name="mine")), ["'mine'", "not supported"]),
        (lambda: flat(L.Dense(4, L.PReLU(), name="layer")), ["'layer'", "PReLU", "Supported: linear, softmax"]),
        (lambda: flat(L.Dense(4, use_bias=False, name="bare")), ["'bare'", "use_bias=True"]),
        (lambda: flat(L.Softmax(name="early")), ["'dense", "softmax must be the last layer"]),
        (lambda: image(L.Dense(4, name="per_pixel")), ["'per_pixel'", "(8, 8, 2)", "Flatten"]),
        (lambda: image(L.Conv2D(2, 3, dilation_rate=2, name="wide")), ["'wide'", "dilation_rate=1"]),
        (lambda: image(L.Conv2D(2, 3, groups=2, name="split")), ["'split'", "groups=1"]),
        (lambda: image(L.Conv2D(2, 1, data_format="channels_first", name="cf")), ["'cf'", "channels_last"]),
        (lambda: image(L.Conv2D(2, 3, dtype="mixed_float16", name="half")), ["'half'", "mixed_float16", "float32"]),
        (lambda: image(L.Conv2D(2, 3, activation="softmax", name="soft")), ["'soft'", "softmax over channels"]),
        (lambda: keras.Sequential([keras.Input((None, 8, 1)), L.Conv2D(2, 3)]), ["input", "None", "(height, width"]),
        (lambda: keras.Sequential([keras.Input((4, 4)), L.Dense(3, name="rows")]), ["'rows'", "matrix", "Flatten"]),
        (lambda: keras.Sequential([L.Dense(3)]), ["keras.Input(shape)"]),
        (lambda: keras.Sequential([keras.Input((4,)), L.ReLU()]), ["no layer with weights"]),
        (lambda: keras.Sequential([keras.Input((4,)), L.Dense(3)]), ["no softmax", "softmax_cross_entropy", "mse"]),
        (wrong_loss, ["ends in a softmax", "mse", "choose the loss softmax_cross_entropy"]),
        (branching, ["one straight line"]),
        (shared, ["'twice'", "one straight line"]),
        (two_inputs, ["'b'", "one straight line"]),
        (two_outputs, ["one output"]),
        (subclassed, ["Mine", "keras.Sequential or the functional API"]),
        (lambda: 42, ["expected a Keras model", "int"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
def test_a_model_that_cannot_be_compiled_is_refused_in_one_line(make, words):
    with pytest.raises(CompileError) as refusal:
        compiler.compile_model(make())
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_chosen_loss_settles_what_the_model_leaves_open():
    model = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    assert compiler.compile_model(model, loss="mse").loss == "mse"
    assert compiler.compile_model(model, loss="softmax_cross_entropy").loss == "softmax_cross_entropy"
    with pytest.raises(CompileError, match="unknown loss 'hinge'"):
        compiler.compile_model(model, loss="hinge")
    with pytest.raises(CompileError, match="ends in a softmax"):
        compiler.compile_model(mlp(), loss="mse")


def rewrite(source: Path, target: Path, **members: str) -> Path:
    """A .keras file with some of its members replaced."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.partition(".")[0], old.read(name)))
    return target


def test_a_bad_file_is_refused_in_one_line(tmp_path):
    good = tmp_path / "good.keras"
    mlp().save(good)
    text = tmp_path / "text.keras"
    text.write_text("not a model")
    description = json.loads(zipfile.ZipFile(good).read("config.json"))
    del description["config"]["layers"][1]["config"]["units"]
    cases = {
        tmp_path / "absent.keras": "there is no file",
        text: "not a .keras file",
        rewrite(good, tmp_path / "old.keras", metadata='{"keras_version": "2.15.0"}'): "Keras 2.15.0",
        rewrite(good, tmp_path / "json.keras", config="{"): "not a .keras file",
        rewrite(good, tmp_path / "units.keras", config=json.dumps(description)): "units",
        rewrite(good, tmp_path / "list.keras", config="[]"): "not as Keras 3 writes it",
        rewrite(good, tmp_path / "weights.keras", model="gone"): "Keras cannot load",
    }
    for path, words in cases.items():
        with pytest.raises(CompileError, match=words) as refusal:
            compiler.compile_model(path)
        assert "\n" not in str(refusal.value)


def test_the_commands(tmp_path):
    path, out = tmp_path / "model.keras", tmp_path / "model.mote"
    randomise(mlp()).save(path)
    run = CliRunner()
    compiled = run.invoke(model_cli.app, ["compile", str(path), "--out", str(out), "--train-from", "head", "--json"])
    facts = json.loads(compiled.stdout)
    program = Program.parse(out.read_bytes())
    assert facts["model"] == program.model_id.hex()
    assert facts["trainable_parameters"] == program.n_params == 330
    table = run.invoke(model_cli.app, ["plan", str(path)]).stdout
    assert "train from 'hidden'" in table
    assert "2,410" in table
    refused = run.invoke(model_cli.app, ["compile", str(path), "--out", str(tmp_path)])
    assert "cannot write" in str(refused.exception)


def test_a_description_says_what_the_engine_needs(tmp_path, capsys):
    path, program = tmp_path / "model.keras", tmp_path / "model.mote"
    model = randomise(mlp())
    model.save(path)
    program.write_bytes(compiler.compile_model(model).data)
    run = CliRunner()
    takes = compiler.plan(compiler.read_network(path))
    about = json.loads(run.invoke(model_cli.app, ["describe", str(path), "--json"]).stdout)
    assert (about["engine"], about["run_ram_bytes"], about["train_ram_bytes"], about["storage_bytes"]) == (
        "mote",
        takes.run.ram_bytes,
        takes.trainable.ram_bytes,
        takes.trainable.initial_bytes,
    )
    assert (
        f"tf:trainRamBytes {takes.trainable.ram_bytes} ;" in run.invoke(model_cli.app, ["describe", str(path)]).stdout
    )
    assert json.loads(run.invoke(model_cli.app, ["describe", str(program), "--json"]).stdout)["parameters"] == 2410

    flat(L.Dense(4, "gelu", name="g")).save(path)  # not for the engine: described all the same, without its memory
    model_cli.describe(path, as_json=True)
    described = capsys.readouterr()
    assert json.loads(described.out)["run_ram_bytes"] is None
    assert "note: the engine cannot run it: layer 'g' (Dense)" in described.err


def test_a_plan_needs_neither_keras_nor_tensorflow(tmp_path):
    path = tmp_path / "model.keras"
    mlp().save(path)
    code = (
        "import sys, tinyfleet\n"
        "try: tinyfleet.cli(['model', 'plan', sys.argv[1], '--json'])\n"
        "finally: assert not {'tensorflow', 'keras'} & set(sys.modules)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["train_from"]["hidden"]["parameters"] == 2410


def test_a_tflite_file_is_planned_and_cut_from_the_command_line(tmp_path):
    """What the plan says of a cut is what the compiled program takes; a budget chooses the most that fits."""
    folder = os.environ.get("TINYFLEET_DATA")
    if not folder or not (Path(folder) / "tflite").is_dir():
        pytest.skip("TINYFLEET_DATA has no folder tflite")
    model = Path(folder) / "tflite" / "mlperf_tiny__kws_ref_model.tflite"

    def say(*words):
        command = [sys.executable, "-m", "tinyfleet", "model", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    plan = json.loads(say("plan", model, "--budget", "64KB", "--json").stdout)
    assert [name for name, row in plan.items() if row["chosen"]] == ["train from 'dense'"]
    assert plan["biases from 'conv2d_4'"]["arena"] < 65536 < plan["train from 'conv2d_4'"]["arena"]
    done = say("compile", model, "--train-from", "dense", "--classes", 12, "--out", tmp_path / "a.mote", "--json")
    assert json.loads(done.stdout)["ram_bytes"] == plan["train from 'dense'"]["arena"]
    assert "too few" in say("plan", model, "--budget", "1KB").stderr
    assert "no layer is named 'nope'" in say("compile", model, "--train-from", "nope").stderr
