"""One layer on Triton's kernels. Triton is imported with the first call, not with this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cells import CELLS
from . import no_kernel


def unsupported(cell: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a request cannot run here; None if it can."""
    if cell not in CELLS:
        return f"has no kernel for cell {cell!r}"
    return no_kernel(dtype, device_type)


def saved_tensors(*args: Any) -> Any:
    """The shapes and dtypes of what `forward` returns as saved."""
    from .call import saved_tensors

    return saved_tensors(*args)


def forward(cell: str, input: Tensor, *rest: Any) -> Any:
    """One layer. Shapes: docs/architecture.md, "The layer"."""
    from .forward import forward

    with torch.cuda.device_of(input):  # Triton launches on the current one
        return forward(cell, input, *rest)


def backward(cell: str, input: Tensor, *rest: Any) -> Any:
    """Gradients of `input`, `weights` and `states`, in their order; None where not needed."""
    from .backward import backward

    with torch.cuda.device_of(input):  # Triton launches on the current one
        return backward(cell, input, *rest)
