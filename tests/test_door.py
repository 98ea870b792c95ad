"""What `import tinyfleet` gives: a dozen names, loaded when they are used, each with an example that runs."""

import doctest
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tinyfleet

ROOT = Path(__file__).parents[1]
NAMES = [name for name in tinyfleet.__all__ if name != "__version__"]


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; import tinyfleet\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "assert {'tinyfleet'} == {name for name in sys.modules if name.startswith('tinyfleet')}, sys.modules\n"
        "assert not before & {'numpy', 'flwr', 'pyoxigraph', 'tensorflow', 'typer'}\n"
        "assert set(tinyfleet.__all__) <= set(dir(tinyfleet))\n"
        "assert not [name for name in set(dir(tinyfleet)) - set(tinyfleet.__all__) if name[:2] != '__']\n"
        "tinyfleet.MoteLearner, tinyfleet.Program\n"
        "assert not {name.split('.')[0] for name in sys.modules} & {'flwr', 'pyoxigraph', 'tensorflow', 'sklearn'}\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_all_names_are_there_and_no_other() -> None:
    for name in NAMES:
        assert getattr(tinyfleet, name) is getattr(tinyfleet, name)
    with pytest.raises(AttributeError, match="has no attribute 'compile'"):
        _ = tinyfleet.compile  # type: ignore[attr-defined]


def examples(name: str) -> list[doctest.DocTest]:
    value: Any = getattr(tinyfleet, name)
    home: Any = value if inspect.ismodule(value) else inspect.getmodule(value)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(value))
    return [test for test in finder.find(value, name, home, vars(home)) if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examples(name)
    assert found, f"tinyfleet.{name} has no example"
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        assert runner.run(test).failed == 0, name


def test_a_name_whose_extra_is_missing_names_the_extra() -> None:
    code = "import sys; sys.modules['flwr'] = None; import tinyfleet; tinyfleet.MqttGrid"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "tinyfleet.MqttGrid needs flwr" in done.stderr and "pip install 'tinyfleet[server]'" in done.stderr
