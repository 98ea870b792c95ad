"""How a device describes itself: a W3C Thing Description 1.1 with TinyFleet's terms."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfleet.edge.versions import PROGRAM_FORMAT, WIRE_VERSION


@dataclass(frozen=True)
class Board:
    """A kind of board: what all devices of it have in common.

    Parameters
    ----------
    id, title, mcu
        Its names, and its processor's.
    clock_hz
        None: not known.
    ram_bytes, flash_bytes
        Of the whole board.
    sensors
        What they measure.
    """

    id: str
    title: str
    mcu: str
    clock_hz: int | None
    ram_bytes: int
    flash_bytes: int
    sensors: tuple[str, ...] = field(default=())


VIRTUAL = Board("virtual", "Virtual microcontroller", "host", None, 262_144, 1_048_576, ("replay",))
"""Stands for the board of a virtual device: the RAM and flash of a common Cortex-M4F."""


def host_board() -> Board:
    """The machine that this process runs on, as a board: its model where it names one (a Raspberry Pi does)."""
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    disk = os.statvfs("/")
    flash = disk.f_frsize * disk.f_blocks
    model = Path("/proc/device-tree/model")
    kind = model.read_text(errors="replace").strip("\0 \n") if model.exists() else ""
    # The same model comes with more RAM or less, and a board's facts hold for all boards of one name.
    title = f"{kind or f'{platform.system()} {platform.machine()}'}, {-(-ram // 2**30)} GiB"
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return Board(name[:64].strip("-") or "machine", title[:200], platform.machine() or "unknown", None, ram, flash)


def thing_description(
    fleet: str,
    id: str,
    board: Board,
    engine: str,
    engine_version: str,
    arena_bytes: int,
    model: bytes,
    model_slot_bytes: int | None = None,
) -> dict[str, Any]:
    """Describe a device of this software's versions, as JSON-LD. What is not known is left out, never 0.

    Parameters
    ----------
    fleet, id
        As in the topics.
    board
        What it runs on.
    engine, engine_version
        What it learns with.
    arena_bytes
        The memory there is to learn in.
    model
        The built-in program's id, 8 bytes.
    model_slot_bytes
        The memory for a program over the air; 0: it takes none. None: not known.
    """
    described: dict[str, Any] = {
        "@id": f"https://w3id.org/tinyfleet/board/{board.id}",
        "@type": "tf:Board",
        "title": board.title,
        "tf:mcu": board.mcu,
        "tf:clockHz": board.clock_hz,
        "tf:ramBytes": board.ram_bytes,
        "tf:flashBytes": board.flash_bytes,
        "tf:sensor": list(board.sensors) or None,
    }
    slot = {} if model_slot_bytes is None else {"tf:modelSlotBytes": model_slot_bytes}
    return {
        "@context": ["https://www.w3.org/2022/wot/td/v1.1", {"tf": "https://w3id.org/tinyfleet#"}],
        "id": f"urn:tinyfleet:{fleet}:{id}",
        "@type": ["Thing", "tf:Device"],
        "title": id,
        "securityDefinitions": {"nosec_sc": {"scheme": "nosec"}},
        "security": ["nosec_sc"],
        "tf:fleet": fleet,
        "tf:deviceId": id,
        "tf:board": {key: value for key, value in described.items() if value is not None},
        "tf:engine": engine,
        "tf:engineVersion": engine_version,
        "tf:wireVersion": WIRE_VERSION,
        "tf:programFormat": PROGRAM_FORMAT,
        "tf:arenaBytes": arena_bytes,
        **slot,
        "tf:model": {"@id": f"urn:tinyfleet:model:{model.hex()}"},
    }
