"""Launches of the attend's kernels: tensors to tiles. Shapes: docs/architecture.md, "The attend"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attend_kernels import (
    attend_fwd_kernel,
    attend_pairs_bwd_kernel,
    attend_rows_bwd_kernel,
    attend_scores_bwd_kernel,
    attend_scores_fwd_kernel,
)
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
# Where a thread has columns of D and all pairs of rows: no larger block of pairs stays in its registers.
PAIRS = Tiles(8, 10, 32, 1)
GRADIENTS = Tiles(8, 4, 32, 1)
# Of one step, whose warps share the keys, by the bytes of a value.
STEP = {2: Tiles(1, 64, 32, 4), 4: Tiles(1, 32, 32, 4)}
# Where scores are there already, by the bytes of a value: queries, keys and columns of values.
CONTEXT = {2: Tiles(32, 32, 128, 4), 4: PRODUCT}
VALUES = 32  # columns of a tile of values
NUM_STAGES = 2


def forward_tiles(score: str, size: int) -> Tiles:
    """Of queries, keys and D, for values of `size` bytes, in the kernel that makes scores and context."""
    return PRODUCT if score == "dot" else STEP[size]


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
    if mask is not None:
        mask = mask.expand(batch, heads, queries, keys)
        mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    energies = query.new_empty((batch, heads, queries, keys), dtype=torch.float32)
    probabilities = torch.empty_like(energies) if save else None
    spec, scale = SCORES[score], _scale(score, scale)
    given: tuple[Tensor | None, ...] = (None, None, None, None)
    if score == "additive" and queries > 1:
        pairs = PAIRS
        attend_scores_fwd_kernel[(_grid(query, pairs.rows)[0] * -(-keys // pairs.others),)](
            query, key, v, mask, lengths, energies, *_strides(query), *_strides(key), *_strides(mask),
            heads, queries, keys, size, START=spec.start, ADD=spec.add, PARTS=spec.parts,
            BQ=pairs.rows, BK=pairs.others, BD=pairs.columns,
            num_warps=pairs.num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip
        tiles = CONTEXT[query.element_size()]
        columns, blocks = tiles.columns, max(1, -(-values // tiles.columns))
    else:
        given = (query, key, v, mask)
        tiles, columns, blocks = forward_tiles(score, query.element_size()), VALUES, 1
    attend_fwd_kernel[(*_grid(query, tiles.rows), blocks)](
        *given[:2], value, *given[2:], lengths, energies, context, weights, probabilities,
        *_strides(query), *_strides(key), *_strides(value), *_strides(mask),
        heads, queries, keys, size, values, scale, *_drop(dropout, seed),
        START=spec.start, ADD=spec.add, FINISH=spec.finish, PARTS=spec.parts, DROPOUT=dropout > 0,
        PRECISION=_precision(), BQ=tiles.rows, BK=tiles.others, BT=PRODUCT.others, BD=tiles.columns,
        BV=columns, num_warps=tiles.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
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
    (probabilities,) = saved
    (_, heads, queries, _), keys, values = query.shape, key.shape[2], value.shape[3]
    beyond = GRADIENTS.rows * keys  # rows of queries or of keys that a tile has beyond the last one are read
    d_scores = probabilities.new_empty(probabilities.numel() + beyond)[: probabilities.numel()]
    d_scores = d_scores.view(probabilities.shape)
    dropped = probabilities.new_empty(probabilities.shape) if dropout > 0 else probabilities
    attend_scores_bwd_kernel[_grid(query, PRODUCT.rows)](
        value, lengths, probabilities, grad_context, grad_weights, d_scores, dropped,
        *_strides(value), *_strides(grad_context), *_strides(grad_weights),
        heads, queries, keys, values, *_drop(dropout, seed),
        DROPOUT=dropout > 0, PRECISION=_precision(), BQ=PRODUCT.rows, BK=PRODUCT.others, BV=VALUES,
        num_warps=PRODUCT.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    d_query = d_key = d_value = d_v = d_mask = None
    if needs[0] or needs[3]:
        d_query, d_v = _of_scores(score, query, key, v, lengths, d_scores, scale, False, needs[3])
    if needs[1]:
        d_key, _ = _of_scores(score, key, query, v, lengths, d_scores, scale, True, False)
    if needs[2]:
        if grad_context is None:
            d_value = value.new_zeros(value.shape)
        else:  # what a dot's key gets from its queries
            d_value = _sums(value, grad_context, lengths, dropped, 1.0, True)
    if needs[4] and mask is not None:
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    return d_query if needs[0] else None, d_key, d_value, d_v, d_mask


def _of_scores(
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
    if score == "dot":
        return _sums(own, other, lengths, g, scale, keys), None
    spec, tiles = SCORES[score], GRADIENTS
    grid = (*_grid(own, tiles.rows), -(-own.shape[3] // (spec.parts * tiles.columns)))
    d_own = own.new_empty(own.shape)
    d_v = g.new_empty((grid[0], own.shape[3])) if needs_v else None
    attend_pairs_bwd_kernel[grid](
        own, other, v, lengths, g, d_own, d_v, *_strides(own), *_strides(other),
        own.shape[1], own.shape[2], other.shape[2], own.shape[3],
        PREPARE=spec.prepare, BACKWARD=spec.backward, CLOSE=spec.close, PARTS=spec.parts, KEYS=keys,
        BO=tiles.rows, BT=tiles.others, BD=tiles.columns,
        num_warps=tiles.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return d_own, None if d_v is None else d_v.sum(0).to(own.dtype)


def _sums(own: Tensor, other: Tensor, lengths: Tensor | None, g: Tensor, scale: float, keys: bool) -> Tensor:
    """Of own's shape: for each of its rows the sum of the other rows, weighted by g [B, N, Tq, Tk]."""
    d_own, tiles = own.new_empty(own.shape), PRODUCT
    attend_rows_bwd_kernel[(*_grid(own, tiles.rows), -(-own.shape[3] // tiles.columns))](
        other, lengths, g, d_own, *_strides(other), *_steps(g, keys),
        own.shape[1], own.shape[2], other.shape[2], own.shape[3], scale,
        KEYS=keys, PRECISION=_precision(), BO=tiles.rows, BT=tiles.others, BD=tiles.columns,
        num_warps=tiles.num_warps, num_stages=NUM_STAGES, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return d_own


def _steps(g: Tensor, keys: bool) -> tuple[int, int]:
    """From one of own to the next in g, and from one of the others."""
    return (1, g.shape[3]) if keys else (g.shape[3], 1)


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
