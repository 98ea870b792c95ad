"""Federated meta-learning as Flower strategies, and asynchronous rounds of them."""

from tinyfleet.server.flower.strategies.asynchronous import Asynchronous
from tinyfleet.server.flower.strategies.fomaml import FOMAML
from tinyfleet.server.flower.strategies.reptile import Reptile
from tinyfleet.server.flower.strategies.tinymetafed import TinyMetaFed
from tinyfleet.server.flower.strategies.tinyreptile import TinyReptile

__all__ = ["FOMAML", "Asynchronous", "Reptile", "TinyMetaFed", "TinyReptile"]
