"""TinyReptile: Reptile for devices that can hold one sample at a time.

Ren, Anicic and Runkler, "TinyReptile: TinyML with Federated Meta-Learning" (IJCNN 2023), in our implementation: the
server visits one client after the other; the client learns online from its stream, one sample a step, and stores none
of them; ``g += alpha * (g_k - g)``.
"""

from tinyfleet.server.flower.strategies.reptile import Reptile


class TinyReptile(Reptile):
    """One client a round; the arguments are those of Reptile, without `clients`.

    The device's part needs no word here: devices always learn online with a batch of one.

    Examples
    --------
    >>> strategy = TinyReptile(alpha=0.5, steps=8)
    >>> strategy.clients
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
