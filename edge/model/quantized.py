"""int8 by TFLite's specification: the constants that the engine's int8 operations carry.

Scales are float32 in a model. TFLite makes its fixed-point multipliers of them in float for some operations and in
double for others, and so does this module: the last bit of a multiplier shows in an output now and then.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.model.graph import Kind, Op, Tensor

#: By how much an addition widens its inputs before it scales them.
_ADD_SHIFT = 20
#: Integer bits of the differences that a softmax takes the exponential of.
_SOFTMAX_BITS = 5

_TRAINED = {
    Kind.TRAINED_INT8_DENSE: Kind.INT8_DENSE,
    Kind.TRAINED_INT8_CONV2D: Kind.INT8_CONV2D,
    Kind.TRAINED_INT8_DEPTHWISE: Kind.INT8_DEPTHWISE,
}


def quantize_multiplier(real: float) -> tuple[int, int]:
    """Convert a scale to TFLite's fixed-point form.

    Parameters
    ----------
    real
        In [0, 2^30).

    Returns
    -------
    multiplier, shift : int
        real = multiplier * 2^(shift - 31) with 2^30 <= multiplier < 2^31; both 0 if `real` is 0 or too small.

    Raises
    ------
    ValueError
        If `real` is out of range.
    """
    if not 0.0 <= real < 2.0**30:
        raise ValueError(f"a scale of {real} is not one that int8 can have")
    fraction, shift = math.frexp(real)
    multiplier = math.floor(fraction * 2.0**31 + 0.5)
    if multiplier == 1 << 31:
        multiplier, shift = 1 << 30, shift + 1
    return (0, 0) if shift < -31 else (multiplier, shift)


def scaled(x: int, multiplier: int, shift: int) -> int:
    """x * multiplier * 2^(shift - 31), rounded twice, as TFLite's MultiplyByQuantizedMultiplier."""
    high = ((x << max(shift, 0)) * multiplier + (1 << 30)) >> 31
    right = max(-shift, 0)
    return (high + (1 << right - 1) - (high < 0)) >> right if right else high


def _clamped(value: float) -> int:
    return int(min(max(value, -128), 127))


def _table(function: Callable[[int], float]) -> bytes:
    """The table of a function of an input -128 ... 127."""
    return struct.pack("256b", *(_clamped(function(q)) for q in range(-128, 128)))


def _float_ratio(a: float, b: float) -> float:
    return float(np.float32(a) / np.float32(b))


def _real_table(x: Tensor, y: Tensor, function: Callable[[np.float32], np.float32]) -> bytes:
    """The table of a real function, computed in float32."""
    inverse = np.float32(1) / np.float32(y.scale)

    def value(q: int) -> float:
        real = float(function(np.float32(x.scale) * np.float32(q - x.zero_point)) * inverse)
        return math.copysign(math.floor(abs(real) + 0.5), real) + y.zero_point

    return _table(value)


def logistic_table(x: Tensor, y: Tensor) -> bytes:
    """An INT8_TABLE's bytes for 1 / (1 + e^-x)."""

    def logistic(v: np.float32) -> np.float32:
        with np.errstate(over="ignore"):
            return np.float32(1) / (np.float32(1) + np.float32(np.exp(-np.float64(v))))

    return _real_table(x, y, logistic)


def tanh_table(x: Tensor, y: Tensor) -> bytes:
    """An INT8_TABLE's bytes for tanh."""
    return _real_table(x, y, lambda v: np.float32(math.tanh(float(v))))


def requantize_table(x: Tensor, y: Tensor) -> bytes:
    """An INT8_TABLE's bytes for the same real value at another scale and zero point."""
    scale = quantize_multiplier(float(np.float32(x.scale)) / float(np.float32(y.scale)))
    return _table(lambda q: scaled(q - x.zero_point, *scale) + y.zero_point)


def relu_table(x: Tensor, y: Tensor, low: float = 0.0, high: float = math.inf) -> bytes:
    """An INT8_TABLE's bytes for max(low, min(x, high)): ReLU, ReLU6, ..."""
    scale = quantize_multiplier(_float_ratio(x.scale, y.scale))

    def bound(real: float) -> float:
        ratio = _float_ratio(real, y.scale)
        return y.zero_point + math.copysign(math.floor(abs(ratio) + 0.5), ratio)

    least = max(-128.0, bound(low))
    most = 127.0 if high == math.inf else min(127.0, bound(high))
    return _table(lambda q: min(max(scaled(q - x.zero_point, *scale) + y.zero_point, least), most))


def leaky_relu_table(x: Tensor, y: Tensor, slope: float) -> bytes:
    """An INT8_TABLE's bytes for x if x >= 0, else slope * x. Raises ValueError if the slope is negative."""
    above = quantize_multiplier(_float_ratio(x.scale, y.scale))
    below = quantize_multiplier(float(np.float32(x.scale) * np.float32(slope) / np.float32(y.scale)))

    def value(q: int) -> int:
        difference = q - x.zero_point
        return scaled(difference, *(above if difference >= 0 else below)) + y.zero_point

    return _table(value)


