"""A trainable float32 head on a frozen backbone: it computes what the whole model did, learns, and grows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_tflite_models import in_tflite, models, needs_tflite

from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Tensor
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.firmware_tools.compiler.transfer import train_from, with_float_input
from tinyfleet.firmware_tools.readers.common import CompileError, compact
from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite

Array = NDArray[Any]
KWS = "mlperf_tiny__kws_ref_model"


def model(name: str) -> Graph:
    return read_tflite(models() / f"{name}.tflite")


def layers(graph: Graph) -> list[str]:
    return list(dict.fromkeys(op.name for op in graph.ops))


def quantised(x: Array, tensor: Tensor) -> Array:
    """float32 numbers as the int8 that a QUANTIZE gives."""
    real = x.astype(np.float32) / np.float32(tensor.scale)
    rounded = np.copysign(np.floor(np.abs(real) + np.float32(0.5)), real)
    return np.clip(rounded + tensor.zero_point, -128, 127).astype(np.int8)


def few_shots(random: np.random.Generator, tensor: Tensor, classes: int, shots: int) -> tuple[Array, Array]:
    """Samples of classes that differ by a texture of their own, 70 numbers that repeat, in noise a third as strong. The
    textures are always the same."""
    spread = 60 * tensor.scale
    textures = np.random.default_rng(5).normal(0, spread, (classes, 70))
    labels = np.tile(np.arange(classes), shots)
    patterns = np.array([np.resize(textures[label], tensor.size) for label in labels])
    return (patterns + random.normal(0, spread / 3, patterns.shape)).astype(np.float32), labels


def accuracy(learner: MoteLearner, x: Array, labels: Array) -> float:
    return float(np.mean([learner.infer(sample).argmax() == label for sample, label in zip(x, labels, strict=True)]))


def learn(learner: MoteLearner, x: Array, labels: Array, rate: float, epochs: int) -> None:
    for _ in range(epochs):
        for sample, label in zip(x, labels, strict=True):
            learner.learn(sample, [label], rate)


def test_a_head_learns_new_classes_from_few_samples() -> None:
    graph = model(KWS)
    learner = MoteLearner(assemble(train_from(graph, "dense", classes=4)))
    random = np.random.default_rng(0)
    x, labels = few_shots(random, graph.tensors[0], 4, 5)
    unseen, unseen_labels = few_shots(random, graph.tensors[0], 4, 25)
    np.testing.assert_array_equal(learner.infer(x[0]), np.full(4, 0.25, np.float32))  # a head of zeros favours none
    before = learner.loss(unseen[0], [unseen_labels[0]])
    learn(learner, x, labels, 0.02, 10)
    assert accuracy(learner, unseen, unseen_labels) >= 0.95
    assert learner.loss(unseen[0], [unseen_labels[0]]) < before / 2
    assert learner.parameters.size == 64 * 4 + 4


def test_a_head_grows_a_class_on_the_device() -> None:
    graph = model(KWS)
    learner = MoteLearner(assemble(train_from(graph, "dense", classes=3, max_classes=4)))
    random = np.random.default_rng(1)
    x, labels = few_shots(random, graph.tensors[0], 4, 5)
    unseen, unseen_labels = few_shots(random, graph.tensors[0], 4, 20)
    three = labels < 3
    learn(learner, x[three], labels[three], 0.02, 10)
    assert learner.infer(x[0]).shape == (3,)
    with pytest.raises(LearnerError):
        learner.learn(x[3], [3], 0.05)
    assert learner.grow() == 4
    learn(learner, x, labels, 0.02, 10)
    assert accuracy(learner, unseen, unseen_labels) >= 0.95
    with pytest.raises(LearnerError):
        learner.grow()


def test_old_classes_stay_when_only_room_is_asked_for() -> None:
    graph = model(KWS)
    x, _ = few_shots(np.random.default_rng(2), graph.tensors[0], 4, 2)
    old = MoteLearner(assemble(train_from(graph, "dense")))
    roomy = MoteLearner(assemble(train_from(graph, "dense", max_classes=14)))
    for sample in x:
        np.testing.assert_array_equal(roomy.infer(sample), old.infer(sample))
    assert roomy.grow() == 13


@needs_tflite
def test_the_features_are_tflites(tmp_path: Path) -> None:
    graph = model(KWS)
    head = with_float_input(train_from(graph, "dense", classes=4, float_input=False))
    end = next(i for i, op in enumerate(head.ops) if op.kind == Kind.DEQUANTIZE)
    backbone = Graph(head.tensors, head.ops[: end + 1], head.ops[end].output)
    learner = MoteLearner(assemble(compact(backbone)))
    x, _ = few_shots(np.random.default_rng(3), graph.tensors[0], 4, 3)
    wanted = in_tflite(
        models() / f"{KWS}.tflite",
        np.array([quantised(sample, graph.tensors[0]) for sample in x]),
        tmp_path,
        "functional_1/average_pooling2d/AvgPool",
    )
    assert not isinstance(wanted, int)
    pooled = next(op for op in graph.ops if op.kind == Kind.INT8_AVGPOOL)
    tensor = graph.tensors[pooled.output]
    for sample, q in zip(x, wanted, strict=True):
        real = np.float32(tensor.scale) * (q.astype(np.float32) - tensor.zero_point)
        np.testing.assert_array_equal(learner.infer(sample), real)


@pytest.mark.parametrize(
    ("layer", "steps"), [("dense", 1), ("average_pooling2d", 3), ("conv2d_4", 3), ("depthwise_conv2d_3", 8)]
)
def test_a_cut_anywhere_computes_what_the_model_did(layer: str, steps: int) -> None:
    """Logits, to some steps of their int8 scale: what is not rounded any more behind the cut."""
    graph = model(KWS)
    *ops, softmax = graph.ops
    logits = graph.tensors[softmax.inputs[0]]
    whole = MoteLearner(assemble(compact(replace(graph, ops=tuple(ops), output=softmax.inputs[0]))))
    head = MoteLearner(assemble(train_from(graph, layer)))
    x, _ = few_shots(np.random.default_rng(4), graph.tensors[0], 4, 5)
    for sample in x:
        q = whole.infer(quantised(sample, graph.tensors[0])).astype(np.float32)
        inside = np.abs(q) < 127  # what int8 holds
        wanted, found = q[inside] * logits.scale, np.log(head.infer(sample))[inside]
        apart = (found - found.mean()) - (wanted - wanted.mean())
        assert np.abs(apart).max() <= steps * logits.scale


def test_a_cut_between_branches_dequantises_all_that_cross_it() -> None:
    graph = model("mlperf_tiny__pretrainedResnet_quant")
    head = train_from(graph, "conv2d_7")
    crossing = [op for op in head.ops if op.kind == Kind.DEQUANTIZE]
    assert len(crossing) == 2  # the inputs of conv2d_7, and of conv2d_8 beside it
    assert {op.kind for op in head.ops[head.ops.index(crossing[0]) :]} <= set(Kind) - INT8
    frozen = [op.name for op in head.ops if op.weights is not None and op.trains == "nothing"]
    trained = [op.name for op in head.ops if op.trains == "all"]
    assert frozen == [f"conv2d{n}" for n in ("", "_1", "_2", "_3", "_4", "_5", "_6")]
    assert trained == ["conv2d_7", "conv2d_8", "dense"]
    learner = MoteLearner(assemble(head))
    x, labels = few_shots(np.random.default_rng(6), graph.tensors[0], 2, 3)
    before = [learner.loss(*sample) for sample in zip(x, labels, strict=True)]
    learn(learner, x, labels, 0.005, 10)
    assert sum(learner.loss(*sample) for sample in zip(x, labels, strict=True)) < sum(before) / 2


INT8 = {kind for kind in Kind if kind.name.startswith(("INT8", "TRAINED"))}


def test_a_float_backbone_stays_as_it_was() -> None:
    graph = model("haoyu_r__Magic_Wand_1")
    whole, head = MoteLearner(assemble(graph)), train_from(graph, "dense")
    assert head.loss == "softmax_cross_entropy"
    assert [op.name for op in head.ops if op.trains == "all"] == ["dense", "dense_1"]
    learner = MoteLearner(assemble(head))
    x = np.random.default_rng(0).normal(size=(5, graph.tensors[0].size)).astype(np.float32)
    for sample in x:
        np.testing.assert_allclose(learner.infer(sample), whole.infer(sample), rtol=0, atol=1e-6)
    learn(learner, x, np.arange(5) % 4, 0.02, 60)
    assert all(learner.infer(sample).argmax() == i % 4 for i, sample in enumerate(x))


def test_a_logistic_function_goes_into_the_loss() -> None:
    graph = model("haoyu_r__Anomaly_Detection_Autoencoder")
    head = train_from(graph, "dense_63")
    assert head.loss == "binary_cross_entropy"
    x = np.random.default_rng(0).normal(0, 20 * graph.tensors[0].scale, graph.tensors[0].size).astype(np.float32)
    q = MoteLearner(assemble(graph)).infer(quantised(x, graph.tensors[0]))
    y = graph.tensors[graph.output]
    probabilities = MoteLearner(assemble(head)).infer(x)
    np.testing.assert_allclose(probabilities, (q.astype(np.float32) - y.zero_point) * y.scale, atol=0.15)


def test_a_model_of_numbers_learns_by_squared_error() -> None:
    graph = model("mlperf_tiny__ad01_int8")
    head = train_from(graph, "dense_9", bias_only=True, momentum=True)
    assert head.loss == "mse"
    learner = MoteLearner(assemble(head), momentum=0.9)
    assert learner.parameters.size == 640
    x = np.random.default_rng(0).normal(0, 20 * graph.tensors[0].scale, 640).astype(np.float32)
    before = learner.loss(x, x)
    for _ in range(10):
        learner.learn(x, x, 0.01)
    assert learner.loss(x, x) < before


def test_a_convolution_over_the_whole_input_is_a_head_too() -> None:
    graph = model("haoyu_r__ARM_MicroNet_Small_anomaly_detection")
    head = train_from(graph, layers(graph)[-1], classes=3)
    assert head.ops[-1].kind == Kind.DENSE
    assert head.tensors[head.output].shape == (1, 1, 3)
    assert head.loss == "softmax_cross_entropy"
    learner = MoteLearner(assemble(head))
    learner.learn(np.zeros(32 * 32, np.float32), [2], 0.1)
    assert learner.infer(np.zeros(32 * 32, np.float32)).argmax() == 2


def test_a_head_may_take_int8_as_the_model_did() -> None:
    graph = model(KWS)
    floats = MoteLearner(assemble(train_from(graph, "dense")))
    bytes_ = MoteLearner(assemble(train_from(graph, "dense", float_input=False)))
    x, _ = few_shots(np.random.default_rng(7), graph.tensors[0], 4, 1)
    for sample in x:
        np.testing.assert_array_equal(floats.infer(sample), bytes_.infer(quantised(sample, graph.tensors[0])))


def test_an_unknown_layer_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(CompileError, match=r"'dense_7'.*: conv2d, depthwise_conv2d, .*, dense, softmax"):
        train_from(model(KWS), "dense_7")


def test_a_layer_behind_all_weights_is_refused() -> None:
    with pytest.raises(CompileError, match=r"nothing from 'softmax' on has weights; .*, dense"):
        train_from(model(KWS), "softmax")


@pytest.mark.parametrize(("classes", "most"), [(0, None), (5, 4), (None, 11)])
def test_numbers_of_classes_that_do_not_fit_are_refused(classes: int | None, most: int | None) -> None:
    with pytest.raises(CompileError, match="classes at first"):
        train_from(model(KWS), "dense", classes=classes, max_classes=most)


def test_a_loss_that_does_not_go_with_the_models_end_is_refused() -> None:
    with pytest.raises(CompileError, match="softmax"):
        train_from(model(KWS), "dense", loss="binary_cross_entropy")


def test_what_has_no_float_form_is_named() -> None:
    int8 = Tensor((1, 1, 4), "int8", 0.1, 0)
    dense = {"weights": np.ones((4, 4), np.int8), "bias": np.zeros(4, np.int32), "weight_scales": np.ones(4)}
    product = Graph(
        (int8, int8, int8),
        (Op(Kind.INT8_DENSE, "fc", (0,), 1, **dense), Op(Kind.INT8_MUL, "gate", (1, 0), 2)),
        2,
    )
    with pytest.raises(CompileError, match=r"'gate'.*no float32 form"):
        train_from(product, "fc")
    clamped = Graph((int8, int8), (Op(Kind.INT8_DENSE, "fc", (0,), 1, low=-10, high=10, **dense),), 1)
    with pytest.raises(CompileError, match=r"'fc' is clamped to -1 \.\.\. 1"):
        train_from(clamped, "fc")
