""".tflite files: what is read gives TFLite's own numbers, and what is refused says why."""

import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyfleet.edge.errors import ProgramError
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.firmware_tools.readers.common import CompileError
from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite

Array = NDArray[Any]

MODELS = [
    "haoyu_r__ARM_CNN_Small_keyword_spotting",
    "haoyu_r__ARM_DS_CNN_Small_",
    "haoyu_r__ARM_MicroNet_Small_anomaly_detection",
    "haoyu_r__ARM_MicroNet_VWW_3",
    "haoyu_r__Anomaly_Detection_Autoencoder",
    "haoyu_r__Hello_World",
    "haoyu_r__Magic_Wand_1",
    "haoyu_r__Magic_Wand_2",
    "haoyu_r__Mapping_Dance",
    "haoyu_r__Micro_Speech_Forward_Backward",
    "haoyu_r__Micro_Speech_Up_Down_Go",
    "haoyu_r__Micro_Speech_Yes_No_1",
    "haoyu_r__Micro_Speech_Yes_No_2",
    "haoyu_r__Micro_Speech_Yes_No_4",
    "haoyu_r__Motion_Trainer_Left_Right",
    "haoyu_r__Motion_Trainer_Up_Forward",
    "haoyu_r__Move",
    "haoyu_r__Squats_Counter",
    "haoyu_r__Visual_Alarm_Clock",
    "haoyu_r__Voice_Turn",
    "mlperf_tiny__ad01_fp32",
    "mlperf_tiny__ad01_int8",
    "mlperf_tiny__kws_ref_model",
    "mlperf_tiny__pretrainedResnet",
    "mlperf_tiny__pretrainedResnet_large_int8",
    "mlperf_tiny__pretrainedResnet_quant",
    "mlperf_tiny__str_ww_ref_model",
    "mlperf_tiny__vww_96_float",
    "mlperf_tiny__vww_96_int8",
    "tflm__hello_world_float",
    "tflm__hello_world_int8",
    "tflm__micro_speech_quantized",
]
REFUSED = {  # and what the line must name
    "haoyu_r__Person_Detection": "'input' is UINT8; supported are FLOAT32 and INT8",
    "haoyu_r__Snoring_Guardian": "RESIZE_NEAREST_NEIGHBOR is not supported",
    "mlperf_tiny__kws_ref_model_float32": "INT8 weights (hybrid",
    "tflm__keyword_scrambled_8bit": "SVDF is not supported",
    "tflm__micro_speech_lstm": "UNIDIRECTIONAL_SEQUENCE_LSTM is not supported",
    "tflm__person_detect": "quantised dimension 3",
    "tflm__trained_lstm_int8": "UNIDIRECTIONAL_SEQUENCE_LSTM is not supported",
}
SAMPLES = 100
INT8_TOO = {Kind.PLACE, Kind.SLICE, Kind.QUANTIZE, Kind.DEQUANTIZE}

# LiteRT 2 rounds what a fully connected layer gives once where TFLite rounds twice: other bytes now and then.
needs_tflite = pytest.mark.skipif(not find_spec("tflite_runtime"), reason="tflite-runtime is not installed")

# A file may abort the interpreter, so it runs in a process of its own: python -c TFLITE MODEL INPUTS OUTPUTS TENSOR
TFLITE = """
import sys
import numpy as np
from tflite_runtime.interpreter import Interpreter, OpResolverType
model, inputs, outputs, tensor = sys.argv[1:]
interpreter = Interpreter(
    model_path=model,
    experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
    experimental_preserve_all_tensors=tensor != "",
    num_threads=1,
)
interpreter.allocate_tensors()
(x,), (y,) = interpreter.get_input_details(), interpreter.get_output_details()
for detail in interpreter.get_tensor_details():
    if tensor and detail["name"] == tensor:
        y = detail
found = []
for sample in np.load(inputs):
    interpreter.set_tensor(x["index"], sample.reshape(x["shape"]))
    interpreter.invoke()
    found.append(interpreter.get_tensor(y["index"]).ravel())
np.save(outputs, np.array(found))
"""

