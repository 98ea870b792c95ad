"""What checking a command's seal costs on a microcontroller: instructions, and bytes of flash.

    python benchmarks/cose_costs.py [--json]

The commands are sealed as a server seals them, and opened by the firmware's C code in QEMU, whose clock is driven by
instructions: the counts are exact. A COSE_Mac0 is checked at each visit, a COSE_Sign1 for what outlives a round. Flash
is that of the whole program: hashes, Monocypher's curve and COSE, and some 2 KB of start-up, printing and messages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from instructions import instructions

from tinyfleet.edge.wire import cose
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build
from tinyfleet.firmware_tools.firmware.size import read_size

BOARDS = ("microbit", "mps2-an386", "mps3-an547")
SIZES = (110, 200, 2048)
"""Bytes of a payload: a train task with a hash, a model's manifest, a task with weights in it."""
TOPIC = "tinyfleet/home/devices/one/command"


def measured(board: str, size: int, folder: Path) -> dict[str, object]:
    """Instructions of both checks."""
    key, signer = bytes(range(32)), Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    payload = bytes(i % 251 for i in range(size))
    messages = {
        "command_key": key,
        "fleet_key": cose.public_key(signer),
        "mac0": cose.mac0(payload, key, TOPIC),
        "sign1": cose.sign1(payload, signer, TOPIC),
    }
    target = catalogue.load_board(board)
    target = replace(target, build=replace(target.buildable(), stack_bytes=4096))
    elf = build.build_cose_benchmark(target, folder / f"{board}-{size}.elf", messages)
    counts = instructions(target, elf)
    mac0, sign1 = (round(counts[name]) for name in ("infer", "learn"))
    return {
        "board": target.board.title,
        "mcu": target.board.mcu,
        "payload": size,
        "mac0": mac0,
        "sign1": sign1,
        "flash": read_size(elf).flash,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measured(board, size, Path(folder)) for board in BOARDS for size in SIZES]
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'core':<12}{'payload':>8}{'COSE_Mac0':>14}{'COSE_Sign1':>14}   instructions{'flash':>10} B")
    for row in rows:
        print(f"{row['mcu']:<12}{row['payload']:>8}{row['mac0']:>14,}{row['sign1']:>14,}{row['flash']:>25,}")


if __name__ == "__main__":
    main()
