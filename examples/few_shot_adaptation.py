"""Few-shot adaptation: a device learns to tell new digits apart from five samples of each.

    python examples/few_shot_adaptation.py

simulates 60 rounds of Reptile on eight clients, then lets 100 new devices adapt to digits that no client ever saw, and
prints how many query samples they classify correctly:

    from the learned initialization: 65.3%
    from random parameters: 50.3%
"""

import numpy as np
from numpy.typing import NDArray

from tinyfleet import MoteLearner, load_task

TASK = load_task("digits")  # clients hold the digits 0 to 4; the held-out digits are 5 to 9
HEAD = TASK.program.in_layers(TASK.program.head)  # the last layer: each device fits its own, from zeros


def adapt(learner: MoteLearner, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
    """One training step for each sample, in order: what a device does with its stream."""
    for sample, label in zip(x, y, strict=True):
        learner.learn(sample, label, rate=0.1)


def meta_train(rounds: int) -> NDArray[np.float32]:
    """Reptile on the layers below the head: clients adapt copies, and the initialization moves to their mean."""
    learner, initialization = MoteLearner(TASK.program), TASK.program.initial(seed=0)
    all_layers = learner.mask
    initialization[HEAD] = 0
    for round_ in range(rounds):
        adapted = []
        for seed in range(8 * round_, 8 * round_ + 8):
            episode = TASK.draw("training", [seed], 30, 1)[0]
            learner.set_parameters(initialization)
            learner.mask = TASK.program.head
            adapt(learner, episode.support_x[:20], episode.support_y[:20])  # first the head alone
            learner.mask = all_layers
            adapt(learner, episode.support_x[20:], episode.support_y[20:])
            adapted.append(learner.parameters)
        initialization = np.where(HEAD, 0, np.mean(adapted, axis=0)).astype(np.float32)
    return initialization


def accuracy(initialization: NDArray[np.float32]) -> float:
    """The mean over 100 held-out episodes: five samples of each digit to adapt to, fifteen others to classify."""
    learner, correct = MoteLearner(TASK.program), []
    for seed in range(100):
        episode = TASK.draw("held_out", [seed], 5, 15)[0]
        learner.set_parameters(initialization)
        adapt(learner, episode.support_x, episode.support_y)
        predicted = [learner.infer(x).argmax() for x in episode.query_x]
        correct.append(np.mean(predicted == episode.query_y))
    return float(np.mean(correct))


if __name__ == "__main__":
    print(f"from the learned initialization: {accuracy(meta_train(rounds=60)):.1%}")
    print(f"from random parameters: {accuracy(TASK.program.initial(seed=0)):.1%}")
