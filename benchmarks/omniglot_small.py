"""Trains and scores a network for Omniglot, 5-way, that learns new characters within 128 KB of a device's RAM.

    KERAS_BACKEND=jax python benchmarks/omniglot_small.py --checkpoint small.weights.h5
    KERAS_BACKEND=jax python benchmarks/omniglot_small.py --steps 500 --tasks 100 --json

Three convolutions of stride 2 and a dense layer on 28x28 pixels, trained on the server and adapted on the device:

1. The server trains the convolutions with batch normalisation on tasks of 20 training characters (each turned at
   random by a multiple of 90 degrees): a dense layer that begins at 0 takes three steps of gradient descent on five
   samples a character, and Adam lowers its loss on five others, through these steps. This is MAML (Finn et al. 2017) of
   which the inner loop trains the head alone: ANIL (Raghu et al. 2020). The inner rate is learned too.
2. The normalisation is folded into the convolutions: what is left is a program of the engine.
3. A device starts from that, with the dense layer at 0, and trains all layers, one sample a step, by plain gradient
   descent, 100 of them. The rate is the one that is best on validation tasks.

The score is that of server.evaluate.few_shot: by the C engine, on tasks of the evaluation alphabets, every query asked
alone. Needs $TINYFLEET_DATA, or downloads Omniglot. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras  # type: ignore[import-untyped]
import numpy as np
from instructions import instructions, small
from keras import layers, ops
from numpy.typing import NDArray

from edge import program as p
from edge.protocol import ALL_LAYERS, Phase
from edge.tasks import Task, omniglot
from firmware_tools import boards, build
from server import meta
from server.evaluate import few_shot

SIDE, WAYS, FILTERS = 28, 5, (16, 32, 48)
WIDE, SHOTS, QUERIES, TASKS = 20, 5, 5, 2  # of a training step: characters, samples of each, tasks
INNER, RATE = 3, 3e-3  # steps of the head; Adam's first rate, which falls along a half cosine
STEPS, RATES = 100, (0.002, 0.005, 0.01)  # of a device; rates to choose from
BOARD = "mps2-an386"


def device_layers() -> list[p.Layer]:
    convs = [layer for f in FILTERS for layer in (p.Conv2D(f, (3, 3), strides=2, padding="same"), p.ReLU())]
    return [*convs, p.Flatten(), p.Dense(WAYS)]


class Head(layers.Layer):  # type: ignore[misc]
    """Features of a task's samples [tasks, WIDE, SHOTS + QUERIES, size] -> logits of the queries [tasks, WIDE *
    QUERIES, WIDE], after a dense layer that begins at 0 has learned from the first SHOTS samples of each class."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.log_rate = self.add_weight(shape=(), initializer=keras.initializers.Constant(np.log(0.4)))

    def call(self, features: Any) -> Any:
        tasks, size = ops.shape(features)[0], features.shape[-1]
        support = ops.reshape(features[:, :, :SHOTS], (tasks, WIDE * SHOTS, size))
        query = ops.reshape(features[:, :, SHOTS:], (tasks, WIDE * QUERIES, size))
        wanted = np.repeat(np.eye(WIDE, dtype=np.float32), SHOTS, axis=0)
        weights, bias = ops.zeros((tasks, size, WIDE)), ops.zeros((tasks, 1, WIDE))
        for _ in range(INNER):
            error = (ops.softmax(ops.matmul(support, weights) + bias) - wanted) / (WIDE * SHOTS)
            weights = weights - ops.exp(self.log_rate) * ops.matmul(ops.transpose(support, (0, 2, 1)), error)
            bias = bias - ops.exp(self.log_rate) * ops.sum(error, axis=1, keepdims=True)
        return ops.matmul(query, weights) + bias


