"""TinyReptile: Reptile for devices that can hold one sample at a time.

Ren, Anicic and Runkler, "TinyReptile: TinyML with Federated Meta-Learning" (IJCNN 2023), in our implementation: the
server visits one client after the other; the client learns online from its stream, one sample a step, and stores none
of them; ``g += alpha * (g_k - g)``.
"""

from tinyfleet.server.flower.strategies.reptile import Reptile


class TinyReptile(Reptile):
    """TinyReptile (Ren et al. 2023): one client a round.

    Nothing is needed for the device's part: devices always learn online, one sample a step.

    Parameters
    ----------
    alpha, beta, steps, query, half, seed
        As in Reptile.

    Raises
    ------
    UserError
        If there are fewer than 2 steps.

    Examples
    --------
    >>> TinyReptile(alpha=0.5, steps=16).clients
    1
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 0.01,
        steps: int = 16,
        query: int = 0,
        half: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(alpha=alpha, beta=beta, steps=steps, clients=1, query=query, half=half, seed=seed)