# Every other operator: python -c CONVERT INT8_MODEL FLOAT_MODEL
CONVERT = """
import sys
import numpy as np
import tensorflow as tf
layers = tf.keras.layers
tf.keras.utils.set_random_seed(1)

def model(product):
    start = tf.keras.Input((12, 10, 3), batch_size=1)
    a = layers.Conv2D(6, 3, dilation_rate=2, padding="same", activation="relu6")(start)
    b = layers.LeakyReLU(negative_slope=0.2)(layers.Conv2D(4, 3, padding="same")(start))
    x = layers.Concatenate()([a, b])
    x = layers.ZeroPadding2D(((1, 2), (0, 1)))(x)
    x = layers.Cropping2D(((1, 0), (2, 1)))(x)[:, ::2, 1:]
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=2, activation="tanh")(x)
    y = layers.Conv2D(20, 1, activation="sigmoid")(x)
    x = layers.Multiply()([x, y]) if product else layers.Add()([x, y])
    x = layers.MaxPool2D(2, padding="same")(x)
    x = layers.AveragePooling2D(2, strides=1, padding="same")(x)
    x = layers.Reshape((5, 4))(layers.GlobalAveragePooling2D()(x))
    x = layers.Dense(3, use_bias=False)(layers.Flatten()(layers.Softmax()(x)))
    return tf.lite.TFLiteConverter.from_keras_model(tf.keras.Model(start, x))

def samples():
    random = np.random.default_rng(0)
    return ([random.normal(size=(1, 12, 10, 3)).astype(np.float32)] for _ in range(20))

quantised = model(product=True)
quantised.optimizations = [tf.lite.Optimize.DEFAULT]
quantised.representative_dataset = samples
quantised.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
quantised.inference_input_type = quantised.inference_output_type = tf.int8
quantised._experimental_disable_per_channel_quantization_for_dense_layers = True
for path, converter in zip(sys.argv[1:], (quantised, model(product=False))):
    with open(path, "wb") as file:
        file.write(converter.convert())
"""


def models() -> Path:
    path = Path(os.environ.get("TINYFLEET_DATA", "")) / "tflite"
    if "TINYFLEET_DATA" not in os.environ or not path.is_dir():
        pytest.skip("TINYFLEET_DATA has no tflite/")
    return path


def inputs(graph: Graph, count: int) -> Array:
    """Random samples of the model's input."""
    random, x = np.random.default_rng(0), graph.tensors[0]
    if x.dtype == "int8":
        return random.integers(-128, 128, (count, x.size)).astype(np.int8)
    return random.normal(size=(count, x.size)).astype(np.float32)


def in_tflite(model: Path, samples: Array, folder: Path, tensor: str = "") -> Array | int:
    """What TFLite's reference kernels give, or the status that their process ended with. tensor: another than the
    output."""
    x, y = folder / f"{model.stem}_x.npy", folder / f"{model.stem}_y.npy"
    np.save(x, samples)
    status = subprocess.run([sys.executable, "-c", TFLITE, model, x, y, tensor], capture_output=True).returncode
    return np.load(y) if status == 0 else status


def compare(graph: Graph, samples: Array, wanted: Array | int) -> None:
    """int8 arithmetic gives TFLite's bytes, float32 its numbers within 1e-5 of the largest."""
    assert not isinstance(wanted, int), f"TFLite's process ended with {wanted}"
    learner = MoteLearner(assemble(graph))
    found = np.array([learner.infer(x) for x in samples])
    assert found.dtype == wanted.dtype
    kinds = {op.kind for op in graph.ops}
    if kinds <= {kind for kind in Kind if kind.name.startswith("INT8")} | INT8_TOO:
        np.testing.assert_array_equal(found, wanted)
    else:
        assert not any(kind.name.startswith("INT8") for kind in kinds)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "Future[Array | int]"]]:
    """TFLite's outputs for all models; two processes compute them while the tests run."""
    folder, temporary = models(), tmp_path_factory.mktemp("tflite")

    def outputs(name: str) -> Array | int:
        path = folder / f"{name}.tflite"
        return in_tflite(path, inputs(read_tflite(path), SAMPLES), temporary)

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(outputs, name) for name in MODELS}
        pool.shutdown(cancel_futures=True)


def test_all_files_are_expected_to_compile_or_to_be_refused() -> None:
    assert {path.stem for path in models().glob("*.tflite")} == {*MODELS, *REFUSED}


@needs_tflite
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_tflite_computes(name: str, references: dict[str, "Future[Array | int]"]) -> None:
    graph = read_tflite(models() / f"{name}.tflite")
    compare(graph, inputs(graph, SAMPLES), references[name].result())


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_model_names_the_operator_or_the_defect(name: str) -> None:
    with pytest.raises(CompileError) as error:
        read_tflite(models() / f"{name}.tflite")
    assert REFUSED[name] in str(error.value)
    assert f"{name}.tflite" in str(error.value)
    assert "\n" not in str(error.value)


