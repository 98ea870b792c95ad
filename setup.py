"""What pyproject.toml cannot say: the version (the C library's header states it), the packages, the C extension."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = ["edge", "firmware_tools", "ontology", "server"]

version = re.search(r'#define MOTE_VERSION "(.+)"', Path("edge/mote/include/mote.h").read_text())
assert version is not None
packages = []
for folder in FOLDERS:
    packages += [f"tinyfleet.{folder}", *(f"tinyfleet.{folder}.{inner}" for inner in find_packages(folder))]
setup(
    version=version[1],
    packages=["tinyfleet", *packages],
    cffi_modules=["edge/mote/build_extension.py:builder"],
)
