"""The devices of a fleet as Flower's nodes: who is online, and running which model."""

import hashlib
from functools import cache
from typing import NamedTuple

from tinyfleet.edge.wire.messages import Status


@cache
def node_id(device: str) -> int:
    """Flower's number for a device: 63 bits of the SHA-256 of its id, so that it is the same in every run.

    Examples
    --------
    >>> node_id("pi")
    4817188089606946370
    """
    return int.from_bytes(hashlib.sha256(device.encode()).digest()[:8], "big") >> 1


class StatusChange(NamedTuple):
    """How a device's status differs from its last one."""

    online: bool
    restarted: bool  # its counters are lower than before
    matters: bool  # whether it changes which nodes there are


class DeviceTable:
    """The last status of every device. Not synchronised: the caller holds a lock."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._status: dict[str, Status] = {}

    def name(self, node: int) -> str:
        """The device with this node id. KeyError if no device with that id has reported a status."""
        return self._names[node]

    def is_online(self, device: str) -> bool:
        """Whether the device's last status says that it is online."""
        status = self._status.get(device)
        return status is not None and status.online

    def online(self, model: bytes) -> list[str]:
        """The devices that are online and run this model."""
        return [device for device, status in self._status.items() if status.online and status.model == model]

    def update(self, device: str, status: Status | None) -> StatusChange:
        """Takes a new status; None means that the device was removed."""
        before = self._status.pop(device, None)
        if status is None:
            return StatusChange(online=False, restarted=False, matters=True)
        self._names[node_id(device)] = device
        self._status[device] = status
        if before is None:
            return StatusChange(status.online, restarted=False, matters=True)
        # Devices report their counters after every command; that alone concerns no waiting thread.
        matters = (status.online, status.model) != (before.online, before.model)
        return StatusChange(status.online, status.samples < before.samples, matters)
