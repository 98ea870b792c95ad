"""A minute of fuzzing, of programs and of messages at the same time; `make fuzz` does ten."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
