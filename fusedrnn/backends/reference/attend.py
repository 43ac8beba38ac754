"""The attend in plain torch: scores, mask, softmax, dropout, context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...scores import SCORES
from . import autograd_on

_LOW = 0xFFFFFFFF


def unsupported(score: str, dtype: torch.dtype, device_type: str) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating dtype"


def saved_shapes(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, ...]]:
    return []  # its backward recomputes


def attend(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | int | None,
) -> tuple[Tensor, Tensor]:
    """Context and weights. Shapes: docs/architecture.md, "The attend".

    fp16 and bf16 are computed in fp32 and rounded once, at the end. Without a seed, dropout is torch's.
    """
    storage = query.dtype
    if storage in (torch.float16, torch.bfloat16):
        v = None if v is None else v.float()
        mask = mask if mask is None or mask.dtype is torch.bool else mask.float()
        context, weights = attend(
            score, query.float(), key.float(), value.float(), v, mask, lengths, scale, dropout, seed
        )
        return context.to(storage), weights.to(storage)

    energies = SCORES[score].energies(query, key, v, scale)
    masked = None
    if mask is not None and mask.dtype is not torch.bool:
        energies = energies + mask
        masked = energies == -torch.inf
    elif mask is not None:
        masked = ~mask
    if lengths is not None:
        beyond = torch.arange(key.shape[-2], device=key.device) >= lengths[:, None, None, None]
        masked = beyond if masked is None else masked | beyond
    if masked is None:
        weights = energies.softmax(-1)
    else:
        # a row masked whole is finite inside the softmax, so that every gradient of it is zero and not NaN
        whole = masked.all(-1, keepdim=True)
        weights = energies.masked_fill(masked, -torch.inf).masked_fill(whole, 0).softmax(-1)
        weights = weights.masked_fill(whole, 0)
    if dropout > 0 and seed is None:
        weights = torch.dropout(weights, dropout, True)
    elif dropout > 0 and seed is not None:
        weights = weights * keep(weights.shape, dropout, seed, weights.device) / (1 - dropout)
    return weights @ value, weights


def keep(shape: Sequence[int], dropout: float, seed: Tensor | int, device: torch.device) -> Tensor:
    """Which weights [B, N, Tq, Tk] dropout keeps: a hash of the seed and the position, on all devices equal.

    The finalizer is lowbias32, Chris Wellons 2018, https://nullprogram.com/blog/2018/07/31.
    """
    index = torch.arange(shape[0] * shape[1] * shape[2] * shape[3], device=device).view(*shape)
    low = _mix((index ^ seed) & _LOW)
    bits = _mix((low + (index >> 32) * 0x9E3779B9 + (seed >> 32)) & _LOW)
    return bits >> 8 >= math.ceil(dropout * 2**24)


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32 bits that flips about half of them for one flipped; in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW
    return x ^ (x >> 16)


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
    context, weights = attend(score, query, key, value, v, mask, lengths, scale, dropout, seed)
    return context, weights if need_weights else None, []


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
) -> list[Tensor | None]:
    with autograd_on():
        leaves: list[Any] = [
            t.detach().requires_grad_() if t is not None and need else t
            for t, need in zip((query, key, value, v, mask), needs)
        ]
        outputs = attend(score, *leaves, lengths, scale, dropout, seed)  # type: ignore[call-arg]
        pairs = [(out, g) for out, g in zip(outputs, (grad_context, grad_weights)) if g is not None]
        wanted = [leaf for leaf, need in zip(leaves, needs) if need]
        # the weights alone do not depend on the value
        pairs = [(out, g) for out, g in pairs if out.requires_grad]
        grads = iter(
            torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            if pairs and wanted
            else [None] * len(wanted)
        )
    return [next(grads) if need else None for need in needs]
