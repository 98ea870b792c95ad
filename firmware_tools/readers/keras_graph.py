"""A Keras model as a graph of the engine, and where in the Keras model the weights of its operations are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge.errors import printable
from tinyfleet.edge.model.graph import Graph, Kind, Op, Shape
from tinyfleet.firmware_tools.readers.common import CompileError, compact, read_model_bytes
from tinyfleet.firmware_tools.readers.keras_file import check_before_loading
from tinyfleet.firmware_tools.readers.keras_loss import resolve_loss

Vector = NDArray[np.float32]

#: Frozen operations: each multiplies every channel and adds to it.
_SCALES = ("BatchNormalization", "Rescaling", "Normalization")
KERAS_EPSILON = 1e-7  # keras.config.epsilon(), below which Normalization takes no standard deviation


@dataclass(frozen=True)
class KerasLayer:
    """One layer of a Keras model's description: qualified name (`backbone/conv` for a layer in a nested model), class,
    settings, and whether Keras has it trainable."""

    name: str
    kind: str
    config: Mapping[str, Any]
    trainable: bool

    def error(self, problem: str) -> CompileError:
        return CompileError(f"layer '{self.name}' ({self.kind}) {problem}")


@dataclass(frozen=True)
class WeightSource:
    """Where an operation's weights and bias come from.

    part: of a separable convolution, 0 is the depthwise one and 1 the pointwise one. norms: the batch normalisations
    that are folded into it, the first one first.
    """

    layer: KerasLayer
    part: int = 0
    norms: tuple[KerasLayer, ...] = ()

    def arrays(self, model: Any, op: Op) -> tuple[Vector, Vector]:
        """The weights and the bias of the operation, in the engine's layouts, from a Keras model."""
        assert op.weights is not None and op.bias is not None
        w, b = self._own(model, op.weights.shape, op.bias.size)
        for norm in self.norms:
            scale, shift = _scale_and_shift(_find(model, norm.name), norm, b.size)
            w = w * (scale if op.kind == Kind.DEPTHWISE else scale.reshape(-1, *[1] * (w.ndim - 1)))
            b = b * scale + shift
        return np.ascontiguousarray(w, np.float32), b.astype(np.float32)

    def _own(self, model: Any, shape: Shape, channels: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Without what is folded in."""
        match self.layer.kind:
            case "BatchNormalization":
                return np.ones(shape), np.zeros(channels)
            case "Rescaling":
                scale, shift = (np.asarray(self.layer.config[name], float) for name in ("scale", "offset"))
                return np.broadcast_to(scale, shape), np.broadcast_to(shift, channels)
            case "Normalization":
                layer = _find(model, self.layer.name)
                mean, variance = (np.asarray(v, float).reshape(-1) for v in (layer.mean, layer.variance))
                scale = 1 / np.maximum(np.sqrt(variance), KERAS_EPSILON)
                return np.broadcast_to(scale, shape), np.broadcast_to(-mean * scale, channels)
        kernel, bias = self._variables(model)
        w = np.ones(shape) if kernel is None else np.asarray(kernel, np.float64)
        w = w.reshape(shape) if self._channels_last else np.moveaxis(w, -1, 0).reshape(shape)
        return w, np.zeros(channels) if bias is None else np.asarray(bias, np.float64)

    @property
    def _channels_last(self) -> bool:
        """Whether the engine has the weights as Keras has them."""
        return self.kind in ("DepthwiseConv", "LayerNormalization")

    @property
    def kind(self) -> str:
        """The layer's, of whatever dimensions, and what a separable convolution's parts are by themselves."""
        kind = self.layer.kind.removesuffix("1D").removesuffix("2D")
        return ("DepthwiseConv", "Conv")[self.part] if kind == "SeparableConv" else kind

    def _variables(self, model: Any) -> tuple[Any, Any]:
        """Keras's variables for the weights and the bias; None where the layer has none."""
        layer = _find(model, self.layer.name)
        if self.kind == "LayerNormalization":
            return layer.gamma, layer.beta
        if self.layer.kind.startswith("Separable"):
            return (layer.pointwise_kernel, layer.bias) if self.part else (layer.depthwise_kernel, None)
        return layer.kernel, layer.bias

    def write(self, model: Any, weights: Vector | None, bias: Vector | None) -> None:
        """Puts new weights and a new bias, where given, into a Keras model. Raises CompileError."""
        if self.norms:
            raise self.layer.error(
                f"has the batch normalization '{self.norms[0].name}' folded into it, so its weights cannot be split "
                "again; keep them in the program, or leave this layer out"
            )
        if self.layer.kind in _SCALES:
            raise self.layer.error("has no weights that train; leave it out")
        for new, variable, absent in zip((weights, bias), self._variables(model), (1.0, 0.0), strict=True):
            if new is None:
                continue
            if variable is not None:
                outward = new if self._channels_last or new.ndim == 1 else np.moveaxis(new, 0, -1)
                variable.assign(outward.reshape(variable.shape))
            elif (new != absent).any():
                raise self.layer.error("has learned a bias or a scale that it does not have in Keras; give it one")


@dataclass(frozen=True)
class KerasGraph:
    """A Keras model as a graph without its weights (all 0), and where they come from.

    Parameters
    ----------
    graph : Graph
        Its operations train as Keras has their layers trainable.
    sources : tuple of WeightSource
        One for every operation with weights, in their order.
    compiled : mapping
        Keras's record of how the model was compiled.
    loss_undecided : str
        Why the graph has no loss, if the model leaves it open.
    """

    graph: Graph
    sources: tuple[WeightSource, ...]
    compiled: Mapping[str, Any]
    loss_undecided: str = ""

    def with_loss(self, loss: str | None) -> KerasGraph:
        """The same with its loss, as `resolve_loss` finds it. Raises CompileError."""
        graph, undecided = resolve_loss(self.graph, loss, self.compiled)
        return replace(self, graph=compact(graph), loss_undecided=undecided)

    def with_weights(self, model: Any) -> Graph:
        """The graph with the weights of a Keras model: an object, or the path of a .keras file. Raises CompileError."""
        keras_model = _load(Path(model)) if isinstance(model, str | Path) else model
        sources = iter(self.sources)
        ops = []
        for op in self.graph.ops:
            if op.weights is not None:
                weights, bias = next(sources).arrays(keras_model, op)
                op = replace(op, weights=weights, bias=bias)
            ops.append(op)
        return replace(self.graph, ops=tuple(ops))

    @property
    def fixed(self) -> frozenset[str]:
        """The layers whose scale and shift never train on a device."""
        return frozenset(s.layer.name for s in self.sources if s.layer.kind in _SCALES)

    def untrainable(self, first: str | None = None) -> KerasLayer | None:
        """The first batch normalization that would have to train: from the layer named `first` on, or None: of what is
        trainable in Keras."""
        ops = self.graph.ops
        start = 0 if first is None else next(i for i, op in enumerate(ops) if op.name == first)
        before = sum(op.weights is not None for op in ops[:start])
        return next((norm for s in self.sources[before:] for norm in s.norms if norm.trainable), None)


def _load(path: Path) -> Any:
    """The model of a .keras file, without its optimiser and loss."""
    if find_spec("keras") is None:
        raise CompileError("reading a model's weights needs Keras; pip install 'tinyfleet[keras]'")
    check_before_loading(read_model_bytes(path), f"'{path}'")
    try:
        import keras  # type: ignore[import-untyped]

        return keras.saving.load_model(path, compile=False)
    except Exception as e:  # Keras raises whatever its parts raise
        said = str(e).strip().split("\n")[0]
        raise CompileError(f"Keras cannot load '{path}' ({printable(said, 200) or type(e).__name__})") from e


def _find(model: Any, name: str) -> Any:
    """The layer with a qualified name (`backbone/conv`)."""
    for part in name.split("/"):
        model = model.get_layer(part)
    return model


def _scale_and_shift(layer: Any, norm: KerasLayer, channels: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a batch normalization multiplies by and adds in inference."""
    gamma = np.asarray(layer.gamma, np.float64) if norm.config["scale"] else np.ones(channels)
    beta = np.asarray(layer.beta, np.float64) if norm.config["center"] else np.zeros(channels)
    mean, variance = (np.asarray(v, np.float64) for v in (layer.moving_mean, layer.moving_variance))
    scale = gamma / np.sqrt(variance + norm.config["epsilon"])
    return scale, beta - mean * scale
