"""First-order MAML: the start moves along the gradient that a client sees once it has adapted.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017), without its second
derivatives: ``g -= alpha * mean(gradient at g_k)``, where g_k is what client k made of g, and the gradient is taken on
samples that it had not adapted to.
"""

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.messages import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.server.flower.strategies.reptile import Reptile


class FOMAML(Reptile):
    """A batch of clients a round, as Reptile, and:

    outer: samples, drawn after the `steps` that adapt, whose steps at outer_beta (default: beta) are the gradient: only
    what these changed is sent. A device that stores no samples takes them one after the other, so for more than one
    the weights move between them, by the order of outer_beta. alpha counts in units of outer_beta.

    Examples
    --------
    >>> strategy = FOMAML(beta=0.05, steps=8, outer=4)
    >>> [phase.steps for phase in strategy.phases]
    [8, 4]
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.01,
        steps: int = 16,
        outer: int = 4,
        outer_beta: float | None = None,
        clients: int = 5,
        query: int = 0,
        half: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, steps=steps, clients=clients, query=query, half=half, seed=seed)
        if outer < 1:
            raise UserError("first-order MAML takes the gradient of at least one sample; raise outer")
        rate = beta if outer_beta is None else outer_beta
        self.phases = (Phase(ALL_LAYERS, steps, beta), Phase(ALL_LAYERS, outer, rate))
        self.update = UpdateFormat(half=half, since=1)
