"""The commands `tinyfleet firmware` and `tinyfleet gateway`."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyfleet.command_line import (
    BOARD,
    CONNECTION,
    DATA,
    DEVICE_ID,
    FLEET_SIZE,
    MODEL,
    ClientIndexOption,
    CommandGroup,
    Connection,
    DataOption,
    FleetOption,
    JsonOption,
    SlotOption,
    TaskOption,
    out_option,
    with_connection,
)
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.wire.server_info import fleet_of
from tinyfleet.firmware_tools.firmware import MODEL_SLOT_BYTES

if TYPE_CHECKING:
    from rich.table import Table

    from tinyfleet.edge.wire.broker_address import BrokerAddress
    from tinyfleet.firmware_tools.boards.catalogue import BoardTarget
    from tinyfleet.firmware_tools.firmware.size import FirmwareSize

app = CommandGroup("""Build firmware for a board, and emulate it.

Examples:
  tinyfleet firmware boards
  tinyfleet firmware build --board mps2-an386 --task digits
""")
gateway_app = CommandGroup("""Connect boards on serial lines to the fleet.

Examples:
  tinyfleet gateway start --port /dev/ttyUSB0
""")

ElfArgument = Annotated[
    Path, typer.Argument(metavar="FIRMWARE.elf", help="Firmware that `tinyfleet firmware build` wrote.")
]
BAUD = 115200


@app.command("boards")
def list_boards(
    add_to_graph: Annotated[
        bool, typer.Option("--add-to-graph", help="Add the board descriptions to the knowledge graph.")
    ] = False,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """List the known boards.

    Examples:
      tinyfleet firmware boards
      tinyfleet firmware boards --add-to-graph
    """
    from tinyfleet.firmware_tools.boards import catalogue

    targets = [catalogue.load_board(name) for name in catalogue.board_ids()]
    if add_to_graph:
        from tinyfleet.ontology.ingest.describe import put_board
        from tinyfleet.ontology.store.data_folder import open_store

        with open_store(data) as store:
            for target in targets:
                put_board(store, target.board)
    if as_json:
        typer.echo(json.dumps([asdict(target.board) for target in targets], indent=2))
        return
    from rich.console import Console

    Console(highlight=False).print(_board_table(targets))


def _board_table(targets: Sequence[BoardTarget]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("board", "core", "clock", "RAM", "flash", "firmware", "emulator"):
        table.add_column(column, justify="right" if column in ("clock", "RAM", "flash") else "left")
    for target in targets:
        board, mhz = target.board, f"{target.board.clock_hz / 1e6:g} MHz" if target.board.clock_hz else ""
        firmware, emulator = "yes" if target.build else "", "QEMU" if target.machine else ""
        ram, flash = (_memory(size) for size in (board.ram_bytes, board.flash_bytes))
        table.add_row(board.id, board.mcu, mhz, ram, flash, firmware, emulator)
    return table


def _memory(size: int) -> str:
    return f"{size / 2**20:g} MiB" if size >= 2**20 else f"{size / 2**10:g} KiB"


@app.command()
def build(
    board: Annotated[str, BOARD],
    task: TaskOption = "digits",
    client_index: ClientIndexOption = 0,
    fleet_size: Annotated[int, FLEET_SIZE] = 1,
    device_id: Annotated[str, DEVICE_ID] = "board-01",
    fleet: FleetOption = None,
    out: Annotated[Path, out_option("DIR")] = Path("build"),
    model_slot_bytes: SlotOption = MODEL_SLOT_BYTES,
    data: DataOption = DATA,
    as_json: JsonOption = False,
) -> None:
    """Build a fleet device's firmware, and show its flash and RAM.

    Writes firmware.elf into the folder.

    Examples:
      tinyfleet firmware build --board mps2-an386 --task digits
      tinyfleet firmware build --board mps2-an385 --client-index 3 --fleet-size 12
    """
    from tinyfleet.edge import tasks
    from tinyfleet.firmware_tools.boards import catalogue
    from tinyfleet.firmware_tools.firmware import build as firmware

    catalogue.load_board(board).buildable()
    if client_index >= fleet_size:
        raise UserError(f"there is no client {client_index} in a fleet of {fleet_size}; raise --fleet-size")
    learned = tasks.load(task)
    samples = learned.client(client_index, fleet_size)
    elf = firmware.build(
        board, learned.program, samples, fleet_of(fleet, data), device_id, out, model_slot_bytes=model_slot_bytes
    )
    _show(elf, as_json)


@app.command()
def size(elf: ElfArgument, as_json: JsonOption = False) -> None:
    """Show a firmware's flash, RAM and stack.

    Beside the board's memory, and beside the model's plan.

    Examples:
      tinyfleet firmware size build/firmware.elf
    """
    _show(elf, as_json)


@app.command("export")
def export_(
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="arduino or cmake.")],
    out: Annotated[Path, out_option("DIR")],
    model: Annotated[Path | None, MODEL] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the engine as an Arduino library or a CMake project.

    It comes with a model and an example that learns. The folder must be new or empty. MODEL is a .mote file: the
    library has the operators that it needs. Without a model it has all operators, and a small network as an example.

    Examples:
      tinyfleet firmware export --format cmake --out mote --model model.mote
      tinyfleet firmware export --format arduino --out TinyFleetMote
    """
    from tinyfleet.edge.model.program import read_program
    from tinyfleet.firmware_tools.firmware import export_library

    if format not in export_library.FORMATS:
        raise UserError(f"there is no format '{format}'; choose {' or '.join(export_library.FORMATS)}")
    program = None if model is None else read_program(model)
    files = export_library.export(format, out, program)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "files": [str(path.relative_to(out)) for path in files]}, indent=2))
    else:
        typer.echo(f"{out}: {len(files)} files")


