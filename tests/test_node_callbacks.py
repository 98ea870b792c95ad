"""The node's configuration, and sources and learners that fail or make it wait."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from node_fixtures import (
    FLEET,
    ID,
    PROGRAM,
    Make,
    PythonStream,
    both,
    broadcast,
    callbacks,
    deliver,
    dense,
    do,
    expected,
    mote,
    node_of,
    replies,
    serve,
    work,
)
from numpy.typing import NDArray

from tinyfleet.edge._mote import ffi, lib
from tinyfleet.edge.device.node import Node, Out
from tinyfleet.edge.device.sources import Sample
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.layers import Dense as DenseLayer
from tinyfleet.edge.model.layers import build
from tinyfleet.edge.model.learner import LearnerError, MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.commands import Phase, UpdateFormat
from tinyfleet.edge.wire.messages import ErrorCode, Failure, Success


def test_a_device_with_too_little_memory_or_other_samples_says_so() -> None:
    with pytest.raises(UserError, match=f"needs {PROGRAM.arena_bytes} bytes"):
        mote(arena_bytes=PROGRAM.arena_bytes - 4)
    with pytest.raises(UserError, match="6 features"):
        mote(build([DenseLayer(3)], (7,), "softmax_cross_entropy"))


@both
def test_samples_that_are_no_targets_of_the_model_are_not_learned(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ClientData, "check_compatible", lambda self, program: None
    )  # a device's own source is not checked
    regression = build([DenseLayer(3)], (6,), "mse")
    node, order = make(regression), work(model=regression.model_id, vector=regression.initial(0))
    do(node, order)
    (failed,) = replies(deliver(node, broadcast(order, regression.initial(0))))
    assert isinstance(failed, Failure) and failed.error is ErrorCode.ENGINE
    assert node.counters.samples == 0


@pytest.mark.parametrize(
    "changes",
    [{name: ffi.NULL} for name in ("fleet", "id", "td", "sample", "out", "program", "base")]
    + [{"out_size": 255}, {"out_size": (1 << 20) + 1}, {"sample_count": 6}]
    + [{"source": {"open": ffi.NULL}}, {"source": {"next": ffi.NULL}}],
    ids=lambda changes: " ".join(f"{name}" for name in changes),
)
def test_a_configuration_that_lacks_something_is_refused(changes: dict[str, Any]) -> None:
    assert node_of()[0] == lib.MOTE_OK
    if "source" in changes:
        source = ffi.new("mote_source_t *", mote()._node.config.source)  # type: ignore[attr-defined]
        for name, value in changes["source"].items():
            setattr(source, name, value)
        changes = {"source": source[0]}
    assert node_of(**changes)[0] == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_node_init(ffi.NULL, ffi.NULL) == lib.MOTE_ERR_ARGUMENT
    assert lib.mote_node_init(ffi.new("mote_node_t *"), ffi.NULL) == lib.MOTE_ERR_ARGUMENT


def test_names_are_letters_digits_dots_lines_and_dashes() -> None:
    def starts(name: bytes) -> bool:
        fleet = ffi.new("char[]", name)
        return node_of(fleet=fleet)[0] == lib.MOTE_OK

    good = b"ABCXYZabcxyz0123456789._-"
    for byte in range(1, 256):
        if byte not in good:
            assert starts(bytes([byte])) == (chr(byte).isalnum() and byte < 128), byte
    assert all(starts(bytes([byte])) for byte in good)
    assert starts(b"x" * 32) and not starts(b"x" * 33) and not starts(b"")


def test_a_source_that_does_not_open_and_one_that_has_nothing_yet() -> None:
    node = mote()
    source = node._node.config.source  # type: ignore[attr-defined]
    opens, gives = source.open, source.next
    ready = False

    @ffi.callback("int(void *, uint32_t)")  # type: ignore[untyped-decorator]
    def fails(_context: Any, _seed: int) -> int:
        return -77

    @ffi.callback("int(void *, int, float *, float *)")  # type: ignore[untyped-decorator]
    def waits(context: Any, query: int, x: Any, y: Any) -> int:
        return int(gives(context, query, x, y)) if ready else 0

    source.open = fails
    do(node, work())
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.SAMPLES, -77)]
    source.open, source.next = opens, waits
    do(node, work(id=8))
    assert replies(deliver(node, broadcast(work()))) == [], "it waits for a sample to learn from"
    assert not node.step()
    ready = True
    for _ in range(20):
        assert node.step()
    ready = False
    assert not node.step(), "it waits for a sample to be scored by"
    ready = True
    (done,) = replies(deliver(node, []))
    assert isinstance(done, Success) and np.array_equal(dense([done]), expected(work())[0].parameters)


class Broken(MoteLearner):
    """Fails in one of its methods, with this error."""

    at = ""
    error: Exception = LearnerError("broken", -42)

    def fail(self, at: str) -> None:
        if at == self.at:
            raise self.error

    def set_parameters(self, vector: Any) -> None:
        self.fail("set")
        super().set_parameters(vector)

    @property
    def parameters(self) -> NDArray[np.float32]:
        self.fail("get")
        return super().parameters

    def learn(self, x: Any, y: Any, rate: float) -> float:
        self.fail("learn")
        return super().learn(x, y, rate)

    def loss(self, x: Any, y: Any) -> float:
        self.fail("score")
        return super().loss(x, y)


@pytest.mark.parametrize("at", ["set", "get", "learn", "score"])
@pytest.mark.parametrize(
    ("error", "reply"),
    [
        (LearnerError("broken", -42), Failure(7, ErrorCode.ENGINE, -42)),
        (LearnerError("diverged", lib.MOTE_ERR_DIVERGED), Failure(7, ErrorCode.DIVERGED)),
        (LearnerError("no code"), Failure(7, ErrorCode.ENGINE, lib.MOTE_ERR_ARGUMENT)),
    ],
)
@pytest.mark.parametrize("mu", [0.0, 0.5])
def test_a_learner_that_fails_is_told(
    at: str, error: Exception, reply: Failure, mu: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Broken, "error", error)
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    order = work(phases=(Phase(3, 2, 0.1), Phase(3, 2, 0.1, mu)))
    monkeypatch.setattr(Broken, "at", at)
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [reply]
    monkeypatch.setattr(Broken, "at", "")
    assert serve(node, replace(order, id=8)), "and the node goes on"


@pytest.mark.parametrize("at", ["learn", "score"])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 3e38])
def test_a_learner_whose_loss_is_no_finite_number_has_diverged(at: str, loss: float) -> None:
    """Also where only their sum is not finite: a reply with such a number is refused."""

    class Odd(MoteLearner):
        def learn(self, x: Any, y: Any, rate: float) -> float:
            return loss if at == "learn" else super().learn(x, y, rate)

        def loss(self, x: Any, y: Any) -> float:
            return loss if at == "score" else super().loss(x, y)

    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Odd)
    do(node, work())
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.DIVERGED)]


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (PROGRAM.n_params - 1,), (PROGRAM.n_params + 1,)])
def test_a_learner_with_other_parameters_than_its_program_is_told(shape: tuple[int, ...]) -> None:
    class Odd(MoteLearner):
        @property
        def parameters(self) -> NDArray[np.float32]:
            return np.zeros(shape, np.float32)

    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Odd)
    do(node, work())
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.ENGINE, lib.MOTE_ERR_ARGUMENT)]


@pytest.mark.parametrize("error", [LearnerError("no sensor", -42), ZeroDivisionError("a bug")])
def test_a_source_that_fails_between_samples_ends_the_task(error: Exception) -> None:
    class Odd(PythonStream):
        left = 5

        def next(self, query: bool) -> Sample:
            self.left -= 1
            if self.left < 0:
                raise error
            return super().next(query)

    node = Node(FLEET, ID, {}, PROGRAM, Odd())
    do(node, work())
    said: list[Out] = []
    with suppress(ZeroDivisionError):
        said = deliver(node, broadcast(work()))
    code = -42 if isinstance(error, LearnerError) else lib.MOTE_ERR_ARGUMENT
    assert replies(said or list(node.poll())) == [Failure(7, ErrorCode.SAMPLES, code)]
    assert node.counters.samples == 5


def test_ctrl_c_in_a_callback_gets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(MoteLearner):
        def learn(self, x: Any, y: Any, rate: float) -> float:
            raise KeyboardInterrupt

    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Slow)
    do(node, work())
    with pytest.raises(KeyboardInterrupt):
        deliver(node, broadcast(work()))


def test_a_learner_may_fail_between_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "at", "get")
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    order = work(phases=(Phase(3, 2, 0.1), Phase(3, 2, 0.1)), update=UpdateFormat(since=1))
    do(node, order)
    assert replies(deliver(node, broadcast(order))) == [Failure(7, ErrorCode.ENGINE, -42)]


def test_a_bug_in_a_learner_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "error", ZeroDivisionError("a bug"))
    node = Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=Broken)
    monkeypatch.setattr(Broken, "at", "learn")
    do(node, work())
    with pytest.raises(ZeroDivisionError, match="a bug"):
        deliver(node, broadcast(work()))


def test_a_learner_that_can_not_be_made_is_told_at_the_start() -> None:
    def missing(_: Program) -> MoteLearner:
        raise LearnerError("cannot read the model 'x.tflite'")

    with pytest.raises(LearnerError, match="cannot read the model"):
        Node(FLEET, ID, {}, PROGRAM, PythonStream(), learner=missing)


@pytest.mark.parametrize("name", ["set", "get", "score"])
def test_a_learner_has_all_its_callbacks_or_none(name: str) -> None:
    learner = ffi.new("mote_learner_t *", callbacks()._node.config.learner)
    setattr(learner, name, ffi.NULL)
    assert node_of(learner=learner[0])[0] == lib.MOTE_ERR_ARGUMENT


@pytest.mark.parametrize(("features", "target"), [(5, 0.0), (6, np.zeros(2))])
def test_a_sample_of_another_size_is_not_learned(features: int, target: Any) -> None:
    class Odd(PythonStream):
        def next(self, query: bool) -> Sample:
            return np.zeros(features, np.float32), target

    node = Node(FLEET, ID, {}, PROGRAM, Odd())
    do(node, work())
    (failed,) = replies(deliver(node, broadcast(work())))
    assert isinstance(failed, Failure) and failed.error is ErrorCode.ENGINE and node.counters.samples == 0


def test_a_stream_in_python_may_not_open_and_may_have_nothing_yet() -> None:
    class Slow(PythonStream):
        ready = False

        def open(self, seed: int) -> None:
            if seed == 1:
                raise ValueError("no sensor")
            super().open(seed)

        def next(self, query: bool) -> Sample | None:  # type: ignore[override]
            return super().next(query) if self.ready else None

    stream = Slow()
    node = Node(FLEET, ID, {}, PROGRAM, stream)
    do(node, work(seed=1))
    assert replies(deliver(node, broadcast(work()))) == [Failure(7, ErrorCode.SAMPLES, lib.MOTE_ERR_ARGUMENT)]
    do(node, work(id=8))
    assert replies(deliver(node, broadcast(work()))) == [] and not node.step()
    stream.ready = True
    assert np.array_equal(
        dense([d for d in replies(deliver(node, [])) if isinstance(d, Success)]), expected(work())[0].parameters
    )
