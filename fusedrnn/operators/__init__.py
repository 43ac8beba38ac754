"""The torch.library operators of namespace `fusedrnn`, a file each, and what they share.

A file holds the schemas of an operation and of its gradient, launches, fakes, and autograd of every
order. This is what torch.compile and torch.export record.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Grads = list[Tensor | None]

lib = torch.library.Library("fusedrnn", "DEF")


def without_autocast(launch: Callable[..., Any]) -> Callable[..., Any]:
    """The dtype was settled when the call was made; backward() may run inside somebody's autocast."""

    @functools.wraps(launch)
    def wrapper(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return launch(*args)
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        with torch.autocast(device_type, enabled=False):
            return launch(*args)

    return wrapper


def any_grad(*groups: Sequence[Tensor | None]) -> bool:
    return any(t is not None and t.requires_grad for group in groups for t in group)


def first_order(
    reference: Callable[..., Sequence[Tensor]],
    heads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
) -> Grads:
    """The gradient of an operation as differentiable torch code: a tensor per one of ``tensors``, or None.

    Arguments: as of :func:`second_order`.
    """
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        inputs = [_alias(t) for t in tensors]
        return _gradients(reference(*inputs), heads, inputs, needs)


def second_order(
    reference: Callable[..., Sequence[Tensor]],
    heads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> tuple[Grads, Grads]:
    """The gradient of an operation's gradient, by the reference: differentiate its first order.

    Args:
        reference: the operation as differentiable torch code, of ``tensors``.
        heads: the gradients of its outputs that the first order started from.
        needs: which of ``tensors`` the first order was asked for.
        grads: of the first order, one per tensor.

    Returns:
        The gradients of ``heads`` and of ``tensors``.
    """

    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        starts = [None if t is None else _alias(t) for t in heads]
        inputs = [_alias(t) for t in tensors]
        first = [g for g, need in zip(_gradients(reference(*inputs), starts, inputs, needs), needs) if need]
        kept = [
            (f, g)
            for f, g in zip(first, [g for g, need in zip(grads, needs) if need])
            if f is not None and g is not None
        ]
        present = [start for start in starts if start is not None]
        flat = [*present, *inputs]
        found: Grads = [None] * len(flat)
        if kept:
            found = list(
                torch.autograd.grad(
                    [f for f, _ in kept], flat, [g for _, g in kept],
                    create_graph=torch.is_grad_enabled() and any_grad(heads, tensors, grads),
                    allow_unused=True,
                )
            )  # fmt: skip
    of_starts = iter(found[: len(present)])
    return [None if s is None else next(of_starts) for s in starts], found[len(present) :]


def _alias(t: Tensor) -> Tensor:
    # So that only the direct dependence on each argument counts even where one argument was
    # computed from another, and so that the third order reaches the originals.
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def _gradients(
    outputs: Sequence[Tensor], heads: Sequence[Tensor | None], inputs: Sequence[Tensor], needs: Sequence[bool]
) -> Grads:
    """Differentiable gradients of the needed inputs, None for the others."""
    pairs = [(out, head) for out, head in zip(outputs, heads) if head is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            [t for t, need in zip(inputs, needs) if need],
            [head for _, head in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
    return [next(found) if need else None for need in needs]
