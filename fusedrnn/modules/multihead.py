"""MultiheadAttention: torch.nn's module, fused where masks or weights take torch off its own fast path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attend import attend, needs_torch
from ..linear import linear
from .forward import Fused


class MultiheadAttention(Fused, nn.MultiheadAttention):
    """Drop-in :class:`torch.nn.MultiheadAttention`: same arguments, shapes, results and errors.

    Attributes and state_dict are torch's: each class differs from the other in nothing but the class, so that
    assigning ``module.__class__`` turns one into the other. Three differences can be seen:

    * A row of which every key is masked has zero weights and a zero context, so that the output is the bias
      of ``out_proj``; torch gives NaN.
    * Dropout is reproducible under torch.manual_seed, but which weights it drops is not torch's choice.
    * Under autocast the weights too have the autocast dtype.
    """

    score = "dot"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`."""
        if self._is_for_torch(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = map(self._heads, self._projected(query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, q.shape[0])
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([t, self._heads(bias.squeeze(0)).to(t.dtype).expand(t.shape[0], -1, -1, -1)], 2)
                for t, bias in ((k, self.bias_k), (v, self.bias_v))
            )
            added += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            added += 1
        if mask is not None and added:
            mask = F.pad(mask, (0, added), value=mask.dtype is torch.bool)
        context, weights = attend(
            self.score,
            q,
            k,
            v,
            mask=mask,
            scale=self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        unbatched = query.dim() == 2
        if unbatched:
            context = context.squeeze(0).transpose(0, 1)
        else:
            context = context.transpose(1, 2) if self.batch_first else context.permute(2, 0, 1, 3)
        output = linear(context.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights.squeeze(0) if unbatched else weights
        return output, weights

    def _is_for_torch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need_weights: bool,
        mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """Whether torch's own forward is as fast, or has to say what is wrong with a call."""
        if not need_weights and padding is None and (mask is None or is_causal):
            return True
        if is_causal and mask is None:
            return True
        if needs_torch((query, key, value, padding, mask)) or query.is_nested or self.dropout >= 1:
            return True
        dims = query.dim()
        if dims not in (2, 3) or not key.dim() == value.dim() == dims or key.shape[:-1] != value.shape[:-1]:
            return True
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            return True
        time = 1 if dims == 3 and self.batch_first else 0
        queries, keys = query.shape[time], key.shape[time]
        batch = 1 if dims == 2 else query.shape[1 - time]
        if dims == 3 and key.shape[1 - time] != batch:
            return True
        if padding is not None and padding.shape != ((keys,) if dims == 2 else (batch, keys)):
            return True
        if mask is not None and mask.dim() == 2 and mask.shape != (queries, keys):
            return True
        if mask is not None and mask.dim() != 2 and mask.shape != (batch * self.num_heads, queries, keys):
            return True
        dtypes = {m.dtype for m in (padding, mask) if m is not None}
        return bool(dtypes) and dtypes != {torch.bool} and dtypes != {query.dtype}

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, laid out as they came, in as few products as their inputs allow."""
        bias, size = self.in_proj_bias, self.embed_dim
        if self._qkv_same_embed_dim and query is key is value:
            return linear(query, self.in_proj_weight, bias).chunk(3, -1)
        if self._qkv_same_embed_dim and key is value:
            weight, weight_kv = self.in_proj_weight.split([size, 2 * size])
            bias, bias_kv = (None, None) if bias is None else bias.split([size, 2 * size])
            return linear(query, weight, bias), *linear(key, weight_kv, bias_kv).chunk(2, -1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(linear(*each) for each in zip((query, key, value), weights, biases))

    def _heads(self, projected: Tensor) -> Tensor:
        """[T, E], [T, B, E] or [B, T, E] as [B, N, T, E/N], without a copy."""
        heads = projected.unflatten(-1, (self.num_heads, self.head_dim))
        if heads.dim() == 3:
            return heads.transpose(0, 1).unsqueeze(0)
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, batch: int) -> Tensor | None:
        """Torch's masks, in which True is not attended to, as attend's."""
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, self.num_heads))
        if padding is not None:
            padding = padding.view(batch, 1, 1, padding.shape[-1])
        if mask is None or padding is None:
            either = padding if mask is None else mask
            return ~either if either is not None and either.dtype is torch.bool else either
        return ~(mask | padding) if mask.dtype is torch.bool else mask + padding
