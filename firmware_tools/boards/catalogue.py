"""The boards that firmware is built for, read from boards/*.toml.

A board file says what everyone may know of a board (the part that goes into a Thing Description) and, where firmware
is built for it, how: compiler flags, memory map, serial port, and the emulated machine that stands in for it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tinyfleet.edge.device.thing_description import Board
from tinyfleet.edge.errors import UserError

FOLDER = Path(__file__).parent

T = TypeVar("T")


@dataclass(frozen=True)
class Region:
    """A stretch of memory: first address and length in bytes."""

    origin: int
    bytes: int


@dataclass(frozen=True)
class Uart:
    """The serial port that carries the fleet's messages. driver names src/uart_{driver}.c; baud is 8N1."""

    driver: str
    base: int
    rx_irq: int
    baud: int


@dataclass(frozen=True)
class Build:
    """How firmware is made for a board: compiler flags for its core, and where things lie.

    exact: flags for the profile that computes the same bits everywhere, behind those of the core.
    uart None: there is no driver for its serial port, so that no node runs on it, only programs that measure or check.
    """

    cpu: tuple[str, ...]
    exact: tuple[str, ...]
    stack_bytes: int
    flash: Region
    ram: Region
    uart: Uart | None


@dataclass(frozen=True)
class BoardTarget:
    """A board, how to build for it (None: nothing is built for it), and its QEMU machine (None: no emulator)."""

    board: Board
    build: Build | None
    machine: str | None

    def buildable(self) -> Build:
        """The build part. Raises UserError if firmware is not built for this board."""
        if self.build is None:
            names = _names(lambda target: target.build is not None)
            raise UserError(f"no firmware is built for board '{self.board.id}'; boards with firmware: {names}")
        return self.build

    def serial(self) -> Uart:
        """The serial port of a node. Raises UserError if there is no driver for one, or no firmware at all."""
        uart = self.buildable().uart
        if uart is None:
            names = _names(lambda target: target.build is not None and target.build.uart is not None)
            raise UserError(
                f"a fleet's node speaks through a serial port, and there is no driver for that of board "
                f"'{self.board.id}'; boards with one: {names}"
            )
        return uart

    def emulated(self) -> str:
        """The QEMU machine. Raises UserError if none stands in for this board."""
        if self.machine is None:
            names = _names(lambda target: target.machine is not None)
            raise UserError(f"no emulator stands in for board '{self.board.id}'; boards with one: {names}")
        return self.machine


def board_ids() -> list[str]:
    """The identifiers of all boards."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _names(wanted: Callable[[BoardTarget], bool]) -> str:
    return ", ".join(name for name in board_ids() if wanted(load_board(name)))


def load_board(name: str) -> BoardTarget:
    """The board of that identifier. Raises UserError if there is none, or if its file is wrong."""
    if name not in board_ids():
        raise UserError(f"there is no board named '{name}'; known boards: {', '.join(board_ids())}")
    return read_board_file(FOLDER / f"{name}.toml")


def read_board_file(path: Path) -> BoardTarget:
    """Reads a board file. Raises UserError naming the entry that is missing or of the wrong type."""
    try:
        top = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path.name} is not TOML: {error}") from error

    def entry(table: dict[str, Any], key: str, kind: type[T]) -> T:
        value = table.get(key)
        if not isinstance(value, kind):
            raise UserError(f"{path.name}: '{key}' must be a {kind.__name__}, and is {value!r}; correct the board file")
        return value

    def strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
        return tuple(str(value) for value in entry(table, key, list))

    def region(table: dict[str, Any], key: str) -> Region:
        part = entry(table, key, dict)
        return Region(entry(part, "origin", int), entry(part, "bytes", int))

    board = Board(
        id=entry(top, "id", str),
        title=entry(top, "title", str),
        mcu=entry(top, "mcu", str),
        clock_hz=entry(top, "clock_hz", int),
        ram_bytes=entry(top, "ram_bytes", int),
        flash_bytes=entry(top, "flash_bytes", int),
        sensors=strings(top, "sensors"),
    )
    build = None
    if "build" in top:
        part = entry(top, "build", dict)
        uart = None
        if "uart" in part:
            port = entry(part, "uart", dict)
            uart = Uart(
                driver=entry(port, "driver", str),
                base=entry(port, "base", int),
                rx_irq=entry(port, "rx_irq", int),
                baud=entry(port, "baud", int),
            )
        build = Build(
            cpu=strings(part, "cpu"),
            exact=strings(part, "exact") if "exact" in part else (),
            stack_bytes=entry(part, "stack_bytes", int),
            flash=region(part, "flash"),
            ram=region(part, "ram"),
            uart=uart,
        )
    machine = entry(entry(top, "emulator", dict), "machine", str) if "emulator" in top else None
    return BoardTarget(board, build, machine)
