"""The examples of docs/reference/wire.md are what the code reads and writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tinyfleet.edge.wire import commands, cose, messages

TEXT = (Path(__file__).parents[1] / "docs" / "reference" / "wire.md").read_text(encoding="utf-8")
EXAMPLES = [
    (kind, bytes.fromhex(text.replace("\n", "")))
    for kind, text in re.findall(r'```text title="([^"]+)"\n([0-9a-f\n]+)```', TEXT)
]
TOPIC = "tinyfleet/home/devices/kitchen/command"


def command(payload: bytes) -> bytes:
    said = commands.decode_command(payload)
    return commands.encode_command(said.counter, said.expires, said.nonce, commands.encode_action(said.action))


AGAIN: dict[str, Callable[[bytes], bytes]] = {
    "command": command,
    "reply": lambda payload: messages.encode(messages.decode_reply(payload)),
    "status": lambda payload: messages.encode(messages.decode_status(payload)),
    "submission": lambda payload: commands.encode_submission(commands.decode_submission(payload)),
    "refusal": lambda payload: commands.encode_refusal(commands.decode_refusal(payload)),
    "mac0": lambda sealed: cose.mac0(sealed[9:-34], bytes(range(32)), TOPIC),
    "sign1": lambda sealed: cose.sign1(sealed[19:-66], Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32), TOPIC),
}


@pytest.mark.parametrize(("kind", "payload"), EXAMPLES)
def test_an_example_is_read_and_written(kind: str, payload: bytes) -> None:
    assert AGAIN[kind.partition(":")[0]](payload) == payload


def test_every_kind_has_an_example_and_every_error_its_number() -> None:
    assert {kind.partition(":")[0] for kind, _ in EXAMPLES} == set(AGAIN)
    actions: list[Any] = [commands.decode_command(p).action for k, p in EXAMPLES if k.startswith("command")]
    assert {type(action).__name__ for action in actions} >= {"TrainTask", "UpdateModel", "Reboot", "NewKeys"}
    for error in messages.ErrorCode:
        assert f"| {error.value} | {error.name} |" in TEXT
