"""Runs a target of fuzz_targets.py.

    python tests/fuzz_python.py TARGET --seconds 600 [--folder FOLDER]    with atheris, which aims at new code
    python tests/fuzz_python.py TARGET --inputs 500                       that many damaged seeds, always the same

An input fails that raises anything but what the target's callers handle, takes more than a second of processor time, or
takes more than 256 MB. tests/fuzzing.py runs all targets, beside the fuzzers of the C code.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from fuzz_targets import TARGETS, Target

SECONDS = 1.0
"""Of processor time, for one input."""
MEGABYTES = 256
"""Beyond the memory at the start, for one input."""


class TargetError(Exception):
    """An input takes too much time or memory."""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


class Bounded:
    """A target with its bounds: raises what its users would not handle, and TargetError."""

    def __init__(self, target: Target) -> None:
        self.target, self._refusals = target, target.refusals()
        for seed in target.seeds():  # imports and caches are no input's fault
            self._run(seed)
        self._most = _peak() + MEGABYTES

    def __call__(self, data: bytes) -> None:
        began = time.process_time()
        self._run(data)
        took = time.process_time() - began
        if took > SECONDS:
            raise TargetError(f"took {took:.1f} s")
        if _peak() > self._most:
            raise TargetError(f"took more than {MEGABYTES} MB")

    def _run(self, data: bytes) -> None:
        with contextlib.suppress(*self._refusals):
            self.target.run(data)


def damaged(target: Target, number: int) -> Iterator[bytes]:
    """So many inputs, always the same: seeds, cut short, with bytes and words changed, put in, taken out, doubled."""
    rng, seeds = random.Random(1), target.seeds()
    for seed in seeds:
        yield seed
        yield seed[: len(seed) // 2]
    for _ in range(number):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            _damage(data, rng, target.words)
        yield bytes(data[: target.longest])


def _damage(data: bytearray, rng: random.Random, words: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    word = rng.choice(words) if words and rng.random() < 0.7 else rng.randbytes(rng.choice((1, 1, 2, 4)))
    match rng.randrange(7):
        case 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        case 1:
            data[at : at + len(word)] = word
        case 2:
            data[at:at] = word
        case 3:
            del data[at : at + rng.choice((1, 2, 8, 64))]
        case 4:
            piece = data[at : at + rng.choice((4, 16, 64, 256))]
            other = rng.randrange(len(data) + 1)
            data[other:other] = piece
        case 5:
            del data[at:]
        case _:
            if at < len(data):
                data[at] ^= 1 << rng.randrange(8)


def run_damaged(name: str, number: int) -> list[str]:
    """Runs a target on damaged seeds; what fails, one line each."""
    target, failures = TARGETS[name], []
    bounded = Bounded(target)
    for data in damaged(target, number):
        try:
            bounded(data)
        except Exception as error:  # the failure that is looked for
            failures.append(f"{name}: {type(error).__name__}: {error}"[:300] + f" on {data.hex()[:4000]}")
    return failures


def run_atheris(name: str, folder: Path, seconds: int) -> None:
    """Fuzzes a target until an input fails, or the time is over. Ends the process."""
    import atheris  # type: ignore[import-untyped]

    for_all = TARGETS[name]
    with atheris.instrument_imports(include=["tinyfleet"], enable_loader_override=False):
        bounded = Bounded(for_all)
    found = folder / name
    found.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(for_all.seeds()):
        (found / f"seed_{i:02}").write_bytes(seed)
    words = folder / f"{name}.dict"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word[:60]) for word in for_all.words)
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    arguments = [sys.argv[0], f"-max_total_time={seconds}", f"-max_len={for_all.longest}", "-timeout=20"]
    arguments += ["-rss_limit_mb=3000", "-print_final_stats=1", f"-artifact_prefix={folder}/{name}-", str(found)]
    atheris.Setup([*arguments, *([f"-dict={words}"] if for_all.words else [])], bounded)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, help="fuzz with atheris for so long")
    parser.add_argument("--inputs", type=int, default=500, help="damaged seeds to try (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="for what atheris finds")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if chosen.seconds and find_spec("atheris") is not None:
        run_atheris(chosen.target, chosen.folder, chosen.seconds)
    elif chosen.seconds:
        print("atheris has no package for this machine; trying damaged seeds instead")
        chosen.inputs = 500 * chosen.seconds
    failures = run_damaged(chosen.target, chosen.inputs)
    print("\n".join(failures) or f"{chosen.target}: clean")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
