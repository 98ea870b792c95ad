"""TinyMetaFed: some layers stay on the device, and only the largest changes of the others are sent.

Ren, Li, Anicic and Runkler, "TinyMetaFed: Efficient Federated Meta-Learning for TinyML" (2023), in our implementation:
- partial local reconstruction (after Singhal et al., "Federated Reconstruction", 2021): local layers are never sent;
  a client fits its own, from their initial values, with the shared ones frozen, and then learns all of them online;
- top-P: of the shared parameters, the share `density` that changed most is sent back, as (index, change);
- alpha is annealed along a half cosine (Loshchilov and Hutter, "SGDR", 2017, without restarts).
"""

import math

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.commands import ALL_LAYERS, Phase, UpdateFormat
from tinyfleet.server.flower.strategies.reptile import Reptile


class TinyMetaFed(Reptile):
    """TinyMetaFed (Ren et al. 2023): partial local reconstruction, sparse updates and an annealed server rate.

    Parameters
    ----------
    rounds
        Rounds that the run will have, for the annealing.
    alpha, alpha_end
        The server's learning rate in the first round, and what it approaches.
    beta, steps
        The devices' learning rate, and samples that each client learns from with all layers, one a step.
    local
        Mask of the layers that stay on the devices; bit i is the i-th layer that trains. They keep their initial values
        on the server.
    local_steps, local_beta
        Steps and learning rate of fitting the local layers first. The default rate is beta.
    density
        Share of the shared parameters that a device sends, in (0, 1]. The others count as unchanged.
    clients, query, half, seed
        As in Reptile; updates travel as float16 by default.

    Raises
    ------
    UserError
        If there are fewer than 2 steps or no clients, or the density is not in (0, 1].

    Examples
    --------
    >>> strategy = TinyMetaFed(rounds=10, alpha=1.0, alpha_end=0.0, density=0.1)
    >>> [round(strategy.rate(server_round), 2) for server_round in (1, 6, 11)]
    [1.0, 0.5, 0.0]
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
            raise UserError(f"density is the share of the parameters that is sent, in (0, 1]; got {density:g}")
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
