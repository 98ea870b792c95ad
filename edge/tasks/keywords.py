"""Spoken words, heard by devices whose speakers differ: three-way few-shot classification of Speech Commands.

Four of the ten words train (down, go, left, no), three are for validation (off, on, right) and three are held out
(stop, up, yes). The speakers are split too: 32, 7 and 13 of 52. A device has one training speaker. An episode is three
words of one speaker, or of several if one has too few recordings: a speaker says a word about five times.

Features are those of mote_mel.h, computed by the C code that a device runs: 49 frames of 20 bands, above their mean.

The data come from the folder audio/gsc_v2_speakers20_16k of TINYFLEET_DATA if it exists. Otherwise the test archive of
Speech Commands v2 (Warden 2018) is downloaded once, and the speakers with each of the ten words and at least 20 clips
in total are kept. Features are stored in the user's cache.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyfleet.edge import datasets
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model import features
from tinyfleet.edge.model.layers import Conv2D, Dense, Flatten, Layer, ReLU, build
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData, Episodes, Hyperparameters, Recording, Split, Task, hashed

WAYS = 3
WORDS: dict[Split, tuple[str, ...]] = {
    "training": ("down", "go", "left", "no"),
    "validation": ("off", "on", "right"),
    "held_out": ("stop", "up", "yes"),
}
ALL_WORDS = tuple(word for words in WORDS.values() for word in words)
CLIP = features.RATE  # samples: a second
SHAPE = (features.frames(CLIP), features.BANDS, 1)
SCALE = 1 / 32  # four octaves above the mean are 1
CLIPS = 20  # of each speaker, at least
HOME = 4  # speakers, in a recording

FOLDER = "audio/gsc_v2_speakers20_16k"
#: Of index.csv and the FLAC files, in the order of their names.
FOLDER_SHA256 = "0b64ec41bb8f87fc6b7e6d253d5f266f7d2d36d70deddebcecd21f1b858fc5ed"
SOURCE = "http://download.tensorflow.org/data/speech_commands_test_set_v0.02.tar.gz"
SHA256 = "cc2a00c1147c2254e9be3fa0f779d8c17421dc349b86366567a8edfa9acd51df"

Clip = tuple[str, str, NDArray[np.int16]]  # speaker, word, [CLIP]
Spoken = dict[str, dict[str, NDArray[np.uint8]]]  # speaker -> word -> [clips, features]


def _network(*filters: int) -> Program:
    layers: list[Layer] = []
    for count in filters:
        layers += [Conv2D(count, (3, 3), strides=2, padding="same"), ReLU()]
    return build([*layers, Flatten(), Dense(WAYS)], SHAPE, "softmax_cross_entropy")


PROGRAM = _network(16, 24, 32)
LARGE = _network(32, 64, 128)


def load() -> Task:
    spoken = _spoken()
    names = sorted(spoken)
    speakers: dict[Split, list[str]] = {
        "held_out": names[3::4],
        "validation": names[1::8],
        "training": [name for i, name in enumerate(names) if i % 4 != 3 and i % 8 != 1],
    }

    def client(index: int, fleet_size: int) -> ClientData:
        own = spoken[speakers["training"][index % len(speakers["training"])]]
        return ClientData.of([own[word] for word in WORDS["training"] if len(own[word]) > 1], SCALE, WAYS)

    # All clips in one array, and where those of a speaker's word are in it.
    pool = np.concatenate([spoken[who][word] for who in names for word in ALL_WORDS])
    counts = np.array([[len(spoken[who][word]) for word in ALL_WORDS] for who in names])
    first = np.cumsum(counts).reshape(counts.shape) - counts
    numbers = {split: np.searchsorted(names, some) for split, some in speakers.items()}

    def rows(split: Split, seed: int, shots: int, queries: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The support and query clips of one episode, word by word."""
        random = np.random.default_rng(seed)
        words = [ALL_WORDS.index(WORDS[split][i]) for i in random.permutation(len(WORDS[split]))[:WAYS]]
        who = random.permutation(numbers[split])
        enough = (counts[who][:, words].cumsum(axis=0) >= shots + queries).all(axis=1)
        if not enough.any():
            raise ValueError(f"the {split} speakers do not say a word {shots + queries} times")
        heard = who[: int(enough.argmax()) + 1]
        picked = []
        for word in words:
            clips = np.concatenate([first[i, word] + np.arange(counts[i, word]) for i in heard])
            picked.append(clips[random.permutation(len(clips))[: shots + queries]])
        both = np.stack(picked)
        return both[:, :shots].ravel(), both[:, shots:].ravel()

    def draw(split: Split, seeds: Sequence[int], shots: int, queries: int) -> Episodes:
        drawn = [rows(split, seed, shots, queries) for seed in seeds]
        order = np.argsort(hashed(seeds, 3, WAYS * shots), axis=1)
        support = np.take_along_axis(np.stack([some for some, _ in drawn]), order, 1)
        label = np.arange(WAYS)
        return Episodes(
            pool[support].astype(np.float32) * np.float32(SCALE),
            label.repeat(shots)[order],
            pool[np.stack([asked for _, asked in drawn])].astype(np.float32) * np.float32(SCALE),
            np.tile(label.repeat(queries), (len(seeds), 1)),
        )

    def stream(index: int) -> Recording:
        """Three homes of four held-out speakers each, every clip twice; in each, the words stand for other commands."""
        random = np.random.default_rng(index)
        who = random.permutation(len(speakers["held_out"]))
        xs, ys = [], []
        for home in range(3):
            clips = [
                (row, label)
                for i in who[home * HOME : (home + 1) * HOME]
                for label, word in zip(random.permutation(WAYS), WORDS["held_out"], strict=True)
                for row in spoken[speakers["held_out"][i]][word]
            ]
            order = np.concatenate([random.permutation(len(clips)) for _ in range(2)])
            xs.append(np.array([clips[i][0] for i in order]).astype(np.float32) * np.float32(SCALE))
            ys.append(np.array([clips[i][1] for i in order], np.int64))
        drifts = (len(ys[0]), len(ys[0]) + len(ys[1]))
        return Recording(np.concatenate(xs), np.concatenate(ys), drifts)

    return Task(
        name="keywords",
        ways=WAYS,
        program=PROGRAM,
        client=client,
        draw=draw,
        meta=Hyperparameters(head_steps=16, steps=144, rate=0.02, alpha=2.0, density=0.1),
        fedavg=Hyperparameters(head_steps=0, steps=160, rate=0.02, alpha=1.0, density=1.0),
        large=LARGE,
        stream=stream,
    )


