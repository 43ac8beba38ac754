"""A layer forward. The input projection of all steps is one product, the vendor's GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan
from .call import Call, Saved, call, named, precision, saved_tensors, stacked
from .scan import scan_fwd_kernel
from .step import step_fwd_kernel


def forward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    save: int,
    resets: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer. Shapes: docs/architecture.md, "The layer". Everything is contiguous."""
    c = call(cell, input, batch_sizes, weights, states, directions, resets, False)
    output = input.new_empty((*input.shape[:-1], directions * c.proj))
    kept, tensors = Saved(None, None, None), []
    if save:
        found = saved_tensors(cell, directions, c.rows, c.hidden, c.projected, input.dtype, save)
        tensors = [input.new_empty(shape, dtype=dtype) for shape, dtype in found]
        kept = named(c, tensors)
    if not c.rows:
        return output, [s.clone() for s in states], tensors
    if c.time == directions == 1 and not c.projected and resets is None:
        return output, _step(c, states, output, kept), tensors

    x_gates = input.new_empty((directions, c.rows, c.cell.gates * c.hidden))
    for d, made in enumerate(x_gates):
        project_input(c, d, made)
    bias = stacked(c.weights, "bias_hh") if "bias_hh" in c.weights[0] else None
    out = output.view(c.rows, -1)
    width = out.shape[1]
    if c.projected:
        # h lives in the output; the kernel makes what is projected to it, and reads no h of its own
        made = input.new_empty((directions, c.rows, c.hidden)) if kept.raw is None else kept.raw
        now = torch.stack([torch.zeros_like(states[1]), *states[1:]]).float()
        strides = (c.proj, width, c.rows * c.hidden, c.hidden)
    else:
        made, now, strides = out, torch.stack([s.float() for s in states]), (c.proj, width, c.proj, width)

    def scan(first: int, count: int) -> None:
        c.launch(
            scan_fwd_kernel, first, count,
            x_gates, c.weight_hh, bias, states[0], now, out, made, kept.gates, kept.cells, *strides,
            ACTIVATE=c.cell.activate, UPDATE=c.cell.update, GP=plan.power_of_two(c.cell.gates),
            SAVED=0 if kept.gates is None else c.cell.saved, HAS_BIAS=bias is not None, SAVE=bool(save),
        )  # fmt: skip

    if c.plan.schedule != "stepped":
        scan(0, c.time)
    else:
        for i in range(c.time):
            scan(i, 1)
            if c.projected:
                for d, t in enumerate(c.times(i)):
                    columns = slice(d * c.proj, (d + 1) * c.proj)
                    out[c.step(t), columns] = made[d, c.step(t)] @ c.weights[d]["hr"].t()
    last = [s.to(input.dtype, copy=True) for s in now]
    if c.projected:
        last[0] = _last_rows(c, out)
    return output, last, tensors


def project_input(c: Call, d: int, out: Tensor) -> None:
    """The input's half of a direction's gates, of all rows [N, G*H]."""
    w = c.weights[d]
    if "bias_ih" in w:
        torch.addmm(w["bias_ih"], c.x, w["ih"].t(), out=out)
    else:
        torch.mm(c.x, w["ih"].t(), out=out)


def _step(c: Call, states: Sequence[Tensor], output: Tensor, kept: Saved) -> list[Tensor]:
    """One step of one direction in one launch, input projection included."""
    p = c.plan
    last = [torch.empty_like(s) for s in states]
    w = c.weights[0]
    step_fwd_kernel[(-(-c.hidden // p.BU), -(-c.batch // p.BB))](
        c.x, w["ih"], w.get("bias_ih"), states[0], w["hh"], w.get("bias_hh"), states[-1], output, last[0],
        last[-1], kept.gates, kept.cells, c.batch, c.x.shape[1], c.hidden,
        ACTIVATE=c.cell.activate, UPDATE=c.cell.update, G=c.cell.gates, GP=plan.power_of_two(c.cell.gates),
        S=c.cell.states, SAVED=0 if kept.gates is None else c.cell.saved, HAS_BIAS="bias_ih" in w,
        KEEP=kept.cells is not None, PRECISION=precision(), BB=p.BB, BU=p.BU, BK=p.BK,
        num_warps=p.num_warps, num_stages=p.num_stages, maxnreg=p.maxnreg,
    )  # fmt: skip
    return last


def _last_rows(c: Call, out: Tensor) -> Tensor:
    """The output of every sequence's last step [D, B, P]."""
    ends = torch.arange(c.batch, device=out.device)
    if c.offsets is None or c.lengths is None:
        last = ends + (c.time - 1) * c.batch
    else:
        last = ends + c.offsets[c.lengths - 1]
    found = [out[rows, d * c.proj : (d + 1) * c.proj] for d, rows in enumerate((last, ends)[: c.directions])]
    return torch.stack(found)
