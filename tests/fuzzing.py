"""Fuzzers of what is read from others.

    python tests/fuzzing.py [--seconds 120] [--keep]    all, as many at once as there are cores
    python tests/fuzzing.py --only node                 one of them
    python tests/fuzzing.py --seeds                     makes the first inputs of the C fuzzers in corpus/ again

In C, under AddressSanitizer and UBSan, what a device reads: programs (c/fuzz_load.c), messages (c/fuzz_node.c) and
serial lines (c/fuzz_frames.c). In Python, all of fuzz_targets.py. What fails is left in build/fuzz. --keep adds inputs
that reached new code of the device to corpus/, as few as will do.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import small_models
from fuzz_targets import TARGETS as PYTHON_TARGETS

from tinyfleet.edge.model.layers import Dense, ReLU, build
from tinyfleet.edge.mote.build_extension import INCLUDES, sources
from tinyfleet.edge.mote.codegen import generate
from tinyfleet.edge.wire import serial_frames
from tinyfleet.edge.wire.chunks import chunks
from tinyfleet.edge.wire.commands import (
    ALL_LAYERS,
    Forget,
    Manifest,
    NewKeys,
    Phase,
    Reboot,
    Sha256,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    encode_action,
    encode_command,
)  # fmt: skip
from tinyfleet.edge.wire.cose import mac0

TESTS = Path(__file__).parent
CORPUS = TESTS / "corpus"
CLANG = ("clang", *(f"clang-{version}" for version in range(21, 12, -1)))
TARGETS = ("load", "node", "frames")
LENGTH = {"load": 2048, "node": 4096, "frames": 4096}  # of an input, at most

#: The node's own program, and one that it is offered.
PROGRAM = build([Dense(9), ReLU(), Dense(4)], (6,), "softmax_cross_entropy")
OTHER = build([Dense(20), ReLU(), Dense(4)], (6,), "softmax_cross_entropy")


class NoFuzzer(Exception):
    """This machine has no clang, or one without libFuzzer."""


def compile_target(name: str, folder: Path) -> Path:
    """Builds fuzz_{name}.c. Raises NoFuzzer."""
    clang = next(filter(None, map(shutil.which, CLANG)), None)
    if clang is None:
        raise NoFuzzer("clang is not installed: apt-get install clang libclang-rt-14-dev")
    flags = ["-std=c99", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    files = list(sources("engine", "int8", *["crypto", "node", "store"] * (name != "load")))
    folders = [*INCLUDES, folder]
    if name != "load":
        generated = generate(folder / "wire")
        files += generated
        folders.append(generated[0].parent)
        words = ",".join(str(word) for (word,) in struct.iter_unpack("<I", PROGRAM.data))
        (folder / "fuzz_program.h").write_text(
            f"static const uint32_t program[] = {{{words}}};\n"
            f'#define MODEL_TOPIC "tinyfleet/home/models/{OTHER.model_id.hex()}/0"\n'
        )
    binary = folder / f"fuzz_{name}"
    command = [
        clang,
        *flags,
        *(f"-I{path}" for path in folders),
        *files,
        TESTS / "c" / f"fuzz_{name}.c",
        "-o",
        binary,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "libclang_rt.fuzzer" in done.stderr:
        raise NoFuzzer("clang has no libFuzzer here: apt-get install libclang-rt-14-dev")
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return binary


def fuzz(name: str, folder: Path, seconds: int) -> tuple[bool, str]:
    """Runs a fuzzer from its corpus; new inputs go to {folder}/{name}, what fails to {folder}. Whether it was clean,
    and what it said last."""
    binary, found = compile_target(name, folder), folder / name
    found.mkdir(exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={LENGTH[name]}"]
    limits += ["-timeout=5", "-rss_limit_mb=2000", "-malloc_limit_mb=256"]  # seconds for one input, memory of all
    command = [binary, *limits, "-print_final_stats=1", f"-artifact_prefix={folder}/{name}-", found, CORPUS / name]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode == 0, done.stderr[-6000:]


def fuzz_python(name: str, folder: Path, seconds: int) -> tuple[bool, str]:
    """Runs a target of fuzz_targets.py in a process of its own; results as of `fuzz`."""
    command = [sys.executable, TESTS / "fuzz_python.py", name, "--seconds", str(seconds), "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def keep(name: str, folder: Path) -> None:
    """Adds to the corpus what of {folder}/{name} reaches code that nothing in the corpus does, however often."""
    command = [
        folder / f"fuzz_{name}",
        "-merge=1",
        "-use_counters=0",
        f"-max_len={LENGTH[name]}",
        CORPUS / name,
        folder / name,
    ]
    subprocess.run(command, capture_output=True, check=True)


def _message(what: int, data: bytes) -> bytes:
    return bytes([what]) + struct.pack("<H", len(data)) + data


def node_seeds() -> list[bytes]:
    """What a fleet may send, as the fuzzer's actions."""
    model = bytes(7) + b"\1"
    updates = [None, UpdateFormat(), UpdateFormat(1, True, 1.0), UpdateFormat(ALL_LAYERS, False, 0.2)]
    updates += [UpdateFormat(2, True, 0.5)]
    start = PROGRAM.initial(1).tobytes()
    weights = _message(0xA0, start)
    orders = [
        TrainTask(1 + i, "train", 5, 1, model, i, (Phase(2, 3, 0.1), Phase(3, 9, 0.1)), 4, update, start)
        for i, update in enumerate(updates)
    ]
    adopt = UpdateModel(9, Manifest(Sha256.of(OTHER.data).digest, len(OTHER.data), 1, OTHER.arena_bytes, 6, 4, 2, 3))
    assert len(OTHER.data) <= 1024
    found = [_message(0x90, encode_action(order)) + weights + b"\x3f" * 8 + b"\x40\x3f" for order in orders]
    found += [_message(0x90, encode_action(adopt)) + _message(0xC0, OTHER.data) + found[0]]
    found += [_message(0x90, encode_action(action)) for action in (Reboot(3), Forget(4), NewKeys(5, 2, bytes(32)))]
    hashed = replace(orders[0], weights=Sha256.of(start))
    found += [_message(0x90, encode_action(hashed)) + weights + b"\x3f" * 8]
    found += [_message(0x80, mac0(encode_command(2000, 3000, None, encode_action(Reboot(3))), bytes(32), "t"))]
    found += [_message(0xE0, chunk) for chunk in chunks(np.zeros(103, np.float32).tobytes())]
    line = b"".join(
        serial_frames.encode(serial_frames.Frame(serial_frames.MESSAGE, "a topic", seed[:200])) for seed in found
    )
    return [*found, b"".join(found), line]


