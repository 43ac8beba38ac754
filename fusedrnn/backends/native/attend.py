"""The fused attention of `fusedrnn._C`: tensors to raw pointers. Shapes and formulas: csrc/cpu/attend.h.

Every storage type is read and written as it is; scores, softmax and sums are fp32, of fp64 tensors fp64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C, _pointer, _sums, no_kernel
from .kept import Kept

_SCORES = {"additive": 0, "dot": 1}  # in csrc/cpu/attend.h
_STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # in csrc/attend.cpp
_NO_ROWS = (0, 0, 0, 0)
_keys: Kept[object] = Kept(lambda key: _C.attend_keys(not key.is_inference()))


def unsupported(score: str, dtype: torch.dtype, device_type: str) -> str | None:
    """Why a request cannot run here; None if it can."""
    if score not in _SCORES:
        return f"has no kernel for score {score!r}"
    return no_kernel(dtype, device_type)


def saved_shapes(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, ...]]:
    """The shapes of what `forward` returns as saved: in fp32, of fp64 tensors fp64."""
    return [(batch, heads, queries), (batch, heads, queries, keys)]


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
    """Context, weights and what the backward needs: the log-sum-exp and the weights before dropout.

    Args:
        score: "additive", v . tanh(q + k), or "dot", scale * q . k.
        query, key, value: [B, N, Tq, D], [B, N, Tk, D], [B, N, Tk, Dv] of one dtype. Here and in all others
            the last dimension is contiguous.
        v: [D], for the additive score alone.
        mask: None, bool (True attends) or of the query's dtype (added), [B|1, N|1, Tq|1, Tk].
        lengths: None or int64 [B]: keys at and beyond it are masked.
        dropout, seed: the share of weights to drop, and which.
    """
    dtype = query.dtype
    batch, heads, queries, _ = query.shape
    _, _, keys, values = value.shape
    context = query.new_empty((batch, heads, queries, values))
    weights = query.new_empty((batch, heads, queries, keys)) if need_weights else None
    shapes = saved_shapes(batch, heads, queries, keys) if save else []
    saved = [query.new_empty(shape, dtype=_sums(dtype)) for shape in shapes]
    kind, masked = 0, _NO_ROWS
    if mask is not None:
        kind = 1 if mask.dtype is torch.bool else 2
        strides = [0 if n == 1 else stride for n, stride in zip(mask.shape[:3], mask.stride())]
        masked = (mask.data_ptr(), strides[0], strides[1], strides[2])
    fields = (
        *_shared(score, query, key, value, v, lengths, scale, dropout, seed),
        kind,
        *masked,
        context.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        *([s.data_ptr() for s in saved] if save else (0, 0)),
    )
    _C.attend_forward(_STORAGE[dtype], torch.get_num_threads(), fields)
    return context, weights, saved


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
    context: Tensor,
    saved: Sequence[Tensor],
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, v and of an added mask, each in its own shape; None where not needed.

    Reads `saved` and leaves it as it is.
    """
    probabilities = saved[1]
    d_query = query.new_empty(query.shape) if needs[0] else None
    d_key = key.new_empty(key.shape) if needs[1] else None
    d_value = value.new_empty(value.shape) if needs[2] and grad_context is not None else None
    d_v = v.new_empty(v.shape) if needs[3] and v is not None else None
    d_scores = probabilities.new_empty(probabilities.shape)
    dropped = probabilities.new_empty(probabilities.shape) if dropout > 0 else None
    fields = (
        *_shared(score, query, key, value, v, lengths, scale, dropout, seed),
        probabilities.data_ptr(),
        *(_NO_ROWS if grad_context is None else _rows(grad_context)),
        *(_NO_ROWS if grad_weights is None else _rows(grad_weights)),
        d_scores.data_ptr(),
        *map(_pointer, (dropped, d_query, d_key, d_value, d_v)),
    )
    _C.attend_backward(_STORAGE[query.dtype], torch.get_num_threads(), fields)
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


def _rows(tensor: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = tensor.stride()
    return tensor.data_ptr(), batch, head, row


def _shared(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: int,
) -> tuple[float, ...]:
    """The fields of csrc/cpu/attend.h's Attend."""
    batch, heads, queries, width = query.shape
    _, _, keys, values = value.shape
    return (
        _SCORES[score], batch, heads, queries, keys, width, values, *_rows(query), *_rows(key), *_rows(value),
        0 if v is None else v.data_ptr(), 0 if lengths is None else lengths.data_ptr(),
        scale if score == "dot" else 1.0, dropout, seed,
    )  # fmt: skip
