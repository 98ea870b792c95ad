"""int8 operations give the bytes of TFLite's reference kernels: single operations of random shapes, scales and windows.

TFLite runs in a process of its own: it cannot start in one that has imported TensorFlow.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinyfleet.edge.model import quantized
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph, Kind, Op, Shape3, Tensor
from tinyfleet.edge.model.learner import MoteLearner

# LiteRT 2 computes a fully connected layer's scale in double: other bytes than before, now and then.
pytestmark = pytest.mark.skipif(
    not (find_spec("tflite_runtime") and find_spec("ai_edge_litert")),
    reason="needs tflite-runtime, and ai-edge-litert's schema",
)

Array = NDArray[Any]
SAMPLES = 4
SETTINGS = settings(max_examples=25, deadline=None)


@dataclass
class Value:
    """A tensor of a .tflite model. scales and axis: of weights with a scale for each channel."""

    shape: tuple[int, ...]
    dtype: str = "int8"
    scale: float = 1.0
    zero_point: int = 0
    data: Array | None = None
    scales: Array | None = None
    axis: int = 0


@dataclass
class Single:
    """A model of one operator, for TFLite and for us."""

    operator: str
    inputs: list[Value]
    output: Value
    options: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    def tflite(self) -> bytes:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as s

        model, graph, code = s.ModelT(), s.SubGraphT(), s.OperatorCodeT()
        model.version, model.subgraphs, model.operatorCodes = 3, [graph], [code]
        code.builtinCode = getattr(s.BuiltinOperator, self.operator)
        code.deprecatedBuiltinCode, code.version = code.builtinCode, 1
        model.buffers, graph.tensors = [s.BufferT()], []
        for value in (*self.inputs, self.output):
            tensor = s.TensorT()
            tensor.shape, tensor.type = list(value.shape), getattr(s.TensorType, value.dtype.upper())
            tensor.name, tensor.buffer = f"t{len(graph.tensors)}", 0
            if value.data is not None:
                buffer = s.BufferT()
                buffer.data = np.frombuffer(value.data.tobytes(), np.uint8)
                tensor.buffer = len(model.buffers)
                model.buffers.append(buffer)
            if value.dtype != "float32":
                scales = [value.scale] if value.scales is None else [float(v) for v in value.scales]
                tensor.quantization = q = s.QuantizationParametersT()
                q.scale, q.zeroPoint, q.quantizedDimension = scales, [value.zero_point] * len(scales), value.axis
            graph.tensors.append(tensor)
        graph.inputs = [i for i, value in enumerate(self.inputs) if value.data is None]
        graph.outputs = [len(self.inputs)]
        operator = s.OperatorT()
        operator.inputs, operator.outputs = list(range(len(self.inputs))), graph.outputs
        if self.options:
            operator.builtinOptionsType = getattr(s.BuiltinOptions, self.options)
            operator.builtinOptions = getattr(s, self.options + "T")()
            for name, value in self.fields.items():
                setattr(operator.builtinOptions, name, value)
        graph.operators = [operator]
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def run_reference(model: bytes, samples: list[list[Array]]) -> list[Array]:
    """What TFLite's reference kernels give; called in a process of its own."""
    from tflite_runtime.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    interpreter.allocate_tensors()
    results = []
    for sample in samples:
        for detail, x in zip(interpreter.get_input_details(), sample, strict=True):
            interpreter.set_tensor(detail["index"], x)
        interpreter.invoke()
        results.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return results


Reference = Callable[[bytes, list[list[Array]]], list[Array]]


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda model, samples: pool.submit(run_reference, model, samples).result()


def tensor(value: Value) -> Tensor:
    shape = value.shape[1:] if len(value.shape) == 4 else (1, 1, math.prod(value.shape))
    return Tensor(
        (shape[0], shape[1], shape[2]), "float32" if value.dtype == "float32" else "int8", value.scale, value.zero_point
    )


def samples_of(values: list[Value], random: np.random.Generator) -> list[list[Array]]:
    """Random inputs, the first all at one end: what a hidden overflow would show in."""

    def one(value: Value, at_end: bool) -> Array:
        if value.dtype == "float32":
            return random.normal(0, 60 * value.scale, value.shape).astype(np.float32)
        low = 127 if at_end else -128
        return random.integers(low, 128, value.shape).astype(np.int8)

    return [[one(value, i == 0) for value in values] for i in range(SAMPLES)]


