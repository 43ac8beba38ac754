"""The shorter ways: what one call of C++ can look at, and often run, before Python checks anything.

Each answers None to what it does not know. The ordinary way, in `functional`, then runs and raises what there
is to raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import _VF, Tensor

from . import autograd, ops, stack
from .backends import hand_over, select
from .cells import CELLS
from .operators import any_grad


def layers(
    cell: str,
    input: Any,
    batch_sizes: Any,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """A stack whose arguments C++ finds to be sound: what a function of `functional` returns;
    None for any others.

    That look takes a few microseconds, the general one below tens. Where no derivative is wanted the same
    call of C++ makes the results.

    Args:
        hx: as in :func:`fusedrnn.functional.lstm`, or None for zeros.
        dropout: between layers; 0 outside training.
    """
    if not _is_plain(input) or torch._C._is_any_autocast_enabled():
        return None
    wanted = select.requested()
    kernels = _kernels(cell, wanted)
    if kernels is None or len(params) < 2 or not isinstance(params[1], Tensor) or params[1].dim() != 2:
        return None
    in_pair = isinstance(hx, (list, tuple))
    if in_pair and len(CELLS[cell].states) == 1:
        return None
    states: Any = hx if in_pair else () if hx is None else (hx,)
    watched = torch.is_grad_enabled() and any(
        getattr(t, "requires_grad", False) for t in (input, *states, *params)
    )
    call = batch_sizes, hx, params, has_biases, num_layers, bidirectional, batch_first
    if batch_sizes is None:
        if input.dim() != 3:
            return None
        time, batch = input.shape[:2] if not batch_first else input.shape[1::-1]
    else:
        if type(batch_sizes) is not Tensor or batch_sizes.dim() != 1 or not batch_sizes.shape[0]:
            return None
        time, batch = batch_sizes.shape[0], int(batch_sizes[0])
    hidden = params[1].shape[0] // len(CELLS[cell].gates)
    reason = None
    if wanted is None:
        reason = hand_over.reason(cell, "cpu", input.dtype, time, batch, hidden, watched)
    draws = dropout != 0 and num_layers > 1
    if reason is None and not watched and not draws:
        if time == 1 and num_layers == 1 and batch_sizes is None and not bidirectional:
            given = states or _zeros(cell, input, params, 1, batch)
            if len(params) == (4 if has_biases else 2):
                made = kernels.one_step(cell, input, given, params, True)
                if made is not None:
                    return made  # type: ignore[no-any-return]
        made = kernels.stack(cell, input, *call, False)
        if made is not None and batch_first:
            return (made[0].transpose(0, 1), *made[1:])
        return made  # type: ignore[no-any-return]

    if kernels.stack(cell, input, *call, True) is None:
        return None
    directions = 2 if bidirectional else 1
    if not states:
        states = _zeros(cell, input, params, num_layers * directions, batch)
    if reason is not None:
        hx = states if len(states) == 2 else states[0]
        rest = has_biases, num_layers, dropout, watched or draws, bidirectional
        if batch_sizes is None:
            return getattr(_VF, cell)(input, hx, params, *rest, batch_first)  # type: ignore[no-any-return]
        return getattr(_VF, cell)(input, batch_sizes, hx, params, *rest)  # type: ignore[no-any-return]
    if batch_first:
        input = input.transpose(0, 1)

    def one_by_one(input: Tensor, params: Sequence[Tensor], states: Sequence[Tensor]) -> Any:
        return stack.layers(
            input, batch_sizes, params, states, cell, directions, num_layers, dropout, "native", None
        )

    if num_layers > 1 and not draws and not bidirectional and batch_sizes is None:
        output, last = ops.layers(input, params, states, cell, num_layers, one_by_one)
    else:
        output, last = one_by_one(input, params, states)
    return (output.transpose(0, 1) if batch_first else output, *last)


def _zeros(cell: str, input: Tensor, params: Sequence[Tensor], runs: int, batch: int) -> tuple[Tensor, ...]:
    """The states that a missing hx stands for."""
    spec = CELLS[cell]
    widths = (params[1].shape[1], params[1].shape[0] // len(spec.gates))
    return tuple(input.new_zeros(runs, batch, width) for width in widths[: len(spec.states)])


def _is_plain(input: Any) -> bool:
    """Whether a call is eager, of a plain tensor in the CPU's memory, and nothing but autograd looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(input) is Tensor
        and input.is_cpu
        and not autograd.transformed()
    )


def one_step(
    cell: str, input: Any, states: Sequence[Any], params: Sequence[Any]
) -> tuple[Tensor, ...] | None:
    """The states after a single step of a cell that nobody looks on at; None where nothing has been done."""
    if not _is_plain(input):
        return None
    kernels = _kernels(cell, select.requested())
    if kernels is None or len(states) != len(CELLS[cell].states):
        return None
    if torch.is_grad_enabled() and any_grad((input, *states, *params)):
        return None
    return kernels.one_step(cell, input, states, params, False)  # type: ignore[no-any-return]


@cache
def _kernels(cell: str, wanted: str | None) -> Any:
    """The backend that reads tensors by itself, unless another was asked for."""
    if wanted not in (None, "native"):
        return None
    if select.against("native", select.Request(cell, torch.float32, "cpu")) is not None:
        return None
    return select.kernels("native", "layer")
