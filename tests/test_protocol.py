"""The wire: Python and the generated C read and write the same bytes; anything else is rejected."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinyfleet.edge.mote.codegen import generate
from tinyfleet.edge.wire.chunks import CHUNK, MAX_CHUNKS, chunks, decode_chunk
from tinyfleet.edge.wire.commands import (
    ALL_LAYERS,
    Command,
    Forget,
    Manifest,
    NewKeys,
    Phase,
    Reboot,
    Sha256,
    Submission,
    Submitted,
    TrainTask,
    UpdateFormat,
    UpdateModel,
    decode_action,
    decode_command,
    decode_refusal,
    decode_submission,
    encode_action,
    encode_command,
    encode_submission,
    sealed_size,
)  # fmt: skip
from tinyfleet.edge.wire.cose import mac0
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.messages import (
    Dense,
    ErrorCode,
    Failure,
    Metrics,
    ResetReason,
    Sparse,
    Status,
    Success,
    Trial,
    decode_reply,
    decode_status,
    encode,
    error_text,
)
from tinyfleet.edge.wire.round_config import RoundConfig, format_round_config, parse_round_config
from tinyfleet.edge.wire.topics import Topics

u32 = st.integers(0, 2**32 - 1)
f32 = st.floats(width=32, allow_nan=False)
model = st.binary(min_size=8, max_size=8)
formats = st.builds(UpdateFormat, u32, st.booleans(), f32) | st.builds(UpdateFormat, u32, st.booleans(), f32, u32, f32)
phases = st.lists(st.builds(Phase, u32, u32, f32) | st.builds(Phase, u32, u32, f32, f32), max_size=4).map(tuple)
works = st.builds(TrainTask, u32, st.sampled_from(["train", "evaluate"]), u32, u32, model, u32, phases, u32)
hashes = st.binary(min_size=32, max_size=32)
weights = st.builds(Sha256, hashes) | st.binary(max_size=40).map(lambda data: data[: len(data) // 4 * 4])
works = st.builds(lambda w, update, data: replace(w, update=update, weights=data), works, st.none() | formats, weights)
manifests = st.builds(Manifest, hashes, u32, u32, u32, u32, u32, u32, u32, f32)
keys = st.builds(NewKeys, u32, u32, hashes, st.none() | hashes)
orders = st.one_of(works, st.builds(UpdateModel, u32, manifests), st.builds(Reboot, u32), st.builds(Forget, u32), keys)
u64 = st.integers(0, 2**64 - 1)
commands = st.builds(Command, u64, u64, st.none() | model, orders)
metrics = st.builds(Metrics, u32, f32, u32, u32, f32, u32)
values = arrays(np.float32, st.integers(0, 40), elements=st.floats(width=16, allow_nan=False))
denses = st.builds(Dense, u32, values, st.booleans(), st.booleans())
sparses = st.builds(
    lambda indices, change, half: Sparse(
        np.array(sorted(indices), np.uint32), np.full(len(indices), change, np.float32), half
    ),
    st.sets(st.one_of(u32, st.integers(0, 500)), max_size=40),
    st.floats(width=16, allow_nan=False),
    st.booleans(),
)
dones = st.builds(
    Success, u32, st.just(0), st.integers(1, 2**32 - 1), st.none() | metrics, st.none() | denses | sparses
)
dids = st.one_of(dones, st.builds(Failure, u32, st.sampled_from(ErrorCode), st.integers(-(2**31), 2**31 - 1)))
engines = st.text(min_size=1, max_size=16).filter(lambda text: len(text.encode()) <= 16 and text.isprintable())
statuses = st.builds(Status, st.booleans(), model, u32, u32, u32, st.none() | f32, st.none() | f32, u32, engines)
statuses = st.builds(
    lambda status, trial, refused, boots, reset, ceiling, nonce, version: replace(
        status, trial=trial, refused=refused, boots=boots, reset=reset, ceiling=ceiling, nonce=nonce, keys=version
    ),
    statuses, st.sampled_from(Trial), u32, u32, st.sampled_from(ResetReason), u64, st.none() | model, u32,
)  # fmt: skip


def written(message: Any) -> bytes:
    if isinstance(message, Command):
        return encode_command(message.counter, message.expires, message.nonce, encode_action(message.action))
    return encode(message)


DECODERS: list[Callable[[bytes], Any]] = [
    decode_command, decode_action, decode_submission, decode_refusal, decode_reply, decode_status, decode_chunk,
]  # fmt: skip
Transcode = Callable[[str, bytes], bytes | None]


@pytest.fixture(scope="module")
def transcode(tmp_path_factory: pytest.TempPathFactory) -> Transcode:
    """(message's name, payload) -> what the generated C makes of it, None if it does not read it."""
    folder = tmp_path_factory.mktemp("transcode")
    sources = [Path(__file__).parent / "c" / "transcode.c", *generate(folder)]
    library = folder / "transcode.so"
    flags = ["-std=c99", "-O1", "-shared", "-fPIC", f"-I{folder}"]
    command: list[str | Path] = ["cc", *flags, *sources, "-o", library]
    subprocess.run(command, check=True, capture_output=True)
    c = ctypes.CDLL(str(library))

    def run(name: str, payload: bytes) -> bytes | None:
        out = ctypes.create_string_buffer(len(payload) + 64)
        function = c[f"transcode_{name}"]
        size = function(payload, ctypes.c_size_t(len(payload)), out, ctypes.c_size_t(len(out)))
        return None if size < 0 else out.raw[:size]

    return run


@given(message=commands)
def test_commands_go_round(transcode: Transcode, message: Command) -> None:
    payload = written(message)
    assert decode_command(payload) == message
    assert decode_action(encode_action(message.action)) == message.action
    assert transcode("command", payload) == payload


tokens = st.none() | st.text("abcXYZ019-_", min_size=1, max_size=128)
submitted = st.builds(Submitted, st.text("ab/.-", min_size=1, max_size=39), u32, st.binary(min_size=1, max_size=200))


@given(st.builds(Submission, tokens, st.lists(submitted, min_size=1, max_size=16).map(tuple)))
def test_submissions_go_round(submission: Submission) -> None:
    assert decode_submission(encode_submission(submission)) == submission


@given(message=dids)
def test_replies_go_round(transcode: Transcode, message: Any) -> None:
    payload = encode(message)
    read = decode_reply(payload)
    assert encode(read) == payload
    if isinstance(message, Success) and isinstance(read, Success):
        for field in ("offset", "values", "indices", "changes", "half"):
            assert str(getattr(message.update, field, None)) == str(getattr(read.update, field, None))
        message, read = replace(message, update=None), replace(read, update=None)
        assert vars(read) == vars(message)
    else:
        assert read == message
    assert transcode("reply", payload) == payload


def test_every_failure_says_what_to_do() -> None:
    assert all("; " in error_text(Failure(1, error)) for error in ErrorCode)


@given(message=statuses)
def test_statuses_go_round(transcode: Transcode, message: Status) -> None:
    payload = encode(message)
    assert decode_status(payload) == message
    assert transcode("status", payload) == payload


@given(data=st.binary(max_size=5000), random=st.randoms(use_true_random=False))
def test_chunks_go_round_in_any_order(transcode: Transcode, data: bytes, random: Any) -> None:
    payloads = list(chunks(data))
    assert all(transcode("chunk", payload) == payload for payload in payloads)
    random.shuffle(payloads)
    assert b"".join(chunk.data for chunk in sorted(map(decode_chunk, payloads))) == data


def test_what_takes_too_many_chunks_is_refused() -> None:
    assert sum(1 for _ in chunks(bytes(CHUNK * MAX_CHUNKS))) == MAX_CHUNKS
    with pytest.raises(ProtocolError, match="more than"):
        list(chunks(bytes(CHUNK * MAX_CHUNKS + 1)))


@given(message=st.one_of(commands, dids, statuses), cut=st.integers(1, 60), more=st.binary(min_size=1, max_size=3))
def test_a_message_that_is_cut_or_too_long_is_refused(
    transcode: Transcode, message: Any, cut: int, more: bytes
) -> None:
    whole = written(message)
    name, decode = next(
        (name, decode)
        for name, decode, kinds in (
            ("command", decode_command, Command),
            ("reply", decode_reply, (Success, Failure)),
            ("status", decode_status, (Status,)),
        )
        if isinstance(message, kinds)
    )
    for payload in (whole[:-cut], whole + more):
        assert transcode(name, payload) is None
        with pytest.raises(ProtocolError):
            decode(payload)


@given(payload=st.binary(max_size=60))
@settings(max_examples=300)
def test_random_bytes_raise_nothing_else(payload: bytes) -> None:
    for decode in DECODERS:
        with contextlib.suppress(ProtocolError):
            decode(payload)


@given(
    message=st.one_of(commands, dids, statuses),
    at=st.integers(0, 10**6),
    byte=st.integers(0, 255),
    insert=st.booleans(),
)
@settings(max_examples=1500)
def test_python_refuses_what_the_c_decoder_refuses(
    transcode: Transcode, message: Any, at: int, byte: int, insert: bool
) -> None:
    """With one byte changed or inserted: both accept or both refuse, but for what C leaves to its caller to check."""
    whole = written(message)
    at %= len(whole)
    damaged = whole[:at] + bytes([byte]) + whole[at + (not insert) :]
    for name, decode in (("command", decode_command), ("reply", decode_reply), ("status", decode_status)):
        try:
            decode(damaged)
        except ProtocolError:
            if name == "command":
                assert transcode(name, damaged) is None
        else:
            assert transcode(name, damaged) is not None


def shared_references(levels: int) -> bytes:
    """2**levels values for anyone who compares or prints it, in some nine bytes a level."""
    heads = [b"\xd8\x1d" + cbor2.dumps(i) for i in range(levels - 1)]
    return (
        cbor2.dumps([0] * levels)[: 1 + (levels > 23)]
        + b"\xd8\x1c\x81\x00"
        + b"".join(b"\xd8\x1c\x82" + head + head for head in heads)
    )


STATUS = list(cbor2.loads(encode(Status(True, bytes(8)))))
ODDITIES = {
    "shared references": shared_references(40),
    "deep arrays": b"\x81" * 10_000 + b"\x00",
    "a long array": cbor2.dumps(list(range(100))),
    "an array that says it has 4 billion items": b"\x9a\xff\xff\xff\xff\x00",
    "an array of 2^64 - 1 items": b"\x9b" + b"\xff" * 8,
    "a string of 4 billion bytes": b"\x81\x5a\xff\xff\xff\xff",
    "a string of 2^63 bytes": b"\x81\x5b\x7f" + b"\xff" * 7,
    "an indefinite array": b"\x9f\x02\xff",
    "an indefinite string": b"\x81\x5f\x41a\xff",
    "an indefinite text": b"\x81\x7f\x61a\xff",
    "a map": b"\xa1\x00\x00",
    "a map inside": b"\x81\xa1\x00\x00",
    "a big integer": b"\x81\xc2\x58\x20" + b"\xff" * 32,
    "a negative big integer": b"\x81\xc3\x41\x01",
    "a decimal fraction": b"\x81\xc4\x82\x1b" + b"\x7f" * 8 + b"\x01",
    "a big float": b"\x81\xc5\x82\x1a\x7f\xff\xff\xff\x01",
    "a date": b"\x81\xc0\x741970-01-01T00:00:00Z",
    "seconds": b"\x81\xc1\xfb\x7f\xef" + b"\xff" * 6,
    "a regular expression": b"\x81\xd8\x23\x6a(a+)+(a+)+",
    "a MIME message": b"\x81\xd8\x24\x61a",
    "a UUID": b"\x81\xd8\x25\x50" + bytes(16),
    "an IP address": b"\x81\xd9\x01\x04\x44" + bytes(4),
    "a set": b"\x81\xd9\x01\x02\x81\x01",
    "string references": b"\xd9\x01\x00\x81\xd8\x19\x00",
    "CBOR that says so": b"\xd9\xd9\xf7\x81\x00",
    "tags on tags": b"\x81" + b"\xd8\x55" * 5000 + b"\x40",
    "a typed array of text": b"\x81\xd8\x55\x61a",
    "a typed array of float64": b"\x81\xd8\x56\x48" + bytes(8),
    "a float16": b"\x81\xf9\x3c\x00",
    "a float64": b"\x81\xfb\x3f\xf0" + bytes(6),
    "undefined": b"\x81\xf7",
    "an unknown simple value": b"\x81\xf8\xff",
    "a break": b"\x81\xff",
    "an integer in more bytes than it needs": b"\x81\x18\x02",
    "an integer of 64 bits": b"\x81\x1b" + bytes(7) + b"\x02",
    "a length in more bytes than it needs": b"\x98\x01\x02",
    "reserved lengths": b"\x81\x1c",
    "text that is not UTF-8": b"\x81\x61\xff",
    "more than a message": bytes(70_000),
    "nothing": b"",
    "an empty array": b"\x80",
    "a float as an integer": cbor2.dumps([*STATUS[:3], 1.0, *STATUS[4:]]),
    "an integer as a float": cbor2.dumps([*STATUS[:6], 1, *STATUS[7:]]),
    "true as an integer": cbor2.dumps([*STATUS[:3], True, *STATUS[4:]]),
    "1 as true": cbor2.dumps([*STATUS[:1], 1, *STATUS[2:]]),
    "a negative count": cbor2.dumps([*STATUS[:3], -1, *STATUS[4:]]),
    "an engine that clears the terminal": cbor2.dumps([*STATUS[:9], "\x1b[2J", *STATUS[10:]]),
    "an engine of two lines": cbor2.dumps([*STATUS[:9], "1\n2", *STATUS[10:]]),
}


@pytest.mark.parametrize("payload", ODDITIES.values(), ids=ODDITIES)
def test_what_else_cbor_can_say_is_refused_at_once_and_not_repeated(payload: bytes) -> None:
    began = time.perf_counter()
    for decode in DECODERS:
        with pytest.raises(ProtocolError) as refused:
            decode(payload)
        said = str(refused.value)
        assert len(said) < 120 and said.isprintable() and said.isascii()
    assert time.perf_counter() - began < 0.1


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**33) | st.floats() | st.binary(max_size=9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=9) | st.builds(cbor2.CBORTag, st.sampled_from([0, 1, 2, 84, 85, 28]), inner),
    max_leaves=12,
)