def check(reference: Reference, single: Single, op: Op, seed: int) -> None:
    """Both run the operator on the same inputs. Two inputs come to us as one, taken apart by slices."""
    variable = [value for value in single.inputs if value.data is None]
    samples = samples_of(variable, np.random.default_rng(seed))
    expected = reference(single.tflite(), samples)
    y = tensor(single.output)
    if len(variable) == 1:
        graph = Graph((tensor(variable[0]), y), (op,), 1)
    else:
        a, b = (tensor(value) for value in variable)
        both = Tensor((1, 2, a.size), "int8", a.scale, a.zero_point)
        parts = tuple(Op(Kind.SLICE, "part", (0,), i + 1, begin=(0, i, 0), steps=(1, 1, 1)) for i in range(2))
        flat = [Tensor((1, 1, a.size), "int8", t.scale, t.zero_point) for t in (a, b)]
        graph = Graph((both, *flat, y), (*parts, op), 3)
    learner = MoteLearner(assemble(graph))
    for sample, wanted in zip(samples, expected, strict=True):
        got = learner.infer(np.concatenate([x.ravel() for x in sample]))
        np.testing.assert_array_equal(np.asarray(got).ravel(), wanted.ravel())


scales = st.floats(1e-3, 0.5).map(lambda v: float(np.float32(v)))
zero_points = st.integers(-128, 127)
seeds = st.integers(0, 2**32 - 1)
activations = st.sampled_from(["NONE", "RELU", "RELU6"])


def clamp(activation: str, y: Value) -> tuple[int, int]:
    def level(real: float) -> int:
        return y.zero_point + math.floor(float(np.float32(real) / np.float32(y.scale)) + 0.5)

    low = max(-128, level(0)) if activation != "NONE" else -128
    return low, min(127, level(6)) if activation == "RELU6" else 127


def code(activation: str) -> int:
    return {"NONE": 0, "RELU": 1, "RELU6": 3}[activation]


@st.composite
def windows(draw: st.DrawFn, dilates: bool = True) -> dict[str, Any]:
    """One window operation's geometry: input size, kernel, strides, dilation, and TensorFlow's padding."""
    found: dict[str, Any] = {"padding": draw(st.sampled_from(["SAME", "VALID"]))}
    size, kernel, strides, dilation, pads, out = [], [], [], [], [], []
    for _ in range(2):
        k, s, d = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2)) if dilates else 1
        s = 1 if d > 1 else s
        reach = (k - 1) * d + 1
        n = draw(st.integers(reach, reach + 6)) if found["padding"] == "VALID" else draw(st.integers(k, k + 7))
        o = (n - reach) // s + 1 if found["padding"] == "VALID" else -(-n // s)
        pad = max((o - 1) * s + reach - n, 0) // 2 if found["padding"] == "SAME" else 0
        for values, value in zip((size, kernel, strides, dilation, pads, out), (n, k, s, d, pad, o), strict=True):
            values.append(value)
    names = ("size", "kernel", "strides", "dilation", "pads", "out")
    found.update(zip(names, map(tuple, (size, kernel, strides, dilation, pads, out)), strict=True))
    return found


@st.composite
def weighted(draw: st.DrawFn, per_channel: bool) -> dict[str, Any]:
    """Scales and zero points of an operation with weights, such that outputs spread over the whole range."""
    return {
        "x": (draw(scales), draw(zero_points)),
        "y_zero": draw(zero_points),
        "activation": draw(activations),
        "seed": draw(seeds),
        "gain": draw(st.floats(0.02, 3.0)),
        "per_channel": per_channel and draw(st.booleans()),
    }


def with_weights(how: dict[str, Any], shape: tuple[int, ...], channels: int, taps: int) -> tuple[Any, ...]:
    """x's scale, weights, their scales, bias, and y's scale."""
    random = np.random.default_rng(how["seed"])
    weights = random.integers(-127, 128, shape).astype(np.int8)
    each = random.uniform(1e-3, 1e-2, channels if how["per_channel"] else 1).astype(np.float32)
    bias = random.integers(-20000, 20000, channels).astype(np.int32)
    deviation = 73.0 * 73.0 * math.sqrt(taps) * how["x"][0] * float(each.max())
    return weights, each, bias, float(np.float32(deviation / 127 * how["gain"]))


