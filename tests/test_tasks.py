"""What a fleet learns: classes are kept apart, samples are not shared, the same seed gives the same task."""

import io
import math
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from PIL import Image

from tinyfleet.edge import datasets, tasks
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.graph import Loss
from tinyfleet.edge.model.layers import Dense, Layer, build
from tinyfleet.edge.tasks import ClientData, Split, Task, keywords, omniglot, presence


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(datasets.local(name) is None, reason=f"{name} is not in TINYFLEET_DATA")


CLASSES = [
    "digits",
    pytest.param("omniglot", marks=needs("omniglot")),
    pytest.param("omniglot-20", marks=needs("omniglot")),
    pytest.param("omniglot-5-28", marks=needs("omniglot")),
    pytest.param("keywords", marks=needs(keywords.FOLDER)),
    pytest.param("presence", marks=needs("occupancy")),
]

_load = cache(tasks.load)


@pytest.fixture(params=[*CLASSES, "sine"])
def any_task(request: pytest.FixtureRequest) -> Task:
    return _load(request.param)


@pytest.fixture(params=CLASSES)
def task(request: pytest.FixtureRequest) -> Task:
    return _load(request.param)


def as_floats(data: ClientData) -> NDArray[np.float32]:
    return (
        data.features
        if data.features.dtype == np.float32
        else data.features.astype(np.float32) * np.float32(data.scale)
    )


def test_clients_fit_the_models_and_the_stream(any_task: Task) -> None:
    for index in range(14):
        data = any_task.client(index, 14)
        for program in (any_task.program, any_task.large):
            data.check_compatible(program)
        stream = DatasetStream(data)
        stream.open(index)
        x, y = stream.next(query=False)
        assert x.dtype == np.float32 and x.shape == (math.prod(any_task.program.input_shape),)
        assert np.abs(x).max() <= 8 and np.all(np.abs(y) <= max(5, data.ways - 1))
        assert len(data.starts) - 1 >= data.ways == any_task.ways
        assert data.starts[-1] == len(data.features) > 12
        assert data.features.nbytes < 640_000, "it must fit into a board's flash"


def test_the_small_model_trains_in_256_kb_and_the_large_one_is_larger(any_task: Task) -> None:
    taken = any_task.program.arena_bytes + any_task.program.params_bytes  # with the copy that sparse replies need
    assert taken < 192 * 1024, "the node, its buffers and the stack need the rest"
    assert any_task.large.n_params > 2 * any_task.program.n_params
    assert any_task.large.input_shape == any_task.program.input_shape
    assert any_task.large.output_shape == any_task.program.output_shape


def test_a_recording_is_in_time_and_says_where_it_drifts(any_task: Task) -> None:
    seen, again, other = any_task.stream(1), any_task.stream(1), any_task.stream(2)
    np.testing.assert_array_equal(seen.x, again.x)
    np.testing.assert_array_equal(seen.y, again.y)
    assert seen.x.shape != other.x.shape or not np.array_equal(seen.x, other.x)
    assert len(seen.x) == len(seen.y) >= 300 and seen.x.dtype == np.float32
    if any_task.name == "sine":
        assert seen.y.shape == (len(seen.x), 1) and seen.y.dtype == np.float32
    else:
        assert seen.y.dtype == np.int64 and set(seen.y) == set(range(any_task.ways))
    if any_task.name == "presence":
        assert seen.drifts is None
    else:
        assert seen.drifts is not None
        edges = [0, *seen.drifts, len(seen.x)]
        assert min(np.diff(edges)) >= 50


def test_a_wave_is_drawn_again_and_never_shared_by_splits() -> None:
    task = tasks.load("sine")
    few, more = task.draw("held_out", [7, 8], 10, 5), task.draw("held_out", [8], 20, 5)
    assert few.support_x.shape == few.support_y.shape == (2, 10, 1) and few.query_x.shape == (2, 5, 1)
    np.testing.assert_array_equal(few.support_x[1], more.support_x[0, :10])
    np.testing.assert_array_equal(few.query_y[1], more.query_y[0])
    assert not set(few.support_x.ravel()) & set(few.query_x.ravel())
    assert few.support_x.min() >= -5 and few.support_x.max() <= 5

    def fit(x: NDArray[np.float32], y: NDArray[np.float32]) -> tuple[float, float, float]:
        """Amplitude, phase and how far it is from a wave: y = a sin x + b cos x."""
        basis = np.concatenate([np.sin(x), np.cos(x)], axis=1).astype(float)
        (a, b), *_ = np.linalg.lstsq(basis, y[:, 0].astype(float), rcond=None)
        return math.hypot(a, b), math.atan2(b, a), float(np.abs(basis @ [a, b] - y[:, 0]).max())

    found = {}
    for split in ("training", "validation", "held_out"):
        drawn = task.draw(split, range(200), 10, 10)
        waves = np.array([fit(drawn[i].support_x, drawn[i].support_y) for i in range(200)])
        assert waves[:, 2].max() < 1e-5
        assert 0.1 <= waves[:, 0].min() < 0.5 and 4.6 < waves[:, 0].max() <= 5.0001
        asked = np.array([fit(drawn[i].query_x, drawn[i].query_y) for i in range(200)])
        np.testing.assert_allclose(asked[:, 0], waves[:, 0], atol=1e-4)
        found[split] = waves[:, :2]
    assert np.abs(found["training"][:, None] - found["held_out"][None]).sum(axis=2).min() > 1e-4


