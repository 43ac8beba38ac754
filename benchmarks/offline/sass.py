"""What machine code needs of a GPU, read from what CUDA's tools print of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

USAGE, LISTING = ("cuobjdump", "-res-usage"), ("nvdisasm", "-c")
_FUNCTION = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SECTION = re.compile(r"^\.text\.(\S+):$", re.M)
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.M)
_MATRIX = re.compile(r"[A-Z]+MMA")  # HMMA, HGMMA, UTCHMMA, and those of other types
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Row(NamedTuple):
    """What the table keeps of a compiled kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's local memory.
        spill: bytes that a thread's LDL and STL instructions move, each counted once.
        shared: bytes of shared memory of a program.
        matrix: how many of each matrix instruction.
        LDL, STL, MUFU, FFMA: how many instructions.
    """

    registers: int
    stack: int
    spill: int
    shared: int
    matrix: dict[str, int]
    LDL: int
    STL: int
    MUFU: int
    FFMA: int


def read(cubin: str, tools: Path) -> dict[str, Row]:
    """Every kernel of a cubin, by its symbol.

    Args:
        tools: the folder of cuobjdump and nvdisasm.

    Raises:
        RuntimeError: the tools' output is not as expected.
    """
    usage, listing = (
        subprocess.run([tools / name, *options, cubin], capture_output=True, text=True, check=True).stdout
        for name, *options in (USAGE, LISTING)
    )
    return rows(usage, listing)


def rows(usage: str, listing: str) -> dict[str, Row]:
    """Every kernel by its symbol, from what USAGE and LISTING print. As :func:`read`."""
    _, *sections = _SECTION.split(listing)
    code = dict(zip(sections[::2], sections[1::2]))
    found = {}
    for name, registers, stack, shared in _FUNCTION.findall(usage):
        instructions = _INSTRUCTION.findall(code.get(name, ""))
        if not instructions:
            raise RuntimeError(f"no instruction of {name} in the listing")
        count = Counter(opcode for opcode, _ in instructions)
        found[name] = Row(
            registers=int(registers),
            stack=int(stack),
            spill=sum(_width(suffixes) for opcode, suffixes in instructions if opcode in ("LDL", "STL")),
            shared=int(shared),
            matrix={opcode: n for opcode, n in sorted(count.items()) if _MATRIX.fullmatch(opcode)},
            LDL=count["LDL"],
            STL=count["STL"],
            MUFU=count["MUFU"],
            FFMA=count["FFMA"] + count["FFMA2"],
        )
    if not found:
        raise RuntimeError(f"no kernel in the usage: {usage[-200:]}")
    return found


def _width(suffixes: str) -> int:
    return next((_BYTES[suffix] for suffix in suffixes.split(".") if suffix in _BYTES), 4)
