"""Launches of the attend's kernels: tensors to tiles. Shapes: docs/architecture.md, "The attend"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import attend_fwd_kernel, attend_rows_bwd_kernel, attend_scores_bwd_kernel
from .plan import MAX_REGISTERS
from .scores import SCORES


class Tiles(NamedTuple):
    """The tiles of a kernel: rows by rows, in tiles of D's columns, of which a score has PARTS at a time."""

    rows: int
    others: int
    columns: int
    num_warps: int


# Where a tile is a matrix product: of a dot, and of values.
PRODUCT = Tiles(16, 32, 32, 4)
# Where a thread has a column of D and all pairs of rows: no larger block of pairs stays in its registers.
PAIRS = Tiles(4, 8, 32, 1)
GRADIENTS = Tiles(2, 8, 32, 1)
# Of one step, whose warps share the keys.
STEP = Tiles(1, 64, 32, 4)
VALUES = 32  # columns of a tile of values
NUM_STAGES = 2


def forward_tiles(score: str, queries: int) -> Tiles:
    """Of queries, keys and D."""
    if score == "dot":
        return PRODUCT
    return STEP if queries == 1 else PAIRS


def backward_tiles(score: str) -> Tiles:
    """Of the rows that have the gradient, the rows that it comes from, and D."""
    return PRODUCT if score == "dot" else GRADIENTS


def forward_registers(score: str, size: int, rows: int) -> int | None:
    """Of a thread, for values of `size` bytes and tiles of `rows`; None where ptxas spills if told."""
    return None if score == "additive" and size == 2 and rows > 1 else MAX_REGISTERS


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
    """Context, weights and, to save, the weights before dropout. The last dimensions are contiguous."""
    (batch, heads, queries, size), keys, values = query.shape, key.shape[2], value.shape[3]
    context = query.new_empty((batch, heads, queries, values))
    weights = query.new_empty((batch, heads, queries, keys)) if need_weights else None
    probabilities = query.new_empty((batch, heads, queries, keys), dtype=torch.float32)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    spec, tiles = SCORES[score], forward_tiles(score, queries)
    attend_fwd_kernel[_grid(query, tiles.rows)](
        query, key, value, v, mask, lengths, context, weights, probabilities,
        *_strides(query), *_strides(key), *_strides(value), *_strides(mask),
        heads, queries, keys, size, values, _scale(score, scale), *_drop(dropout, seed),
        START=spec.start, ADD=spec.add, FINISH=spec.finish, PARTS=spec.parts, DROPOUT=dropout > 0,
        PRECISION=_precision(), BQ=tiles.rows, BK=tiles.others, BT=PRODUCT.others, BD=tiles.columns,
        BV=VALUES, num_warps=tiles.num_warps, num_stages=NUM_STAGES,
        maxnreg=forward_registers(score, query.element_size(), tiles.rows),
    )  # fmt: skip
    return context, weights, [probabilities] if save else []


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
    (probabilities,) = saved
    (_, heads, queries, _), keys, values = query.shape, key.shape[2], value.shape[3]
    d_scores = probabilities.new_empty(probabilities.shape)
    dropped = probabilities.new_empty(probabilities.shape) if dropout > 0 else probabilities
    attend_scores_bwd_kernel[_grid(query, PRODUCT.rows)](
        value, lengths, probabilities, grad_context, grad_weights, d_scores, dropped,
        *_strides(value), *_strides(grad_context), *_strides(grad_weights),
        heads, queries, keys, values, *_drop(dropout, seed),
        DROPOUT=dropout > 0, PRECISION=_precision(), BQ=PRODUCT.rows, BK=PRODUCT.others, BV=VALUES,
        num_warps=PRODUCT.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    scale = _scale(score, scale)
    d_query = d_key = d_value = d_v = d_mask = None
    if needs[0] or needs[3]:
        d_query, d_v = _of_rows(score, query, key, v, lengths, d_scores, scale, False, needs[3])
    if needs[1]:
        d_key, _ = _of_rows(score, key, query, v, lengths, d_scores, scale, True, False)
    if needs[2]:
        if grad_context is None:
            d_value = value.new_zeros(value.shape)
        else:  # what a dot's key gets from its queries
            d_value, _ = _of_rows("dot", value, grad_context, None, lengths, dropped, 1.0, True, False)
    if needs[4] and mask is not None:
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    return d_query if needs[0] else None, d_key, d_value, d_v, d_mask


def _of_rows(
    score: str,
    own: Tensor,
    other: Tensor,
    v: Tensor | None,
    lengths: Tensor | None,
    g: Tensor,
    scale: float,
    keys: bool,
    needs_v: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of queries or keys, and of v, from those of the scores g [B, N, Tq, Tk]."""
    spec, tiles = SCORES[score], backward_tiles(score)
    grid = (*_grid(own, tiles.rows), -(-own.shape[3] // (spec.parts * tiles.columns)))
    d_own = own.new_empty(own.shape)
    d_v = g.new_empty((grid[0], own.shape[3])) if needs_v else None
    attend_rows_bwd_kernel[grid](
        own, other, v, lengths, g, d_own, d_v, *_strides(own), *_strides(other),
        *((1, g.shape[3]) if keys else (g.shape[3], 1)),
        own.shape[1], own.shape[2], other.shape[2], own.shape[3], scale,
        BACKWARD=spec.backward, PARTS=spec.parts, KEYS=keys, PRECISION=_precision(),
        BO=tiles.rows, BT=tiles.others, BD=tiles.columns,
        num_warps=tiles.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return d_own, None if d_v is None else d_v.sum(0).to(own.dtype)


def _grid(rows: Tensor, tile: int) -> tuple[int]:
    """A program per head and tile of its rows."""
    return (rows.shape[0] * rows.shape[1] * -(-rows.shape[2] // tile),)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def _scale(score: str, scale: float) -> float:
    return scale if score == "dot" else 1.0


def _drop(dropout: float, seed: int) -> tuple[Any, ...]:
    return math.ceil(dropout * 2**24), 1 / (1 - dropout), seed


def _precision() -> str:
    """Of fp32 products: what torch's flags say for matrix products on a GPU."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
