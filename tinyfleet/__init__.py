"""Fleets of microcontrollers and Raspberry Pis that keep learning after they are deployed."""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