def test_a_wave_is_the_same_however_many_are_drawn_at_once() -> None:
    task = tasks.load("sine")
    many = task.draw("training", range(10_000), 10, 10)
    assert len(many) == 10_000
    for seed in (0, 4321, 9999):
        np.testing.assert_array_equal(task.draw("training", [seed], 10, 10)[0].query_y, many[seed].query_y)


@needs("occupancy")
def test_a_room_is_asked_about_later_than_it_is_learned_from() -> None:
    rooms = presence.split_rooms(presence.read_rooms(presence._folder()))
    names = [room.name for some in rooms.values() for room in some]
    assert len(names) == len(set(names)) == 26 and len(rooms["held_out"]) == 8
    scores = presence.baselines("held_out", range(60), 5, 15)
    np.testing.assert_array_equal(scores["majority"], 0.5)
    assert 0.7 < scores["light threshold"].mean() < 1
    chosen, support, query = presence._rows(rooms["held_out"], range(20), 5, 15)
    drawn = _load("presence").draw("held_out", range(20), 5, 15)
    for i, room in enumerate(chosen):
        assert support[i].max() < 0.6 * len(rooms["held_out"][room].y) <= query[i].min() + 1
        np.testing.assert_array_equal(drawn[i].query_x, rooms["held_out"][room].x[query[i]])
        np.testing.assert_array_equal(drawn[i].query_y, rooms["held_out"][room].y[query[i]])


@pytest.mark.parametrize("shots", [1, 5, 10])
def test_episodes_are_balanced_repeatable_and_disjoint(task: Task, shots: int) -> None:
    for split in ("training", "validation", "held_out"):
        one, other = task.draw(split, [3, 4], shots, 8)
        two = task.draw(split, [5, 3], shots, 8)[1]
        for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(one.query_x, other.query_x)
        np.testing.assert_array_equal(np.bincount(one.support_y), np.full(task.ways, shots))
        np.testing.assert_array_equal(np.bincount(one.query_y), np.full(task.ways, 8))
        assert one.support_x.dtype == one.query_x.dtype == np.float32
        support, query = ({x.tobytes() for x in half} for half in (one.support_x, one.query_x))
        # The sets hold a few equal images, and of a room that nobody is in a few equal minutes.
        assert len(support & query) <= 1, "a sample to learn from is asked about"


def test_what_devices_hold_and_what_is_tuned_on_and_scored_share_no_sample(task: Task) -> None:
    def seen(split: Split) -> set[bytes]:
        return {x.tobytes() for xs in task.draw(split, range(40), 5, 10).query_x for x in xs}

    on_devices = {row.tobytes() for index in range(16) for row in as_floats(task.client(index, 16))}
    validation, held_out = seen("validation"), seen("held_out")
    assert min(len(validation), len(held_out)) > (60 if task.name == "keywords" else 300)
    assert not seen("training") & (validation | held_out)
    assert not on_devices & held_out and not on_devices & validation and not validation & held_out


def test_devices_share_no_digit() -> None:
    task = tasks.load("digits")
    shares = [task.client(index, 14).features for index in range(14)]
    assert sum(map(len, shares)) == sum(map(len, [task.client(0, 1).features]))


@pytest.mark.parametrize(
    ("layers", "inputs", "loss", "said"),
    [
        ([Dense(5)], 63, "softmax_cross_entropy", "the samples have 64 features and the model takes 63"),
        ([Dense(4)], 64, "softmax_cross_entropy", "a task has 5 classes and the model 4"),
        ([Dense(5)], 64, "mse", "a sample has one class and the model learns 5 values"),
    ],
)
def test_samples_and_model_that_do_not_fit(layers: list[Layer], inputs: int, loss: Loss, said: str) -> None:
    data = tasks.load("digits").client(0, 14)
    with pytest.raises(UserError, match=said):
        data.check_compatible(build(layers, (inputs,), loss))


def test_a_regression_and_a_model_that_do_not_fit() -> None:
    data = tasks.load("sine").client(0, 14)
    with pytest.raises(UserError, match=r"1 numbers to predict and the model learns 1 classes"):
        data.check_compatible(build([Dense(1)], (1,), "softmax_cross_entropy"))
    with pytest.raises(UserError, match=r"1 numbers to predict and the model learns 2 values"):
        data.check_compatible(build([Dense(2)], (1,), "mse"))


@pytest.mark.parametrize("name", ["cats", "digits-x", "sine-3", "omniglot-5-14-1", "digits.cats"])
def test_a_task_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=rf"no task named '{name}'"):
        tasks.load(name)


