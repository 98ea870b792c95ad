"""The log-mel front end: the C that a device runs equals its description in NumPy, on any sound and in any portions."""

import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.model import features
from tinyfleet.edge.mote.build_extension import FLAGS, INCLUDES, STRICT
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build, emulate

ROOT = Path(__file__).parents[1]
WINDOW, HOP, BANDS, RATE = 512, 320, 20, 16_000


def shifted(value: NDArray[np.int64], bits: int) -> NDArray[np.int64]:
    """value / 2^bits, rounded half up."""
    return (value + (1 << bits - 1)) >> bits


def bands_of(sound: NDArray[np.int16]) -> NDArray[np.uint8]:
    """[frames, BANDS], from what mote_mel.h and mote_mel.c say, and from the formulas of the tables alone."""
    count = max(0, (len(sound) - WINDOW) // HOP + 1)
    x = np.stack([sound[i * HOP : i * HOP + WINDOW] for i in range(count)]).astype(np.int64)
    turn = 2 * np.pi * np.arange(WINDOW) / WINDOW
    cosine, sine = np.rint(32767 * np.cos(turn)).astype(np.int64), np.rint(32767 * np.sin(turn)).astype(np.int64)
    x = shifted(x * (32768 - cosine), 14)

    def fft(re: NDArray[np.int64], im: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        n = re.shape[1]
        if n == 1:
            return re, im
        (er, ei), (odd_re, odd_im) = (fft(re[:, k::2], im[:, k::2]) for k in (0, 1))
        c, s = cosine[:: WINDOW // n][: n // 2], sine[:: WINDOW // n][: n // 2]
        tr, ti = shifted(odd_re * c + odd_im * s, 15), shifted(odd_im * c - odd_re * s, 15)
        return np.concatenate([er + tr, er - tr], 1), np.concatenate([ei + ti, ei - ti], 1)

    re, im = fft(x[:, 0::2], x[:, 1::2])
    k = np.arange(1, WINDOW // 2)
    ar, ai, br, bi = re[:, k], im[:, k], re[:, -k], im[:, -k]
    c, s = cosine[k], sine[k]
    real = ar + br + shifted((ai + bi) * c, 15) + shifted((br - ar) * s, 15)
    imag = ai - bi + shifted((br - ar) * c, 15) - shifted((ai + bi) * s, 15)
    power = (real * real + imag * imag).astype(object)  # Python's integers: nothing overflows

    corners = np.linspace(*(2595 * np.log10(1 + f / 700) for f in (60, 7600)), BANDS + 2)
    at = (2595 * np.log10(1 + k * RATE / WINDOW / 700) - corners[0]) / (corners[1] - corners[0])
    energies = np.zeros((count, BANDS), object)
    for i, position in enumerate(at):
        band = int(np.floor(position))
        weight = round(255 * (position - band))
        if 0 <= position < BANDS + 1:
            if band < BANDS:
                energies[:, band] += power[:, i] * weight
            if band > 0:
                energies[:, band - 1] += power[:, i] * (255 - weight)
    eighths = [[0 if e < 2**26 else floor_of_8_log2(int(e)) - 208 for e in row] for row in energies]
    return np.clip(np.array(eighths).reshape(count, BANDS), 0, 255).astype(np.uint8)


def floor_of_8_log2(value: int) -> int:
    """Of the value cut to 32 bits, exactly: it is 2^(k/8) or more if its 8th power is 2^k or more."""
    exponent = value.bit_length() - 32
    mantissa = value >> exponent if exponent > 0 else value << -exponent
    return 8 * exponent + (mantissa**8).bit_length() - 1


@pytest.mark.parametrize("kind", ["silence", "loudest", "square", "noise", "whisper", "chirp"])
def test_c_equals_its_description(kind: str) -> None:
    t, random = np.arange(RATE), np.random.default_rng(1)
    sound = {
        "silence": np.zeros(RATE),
        "loudest": np.full(RATE, -32768),
        "square": np.where(t // 8 % 2, 32767, -32768),
        "noise": random.integers(-32768, 32768, RATE),
        "whisper": random.integers(-3, 4, RATE),
        "chirp": 20000 * np.sin(2 * np.pi * t * t / 4 / RATE),
    }[kind].astype(np.int16)
    got = features.log_mel(sound)
    assert got.shape == (49, BANDS)
    np.testing.assert_array_equal(got, bands_of(sound))


@settings(max_examples=30, deadline=None)
@given(arrays.arrays(np.int16, st.integers(WINDOW, 3 * WINDOW)))
def test_any_sound_gives_the_described_bits(sound: NDArray[np.int16]) -> None:
    np.testing.assert_array_equal(features.log_mel(sound), bands_of(sound))


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 4000), max_size=12), seed=st.integers(0, 99))
def test_sound_may_come_in_any_portions(cuts: list[int], seed: int) -> None:
    sound = np.random.default_rng(seed).integers(-9999, 9999, 4000).astype(np.int16)
    mel, frames = ffi.new("mote_mel_t *"), []
    lib.mote_mel_open(mel)
    for portion in np.split(sound, sorted(cuts)):
        out = np.full((len(portion) // HOP + 2, BANDS), 77, np.uint8)
        got = lib.mote_mel_push(
            mel, ffi.from_buffer("int16_t[]", portion), len(portion), ffi.from_buffer("uint8_t[]", out)
        )
        assert (out[got:] == 77).all() and got <= len(portion) // HOP + 1
        frames.append(out[:got])
    np.testing.assert_array_equal(np.concatenate(frames), features.log_mel(sound))


def test_a_tone_is_in_its_band_and_twice_the_amplitude_is_two_octaves_of_energy() -> None:
    t = np.arange(RATE)
    corners = 700 * (10 ** (np.linspace(*(np.log10(1 + f / 700) for f in (60, 7600)), BANDS + 2)) - 1)
    for band in range(BANDS):
        tone = np.sin(2 * np.pi * corners[band + 1] * t / RATE)
        quiet, loud = (features.log_mel((size * tone).astype(np.int16)) for size in (4000, 8000))
        assert (loud.argmax(axis=1) == band).all()
        assert np.abs(loud[:, band].astype(int) - quiet[:, band] - 16).max() <= 1


@given(arrays.arrays(np.uint8, st.integers(0, 200)))
def test_level_takes_the_mean_off(bands: NDArray[np.uint8]) -> None:
    mean = int(bands.astype(int).sum()) // len(bands) if len(bands) else 0
    np.testing.assert_array_equal(features.level(bands), np.maximum(bands.astype(int) - mean, 0))


def test_the_tables_are_the_generator_s() -> None:
    command = [sys.executable, ROOT / "tools/mel_tables.py"]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert made == (ROOT / "edge/mote/src/features/mote_mel_tables.h").read_text()


def made_up() -> str:
    """What firmware_tools/firmware/src/main_mel.c prints, from its description in NumPy."""
    state, sound = 7, []
    for strength in range(12):
        for portion in range(20):
            for _ in range(37 * portion % 700):
                state ^= state << 13 & 0xFFFFFFFF
                state ^= state >> 17
                state ^= state << 5 & 0xFFFFFFFF
                sound.append((state >> 16 >> strength) - (0x8000 >> strength))
    bands = bands_of(np.array(sound, np.int16))
    return f"{len(bands)} {zlib.crc32(bands.tobytes()):x}\n"


@pytest.mark.skipif(not build.available() or not emulate.available(), reason="needs gcc-arm-none-eabi and QEMU")
@pytest.mark.parametrize("board", ["microbit", "mps2-an385", "mps2-an386", "mps2-an500", "mps2-an505", "mps3-an547"])
def test_a_core_computes_the_described_bits(board: str, tmp_path: Path) -> None:
    target = catalogue.load_board(board)
    assert emulate.run_to_completion(target, build.build_mel_check(target, tmp_path / "mel.elf")) == made_up()


def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """The same program, with ASan and UBSan."""
    cc = next((found for name in ("clang", "clang-14", "gcc") if (found := shutil.which(name))), None)
    if cc is None:
        pytest.skip("no C compiler is installed")
    sources = [build.SOURCES / "main_mel.c", *build.MEL, *build.ENGINE]
    sources += [ROOT / "tests/c/semihost_linux.c"]
    flags = [*FLAGS, *STRICT, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    folders = [f"-I{folder}" for folder in (build.SOURCES, *INCLUDES)]
    subprocess.run([cc, *flags, *folders, *sources, "-o", tmp_path / "mel"], check=True)
    done = subprocess.run([tmp_path / "mel"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", made_up())
