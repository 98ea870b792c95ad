"""Federated meta-learning as Flower strategies: Reptile, TinyReptile and TinyMetaFed."""

from server.strategies.reptile import Reptile
from server.strategies.tinymetafed import TinyMetaFed
from server.strategies.tinyreptile import TinyReptile

__all__ = ["Reptile", "TinyMetaFed", "TinyReptile"]
