"""A layer backward: the scan makes the gates' gradients of all rows, then every other one is a product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import Call, Saved, Scans, call, named
from .forward import unprojected


def backward(
    scans: Scans,
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
    c = call(scans, cell, input, batch_sizes, weights, states, directions, resets)
    d_last = [torch.zeros_like(s) if g is None else g for s, g in zip(states, grad_last)]
    if not c.rows:
        zeros = [torch.zeros_like(w) if need else None for w, need in zip(weights, needs[1])]
        return torch.zeros_like(input) if needs[0] else None, zeros, list(d_last)
    kept = named(c, saved)
    out = c.by_direction(output)
    if kept.gates is None and c.cell.saved:
        kept = kept._replace(gates=scans.gates_again(c, states, out))
    d_out = None if grad_output is None else c.by_direction(grad_output)
    d_x_gates = input.new_empty((directions, c.rows, c.cell.gates * c.hidden))
    d_h_gates = torch.empty_like(d_x_gates) if c.cell.split else d_x_gates

    h, d_h, d_after = out, d_out, d_last
    weight_hr = c.stacked("hr")
    if weight_hr is not None and kept.raw is not None:
        h, d_h = kept.raw, None if d_out is None else d_out @ weight_hr
        d_after = [d_last[0] @ weight_hr, *d_last[1:]]
    d_now = torch.stack([g.float() for g in d_after])
    scans.backward(c, kept, unprojected(c, states), h, d_h, d_now, d_x_gates, d_h_gates)
    d_states, d_projected = list(d_now.to(input.dtype).unbind(0)), None
    if c.projected:
        d_states[0], d_projected = _through_weights(c, d_h_gates, d_out, d_last[0])

    d_input, d_weights = _products(c, states[0], out, kept, d_x_gates, d_h_gates, d_projected, needs)
    d_input = None if d_input is None else d_input.view(input.shape)
    found = [s.contiguous() if need else None for s, need in zip(d_states, needs[2])]
    return d_input, d_weights, found


def _through_weights(
    c: Call, d_h_gates: Tensor, d_out: Tensor | None, d_last: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the projected h before the first step [D, B, P], and of all rows [D, N, P]."""
    found = [
        _after(c, d, _unless_reset(c, d, d_h_gates[d] @ w["hh"]), d_last[d]) for d, w in enumerate(c.weights)
    ]
    starts, rows = zip(*found)
    d_projected = torch.stack(rows)
    return torch.stack(starts), d_projected if d_out is None else d_projected.add_(d_out)


def _products(
    c: Call,
    start: Tensor,
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
                    made = d_h.t() @ before(c, d, start[d], out[d])
                elif name == "hr":
                    made = d_projected[d].t() @ kept.raw[d]  # type: ignore[index]
                else:
                    made = (d_x if name == "bias_ih" else d_h).sum(0)
            d_weights.append(made)
    return d_input, d_weights


def before(c: Call, d: int, start: Tensor, h: Tensor) -> Tensor:
    """The hidden state before each row's step [N, P], from h after it and `start` before the first [B, P]."""
    if c.offsets is None:
        n = c.rows - c.batch
        found = torch.cat([start, h[:n]] if d == 0 else [h[c.batch :], start])
    else:
        found = torch.cat([h, start])[_sources(c, d, c.offsets)]
    return _unless_reset(c, d, found)


def _after(c: Call, d: int, found: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `before`: what is known of the states before all steps goes to the steps that made them.

    Args:
        found: [N, P].
        last: of the states after each sequence's last step [B, P].

    Returns:
        Of the states before the first step [B, P], and after each row's step [N, P].
    """
    if c.offsets is None:
        n = c.rows - c.batch
        if d == 0:
            return found[: c.batch], torch.cat([found[c.batch :], last])
        return found[n:], torch.cat([last, found[:n]])
    both = found.new_empty((c.rows + c.batch, found.shape[1]))
    both[_sources(c, d, c.offsets)] = found
    both[c.ends(d)[1]] = last
    return both[c.rows :], both[: c.rows]


def _unless_reset(c: Call, d: int, rows: Tensor) -> Tensor:
    """Zero in the rows before which the states are."""
    return rows if c.resets is None else rows.masked_fill_(c.resets[d, :, None], 0)


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
