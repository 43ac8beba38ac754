"""A layer backward: the scan makes the gates' gradients of all rows, then every other one is a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import plan
from .call import Call, Saved, call, named
from .forward import project_input
from .scan import scan_bwd_kernel
from .step import activate_kernel


def backward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    output: Tensor,
    saved: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    resets: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of `input`, `weights` and `states`, in their order; None where not needed.

    Reads `saved` and leaves it as it is.
    """
    c = call(cell, input, batch_sizes, weights, states, directions, resets, True)
    d_last = [torch.zeros_like(s) if g is None else g for s, g in zip(states, grad_last)]
    if not c.rows:
        zeros = [torch.zeros_like(w) if need else None for w, need in zip(weights, needs[1])]
        return torch.zeros_like(input) if needs[0] else None, zeros, list(d_last)
    kept = named(c, saved)
    out = output.view(c.rows, -1)
    if kept.gates is None and c.cell.saved:
        kept = kept._replace(gates=_gates_again(c, states[0], out))
    d_out = None if grad_output is None else grad_output.view(c.rows, -1)
    d_x_gates = input.new_empty((directions, c.rows, c.cell.gates * c.hidden))
    d_h_gates = torch.empty_like(d_x_gates) if c.cell.split else d_x_gates
    d_projected = None
    if c.projected:
        d_states, d_projected = _scan_projected(c, kept, states, d_out, d_last, d_x_gates)
    else:
        d_now = torch.stack([g.float() for g in d_last])
        _scan(c, kept, states, out, d_out, d_now, d_x_gates, d_h_gates)
        d_states = list(d_now.to(input.dtype).unbind(0))

    d_input, d_weights = _products(c, states, out, kept, d_x_gates, d_h_gates, d_projected, needs)
    d_input = None if d_input is None else d_input.view(input.shape)
    found = [s.contiguous() if need else None for s, need in zip(d_states, needs[2])]
    return d_input, d_weights, found


def _launch_backward(
    c: Call,
    kept: Saved,
    states: Sequence[Tensor],
    out: Tensor,
    grad: Tensor | None,
    grad_strides: tuple[int, int],
    d_now: Tensor,
    d_x_gates: Tensor,
    d_h_gates: Tensor,
    first: int,
    count: int,
) -> None:
    width = out.shape[1]
    by_output = c.cell.saved == 0  # the output says it all
    saved_strides = (
        (c.proj, width) if by_output else (c.rows * c.cell.saved * c.hidden, c.cell.saved * c.hidden)
    )
    c.launch(
        scan_bwd_kernel, first, count,
        c.weight_hh, out if by_output else kept.gates, kept.cells, states[-1], out, states[0], grad, d_now,
        d_x_gates, d_h_gates, *saved_strides, c.proj, width, *grad_strides,
        BACKWARD=c.cell.backward, SAVED=max(1, c.cell.saved), SPLIT=c.cell.split, READS_H=c.cell.reads_h,
        HAS_GRAD=grad is not None, RECURRENT=not c.projected,
    )  # fmt: skip


def _scan(
    c: Call,
    kept: Saved,
    states: Sequence[Tensor],
    out: Tensor,
    d_out: Tensor | None,
    d_now: Tensor,
    d_x_gates: Tensor,
    d_h_gates: Tensor,
) -> None:
    """Fills d_x_gates and d_h_gates; d_now goes from the last states' gradients to the first ones'."""
    steps = [(0, c.time + 1)]
    if c.plan.schedule == "stepped":
        steps = [(i, 1) for i in range(c.time + 1)]
    for first, count in steps:
        _launch_backward(
            c, kept, states, out, d_out, (c.proj, out.shape[1]), d_now, d_x_gates, d_h_gates, first, count
        )


