"""Fleets of microcontrollers and Raspberry Pis that keep learning after they are deployed."""

from pkgutil import extend_path
from typing import Any

__path__ = extend_path(__path__, __name__)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tinyfleet")
    raise AttributeError(name)
