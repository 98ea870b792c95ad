"""Firmware for a board: the engine, the node, start-up code and a device's own data, compiled into one ELF file.

`build` makes a fleet device. `link` is the general part under it, for programs that only measure or check something.
size.py reads the memory it needs from the ELF.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np

from tinyfleet.edge.device.thing_description import thing_description
from tinyfleet.edge.errors import UserError
from tinyfleet.edge.model.program import Program
from tinyfleet.edge.mote import build_extension, codegen
from tinyfleet.edge.tasks import ClientData
from tinyfleet.edge.versions import ENGINE_VERSION
from tinyfleet.edge.wire.errors import ProtocolError
from tinyfleet.edge.wire.topics import Topics
from tinyfleet.firmware_tools.boards.catalogue import BoardTarget, load_board
from tinyfleet.firmware_tools.firmware import MODEL_SLOT_BYTES, kernel_table
from tinyfleet.firmware_tools.firmware import stack as stack_usage

SOURCES = Path(__file__).parent / "src"

COMPILER = "arm-none-eabi-gcc"
SPLIT = ("-g", "-ffunction-sections", "-fdata-sections")
# nano: newlib's small build. Only memcpy and its like are taken from it.
LINK = ("--specs=nano.specs", "-nostartfiles", "-Wl,--gc-sections", "-Wl,--fatal-warnings")

ENGINE = build_extension.sources("engine", "int8")
NODE = ENGINE + build_extension.sources("crypto", "node", "store")
MEL = build_extension.sources("features")

#: How arithmetic is compiled. exact: the same bits on every target. fast: products and sums fused and in any order.
Profile = Literal["exact", "fast"]
PROFILES: dict[Profile, list[str]] = {
    "exact": build_extension.FLAGS,
    "fast": ["-std=c99", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-DMOTE_FAST"],
}
#: Files that are compiled small, not quick: they run seldom, only call kernels, do next to nothing, or have their loops
#: in assembler.
SMALL = (
    "mote.c", "mote_load.c", "mote_sgd.c", "mote_dense.c", "mote_relu.c", "mote_loss.c", "mote_math.c",
    "mote_node.c",
    "mote_node_receive.c", "mote_node_reply.c", "mote_node_topics.c", "mote_node_train.c", "mote_update.c",
    "mote_frame.c", "mote_stream.c",
)  # fmt: skip

Blob = bytes | bytearray


def available() -> bool:
    """Whether the compiler is installed."""
    return shutil.which(COMPILER) is not None


def _compiler() -> str:
    found = shutil.which(COMPILER)
    if found is None:
        raise UserError(
            f"the compiler {COMPILER} is not installed; install it with: "
            "apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi"
        )
    return found


def _call(command: Sequence[str], what: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "nano.specs" in done.stderr or re.search(r"fatal error: string\.h", done.stderr):
        raise UserError(
            "the compiler's C library is not installed; install it with: apt-get install libnewlib-arm-none-eabi"
        )
    raise BuildError(f"{what} does not build:\n{done.stderr}")


class BuildError(Exception):
    """The compiler or the linker rejects our own sources; the message is theirs."""


def link(
    target: BoardTarget,
    elf: Path,
    sources: Iterable[Path],
    *,
    blobs: Mapping[str, Blob] | None = None,
    defines: Mapping[str, int | float | str] | None = None,
    foreign: Iterable[Path] = (),
    include: Iterable[Path] = (),
    note: Mapping[str, str] | None = None,
    programs: Iterable[bytes] | None = None,
    profile: Profile = "exact",
) -> Path:
    """Compile and link a program for a board.

    Parameters
    ----------
    target
        The board.
    elf
        The file to write.
    sources
        Our C files, compiled with every warning an error; start-up code is added.
    blobs
        Constants for the flash, by name, aligned to 4 bytes: the program finds `device_{name}` and
        DEVICE_{NAME}_BYTES in "device.h".
    defines
        More constants of "device.h".
    foreign
        C files of others, compiled without our warnings.
    include
        Folders of their headers.
    note
        Facts that are kept in the ELF and not loaded.
    programs
        The image has the operators that these programs need; None: all operators.
    profile
        How arithmetic is compiled.

    Returns
    -------
    Path
        `elf`.

    Raises
    ------
    UserError
        If the compiler is missing, or the program does not fit the board.
    BuildError
        If a source does not compile.
    """
    compiler, kernels = _compiler(), kernel_table.whole() if programs is None else kernel_table.needed(programs)
    work = elf.parent / f"{elf.stem}.build"
    _write_generated(work, target, kernels, blobs or {}, defines or {})
    ours = [work / path.name if path.name == "mote_kernels.c" else path for path in sources]
    strict = [*build_extension.STRICT, *(f"-isystem{folder}" for folder in include)]
    jobs = [
        (path, [*strict, *["-Os"] * (path.name in SMALL)]) for path in (*ours, SOURCES / "startup.c", work / "device.S")
    ]
    jobs += [(path, [f"-I{folder}" for folder in include]) for path in foreign]
    objects = _compile([compiler, *_options(target, work, profile)], jobs, work)
    map_ = work / "firmware.map"
    command = [compiler, *_core(target, profile), *LINK, f"-Wl,-Map={map_}", "-T", str(work / "firmware.ld")]
    try:
        _call([*command, *map(str, objects), "-lm", "-lgcc", "-o", str(elf)], elf.name)
    except BuildError as error:
        raise _overflow(error, target) or error from None
    engine = {object_.name: path.name for object_, path in objects.items() if _is_engine(path)}
    facts = {
        "board": target.board.id,
        **(note or {}),
        "profile": profile,
        "mote": _by_file(map_, engine, "text|rodata"),
        "static": sum(_by_file(map_, engine, "data|bss").values()),
        "stack": asdict(stack_usage.usage(sorted(work.glob("*.ci")), kernels)) if engine else None,
    }
    (work / "note.json").write_text(json.dumps(facts))
    _call([_objcopy(compiler), f"--add-section=.tinyfleet={work / 'note.json'}", str(elf)], elf.name)
    return elf


def _compile(command: Sequence[str], jobs: Sequence[tuple[Path, Sequence[str]]], work: Path) -> dict[Path, Path]:
    """Compiles each source with its own options, many at once; returns object file -> source."""
    objects = {work / f"{index}_{path.stem}.o": path for index, (path, _) in enumerate(jobs)}
    with ThreadPoolExecutor() as pool:
        calls = [
            pool.submit(_call, [*command, *options, "-c", str(path), "-o", str(object_)], path.name)
            for object_, (path, options) in zip(objects, jobs, strict=True)
        ]
    for call in calls:
        call.result()
    return objects


def _write_generated(
    work: Path,
    target: BoardTarget,
    kernels: Iterable[kernel_table.KernelEntry],
    blobs: Mapping[str, Blob],
    defines: Mapping[str, int | float | str],
) -> None:
    """Writes the sources and the linker script that are made for one program into a new folder."""
    build = target.buildable()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "mote_kernels.c").write_text(kernel_table.source(kernels))
    (work / "device.h").write_text(header(blobs, defines))
    (work / "device.S").write_text(_assembly(work, blobs))
    (work / "firmware.ld").write_text(
        Template((SOURCES / "firmware.ld.in").read_text()).substitute(
            board=target.board.title,
            stack_bytes=build.stack_bytes,
            flash_origin=hex(build.flash.origin),
            flash_bytes=build.flash.bytes,
            ram_origin=hex(build.ram.origin),
            ram_bytes=build.ram.bytes,
        )
    )


def _core(target: BoardTarget, profile: Profile) -> list[str]:
    """The compiler's options for the board's core."""
    build = target.buildable()
    return [*build.cpu, *(build.exact if profile == "exact" else ())]


def _options(target: BoardTarget, work: Path, profile: Profile) -> list[str]:
    """The compiler's options for every file."""
    options = [
        *_core(target, profile),
        *PROFILES[profile],
        *SPLIT,
        stack_usage.FLAG,
        "-masm-syntax-unified",
        f"-DBOARD_CLOCK_HZ={target.board.clock_hz}u",
        *(f"-I{folder}" for folder in (work, SOURCES, *build_extension.INCLUDES)),
    ]
    if uart := target.buildable().uart:
        options += [
            f"-DBOARD_UART_BASE={uart.base:#x}u",
            f"-DBOARD_UART_RX_IRQ={uart.rx_irq}u",
            f"-DBOARD_UART_BAUD={uart.baud}u",
        ]
    return options