@given(value=st.one_of(json_like, st.tuples(st.integers(0, 5), *[json_like] * 5).map(list)))
@settings(max_examples=300)
def test_other_cbor_raises_nothing_else(value: Any) -> None:
    try:
        payload = cbor2.dumps(value)
    except Exception:  # not every tag takes every value
        return
    test_random_bytes_raise_nothing_else.hypothesis.inner_test(payload)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "message",
    [
        Reboot(-1),
        Reboot(2**32),
        Reboot(True),
        UpdateModel(1, Manifest(b"short", 1, 1, 1, 1, 1)),
        Forget(2**32),
        NewKeys(1, 1, bytes(31)),
        TrainTask(1, "train", 1, 1, bytes(8), 1, (), weights=bytes(2052)),
        Failure(1, ErrorCode.CAPACITY, 2**31),
        TrainTask(1, "train", 1, 1, bytes(8), 1, (Phase(1, 1, 0.1),) * 5),
        TrainTask(1, "train", 1, 1, bytes(8), 1, (Phase(1, 1, 1e39),)),
        Success(1, update=Sparse(np.array([2, 1], np.uint32), np.zeros(2, np.float32))),
        Success(1, update=Sparse(np.array([1, 1], np.uint32), np.zeros(2, np.float32))),
        Success(1, update=Sparse(np.array([1], np.uint32), np.zeros(2, np.float32))),
    ],
)
def test_what_the_wire_cannot_carry_is_refused(message: Any) -> None:
    with pytest.raises(ProtocolError):
        (encode if isinstance(message, Success | Failure) else encode_action)(message)


