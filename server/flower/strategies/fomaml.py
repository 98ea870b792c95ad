"""First-order MAML: the initialization moves along the gradient that a client sees once it has adapted.

Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks" (2017), without its second
derivatives: ``g -= alpha * mean(gradient at g_k)``, where g_k are the parameters that client k has adapted to from g,
and the gradient is taken on samples that it had not adapted to.
"""

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.server.flower.strategies.reptile import Reptile


class FOMAML(Reptile):
    """First-order MAML (Finn et al. 2017): devices send the changes of the steps after their adaptation.

    Parameters
    ----------
    alpha
        The server's learning rate, in units of `outer_beta`.
    beta
        The devices' learning rate as they adapt.
    steps
        Samples that each client adapts to, one a step; at least 2.
    outer
        Samples drawn after those, whose steps are the gradient. A device that stores no samples takes them one after
        the other, so with more than one the parameters move between them, by an amount of the order of `outer_beta`.
    outer_beta
        The learning rate of the outer steps. Default: beta.
    clients, query, half, seed
        As in Reptile.

    Raises
    ------
    UserError
        If there are fewer than 2 steps, no outer steps or no clients.

    Examples
    --------
    >>> [phase.steps for phase in FOMAML(steps=12, outer=4).phases]
    [12, 4]
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
