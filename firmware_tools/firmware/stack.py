"""How deep the engine's stack grows: the compiler's own figures for every function, summed along the calls.

GCC writes, for every file, each function's frame and whom it calls (-fcallgraph-info=su). The engine calls through
pointers only by way of its tables of operators and losses, so which functions such a call can reach is known: those of
the table that stand where the call's source says (`->forward(`, `->backward(`, ...). There is no recursion, and no
frame whose size the compiler does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tinyfleet.firmware_tools.firmware.kernel_table import KernelEntry

#: The compiler's option that writes {object}.ci beside every object file.
FLAG = "-fcallgraph-info=su"
#: The functions that a program calls, and whose stack is told.
ENTRIES = ("mote_load", "mote_infer", "mote_loss", "mote_learn", "mote_learn_with")

_MEMBERS = ("check", "forward", "backward", "norm"), ("target_fits", "forward", "gradient")
_NODE = re.compile(r'^node: \{ title: "([^"]+)" label: "[^"\\]+\\n[^"\\]+\\n(\d+) bytes \((\w+)\)')
_EDGE = re.compile(r'^edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"(?: label: "([^"]+):(\d+):\d+")?')


@dataclass(frozen=True)
class Depth:
    """The most stack that a call takes, in bytes, and the calls that take it, the outermost first."""

    bytes: int
    calls: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """functions: every function's own frame, in bytes. depths: of the entries that the program has."""

    functions: Mapping[str, int]
    depths: Mapping[str, Depth]


def usage(graphs: Iterable[Path], table: Iterable[KernelEntry]) -> Usage:
    """Reads the .ci files of the engine's sources, and of everything else that is linked.

    The arithmetic and the copying that the compiler calls (__aeabi_..., memcpy) are not in them and count as 0.
    Raises ValueError for a frame of unknown size, and for recursion and pointers that the entries come to.
    """
    # Of a table that the image has no entry of, nothing is ever called.
    reached: dict[str, set[str]] = {member: set() for members in _MEMBERS for member in members}
    for entry in table:
        for member, function in zip(_MEMBERS[entry.is_loss], entry.functions, strict=True):
            reached[member].add(function)
    frames: dict[str, int] = {}
    calls: dict[str, set[str]] = {}
    unknown: dict[str, str] = {}  # a function that calls through a pointer to anything -> where
    for path in graphs:
        for line in path.read_text().splitlines():
            if node := _NODE.match(line):
                name, size, kind = node.groups()
                if kind == "dynamic":
                    raise ValueError(f"the stack frame of {name} has no known size")
                frames[name] = int(size)
            elif edge := _EDGE.match(line):
                caller, callee, file, number = edge.groups()
                if callee == "__indirect_call":
                    members = _behind_pointer(Path(file), int(number)) & reached.keys()
                    targets = set().union(*(reached[member] for member in members))
                    if not members:
                        unknown[caller] = f"{file}:{number}"
                else:
                    targets = {callee}
                calls.setdefault(caller, set()).update(targets)

    @cache
    def deepest(function: str) -> Depth:
        if function in walking:
            raise ValueError(f"{function} calls itself")
        if function in unknown:
            raise ValueError(f"{function} calls through a pointer that can be anything, at {unknown[function]}")
        walking.add(function)
        below = [deepest(callee) for callee in sorted(calls.get(function, ())) if callee in frames]
        walking.discard(function)
        rest = max(below, key=lambda depth: depth.bytes, default=Depth(0, ()))
        return Depth(frames[function] + rest.bytes, (_short(function), *rest.calls))

    walking: set[str] = set()
    return Usage(
        {_short(name): size for name, size in sorted(frames.items())},
        {name: deepest(name) for name in ENTRIES if name in frames},
    )


def _short(function: str) -> str:
    """A function's name without its file's folder and the compiler's suffixes."""
    file, _, name = function.rpartition(":")
    return f"{Path(file).name}:{name.split('.')[0]}" if file else name.split(".")[0]


def _behind_pointer(file: Path, line: int) -> set[str]:
    """The members that a line of source calls functions by."""
    return set(re.findall(r"->(\w+)\(", file.read_text().splitlines()[line - 1]))
