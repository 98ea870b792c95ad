"""The stream of a data set: what C draws, Python gets, to the bit; and what a recording gives."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.sources import DatasetStream, RecordedStream
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.tasks import ClientData, Recording


def data(sizes: list[int], ways: int, scale: float) -> ClientData:
    random = np.random.default_rng(1)
    return ClientData.of([random.integers(0, 255, (n, 3), np.uint8) for n in sizes], scale, ways)


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    ways=st.integers(1, 32),
    seed=st.integers(0, 2**32 - 1),
    queries=st.lists(st.booleans(), max_size=30),
    real=st.booleans(),
    fixed=st.booleans(),
    outputs=st.integers(0, 3),
)
def test_python_gets_what_c_draws(
    sizes: list[int], ways: int, seed: int, queries: list[bool], real: bool, fixed: bool, outputs: int
) -> None:
    sizes = sizes[:32] if fixed else sizes
    client = data(sizes, len(sizes) if fixed else min(ways, len(sizes)), 1 / 255)
    random = np.random.default_rng(2)
    features = random.normal(size=client.features.shape).astype(np.float32) if real else client.features
    targets = random.normal(size=(len(features), outputs)).astype(np.float32) if outputs else None
    client = replace(client, features=features, targets=targets, fixed=fixed)
    stream = DatasetStream(client)
    stream.open(seed)
    c, x, y = ffi.new("mote_stream_t *"), ffi.new("float[3]"), ffi.new("float[3]")
    keep = [ffi.from_buffer("uint32_t[]", client.starts)]
    c.starts = keep[0]
    if real:
        keep.append(ffi.from_buffer("float[]", client.features))
        c.values = keep[-1]
    else:
        keep.append(ffi.from_buffer("uint8_t[]", client.features))
        c.features = keep[-1]
    if targets is not None:
        keep.append(ffi.from_buffer("float[]", targets))
        c.targets, c.outputs = keep[-1], outputs
    c.classes, c.size, c.scale, c.ways, c.fixed = len(sizes), 3, client.scale, client.ways, fixed
    assert lib.mote_stream_open(c, seed) == lib.MOTE_OK
    assert list(c.chosen) == list(stream.c.chosen)
    for query in queries:
        lib.mote_stream_next(c, query, x, y)
        features_, target = stream.next(query)
        assert np.frombuffer(ffi.buffer(x), np.float32).tobytes() == features_.tobytes()
        assert list(y)[: outputs or 1] == (np.ravel(target).tolist())


def test_queries_are_never_learned_from() -> None:
    client = ClientData.of([np.arange(c * 20, c * 20 + 20, dtype=np.uint8)[:, None] for c in range(4)], 1.0, 4)
    stream = DatasetStream(client)
    stream.open(7)
    learned = {float(stream.next(False)[0][0]) for _ in range(600)}
    scored = {float(stream.next(True)[0][0]) for _ in range(600)}
    assert not learned & scored and len(learned) == 60 and len(scored) == 20


@pytest.mark.parametrize(
    ("sizes", "ways", "scale"), [([5, 5], 3, 1.0), ([5, 1], 2, 1.0), ([5] * 40, 33, 1.0), ([5], 1, np.inf)]
)
def test_data_that_gives_no_task_is_refused(sizes: list[int], ways: int, scale: float) -> None:
    with pytest.raises(UserError, match=r"can't give a task|at least 2|finite"):
        DatasetStream(data(sizes, ways, scale))


def test_fixed_labels_need_all_classes_in_a_task() -> None:
    with pytest.raises(UserError, match="their own labels"):
        DatasetStream(replace(data([5, 5, 5], 2, 1.0), fixed=True))


def test_fixed_labels_are_the_classes_numbers() -> None:
    client = ClientData.of([np.full((8, 1), c, np.float32) for c in range(3)], 1.0, 3, fixed=True)
    stream = DatasetStream(client)
    for seed in range(20):
        stream.open(seed)
        for query in (False, True):
            x, label = stream.next(query)
            assert x[0] == label


def test_a_sample_of_a_regression_has_its_own_target() -> None:
    xs = [np.arange(10, dtype=np.float32)[:, None] + 10 * f for f in range(4)]
    client = ClientData.of(xs, 1.0, 1, targets=[np.concatenate([x * 2, -x], axis=1) for x in xs])
    stream = DatasetStream(client)
    functions = set()
    for seed in range(20):
        stream.open(seed)
        drawn = [stream.next(query) for query in (False, True) * 10]
        assert all(np.array_equal(y, [2 * x[0], -x[0]]) for x, y in drawn)
        functions.add(tuple({int(x[0] // 10) for x, _ in drawn}))
    assert functions == {(0,), (1,), (2,), (3,)}, "a task is one function"


def test_a_recording_is_seen_in_the_order_of_time_and_again() -> None:
    x = np.arange(3, dtype=np.float32)[:, None]
    stream = RecordedStream(Recording(x, np.array([4, 5, 6]), None))
    assert [(float(x[0]), y) for x, y in (stream.next(False) for _ in range(4))] == [(0, 4), (1, 5), (2, 6), (0, 4)]
    stream.open(9)
    assert stream.next(False)[1] == 4.0
    _, y = RecordedStream(Recording(x, np.stack([x[:, 0], -x[:, 0]], axis=1), None)).next(False)
    assert isinstance(y, np.ndarray) and y.shape == (2,)


# What a task may give


FLOATS = np.linspace(0, 1, 12).reshape(6, 2)
STARTS = np.array([0, 3, 6])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ">f4", np.longdouble])
def test_features_of_other_floats_become_float32(dtype: str) -> None:
    client = ClientData(FLOATS.astype(dtype)[:, ::-1][:, ::-1], STARTS, 1.0, 2, targets=FLOATS[:, :1])  # type: ignore[arg-type]
    assert (client.features.dtype, client.starts.dtype) == (np.float32, np.uint32)
    assert client.targets is not None and client.targets.dtype == np.float32
    stream = DatasetStream(client)
    stream.open(0)
    x, y = stream.next(False)
    assert any(np.allclose(x, row) and np.allclose(y, row[:1], atol=1e-3) for row in client.features)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, bool, complex, object, "U4"])
def test_features_of_another_type_are_refused_by_name(dtype: str) -> None:
    with pytest.raises(UserError, match=rf"features are .*{np.dtype(dtype)}.*; give uint8 or float32"):
        ClientData(np.zeros((6, 2), dtype), STARTS, 1.0, 2)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"features": FLOATS[0]}, "shape"),
        ({"features": np.zeros((6, 0), np.uint8)}, "shape"),
        ({"features": np.where(FLOATS > 0.5, np.nan, FLOATS)}, "not finite"),
        ({"features": FLOATS * 1e300}, "too large for float32"),
        ({"starts": np.array([0.0, 3.0, 6.0])}, "whole numbers"),
        ({"starts": np.array([0, 3, 7])}, "rise from 0 to the 6 samples"),
        ({"starts": np.array([0, 5, 6])}, "at least 2"),
        ({"starts": np.array([0, 2**32, 6])}, "rise"),
        ({"starts": np.array([0])}, "rise"),
        ({"scale": float("inf")}, "scale"),
        ({"targets": FLOATS[:, 0]}, "one row a sample"),
        ({"targets": FLOATS[:4]}, "one row a sample"),
        ({"targets": np.zeros((6, 1), np.int64)}, "targets are int64"),
    ],
)
def test_what_c_would_read_wrongly_is_refused(fields: dict[str, Any], reason: str) -> None:
    good: dict[str, Any] = {"features": FLOATS, "starts": STARTS, "scale": 1.0, "ways": 2}
    with pytest.raises(UserError, match=reason):
        ClientData(**good | fields)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (np.zeros((0, 3)), np.zeros(0, np.int64), "no samples"),
        (np.zeros((4, 3)), np.zeros(3, np.int64), "shapes"),
        (np.zeros(4), np.zeros(4, np.int64), "shapes"),
        (np.zeros((4, 3), object), np.zeros(4, np.int64), "object"),
        (np.zeros((4, 3)), np.array(["a"] * 4), "<U1"),
    ],
)
def test_a_recording_that_is_none_is_refused(x: Any, y: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Recording(x, y, None)
