"""Training in TFLite's interpreter: the same learning as the C engine's, and the same manners.

Every test of the interpreter runs in a process of its own, which imports TensorFlow only where the test says so: in one
process, tflite-runtime cannot start after TensorFlow.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plain_commands import plain

from tinyfleet.edge.model.learner import LearnerError, LiteRTLearner, MoteLearner

RUNTIMES = [name for name in ("tflite_runtime", "ai_edge_litert") if find_spec(name)]
STEPS = 60

needs_runtime = pytest.mark.skipif(not RUNTIMES, reason="neither tflite-runtime nor ai-edge-litert is installed")


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process that has imported nothing yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def export(folder: Path) -> None:
    """Models, each as a program and as a .tflite file that starts from the same weights."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    from tinyfleet.firmware_tools.compiler.compile import compile_model
    from tinyfleet.firmware_tools.compiler.export import export_tflite

    layers = keras.layers
    images = keras.Sequential(
        [
            keras.Input((11, 10, 2)),
            layers.Conv2D(4, 3, strides=(2, 1), padding="same", activation="tanh", name="frozen"),
            layers.MaxPooling2D(3, strides=2, padding="same"),
            layers.Conv2D(6, 3, strides=(1, 2), padding="same", activation="relu", name="conv"),
            layers.MaxPooling2D((2, 1)),
            layers.Conv2D(3, (1, 2), name="small"),
            layers.AveragePooling2D((2, 2), strides=1, padding="same"),
            layers.Flatten(),
            layers.Dense(8, activation="relu"),
            layers.Dense(4, activation="softmax"),
        ]
    )
    values = keras.Sequential([keras.Input((6,)), layers.Dense(9, activation="tanh"), layers.Dense(2)])
    x = inputs = keras.Input((9, 8, 3))
    x = short = layers.Conv2D(6, 3, padding="same", activation="relu6", name="stem")(layers.Rescaling(0.5)(x))
    x = layers.DepthwiseConv2D(3, padding="same", dilation_rate=2)(x)
    x = layers.Add()([layers.LeakyReLU()(x), short])
    x = layers.LayerNormalization()(x)
    left = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D((2, 3), strides=2, depth_multiplier=2)(x))
    right = layers.Conv2D(4, 3, strides=2, padding="same", activation="sigmoid")(layers.ZeroPadding2D(((0, 1), 0))(x))
    x = layers.Concatenate()([left, layers.Softmax()(layers.Flatten()(right))])
    branches = keras.Model(inputs, layers.Dense(3, activation="sigmoid")(x))
    steps = keras.Sequential(
        [
            keras.Input((14, 2)),
            layers.Conv1D(4, 3, dilation_rate=2, name="frozen"),
            layers.BatchNormalization(),
            layers.Cropping1D(1),
            layers.Conv1D(5, 2, padding="causal", activation="tanh", name="conv"),
            layers.MaxPooling1D(2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    random = np.random.default_rng(0)
    for name, model, options in (
        ("images", images, {"train_from": "conv"}),
        ("values", values, {"loss": "mse"}),
        ("branches", branches, {}),
        ("steps", steps, {"train_from": "conv", "loss": "huber"}),
    ):
        positive = abs if name == "steps" else np.asarray  # variances are
        model.set_weights([positive(random.normal(0, 0.3, w.shape)) for w in model.get_weights()])
        (folder / f"{name}.mote").write_bytes(compile_model(model, **options).data)
        (folder / f"{name}.tflite").write_bytes(export_tflite(model, **options))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `export` filled."""
    if not find_spec("tensorflow"):
        pytest.skip("exports with TensorFlow, which is not installed")
    folder = tmp_path_factory.mktemp("models")
    export(folder)
    return folder


def refused(train_from: str) -> str:
    """The error for a model whose backward pass needs what TFLite does not have."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    from tinyfleet.edge.errors import UserError
    from tinyfleet.firmware_tools.compiler.export import export_tflite

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((12, 12, 1)),
            layers.Conv2D(2, 3, name="first"),
            layers.Conv2D(2, 3, dilation_rate=2, name="wide"),
            layers.Flatten(),
            layers.Dense(2, "softmax", name="head"),
        ]
    )
    with pytest.raises(UserError) as refusal:
        export_tflite(model, train_from=train_from)
    return str(refusal.value)


def test_a_layer_that_tflite_cannot_train_is_named():
    if not find_spec("tensorflow"):
        pytest.skip("exports with TensorFlow, which is not installed")
    for layer in ("wide", "first"):
        message = fresh(refused, layer)
        assert "'wide'" in message
        assert "dilated" in message
        assert "--train-from" in message
        assert "\n" not in message


def hide(*modules: str) -> None:
    """As if these packages were not installed."""
    sys.modules.update(dict.fromkeys(modules))


def compare(folder: Path, name: str, runtime: str) -> dict[str, float]:
    """Trains both learners on the same samples; the largest differences."""
    hide(*{"tflite_runtime", "ai_edge_litert"} - {runtime})
    litert, mote = LiteRTLearner(folder / f"{name}.tflite"), MoteLearner((folder / f"{name}.mote").read_bytes())
    assert runtime in sys.modules
    assert "tensorflow" not in sys.modules
    random = np.random.default_rng(1)
    shape = mote.program.input_shape
    start = mote.parameters
    rate = 0.1 if name == "branches" else 0.05
    apart = {"start": float(np.abs(start - litert.parameters).max()), "loss": 0.0, "output": 0.0}
    for step in range(STEPS):
        if step == STEPS // 2:  # from now on only the last layer learns
            litert.mask = mote.mask = 1 << (len(mote.program.parameters) // 2 - 1)
        x = random.normal(size=shape).astype(np.float32)
        y: Any = int(random.integers(4)) if name == "images" else random.normal(size=2).astype(np.float32)
        y = random.integers(2, size=3).astype(np.float32) if name == "branches" else y
        apart["loss"] = max(apart["loss"], abs(litert.loss(x, y) - mote.loss(x, y)))
        apart["output"] = max(apart["output"], float(np.abs(litert.infer(x) - mote.infer(x)).max()))
        apart["loss"] = max(apart["loss"], abs(litert.learn(x, y, rate) - mote.learn(x, y, rate)))
    apart["parameters"] = float(np.abs(litert.parameters - mote.parameters).max())
    apart["moved"] = float(np.abs(mote.parameters - start).max())
    return apart


@needs_runtime
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", ["images", "values", "branches", "steps"])
def test_tflite_learns_what_the_engine_learns(models, name, runtime):
    apart = fresh(compare, models, name, runtime)
    assert apart.pop("start") == 0.0
    assert apart.pop("moved") > 0.1
    assert max(apart.values()) < 1e-5, apart


def compare_nodes(folder: Path, name: str) -> float:
    """Sends train tasks to two nodes, one of which learns with TFLite: the largest difference of what comes back."""
    from tinyfleet.edge.device.node import Node, Publish
    from tinyfleet.edge.device.sources import DatasetStream
    from tinyfleet.edge.model.program import Program
    from tinyfleet.edge.tasks import ClientData
    from tinyfleet.edge.wire.chunks import chunks
    from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, Sha256, TrainTask, UpdateFormat
    from tinyfleet.edge.wire.messages import Success, decode_reply
    from tinyfleet.edge.wire.topics import Topics
    from tinyfleet.edge.wire.updates import apply_update

    program, topics = Program.parse((folder / f"{name}.mote").read_bytes()), Topics("home")
    random = np.random.default_rng(2)
    classes = [random.normal(size=(8, int(np.prod(program.input_shape)))).astype(np.float32) for _ in range(4)]
    targets = [random.normal(size=(8, 2)).astype(np.float32) for _ in classes] if name == "values" else None
    data = ClientData.of(classes, 1.0, 1 if targets else 4, targets=targets)
    start = MoteLearner(program).parameters
    phases = (Phase(ALL_LAYERS, 20, 0.05, 0.5), Phase(1, 5, 0.05))
    formats = (UpdateFormat(), UpdateFormat(clip=0.05), UpdateFormat(shared=2))
    tasks = [TrainTask(i, "train", 1, i, program.model_id, 3, phases, 6, format) for i, format in enumerate(formats, 1)]
    tasks.append(TrainTask(9, "train", 1, 9, program.model_id, 3, (*phases, phases[1]), 6, UpdateFormat(since=2)))
    tasks[-1] = replace(tasks[-1], phases=tuple(replace(phase, proximal_mu=0.0) for phase in tasks[-1].phases))

    def run(node: Node, task: TrainTask) -> tuple[Any, Any]:
        node.receive(topics.command("one"), plain(replace(task, weights=Sha256.of(start.tobytes()))))
        for i, chunk in enumerate(chunks(start.tobytes())):
            node.receive(topics.weights(1, task.round, i), chunk)
        while node.step():
            pass
        payloads = [out.payload for out in node.poll() if isinstance(out, Publish) and out.topic == topics.reply("one")]
        parts = [reply for reply in map(decode_reply, payloads) if isinstance(reply, Success)]
        return apply_update(start, parts), parts[0].metrics

    nodes = [
        Node("home", "one", {}, program, DatasetStream(data), learner=learner)
        for learner in (None, lambda _: LiteRTLearner(folder / f"{name}.tflite"))
    ]
    apart = 0.0
    for task in tasks:
        (mote, counted), (tflite, measured) = (run(node, task) for node in nodes)
        assert (counted.samples, counted.queried, counted.correct) == (
            measured.samples, measured.queried, measured.correct,
        )  # fmt: skip
        losses = abs(counted.loss - measured.loss), abs(counted.query_loss - measured.query_loss)
        apart = max(apart, *losses, float(np.abs(mote - tflite).max()))
        assert np.abs(mote - start).max() > 1e-3
    return apart


@needs_runtime
@pytest.mark.parametrize("name", ["images", "values"])
def test_a_node_learns_with_tflite_what_it_learns_with_the_engine(models, name):
    """With a proximal term, clipping, a part of the layers, and the changes of one phase."""
    assert fresh(compare_nodes, models, name) < 1e-5


def refusals(folder: Path) -> None:
    """Everything that a learner must refuse, and that it has then learned nothing."""
    images, values = LiteRTLearner(folder / "images.tflite"), LiteRTLearner((folder / "values.tflite").read_bytes())
    x, start = np.ones((11, 10, 2), np.float32), images.parameters
    nan = np.full_like(x, np.nan)
    refused = [
        ("takes 220", lambda: images.learn(x[:-1], 0, 0.1)),
        ("not finite", lambda: images.learn(nan, 0, 0.1)),
        ("not finite", lambda: images.learn(x, 0, float("nan"))),
        ("no class", lambda: images.learn(x, 4, 0.1)),
        ("no class", lambda: images.loss(x, -1)),
        ("no class", lambda: images.loss(x, 0.5)),
        ("target has 2", lambda: images.loss(x, [0, 1])),
        ("target has 1", lambda: values.loss(np.ones(6), 1.0)),
        ("not finite", lambda: values.loss(np.ones(6), [1.0, np.inf])),
        ("have the shape", lambda: images.set_parameters(start[:-1])),
        ("not finite", lambda: images.set_parameters(start * np.nan)),
        ("not planned for that", lambda: setattr(images, "mask", 0b11111)),
        ("cannot read", lambda: LiteRTLearner(folder / "absent.tflite")),
        ("no .tflite model", lambda: LiteRTLearner(b"not a model")),
    ]
    for words, call in refused:
        with pytest.raises(LearnerError, match=words):
            call()
    np.testing.assert_array_equal(images.parameters, start)
    assert images.mask == 0b1111

    images.mask = 0
    images.learn(x, 1, 0.5)
    np.testing.assert_array_equal(images.parameters, start)

    huge = np.full_like(values.parameters, 3e38)
    values.set_parameters(huge)
    with pytest.raises(LearnerError, match="diverged"):
        values.learn(np.ones(6), [0.0, 0.0], 0.1)
    np.testing.assert_array_equal(values.parameters, huge)


@needs_runtime
def test_what_cannot_be_learned_is_refused_and_changes_nothing(models):
    fresh(refusals, models)


def after_tensorflow(folder: Path) -> None:
    """Opens a learner in a process that has already imported TensorFlow."""
    import tensorflow  # noqa: F401

    hide("ai_edge_litert")
    with pytest.raises(LearnerError, match="pip install ai-edge-litert"):
        LiteRTLearner(folder / "values.tflite")
    if "ai_edge_litert" in RUNTIMES:
        del sys.modules["ai_edge_litert"]
        assert LiteRTLearner(folder / "values.tflite").learn(np.ones(6), [0.0, 0.0], 0.1) > 0


@needs_runtime
def test_after_tensorflow_a_learner_opens_with_litert_or_says_what_to_do(models):
    fresh(after_tensorflow, models)


def without_runtime() -> None:
    hide("tflite_runtime", "ai_edge_litert")
    with pytest.raises(LearnerError, match=r"pip install 'tinyfleet\[edge\]'"):
        LiteRTLearner(b"TFL3")


def test_without_a_runtime_the_error_says_what_to_install():
    fresh(without_runtime)
