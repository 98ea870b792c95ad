"""What the tests of commands share: keys, a device that obeys them, and commands sealed in every way."""

from __future__ import annotations

from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from node_fixtures import NOW, TOPICS, mote

from tinyfleet.edge.device.node import Node, Out, Publish
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.commands import Action, TrainTask, encode_action, encode_command
from tinyfleet.edge.wire.keys import Keys
from tinyfleet.edge.wire.messages import Reply, Status, decode_reply, decode_status

ID = "one"
COMMAND_KEY = bytes(range(32))


def _key(number: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)


CURRENT, NEXT, ROOT, STRANGER, AFTER = map(_key, range(1, 6))
KEYS = Keys(COMMAND_KEY, cose.public_key(CURRENT), cose.public_key(NEXT), cose.public_key(ROOT), 1)


class MemoryStore:
    """A store that can fail."""

    def __init__(self) -> None:
        self.records: dict[int, bytes] = {}
        self.writes = 0
        self.fails = False

    def get(self, key: int) -> bytes | None:
        return self.records.get(key)

    def set(self, key: int, data: bytes) -> None:
        if self.fails:
            raise OSError("no room")
        self.writes += 1
        if data:
            self.records[key] = data
        else:
            self.records.pop(key, None)


def device(**options: Any) -> Node:
    """A node with keys. Its clock stands still."""
    return mote(**{"keys": KEYS} | options)


def sealed(
    action: Action,
    counter: int = NOW + 1000,
    *,
    topic: str = TOPICS.command(ID),
    expires: int = NOW + 60_000,
    nonce: bytes | None = None,
    key: bytes | Ed25519PrivateKey | None = None,
) -> bytes:
    """A command as the server seals it: a train task with the device's key, all else with the fleet's."""
    payload = encode_command(counter, expires, nonce, encode_action(action))
    key = key or (COMMAND_KEY if isinstance(action, TrainTask) else CURRENT)
    if isinstance(key, bytes):
        return cose.mac0(payload, key, topic)
    return cose.sign1(payload, key, topic)


def send(node: Node, payload: bytes, topic: str = TOPICS.command(ID)) -> list[Out]:
    """What the node says to a message."""
    node.receive(topic, payload)
    return list(node.poll())


def said(outs: list[Out]) -> list[Reply]:
    """The replies among it."""
    return [decode_reply(out.payload) for out in outs if isinstance(out, Publish) and out.topic == TOPICS.reply(ID)]


def status(node: Node) -> Status:
    """The node's status now, as its will has it."""
    return decode_status(node.will().payload)