@pytest.mark.parametrize(("name", "ways", "side"), [("omniglot-30", 30, 14), ("omniglot-5-15", 5, 15)])
def test_numbers_that_a_task_does_not_have(name: str, ways: int, side: int) -> None:
    said = f"no task of omniglot with {ways} ways and sides of {side} pixels; name 2 to 20 ways, and a side of 14 or 28"
    with pytest.raises(UserError, match=said):
        tasks.load(name)


def test_an_error_within_a_task_is_not_taken_for_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omniglot, "data", lambda: len(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no len"):
        tasks.load("omniglot-20")


def test_the_tasks_are_named() -> None:
    assert tasks.NAMES == ("digits", "keywords", "omniglot", "presence", "sine")
    with pytest.raises(
        UserError, match="known tasks: digits, keywords, omniglot, presence, sine, or the path of a file"
    ):
        tasks.load("cats")
    with pytest.raises(UserError, match=r"no file nowhere/mine\.py"):
        tasks.load("nowhere/mine.py")


def test_omniglot_reads_its_authors_archive(tmp_path: Path) -> None:
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for character in ("character01", "character02"):
            for drawer in range(3):
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (0, 0, 52, 105) if character == "character01" else (0, 0, 105, 52))
                image.save(tmp_path / "page.png")
                archive.write(tmp_path / "page.png", f"images_background/Greek/{character}/000{drawer}.png")
    characters, alphabets = omniglot.read_zip(path)
    assert characters.shape == (2, 3, 28 * 28) and alphabets.tolist() == [0, 0]
    left, top = omniglot.shrink(characters)[:, 0].reshape(2, 14, 14)
    assert (left[:, :6] == 60).all() and (left[:, 8:] == 0).all()
    np.testing.assert_array_equal(left.T, top)


@needs("omniglot")
def test_a_device_has_the_drawings_of_its_drawers_of_one_alphabet() -> None:
    task = _load("omniglot")
    for of in (14, 60, 140):
        shares = [task.client(index, of).features for index in range(of)]
        drawings = [row.tobytes() for share in shares for row in share]
        assert len(drawings) - len(set(drawings)) <= 4, "no two devices share a drawing, but for equal ones"
    assert np.diff(task.client(599, 600).starts).tolist()[0] == omniglot.FEW


@pytest.mark.parametrize(
    ("name", "what"), [("omniglot", omniglot.PACKED), ("keywords", f"{keywords.FOLDER}/index.csv")]
)
def test_damaged_data_is_told(name: str, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYFLEET_DATA", str(tmp_path))
    (tmp_path / what).parent.mkdir(parents=True)
    (tmp_path / what).write_bytes(b"no data")
    with pytest.raises(UserError, match="SHA-256 is another"):
        tasks.load(name)


@pytest.mark.parametrize("missing", ["occupancy", "occupancy/berkeley_sdh_45rooms_1min.csv.gz"])
def test_rooms_that_cannot_be_had_say_what_to_do(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYFLEET_DATA", str(tmp_path))
    if missing != "occupancy":
        (tmp_path / "occupancy").mkdir()
    with pytest.raises(UserError, match="set TINYFLEET_DATA to a folder"):
        presence.load()


def wav(words: float, seconds: float = 1.0) -> bytes:
    """A tone of that many cycles."""
    samples = 8000 * np.sin(2 * np.pi * words * np.arange(int(16_000 * seconds)) / 16_000)
    file = io.BytesIO()
    soundfile.write(file, samples.astype(np.int16), 16_000, format="WAV", subtype="PCM_16")
    return file.getvalue()


def test_keywords_reads_its_authors_archive(tmp_path: Path) -> None:
    path = tmp_path / "test_set.tar.gz"
    speakers = {"0a1b2c3d": keywords.ALL_WORDS, "12345678": keywords.ALL_WORDS[:9], "deadbeef": ("cat",)}
    with tarfile.open(path, "w:gz") as archive:
        for who, words in speakers.items():
            for w, word in enumerate(words):
                for take in range(3):
                    data = wav(200 + 20 * w + min(take, 1), 0.7)
                    info = tarfile.TarInfo(f"./{word}/{who}_nohash_{take}.wav")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    clips = list(keywords.read_archive(path))
    assert len(clips) == 57 and {len(samples) for _, _, samples in clips} == {16_000}
    spoken = keywords.with_features(clips)
    assert list(spoken) == ["0a1b2c3d"], "the speaker who says all ten words, twenty times in all"
    assert {rows.shape for rows in spoken["0a1b2c3d"].values()} == {(2, 980)}, "no clip twice"


def test_speech_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYFLEET_DATA", str(tmp_path))
    monkeypatch.setattr(keywords, "SOURCE", "http://127.0.0.1:9/test.tar.gz")
    with pytest.raises(UserError, match="set TINYFLEET_DATA"):
        keywords.load()


def test_omniglot_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYFLEET_DATA", str(tmp_path))
    monkeypatch.setattr(omniglot, "SOURCE", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="set TINYFLEET_DATA"):
        omniglot.load()


def test_a_file_without_a_task_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"has no function load\(\)"):
        tasks.load(str(tmp_path / "mine.py"))
