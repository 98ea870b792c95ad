"""Trains and scores a network for Omniglot, 5-way, that learns new characters within 128 KB of a device's RAM.

    python benchmarks/omniglot_small.py --out small.npz
    python benchmarks/omniglot_small.py --epochs 2 --tasks 100 --json

Four convolutions of stride 2 and a dense layer on 28x28 pixels, trained on the server and adapted on the device:

1. The server trains the convolutions, with batch normalisation and a dense layer that is then thrown away, to tell all
   training characters apart: each is four of them, turned by multiples of 90 degrees, and every image is moved by up to
   two pixels. A classifier of many classes has features that few samples are enough for: Chen et al., "A Closer Look at
   Few-shot Classification", 2019.
2. The normalisation is folded into the convolutions: what is left is a program of the engine.
3. A device starts from that, with the dense layer at 0, and trains all layers, one sample a step, by plain gradient
   descent, 100 of them. The rate is the one that is best on validation tasks.

The score is that of server.evaluate.few_shot: by the C engine, on tasks of the evaluation alphabets, every query asked
alone. Needs $TINYFLEET_DATA, or downloads Omniglot.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras  # type: ignore[import-untyped]
import numpy as np
from instructions import instructions, small
from keras import layers
from numpy.typing import NDArray

from tinyfleet.edge.model.layers import Conv2D, Dense, Flatten, Layer, ReLU
from tinyfleet.edge.model.layers import build as build_program
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import omniglot
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build
from tinyfleet.server import simulator
from tinyfleet.server.evaluate import few_shot

SIDE, DRAWERS, WAYS, FILTERS = 28, 20, 5, (16, 24, 32, 44)
BATCH, MOVED = 256, 2  # of the server: images of a step, pixels by which each is moved at most
RATE = 2e-3  # Adam's at first; it falls along a half cosine
STEPS, RATES = 100, (0.001, 0.002, 0.004, 0.008)  # of a device; rates to choose from
BOARD = "mps2-an386"

Body = list[tuple[layers.Conv2D, layers.BatchNormalization]]
"""Convolutions, and the normalisation of each."""


def device_layers() -> list[Layer]:
    convs = [layer for f in FILTERS for layer in (Conv2D(f, (3, 3), strides=2, padding="same"), ReLU())]
    return [*convs, Flatten(), Dense(WAYS)]


def turned(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Characters [n, DRAWERS, SIDE, SIDE] as four times as many."""
    return np.concatenate([np.rot90(images, k, (2, 3)) for k in range(4)])


def classifier(images: NDArray[np.uint8], filters: Sequence[int], *, epochs: int, seed: int) -> Body:
    """Learns to tell characters [n, DRAWERS, SIDE, SIDE], of 0 to 15, apart by convolutions of so many filters."""
    keras.utils.set_random_seed(seed)
    body = [(layers.Conv2D(n, 3, 2, "same"), layers.BatchNormalization()) for n in filters]
    parts = [layer for pair in body for layer in (*pair, layers.ReLU())]
    model = keras.Sequential([layers.Input((SIDE, SIDE, 1)), *parts, layers.Flatten(), layers.Dense(len(images))])
    padded = np.pad(images.reshape(-1, SIDE, SIDE), ((0, 0), (MOVED, MOVED), (MOVED, MOVED)))
    steps = len(padded) // BATCH
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, steps * epochs)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=keras.backend.backend() != "tensorflow",  # whose own convolutions are faster than XLA's
    )
    random, began = np.random.default_rng(seed), time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in random.permutation(len(padded))[: steps * BATCH].reshape(steps, BATCH):
            corners = random.integers(0, 2 * MOVED + 1, (2, BATCH))
            some = [padded[row, i : i + SIDE, j : j + SIDE] for row, i, j in zip(rows, *corners, strict=True)]
            x = np.stack(some)[..., None].astype(np.float32) / 15
            model.reset_metrics()
            losses.append(float(model.train_on_batch(x, rows // DRAWERS)))
        seconds = time.perf_counter() - began
        print(f"epoch {epoch} of {epochs}: loss {np.mean(losses):.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return body


def folded(body: Body, device: Program) -> NDArray[np.float32]:
    """The program's vector: convolutions that include their normalisation, a head of zeros."""
    arrays: list[NDArray[np.float32]] = []
    for conv, norm in body:
        (kernel, bias), (gamma, beta, mean, variance) = conv.get_weights(), norm.get_weights()
        scale = gamma / np.sqrt(variance + norm.epsilon)
        arrays += [(kernel * scale).transpose(3, 0, 1, 2).ravel(), beta + (bias - mean) * scale]
    vector = np.concatenate(arrays)
    return np.concatenate([vector, np.zeros(device.n_params - len(vector), np.float32)]).astype(np.float32)


def step_instructions() -> int:
    """Of one training step on a Cortex-M4, the mean of three, with random weights."""
    target, device = catalogue.load_board(BOARD), small(device_layers(), (SIDE, SIDE, 1))
    with tempfile.TemporaryDirectory() as folder:
        elf = build.build_benchmark(target, device, Path(folder) / "bench.elf", steps=3, profile="fast")
        return round(instructions(target, elf)["learn"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="of the server")
    parser.add_argument("--tasks", type=int, default=1000, help="to score on")
    parser.add_argument("--out", type=Path, help="write the start for devices to this .npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    device = build_program(device_layers(), (SIDE, SIDE, 1), "softmax_cross_entropy")
    task, backend = replace(omniglot.load(WAYS, SIDE), program=device), simulator.Backend(device)
    print(f"{device.n_params} parameters, trains in {device.arena_bytes} bytes", file=sys.stderr, flush=True)

    began = time.perf_counter()
    images = turned(omniglot.characters()["training"][0].reshape(-1, DRAWERS, SIDE, SIDE))
    start = folded(classifier(images, FILTERS, epochs=options.epochs, seed=options.seed), device)
    if options.out is not None:
        np.savez(options.out, parameters=start)
    said: dict[str, Any] = {
        "epochs": options.epochs,
        "seconds": round(time.perf_counter() - began),
        "parameters": device.n_params,
        "arena": device.arena_bytes,
        "instructions a step": step_instructions(),
    }

    def validation(rate: float, shots: int) -> float:
        phases = (Phase(ALL_LAYERS, STEPS, rate),)
        how: dict[str, Any] = {"tasks": 200, "queries": 10, "seed": options.seed + 1, "split": "validation"}
        return float(simulator.evaluate(backend, task.draw, start, phases, shots=shots, chunk=100, **how).mean())

    for shots in (5, 1):
        found = [validation(rate, shots) for rate in RATES]
        rate = RATES[int(np.argmax(found))]
        print(f"{shots}-shot: rate {rate}, {max(found):.2%} on validation tasks", file=sys.stderr, flush=True)
        score = few_shot(task, start, (Phase(ALL_LAYERS, STEPS, rate),), shots=shots, episodes=options.tasks)
        said |= {f"{shots}-shot": round(score.mean, 5), f"{shots}-shot ±": round(score.half_width, 5)}
        said |= {f"{shots}-shot rate": rate, f"{shots}-shot validation": round(max(found), 5)}
    if options.json:
        print(json.dumps(said))
    else:
        for name, value in said.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
