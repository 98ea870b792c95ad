"""A minute of fuzzing the C code, and some damaged inputs for all that decodes in Python; `make fuzz` does more."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzz_targets
import fuzzing
import pytest

SECONDS = 60


def test_no_program_and_no_message_makes_it_read_or_write_outside(tmp_path: Path) -> None:
    for name in fuzzing.TARGETS:
        (tmp_path / name).mkdir()
    try:
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(lambda name: fuzzing.fuzz(name, tmp_path / name, SECONDS), fuzzing.TARGETS))
    except fuzzing.NoFuzzer as missing:
        pytest.skip(str(missing))
    for clean, said in results:
        assert clean, said
    assert all("stat::number_of_executed_units" in said for _, said in results)


def test_the_corpus_holds_a_program_of_every_kind_and_is_small() -> None:
    seeds = sorted((fuzzing.CORPUS / "load").glob("seed_*"))
    assert [path.read_bytes() for path in seeds] == fuzzing.load_seeds(), "run: python tests/fuzzing.py --seeds"
    size = sum(path.stat().st_size for path in fuzzing.CORPUS.rglob("*") if path.is_file())
    assert size < 500_000


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_damaged_inputs_are_refused_soon_and_by_what_is_expected(name: str) -> None:
    """In a process of its own: its memory is measured."""
    command = [sys.executable, Path(fuzz_targets.__file__).with_name("fuzz_python.py"), name, "--inputs", "500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
