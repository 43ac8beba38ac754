"""What a compiled kernel must not do, and how far it may move from the committed table."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from .sass import Row

# Bytes of shared memory that a program may have (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTERS = 8  # by which a count may differ from the table


def key(name: str, arch: int) -> str:
    return f"{name} sm_{arch}"


def selected(row: str, pattern: str, architectures: Collection[int]) -> bool:
    """Whether a row is one of those that were asked for."""
    name, _, arch = row.rpartition(" sm_")
    return bool(re.search(pattern, name)) and int(arch) in architectures


def broken(arch: int, row: Row, unguarded: Sequence[str], matrix: bool) -> list[str]:
    """What is wrong with a kernel by itself.

    Args:
        unguarded: the releases in its PTX that nothing orders.
        matrix: whether it must have matrix instructions.
    """
    found = []
    if row.spill:
        found.append(f"spills: {row.LDL} LDL and {row.STL} STL move {row.spill} bytes a thread")
    if row.stack:
        found.append(f"uses a stack: {row.stack} bytes a thread")
    if row.shared > SHARED[arch]:
        found.append(f"needs {row.shared} bytes of shared memory, sm_{arch} has {SHARED[arch]}")
    if matrix and not row.matrix:
        found.append(f"has no matrix instruction, its products are {row.FFMA} FFMA")
    found += [f"releases without a barrier before it: {release}" for release in unguarded]
    return found


def moved(rows: Mapping[str, Row], table: Mapping[str, Row]) -> list[str]:
    """How the rows differ from those of the table more than they may."""
    found = [f"{name}: not in the table" for name in rows if name not in table]
    found += [f"{name}: in the table, but no kernel any more" for name in table if name not in rows]
    for name, row in rows.items():
        if name in table and abs(row.registers - table[name].registers) > REGISTERS:
            found.append(f"{name}: {row.registers} registers, the table has {table[name].registers}")
    return found


def read(path: Path) -> dict[str, Row]:
    """A table, empty where there is none."""
    if not path.exists():
        return {}
    return {name: Row(**row) for name, row in json.loads(path.read_text()).items()}


def write(path: Path, rows: Mapping[str, Row]) -> None:
    """A line per row, in the order of their names."""
    lines = (f"  {json.dumps(name)}: {json.dumps(rows[name]._asdict())}" for name in sorted(rows))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
