"""docs/how-to/add-a-learning-task.md: what it shows runs as it is shown."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinyfleet.edge.device.node import Node
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.tasks import Task, load

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to" / "add-a-learning-task.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its two files."""
    blocks = re.findall(r"```python\n(.*?)```", HOW_TO.read_text(), re.DOTALL)
    made = tmp_path_factory.mktemp("application")
    for name, block in zip(("pumps.py", "test_pumps.py"), blocks, strict=True):
        (made / name).write_text(block)
    return made


@pytest.fixture(scope="module")
def task(folder: Path) -> Task:
    return load(str(folder / "pumps.py"))


def test_its_test_passes(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_pumps.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_a_device_runs_it(task: Task) -> None:
    node = Node("home", "pump-1", {}, task.program, DatasetStream(task.client(1, 8)))
    assert node.model == task.program.model_id


def test_its_recording_drifts_where_it_says(task: Task) -> None:
    seen = task.stream(0)
    assert seen.drifts == (300,) and len(seen.x) == len(seen.y) == 600
    before, after = seen.x[:300].mean(axis=0), seen.x[300:].mean(axis=0)
    assert abs(before - after).mean() > 0.3
