"""What pyproject.toml cannot say: the version (the C library's header states it), the packages, the C extension, and
the query page, which a wheel holds."""

import re
import subprocess
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = ["edge", "firmware_tools", "ontology", "server"]
PAGE = Path("ontology/http/page/dist/index.html")


class BuildWithPage(build_py):
    """Builds the query page first; where npm is missing, tools/page.sh says so, and the wheel comes without."""

    def run(self) -> None:
        if not self.editable_mode and not PAGE.exists():
            subprocess.run(["sh", "tools/page.sh"], check=True)
        super().run()


version = re.search(r'#define MOTE_VERSION "(.+)"', Path("edge/mote/include/mote.h").read_text())
assert version is not None
packages = []
for folder in FOLDERS:
    packages += [f"tinyfleet.{folder}", *(f"tinyfleet.{folder}.{inner}" for inner in find_packages(folder))]
setup(
    version=version[1],
    packages=["tinyfleet", *packages],
    cffi_modules=["edge/mote/build_extension.py:builder"],
    cmdclass={"build_py": BuildWithPage},
)
