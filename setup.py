"""The C extension; all else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["edge/mote_build.py:builder"])