def test_a_gap_that_is_too_long_is_refused() -> None:
    values = cbor2.CBORTag(85, bytes(4))
    for gaps in (b"\x80", b"\xff\xff\xff\xff\xff\x01", b"\xff\xff\xff\xff\x7f", b"\x00\x00"):
        with pytest.raises(ProtocolError):
            decode_reply(cbor2.dumps([1, 1, 0, 1, None, [2, gaps, values]]))


def test_messages_are_small() -> None:
    """What the tables of bytes rest on."""
    work = TrainTask(1, "train", 1, 1, bytes(8), 1, (Phase(ALL_LAYERS, 32, 0.1),), 8, UpdateFormat())
    action = encode_action(replace(work, weights=Sha256.of(b"")))
    assert len(action) <= 45 + 34 and sealed_size(action) <= len(action) + 63
    sealed = mac0(encode_command(1 << 40, 1 << 40, None, action), bytes(32), "t")
    assert sealed_size(action) == len(sealed)
    hundred = Sparse(np.arange(0, 2000, 20, dtype=np.uint32), np.ones(100, np.float32), half=True)
    assert len(encode(Success(1, update=hundred))) <= 100 * 3 + 20


def test_topics() -> None:
    t = Topics("home")
    assert t.parse(t.command("a")) == ("command", ("a",)) and t.parse(t.reply("a-1")) == ("reply", ("a-1",))
    assert t.parse(t.status("a")) == ("status", ("a",)) and t.parse(t.td("a")) == ("td", ("a",))
    assert t.parse(t.weights(1, 2, 3)) == ("weights", (1, 2, 3))
    assert t.parse(t.program(bytes(8), 3)) == ("program", (bytes(8), 3))
    for other in (
        "",
        "tinyfleet/work/devices/a/command",
        t.command("a") + "/x",
        t.command("a") + "\n",
        t.weights(1, 2),
        "tinyfleet",
    ):
        assert t.parse(other) is None
    assert t.parse("tinyfleet/home/runs/4294967296/1/1") is None and t.parse("tinyfleet/home/runs/01/1/1") is None
    assert t.command("+") == "tinyfleet/home/devices/+/command"


def test_a_rounds_config() -> None:
    """What a strategy puts into a ConfigRecord, and what another's means."""
    plan = RoundConfig((Phase(2, 8, 0.5), Phase(3, 16, 0.25)), 5, UpdateFormat(1, True, 0.25), 9)
    assert parse_round_config(format_round_config(plan)) == plan
    evaluation = RoundConfig((), 32, None, 4)
    assert parse_round_config({"server-round": 4}, "evaluate") == evaluation
    assert parse_round_config({"server-round": 4, "lr": 0.5}) == RoundConfig(
        (Phase(ALL_LAYERS, 32, 0.5),), 0, UpdateFormat(), 4
    )
    several: list[dict[str, object]] = [
        {"phase-steps": [1, 2], "phase-rates": [0.1]},
        {"phase-steps": [1] * 5},
        {"density": float("nan")},
        {"density": 0.0},
        {"density": 1.5},
        {"lr": 1e39},
    ]
    for bad in several:
        with pytest.raises(ProtocolError):
            parse_round_config(bad)
