"""Few-shot evaluation: fair, repeatable, and without a look at what is scored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tinyfleet.edge import tasks
from tinyfleet.edge.model.layers import Dense, build
from tinyfleet.edge.tasks import Episode, Episodes, Split
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase
from tinyfleet.server import run_report
from tinyfleet.server.evaluate import baselines, few_shot, one_pass

TASK = tasks.load("digits")
START = TASK.program.initial(0)


def test_the_same_seed_gives_the_same_scores() -> None:
    phases = [Phase(ALL_LAYERS, 20, 0.05)]
    one, other = (few_shot(TASK, START, phases, shots=2, episodes=10, seed=4) for _ in range(2))
    assert one.values.tolist() == other.values.tolist()
    assert one.values.tolist() != few_shot(TASK, START, phases, shots=2, episodes=10, seed=5).values.tolist()


def test_every_start_and_plan_meets_the_same_tasks() -> None:
    drawn: list[Episodes] = []

    def draw(*how: Any) -> Episodes:
        drawn.append(TASK.draw(*how))
        return drawn[-1]

    watched = replace(TASK, draw=draw)
    few_shot(watched, START, [], shots=2, episodes=3)
    few_shot(watched, TASK.program.initial(9), [Phase(ALL_LAYERS, 5, 0.1)], shots=2, episodes=3)
    for one, other in zip(drawn[:3], drawn[3:], strict=True):
        assert np.array_equal(one.support_x, other.support_x) and np.array_equal(one.query_y, other.query_y)


def test_more_samples_are_worth_more_and_none_is_chance() -> None:
    untrained = few_shot(TASK, START, [], shots=1, episodes=60)
    assert 0.1 < untrained.mean < 0.3, "five ways"
    few, many = (one_pass(TASK, START, shots=shots, episodes=60).mean for shots in (1, 10))
    assert untrained.mean + 0.05 < few < many - 0.1


def test_phases_train_only_their_layers() -> None:
    """With the head frozen at zero every class gets the same probability, however long the body learns."""
    arrays = TASK.program.split(START.copy())
    head = list(arrays)[-2:]
    for name in head:
        arrays[name][:] = 0
    start = TASK.program.join(arrays)
    frozen = few_shot(TASK, start, [Phase(1, 50, 0.1)], shots=5, episodes=10)
    assert frozen.values.tolist() == [0.2] * 10
    assert few_shot(TASK, start, [Phase(2, 50, 0.1)], shots=5, episodes=10).mean > 0.3


def lines(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
    """Regression tasks: y = a * x, for a slope of its own each."""

    def one(seed: int) -> Episode:
        random = np.random.default_rng(seed)
        x = random.uniform(-1, 1, (shots + queries, 1)).astype(np.float32)
        y = np.float32(random.uniform(-2, 2)) * x
        return Episode(x[:shots], y[:shots], x[shots:], y[shots:])

    return Episodes.of(map(one, seeds))


LINES = replace(TASK, name="lines", ways=1, program=build([Dense(1)], (1,), "mse"), draw=lines)


def test_a_regression_is_scored_by_its_squared_error() -> None:
    zero = np.zeros(2, np.float32)
    untrained = few_shot(LINES, zero, [], shots=3, episodes=40, queries=50)
    episode = LINES.draw("held_out", [int(np.random.SeedSequence([0, 0]).generate_state(2)[0])], 3, 50)[0]
    assert untrained.metric == "mean squared error"
    assert untrained.values[0] == pytest.approx(np.mean(np.asarray(episode.query_y) ** 2), rel=1e-6)
    few, many = (one_pass(LINES, zero, shots=shots, episodes=40) for shots in (2, 20))
    assert many.mean < 0.2 * untrained.mean and many.mean < few.mean < untrained.mean, (
        "the best rate is the least error"
    )
    assert many.merit > few.merit
    said = run_report.scores({"learned": [few, many]})
    assert said.title is not None and "Mean squared error" in str(said.title) and "%" not in run_report.interval(many)


def test_what_diverges_is_the_worst_there_is() -> None:
    wild = [Phase(ALL_LAYERS, 500, 50.0)]
    assert few_shot(LINES, np.ones(2, np.float32), wild, shots=5, episodes=2).mean == np.inf


def test_the_baselines_are_a_head_alone_and_a_random_start() -> None:
    scores = baselines(TASK, START, shots=(2,), seed=0)
    assert list(scores) == ["learned", "learned, head alone (TinyOL)", "from scratch"]
    ((learned,), (head,), (scratch,)) = scores.values()
    assert np.array_equal(learned.values, scratch.values), "START is what seed 0 gives"
    assert not np.array_equal(learned.values, head.values) and learned.values.shape == head.values.shape
