"""Rules for the code: which package imports which, size and complexity, words to avoid, contents of the lock files."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import language
import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "edge": (),
    "ontology": ("edge.errors", "edge.files", "edge.model", "edge.versions", "edge.wire"),
    "firmware_tools": ("edge", "ontology"),
    "server": ("edge", "ontology", "firmware_tools"),
}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_whom_it_may(package: str) -> None:
    others = set(MAY_IMPORT) - {package}
    for file in (ROOT / package).rglob("*.py"):
        for name in imported(file):
            if not name.startswith("tinyfleet."):
                continue
            name = name.removeprefix("tinyfleet.")
            if name.split(".")[0] in others:
                allowed = any(name == may or name.startswith(may + ".") for may in MAY_IMPORT[package])
                assert allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_edge_imports_without_tensorflow_and_flower() -> None:
    modules = [
        ".".join(("tinyfleet", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for file in (ROOT / "edge").rglob("*.py")
        if file.stem not in ("flower_client", "flower_records")  # for Flower
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([m for m in ('tensorflow', 'keras', 'flwr', 'rdflib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_benchmark_says_how_it_is_called() -> None:
    """One process for all of them, as most import TensorFlow, which takes seconds."""
    if find_spec("tensorflow") is None:
        pytest.skip("most benchmarks need TensorFlow: pip install 'tinyfleet[keras]'")
    code = (
        "import contextlib, io, pathlib, runpy, sys\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "for path in sorted(pathlib.Path('benchmarks').glob('*.py')):\n"
        "    sys.argv, said = [str(path), '--help'], io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(said):\n"
        "            runpy.run_path(str(path), run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(path.name, end.code or 0, said.getvalue().split()[0].lower())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))
    assert done.stdout.splitlines() == [f"{name} 0 usage:" for name in names]


@pytest.mark.parametrize("lock", sorted(ROOT.glob("*.lock")), ids=lambda path: path.name)
def test_a_lock_file_has_hashes_and_no_index_address(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|--index-url|--extra-index-url|--find-links", text)
    pins = re.findall(r"^[A-Za-z0-9._-]+==.*$", text, re.MULTILINE)
    assert pins and all(pin.endswith("\\") for pin in pins)


def sources(*folders: str) -> list[Path]:
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".c", ".h") and not {"node_modules", "monocypher"} & set(path.parts)
    ]


SOURCES = sources("edge", "firmware_tools", "ontology", "server", "tinyfleet")


def test_no_file_is_longer_than_600_lines() -> None:
    files = [*SOURCES, *sources("benchmarks", "examples", "tests", "tools")]
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 600} == {}


def test_functions_are_simple() -> None:
    """Cyclomatic complexity: at most 25, and more than 15 in at most 14 functions."""
    lizard = pytest.importorskip("lizard")
    complexity = {
        f"{file.filename}:{function.start_line} {function.name}": function.cyclomatic_complexity
        for file in lizard.analyze_files([str(path) for path in SOURCES], threads=1)
        for function in file.function_list
    }
    assert complexity
    complex_functions = {name: value for name, value in complexity.items() if value > 15}
    assert max(complexity.values()) <= 25 and len(complex_functions) <= 14, complex_functions


def test_texts_and_names_use_the_glossarys_words() -> None:
    assert [str(hit) for hit in language.check(language.files())] == []
