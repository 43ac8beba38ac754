"""A layer forward. The input projection of all steps is one product, the vendor's GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan
from .call import Call, Saved, call, named, saved_tensors, stacked
from .scan import scan_fwd_kernel


def forward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    save: bool,
    resets: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer. Shapes: docs/architecture.md, "The layer". Everything is contiguous.

    Args:
        resets: uint8 ``[N]``: the states are zero before the step of these rows.
    """
    c = call(cell, input, batch_sizes, weights, states, directions, resets, False)
    output = input.new_empty((*input.shape[:-1], directions * c.proj))
    found = saved_tensors(cell, directions, c.rows, c.hidden, c.projected, input.dtype)
    tensors = [input.new_empty(shape, dtype=dtype) for shape, dtype in found] if save else []
    if not c.rows:
        return output, [s.clone() for s in states], tensors
    kept = named(c, tensors) if save else Saved(None, None, None)

    x_gates = input.new_empty((directions, c.rows, c.cell.gates * c.hidden))
    for w, made in zip(c.weights, x_gates):
        if "bias_ih" in w:
            torch.addmm(w["bias_ih"], c.x, w["ih"].t(), out=made)
        else:
            torch.mm(c.x, w["ih"].t(), out=made)
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
            SAVED=c.cell.saved, HAS_BIAS=bias is not None, SAVE=save,
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
    last = list(now.to(input.dtype).unbind(0))
    if c.projected:
        last[0] = _last_rows(c, out)
    return output, [s.clone() for s in last], tensors


def _last_rows(c: Call, out: Tensor) -> Tensor:
    """The output of every sequence's last step [D, B, P]."""
    ends = torch.arange(c.batch, device=out.device)
    if c.offsets is None or c.lengths is None:
        last = ends + (c.time - 1) * c.batch
    else:
        last = ends + c.offsets[c.lengths - 1]
    found = [out[rows, d * c.proj : (d + 1) * c.proj] for d, rows in enumerate((last, ends)[: c.directions])]
    return torch.stack(found)