@SETTINGS
@given(weighted(per_channel=False), st.integers(1, 130), st.integers(1, 40), st.booleans())
def test_dense(reference: Reference, how: dict[str, Any], inputs: int, outputs: int, biased: bool) -> None:
    weights, each, bias, scale = with_weights(how, (outputs, inputs), outputs, inputs)
    x, y = (
        Value((1, inputs), scale=how["x"][0], zero_point=how["x"][1]),
        Value((1, outputs), "int8", scale, how["y_zero"]),
    )
    values = [x, Value(weights.shape, data=weights, scale=float(each[0]))]
    if biased:
        values.append(Value(bias.shape, "int32", float(np.float32(x.scale) * each[0]), data=bias))
    activation = {"fusedActivationFunction": code(how["activation"])}
    low, high = clamp(how["activation"], y)
    op = Op(
        Kind.INT8_DENSE, "d", (0,), 1, weights=weights, bias=bias if biased else None, low=low, high=high,
        weight_scales=np.broadcast_to(each.astype(np.float64), outputs),
    )  # fmt: skip
    check(reference, Single("FULLY_CONNECTED", values, y, "FullyConnectedOptions", activation), op, how["seed"])


@SETTINGS
@given(weighted(per_channel=True), windows(), st.integers(1, 20), st.integers(1, 40))
def test_conv2d(reference: Reference, how: dict[str, Any], at: dict[str, Any], inputs: int, outputs: int) -> None:
    kernel = at["kernel"]
    convolution(reference, how, at, "CONV_2D", inputs, outputs, (outputs, *kernel, inputs), math.prod(kernel) * inputs)


@SETTINGS
@given(
    weighted(per_channel=True), st.integers(1, 9), st.integers(1, 9), st.integers(1, 140) | st.integers(1020, 1030),
    st.integers(1, 40),
)  # fmt: skip
def test_pointwise_conv2d(reference: Reference, how: dict[str, Any], h: int, w: int, inputs: int, outputs: int) -> None:
    one = (1, 1)
    at = {
        "padding": "SAME",
        "size": (h, w),
        "out": (h, w),
        "kernel": one,
        "strides": one,
        "dilation": one,
        "pads": (0, 0),
    }
    convolution(reference, how, at, "CONV_2D", inputs, outputs, (outputs, 1, 1, inputs), inputs)


@SETTINGS
@given(weighted(per_channel=True), windows(), st.integers(1, 18), st.integers(1, 3))
def test_depthwise(reference: Reference, how: dict[str, Any], at: dict[str, Any], inputs: int, multiple: int) -> None:
    outputs, kernel = inputs * multiple, at["kernel"]
    # TFLite wants equal strides of a depthwise convolution.
    convolution(reference, how, at, "DEPTHWISE_CONV_2D", inputs, outputs, (1, *kernel, outputs), math.prod(kernel))


def convolution(
    reference: Reference, how: dict[str, Any], at: dict[str, Any], operator: str, inputs: int, outputs: int,
    shape: tuple[int, ...], taps: int,
) -> None:  # fmt: skip
    depthwise = operator != "CONV_2D"
    weights, each, bias, scale = with_weights(how, shape, outputs, taps)
    x = Value((1, *at["size"], inputs), scale=how["x"][0], zero_point=how["x"][1])
    y = Value((1, *at["out"], outputs), "int8", scale, how["y_zero"])
    axis = 3 if depthwise else 0
    bias_scales = np.float32(x.scale) * each
    values = [
        x,
        Value(weights.shape, data=weights, scales=each, axis=axis),
        Value(bias.shape, "int32", data=bias, scales=bias_scales),
    ]
    options = {
        "padding": 0 if at["padding"] == "SAME" else 1,
        "strideH": at["strides"][0],
        "strideW": at["strides"][1],
        "dilationHFactor": at["dilation"][0],
        "dilationWFactor": at["dilation"][1],
        "fusedActivationFunction": code(how["activation"]),
    }
    if depthwise:
        options["depthMultiplier"] = outputs // inputs
    low, high = clamp(how["activation"], y)
    op = Op(
        Kind.INT8_DEPTHWISE if depthwise else Kind.INT8_CONV2D, "c", (0,), 1, kernel=at["kernel"],
        strides=at["strides"], dilation=at["dilation"], pads=at["pads"], weights=weights[0] if depthwise else weights,
        bias=bias, weight_scales=np.broadcast_to(each.astype(np.float64), outputs), low=low, high=high,
    )  # fmt: skip
    name = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
    check(reference, Single(operator, values, y, name, options), op, how["seed"])


