"""The keys that devices obey: the fleet's current and next key, and the root key that a change of them is signed with.

The private root key is written once, to where its owner keeps it, and not kept here: who takes the server takes the two
others, and its owner replaces them.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.private_files import write_private
from tinyfleet.edge.wire import cose
from tinyfleet.edge.wire.commands import NewKeys, encode_action, encode_command

FLEET_KEYS = "fleet-keys.json"
ROOT_KEY = "root-key.json"
"""Where the root key is left, in the data folder, by a server that was started without `server init`."""


class KeyChange(NamedTuple):
    """What the root key signs: the version and the public keys after a change."""

    version: int
    current: bytes
    next: bytes

    @property
    def payload(self) -> bytes:
        """The command to take these keys. Devices know new ones by their version, not by counter or time."""
        return encode_command(0, 0, None, encode_action(NewKeys(0, self.version, self.current, self.next)))


@dataclass(frozen=True)
class FleetKeys:
    """The fleet's keys on disk.

    Parameters
    ----------
    folder
        The authority's folder.
    version
        Of the two keys; it rises with every change.
    current, next
        The private keys.
    root
        The public root key.
    new_keys
        The last change, signed for the topic groups/keys/command.
    """

    folder: Path
    version: int
    current: Ed25519PrivateKey
    next: Ed25519PrivateKey
    root: bytes
    new_keys: bytes | None = None

    @classmethod
    def load(cls, folder: Path) -> FleetKeys | None:
        """Those in a folder; None if there are none.

        Raises
        ------
        UserError
            If they are damaged.
        """
        try:
            said = json.loads((folder / FLEET_KEYS).read_text(encoding="utf-8"))
            current, next = (Ed25519PrivateKey.from_private_bytes(bytes.fromhex(said[n])) for n in ("current", "next"))
            new_keys = None if said["new_keys"] is None else bytes.fromhex(said["new_keys"])
            return cls(folder, int(said["version"]), current, next, bytes.fromhex(said["root"]), new_keys)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the fleet's keys in {folder / FLEET_KEYS} are damaged ({error}); restore them from a backup, or make "
                "others with the root key: remove the file, then tinyfleet server init --root-key FILE"
            ) from None

    @classmethod
    def make(cls, folder: Path, root: bytes) -> FleetKeys:
        """New keys under this root key, on disk. Their version is the time, so that no two servers of one root key give
        the same version to different keys."""
        current, next = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        keys = cls(folder, int(time.time()), current, next, root)
        keys.save()
        return keys

    def save(self) -> None:
        """Write them."""
        fields = {
            "version": self.version,
            "current": self.current.private_bytes_raw().hex(),
            "next": self.next.private_bytes_raw().hex(),
            "root": self.root.hex(),
            "new_keys": None if self.new_keys is None else self.new_keys.hex(),
        }
        write_private(self.folder / FLEET_KEYS, json.dumps(fields))

    def propose(self) -> tuple[KeyChange, FleetKeys]:
        """The change to the next key, for the root key to sign, and the keys after it, which are not on disk yet."""
        version = max(self.version + 1, int(time.time()))  # also above that of a server that was lost
        after = FleetKeys(self.folder, version, self.next, Ed25519PrivateKey.generate(), self.root)
        return after.change, after

    @property
    def change(self) -> KeyChange:
        """The change to these keys."""
        return KeyChange(self.version, cose.public_key(self.current), cose.public_key(self.next))

    def signed(self, sealed: bytes, topic: str) -> FleetKeys:
        """These keys with the change to them, signed.

        Raises
        ------
        UserError
            If the root key did not sign that change.
        """
        if not is_signed(sealed, self.change.payload, self.root, topic):
            raise UserError("this is not the fleet's root key: the change of keys is not signed by it")
        return FleetKeys(self.folder, self.version, self.current, self.next, self.root, sealed)


def is_signed(sealed: bytes, payload: bytes, public: bytes, topic: str) -> bool:
    """Whether these bytes are this payload, signed by this key for this topic."""
    from cwt import COSE, COSEKey

    okp, ed25519, eddsa = 1, 6, -8
    try:
        key = COSEKey.new({1: okp, 2: cose.key_id(public), 3: eddsa, -1: ed25519, -2: public})
        return bool(COSE.new().decode(sealed, key, external_aad=topic.encode()) == payload)
    except Exception:  # cwt and cryptography have many; whatever they say, it is not this signature
        return False


def write_root_key(path: Path) -> Ed25519PrivateKey:
    """Make a root key and write it.

    Raises
    ------
    UserError
        If there is a file already, or it cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} is there already; a root key is never overwritten")
    key = Ed25519PrivateKey.generate()
    try:
        write_private(path, json.dumps({"root_key": key.private_bytes_raw().hex()}))
    except OSError as error:
        raise UserError(f"cannot write the root key to {path} ({error})") from None
    return key


def read_root_key(path: Path) -> Ed25519PrivateKey:
    """The root key in a file.

    Raises
    ------
    UserError
        If there is none.
    """
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["root_key"]
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a root key file ({error})") from None
