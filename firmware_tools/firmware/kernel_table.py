"""The engine's table of kernels and losses for known programs: what they need, so that a linker leaves out the rest.

mote_kernels.c has one line for every operator and loss; a table for some programs is a choice of its lines.
An operator through which no gradient passes in any of them has its backward pass left out, too.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from tinyfleet.edge.model.graph import LOSSES, Kind
from tinyfleet.edge.mote.build_extension import MOTE

SOURCE = MOTE / "src" / "engine" / "mote_kernels.c"

_HEADER, _TENSOR, _OP = 48, 16, 40  # bytes: see mote_internal.h
_NO_TENSOR = 0xFFFF
_LOSS_NAMES = dict(zip(LOSSES, ("CROSS_ENTROPY", "SQUARED_ERROR", "BINARY_CROSS_ENTROPY", "HUBER"), strict=True))
_LINE = re.compile(r"^    \{MOTE_(\w+), (.*?)\},$", re.MULTILINE | re.DOTALL)  # a long one goes on in the next


@dataclass(frozen=True)
class KernelEntry:
    """A line of the table: an operator's or a loss's name, and its functions in the order of their struct."""

    name: str
    functions: tuple[str, ...]

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss: its line holds three functions, an operator's four."""
        return len(self.functions) == 3

    @property
    def text(self) -> str:
        """The line."""
        return f"    {{MOTE_{self.name}, {', '.join(self.functions)}}},"


def whole() -> list[KernelEntry]:
    """All that the engine has."""
    return [
        KernelEntry(name, tuple(re.split(r",\s+", functions))) for name, functions in _LINE.findall(SOURCE.read_text())
    ]


def needed(programs: Iterable[bytes]) -> list[KernelEntry]:
    """What these programs need. They must be programs: nothing is checked here."""
    forward, backward = set(), set()
    for data in programs:
        tensors, ops, loss = struct.unpack_from("<HHB", data, 16)
        if loss:
            forward.add(_LOSS_NAMES[LOSSES[loss - 1]])
        for i in range(ops):
            at = _HEADER + _TENSOR * tensors + _OP * i
            kind, (dout,) = Kind(data[at]).name, struct.unpack_from("<H", data, at + 10)
            forward.add(kind)
            if dout != _NO_TENSOR:
                backward.add(kind)
    found = [entry for entry in whole() if entry.name in forward]
    missing = forward - {entry.name for entry in found}
    assert not missing, f"the engine has no {missing}"
    return [
        entry
        if entry.is_loss or entry.name in backward
        else KernelEntry(entry.name, (*entry.functions[:2], "NULL", "NULL"))
        for entry in found
    ]


def source(entries: Iterable[KernelEntry]) -> str:
    """The table as C, in place of mote_kernels.c."""
    lines = list(entries)
    return "\n".join(
        [
            "/* Generated: the operators and losses that this image holds. */",
            '#include "mote_kernel_list.h"',
            "",
            "const mote_kernel_t mote_kernels[] = {",
            *(entry.text for entry in lines if not entry.is_loss),
            "    {0, NULL, NULL, NULL, NULL},",
            "};",
            "",
            "const mote_loss_t mote_losses[] = {",
            *(entry.text for entry in lines if entry.is_loss),
            "    {0, NULL, NULL, NULL},",
            "};",
            "",
        ]
    )