@SETTINGS
@given(windows(dilates=False), st.booleans(), st.integers(1, 9), scales, zero_points, activations, seeds)
def test_pools(
    reference: Reference, at: dict[str, Any], average: bool, channels: int, scale: float, zero: int, activation: str,
    seed: int,
) -> None:  # fmt: skip
    x, y = (Value((1, *at[size], channels), "int8", scale, zero) for size in ("size", "out"))
    options = {
        "padding": 0 if at["padding"] == "SAME" else 1,
        "strideH": at["strides"][0],
        "strideW": at["strides"][1],
        "filterHeight": at["kernel"][0],
        "filterWidth": at["kernel"][1],
        "fusedActivationFunction": code(activation),
    }
    low, high = clamp(activation, y)
    op = Op(
        Kind.INT8_AVGPOOL if average else Kind.INT8_MAXPOOL, "p", (0,), 1, kernel=at["kernel"], strides=at["strides"],
        dilation=(1, 1), pads=at["pads"], low=low, high=high,
    )  # fmt: skip
    check(
        reference, Single("AVERAGE_POOL_2D" if average else "MAX_POOL_2D", [x], y, "Pool2DOptions", options), op, seed
    )


@SETTINGS
@given(
    st.booleans(), st.integers(1, 50), scales, zero_points, st.floats(0.3, 3), zero_points, st.floats(0.5, 3),
    zero_points, activations, seeds,
)  # fmt: skip
def test_add_and_mul(
    reference: Reference, adds: bool, n: int, scale: float, zero: int, ratio: float, zero2: int, gain: float,
    zero_y: int, activation: str, seed: int,
) -> None:  # fmt: skip
    scale2 = float(np.float32(scale * ratio))
    full = scale + scale2 if adds else 127 * scale * scale2
    a, b = Value((1, n), "int8", scale, zero), Value((1, n), "int8", scale2, zero2)
    y = Value((1, n), "int8", float(np.float32(full * gain)), zero_y)
    low, high = clamp(activation, y)
    op = Op(Kind.INT8_ADD if adds else Kind.INT8_MUL, "a", (1, 2), 3, low=low, high=high)
    options = {"fusedActivationFunction": code(activation)}
    name = "Add" if adds else "Mul"
    check(reference, Single(name.upper(), [a, b], y, name + "Options", options), op, seed)


@SETTINGS
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 9),
    scales,
    zero_points,
    st.floats(0.2, 3),
    zero_points,
    seeds,
)
def test_mean(
    reference: Reference, h: int, w: int, channels: int, scale: float, zero: int, ratio: float, zero_y: int, seed: int
) -> None:
    x = Value((1, h, w, channels), "int8", scale, zero)
    y = Value((1, 1, 1, channels), "int8", float(np.float32(scale * ratio)), zero_y)
    axes = Value((2,), "int32", data=np.array([1, 2], np.int32))
    op = Op(Kind.INT8_MEAN, "m", (0,), 1)
    check(reference, Single("MEAN", [x, axes], y, "ReducerOptions", {"keepDims": True}), op, seed)


@SETTINGS
@given(
    st.integers(1, 6), st.integers(1, 40), st.floats(1e-3, 2).map(lambda v: float(np.float32(v))), zero_points, seeds
)
def test_softmax(reference: Reference, rows: int, n: int, scale: float, zero: int, seed: int) -> None:
    x, y = Value((1, 1, rows, n), "int8", scale, zero), Value((1, 1, rows, n), "int8", 1 / 256, -128)
    op = Op(Kind.INT8_SOFTMAX, "s", (0,), 1)
    check(reference, Single("SOFTMAX", [x], y, "SoftmaxOptions", {"beta": 1.0}), op, seed)


