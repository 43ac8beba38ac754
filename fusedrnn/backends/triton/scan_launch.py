"""The launches of a layer's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu import Call, Saved, before, precision, project_input
from . import plan
from .cells import CELLS as CELLS
from .scan_kernels import scan_bwd_kernel, scan_fwd_kernel
from .step_kernels import activate_kernel, step_fwd_kernel


def forward(c: Call, x_gates: Tensor, start: Tensor, states: Tensor, h: Tensor, saved: Saved) -> None:
    cell, strides = CELLS[c.name], h.stride()[:2]
    bias = c.stacked("bias_hh")
    _launch(
        c, False, scan_fwd_kernel, c.time,
        x_gates, c.weight_hh, bias, start, states, h, h, saved.gates, saved.cells, *strides, *strides,
        ACTIVATE=cell.activate, UPDATE=cell.update, GP=plan.power_of_two(cell.gates),
        SAVED=0 if saved.gates is None else cell.saved, HAS_BIAS=bias is not None,
        SAVE=saved.gates is not None or saved.cells is not None,
    )  # fmt: skip


def backward(
    c: Call,
    saved: Saved,
    states: Sequence[Tensor],
    h: Tensor,
    grad: Tensor | None,
    d_states: Tensor,
    d_x_gates: Tensor,
    d_h_gates: Tensor,
) -> None:
    cell, gates = CELLS[c.name], h if saved.gates is None else saved.gates
    _launch(
        c, True, scan_bwd_kernel, c.time + 1,
        c.weight_hh, gates, saved.cells, states[-1], h, states[0], grad, d_states, d_x_gates, d_h_gates,
        *gates.stride()[:2], *h.stride()[:2], *(h if grad is None else grad).stride()[:2],
        BACKWARD=cell.backward, SAVED=max(1, cell.saved), SPLIT=cell.split, READS_H=cell.reads_h,
        HAS_GRAD=grad is not None,
    )  # fmt: skip


def gates_again(c: Call, states: Sequence[Tensor], output: Tensor) -> Tensor:
    """Every step's h is known, so it is two products."""
    cell = CELLS[c.name]
    found = c.x.new_empty((c.directions, c.rows, cell.saved * c.hidden))
    x_gates, h_gates = c.x.new_empty((2, c.rows, cell.gates * c.hidden))
    rows, units = plan.RECOMPUTED
    grid = (-(-c.rows // rows), -(-c.hidden // units))
    for d, w in enumerate(c.weights):
        project_input(c, d, x_gates)
        torch.mm(before(c, d, states[0][d], output[d]), w["hh"].t(), out=h_gates)
        if "bias_hh" in w:
            h_gates += w["bias_hh"]
        activate_kernel[grid](
            x_gates, h_gates, found[d], c.rows, c.hidden,
            ACTIVATE=cell.activate, G=cell.gates, SAVED=cell.saved, BB=rows, BU=units,
        )  # fmt: skip
    return found


def step(c: Call, states: Sequence[Tensor], output: Tensor, saved: Saved) -> list[Tensor] | None:
    """In one launch, input projection included; None of two directions, a projection or resets."""
    if c.directions == 2 or c.projected or c.resets is not None:
        return None
    p, cell = plan.one_step(c.batch, c.x.element_size()), CELLS[c.name]
    last = [torch.empty_like(s) for s in states]
    w = c.weights[0]
    step_fwd_kernel[(-(-c.hidden // p.BU), -(-c.batch // p.BB))](
        c.x, w["ih"], w.get("bias_ih"), states[0], w["hh"], w.get("bias_hh"), states[-1], output, last[0],
        last[-1], saved.gates, saved.cells, c.batch, c.x.shape[1], c.hidden,
        ACTIVATE=cell.activate, UPDATE=cell.update, G=cell.gates, GP=plan.power_of_two(cell.gates),
        S=cell.states, SAVED=0 if saved.gates is None else cell.saved, HAS_BIAS="bias_ih" in w,
        KEEP=saved.cells is not None, PRECISION=_precision(), BB=p.BB, BU=p.BU, BK=p.BK,
        num_warps=p.num_warps, num_stages=p.num_stages, maxnreg=p.maxnreg,
    )  # fmt: skip
    return last


def _precision() -> str:
    return "tf32" if precision() == "tf32" else "ieee"


def _planned(c: Call, backward: bool) -> plan.Plan:
    size = c.x.element_size()
    if c.time == 1:
        return plan.one_step(c.batch, size)
    machine = plan.machine(c.x.device)
    return plan.choose(c.cell.gates, c.hidden, size, c.batch, c.directions, backward, machine)


def _launch(c: Call, backward: bool, kernel: Any, steps: int, *args: Any, **constants: Any) -> None:
    """All steps in one launch, or one after the other."""
    p = _planned(c, backward)
    grid = (-(-c.hidden // p.BU), -(-c.batch // p.BB), c.directions)
    persistent = p.schedule == "persistent"
    options = {"launch_cooperative_grid": True} if persistent else {}
    # Of the barriers; zeros, because they only grow
    counters = c.x.new_zeros(grid[1] * grid[2], dtype=torch.int32) if persistent else None
    count = 1 if p.schedule == "stepped" else steps
    for first in range(0, steps, count):
        kernel[grid](
            *args,
            None if c.resets is None else c.resets.view(torch.uint8),
            c.offsets,
            c.lengths,
            counters,
            c.rows,
            c.time,
            c.batch,
            c.hidden,
            c.hidden,
            first,
            count,
            G=c.cell.gates,
            S=c.cell.states,
            RESETS=c.resets is not None,
            RAGGED=c.offsets is not None,
            RESIDENT=p.schedule == "resident",
            PERSISTENT=persistent,
            HOLD=p.hold,
            PRECISION=_precision(),
            BB=p.BB,
            BU=p.BU,
            BK=p.BK,
            NK=p.NK,
            num_warps=p.num_warps,
            num_stages=p.num_stages,
            maxnreg=p.maxnreg,
            **constants,
            **options,
        )
