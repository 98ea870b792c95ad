"""The store in a file, and devices that keep what they must in it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_fixtures import device, said, sealed, send, status
from node_fixtures import HEAD_ONLY, NOW, carried, deliver, replies, update

from tinyfleet.edge.device.store import FileStore
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.commands import Reboot
from tinyfleet.edge.wire.messages import Success, Trial


def test_records_survive_and_are_replaced(tmp_path: Path) -> None:
    large = random.Random(1).randbytes(100_000)
    with FileStore(tmp_path / "deep" / "store", 1 << 19) as store:
        assert store.get(1) is None
        store.set(1, b"one")
        store.set(2, large)
        store.set(1, b"two")
    assert (tmp_path / "deep" / "store").stat().st_mode & 0o077 == 0
    with FileStore(tmp_path / "deep" / "store", 1 << 19) as store:
        assert store.get(1) == b"two" and store.get(2) == large
        store.set(2, b"")
        assert store.get(2) is None


def test_a_store_is_one_process_s(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store", 1 << 16), pytest.raises(UserError, match="another process uses the store"):
        FileStore(tmp_path / "store", 1 << 16)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be used"):
        FileStore(tmp_path / "folder")


def test_what_is_too_large_is_refused_in_one_line(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store", 1 << 16) as store:
        store.set(1, b"kept")
        with pytest.raises(UserError, match="MOTE_ERR_STORE"):
            store.set(2, bytes(1 << 20))
        assert store.get(1) == b"kept"


def test_a_device_comes_back_with_its_model_and_refuses_what_it_obeyed(tmp_path: Path) -> None:
    with FileStore(tmp_path / "store") as store:
        node = device(store=store)
        send(node, sealed(update(3, HEAD_ONLY, 5)))
        assert isinstance(replies(deliver(node, carried(HEAD_ONLY)))[0], Success)
        reboot = sealed(Reboot(4), NOW + 2000)
        assert said(send(node, reboot))
    with FileStore(tmp_path / "store") as store:
        node = device(store=store)
        assert (node.model, status(node).trial, status(node).boots) == (HEAD_ONLY.model_id, Trial.CONFIRMED, 2)
        assert send(node, reboot) == [] and status(node).ceiling > NOW + 2000


WRITER = """
import sys
from pathlib import Path
from tinyfleet.edge.device.store import FileStore
store = FileStore(Path(sys.argv[1]), 1 << 17)
number = int.from_bytes(store.get(1) or b"", "little")
while True:
    number += 1
    store.set(2, bytes([number % 251]) * 20_000)
    store.set(1, number.to_bytes(4, "little"))
    print(number, flush=True)
"""


def test_a_process_killed_while_it_writes_loses_nothing_that_it_had_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "store", 0
    for turn in range(6):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3 + 5 * turn):
            seen = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        seen = max([seen, *map(int, process.stdout.read().split())])
        process.wait()
        with FileStore(path, 1 << 17) as store:
            number = int.from_bytes(store.get(1) or b"", "little")
            value = store.get(2) or b""
        assert number in (seen, seen + 1)
        assert len(value) == 20_000 and value[0] in (number % 251, (number + 1) % 251) and len(set(value)) == 1