TABLES: dict[str, tuple[Callable[[Tensor, Tensor], bytes], str, dict[str, Any]]] = {
    "LOGISTIC": (quantized.logistic_table, "", {}),
    "TANH": (quantized.tanh_table, "", {}),
    "QUANTIZE": (quantized.requantize_table, "QuantizeOptions", {}),
    "RELU": (quantized.relu_table, "", {}),
    "RELU6": (lambda x, y: quantized.relu_table(x, y, high=6.0), "", {}),
    "LEAKY_RELU": (lambda x, y: quantized.leaky_relu_table(x, y, 0.3), "LeakyReluOptions", {"alpha": 0.3}),
}


@pytest.mark.parametrize("operator", TABLES)
@settings(max_examples=10, deadline=None)
@given(scales, zero_points, st.floats(0.3, 3), zero_points)
def test_tables(reference: Reference, operator: str, scale: float, zero: int, ratio: float, zero_y: int) -> None:
    """All 256 inputs."""
    function, options, fields = TABLES[operator]
    x, y = Value((1, 256), "int8", scale, zero), Value((1, 256), "int8", float(np.float32(scale * ratio)), zero_y)
    if operator == "LOGISTIC":
        y.scale, y.zero_point = 1 / 256, -128
    if operator == "TANH":
        y.scale, y.zero_point = 1 / 128, 0
    everything = np.arange(-128, 128, dtype=np.int8).reshape(1, 256)
    table = function(tensor(x), tensor(y))
    (wanted,) = reference(Single(operator, [x], y, options, fields).tflite(), [[everything]])
    op = Op(Kind.INT8_TABLE, "t", (0,), 1, table=table)
    got = MoteLearner(assemble(Graph((tensor(x), tensor(y)), (op,), 1))).infer(everything)
    np.testing.assert_array_equal(np.asarray(got), wanted.ravel())


@SETTINGS
@given(st.booleans(), st.integers(1, 60), scales, zero_points, seeds)
def test_quantize_and_dequantize(
    reference: Reference, quantizes: bool, n: int, scale: float, zero: int, seed: int
) -> None:
    real, whole = Value((1, n), "float32", scale), Value((1, n), "int8", scale, zero)
    x, y = (real, whole) if quantizes else (whole, real)
    op = Op(Kind.QUANTIZE if quantizes else Kind.DEQUANTIZE, "q", (0,), 1)
    name = "Quantize" if quantizes else "Dequantize"
    check(reference, Single(name.upper(), [x], y, name + "Options"), op, seed)


def test_quantize_rounds_half_away_from_zero_and_clamps() -> None:
    op = Op(Kind.QUANTIZE, "q", (0,), 1)
    graph = Graph((Tensor((1, 1, 8)), Tensor((1, 1, 8), "int8", 0.5, 1)), (op,), 1)
    got = MoteLearner(assemble(graph)).infer(np.float32([0.25, -0.25, 0.75, 0.7499999, 1e30, -1e30, 0, -0.0]))
    assert list(got) == [2, 0, 3, 2, 127, -128, 1, 1]


@given(st.floats(0, 2.0**29, allow_subnormal=False))
def test_a_multiplier_is_the_nearest_of_31_bits(real: float) -> None:
    multiplier, shift = quantized.quantize_multiplier(real)
    if multiplier == 0:
        assert real < 2.0**-31
    else:
        assert 1 << 30 <= multiplier < 1 << 31
        assert abs(multiplier * 2.0 ** (shift - 31) - real) <= 2.0 ** (shift - 32)


def test_scales_out_of_range_are_refused() -> None:
    for real in (-1.0, math.inf, math.nan, 2.0**40):
        with pytest.raises(ValueError, match="scale"):
            quantized.quantize_multiplier(real)
    shape: Shape3 = (1, 1, 4)
    tensors = [Tensor(shape, "int8", 1.0), Tensor(shape, "int8", 1.0), Tensor(shape, "int8", 1e-7)]
    with pytest.raises(ValueError, match="fine"):
        quantized.constants(Op(Kind.INT8_ADD, "a", (0, 1), 2), tensors)
    with pytest.raises(ValueError, match="softmax"):
        quantized.constants(Op(Kind.INT8_SOFTMAX, "s", (0,), 1), [Tensor(shape, "int8", 64.0), tensors[1]])
