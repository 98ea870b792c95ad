"""Federated meta-learning as Flower strategies, and asynchronous rounds of them."""

from server.strategies.asynchronous import Asynchronous
from server.strategies.fomaml import FOMAML
from server.strategies.reptile import Reptile
from server.strategies.tinymetafed import TinyMetaFed
from server.strategies.tinyreptile import TinyReptile

__all__ = ["FOMAML", "Asynchronous", "Reptile", "TinyMetaFed", "TinyReptile"]
