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
from pathlib import Path

from tinyfleet.firmware_tools.firmware.kernel_table import KernelEntry

#: The compiler's option that writes {object}.ci beside every object file.
FLAG = "-fcallgraph-info=su"
#: The functions that a program calls, and whose stack is reported.
ENTRIES = ("mote_load", "mote_infer", "mote_loss", "mote_learn", "mote_learn_with")

_MEMBERS = ("check", "forward", "backward", "norm"), ("target_fits", "forward", "gradient")
_NODE = re.compile(r'^node: \{ title: "([^"]+)" label: "[^"\\]+\\n[^"\\]+\\n(\d+) bytes \((\w+)\)')
_EDGE = re.compile(r'^edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"(?: label: "([^"]+):(\d+):\d+")?')


@dataclass(frozen=True)
class Depth:
    """The maximum stack of a call in bytes, and the chain of calls that needs it, the outermost first."""

    bytes: int
    calls: tuple[str, ...]


@dataclass(frozen=True)
class Usage:
    """functions: every function's own frame, in bytes. depths: of the entries that the program has."""

    functions: Mapping[str, int]
    depths: Mapping[str, Depth]


def usage(graphs: Iterable[Path], table: Iterable[KernelEntry]) -> Usage:
    """Read the stack that the engine's calls need.

    The arithmetic and the copying that the compiler calls (__aeabi_..., memcpy) are not in the files and count as 0.

    Parameters
    ----------
    graphs
        The .ci files of the engine's sources, and of everything else that is linked.
    table
        The operators and losses in the image.

    Raises
    ------
    ValueError
        If a frame has no known size, or an entry reaches recursion or a pointer to an unknown function.
    """
    graph = _CallGraph(table)
    for path in graphs:
        for line in path.read_text().splitlines():
            graph.add(line)
    return Usage(
        {_short(name): size for name, size in sorted(graph.frames.items())},
        {name: graph.depth(name) for name in ENTRIES if name in graph.frames},
    )


class _CallGraph:
    """The functions of a program: their frames, and which functions each may call."""

    def __init__(self, table: Iterable[KernelEntry]) -> None:
        # A member without a function in the table is never called.
        self._members: dict[str, set[str]] = {member: set() for members in _MEMBERS for member in members}
        for entry in table:
            for member, function in zip(_MEMBERS[entry.is_loss], entry.functions, strict=True):
                self._members[member].add(function)
        self.frames: dict[str, int] = {}
        self._calls: dict[str, set[str]] = {}
        self._unknown: dict[str, str] = {}  # a function that calls through a pointer to anything -> where
        self._depths: dict[str, Depth] = {}
        self._walking: set[str] = set()

    def add(self, line: str) -> None:
        """Adds what a line of a .ci file says."""
        if node := _NODE.match(line):
            name, size, kind = node.groups()
            if kind == "dynamic":
                raise ValueError(f"the stack frame of {name} has no known size")
            self.frames[name] = int(size)
        elif edge := _EDGE.match(line):
            caller, callee, file, number = edge.groups()
            targets = {callee}
            if callee == "__indirect_call":
                members = _behind_pointer(Path(file), int(number)) & self._members.keys()
                targets = set().union(*(self._members[member] for member in members))
                if not members:
                    self._unknown[caller] = f"{file}:{number}"
            self._calls.setdefault(caller, set()).update(targets)

    def depth(self, function: str) -> Depth:
        """The maximum stack of a call of this function."""
        if function in self._depths:
            return self._depths[function]
        if function in self._walking:
            raise ValueError(f"{function} calls itself")
        if function in self._unknown:
            raise ValueError(f"{function} calls through a pointer that can be anything, at {self._unknown[function]}")
        self._walking.add(function)
        below = [self.depth(callee) for callee in sorted(self._calls.get(function, ())) if callee in self.frames]
        self._walking.discard(function)
        rest = max(below, key=lambda depth: depth.bytes, default=Depth(0, ()))
        self._depths[function] = Depth(self.frames[function] + rest.bytes, (_short(function), *rest.calls))
        return self._depths[function]


def _short(function: str) -> str:
    """A function's name without its file's folder and the compiler's suffixes."""
    file, _, name = function.rpartition(":")
    return f"{Path(file).name}:{name.split('.')[0]}" if file else name.split(".")[0]


def _behind_pointer(file: Path, line: int) -> set[str]:
    """The members that a line of source calls functions by."""
    return set(re.findall(r"->(\w+)\(", file.read_text().splitlines()[line - 1]))
