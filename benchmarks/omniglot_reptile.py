"""Trains and scores the network that Reptile was published with on Omniglot: 5-way, transductive, 113,221 parameters.

    python benchmarks/omniglot_reptile.py --rounds 100000 --checkpoint omniglot.npz
    python benchmarks/omniglot_reptile.py --pretrain 8 --rounds 20000 --checkpoint omniglot.npz
    python benchmarks/omniglot_reptile.py --rounds 5000 --tasks 2000 --json

The protocol is that of Nichol et al. 2018 and their code, supervised-reptile: 1,200 of the 1,623 characters train, in
four rotations each, the other 423 are for the score. A round: 5 tasks of 10 samples a class, 5 batches of 10, Adam with
rate 0.001 and no first moment; the server's rate falls along a line from 1 to 0 over the rounds that are run, which
there are 100,000. Score: 50 batches of 5 on 1 or 5 samples a class, then one query a class, all asked at once. Other
than there, images are shrunk by averaging, tasks of a round learn at the same time, with the mean of their Adam moments
carried on, and the published 1-shot and 5-shot settings are one here: those above.

--pretrain is not theirs. It is for who has not the hours that 100,000 rounds take: the convolutions first learn to tell
all 4,800 training characters apart, as in omniglot_small.py, and meta-training begins with these.

Needs $TINYFLEET_DATA, or downloads Omniglot. A run that was stopped goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omniglot_small import DRAWERS, SIDE, classifier, turned

from tinyfleet.edge.tasks import Episodes, omniglot
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase
from tinyfleet.server import simulator
from tinyfleet.server.evaluate import Score

WAYS, TRAINING, TRAIN_SHOTS, QUERIES = 5, 1200, 10, 1
BATCH, MOVED, FIRST_RATE = (
    256,
    2,
    2e-3,
)  # of pretraining: images, pixels, Adam's first rate, which falls along a half cosine
RATE = 0.001
HOW = simulator.MethodSettings(
    "reptile",
    phases=(Phase(ALL_LAYERS, 5, RATE),),
    adapts=(Phase(ALL_LAYERS, 50, RATE),),
    clients=5,
    batch=10,
    alpha=1.0,
    alpha_end=0.0,
    anneal="linear",
    adam=True,
)


def characters(seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """[characters, 20 drawers, 28, 28] of 0 to 15, to train (turned ones too) and to score."""
    images = np.concatenate([drawn for drawn, _ in omniglot.data()]).reshape(-1, DRAWERS, SIDE, SIDE)
    images = images[np.random.default_rng(seed).permutation(len(images))]
    return turned(images[:TRAINING]), images[TRAINING:]


def draw(images: NDArray[np.uint8], seeds: Sequence[int], shots: int, queries: int) -> Episodes:
    """A task of WAYS characters for each seed, its samples sorted by class."""
    random = [np.random.default_rng(seed) for seed in seeds]
    classes = np.stack([r.choice(len(images), WAYS, replace=False) for r in random])
    rows = np.stack([r.permuted(np.tile(np.arange(20), (WAYS, 1)), axis=1)[:, : shots + queries] for r in random])
    x = images[classes[:, :, None], rows].astype(np.float32) / 15
    y = np.broadcast_to(np.arange(WAYS)[None, :, None], rows.shape)
    halves: dict[str, Any] = {}
    for name, part in (("support", np.s_[:, :, :shots]), ("query", np.s_[:, :, shots:])):
        halves[f"{name}_x"] = x[part].reshape(len(x), -1, 28 * 28)
        halves[f"{name}_y"] = y[part].reshape(len(x), -1).astype(np.int64)
    return Episodes(**halves)


def pretrained(images: NDArray[np.uint8], net: simulator.Network, epochs: int, seed: int) -> NDArray[np.float32]:
    """The network's vector, its head 0: convolutions of a classifier of all these characters."""
    arrays = list[NDArray[np.float32]]()
    for conv, norm in classifier(images, (64,) * 4, epochs=epochs, seed=seed):
        (kernel, bias), (gamma, beta) = conv.get_weights(), norm.get_weights()[:2]
        arrays += [kernel.transpose(3, 0, 1, 2).ravel(), bias, gamma, beta]
    body = np.concatenate(arrays)
    return np.concatenate([body, np.zeros(net.n_params - len(body), np.float32)])


def initial_parameters(
    images: NDArray[np.uint8], net: simulator.Network, options: argparse.Namespace
) -> NDArray[np.float32]:
    """Random, or pretrained: then kept beside the checkpoint, for a run that goes on from it."""
    if not options.pretrain:
        return simulator.omniglot_initialization(net, options.seed)
    kept = options.checkpoint and options.checkpoint.with_suffix(f".pretrained-{options.pretrain}-{options.seed}.npz")
    if kept and kept.exists():
        with np.load(kept) as saved:
            found: NDArray[np.float32] = saved["parameters"]
            return found
    found = pretrained(images, net, options.pretrain, options.seed)
    if kept:
        np.savez(kept, parameters=found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--pretrain", type=int, default=0, metavar="EPOCHS", help="of a classifier of all characters")
    parser.add_argument("--every", type=int, default=200, help="rounds between checkpoints")
    parser.add_argument("--tasks", type=int, default=2000, help="to score on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed", action="store_true", help="compute in bfloat16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    training, unseen = characters(options.seed)
    net = simulator.omniglot_network(WAYS)
    backend = simulator.Backend(net, precision="mixed" if options.mixed else "float32")
    print(f"on {', '.join(backend.devices)}, {net.n_params} parameters", file=sys.stderr, flush=True)

    def samples(_: Sequence[int], seeds: Sequence[int], count: int) -> tuple[Any, Any]:
        some = draw(training, seeds, TRAIN_SHOTS, 0)
        return some.support_x, some.support_y

    def tell(so_far: simulator.SimulationResult) -> None:
        this = so_far.rounds[-1]
        if this.number % options.every == 0:
            print(f"round {this.number}: loss {this.loss:.4f}, {this.seconds:.3f} s", file=sys.stderr, flush=True)

    began = time.perf_counter()
    start = initial_parameters(training, net, options)
    outcome = simulator.simulate(
        backend, simulator.ClientSource(2**31, samples, stores_samples=True), HOW, start,
        rounds=options.rounds, seed=options.seed, checkpoint=options.checkpoint, checkpoint_every=options.every,
        on_round=tell,
    )  # fmt: skip
    said: dict[str, Any] = {"rounds": options.rounds, "seconds": round(time.perf_counter() - began)}
    for shots in (1, 5):
        scores = simulator.evaluate(
            backend, lambda _, *how: draw(unseen, *how), outcome.parameters, HOW.adapts, shots=shots,
            tasks=options.tasks, queries=QUERIES, seed=options.seed, batch=5, moments=outcome.moments, chunk=100,
        )  # fmt: skip
        said[f"{shots}-shot"] = round(float(scores.mean()), 5)
        said[f"{shots}-shot ±"] = round(Score(shots, scores).half_width, 5)
        print(f"{shots}-shot accuracy {scores.mean():.2%} ± {said[f'{shots}-shot ±']:.2%}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(said))
    else:
        print(f"{said['rounds']} rounds: 1-shot {said['1-shot']:.2%}, 5-shot {said['5-shot']:.2%}")


if __name__ == "__main__":
    main()
