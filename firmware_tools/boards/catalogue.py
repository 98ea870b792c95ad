"""The known boards, read from boards/*.toml.

A board file has the board's public facts, which go into a Thing Description. If firmware can be built for the board, it
also has the compiler flags, the memory map, the serial port and the machine that emulates the board.
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
    """A region of memory: its first address, and its length in bytes."""

    origin: int
    bytes: int


@dataclass(frozen=True)
class Uart:
    """The serial port that carries the fleet's messages.

    Parameters
    ----------
    driver
        The firmware's file is src/uart_{driver}.c.
    base, rx_irq
        Its registers' address, and the interrupt of a received byte.
    baud
        Bits per second, 8N1.
    """

    driver: str
    base: int
    rx_irq: int
    baud: int


@dataclass(frozen=True)
class StorePages:
    """The pages of a board's flash that hold what it keeps through a reset.

    Parameters
    ----------
    driver
        The firmware's file is src/flash_{driver}.c.
    address, pages, page_size
        Where they are; behind the memory of the program.
    unit
        Bytes that are written at once.
    """

    driver: str
    address: int
    pages: int
    page_size: int
    unit: int


@dataclass(frozen=True)
class Build:
    """How to build firmware for a board.

    Parameters
    ----------
    cpu
        Compiler flags for its core.
    exact
        More flags for the profile that computes the same bits on every target.
    stack_bytes
        RAM to reserve for the stack.
    flash, ram
        Its memory.
    uart
        None without a driver: then no node can run on it, only programs that measure or check something.
    store
        None without a driver for the board's flash.
    """

    cpu: tuple[str, ...]
    exact: tuple[str, ...]
    stack_bytes: int
    flash: Region
    ram: Region
    uart: Uart | None
    store: StorePages | None = None


@dataclass(frozen=True)
class BoardTarget:
    """A board as a target for firmware.

    Parameters
    ----------
    board
        Its public facts.
    build
        How to build firmware for it; None if that is not possible.
    machine
        The QEMU machine that emulates it; None if there is none.
    """

    board: Board
    build: Build | None
    machine: str | None

    def buildable(self) -> Build:
        """How to build for it. Raises UserError if no firmware can be built for this board."""
        if self.build is None:
            names = _names(lambda target: target.build is not None)
            raise UserError(f"no firmware is built for board '{self.board.id}'; boards with firmware: {names}")
        return self.build

    def serial(self) -> Uart:
        """The serial port of a node. Raises UserError if there is no driver for it, or no firmware at all."""
        uart = self.buildable().uart
        if uart is None:
            names = _names(lambda target: target.build is not None and target.build.uart is not None)
            raise UserError(
                f"a node needs a serial port, and there is no driver for that of board '{self.board.id}'; "
                f"boards with one: {names}"
            )
        return uart

    def emulated(self) -> str:
        """The QEMU machine. Raises UserError if none emulates this board."""
        if self.machine is None:
            names = _names(lambda target: target.machine is not None)
            raise UserError(f"there is no emulator for board '{self.board.id}'; boards with one: {names}")
        return self.machine


def board_ids() -> list[str]:
    """The IDs of all boards, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _names(wanted: Callable[[BoardTarget], bool]) -> str:
    return ", ".join(name for name in board_ids() if wanted(load_board(name)))


def load_board(name: str) -> BoardTarget:
    """Load a board.

    Parameters
    ----------
    name
        Its ID; see `board_ids`.

    Raises
    ------
    UserError
        If there is no such board, or its file has an error.
    """
    if name not in board_ids():
        raise UserError(f"there is no board named '{name}'; known boards: {', '.join(board_ids())}")
    return read_board_file(FOLDER / f"{name}.toml")


def read_board_file(path: Path) -> BoardTarget:
    """Read a board file. Raises UserError, which names the entry, if one is missing or has the wrong type."""
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
        store = None
        if "store" in part:
            kept = entry(part, "store", dict)
            numbers = (entry(kept, key, int) for key in ("address", "pages", "page_size", "unit"))
            store = StorePages(entry(kept, "driver", str), *numbers)
        build = Build(
            cpu=strings(part, "cpu"),
            exact=strings(part, "exact") if "exact" in part else (),
            stack_bytes=entry(part, "stack_bytes", int),
            flash=region(part, "flash"),
            ram=region(part, "ram"),
            uart=uart,
            store=store,
        )
    machine = entry(entry(top, "emulator", dict), "machine", str) if "emulator" in top else None
    return BoardTarget(board, build, machine)
