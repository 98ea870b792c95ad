"""What training in int8 reaches, and in what RAM: digits learned upright, then seen in a mirror.

    python benchmarks/quantized_training.py

A small depthwise-separable network learns handwritten digits in Keras and is converted to int8. On the device, mirrored
digits come one at a time, for three rounds; measured is the accuracy on 597 others. Every way to learn has its own best
rate, of those tried. Without quantisation-aware scaling (NumPy computes that: the engine has nothing else than with it)
the gradients are those of the int8 and int32 numbers themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from numpy.typing import NDArray
from quantised_nets import Reference, digits, int8_tflite, keras_digits, quantised

from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.graph import Graph
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.memory_plan import INT8_WEIGHTED, resource_use, with_training
from tinyfleet.firmware_tools.compiler.quantized_training import (
    LayerUpdate,
    Selection,
    measure_importance,
    select_all_from,
    select_update,
    train_int8,
)
from tinyfleet.firmware_tools.readers.keras_reader import read_keras
from tinyfleet.firmware_tools.readers.tflite_reader import read_tflite

ROUNDS = 3
RATES = (0.001, 0.003, 0.01, 0.03)
#: Those of gradients without scaling are some 1 / scale^2 as large.
RATES_WITHOUT = (1.0, 10.0, 100.0, 1000.0, 10000.0)


def best(learn: Callable[[float], float], rates: Iterable[float]) -> tuple[float, float]:
    return max((learn(rate), rate) for rate in rates)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    x, y, test_x, test_y = digits()
    model = keras_digits(x, y)
    graph = read_tflite(int8_tflite(model, x))
    mirrored, test_mirrored = (np.ascontiguousarray(part[:, :, ::-1]) for part in (x, test_x))
    q, test_q = quantised(graph, mirrored), quantised(graph, test_mirrored)

    def engine(graph: Graph, x: NDArray[Any], test: NDArray[Any]) -> Callable[[float], float]:
        def learn(rate: float) -> float:
            learner = MoteLearner(assemble(graph))
            for _ in range(ROUNDS if rate else 0):
                for sample, label in zip(x, y, strict=True):
                    learner.learn(sample, label, rate)
            right = [learner.infer(sample).argmax() == label for sample, label in zip(test, test_y, strict=True)]
            return float(np.mean(right))

        return learn

    def unscaled(rate: float) -> float:
        reference = Reference(whole, scaled=False)
        for _ in range(ROUNDS):
            for sample, label in zip(q, y, strict=True):
                reference.learn(sample, int(label), rate)
        return float(np.mean([reference.forward(s).argmax() == label for s, label in zip(test_q, test_y, strict=True)]))

    def show(what: str, ram: int, found: tuple[float, float]) -> None:
        rate = f"{found[1]:g}" if found[1] else ""
        print(f"{what:<42}{ram:>8,} B{found[0]:>9.1%}   {rate}", flush=True)

    names = [op.name for op in graph.ops if op.kind in INT8_WEIGHTED]
    all_of_it = select_all_from(graph, names[0])
    whole = train_int8(graph, all_of_it)
    biases: Selection = {name: LayerUpdate("bias", update.channels) for name, update in all_of_it.items()}
    parts = {"int8, all": all_of_it, "int8, biases": biases, "int8, head": select_all_from(graph, names[-1])}
    needs = resource_use(whole).arena
    measured = measure_importance(graph, q[:100], y[:100])
    for fraction in (0.4, 0.6, 0.8):
        budget = int(fraction * needs)
        parts[f"int8, chosen for {budget:,} B by rule"] = select_update(graph, budget)
        parts[f"int8, chosen for {budget:,} B by 100 samples"] = select_update(graph, budget, measured)

    print(f"{'':<42}{'RAM':>10}{'accuracy':>9}   best rate")
    as_float = read_keras(model)
    show(
        "not trained, int8",
        resource_use(train_int8(graph, parts["int8, head"])).arena,
        (engine(whole, q, test_q)(0.0), 0.0),
    )
    show("float32, all", resource_use(as_float).arena, best(engine(as_float, mirrored, test_mirrored), RATES))
    last = max(i for i, op in enumerate(as_float.ops) if op.weights is not None)
    head = with_training(as_float, last)
    show("float32, head", resource_use(head).arena, best(engine(head, mirrored, test_mirrored), RATES))
    for what, selection in parts.items():
        part = train_int8(graph, selection)
        show(what, resource_use(part).arena, best(engine(part, q, test_q), RATES))
    show("int8, all, without scaling, same rates", needs, best(unscaled, RATES[-2:]))
    for rate in RATES_WITHOUT:
        show("int8, all, without scaling", needs, (unscaled(rate), rate))


if __name__ == "__main__":
    main()
