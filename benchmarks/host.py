"""How many training steps a second this computer makes: the engine, one device or many, beside TFLite's interpreter.

    python benchmarks/host.py [--json] [--seconds 1.0]

One model, 64-32-10 with ReLU under softmax cross-entropy: `learn` is MoteLearner.learn from Python, sample by sample;
`learn_many` steps 64 devices 50 samples further in one call; `tflite` is LiteRTLearner.learn, the training signature of
the same model's .tflite in tflite-runtime (or LiteRT), on one thread. All in one run, in turns, the best of five: what
else the computer does slows single turns down.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from rich.console import Console
from rich.table import Table

from edge import program
from edge.learner import LearnerError, LiteRTLearner, MoteLearner, learn_many

MODEL = program.build([program.Dense(32), program.ReLU(), program.Dense(10)], (64,), "softmax_cross_entropy")
RATE = 0.02
DEVICES, STEPS, TURNS = 64, 50, 5


def tflite() -> bytes:
    """The model as a .tflite with training signatures. Needs TensorFlow, and a process that may import it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    from firmware_tools.export import export_tflite

    layers = [
        keras.Input((64,)),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
    return export_tflite(keras.Sequential(layers))


def rate_of(work: Callable[[], int], seconds: float) -> float:
    """Steps a second of `work`, which does some and says how many, in about so many seconds."""
    steps, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        steps += work()
    return steps / took


def contestants() -> dict[str, Callable[[], int]]:
    """By name: what does some steps and says how many. tflite is left out where there is no interpreter."""
    random = np.random.default_rng(0)
    xs = random.normal(size=(DEVICES, STEPS, 64)).astype(np.float32)
    ys = random.integers(0, 10, (DEVICES, STEPS)).astype(np.float32)

    def fresh() -> MoteLearner:
        learner = MoteLearner(MODEL)
        learner.set_parameters(MODEL.initial(0))
        return learner

    def one(learner: MoteLearner | LiteRTLearner) -> Callable[[], int]:
        def work() -> int:
            for x, y in zip(xs[0], ys[0], strict=True):
                learner.learn(x, y, RATE)
            return STEPS

        return work

    def many(threads: int) -> Callable[[], int]:
        learners = [fresh() for _ in range(DEVICES)]

        def work() -> int:
            learn_many(learners, xs, ys, RATE, threads=threads)
            return DEVICES * STEPS

        return work

    found = {"learn": one(fresh()), "learn_many, 1 thread": many(1), "learn_many, 2 threads": many(2)}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found["tflite"] = one(LiteRTLearner(pool.submit(tflite).result()))
    except (ImportError, LearnerError) as missing:
        print(f"without tflite: {missing}", file=sys.stderr)
    return found


def measure(seconds: float) -> dict[str, float]:
    """Steps a second by contestant: the best of TURNS turns of so many seconds each."""
    work = contestants()
    best = dict.fromkeys(work, 0.0)
    for _ in range(TURNS):
        for name, do in work.items():
            best[name] = max(best[name], rate_of(do, seconds))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description="Training steps a second on this computer.")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    rates = measure(arguments.seconds)
    if arguments.json:
        print(json.dumps(rates, indent=2))
        return 0
    table = Table(title="Training steps a second, 64-32-10 MLP")
    table.add_column("")
    table.add_column("steps a second", justify="right")
    table.add_column("beside tflite", justify="right")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates['tflite']:.1f}" if "tflite" in rates else "")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