def _scan_projected(
    c: Call,
    kept: Saved,
    states: Sequence[Tensor],
    d_out: Tensor | None,
    d_last: Sequence[Tensor],
    d_x_gates: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """As `_scan`, with two products a step; also the gradient of the projected h of all rows [D, N, P]."""
    d_h = d_last[0].clone()
    d_now = torch.stack([torch.zeros_like(d_last[1]), *d_last[1:]]).float()
    d_projected = c.x.new_empty((c.directions, c.rows, c.proj))
    d_raw = c.x.new_empty((c.directions, c.rows, c.hidden))
    for i in range(c.time):
        times = c.times(c.time - 1 - i)
        for d, t in enumerate(times):
            rows = c.step(t)
            d_step = d_h[d, : rows.stop - rows.start]
            if d_out is not None:
                d_step = d_step + d_out[rows, d * c.proj : (d + 1) * c.proj]
            d_projected[d, rows] = d_step
            torch.mm(d_step, c.weights[d]["hr"], out=d_raw[d, rows])
        _launch_backward(
            c, kept, states, c.x, d_raw, (c.rows * c.hidden, c.hidden), d_now, d_x_gates, d_x_gates, i, 1
        )
        for d, t in enumerate(times):
            rows = c.step(t)
            d_step = d_h[d, : rows.stop - rows.start]
            torch.mm(d_x_gates[d, rows], c.weight_hh[d], out=d_step)
            if c.resets is not None:
                d_step.masked_fill_(c.resets[d, rows, None], 0)
    return [d_h, *d_now[1:].to(d_h.dtype)], d_projected


def _products(
    c: Call,
    states: Sequence[Tensor],
    out: Tensor,
    kept: Saved,
    d_x_gates: Tensor,
    d_h_gates: Tensor,
    d_projected: Tensor | None,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the input and of the weights, each one product over all rows."""
    d_input = None
    d_weights: list[Tensor | None] = []
    wanted = iter(needs[1])
    for d, w in enumerate(c.weights):
        d_x, d_h = d_x_gates[d], d_h_gates[d]
        if needs[0]:
            d_input = d_x @ w["ih"] if d_input is None else d_input.addmm_(d_x, w["ih"])
        for name in w:
            made = None
            if next(wanted):
                if name == "ih":
                    made = d_x.t() @ c.x
                elif name == "hh":
                    made = d_h.t() @ _before(c, d, states[0], out)
                elif name == "hr":
                    made = d_projected[d].t() @ kept.raw[d]  # type: ignore[index]
                else:
                    made = (d_x if name == "bias_ih" else d_h).sum(0)
            d_weights.append(made)
    return d_input, d_weights


def _gates_again(c: Call, start: Tensor, out: Tensor) -> Tensor:
    """What `forward` saves of the gates [D, N, SAVED*H]: every step's h is known, so it is two products."""
    gates = c.cell.gates * c.hidden
    found = c.x.new_empty((c.directions, c.rows, c.cell.saved * c.hidden))
    x_gates, h_gates = c.x.new_empty((2, c.rows, gates))
    rows, units = plan.RECOMPUTED
    grid = (-(-c.rows // rows), -(-c.hidden // units))
    for d, w in enumerate(c.weights):
        project_input(c, d, x_gates)
        torch.mm(_before(c, d, start, out), w["hh"].t(), out=h_gates)
        if "bias_hh" in w:
            h_gates += w["bias_hh"]
        activate_kernel[grid](
            x_gates, h_gates, found[d], c.rows, c.hidden,
            ACTIVATE=c.cell.activate, G=c.cell.gates, SAVED=c.cell.saved, BB=rows, BU=units,
        )  # fmt: skip
    return found


def _before(c: Call, d: int, start: Tensor, out: Tensor) -> Tensor:
    """The hidden state before each row's step [N, P]."""
    h = out[:, d * c.proj : (d + 1) * c.proj]
    if c.offsets is None:
        n = c.rows - c.batch
        before = torch.cat([start[d], h[:n]] if d == 0 else [h[c.batch :], start[d]])
    else:
        before = torch.cat([h, start[d]])[_sources(c, d, c.offsets)]
    return before if c.resets is None else before.masked_fill_(c.resets[d, :, None], 0)


def _sources(c: Call, d: int, offsets: Tensor) -> Tensor:
    """Where each row's h comes from [N]: a row of the output, or N + b, the state before the first step."""
    sizes = offsets.diff()
    steps = torch.arange(c.time, device=sizes.device).repeat_interleave(sizes, output_size=c.rows)
    b = torch.arange(c.rows, device=sizes.device) - offsets[steps]
    if d == 0:
        inside, source = steps > 0, offsets[(steps - 1).clamp(min=0)] + b
    else:
        after = (steps + 1).clamp(max=c.time - 1)
        inside, source = (steps + 1 < c.time) & (b < sizes[after]), offsets[after] + b
    return torch.where(inside, source, c.rows + b)
