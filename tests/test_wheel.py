"""What is installed: a wheel with one top level, whose commands work wherever they are called."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from email import message_from_string
from importlib.metadata import version
from pathlib import Path

import pytest

import tinyfleet
from tinyfleet.edge.versions import ENGINE_VERSION

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the wheel of this checkout is installed."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    away = ("build", "dist", "node_modules", "__pycache__", "tests", "docs", "*.egg-info", "*.so")
    for name in ("edge", "firmware_tools", "ontology", "server", "tinyfleet", "tools"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*away))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "THIRD_PARTY_NOTICES"):
        shutil.copy(ROOT / name, source)
    page = source / "ontology" / "http" / "page"
    (page / "dist").mkdir()  # as tools/page.sh makes it, which needs npm
    shutil.copy(page / "index.html", page / "dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], capture_output=True, check=True)
    return site


def test_the_wheel_holds_one_package_with_all_its_files(site: Path) -> None:
    top = {path.name for path in site.iterdir()} - {"bin"}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {"tinyfleet", info}
    package = site / "tinyfleet"
    for name in (
        "py.typed",
        "edge/wire/protocol.cddl",
        "edge/mote/include/mote.h",
        "edge/mote/src/engine/mote.c",
        "edge/mote/CMakeLists.txt",
        "firmware_tools/boards/mps2-an386.toml",
        "firmware_tools/firmware/src/startup.c",
        "firmware_tools/firmware/library/LearnOnAStream.ino",
        "ontology/queries/clients.rq",
        "ontology/vocabulary/tinyfleet.ttl",
        "ontology/vocabulary/shapes.ttl",
        "ontology/http/page/dist/index.html",
    ):
        assert (package / name).is_file(), name
    assert list((package / "edge").glob("_mote*.so"))
    for kind in ("edge/mote/src/**/*.[ch]", "firmware_tools/firmware/src/*", "ontology/queries/*.rq", "**/*.py"):
        for folder in ("edge", "firmware_tools", "ontology", "server"):
            inside = {path.relative_to(ROOT) for path in ROOT.glob(kind) if path.relative_to(ROOT).parts[0] == folder}
            inside = {path for path in inside if not {"node_modules", "tests"} & {*path.parts}}
            assert all((package / path).is_file() for path in inside)
    licences = {path.name for path in (site / info / "licenses").iterdir()}
    assert licences == {"LICENSE", "THIRD_PARTY_NOTICES"}


def test_the_wheel_says_who_made_it_and_where(site: Path) -> None:
    about = message_from_string(next(site.glob("*.dist-info/METADATA")).read_text())
    assert about["Version"] == ENGINE_VERSION and about["License-Expression"] == "Apache-2.0"
    assert about["Author"] and len(about.get_all("Project-URL") or ()) >= 3 and about.get_all("Classifier")
    assert {"edge", "server", "gateway", "firmware", "keras"} <= {*(about.get_all("Provides-Extra") or ())}


@pytest.mark.parametrize("place", ["a checkout", "a folder with packages of these names"])
def test_installed_commands_work_in(place: str, site: Path, tmp_path: Path) -> None:
    for name in ("edge", "server", "ontology", "firmware_tools"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    folder = ROOT if place == "a checkout" else tmp_path
    code = (
        "import sys; sys.path[:] = [path for path in sys.path if 'editable' not in path]\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
        "from tinyfleet.__main__ import main\n"
        "from tinyfleet.edge import _mote\n"
        "print(_mote.__file__)\n"
        "for words in (['--version'], ['task', 'list'], ['firmware', 'boards'], ['server', 'start', '--help']):\n"
        "    sys.argv[1:] = words\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == f"tinyfleet {ENGINE_VERSION}" and any("mps2-an386" in line for line in lines)
    if place != "a checkout":
        assert lines[0].startswith(str(site))


def test_the_version_is_the_same_wherever_it_is_said() -> None:
    header = (ROOT / "edge" / "mote" / "include" / "mote.h").read_text()
    vocabulary = (ROOT / "ontology" / "vocabulary" / "tinyfleet.ttl").read_text()
    changes = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes is not None
    assert tinyfleet.__version__ == version("tinyfleet") == ENGINE_VERSION == changes[1]
    assert f'#define MOTE_VERSION "{ENGINE_VERSION}"' in header
    assert f'owl:versionInfo "{ENGINE_VERSION}"' in vocabulary
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", changes[2]), "a release has a date"


def test_the_gateways_extra_is_part_of_the_firmwares() -> None:
    extras = PROJECT["optional-dependencies"]
    assert "tinyfleet[gateway]" in extras["firmware"]
    assert not [line for line in extras["gateway"] if "elftools" in line or "zcbor" in line]
