"""Which schedule and tiles a scan gets: one table, keyed on the cell, H, the dtype and the machine.

Never on T beyond one, and on the batch only by its tile of 16 or 32 rows: a new batch size compiles nothing.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """What of a GPU the choice depends on."""

    sms: int
    shared: int  # bytes of shared memory that a program may have


MAX_REGISTERS = 255  # that a thread can have


class Plan(NamedTuple):
    """A schedule (scan_kernels.py) and its tiles: BB rows of the batch by BU units, K in NK tiles of BK."""

    schedule: str  # resident | persistent | stepped
    BB: int
    BU: int
    BK: int
    NK: int  # 0 where the weights are not held
    num_warps: int
    num_stages: int
    maxnreg: int | None = MAX_REGISTERS  # of a thread; None leaves them to ptxas

    @property
    def hold(self) -> bool:
        """Whether a program's slice of the weights stays on chip for all steps."""
        return self.NK > 0


# Without a GPU, under the interpreter or to compile for one: an H100.
H100 = Machine(sms=132, shared=227 << 10)
# The least shared memory of all GPUs from compute capability 8.0 on.
RTX4090 = Machine(sms=128, shared=99 << 10)


@cache
def machine(device: torch.device) -> Machine:
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.multi_processor_count, properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def power_of_two(n: int) -> int:
    """The least one that is not smaller."""
    return 1 << (n - 1).bit_length()


def choose(
    gates: int,
    hidden: int,
    size: int,
    batch: int,
    directions: int,
    backward: bool,
    machine: Machine,
) -> Plan:
    """The plan of a scan.

    Args:
        size: bytes of a value as stored.
    """
    rows = _rows(batch, size)
    units = max(16, power_of_two(hidden))
    if _columns(gates, backward) * units * units * size <= machine.shared * _RESIDENT[size]:
        return Plan("resident", 16, units, units, 1, 4 if units * size <= 64 else 8, 2)
    tiles = -(-batch // rows) * directions
    if -(-hidden // _UNITS) * tiles > machine.sms:
        return _stepped(rows, size)
    depth = -(-gates * hidden // 4) if backward else hidden  # of a product; the backward's has four parts
    block = min(128, power_of_two(depth))
    blocks = power_of_two(-(-depth // block))  # few kernels serve many H
    held = blocks * block * _UNITS * size * (4 if backward else _columns(gates, backward))
    if held <= machine.shared * _HELD and size == 2 and blocks <= _UNROLLED[rows]:
        left = (blocks, gates, backward) in _LEFT_TO_PTXAS
        return Plan("persistent", rows, _UNITS, block, blocks, 8, 2, None if left else MAX_REGISTERS)
    return _stepped(rows, size)._replace(schedule="persistent")


RECOMPUTED = 16, 64  # rows and units of a tile of the gates that recompute() makes again
_UNITS = 16
# How much of the shared memory may be weights, by the bytes of a value, and how many products a step may
# unroll, by rows: beyond that, and where fp32 unrolls, the compiler spills (benchmarks/offline).
_RESIDENT = {2: 0.3, 4: 0.05}
_HELD = 0.6
_UNROLLED = {16: 4, 32: 2}
# Left alone, ptxas spills some bytes to fit two programs on an SM, which nothing here needs. Given all
# registers, it fetches held weights so far ahead in these kernels that it spills too: (products, gates,
# backward).
_LEFT_TO_PTXAS = {(4, 1, False), (4, 4, True)}


def _rows(batch: int, size: int) -> int:
    """Of a tile: products of fp32 in more rows spill."""
    return 16 if batch <= 16 or size == 4 else 32


def _columns(gates: int, backward: bool) -> int:
    return gates if backward else power_of_two(gates)


def one_step(batch: int, size: int) -> Plan:
    """The plan of a call for a single step."""
    return _stepped(_rows(batch, size), size)


def _stepped(rows: int, size: int) -> Plan:
    return Plan("stepped", rows, _UNITS, 128 // size, 0, 8, 3)
