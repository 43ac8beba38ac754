"""AdditiveAttention: Keras's layer of this name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attend import attend, check_dropout, check_tensor
from .checks import check_size


class AdditiveAttention(nn.Module):
    """sum_d scale_d tanh(q_d + k_d), without projections.

    ``keras.layers.AdditiveAttention``, with one difference: a row of which every key is masked gives zeros,
    not the mean of the values.

    Args:
        size: D, the features of queries and keys.
        use_scale: learn ``scale``; otherwise it is 1.
        dropout: of the weights, in training.

    Attributes:
        scale: ``[D]`` or None.
    """

    scale: nn.Parameter | None

    def __init__(
        self, size: int, use_scale: bool = True, dropout: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        check_size("size", size)
        check_dropout(dropout)
        self.size = size
        self.dropout = dropout
        scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if use_scale else None
        self.register_parameter("scale", scale)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keras's glorot_uniform of a vector: uniform within sqrt(6 / 2D)."""
        if self.scale is not None:
            bound = (3 / self.size) ** 0.5
            nn.init.uniform_(self.scale, -bound, bound)

    def forward(
        self,
        inputs: Sequence[Tensor],
        mask: Sequence[Tensor | None] | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from queries to keys.

        Args:
            inputs: ``[query [B, Tq, D], value [B, Tv, Dv], key [B, Tv, D]]``; without a key it is the value.
            mask: ``[query_mask [B, Tq], value_mask [B, Tv]]``, bool or None each: a False query gives zeros,
                a False value is not attended to.
            return_attention_scores: return the weights ``[B, Tq, Tv]`` too.
            use_causal_mask: query i attends to values up to i alone.

        Returns:
            ``[B, Tq, Dv]``, or a tuple of it and the weights.

        Raises:
            ValueError: there are not 2 or 3 ``inputs``, or one has not 3 dimensions.
            ValueError, RuntimeError, TypeError, BackendError: as :func:`fusedrnn.attend`, by name.
        """
        if not isinstance(inputs, (list, tuple)):
            raise TypeError(
                f"inputs: expected [query, value] or [query, value, key], got {type(inputs).__name__}"
            )
        if len(inputs) not in (2, 3):
            raise ValueError(f"inputs: expected [query, value] or [query, value, key], got {len(inputs)}")
        query, value = inputs[0], inputs[1]
        key = inputs[2] if len(inputs) == 3 else value
        for name, tensor in (("query", query), ("value", value), ("key", key)):
            check_tensor(name, tensor)
            if tensor.dim() != 3:
                raise ValueError(f"{name}: expected 3 dimensions [B, T, D], got shape {list(tensor.shape)}")
        query_mask, value_mask = _masks(mask, query, value)
        allowed = None if value_mask is None else value_mask[:, None, None, :]
        if use_causal_mask:
            ones = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool, device=query.device)
            causal = ones.tril()[None, None]
            allowed = causal if allowed is None else allowed & causal
        context, weights = attend(
            "additive",
            query.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            query.new_ones(self.size) if self.scale is None else self.scale,
            mask=allowed,
            dropout=self.dropout if self.training else 0.0,
            need_weights=return_attention_scores,
        )
        context = context.squeeze(1)
        if query_mask is not None:
            context = context * query_mask.unsqueeze(-1).to(context.dtype)
        return context if weights is None else (context, weights.squeeze(1))

    def extra_repr(self) -> str:
        return f"{self.size}, use_scale={self.scale is not None}, dropout={self.dropout}"


def _masks(
    mask: Sequence[Tensor | None] | None, query: Tensor, value: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Both masks. Keras casts them to bool; attend would add a floating one to the scores."""
    if mask is None:
        return None, None
    if not isinstance(mask, (list, tuple)):
        raise TypeError(f"mask: expected [query_mask, value_mask], got {type(mask).__name__}")
    if len(mask) not in (1, 2):
        raise ValueError(f"mask: expected [query_mask, value_mask], got {len(mask)}")
    query_mask, value_mask = (*mask, None)[:2]
    for name, each, of in (("query_mask", query_mask, query), ("value_mask", value_mask, value)):
        if each is None:
            continue
        check_tensor(name, each, "a tensor or None")
        if each.dtype is not torch.bool:
            raise ValueError(f"{name}: expected dtype torch.bool, got {each.dtype}")
        batch, steps = of.shape[:2]
        if tuple(each.shape) not in ((batch, steps), (1, steps)):
            raise RuntimeError(f"{name}: expected shape [{batch}, {steps}], got {list(each.shape)}")
    return query_mask, value_mask
