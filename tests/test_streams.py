"""The Python stream is the C stream: the same seed gives the same samples, to the bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge._mote import ffi, lib
from edge.streams import DatasetStream
from edge.tasks import ClientData


def data(sizes: list[int], ways: int, scale: float) -> ClientData:
    random = np.random.default_rng(1)
    return ClientData.of([random.integers(0, 255, (n, 3), np.uint8) for n in sizes], scale, ways)


@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=40),
    ways=st.integers(1, 32),
    seed=st.integers(0, 2**32 - 1),
    queries=st.lists(st.booleans(), max_size=30),
)
def test_python_and_c_draw_the_same(sizes: list[int], ways: int, seed: int, queries: list[bool]) -> None:
    client = data(sizes, min(ways, len(sizes)), 1 / 255)
    stream = DatasetStream(client)
    stream.open(seed)
    c, x, y = ffi.new("mote_stream_t *"), ffi.new("float[3]"), ffi.new("float *")
    c.features = features = ffi.from_buffer("uint8_t[]", client.features)
    c.starts = starts = ffi.from_buffer("uint32_t[]", client.starts)
    c.classes, c.size, c.scale, c.ways = len(sizes), 3, client.scale, client.ways
    assert lib.mote_stream_open(c, seed) == lib.MOTE_OK
    assert list(c.chosen)[: client.ways] == stream._chosen
    for query in queries:
        lib.mote_stream_next(c, query, x, y)
        features_, label = stream.next(query)
        assert np.frombuffer(ffi.buffer(x), np.float32).tobytes() == features_.tobytes() and y[0] == label
    assert features and starts


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
    with pytest.raises(ValueError, match="can't give a task"):
        DatasetStream(data(sizes, ways, scale))
