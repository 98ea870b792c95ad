"""Few-shot evaluation: fair, repeatable, and without a look at what is scored."""

from dataclasses import replace
from typing import Any

import numpy as np

from edge import tasks
from edge.protocol import ALL_LAYERS, Phase
from edge.tasks import Episodes
from server.evaluate import few_shot, one_pass

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
