"""A layer forward. The input projection of all steps is one product, the vendor's GEMM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call, Saved, Scans, call, named, saved_tensors


def forward(
    scans: Scans,
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
    c = call(scans, cell, input, batch_sizes, weights, states, directions, resets)
    output = input.new_empty((*input.shape[:-1], directions * c.proj))
    kept, tensors = Saved(None, None, None), []
    if save:
        found = saved_tensors(c.cell, directions, c.rows, c.hidden, c.projected, input.dtype, save)
        tensors = [input.new_empty(shape, dtype=dtype) for shape, dtype in found]
        kept = named(c, tensors)
    if not c.rows:
        return output, [s.clone() for s in states], tensors
    if c.time == 1 and (stepped := scans.step(c, states, output, kept)) is not None:
        return output, stepped, tensors
    h = out = c.by_direction(output)
    if c.projected:
        h = input.new_empty((directions, c.rows, c.hidden)) if kept.raw is None else kept.raw
    x_gates, start, now = prepared(c, states)
    scans.forward(c, x_gates, start, now, h, kept)
    last = [s.to(input.dtype, copy=True) for s in now]
    if c.projected:
        for d, w in enumerate(c.weights):
            out[d] = h[d] @ w["hr"].t()
        last[0] = torch.stack([out[d, c.ends(d)[1]] for d in range(directions)])
    return output, last, tensors


def prepared(c: Call, states: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a forward scan starts from: `x_gates`, `start` and `states` of Scans.forward."""
    x_gates = c.x.new_empty((c.directions, c.rows, c.cell.gates * c.hidden))
    for d, w in enumerate(c.weights):
        project_input(c, d, x_gates[d])
        if c.projected:  # the first state is projected already: its product is not the scan's
            first, _ = c.ends(d)
            start = states[0][d]
            if c.resets is not None:
                start = start.masked_fill(c.resets[d, first, None], 0)
            x_gates[d, first] += start @ w["hh"].t()
    before = unprojected(c, states)
    return x_gates, before[0], torch.stack([s.float() for s in before])


def unprojected(c: Call, states: Sequence[Tensor]) -> list[Tensor]:
    """The states before a scan's first step, each [D, B, H]."""
    return [torch.zeros_like(states[1]) if c.projected else states[0], *states[1:]]


def project_input(c: Call, d: int, out: Tensor) -> None:
    """The input's half of a direction's gates, of all rows [N, G*H]."""
    w = c.weights[d]
    if "bias_ih" in w:
        torch.addmm(w["bias_ih"], c.x, w["ih"].t(), out=out)
    else:
        torch.mm(c.x, w["ih"].t(), out=out)
