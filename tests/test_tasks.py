"""What a fleet learns: classes are kept apart, samples are not shared, the same seed gives the same task."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge import tasks
from edge.errors import UserError
from edge.program import Dense, Layer, Loss, build
from edge.tasks import Split, Task, omniglot

needs_omniglot = pytest.mark.skipif(
    not (os.environ.get("TINYFLEET_DATA") and Path(os.environ["TINYFLEET_DATA"], "omniglot").is_dir()),
    reason="Omniglot is not in TINYFLEET_DATA",
)


@pytest.fixture(params=["digits", pytest.param("omniglot", marks=needs_omniglot)])
def task(request: pytest.FixtureRequest) -> Task:
    return tasks.load(request.param)


def test_clients_fit_the_program_and_the_stream(task: Task) -> None:
    for index in range(14):
        data = task.client(index, 14)
        assert data.features.dtype == np.uint8
        assert data.features.shape[1] == int(np.prod(task.program.layers[0].in_shape))
        sizes = np.diff(data.starts.astype(int))
        assert data.starts[0] == 0 and data.starts[-1] == len(data.features)
        assert len(sizes) >= data.ways == task.ways
        assert sizes.min() >= 4, "every class needs samples to learn from and a quarter to be asked about"
        assert data.features.max() * data.scale <= 1


@pytest.mark.parametrize("shots", [1, 5, 10])
def test_episodes_are_balanced_repeatable_and_disjoint(task: Task, shots: int) -> None:
    for split in ("training", "validation", "held_out"):
        one, other = task.draw(split, [3, 4], shots, 10)
        two = task.draw(split, [5, 3], shots, 10)[1]
        for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
            np.testing.assert_array_equal(a, b)
        assert not np.array_equal(one.query_x, other.query_x)
        np.testing.assert_array_equal(np.bincount(one.support_y), np.full(task.ways, shots))
        np.testing.assert_array_equal(np.bincount(one.query_y), np.full(task.ways, 10))
        assert one.support_x.dtype == one.query_x.dtype == np.float32
        support, query = ({x.tobytes() for x in half} for half in (one.support_x, one.query_x))
        assert len(support & query) <= 1, "a sample to learn from is asked about"  # the sets hold a few equal images


def test_what_devices_hold_and_what_is_tuned_on_and_scored_share_no_sample(task: Task) -> None:
    def seen(split: Split) -> set[bytes]:
        return {x.tobytes() for xs in task.draw(split, range(40), 5, 10).query_x for x in xs}

    scale = np.float32(task.client(0, 16).scale)
    on_devices = {
        (row.astype(np.float32) * scale).tobytes() for index in range(16) for row in task.client(index, 16).features
    }
    validation, held_out = seen("validation"), seen("held_out")
    assert len(validation) > 500 and len(held_out) > 500
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
        data.must_fit(build(layers, (inputs,), loss))


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"no task named 'cats'; known tasks: digits, omniglot"):
        tasks.load("cats")


def test_omniglot_reads_its_authors_archive(tmp_path: Path) -> None:
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for character in ("character01", "character02"):
            for drawer in range(3):
                image = Image.new("1", (105, 105), 1)
                image.paste(0, (0, 0, 52, 105) if character == "character01" else (0, 0, 105, 52))
                image.save(tmp_path / "page.png")
                archive.write(tmp_path / "page.png", f"images_background/Greek/{character}/000{drawer}.png")
    characters = omniglot.read_zip(path)
    assert characters.shape == (2, 3, omniglot.SIDE**2)
    left, top = characters[:, 0].reshape(2, omniglot.SIDE, omniglot.SIDE)
    assert (left[:, :6] == 60).all() and (left[:, 8:] == 0).all()
    np.testing.assert_array_equal(left.T, top)


def test_omniglot_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TINYFLEET_DATA", str(tmp_path))
    monkeypatch.setattr(omniglot, "SOURCE", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="set TINYFLEET_DATA"):
        omniglot.load()