def trainer(steps: int) -> keras.Model:
    """From a step's images [TASKS, WIDE, SHOTS + QUERIES, SIDE, SIDE] to the logits of its queries."""
    images = layers.Input((WIDE, SHOTS + QUERIES, SIDE, SIDE))
    x = ops.reshape(images, (-1, SIDE, SIDE, 1))
    for filters in FILTERS:
        x = layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(gamma_initializer=keras.initializers.Constant(0.5))(x))
    x = Head()(ops.reshape(x, (-1, WIDE, SHOTS + QUERIES, int(np.prod(x.shape[1:])))))
    model = keras.Model(images, x)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(RATE, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.optimizer.build(model.trainable_variables)
    return model


def folded(model: keras.Model, device: p.Program) -> NDArray[np.float32]:
    """The program's vector: convolutions that include their normalisation, a head of zeros."""
    kinds = (layers.Conv2D, layers.BatchNormalization)
    convs, norms = ([layer for layer in model.layers if isinstance(layer, kind)] for kind in kinds)
    arrays: list[NDArray[np.float32]] = []
    for conv, norm in zip(convs, norms, strict=True):
        gamma, beta, mean, variance = (ops.convert_to_numpy(weight) for weight in norm.weights)
        scale = gamma / np.sqrt(variance + norm.epsilon)
        arrays += [(ops.convert_to_numpy(conv.kernel) * scale).transpose(3, 0, 1, 2).ravel(), beta - mean * scale]
    body = np.concatenate(arrays)
    return np.concatenate([body, np.zeros(device.n_params - len(body), np.float32)]).astype(np.float32)


def turned(wide: Task, seed: int, number: int) -> NDArray[np.float32]:
    """A step's images: training characters, each turned by a multiple of 90 degrees."""
    random = np.random.default_rng([seed, number])
    some = wide.draw("training", random.integers(0, 2**62, TASKS).tolist(), 0, SHOTS + QUERIES)
    images = some.query_x.reshape(TASKS * WIDE, SHOTS + QUERIES, SIDE, SIDE)
    turns = random.integers(0, 4, len(images))
    x: NDArray[np.float32] = np.stack([np.rot90(own, k, (1, 2)) for own, k in zip(images, turns, strict=True)])
    return x.reshape(TASKS, WIDE, SHOTS + QUERIES, SIDE, SIDE)


def step_instructions() -> int:
    """Of one training step on a Cortex-M4, the mean of three, with random weights."""
    target, device = boards.load(BOARD), small(device_layers(), (SIDE, SIDE, 1))
    with tempfile.TemporaryDirectory() as folder:
        elf = build.bench(target, device, Path(folder) / "bench.elf", steps=3, profile="fast")
        return round(instructions(target, elf)["learn"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="of the server")
    parser.add_argument("--checkpoint", type=Path, help="a file that ends in .weights.h5")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints and validations")
    parser.add_argument("--tasks", type=int, default=1000, help="to score on")
    parser.add_argument("--out", type=Path, help="write the start for devices to this .npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    keras.utils.set_random_seed(options.seed)
    device = p.build(device_layers(), (SIDE, SIDE, 1), "softmax_cross_entropy")
    wide = omniglot.load(WIDE, SIDE)
    task = replace(omniglot.load(WAYS, SIDE), program=device)
    model, backend = trainer(options.steps), meta.Backend(device)
    print(f"{device.n_params} parameters, trains in {device.arena_bytes} bytes", file=sys.stderr, flush=True)

    def validation(start: NDArray[np.float32], rate: float, shots: int) -> float:
        phases = (Phase(ALL_LAYERS, STEPS, rate),)
        how: dict[str, Any] = {"tasks": 200, "queries": 10, "seed": options.seed + 1, "split": "validation"}
        return float(meta.evaluate(backend, task.draw, start, phases, shots=shots, chunk=100, **how).mean())

    if options.checkpoint is not None and options.checkpoint.exists():
        model.load_weights(options.checkpoint)
    wanted = np.tile(np.repeat(np.arange(WIDE), QUERIES), (TASKS, 1))
    began, curve = time.perf_counter(), list[tuple[int, float]]()
    for number in range(int(model.optimizer.iterations) + 1, options.steps + 1):
        loss = float(model.train_on_batch(turned(wide, options.seed, number), wanted))  # the mean since the last reset
        if number % options.every == 0 or number == options.steps:
            if options.checkpoint is not None:
                model.save_weights(options.checkpoint)
            curve.append((number, round(validation(folded(model, device), RATES[1], SHOTS), 4)))
            seconds = time.perf_counter() - began
            print(
                f"step {number}: loss {loss:.4f}, 5-shot on validation tasks "
                f"{curve[-1][1]:.2%}, {seconds:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
            model.reset_metrics()
    start = folded(model, device)
    if options.out is not None:
        np.savez(options.out, parameters=start)
    said: dict[str, Any] = {
        "steps": options.steps,
        "seconds": round(time.perf_counter() - began),
        "validation": curve,
        "parameters": device.n_params,
        "arena": device.arena_bytes,
        "instructions a step": step_instructions(),
    }
    for shots in (5, 1):
        found = [validation(start, rate, shots) for rate in RATES]
        rate = RATES[int(np.argmax(found))]
        print(f"{shots}-shot: rate {rate}, {max(found):.2%} on validation tasks", file=sys.stderr, flush=True)
        score = few_shot(task, start, (Phase(ALL_LAYERS, STEPS, rate),), shots=shots, episodes=options.tasks)
        said |= {f"{shots}-shot": round(score.mean, 5), f"{shots}-shot ±": round(score.half_width, 5)}
        said |= {f"{shots}-shot rate": rate}
    if options.json:
        print(json.dumps(said))
    else:
        for name, value in said.items():
            print(f"{name}: {value}")


if __name__ == "__main__":
    main()