def _is_engine(path: Path) -> bool:
    return path.is_relative_to(build_extension.MOTE) or path.name == "mote_kernels.c"


def _objcopy(compiler: str) -> str:
    return compiler.removesuffix("gcc") + "objcopy"


def _by_file(map_: Path, engine: Mapping[str, str], sections: str) -> dict[str, int]:
    """Bytes that the linker took of every one of these objects, in such sections, by their sources' names."""
    # A section's line may be broken behind its name: " .text.name\n    0x00000000  0x1c  folder/3_mote.o".
    text = map_.read_text()
    text = text[text.index("\nLinker script and memory map") :]
    found = re.findall(rf"^ \.(?:{sections})\S*\s+0x[0-9a-f]+\s+(0x[0-9a-f]+)\s+(\S+)$", text, re.MULTILINE)
    sizes: dict[str, int] = {}
    for size, object_ in found:
        if (name := Path(object_).name) in engine and int(size, 16) > 0:
            sizes[engine[name]] = sizes.get(engine[name], 0) + int(size, 16)
    return sizes


def header(blobs: Mapping[str, Blob], defines: Mapping[str, int | float | str]) -> str:
    lines = ["/* Generated: what this device holds. */", "#ifndef DEVICE_H", "#define DEVICE_H", "#include <stdint.h>"]
    for name, data in blobs.items():
        lines.append(f"#define DEVICE_{name.upper()}_BYTES {len(data)}u")
        lines.append(f"extern const uint8_t device_{name}[DEVICE_{name.upper()}_BYTES];")
    for name, value in defines.items():
        if isinstance(value, str):
            literal = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        else:
            literal = f"{value}u" if isinstance(value, int) else f"{float(value).hex()}f"
        lines.append(f"#define DEVICE_{name.upper()} {literal}")
    return "\n".join([*lines, "#endif", ""])