@app.command("emulate")
@with_connection
def emulate_(
    elf: ElfArgument,
    gateway: Annotated[bool, typer.Option("--gateway", help="Also connect the board to the broker.")] = False,
    connection: Connection = CONNECTION,
    data: DataOption = DATA,
) -> None:
    """Run firmware on an emulated board until interrupted.

    Prints the address of the board's serial port, for `tinyfleet gateway start`; --gateway does that here.

    Examples:
      tinyfleet firmware emulate build/firmware.elf
      tinyfleet firmware emulate build/firmware.elf --gateway
    """
    from tinyfleet.firmware_tools.boards import catalogue
    from tinyfleet.firmware_tools.firmware.emulate import Emulator
    from tinyfleet.firmware_tools.firmware.size import read_size

    board = read_size(elf).board
    with _stop_on_signals() as stop, Emulator(catalogue.load_board(board), elf) as emulator:
        typer.echo(f"{board} is running; its serial port is {emulator.url}")

        def stop_with_it() -> None:
            emulator.wait()
            stop.set()

        threading.Thread(target=stop_with_it, daemon=True).start()
        if gateway:
            _connect([emulator.url], connection, data, BAUD, stop)
        else:
            stop.wait()
        if not emulator.running:
            raise UserError(f"the emulator has ended: {emulator.output or 'without a message'}")


@gateway_app.command()
@with_connection
def start(
    port: Annotated[
        list[str],
        typer.Option("--port", metavar="PORT", help="Serial port, or socket://HOST:PORT of an emulator. Repeatable."),
    ],
    connection: Connection = CONNECTION,
    baud: Annotated[int, typer.Option("--baud", metavar="N", help="Serial speed in bits per second.")] = BAUD,
    data: DataOption = DATA,
) -> None:
    """Connect boards on serial lines to the fleet's broker until interrupted.

    Examples:
      tinyfleet gateway start --port /dev/ttyUSB0
      tinyfleet gateway start --port /dev/ttyUSB0 --port /dev/ttyUSB1
      tinyfleet gateway start --port /dev/ttyUSB0 --broker mqtts://192.168.1.5
    """
    with _stop_on_signals() as stop:
        _connect(port, connection, data, baud, stop)


def _connect(ports: Sequence[str], connection: Connection, data: Path, baud: int, stop: threading.Event) -> None:
    """Runs a gateway for every port until `stop`; the first one's error ends all."""
    from tinyfleet.firmware_tools.gateway import Gateway

    def find_broker(fleet: str, device: str) -> BrokerAddress:
        return connection.find_for_devices([device], data, fleet)[0]

    gateways = [Gateway(port, find_broker, baud=baud, report=typer.echo) for port in ports]
    with ThreadPoolExecutor(len(gateways)) as pool:
        running = [pool.submit(each.run, stop) for each in gateways]
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        stop.set()
    for each in done:
        each.result()


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of ending the process where it is."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(elf: Path, as_json: bool) -> None:
    from tinyfleet.firmware_tools.firmware.size import read_size

    size = read_size(elf)
    if as_json:
        sums = {"flash": size.flash, "ram": size.ram, "arena": size.arena, "mote_text": sum(size.mote.values())}
        typer.echo(json.dumps({"elf": str(elf), **asdict(size), **sums}, indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_memory_table(elf, size))
    if size.depths:
        console.print(_stack_table(size))


def _memory_table(elf: Path, size: FirmwareSize) -> Table:
    from rich.table import Table

    from tinyfleet.firmware_tools.boards import catalogue

    board = catalogue.load_board(size.board).buildable()
    engine, data = sum(size.mote.values()), sum(size.held.values())
    code = size.text - engine - data
    other = size.data + size.bss - sum(size.variables.values())
    plan = "" if size.planned_arena is None else f"the plan says {size.planned_arena:,}"
    flash: list[tuple[str, int, str]] = [("  mote", engine, "")] if engine else []
    flash += [("  other code and constants", code, "")]
    flash += [(f"  {name}", length, "") for name, length in size.held.items()]
    flash += [("  initial values of variables", size.data, "")] if size.data else []
    ram = [("  stack", size.stack, "")]
    ram += [(f"  {name}", length, plan if name == "mote_arena" else "") for name, length in size.variables.items()]
    ram += [("  other variables", other, "")]

    table = Table(title=f"{elf} on {size.board}", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("of the board's", justify="right")
    for name, used, of, rows in (("flash", size.flash, board.flash, flash), ("RAM", size.ram, board.ram, ram)):
        table.add_row(name, f"{used:,}", f"{used / of.bytes:.1%} of {of.bytes:,}")
        for part, length, beside in rows:
            table.add_row(part, f"{length:,}", beside)
        table.add_section()
    return table


def _stack_table(size: FirmwareSize) -> Table:
    from rich.table import Table

    table = Table(title="The engine's maximum stack, in bytes", title_justify="left")
    table.add_column("call")
    table.add_column("stack", justify="right")
    table.add_column("call chain (each with its own frame)")
    for name, depth in size.depths.items():
        chain = " > ".join(f"{function.split(':')[-1]} {size.frames[function]}" for function in depth.calls)
        table.add_row(name, f"{depth.bytes:,}", chain)
    return table