def _spoken() -> Spoken:
    """All clips' features, from the cache if they were computed before."""
    folder = datasets.local(FOLDER)
    if folder is not None:
        files = [folder / "index.csv", *sorted(folder.glob("*.flac"))]
        datasets.check(files, FOLDER_SHA256, "Speech Commands")
    else:
        archive = datasets.download(SOURCE, SHA256, "Speech Commands", FOLDER)
    digest = SHA256 if folder is None else FOLDER_SHA256
    cached = datasets.cache() / f"keywords-{digest[:16]}-{features.VERSION}.npz"
    if not cached.exists():
        clips = list(read_archive(archive) if folder is None else read_folder(folder))
        kept = with_features(clips)
        with suppress(OSError):  # disk full or read-only: they are computed again next time
            new = cached.with_suffix(".new.npz")
            np.savez(new, **{f"{who} {word}": rows for who, words in kept.items() for word, rows in words.items()})
            new.replace(cached)
        return kept
    spoken: Spoken = defaultdict(dict)
    with np.load(cached) as data:
        for name in data.files:
            who, word = name.split()
            spoken[who][word] = data[name]
    return spoken


def with_features(clips: Sequence[Clip]) -> Spoken:
    """The features of each speaker who has all words and at least CLIPS clips; no clip twice."""
    rows: dict[str, dict[str, dict[bytes, NDArray[np.int16]]]] = defaultdict(lambda: defaultdict(dict))
    for who, word, samples in clips:
        rows[who][word][samples.tobytes()] = samples
    return {
        who: {
            word: np.stack([features.level(features.log_mel(clip)).ravel() for clip in words[word].values()])
            for word in ALL_WORDS
        }
        for who, words in sorted(rows.items())
        if set(words) == set(ALL_WORDS) and sum(map(len, words.values())) >= CLIPS
    }


def _second(samples: NDArray[np.int16]) -> NDArray[np.int16]:
    return np.concatenate([samples[:CLIP], np.zeros(max(0, CLIP - len(samples)), np.int16)])


def read_folder(folder: Path) -> Iterator[Clip]:
    """Clips from one FLAC file for each speaker; index.csv says where each clip is."""
    soundfile = _soundfile()
    with (folder / "index.csv").open() as file:
        index = list(csv.DictReader(file))
    for name in sorted({row["file"] for row in index}):
        samples, rate = soundfile.read(folder / name, dtype="int16")
        if rate != features.RATE:
            raise UserError(f"{folder / name} has {rate} samples a second, not {features.RATE}; use another recording")
        for row in index:
            if row["file"] == name:
                start = int(row["start"])
                yield row["speaker"], row["word"], _second(samples[start : start + int(row["length"])])


def read_archive(path: Path) -> Iterator[Clip]:
    """Clips from the authors' archive: word/speaker_nohash_number.wav."""
    soundfile = _soundfile()
    with tarfile.open(path) as archive:
        for member in archive:
            name = re.search(r"(?:^|/)([a-z]+)/([0-9a-f]+)_nohash_\d+\.wav$", member.name)
            file = archive.extractfile(member) if name is not None and name[1] in ALL_WORDS else None
            if name is not None and file is not None:
                samples, _ = soundfile.read(io.BytesIO(file.read()), dtype="int16")
                yield name[2], name[1], _second(samples)


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without its library
        raise UserError("reading speech needs soundfile: pip install 'tinyfleet[edge]'") from error
    return soundfile
