"""The fused attention of `fusedrnn._C` (csrc/attend.cpp). Shapes and formulas: csrc/cpu/attend.h.

Every storage type is read and written as it is; scores, softmax and sums are fp32, of fp64 tensors fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...scores import factor
from . import _C, no_kernel
from .kept import Kept

_SCORES = {"additive": 0, "dot": 1}  # in csrc/cpu/attend.h
_keys: Kept[object] = Kept(lambda key: _C.attend_keys(not key.is_inference()))


def unsupported(score: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a request cannot run here; None if it can."""
    if score not in _SCORES:
        return f"has no kernel for score {score!r}"
    return no_kernel(dtype, device_type)


def saved_shapes(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, ...]]:
    """The shapes of what `forward` returns as saved: in fp32, of fp64 tensors fp64."""
    return [(batch, heads, queries, keys)]


def forward(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    need_weights: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Context, weights and what the backward needs: the weights before dropout.

    Args:
        score: "additive", v . tanh(q + k), or "dot", scale * q . k.
        query, key, value: [B, N, Tq, D], [B, N, Tk, D], [B, N, Tk, Dv] of one dtype. Here and in all others
            the last dimension is contiguous.
        v: [D], for the additive score alone.
        mask: None, bool (True attends) or of the query's dtype (added), [B|1, N|1, Tq|1, Tk].
        lengths: None or int64 [B]: keys at and beyond it are masked.
        dropout, seed: the share of weights to drop, and which.
    """
    context, weights, probabilities = _C.attend_forward(
        torch.get_num_threads(), _SCORES[score], factor(score, scale), dropout, seed, query, key, value, v,
        lengths, mask, need_weights, save,
    )  # fmt: skip
    return context, weights, [] if probabilities is None else [probabilities]


def backward(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
    saved: Sequence[Tensor],
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, v and of an added mask, each in its own shape; None where not needed.

    Reads `saved` and leaves it as it is.
    """
    d_query, d_key, d_value, d_v, d_scores = _C.attend_backward(
        torch.get_num_threads(), _SCORES[score], factor(score, scale), dropout, seed, query, key, value, v,
        lengths, saved[0], grad_context, grad_weights, needs[0], needs[1],
        needs[2] and grad_context is not None, needs[3] and v is not None,
    )  # fmt: skip
    if needs[2] and grad_context is None:
        d_value = value.new_zeros(value.shape)
    d_mask = None
    if needs[4] and mask is not None:
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    return d_query, d_key, d_value, d_v, d_mask


def step(
    query: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    v: Tensor,
    g: Tensor | None,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """Context and weights of additive attention, the query's projection included; None if it takes `forward`.

    From the second call with a tensor of keys on, exponentials of it are kept (csrc/attend_step.cpp).

    Args:
        query, weight, bias: [B, ..., Q], [D, Q] and [D] or None, of the projection.
        v, g: [D], and a number as a tensor if v is g v / |v|.
        key, value: [B, Tk, D], [B, Tk, Dv].
        lengths: None or int64 [B].
        mask: None or bool [B|1, Tk].
        scale: of the scores.
    """
    return _C.attend_step(
        _keys.of(key), torch.get_num_threads(), need_weights, scale, query, weight, bias, v, g, key, value,
        lengths, mask,
    )  # fmt: skip
