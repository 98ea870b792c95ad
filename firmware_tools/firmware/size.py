"""The flash, RAM and stack that firmware needs, read from its ELF file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import Section, Symbol, SymbolTableSection

from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.firmware.stack import Depth


@dataclass(frozen=True)
class FirmwareSize:
    """The memory that firmware needs, in bytes.

    Attributes
    ----------
    board
        The board that it was built for.
    text
        Code, constants and the device's data, in flash.
    data
        Initialized variables: in RAM, and their initial values in flash.
    bss
        All other variables, in RAM.
    stack
        The RAM reserved for the stack.
    held
        The device's data in flash, by name.
    variables
        The larger variables in RAM, by name.
    planned_arena
        The arena in the memory plan of the model's program; None without a model.
    profile
        How the arithmetic was compiled: exact or fast.
    mote
        The engine's share of the text, by source file.
    static
        The engine's share of data and bss.
    frames
        The stack frame of each of the engine's functions.
    depths
        The maximum stack of a call of the engine, and the calls that need it. The compiler's own arithmetic and
        copying are not counted.
    """

    board: str
    text: int
    data: int
    bss: int
    stack: int
    held: Mapping[str, int]
    variables: Mapping[str, int]
    planned_arena: int | None
    profile: str
    mote: Mapping[str, int]
    static: int
    frames: Mapping[str, int]
    depths: Mapping[str, Depth]

    @property
    def flash(self) -> int:
        """Flash in all."""
        return self.text + self.data

    @property
    def ram(self) -> int:
        """RAM in all."""
        return self.data + self.bss + self.stack

    @property
    def arena(self) -> int | None:
        """The engine's arena; None in a program without one."""
        return self.variables.get("mote_arena")


def read_size(path: Path) -> FirmwareSize:
    """Read the memory that firmware needs from its ELF file.

    Parameters
    ----------
    path
        A file that `build.link` wrote.

    Raises
    ------
    UserError
        If it cannot be read, or is another kind of file.
    """
    try:
        with path.open("rb") as file:
            return _read_size(ELFFile(file))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); build it with: tinyfleet firmware build") from error
    except (ELFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a fleet's firmware; build it with: tinyfleet firmware build") from error


def _read_size(elf: ELFFile) -> FirmwareSize:
    sections = {section.name: section for section in elf.iter_sections()}
    note: dict[str, Any] = json.loads(sections[".tinyfleet"].data())
    usage = note["stack"] or {"functions": {}, "depths": {}}
    objects = _objects(elf)
    held = [symbol for symbol in objects[".text"] if symbol.name.startswith("device_")]
    variables = [symbol for symbol in (*objects[".data"], *objects[".bss"]) if symbol["st_size"] >= 64]
    length = {name: int(section["sh_size"]) for name, section in sections.items()}
    return FirmwareSize(
        board=str(note["board"]),
        text=length[".text"] + length.get(".ARM.exidx", 0),
        data=length.get(".data", 0),
        bss=length.get(".bss", 0),
        stack=length.get(".stack", 0),
        held={symbol.name.removeprefix("device_"): int(symbol["st_size"]) for symbol in held},
        variables={s.name: int(s["st_size"]) for s in sorted(variables, key=lambda s: -int(s["st_size"]))},
        planned_arena=_planned_arena(sections[".text"], held),
        profile=str(note["profile"]),
        mote=note["mote"],
        static=int(note["static"]),
        frames=usage["functions"],
        depths={name: Depth(depth["bytes"], tuple(depth["calls"])) for name, depth in usage["depths"].items()},
    )


def _objects(elf: ELFFile) -> dict[str, list[Symbol]]:
    """The constants and variables of each section."""
    table = elf.get_section_by_name(".symtab")
    assert isinstance(table, SymbolTableSection)
    names = [section.name for section in elf.iter_sections()]
    found: dict[str, list[Symbol]] = defaultdict(list)
    for symbol in table.iter_symbols():
        if symbol["st_info"]["type"] == "STT_OBJECT" and symbol["st_size"] > 0 and isinstance(symbol["st_shndx"], int):
            found[names[symbol["st_shndx"]]].append(symbol)
    return found


def _planned_arena(text: Section, held: list[Symbol]) -> int | None:
    """The arena that the program in the firmware plans, if there is one."""
    for symbol in held:
        if symbol.name == "device_program":
            first = symbol["st_value"] - text["sh_addr"]
            return Program.parse(text.data()[first : first + symbol["st_size"]]).arena_bytes
    return None