def load_seeds() -> list[bytes]:
    """Small programs that together have every kind of operation and every loss."""
    return [make().data for make in small_models.MODELS.values()]


def frame_seeds() -> list[bytes]:
    """Lines of one frame and of several, and what the fuzzer makes a frame of."""
    topic = "tinyfleet/home/devices/kitchen/reply"
    frames = [serial_frames.Frame(serial_frames.PUBLISH, topic, bytes(range(n % 256)) * 2) for n in (0, 7, 254, 255)]
    lines = list(map(serial_frames.encode, [*frames, serial_frames.Frame(serial_frames.HELLO)]))
    return [*lines, b"".join(lines), b"\1\5topicpayload"]


def make_seeds() -> None:
    """Writes the first inputs of the corpora, named seed_...; others stay."""
    for name, seeds in (("load", load_seeds()), ("node", node_seeds()), ("frames", frame_seeds())):
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("seed_*"):
            path.unlink()
        for i, seed in enumerate(seeds):
            (folder / f"seed_{i:02}").write_bytes(seed)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120, help="how long each runs (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="add to the corpus what reached new code")
    parser.add_argument("--seeds", action="store_true", help="only make the corpus' first inputs")
    parser.add_argument("--only", choices=[*TARGETS, *PYTHON_TARGETS], help="one of them")
    chosen = parser.parse_args(arguments)
    if chosen.seeds:
        make_seeds()
        return 0
    folder = TESTS.parent / "build" / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = [chosen.only] if chosen.only else [*TARGETS, *PYTHON_TARGETS]

    def run(name: str) -> tuple[bool, str]:
        return (fuzz if name in TARGETS else fuzz_python)(name, folder, chosen.seconds)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(names, pool.map(run, names), strict=True))
    for name, (clean, said) in results.items():
        if chosen.keep and clean and name in TARGETS:
            keep(name, folder)
        stats = [line for line in said.splitlines() if line.startswith("stat::") or "DONE" in line]
        print(name, "clean" if clean else "FAILED", *(stats if clean else [said]), sep="\n")
    return 0 if all(clean for clean, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
