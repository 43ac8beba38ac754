"""Every kernel that `plan` can pick, as a compiler needs it: no GPU, no tensors (benchmarks/offline)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import plan
from .cells import CELLS, Cell
from .scan import ANY, scan_bwd_kernel, scan_fwd_kernel

_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_HIDDEN = (16, 32, 64, 128, 256, 512, 1024, 2048)


class Instance(NamedTuple):
    """A kernel to compile; pointers are aligned to 16 bytes, H and the strides multiples of 16."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    cooperative: bool
    matrix: bool  # its products must be matrix instructions


def instances() -> Iterator[Instance]:
    """Each once, but for those whose machine code differs from another's in a type or in an activation.

    What rnn_relu, fp16 and tf32 have of their own shows in one cell or dtype. Ragged input with resets is
    the larger kernel, dense input the faster one. A smaller GPU picks among the same kernels.
    """
    yield from _of("lstm", "bf16", "", (False, True))
    yield from _of("lstm", "fp32", "ieee", (True,))
    yield from _of("lstm", "fp32", "tf32", (True,))
    yield from _of("gru", "bf16", "", (True,))
    yield from _of("gru", "fp32", "ieee", (True,))
    yield from _of("rnn_tanh", "fp16", "", (True,))
    yield from _of("rnn_relu", "fp32", "tf32", (True,))


def _of(cell: str, dtype: str, precision: str, layouts: tuple[bool, ...]) -> Iterator[Instance]:
    gates, size = CELLS[cell].gates, _SIZES[dtype]
    for backward in (False, True):
        plans = {
            plan.choose(gates, hidden, size, batch, 1, False, backward, plan.H100): None
            for hidden in _HIDDEN
            for batch in (16, 32)
        }
        for p in plans:
            for ragged in layouts:
                yield _instance(cell, dtype, p, precision, ragged, backward)


def _instance(cell: str, dtype: str, p: plan.Plan, precision: str, ragged: bool, backward: bool) -> Instance:
    spec = CELLS[cell]
    pass_ = "backward" if backward else "forward"
    tiles = f"{p.schedule} {p.BB}x{p.BU}x{p.BK}" + (f" held x{p.NK}" if p.hold else "")
    name = f"{pass_} {cell} {dtype} {precision} {tiles} {'ragged' if ragged else 'dense'}"
    persistent = p.schedule == "persistent"
    kernel = scan_bwd_kernel if backward else scan_fwd_kernel
    pointers = (_backward if backward else _forward)(spec, f"*{dtype}")
    constants: dict[str, object] = {
        **(_backward_constants if backward else _forward_constants)(spec),
        "G": spec.gates,
        "S": spec.states,
        "RESETS": ragged,
        "RAGGED": ragged,
        "RESIDENT": p.schedule == "resident",
        "PERSISTENT": persistent,
        "HOLD": p.hold,
        "PRECISION": precision or "ieee",
        "BB": p.BB,
        "BU": p.BU,
        "BK": p.BK,
        "NK": p.NK,
    }
    if ragged:
        pointers |= {"resets_ptr": "*u8", "offsets_ptr": "*i64", "lengths_ptr": "*i64"}
    if persistent:
        pointers["counters_ptr"] = "*i32"
    signature = {}
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = pointers[argument]
        elif argument in constants or argument.endswith("_ptr"):
            signature[argument] = "constexpr"
            constants.setdefault(argument, None)
        else:
            signature[argument] = "i32" if argument in ANY else "i32:16"
    return Instance(
        " ".join(name.split()),
        kernel,
        signature,
        constants,
        p.num_warps,
        p.num_stages,
        p.maxnreg,
        persistent,
        precision != "ieee",
    )


def _forward(cell: Cell, t: str) -> dict[str, str]:
    names = ["x_gates_ptr", "weight_ptr", "bias_ptr", "start_ptr", "h_ptr", "output_ptr"]
    names += ["saved_ptr"] if cell.saved else []
    return dict.fromkeys(names, t) | _fp32(cell, "states_ptr")


def _backward(cell: Cell, t: str) -> dict[str, str]:
    names = ["weight_ptr", "saved_ptr", "cells0_ptr", "h_ptr", "start_ptr", "grad_ptr", "d_x_gates_ptr"]
    return dict.fromkeys([*names, "d_h_gates_ptr"], t) | _fp32(cell, "d_states_ptr")


def _fp32(cell: Cell, states: str) -> dict[str, str]:
    return {states: "*fp32"} | ({"cells_ptr": "*fp32"} if cell.states > 1 else {})


def _forward_constants(cell: Cell) -> dict[str, object]:
    return {
        "ACTIVATE": cell.activate,
        "UPDATE": cell.update,
        "GP": plan.power_of_two(cell.gates),
        "SAVED": cell.saved,
        "HAS_BIAS": True,
        "SAVE": True,
    }


def _backward_constants(cell: Cell) -> dict[str, object]:
    return {
        "BACKWARD": cell.backward,
        "SAVED": max(1, cell.saved),
        "SPLIT": cell.split,
        "READS_H": cell.reads_h,
        "HAS_GRAD": True,
        "RECURRENT": True,
    }
