"""TinyMetaFed: some layers stay on the device, and only the largest changes of the others travel.

Ren, Li, Anicic and Runkler, "TinyMetaFed: Efficient Federated Meta-Learning for TinyML" (2023), in our implementation:
- partial local reconstruction (after Singhal et al., "Federated Reconstruction", 2021): local layers are never sent;
  a client fits its own, from their initial values, with the shared ones frozen, and then learns all of them online;
- top-P: of the shared parameters, the fraction `top` that changed most goes back, as (index, change);
- alpha is annealed along a half cosine (Loshchilov and Hutter, "SGDR", 2017, without restarts).
"""

import math

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.messages import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.server.flower.strategies.reptile import Reptile


class TinyMetaFed(Reptile):
    """A batch of clients a round, as Reptile, and:

    rounds: how many are planned, for the annealing. alpha, alpha_end: the server's rate in the first round, and what it
    approaches. local: mask of the layers that stay on the devices (bit i: i-th layer that trains; 0: none), which
    keep their initial values on the server. local_steps, local_beta: of fitting those. top: fraction of the shared
    parameters that goes back; one that does not, counts as unchanged.

    Examples
    --------
    >>> strategy = TinyMetaFed(rounds=100, alpha=1.0, density=0.1)
    >>> strategy.rate(server_round=1), strategy.rate(server_round=51)
    (1.0, 0.5)
    """

    def __init__(
        self,
        *,
        rounds: int,
        alpha: float = 1.0,
        alpha_end: float = 0.0,
        beta: float = 0.01,
        steps: int = 16,
        local: int = 0,
        local_steps: int = 8,
        local_beta: float | None = None,
        density: float = 0.25,
        clients: int = 5,
        query: int = 0,
        half: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, steps=steps, clients=clients, query=query, half=half, seed=seed)
        if not 0 < density <= 1:
            raise UserError(f"top is the fraction of the parameters that is sent, in (0, 1]; got {density:g}")
        self.rounds = rounds
        self.alpha_end = alpha_end
        self.local = local
        if local and local_steps:
            self.phases = (Phase(local, local_steps, beta if local_beta is None else local_beta), *self.phases)
        self.update = UpdateFormat(shared=ALL_LAYERS & ~local, half=half, density=density)

    def rate(self, server_round: int) -> float:
        """alpha_end + (alpha - alpha_end) * (1 + cos(pi * (server_round - 1) / rounds)) / 2."""
        progress = min(max((server_round - 1) / self.rounds, 0.0), 1.0)
        return self.alpha_end + (self.alpha - self.alpha_end) * (1 + math.cos(math.pi * progress)) / 2
