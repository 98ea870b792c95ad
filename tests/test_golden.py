"""Bytes that devices in the field speak and run: a change of one of these is a change of the version.

Messages of wire version 3, programs of format 2, and how devices of wire versions 1 and 2 are told: a server that
spoke an older version with them would be a way around the authentication of commands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tinyfleet.edge import versions
from tinyfleet.edge.device.node import Node, Publish
from tinyfleet.edge.device.sources import DatasetStream
from tinyfleet.edge.device.thing_description import VIRTUAL, thing_description
from tinyfleet.edge.model.learner import MoteLearner
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.wire.chunks import Chunk, chunks, decode_chunk
from tinyfleet.edge.wire.commands import (
    ALL_LAYERS,
    Action,
    Command,
    Forget,
    Manifest,
    NewKeys,
    Phase,
    Reboot,
    Refusal,
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
    encode_refusal,
    encode_submission,
    encode_time,
)  # fmt: skip
from tinyfleet.edge.wire.errors import ProtocolError, WireVersionError
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
)
from tinyfleet.edge.wire.topics import Topics

MODEL = bytes(range(8))
PHASES = (Phase(2, 15, 0.25), Phase(ALL_LAYERS, 25, 0.5, 1.5))
METRICS = Metrics(40, 0.5, 10, 9, 0.25, 9936)

HASH = bytes(range(32))
NONCE = bytes(range(100, 108))
MANIFEST = Manifest(HASH, 5120, 1_800_000_000, 9936, 64, 10, 20, 100, 0.5)

ACTIONS = {
    "8a010705014800010203040506070b8283020ffa3e800000841affffffff1819fa3f000000fa3fc000000a8503f5fa3e00000001"
    "fa400000005820000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f": (
        TrainTask(7, "train", 5, 1, MODEL, 11, PHASES, 10, UpdateFormat(3, True, 0.125, 1, 2.0), Sha256(HASH))
    ),
    "8a020805024800010203040506070c801820f6d855480000000000000000": (
        TrainTask(8, "evaluate", 5, 2, MODEL, 12, (), 32, None, bytes(8))
    ),
    "830309895820000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f1914001a6b49d2001926d018400a"
    "141864fa3f000000": UpdateModel(9, MANIFEST),
    "82040a": Reboot(10),
    "82050b": Forget(11),
    "85060c025820000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f58201f1e1d1c1b1a191817161514"
    "131211100f0e0d0c0b0a09080706050403020100": NewKeys(12, 2, HASH, HASH[::-1]),
    "85060d035820000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1ff6": NewKeys(13, 3, HASH),
}
REPLIES = {
    "8601070002861828fa3f0000000a09fa3e8000001926d0830100d855480000803f000020c0": (
        Success(7, 0, 2, METRICS, Dense(0, np.array([1.0, -2.5], np.float32)))
    ),
    "8601070102f6830302d854420038": Success(7, 1, 2, None, Dense(2, np.array([0.5], np.float32), True, True)),
    "8601070001f683024400810100d8554c0000003f000080bf00000040": (
        Success(7, update=Sparse(np.array([0, 130, 131], np.uint32), np.array([0.5, -1.0, 2.0], np.float32)))
    ),
    "8402070524": Failure(7, ErrorCode.ENGINE, -5),
}
STATUSES = {
    "9103f54800010203040506071903e80102fa3f000000fa3f8000000265302e322e30010304021b00000100000000004864656667"
    "68696a6b05": (
        Status(
            True, MODEL, 1000, 1, 2, 0.5, 1.0, 2, "0.2.0", Trial.ON_TRIAL, 3, 4, ResetReason.COMMAND, 2**40, NONCE, 5
        )
    ),
    "9103f44800010203040506071903e80102f6f60265302e322e300000000000f600": (
        Status(False, MODEL, 1000, 1, 2, None, None, 2, "0.2.0")
    ),
}
#: Two dense layers with a ReLU between them, three inputs and two classes; carries no parameters.
PROGRAM = (
    "4d4f5445020030002801000056179325080003000100000003000400050002000000803f3800000018000000000000000100010001000300ffff"
    "ffff0000000001000100010002000000000000000000010001000100020000000000000000000100010001000200080000000000000001000100"
    "010002000800000000000000010001000100020008000000000000000100010001000200100000000000000001000100010002001000000000000"
    "000010300000000ffff01000700ffffffff000000000000000000000000000002000000000000000000080000000100ffff020006000700ffff0"
    "00000000000000000000000000000000000000000000000010301000200ffff030005000600ffff00000000000000000000000000000200200000"
    "0000000000"
)


def described(message: Any) -> str:
    return str(vars(message))  # arrays have no equality of their own


@pytest.mark.parametrize(("payload", "action"), ACTIONS.items())
def test_actions(payload: str, action: Action) -> None:
    assert encode_action(action).hex() == payload
    assert decode_action(bytes.fromhex(payload)) == action


def test_a_command_and_the_time() -> None:
    sealed = encode_command(1_800_000_000_001, 1_800_000_060_000, NONCE, encode_action(Reboot(10)))
    assert sealed.hex() == "841b000001a3185c50011b000001a3185d3a60486465666768696a6b82040a"
    assert decode_command(sealed) == Command(1_800_000_000_001, 1_800_000_060_000, NONCE, Reboot(10))
    assert encode_time(1_800_000_000_000).hex() == "811b000001a3185c5000"


def test_what_asks_for_a_command_and_what_refuses_it() -> None:
    submission = Submission("token", (Submitted("kitchen", 60_000, encode_action(Reboot(10))),))
    assert encode_submission(submission).hex() == "8265746f6b656e8183676b69746368656e19ea604382040a"
    assert decode_submission(encode_submission(submission)) == submission
    refusal = Refusal("kitchen", 10, "unknown")
    assert encode_refusal(refusal).hex() == "83676b69746368656e0a67756e6b6e6f776e"
    assert decode_refusal(encode_refusal(refusal)) == refusal


@pytest.mark.parametrize(("payload", "message"), REPLIES.items())
def test_replies(payload: str, message: Any) -> None:
    assert encode(message).hex() == payload
    read = decode_reply(bytes.fromhex(payload))
    assert encode(read).hex() == payload and type(read) is type(message)
    if isinstance(read, Success):
        assert described(read.update) == described(message.update) and read.metrics == message.metrics


@pytest.mark.parametrize(("payload", "message"), STATUSES.items())
def test_statuses(payload: str, message: Any) -> None:
    assert encode(message).hex() == payload
    assert decode_status(bytes.fromhex(payload)) == message


def test_a_chunk() -> None:
    payload = "83001a560a12ab4954696e79466c656574"
    assert [chunk.hex() for chunk in chunks(b"TinyFleet")] == [payload]
    assert decode_chunk(bytes.fromhex(payload)) == Chunk(0, b"TinyFleet")


def test_a_device_of_another_wire_version_is_told_by_name() -> None:
    first = bytes.fromhex("87f54800010203040506071903e80102f6f6")  # online, as version 1 said it
    second = bytes.fromhex("8a02f54800010203040506071903e80102fa3f000000fa3f8000000265302e322e30")
    for version, old in ((1, first), (2, second)):
        said = f"wire version {version}, this server speaks 3; update the device's firmware"
        with pytest.raises(WireVersionError, match=said) as e:
            decode_status(old)
        assert e.value.version == version
    with pytest.raises(WireVersionError, match="wire version 4, this server speaks 3; update the server") as e:
        decode_status(bytes.fromhex("8304f5f6"))  # whatever comes behind the version
    assert e.value.version == 4
    for other in ("8120", "80", "8161" + "61", "02"):  # -1, nothing, a text, no array
        with pytest.raises(ProtocolError) as error:
            decode_status(bytes.fromhex(other))
        assert not isinstance(error.value, WireVersionError)


@pytest.mark.parametrize(
    "payload",
    [
        "89010705014800010203040506070b8283020ffa3e800000841affffffff1819fa3f000000fa3fc000000a8503f5fa3e00000001"
        "fa40000000",
        "8503094800010203040506071914001adeadbeef",
        "82040a",
    ],
    ids=["train", "update", "reboot"],
)
def test_a_command_of_version_2_is_refused(payload: str) -> None:
    """By Python and by a device, which would have obeyed anyone."""
    with pytest.raises(ProtocolError):
        decode_command(bytes.fromhex(payload))
    stream = DatasetStream(ClientData.of([np.zeros((4, 3), np.float32)] * 2, 1.0, 2))
    node = Node("home", "one", {}, Program.parse(bytes.fromhex(PROGRAM)), stream)
    node.receive(Topics("home").command("one"), bytes.fromhex(payload))
    assert list(node.poll()) == [] and node.counters.malformed == 1


def test_a_program_of_format_2_loads_and_learns() -> None:
    program = Program.parse(bytes.fromhex(PROGRAM))
    assert program.model_id.hex() == "7d649674883d1d96" and program.n_params == 14
    learner = MoteLearner(program)
    learner.set_parameters(np.linspace(-1, 1, 14).astype(np.float32))
    assert learner.learn([1, 2, 3], 1, 0.125) == 0.6191797852516174
    assert learner.infer([1, 2, 3]).tolist() == [0.43309128284454346, 0.5669087171554565]


def test_a_device_names_its_versions() -> None:
    """In its description, and in every status."""
    program = Program.parse(bytes.fromhex(PROGRAM))
    td = thing_description("home", "one", VIRTUAL, "mote", versions.ENGINE_VERSION, 4096, program.model_id)
    assert (td["tf:wireVersion"], td["tf:programFormat"], td["tf:engineVersion"]) == (3, 2, versions.ENGINE_VERSION)
    stream = DatasetStream(ClientData.of([np.zeros((4, 3), np.float32)] * 2, 1.0, 2))
    node = Node("home", "one", td, program, stream)
    node.connected()
    (status,) = [out for out in node.poll() if isinstance(out, Publish) and out.topic == Topics("home").status("one")]
    assert status.payload[:2].hex() == "9103"
    read = decode_status(status.payload)
    assert (read.program_format, read.engine) == (versions.PROGRAM_FORMAT, versions.ENGINE_VERSION)
