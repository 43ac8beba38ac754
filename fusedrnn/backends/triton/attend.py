"""The attend on Triton's kernels. Triton is imported with the first call, not with this file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...scores import SCORES
from . import no_kernel


def unsupported(score: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a request cannot run here; None if it can."""
    if score not in SCORES:
        return f"has no kernel for score {score!r}"
    return no_kernel(dtype, device_type)


def saved_shapes(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, ...]]:
    """The shapes of what `forward` returns as saved, in fp32: the weights before dropout."""
    return [(batch, heads, queries, keys)]


def forward(score: str, query: Tensor, *rest: Any) -> Any:
    """Context, weights and what is saved. Shapes: docs/architecture.md, "The attend"."""
    from .attend_launch import forward

    with torch.cuda.device_of(query):  # Triton launches on the current one
        return forward(score, query, *rest)


def backward(score: str, query: Tensor, *rest: Any) -> Any:
    """Gradients of query, key, value, v and of an added mask; None where not needed."""
    from .attend_launch import backward

    with torch.cuda.device_of(query):  # Triton launches on the current one
        return backward(score, query, *rest)
