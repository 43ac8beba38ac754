"""The layer in plain torch: the time loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...cells import CELLS
from . import autograd_on


def unsupported(cell: str, dtype: torch.dtype, device_type: str, hidden: int | None = None) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating dtype"


def saved_tensors(
    cell: str, directions: int, rows: int, hidden: int, proj: bool, dtype: torch.dtype, save: int, device: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return []  # its backward recomputes


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    resets: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """One layer, all its directions. Shapes: docs/architecture.md, "The layer".

    fp16 and bf16 are computed in fp32 and rounded once, at the end.
    """
    storage = input.dtype
    if storage in (torch.float16, torch.bfloat16):
        output, last = layer(
            cell,
            input.float(),
            batch_sizes,
            [w.float() for w in weights],
            [s.float() for s in states],
            directions,
            resets,
        )
        return output.to(storage), [s.to(storage) for s in last]

    per_direction = len(weights) // directions
    runs = [
        _scan(
            cell,
            input,
            batch_sizes,
            weights[d * per_direction : (d + 1) * per_direction],
            [s[d] for s in states],
            None if resets is None else resets[d],
            reverse=d == 1,
        )
        for d in range(directions)
    ]
    output = torch.cat([run[0] for run in runs], -1) if directions == 2 else runs[0][0]
    last = [torch.stack(columns) for columns in zip(*(run[1] for run in runs))]
    return output, last


def _scan(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    start: Sequence[Tensor],
    resets: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, list[Tensor]]:
    step = CELLS[cell].step
    has_bias, has_proj = len(weights) >= 4, len(weights) in (3, 5)
    weight_ih, weight_hh = weights[0].t(), weights[1].t()
    bias_ih, bias_hh = (weights[2], weights[3]) if has_bias else (None, None)
    weight_hr = weights[-1].t() if has_proj else None

    x_gates = input @ weight_ih
    if bias_ih is not None:
        x_gates = x_gates + bias_ih
    if batch_sizes is None:
        xs = x_gates.unbind(0)
        sizes = [int(start[0].shape[0])] * len(xs)
    else:
        sizes = batch_sizes.tolist()
        xs = x_gates.split(sizes)
    fresh = None if resets is None else resets[:, None].split(sizes)

    # Row b of a ragged batch ends at its own last step. Going forward the batch shrinks and ended
    # rows leave their states behind; in reverse it grows and rows enter with their initial state.
    states = tuple(s[: sizes[-1 if reverse else 0]] for s in start)
    ended: list[tuple[Tensor, ...]] = []
    outputs: list[Tensor] = []
    for t in range(len(xs) - 1, -1, -1) if reverse else range(len(xs)):
        rows, size = int(states[0].shape[0]), sizes[t]
        if size < rows:
            ended.append(tuple(s[size:] for s in states))
            states = tuple(s[:size] for s in states)
        elif size > rows:
            states = tuple(torch.cat([s, s0[rows:size]]) for s, s0 in zip(states, start))
        if fresh is not None:
            states = tuple(s.masked_fill(fresh[t], 0) for s in states)
        h_gates = states[0] @ weight_hh
        if bias_hh is not None:
            h_gates = h_gates + bias_hh
        states = step(xs[t], h_gates, states)
        if weight_hr is not None:
            states = (states[0] @ weight_hr, *states[1:])
        outputs.append(states[0])
    if reverse:
        outputs.reverse()
    ended.append(states)
    last = [torch.cat(parts[::-1]) for parts in zip(*ended)]
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), last


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
    output, last = layer(cell, input, batch_sizes, weights, states, directions, resets)
    return output, last, []


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
    with autograd_on():
        leaves = [t.detach().requires_grad_() for t in (input, *weights, *states)]
        w, s = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        out, last = layer(cell, leaves[0], batch_sizes, w, s, directions, resets)
        pairs = [(o, g) for o, g in zip((out, *last), (grad_output, *grad_last)) if g is not None]
        wanted = [leaf for leaf, need in zip(leaves, (needs[0], *needs[1], *needs[2])) if need]
        grads = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs and wanted
            else [None] * len(wanted)
        )
    found = [next(grads) if need else None for need in (needs[0], *needs[1], *needs[2])]
    return found[0], list(found[1 : 1 + len(weights)]), list(found[1 + len(weights) :])
