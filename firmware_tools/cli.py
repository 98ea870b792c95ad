"""The commands `tinyfleet firmware ...` and `tinyfleet gateway`."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table
from tinyfleet.edge import tasks
from tinyfleet.edge.cli import BrokerOption, DataOption, FleetOption, TaskOption, broker_address
from tinyfleet.edge.errors import ProgramError, UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.firmware_tools.boards import catalogue
from tinyfleet.firmware_tools.firmware import build as firmware_build
from tinyfleet.firmware_tools.firmware import emulate, export_library
from tinyfleet.firmware_tools.gateway import Gateway

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Build, measure and run firmware for a board.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Elf = Annotated[Path, typer.Argument(help="Firmware made by `tinyfleet firmware build`.", show_default=False)]
DATA = Path(".tinyfleet")
BAUD = 115200


@app.command("boards")
def list_boards(
    describe: Annotated[bool, typer.Option("--describe", help="Put what is known of them into the graph.")] = False,
    data: DataOption = DATA,
    as_json: Json = False,
) -> None:
    """List the boards that are known, and describe them in the fleet's graph.

    \b
    Examples:
      tinyfleet firmware boards
      tinyfleet firmware boards --describe
    """
    known = [catalogue.load_board(name) for name in catalogue.board_ids()]
    if describe:
        from tinyfleet.ontology.cli import open_store  # a machine beside a board may have no graph store
        from tinyfleet.ontology.ingest.describe import put_board

        with open_store(data) as store:
            for target in known:
                put_board(store, target.board)
    if as_json:
        typer.echo(json.dumps([asdict(target.board) for target in known], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("board", "core", "clock", "RAM", "flash", "firmware", "stands in"):
        table.add_column(column, justify="right" if column in ("clock", "RAM", "flash") else "left")
    for target in known:
        board, mhz = target.board, f"{target.board.clock_hz / 1e6:g} MHz" if target.board.clock_hz else ""
        firmware, emulator = "yes" if target.build else "", f"QEMU {target.machine}" if target.machine else ""
        ram, flash = (f"{size / 2**20:g} MiB" for size in (board.ram_bytes, board.flash_bytes))
        table.add_row(board.id, board.mcu, mhz, ram, flash, firmware, emulator)
    Console(highlight=False).print(table)


@app.command()
def build(
    board: Annotated[str, typer.Option(help="The board to build for.", show_default=False)],
    task: TaskOption = "digits",
    client: Annotated[int, typer.Option(min=0, help="Its number in the fleet: it decides which samples it holds.")] = 0,
    fleet_size: Annotated[int, typer.Option(min=1, help="The fleet's size.")] = 1,
    id: Annotated[str, typer.Option(help="The device's name in the fleet.")] = "board-01",
    fleet: FleetOption = "home",
    out: Annotated[Path, typer.Option(help="The folder for firmware.elf.")] = Path("build"),
    model_slot_bytes: Annotated[
        int, typer.Option(min=0, help="Room for a model received over the air; 0: it keeps the built-in one.")
    ] = firmware_build.MODEL_SLOT_BYTES,
    as_json: Json = False,
) -> None:
    """Build a fleet device's firmware, and show what it takes of the board.

    \b
    Examples:
      tinyfleet firmware build --board mps2-an386 --task digits --id board-01
      tinyfleet firmware build --board mps2-an385 --client 3 --of 12 --id board-03 --out build/board-03
    """
    catalogue.load_board(board).buildable()
    if client >= fleet_size:
        raise UserError(f"device {client} of {fleet_size} does not exist: --client counts from 0 to {fleet_size - 1}")
    learned = tasks.load(task)
    elf = firmware_build.build(
        board, learned.program, learned.client(client, fleet_size), fleet, id, out, model_slot_bytes=model_slot_bytes
    )
    _show(elf, as_json)


@app.command()
def size(elf: Elf, as_json: Json = False) -> None:
    """Show what firmware takes of its board's flash and RAM, beside the model's plan, and of its stack.

    \b
    Example:
      tinyfleet firmware size build/firmware.elf
    """
    _show(elf, as_json)


@app.command("export")
def export_(
    library: Annotated[str, typer.Option(help="arduino, or cmake.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.", show_default=False)],
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL.mote",
            help="The model: its operators and its program go in. Default: all operators, and a small network.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the engine as an Arduino library or a CMake target, with a model and an example that learns.

    \b
    Examples:
      tinyfleet firmware export --library cmake --out mote --model model.mote
      tinyfleet firmware export --library arduino --out ~/Arduino/libraries/TinyFleetMote
    """
    if library not in get_args(export_library.Kind):
        raise UserError(f"there is no library of kind '{library}'; choose arduino or cmake")
    program = None
    if model is not None:
        try:
            program = Program.parse(model.read_bytes())
        except OSError as error:
            raise UserError(
                f"cannot read {model} ({error.strerror}); make one with: tinyfleet model compile"
            ) from error
        except ProgramError as error:
            raise UserError(f"{model} is not a program; make one with: tinyfleet model compile") from error
    files = export_library.export(cast(export_library.Kind, library), out, program)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "files": [str(path.relative_to(out)) for path in files]}, indent=2))
    else:
        typer.echo(f"{out}: {len(files)} files")