def _assembly(work: Path, blobs: Mapping[str, Blob]) -> str:
    """Assembler that takes the blobs in as they are: a C array of a large one would take a compiler minutes."""
    lines = []
    for name, data in blobs.items():
        (work / f"{name}.bin").write_bytes(data)
        symbol = f"device_{name}"
        lines += [
            f'.section .rodata.{symbol}, "a", %progbits',
            ".balign 4",
            f".global {symbol}",
            f".type {symbol}, %object",
            f'{symbol}: .incbin "{work / f"{name}.bin"}"',
            f".size {symbol}, . - {symbol}",
        ]
    return "\n".join([*lines, ""])


def _overflow(error: BuildError, target: BoardTarget) -> UserError | None:
    """The linker's 'does not fit', in the user's terms."""
    overflows = re.findall(r"region `(FLASH|RAM)' overflowed by (\d+) bytes", str(error))
    if not overflows:
        return None
    have = {"FLASH": target.buildable().flash.bytes, "RAM": target.buildable().ram.bytes}
    said = ", and ".join(
        f"{int(over):,} bytes more {'flash' if where == 'FLASH' else where} than its {have[where]:,}"
        for where, over in overflows
    )
    return UserError(
        f"the program is too large for board '{target.board.id}': it needs {said}; use a smaller model, "
        "fewer trainable layers, or a larger board"
    )


def build(
    board: str,
    program: Program,
    data: ClientData,
    fleet: str,
    device_id: str,
    out: Path,
    *,
    model_slot_bytes: int = MODEL_SLOT_BYTES,
) -> Path:
    """Build the firmware of a fleet device.

    Parameters
    ----------
    board
        The board's ID.
    program
        The model that it learns.
    data
        The samples that it learns from; they lie in flash.
    fleet, device_id
        Names of the fleet and the device.
    out
        The folder to write firmware.elf to.
    model_slot_bytes
        RAM for a program sent over the air, which may need no larger arena than `program`. The image then has all
        operators; with 0 it has those of `program`.

    Returns
    -------
    Path
        The firmware.

    Raises
    ------
    UserError
        If the board is unknown or has no serial port, a name cannot be in a topic, the compiler is missing, the samples
        do not fit the model, or the program does not fit the board.
    """
    target = load_board(board)
    uart = target.serial()
    _compiler()
    try:
        Topics(fleet).command(device_id)
    except ProtocolError as error:
        raise UserError(str(error)) from error
    data.check_compatible(program)
    td = thing_description(
        fleet,
        device_id,
        target.board,
        engine="mote",
        engine_version=ENGINE_VERSION,
        arena_bytes=program.arena_bytes,
        model=program.model_id,
        model_slot_bytes=model_slot_bytes,
    )
    out.mkdir(parents=True, exist_ok=True)
    generated = codegen.generate(out / "firmware.wire")
    return link(
        target,
        out / "firmware.elf",
        [
            SOURCES / "main_node.c",
            SOURCES / f"uart_{uart.driver}.c",
            *NODE,
        ],
        blobs={
            "program": program.data,
            "model": program.model_id,
            "td": json.dumps(td, separators=(",", ":")).encode(),
            **_samples(data),
        },
        defines={
            **_shape(program),
            **_task(data),
            "fleet": fleet,
            "id": device_id,
            "board": target.board.id[:32],
            "model_slot_bytes": model_slot_bytes,
        },
        foreign=generated,
        include=[generated[0].parent],
        note={"fleet": fleet, "device": device_id},
        programs=[program.data] if model_slot_bytes == 0 else None,
    )


