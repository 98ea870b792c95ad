"""The loss of a Keras model: as asked for, else as the model was compiled, else as its end tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tinyfleet.edge.model.graph import LOSSES, Graph, Kind, Loss, Op
from tinyfleet.firmware_tools.readers.common import CompileError

CROSS_ENTROPY, MSE, BINARY, HUBER = LOSSES

#: Losses by Keras's names, as functions and as classes.
_LOSS_NAMES: dict[str, Loss] = {
    "sparse_categorical_crossentropy": CROSS_ENTROPY,
    "SparseCategoricalCrossentropy": CROSS_ENTROPY,
    "categorical_crossentropy": CROSS_ENTROPY,
    "CategoricalCrossentropy": CROSS_ENTROPY,
    "binary_crossentropy": BINARY,
    "BinaryCrossentropy": BINARY,
    "mse": MSE,
    "mean_squared_error": MSE,
    "MeanSquaredError": MSE,
    "huber": HUBER,
    "Huber": HUBER,
}
#: What a loss computes itself, so that a model's end of it goes.
_OWN_END = {CROSS_ENTROPY: Kind.SOFTMAX, BINARY: Kind.SIGMOID}
_ENDS = {Kind.SOFTMAX: "in a softmax", Kind.SIGMOID: "in a sigmoid", None: "in no softmax and no sigmoid"}

_CHOICE = (
    f"choose the loss {CROSS_ENTROPY} (its outputs are scores of classes, one for each), {BINARY} (of yes or no, "
    f"each), {MSE} or {HUBER} (values)"
)


@dataclass(frozen=True)
class _End:
    """How a model ends. last: the op that writes its output. kind: a softmax over all outputs, or a sigmoid, if that
    is it. flat: it has one row of outputs."""

    last: Op | None
    kind: Kind | None
    flat: bool

    @classmethod
    def of(cls, graph: Graph) -> _End:
        last = next((op for op in graph.ops if op.output == graph.output), None)
        flat = graph.tensors[graph.output].shape[:2] == (1, 1)
        kinds = (Kind.SOFTMAX, Kind.SIGMOID) if flat else (Kind.SIGMOID,)
        return cls(last, last.kind if last is not None and last.kind in kinds else None, flat)

    @property
    def own_loss(self) -> Loss | None:
        """The loss that the softmax or sigmoid belongs to."""
        return next((loss for loss, kind in _OWN_END.items() if kind == self.kind), None)

    def goes_with(self, loss: Loss, logits: bool) -> bool:
        """logits: the outputs may be what the loss's own softmax or sigmoid is put behind."""
        if loss not in _OWN_END:
            return True
        if loss == CROSS_ENTROPY and not self.flat:
            return False
        return self.kind == _OWN_END[loss] or (self.kind is None and logits)

    def without_own(self, graph: Graph) -> Graph:
        """The graph without the softmax or sigmoid at its end."""
        if self.kind is None or self.last is None:
            return graph
        ops = tuple(op for op in graph.ops if op is not self.last)
        return replace(graph, ops=ops, output=self.last.inputs[0])


def resolve_loss(graph: Graph, loss: str | None, compiled: Mapping[str, Any]) -> tuple[Graph, str]:
    """Give a graph its loss.

    Parameters
    ----------
    graph : Graph
        Without a loss.
    loss : str, optional
        One of `edge.model.graph.LOSSES`. None: the one that the model was compiled with, else the one that its last
        softmax or sigmoid belongs to.
    compiled : mapping
        Keras's record of how the model was compiled; empty if it was not.

    Returns
    -------
    graph : Graph
        With the loss, and without the softmax or sigmoid that the loss computes itself; unchanged if it is undecided.
    undecided : str
        Why the loss is undecided, and which there are to choose from; else empty.

    Raises
    ------
    CompileError
        If `loss` is unknown, or does not go with the model's end.
    """
    wanted = next((known for known in LOSSES if known == loss), None)
    if loss is not None and wanted is None:
        raise CompileError(f"unknown loss '{loss}'; supported: {', '.join(LOSSES)}")
    name, config = _compiled_loss(compiled.get("loss"))
    end = _End.of(graph)
    resolved = wanted or (end.own_loss if name is None else _LOSS_NAMES.get(name))
    logits = wanted is not None or bool(config.get("from_logits"))
    if resolved is None or not end.goes_with(resolved, logits):
        if wanted is not None:
            raise CompileError(f"the model ends {_ENDS[end.kind]}, which does not go with the loss {wanted}: {_CHOICE}")
        history = "is not compiled with a loss" if name is None else f"is compiled with the loss {name}"
        return graph, f"the model ends {_ENDS[end.kind]} and {history}; {_CHOICE}"
    if resolved in _OWN_END:
        graph = end.without_own(graph)
    delta = float(config.get("delta", 1.0)) if name is not None and _LOSS_NAMES.get(name) == HUBER else 1.0
    return replace(graph, loss=resolved, huber_delta=delta), ""


def _compiled_loss(loss: Any) -> tuple[str | None, Mapping[str, Any]]:
    """Name and settings of the loss that a model was compiled with."""
    if isinstance(loss, list) and len(loss) == 1:
        loss = loss[0]
    if isinstance(loss, dict) and "class_name" in loss:
        config = loss.get("config")
        return str(loss["class_name"]), config if isinstance(config, dict) else {}
    return (None if loss is None else str(loss)), {}
