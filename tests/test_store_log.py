"""The store's log on a model of flash, whose power is cut at every write and erase, also while it recovers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyfleet.edge._mote import ffi, lib

GEOMETRIES = [(128, 3, 1), (128, 4, 4), (256, 3, 8), (256, 5, 16), (1024, 3, 4)]
Step = tuple[int, bytes]


class Flash:
    """NOR flash: writing clears bits, erasing sets those of a page. After `left` operations the power is gone, in the
    middle of one: a write has written a part, an erase has left anything."""

    def __init__(self, page_size: int, pages: int, unit: int, seed: int = 0) -> None:
        self.page_size, self.pages, self.unit = page_size, pages, unit
        self.data = bytearray(random.Random(seed).randbytes(page_size * pages))
        self.left = self.done = -1
        self.erased = [0] * pages
        self._random = random.Random(seed)
        self.c = ffi.new("mote_flash_t *")
        self._kept = [
            ffi.callback("int(void *, uint32_t, void *, uint32_t)", self._read),
            ffi.callback("int(void *, uint32_t, void *, uint32_t)", self._write),
            ffi.callback("int(void *, uint32_t)", self._erase),
        ]
        self.c.read_at, self.c.erase_page = self._kept[0], self._kept[2]
        self.c.write_at = ffi.cast("int(*)(void *, uint32_t, void *, uint32_t)", self._kept[1])
        self.c.page_size, self.c.pages, self.c.unit = page_size, pages, unit

    def copy(self) -> Flash:
        other = Flash(self.page_size, self.pages, self.unit)
        other.data[:] = self.data
        return other

    def _power(self) -> str:
        self.done += 1
        if self.left == 0:
            return "gone"
        self.left -= 1
        return "cut" if self.left == 0 else "on"

    def _read(self, _context: Any, at: int, out: Any, size: int) -> int:
        assert at + size <= len(self.data)
        ffi.memmove(out, bytes(self.data[at : at + size]), size)
        return 0

    def _write(self, _context: Any, at: int, what: Any, size: int) -> int:
        power = self._power()
        new = bytes(ffi.buffer(what, size))
        assert at % self.unit == size % self.unit == 0 and at + size <= len(self.data)
        if power == "gone":
            return -77
        assert all(byte == 0xFF for byte in self.data[at : at + size]), "written twice"
        if power == "cut":
            part = self._random.randrange(size + 1)
            new = new[:part] + (bytes([new[part] | self._random.randrange(256)]) if part < size else b"")
        for i, byte in enumerate(new):
            self.data[at + i] &= byte
        return -77 if power == "cut" else 0

    def _erase(self, _context: Any, page: int) -> int:
        power = self._power()
        if power == "gone":
            return -77
        assert page < self.pages
        self.erased[page] += 1
        begin, size = page * self.page_size, self.page_size
        if power == "cut":
            kept = self._random.randrange(size + 1)  # from the front, from the back, or here and there
            blank = {
                0: range(kept),
                1: range(kept, size),
                2: self._random.sample(range(size), kept),
            }[self._random.randrange(3)]
            for i in blank:
                self.data[begin + i] = 0xFF
            return -77
        self.data[begin : begin + size] = b"\xff" * size
        return 0


class Log:
    """The log on a flash."""

    def __init__(self, flash: Flash) -> None:
        self.flash = flash
        self.c = ffi.new("mote_store_t *")
        self.error = int(lib.mote_store_open(self.c, flash.c))

    def get(self, key: int) -> bytes:
        out = ffi.new("uint8_t[]", 4096)
        size = int(lib.mote_store_get(self.c, key, out, 4096))
        assert size >= 0, size
        return bytes(ffi.buffer(out, size))

    def set(self, key: int, data: bytes) -> int:
        return int(lib.mote_store_set(self.c, key, data or ffi.NULL, len(data)))


def history(page_size: int, pages: int, seed: int) -> list[Step]:
    """Counters, a value larger than a page, replacements and removals, over many rounds of the log."""
    rng = random.Random(seed)
    large = min(page_size + 40, (pages - 2) * (page_size - 100) // 2)
    steps: list[Step] = []
    for n in range(150):
        match rng.randrange(6):
            case 0:
                steps.append((3, rng.randbytes(rng.randrange(1, large + 1))))
            case 1:
                steps.append((rng.choice([2, 3, 4]), b""))
            case 2:
                steps.append((4, rng.randbytes(rng.randrange(1, 20))))
            case _:
                steps.append((1, n.to_bytes(4, "little") + b"count"))
    return steps


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_power_cut_at_every_write_and_erase_leaves_the_old_or_the_new(geometry: tuple[int, int, int]) -> None:
    """And a second cut at every operation of the recovery from it."""
    cuts = 0
    flash = Flash(*geometry)
    log, known = Log(flash), dict.fromkeys(range(1, 5), b"")
    assert log.error == 0
    for key, value in history(geometry[0], geometry[1], 5):
        before = flash.copy()
        flash.done = 0
        assert log.set(key, value) == 0
        operations, after = flash.done, known | {key: value}
        for first in range(1, operations + 1):
            once = before.copy()
            cut_log = Log(once)
            once.left = first
            assert cut_log.set(key, value) != 0
            second = 1
            while True:
                twice = once.copy()
                twice.left = second
                Log(twice)
                recovers_without_a_cut = twice.left != 0
                cuts += 1
                twice.left = -1
                survivor = Log(twice)
                assert survivor.error == 0
                found = {each: survivor.get(each) for each in known}
                assert found in (known, after), (key, first, second)
                assert survivor.set(4, b"works") == 0 and survivor.get(4) == b"works"
                assert {k: survivor.get(k) for k in (1, 2, 3)} == {k: found[k] for k in (1, 2, 3)}
                if recovers_without_a_cut:
                    break
                second += 1
        known = after
        assert {each: log.get(each) for each in known} == known
    print(f"{geometry}: {cuts} cuts")
    assert cuts > 300


def test_pages_wear_evenly() -> None:
    flash = Flash(256, 5, 4)
    log = Log(flash)
    assert log.set(2, b"that stays" * 10) == 0
    for n in range(5000):
        assert log.set(1, n.to_bytes(4, "little")) == 0
    assert max(flash.erased) - min(flash.erased) <= 2 and max(flash.erased) > 50
    assert log.get(2) == b"that stays" * 10


def test_what_has_no_room_is_refused_and_all_else_stays() -> None:
    flash = Flash(256, 4, 4)
    log = Log(flash)
    assert log.set(1, bytes(200)) == 0
    assert log.set(2, bytes(400)) == lib.MOTE_ERR_STORE and log.set(2, bytes(4000)) == lib.MOTE_ERR_STORE
    for n in range(30):
        assert log.set(3, bytes([n]) * 30) == 0
    assert log.get(1) == bytes(200) and log.get(2) == b"" and Log(flash).get(3) == bytes([29]) * 30


def test_keys_and_geometries_that_cannot_be_are_refused() -> None:
    log = Log(Flash(256, 3, 4))
    assert log.set(0, b"x") == log.set(255, b"x") == lib.MOTE_ERR_ARGUMENT
    for page_size, pages, unit in ((64, 3, 4), (256, 2, 4), (256, 3, 3), (130, 3, 4), (1 << 17, 3, 4)):
        flash = Flash(256, 3, 4)
        flash.c.page_size, flash.c.pages, flash.c.unit = page_size, pages, unit
        assert lib.mote_store_open(ffi.new("mote_store_t *"), flash.c) == lib.MOTE_ERR_ARGUMENT
        assert lib.mote_store_capacity(flash.c) == 0


@given(st.binary(max_size=3 * 128), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_any_contents_can_be_opened_and_written(noise: bytes, rng: random.Random) -> None:
    flash = Flash(128, 3, 4)
    good = Log(flash)
    for n in range(rng.randrange(12)):
        good.set(rng.randrange(1, 4), bytes([n]) * rng.randrange(30))
    at = rng.randrange(len(flash.data))
    flash.data[at : at + len(noise)] = noise[: len(flash.data) - at]
    log = Log(flash)
    if log.error == 0 and log.set(9, b"a value") == 0:
        assert log.get(9) == b"a value"


@given(st.lists(st.tuples(st.integers(1, 5), st.binary(max_size=60), st.booleans()), max_size=80))
def test_it_is_a_dictionary_that_survives(steps: Sequence[tuple[int, bytes, bool]]) -> None:
    flash = Flash(512, 4, 8)
    log, known = Log(flash), dict.fromkeys(range(1, 6), b"")
    for key, value, again in steps:
        assert log.set(key, value) == 0
        known[key] = value
        if again:
            log = Log(flash)
    assert {key: log.get(key) for key in known} == known