def build_benchmark(
    target: BoardTarget, program: Program, elf: Path, *, steps: int, profile: Profile = "exact"
) -> Path:
    """The program that counts the instructions of `program`'s inference and training step (see src/main_bench.c)."""
    return link(
        target,
        elf,
        [SOURCES / "main_bench.c", SOURCES / "bench_mote.c", SOURCES / "semihost.c", *ENGINE],
        blobs={"program": program.data},
        defines={**_shape(program), "steps": steps},
        programs=[program.data],
        profile=profile,
    )


def build_cose_benchmark(target: BoardTarget, elf: Path, messages: Mapping[str, bytes]) -> Path:
    """The program that counts the instructions of opening sealed messages (see src/bench_cose.c)."""
    generated = codegen.generate(elf.parent / "wire")
    error, crypto = build_extension.MOTE / "src" / "engine" / "mote_error.c", build_extension.sources("crypto")
    monocypher = [path for path in generated if path.name == "monocypher.c"]
    return link(
        target,
        elf,
        [SOURCES / "main_bench.c", SOURCES / "bench_cose.c", SOURCES / "semihost.c", *crypto, error],
        blobs=dict(messages),
        defines={"steps": 3},
        foreign=monocypher,
        include=[generated[0].parent],
    )


def build_mel_benchmark(target: BoardTarget, elf: Path, *, steps: int, profile: Profile = "exact") -> Path:
    """The program that counts the instructions of one frame's features (see src/bench_mel.c)."""
    return link(
        target,
        elf,
        [SOURCES / "main_bench.c", SOURCES / "bench_mel.c", SOURCES / "semihost.c", *MEL],
        defines={"steps": steps},
        profile=profile,
    )


def build_mel_check(target: BoardTarget, elf: Path) -> Path:
    """The program that prints a checksum of the features of made-up sound (see src/main_mel.c)."""
    sources = [SOURCES / "main_mel.c", SOURCES / "semihost.c", *MEL, *ENGINE]
    return link(target, elf, sources)


@dataclass(frozen=True)
class TrainingCase:
    """What src/main_exactness.c does with a program: train it on generated samples.

    Parameters
    ----------
    program
        The model. If nothing of it trains, it only runs, in int8.
    rate, momentum, weight_decay, clip_norm
        The optimizer; see MoteLearner.
    steps
        Number of steps, or of inferences.
    seed
        Of the samples.
    """

    program: Program
    rate: float = 0.0
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    steps: int = 500
    seed: int = 7

    @property
    def data(self) -> bytes:
        """Its training_case_t, and the program."""
        sgd = (self.rate, self.momentum, self.weight_decay, self.clip_norm)
        return struct.pack("<III4f", len(self.program.data), self.steps, self.seed, *sgd) + self.program.data


def training_case_defines(cases: Sequence[TrainingCase]) -> dict[str, int | float | str]:
    """The constants of "device.h" with which src/main_exactness.c is compiled."""
    return {
        "arena_bytes": max(case.program.arena_bytes for case in cases),
        "inputs": max(case.program.input.size for case in cases),
    }


def build_exactness_check(
    target: BoardTarget, cases: Sequence[TrainingCase], elf: Path, *, profile: Profile = "exact"
) -> Path:
    """The program that learns and prints a checksum of what it has learned (see src/main_exactness.c)."""
    return link(
        target,
        elf,
        [SOURCES / "main_exactness.c", SOURCES / "semihost.c", *ENGINE],
        blobs={"cases": b"".join(case.data for case in cases)},
        defines=training_case_defines(cases),
        programs=[case.program.data for case in cases],
        profile=profile,
    )


def _samples(data: ClientData) -> dict[str, Blob]:
    numbers = "u1" if data.features.dtype == np.uint8 else "<f4"
    blobs: dict[str, Blob] = {
        "features": np.ascontiguousarray(data.features, numbers).tobytes(),
        "starts": np.asarray(data.starts, "<u4").tobytes(),
    }
    if data.targets is not None:
        blobs["targets"] = np.ascontiguousarray(data.targets, "<f4").tobytes()
    return blobs


def _task(data: ClientData) -> dict[str, int | float | str]:
    return {
        "classes": len(data.starts) - 1,
        "scale": float(data.scale),
        "ways": data.ways,
        "fixed": int(data.fixed),
        "float_features": int(data.features.dtype == np.float32),
        "target_outputs": 0 if data.targets is None else data.targets.shape[1],
    }


def _shape(program: Program) -> dict[str, int | float | str]:
    return {
        "arena_bytes": program.arena_bytes,
        "parameters": program.n_params,
        "inputs": math.prod(program.input_shape),
        "outputs": math.prod(program.output_shape),
    }
