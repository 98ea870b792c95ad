"""How fast this computer trains and infers: the engine, for one device or many, beside TFLite's interpreter.

    python benchmarks/host.py [--json] [--seconds 1.0]

Training: one model, 64-32-10 with ReLU under softmax cross-entropy. `learn` is MoteLearner.learn from Python, sample by
sample; `learn_many` steps 64 devices 50 samples further in one call; `tflite` is LiteRTLearner.learn, the training
signature of the same model's .tflite in tflite-runtime (or LiteRT), on one thread.

Inference: the int8 models of MLPerf Tiny, from $TINYFLEET_DATA; without it they are left out. MoteLearner.infer beside
tflite-runtime's interpreter on one thread with its optimised kernels, and no delegate (XNNPACK). Those round otherwise
than TFLite's reference kernels now and then, whose bytes the engine gives: `apart` is the largest difference.

All in one run, in turns, and of each its shortest call: what else the computer does makes calls longer. `processor` is
the processor's time for a step, on all threads: it shows what several threads cost each other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from tinyfleet.edge.model import layers
from tinyfleet.edge.model.assemble import assemble
from tinyfleet.edge.model.learner import LearnerError, LiteRTLearner, MoteLearner, learn_many
from tinyfleet.firmware_tools.readers import tflite_reader

MODEL = layers.build([layers.Dense(32), layers.ReLU(), layers.Dense(10)], (64,), "softmax_cross_entropy")
RATE = 0.02
DEVICES, STEPS, TURNS = 64, 50, 5
INT8 = {
    "DS-CNN, keyword spotting": "kws_ref_model",
    "MobileNet, visual wake words": "vww_96_int8",
    "ResNet, image classification": "pretrainedResnet_quant",
    "autoencoder, anomaly detection": "ad01_int8",
}

Array = NDArray[Any]


def tflite() -> bytes:
    """The model as a .tflite with training signatures. Needs TensorFlow, and a process that may import it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras  # type: ignore[import-untyped]

    from tinyfleet.firmware_tools.compiler.export import export_tflite

    layers = [
        keras.Input((64,)),
        keras.layers.Dense(32, activation="relu"),
        keras.layers.Dense(10, activation="softmax"),
    ]
    return export_tflite(keras.Sequential(layers))


@dataclass
class Cost:
    """Seconds: the shortest call, and the least time of the processor for one."""

    wall: float = float("inf")
    processor: float = float("inf")


def cheapest(work: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Cost]:
    """What one call costs: TURNS turns of so many seconds each."""
    costs = {name: Cost() for name in work}
    for _ in range(TURNS):
        for name, do in work.items():
            cost, begin = costs[name], time.perf_counter()
            while (start := time.perf_counter()) - begin < seconds:
                used = time.process_time()
                do()
                cost.processor = min(cost.processor, time.process_time() - used)
                cost.wall = min(cost.wall, time.perf_counter() - start)
    return costs


def training(seconds: float) -> dict[str, dict[str, float]]:
    """Steps a second, and microseconds of the processor for each. tflite is left out where there is no interpreter."""
    random = np.random.default_rng(0)
    xs = random.normal(size=(DEVICES, STEPS, 64)).astype(np.float32)
    ys = random.integers(0, 10, (DEVICES, STEPS)).astype(np.float32)

    def fresh() -> MoteLearner:
        learner = MoteLearner(MODEL)
        learner.set_parameters(MODEL.initial(0))
        return learner

    def one(learner: MoteLearner | LiteRTLearner) -> None:
        for x, y in zip(xs[0], ys[0], strict=True):
            learner.learn(x, y, RATE)

    learners = [fresh() for _ in range(DEVICES)]
    work: dict[str, Callable[[], object]] = {"learn": partial(one, fresh())}
    for threads in (1, 2):
        name = f"learn_many, {threads} thread{'s' * (threads > 1)}"
        work[name] = partial(learn_many, learners, xs, ys, RATE, threads=threads)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            work["tflite"] = partial(one, LiteRTLearner(pool.submit(tflite).result()))
    except (ImportError, LearnerError) as missing:
        print(f"training without tflite: {missing}", file=sys.stderr)
    found = {}
    for name, cost in cheapest(work, seconds).items():
        steps = STEPS * (DEVICES if "many" in name else 1)
        found[name] = {"steps a second": steps / cost.wall, "processor": cost.processor / steps * 1e6}
    return found


def interpreter(model: Path) -> Callable[[Array], Array]:
    """TFLite's inference, as MoteLearner.infer."""
    from tflite_runtime.interpreter import Interpreter, OpResolverType

    resolver = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    opened = Interpreter(model_path=str(model), num_threads=1, experimental_op_resolver_type=resolver)
    opened.allocate_tensors()
    (source,), (sink,) = opened.get_input_details(), opened.get_output_details()

    def infer(x: Array) -> Array:
        opened.set_tensor(source["index"], x.reshape(source["shape"]))
        opened.invoke()
        output: Array = opened.get_tensor(sink["index"])
        return output.ravel()

    return infer


def inference(model: Path, seconds: float) -> dict[str, float]:
    """Milliseconds an inference, and how far the outputs are apart on 20 random inputs."""
    learner, beside = MoteLearner(assemble(tflite_reader.read_tflite(model))), interpreter(model)
    size = learner.program.input.size
    samples = np.random.default_rng(0).integers(-128, 128, (20, size)).astype(np.int8)
    apart = max(int(np.abs(learner.infer(x).astype(int) - beside(x)).max()) for x in samples)
    costs = cheapest({"mote": partial(learner.infer, samples[0]), "tflite": partial(beside, samples[0])}, seconds)
    return {name: cost.wall * 1e3 for name, cost in costs.items()} | {"apart": apart}


def main() -> int:
    parser = argparse.ArgumentParser(description="Training steps and int8 inference on this computer.")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    steps, inferences = training(arguments.seconds), {}
    try:
        folder = Path(os.environ["TINYFLEET_DATA"]) / "tflite"
        for name, file in INT8.items():
            inferences[name] = inference(folder / f"mlperf_tiny__{file}.tflite", arguments.seconds)
    except (ImportError, KeyError) as missing:
        print(f"no inference: {missing} is missing", file=sys.stderr)
    scaling = steps["learn_many, 2 threads"]["steps a second"] / steps["learn_many, 1 thread"]["steps a second"]
    if arguments.json:
        print(json.dumps({"training": steps, "scaling": scaling, "inference": inferences}, indent=2))
        return 0
    table = Table(title="Training, 64-32-10 MLP")
    for i, head in enumerate(("", "steps a second", "processor, µs a step", "beside tflite")):
        table.add_column(head, justify="right" if i else "left", no_wrap=True)
    for name, row in steps.items():
        rate, reference = row["steps a second"], steps.get("tflite")
        ratio = f"{rate / reference['steps a second']:.1f}" if reference else ""
        table.add_row(name, f"{rate:,.0f}", f"{row['processor']:.2f}", ratio)
    Console().print(table)
    print(f"learn_many, 2 threads beside 1: {scaling:.2f}")
    if inferences:
        table = Table(title="int8 inference, milliseconds")
        for i, head in enumerate(("", "mote", "tflite", "tflite / mote", "apart")):
            table.add_column(head, justify="right" if i else "left", no_wrap=True)
        for name, row in inferences.items():
            ratio = f"{row['tflite'] / row['mote']:.1f}"
            table.add_row(name, f"{row['mote']:.3f}", f"{row['tflite']:.3f}", ratio, f"{row['apart']:.0f}")
        Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
