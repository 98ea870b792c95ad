"""Meta-learning without devices: many clients at once, as one more axis of every tensor, in one compiled loop.

Written on Keras 3: TensorFlow, or JAX with KERAS_BACKEND=jax. A client's parameters are its program's vector, so that
they can be sent to devices, and received from them, as they are. A round does what the strategies do. With `exact`, the
C engine computes instead, bit-identical to the devices.

Importing this package imports Keras and its backend, which takes seconds; nothing that a device or a run needs does so.
"""

from tinyfleet.server.simulator.backend import AdaptResult, Backend, Moments
from tinyfleet.server.simulator.evaluation import evaluate
from tinyfleet.server.simulator.methods import METHODS, MethodSettings, initial_parameters, strategy_settings
from tinyfleet.server.simulator.networks import Network, network, omniglot_initialization, omniglot_network
from tinyfleet.server.simulator.results import Round, SimulationResult
from tinyfleet.server.simulator.rounds import simulate
from tinyfleet.server.simulator.sources import ClientSource, server_tasks, simulated_fleet

__all__ = [
    "METHODS",
    "AdaptResult",
    "Backend",
    "ClientSource",
    "MethodSettings",
    "Moments",
    "Network",
    "Round",
    "SimulationResult",
    "evaluate",
    "initial_parameters",
    "network",
    "omniglot_initialization",
    "omniglot_network",
    "server_tasks",
    "simulate",
    "simulated_fleet",
    "strategy_settings",
]