def _range(op: Op) -> bytes:
    return struct.pack("<bbxx", op.low, op.high)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _output_scales(kind: Kind, scales: NDArray[np.float64], x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """What an accumulator of each output channel is multiplied by."""
    s_x, s_y = np.float32(x.scale), np.float32(y.scale)
    if kind == Kind.INT8_DENSE and bool(np.all(scales == scales[0])):
        # One scale for all: TFLite multiplies it with the input's in float.
        return (s_x * scales.astype(np.float32)).astype(np.float64) / np.float64(s_y)
    return np.float64(s_x) * scales.astype(np.float32).astype(np.float64) / np.float64(s_y)


def _weighted(op: Op, x: Tensor, y: Tensor) -> bytes:
    """The constants of dense and convolutions, also where some of their channels train."""
    assert op.weights is not None and op.weight_scales is not None
    kind = _TRAINED.get(op.kind, op.kind)
    depthwise = kind == Kind.INT8_DEPTHWISE
    # Output channels first.
    rows = np.moveaxis(op.weights, -1, 0) if depthwise else op.weights
    channels = len(rows)
    bias = np.zeros(channels, np.int64) if op.bias is None else op.bias.astype(np.int64)
    trained = 0
    if op.kind in _TRAINED and op.trains != "nothing":
        trained = channels if op.trained is None else op.trained
    bias[:trained] = 0
    folded = bias - x.zero_point * rows.reshape(channels, -1).astype(np.int64).sum(axis=1)
    if op.trains == "all":
        folded[:trained] = 0  # what the zero point takes off moves with the weights
    parts = [_range(op)]
    for value, scale in zip(folded, _output_scales(kind, op.weight_scales, x, y), strict=True):
        parts.append(struct.pack("<iii", (int(value) + 2**31) % 2**32 - 2**31, *quantize_multiplier(float(scale))))
    if op.kind in _TRAINED:
        parts.append(op.weight_scales.astype("<f4").tobytes())
    kept = rows[trained:] if op.trains == "all" else rows
    parts.append(_padded((np.moveaxis(kept, 0, -1) if depthwise else kept).astype(np.int8).tobytes()))
    return b"".join(parts)


def _add(op: Op, x: Tensor, x2: Tensor, y: Tensor) -> bytes:
    s_x, s_x2, s_y = (float(np.float32(t.scale)) for t in (x, x2, y))
    twice = 2 * max(s_x, s_x2)
    scales = (s_x / twice, s_x2 / twice, twice / (2**_ADD_SHIFT * s_y))
    if scales[2] >= 1:
        raise ValueError(f"an addition's output of scale {y.scale} is too fine for its inputs")
    numbers = [-x.zero_point, -x2.zero_point, y.zero_point, _ADD_SHIFT]
    return struct.pack("<10i", *numbers, *(n for scale in scales for n in quantize_multiplier(scale))) + _range(op)


def _mul(op: Op, x: Tensor, x2: Tensor, y: Tensor) -> bytes:
    scale = quantize_multiplier(float(np.float32(x.scale) * np.float32(x2.scale) / np.float32(y.scale)))
    return _range(op) + struct.pack("<5i", -x.zero_point, -x2.zero_point, y.zero_point, *scale)


def _mean(op: Op, x: Tensor, y: Tensor) -> bytes:
    count = x.shape[0] * x.shape[1]
    multiplier, shift = quantize_multiplier(float(np.float32(x.scale)) / float(np.float32(y.scale)))
    bits = min(count.bit_length() - 1, 32, 31 + shift)
    return _range(op) + struct.pack("<3i", (multiplier << bits) // count, shift - bits, -x.zero_point * count)


def _softmax(op: Op, x: Tensor) -> bytes:
    scale = float(np.float32(op.beta)) * float(np.float32(x.scale)) * 2.0 ** (31 - _SOFTMAX_BITS)
    fraction, shift = math.frexp(min(scale, 2.0**31 - 1))
    multiplier = math.floor(fraction * 2.0**31 + 0.5)
    if multiplier == 1 << 31:
        multiplier, shift = 1 << 30, shift + 1
    if scale <= 1 or shift > 30:
        raise ValueError(f"a softmax's input cannot have the scale {x.scale} with beta {op.beta}")
    radius = ((1 << _SOFTMAX_BITS) - 1) * 2.0 ** (31 - _SOFTMAX_BITS - shift)
    return struct.pack("<3i", multiplier, shift, -math.floor(radius))


def constants(op: Op, tensors: Sequence[Tensor]) -> bytes:
    """The bytes behind an int8 op's `constants`, as mote_internal.h lays them out, without what trains.

    Raises ValueError if a scale is out of range.
    """
    x, y = tensors[op.inputs[0]], tensors[op.output]
    if op.kind in _TRAINED or op.kind in _TRAINED.values():
        return _weighted(op, x, y)
    if op.kind in (Kind.INT8_AVGPOOL, Kind.INT8_MAXPOOL):
        return _range(op)
    if op.kind == Kind.INT8_ADD:
        return _add(op, x, tensors[op.inputs[1]], y)
    if op.kind == Kind.INT8_MUL:
        return _mul(op, x, tensors[op.inputs[1]], y)
    if op.kind == Kind.INT8_MEAN:
        return _mean(op, x, y)
    if op.kind == Kind.INT8_SOFTMAX:
        return _softmax(op, x)
    if op.kind == Kind.INT8_TABLE:
        return op.table
    return b""  # quantize, dequantize
