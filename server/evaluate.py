"""Few-shot evaluation: how well an initialization adapts to tasks that no device has trained on.

For every held-out task the learner gets K samples of each class (of a regression: K in all), learns from them as a
device does (online, one sample a step, in C), and is scored on query samples: by accuracy, or by mean squared error.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge._mote import lib
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.tasks import Episode, Split, Task
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase

RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""Learning rates that `one_pass` tries."""

SHOTS = (1, 5, 10)
"""Numbers of samples that `baselines` scores."""

QUERIES = 10
"""Query samples of each class: with the most SHOTS, as many samples as a class of Omniglot has."""

Metric = Literal["accuracy", "mean squared error"]


@dataclass(frozen=True)
class Score:
    """A metric on held-out tasks.

    Parameters
    ----------
    shots
        Support samples of each class (of a regression: in all).
    values
        The metric of each task, [episodes]. Where training diverged: accuracy 0, or an infinite error.
    metric
        Which metric.
    """

    shots: int
    values: NDArray[np.float64]
    metric: Metric = "accuracy"

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return float(self.values.mean())

    @property
    def spread(self) -> float:
        """Standard deviation over the tasks."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % interval: 1.96 standard errors."""
        return float(1.96 * self.spread / len(self.values) ** 0.5)

    @property
    def merit(self) -> float:
        """The mean, with the sign that makes more better."""
        return self.mean if self.metric == "accuracy" else -self.mean


def few_shot(
    task: Task,
    initialization: NDArray[np.float32],
    phases: Sequence[Phase],
    *,
    shots: int,
    episodes: int = 100,
    queries: int = 15,
    seed: int = 0,
    split: Split = "held_out",
) -> Score:
    """Adapts an initialization to each of many tasks, and scores the results.

    The same seed gives the same tasks and orders, whatever the initialization and the phases are, so that
    initializations can be compared task by task.

    Parameters
    ----------
    task
        The learning task.
    initialization
        Parameters [n_params].
    phases
        How a task is adapted to. A phase goes through the support samples again and again, each time in a new order.
    shots
        Support samples of each class (of a regression: in all).
    episodes
        How many tasks.
    queries
        Query samples of each class (of a regression: in all).
    seed
        Draws the tasks and the orders.
    split
        Where the tasks come from.

    Returns
    -------
    Score
    """
    learner = MoteLearner(task.program)
    every_layer = learner.mask
    metric: Metric = "accuracy" if task.program.loss == "softmax_cross_entropy" else "mean squared error"
    values = np.empty(episodes)
    for e in range(episodes):
        episode_seed, order_seed = seeds_of(seed, e)
        episode = task.draw(split, [episode_seed], shots, queries)[0]
        order = endless(len(episode.support_y), np.random.default_rng(order_seed))
        learner.set_parameters(initialization)
        try:
            for phase in phases:
                learner.mask = phase.layers & every_layer
                for _ in range(phase.steps):
                    i = next(order)
                    learner.learn(episode.support_x[i], episode.support_y[i], phase.rate)
        except LearnerError as error:
            if error.code != lib.MOTE_ERR_DIVERGED:
                raise
            values[e] = 0 if metric == "accuracy" else np.inf
            continue
        learner.mask = every_layer
        values[e] = _score(learner, episode)
    return Score(shots, values, metric)


def _score(learner: MoteLearner, episode: Episode) -> float:
    outputs = np.array([learner.infer(x) for x in episode.query_x], np.float64)
    if learner.program.loss == "softmax_cross_entropy":
        return float(np.mean(outputs.argmax(axis=1) == episode.query_y))
    return float(np.mean((outputs - episode.query_y) ** 2))


def one_pass(
    task: Task,
    initialization: NDArray[np.float32],
    *,
    shots: int,
    episodes: int = 200,
    queries: int = QUERIES,
    seed: int = 0,
    layers: int = ALL_LAYERS,
) -> Score:
    """Adapts with one pass through the K samples of each class: the value of an initialization to a device that cannot
    store its samples.

    Parameters
    ----------
    task, initialization, shots, episodes, queries, seed
        As in `few_shot`.
    layers
        Mask of the layers that train.

    Returns
    -------
    Score
        On held-out tasks, at the learning rate of RATES that is best on validation tasks.
    """
    steps = shots * (task.ways if task.program.loss == "softmax_cross_entropy" else 1)

    def at(rate: float, count: int, split: Split, seed: int) -> Score:
        phases = [Phase(layers, steps, rate)]
        return few_shot(
            task, initialization, phases, shots=shots, episodes=count, queries=queries, seed=seed, split=split
        )

    best = max(RATES, key=lambda rate: at(rate, 50, "validation", seed + 1).merit)
    return at(best, episodes, "held_out", seed)


def baselines(
    task: Task, learned: NDArray[np.float32], *, shots: Sequence[int] = SHOTS, seed: int = 0
) -> dict[str, list[Score]]:
    """The scores of learned parameters and of two baselines that need less.

    Parameters
    ----------
    task
        The learning task.
    learned
        Parameters [n_params]. For FedAvg's, adapting them is FedAvg with local fine-tuning.
    shots
        Numbers of support samples of each class.
    seed
        Draws the tasks.

    Returns
    -------
    dict of str to list of Score
        By baseline, a score for each of `shots`: the learned initialization; its body with only the head training, as
        in TinyOL (Ren, Anicic and Runkler 2021); and training from scratch.
    """
    initializations = {
        "learned": (learned, ALL_LAYERS),
        "learned, head alone (TinyOL)": (learned, task.program.head),
        "from scratch": (task.program.initial(seed), ALL_LAYERS),
    }
    return {
        name: [one_pass(task, initialization, shots=k, seed=seed, layers=layers) for k in shots]
        for name, (initialization, layers) in initializations.items()
    }


def seeds_of(seed: int, episode: int) -> tuple[int, int]:
    """The seeds of an episode: of the task, and of the order of its samples."""
    task, order = np.random.SeedSequence([seed, episode]).generate_state(2).tolist()
    return task, order


def endless(count: int, random: np.random.Generator) -> Iterator[int]:
    """0 to count - 1 in random order, then in another order, without end."""
    while True:
        yield from random.permutation(count).tolist()
