"""The projections around attention: torch's product, or on a CPU our own where that is measured faster."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import autograd
from .backends import hand_over, select
from .operators import any_grad

Optional = Tensor | None


def linear(input: Tensor, weight: Tensor, bias: Optional = None) -> Tensor:
    """``input @ weight.T + bias``, as :func:`torch.nn.functional.linear` has it, with its results and errors.

    Args:
        input: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
    """
    if _is_ours(input, weight):
        if torch.is_grad_enabled() and any_grad((input, weight, bias)):
            return _Linear.apply(input, weight, bias)  # type: ignore[no-any-return]
        return _forward(input, weight, bias, keep=type(weight) is nn.Parameter)
    return F.linear(input, weight, bias)


def projected(layer: nn.Module, input: Tensor) -> Tensor:
    """What a layer makes of an input ``[..., I]``, whatever a user has put in the place of a Linear."""
    return linear(input, layer.weight, layer.bias) if is_plain(layer) else layer(input)  # type: ignore[arg-type]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a Linear, and no more happens when it is called."""
    return type(layer) is nn.Linear and not _is_watched(layer)


def is_product(layer: nn.Module) -> bool:
    """Whether calling a layer is the product of its weight, parametrized or not, and no more happens."""
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return is_linear and not _is_watched(layer)


def _is_watched(layer: nn.Module) -> bool:
    return bool(
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or nn.modules.module._has_any_global_hook()
    )


def _is_ours(input: Any, weight: Any) -> bool:
    """Whether our kernels run a call, unless they find something that they do not know."""
    if torch.compiler.is_compiling() or type(input) is not Tensor or not input.is_cpu or weight.dim() != 2:
        return False
    wanted = select.requested()
    if _kernels(wanted) is None or autograd.transformed() or torch._C._is_any_autocast_enabled():
        return False
    if wanted is not None:
        return input.dtype is torch.float32
    return hand_over.linear_reason(input.dtype, input.numel() * weight.shape[0]) is None


@cache
def _kernels(wanted: str | None) -> Any:
    if wanted not in (None, "native") or select.get("native").unavailable() is not None:
        return None
    return select.kernels("native", "linear")


def _forward(input: Tensor, weight: Tensor, bias: Optional, keep: bool) -> Tensor:
    made = _kernels(None).forward(input, weight, bias, keep)
    return F.linear(input, weight, bias) if made is None else made  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Optional) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _forward(input, weight, bias, keep=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Optional, ...]:
        input, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            found = _kernels(None).backward(grad.contiguous(), input, weight, needs)
            if found is not None:
                return found  # type: ignore[no-any-return]
        rows, x = grad.flatten(0, -2), input.flatten(0, -2)
        return (
            grad @ weight if needs[0] else None,
            rows.mT @ x if needs[1] else None,
            rows.sum(0) if needs[2] else None,
        )