@needs_tflite
@pytest.mark.parametrize("name", ["tflm__keyword_scrambled_8bit", "tflm__person_detect"])
def test_a_model_that_ends_the_interpreter_does_not_end_us(name: str, tmp_path: Path) -> None:
    path = models() / f"{name}.tflite"
    samples = np.zeros((1, 96), np.int16) if "keyword" in name else np.zeros((1, 96 * 96), np.int8)
    assert isinstance(in_tflite(path, samples, tmp_path), int)
    with pytest.raises(CompileError):
        read_tflite(path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """CONVERT's int8 and its float32 model."""
    if not find_spec("tensorflow"):
        pytest.skip("tensorflow is not installed")
    folder = tmp_path_factory.mktemp("converted")
    paths = folder / "int8.tflite", folder / "float32.tflite"
    subprocess.run([sys.executable, "-c", CONVERT, *paths], check=True, capture_output=True)
    return paths


@needs_tflite
def test_branches_slices_and_every_activation_compute_what_tflite_computes(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    for path in converted:
        graph = read_tflite(path)
        samples = inputs(graph, SAMPLES)
        compare(graph, samples, in_tflite(path, samples, tmp_path))


def test_layers_have_the_names_of_the_model() -> None:
    def names(model: str) -> list[str]:
        return list(dict.fromkeys(op.name for op in read_tflite(models() / f"{model}.tflite").ops))

    kws = names("mlperf_tiny__kws_ref_model")
    assert kws[:3] == ["conv2d", "depthwise_conv2d", "conv2d_1"]
    assert kws[-4:] == ["conv2d_4", "average_pooling2d", "dense", "softmax"]
    resnet = names("mlperf_tiny__pretrainedResnet")
    assert resnet[:4] == ["conv2d", "conv2d_1", "conv2d_2", "add"]
    assert names("haoyu_r__Micro_Speech_Yes_No_2") == ["first", "second", "final_fc", "labels_softmax"]
    assert names("haoyu_r__Visual_Alarm_Clock")[-3:] == ["dense_Dense1", "dense_Dense2", "softmax"]


def test_a_fused_activation_belongs_to_its_layer() -> None:
    ops = read_tflite(models() / "tflm__hello_world_float.tflite").ops
    assert [(op.kind, op.name) for op in ops] == [
        (Kind.DENSE, "dense"),
        (Kind.RELU, "dense"),
        (Kind.DENSE, "dense_1"),
        (Kind.RELU, "dense_1"),
        (Kind.DENSE, "dense_2"),
    ]


@pytest.mark.parametrize("content", [b"", b"TFL3", b"\x1c\0\0\0TFL3", bytes(1000), b"\x1c\0\0\0TFL3" + bytes(1000)])
def test_what_is_no_tflite_file_is_refused(content: bytes) -> None:
    with pytest.raises(CompileError, match="the model"):
        read_tflite(content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"there is no file .*missing\.tflite"):
        read_tflite(tmp_path / "missing.tflite")


SMALL = ["tflm__hello_world_float", "tflm__hello_world_int8", "haoyu_r__Voice_Turn", "haoyu_r__Move"]
WORDS = (0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x0FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)


PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(
    st.tuples(st.sampled_from(["byte", "near", "word", "copy"]), PLACES, PLACES, st.integers(0, 255)), max_size=6
)


def damaged(data: bytes, keep: float | None, changes: list[tuple[str, float, float, int]]) -> bytes:
    """A file, cut, and with bytes, whole words and copies of its own parts in places where they do not belong."""
    out = bytearray(data)
    for how, where, source, value in changes:
        at = int(where * len(data))
        new = bytes([value])
        if how == "near":
            new = bytes([(out[at] + (-4, -1, 1, 4)[value % 4]) % 256])
        elif how == "word":
            at, new = at & ~3, WORDS[value % len(WORDS)].to_bytes(4, "little")
        elif how == "copy":
            new = data[int(source * len(data)) :][: value % 40]
        out[at : at + len(new)] = new
    return bytes(out[: len(data) if keep is None else int(keep * len(data))])


@contextmanager
def limits(seconds: float, size: int) -> Iterator[None]:
    """Raises TimeoutError after so many seconds; fails if more memory than `size` bytes was taken at a time."""

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert peak < size


def read_damaged(data: bytes) -> None:
    """A file is refused in a line, or is a model that the engine runs."""
    try:
        with limits(60, 40 * len(data) + (1 << 24)):
            graph = read_tflite(data)
    except CompileError as error:
        assert "\n" not in str(error)
        return
    try:
        program = assemble(graph)
    except ProgramError:  # weights that are not finite, or too much memory
        return
    if sum(layer.macs for layer in program.layers) < 1e7 and program.arena_bytes < 1 << 24:
        MoteLearner(program).infer(inputs(graph, 1)[0])


FILES = settings(max_examples=int(os.environ.get("TINYFLEET_FILE_EXAMPLES", "300")), deadline=None)


@FILES
@given(st.sampled_from(SMALL), st.none() | PLACES, CHANGES)
def test_a_damaged_file_is_refused_or_still_a_model(
    name: str, keep: float | None, changes: list[tuple[str, float, float, int]]
) -> None:
    read_damaged(damaged((models() / f"{name}.tflite").read_bytes(), keep, changes))


@FILES
@given(st.sampled_from([0, 1]), st.none() | PLACES, CHANGES)
def test_a_damaged_file_of_every_operator_is_refused_or_still_a_model(
    converted: tuple[Path, Path], which: int, keep: float | None, changes: list[tuple[str, float, float, int]]
) -> None:
    read_damaged(damaged(converted[which].read_bytes(), keep, changes))