@app.command()
def run(
    elf: Elf,
    board: Annotated[str | None, typer.Option(help="The board. Default: the one it was built for.")] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Join the board to the broker, too.")] = False,
    broker: BrokerOption = None,
    data: DataOption = DATA,
) -> None:
    """Run firmware on an emulated board until Ctrl-C.

    Prints the address of the board's serial port, for `tinyfleet gateway`; with --gateway that is done here.

    \b
    Examples:
      tinyfleet firmware run build/firmware.elf
      tinyfleet firmware run build/firmware.elf --gateway --broker 127.0.0.1:1883
    """
    built_for = firmware_build.size(elf).board
    if board is not None and board != built_for:
        raise UserError(f"{elf} was built for board '{built_for}', not '{board}'; build it again with --board {board}")
    with _stop_on_signals() as stop, emulate.Emulator(catalogue.load_board(built_for), elf) as emulator:
        typer.echo(f"{built_for} is running; its serial port is {emulator.url}")

        def stop_with_it() -> None:
            emulator.wait()
            stop.set()

        threading.Thread(target=stop_with_it, daemon=True).start()
        if gateway:
            _join([emulator.url], broker_address(broker, data), BAUD, stop)
        else:
            stop.wait()
        if not emulator.running:
            raise UserError(f"the emulator has ended: {emulator.said or 'it says nothing'}")


def gateway(
    port: Annotated[
        list[str],
        typer.Option(metavar="PORT", help="A serial port, or socket://HOST:PORT of an emulator. May be repeated."),
    ],
    broker: BrokerOption = None,
    baud: Annotated[int, typer.Option(help="Bits a second of the serial port.")] = BAUD,
    data: DataOption = DATA,
) -> None:
    """Join boards on serial lines to the fleet's broker, until Ctrl-C.

    \b
    Examples:
      tinyfleet gateway --port /dev/ttyUSB0
      tinyfleet gateway --port socket://127.0.0.1:40123 --broker 127.0.0.1:1883
    """
    with _stop_on_signals() as stop:
        _join(port, broker_address(broker, data), baud, stop)


def _join(ports: Sequence[str], broker: tuple[str, int], baud: int, stop: threading.Event) -> None:
    """Runs a gateway for every port until `stop`; the first one's error ends all."""
    gateways = [Gateway(port, broker, baud=baud, report=typer.echo) for port in ports]
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
    size = firmware_build.size(elf)
    board = catalogue.load_board(size.board).buildable()
    if as_json:
        sums = {"flash": size.flash, "ram": size.ram, "arena": size.arena, "mote_text": sum(size.mote.values())}
        typer.echo(json.dumps({"elf": str(elf), **asdict(size), **sums}, indent=2))
        return
    console = Console(highlight=False)
    table = Table(title=f"{elf} on {size.board}", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    table.add_column("of the board's", justify="right")
    table.add_row("flash", f"{size.flash:,}", f"{size.flash / board.flash.bytes:.1%} of {board.flash.bytes:,}")
    engine = sum(size.mote.values())
    if engine:
        table.add_row("  mote", f"{engine:,}", "")
    table.add_row("  other code and constants", f"{size.text - engine - sum(size.held.values()):,}", "")
    for name, length in size.held.items():
        table.add_row(f"  {name}", f"{length:,}", "")
    if size.data:
        table.add_row("  first values of variables", f"{size.data:,}", "")
    table.add_section()
    table.add_row("RAM", f"{size.ram:,}", f"{size.ram / board.ram.bytes:.1%} of {board.ram.bytes:,}")
    table.add_row("  stack", f"{size.stack:,}", "")
    for name, length in size.variables.items():
        beside = f"the plan says {size.plan:,}" if name == "mote_arena" and size.plan is not None else ""
        table.add_row(f"  {name}", f"{length:,}", beside)
    table.add_row("  other variables", f"{size.data + size.bss - sum(size.variables.values()):,}", "")
    console.print(table)
    if size.depths:
        calls = Table(title="The engine's stack at most, in bytes", title_justify="left")
        calls.add_column("call")
        calls.add_column("stack", justify="right")
        calls.add_column("by way of (each with its own frame)")
        for name, depth in size.depths.items():
            way = " > ".join(f"{function.split(':')[-1]} {size.frames[function]}" for function in depth.calls)
            calls.add_row(name, f"{depth.bytes:,}", way)
        console.print(calls)
