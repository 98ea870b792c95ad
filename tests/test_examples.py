"""The programs in examples/ run, and print what their docstrings say."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, *missing: str) -> list[str]:
    """The lines that an example prints; skips where a package or tool that it needs is missing."""
    for need in missing:
        if find_spec(need) is None and shutil.which(need) is None:
            pytest.skip(f"needs {need}")
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def losses(lines: list[str]) -> list[float]:
    return [float(match[1]) for line in lines if (match := re.match(r"round \d: loss ([\d.]+)", line))]


def test_a_custom_flower_strategy_trains_devices() -> None:
    values = losses(run("custom_flower_strategy.py", "mosquitto", "flwr"))
    assert len(values) == 5 and values[-1] < values[0] / 2


def test_a_question_to_the_graph_is_answered() -> None:
    lines = run("ask_the_graph.py", "pyoxigraph")
    assert lines[0] == "microbit: 7,128 B left" and lines[-1].startswith("raspberry-pi-4: ")


def test_a_learned_initialization_adapts_better_than_random_parameters() -> None:
    learned, random = (float(line.split()[-1].rstrip("%")) for line in run("few_shot_adaptation.py", "sklearn"))
    assert learned > random + 10


def test_a_third_party_device_is_found_by_its_property() -> None:
    assert run("describe_a_third_party_device.py", "mosquitto", "pyoxigraph") == [
        "201 Created",
        "Desk lamp (urn:example:desk-lamp) has the property brightness",
    ]


def test_a_keras_model_trains_on_an_emulated_board() -> None:
    lines = run("keras_model_on_an_emulated_board.py", "keras", "arm-none-eabi-gcc", "qemu-system-arm", "mosquitto")
    assert re.fullmatch(r"[\d,]+ parameters train in [\d,]+ B of RAM", lines[0])
    values = losses(lines)
    assert len(values) == 5 and values[-1] < values[0]


def test_the_c_example_builds_trains_and_prints_what_its_comment_says(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    folder = EXAMPLES / "train_on_a_stream"
    for command in (["cmake", "-S", str(folder), "-B", str(tmp_path)], ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
    program = tmp_path / "train_on_a_stream"
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True, timeout=60).stdout
    comment = re.findall(r"^ \*     ((?:samples|the sensor).*)$", (folder / "main.c").read_text(), re.MULTILINE)
    assert printed.splitlines() == comment


def test_an_example_is_short() -> None:
    for path in [*EXAMPLES.glob("*.py"), *EXAMPLES.rglob("*.c")]:
        assert len(path.read_text().splitlines()) <= 60, path.name
