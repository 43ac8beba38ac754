"""The products of projections, in fp32 on the CPU (csrc/linear.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C

Optional = Tensor | None


def forward(input: Tensor, weight: Tensor, bias: Optional, keep: bool) -> Optional:
    """``input [..., I] @ weight [O, I].T + bias [O]``; None of what is not plain, contiguous fp32.

    Args:
        keep: the packed weight for the next call, which in training would find another weight.
    """
    return _C.linear_forward(torch.get_num_threads(), input, weight, bias, keep)


def backward(
    grad: Tensor, input: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Optional, Optional, Optional] | None:
    """The gradients of input, weight and bias, None where not needed; None as `forward`."""
    return _C.linear_backward(torch.get_num_threads(), grad, input, weight, *needs)
