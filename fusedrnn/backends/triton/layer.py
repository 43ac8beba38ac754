"""One layer on Triton's kernels. Triton is imported with the first call, not with this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cells import CELLS
from .. import gpu
from . import no_kernel


def unsupported(cell: str, dtype: torch.dtype, device_type: str, hidden: int | None = None) -> str | None:
    """Why a request cannot run here; None if it can. Any `hidden` can."""
    if cell not in CELLS:
        return f"has no kernel for cell {cell!r}"
    return no_kernel(dtype, device_type)


def saved_tensors(
    cell: str, directions: int, rows: int, hidden: int, proj: bool, dtype: torch.dtype, save: int, device: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what `forward` returns as saved."""
    from .scan_launch import CELLS

    return gpu.saved_tensors(CELLS[cell], directions, rows, hidden, proj, dtype, save)


def forward(cell: str, input: Tensor, *rest: Any) -> Any:
    """One layer. Shapes: docs/architecture.md, "The layer"."""
    from . import scan_launch

    with torch.cuda.device_of(input):  # Triton launches on the current one
        return gpu.forward(scan_launch, cell, input, *rest)


def backward(cell: str, input: Tensor, *rest: Any) -> Any:
    """Gradients of `input`, `weights` and `states`, in their order; None where not needed."""
    from . import scan_launch

    with torch.cuda.device_of(input):  # Triton launches on the current one
        return gpu.backward(scan_launch, cell, input, *rest)
