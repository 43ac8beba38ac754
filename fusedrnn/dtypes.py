"""Which dtypes there are, what sums of each are in, and what autocast makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, gates and states."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def in_autocast(value: Any, dtype: torch.dtype) -> Any:
    """A tensor, or those of nested lists, in the autocast dtype; fp64 is left alone, as in torch."""
    if isinstance(value, (list, tuple)):
        return [in_autocast(each, dtype) for each in value]
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible else value
