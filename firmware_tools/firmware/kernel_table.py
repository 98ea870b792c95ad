"""The engine's table of kernels and losses for known programs: what they need, so that a linker leaves out the rest.

mote_kernels.c has one line for every operator and loss; a table for some programs is a selection of its lines. If no
gradient passes an operator in any of them, its backward pass is left out, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tinyfleet.edge.model.graph import LOSSES, Kind
from tinyfleet.edge.model.program_format import HEADER, NONE, OP, TENSOR, Header, OpRecord
from tinyfleet.edge.mote.build_extension import MOTE

SOURCE = MOTE / "src" / "engine" / "mote_kernels.c"

_LOSS_NAMES = dict(zip(LOSSES, ("CROSS_ENTROPY", "SQUARED_ERROR", "BINARY_CROSS_ENTROPY", "HUBER"), strict=True))
_LINE = re.compile(r"^    \{MOTE_(\w+), (.*?)\},$", re.MULTILINE | re.DOTALL)  # a long one goes on in the next


@dataclass(frozen=True)
class KernelEntry:
    """A line of the table.

    Parameters
    ----------
    name
        The operator or loss, as in mote_internal.h, without its prefix.
    functions
        Its functions, in the order of their struct.
    """

    name: str
    functions: tuple[str, ...]

    @property
    def is_loss(self) -> bool:
        """Whether it is a loss: a loss has three functions, an operator four."""
        return len(self.functions) == 3

    @property
    def text(self) -> str:
        """The line in C."""
        return f"    {{MOTE_{self.name}, {', '.join(self.functions)}}},"


def whole() -> list[KernelEntry]:
    """The lines of all operators and losses that the engine has."""
    return [
        KernelEntry(name, tuple(re.split(r",\s+", functions))) for name, functions in _LINE.findall(SOURCE.read_text())
    ]


def needed(programs: Iterable[bytes]) -> list[KernelEntry]:
    """Select the lines that programs need.

    Parameters
    ----------
    programs
        Bytes of valid programs; they are not checked here.
    """
    forward, backward = set(), set()
    for data in programs:
        header = Header(*HEADER.unpack_from(data))
        if header.loss:
            forward.add(_LOSS_NAMES[LOSSES[header.loss - 1]])
        first = HEADER.size + TENSOR.size * header.tensors
        for i in range(header.ops):
            op = OpRecord(*OP.unpack_from(data, first + OP.size * i))
            kind = Kind(op.kind).name
            forward.add(kind)
            if op.dout != NONE:
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
    """The table as C source, in place of mote_kernels.c."""
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
