"""The function behind the attention modules: it validates, chooses a backend, calls `ops.attend`.

A call that no kernel knows, or where torch is faster, runs as plain torch code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from . import autograd, ops
from .backends import hand_over, select
from .backends.reference import attend as reference
from .dtypes import in_autocast
from .scores import SCORES

_TENSORS = autograd.TENSORS | {type(None)}


def attend(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of N heads: scores, mask, softmax over the keys, dropout, weighted sum of the values.

    The [B, N, Tq, Tk, D] tensor of the additive score is never written where a kernel runs. Softmax and
    sums are fp32 for fp16 and bf16. A row of which every key is masked gives zeros: context, weights and
    gradients.

    Args:
        score: ``"additive"``, sum_h v_h tanh(q_h + k_h), arXiv 1409.0473; or ``"dot"``, scale * q . k.
        query: ``[B, N, Tq, D]``, projected.
        key: ``[B, N, Tk, D]``, projected.
        value: ``[B, N, Tk, Dv]``.
        v: ``[D]``, of the additive score alone.
        mask: bool, True where a query attends to a key, or of the query's dtype, added to the scores;
            ``[B or 1, N or 1, Tq or 1, Tk]``.
        lengths: ``[B]``, integers: how many keys of each sequence exist.
        scale: of the dot score.
        dropout: the probability in [0, 1) that a weight is dropped after the softmax; the kept are divided by
            1 - dropout. torch.manual_seed makes it reproducible.
        need_weights: return the weights too, as they are after dropout.

    Returns:
        The context ``[B, N, Tq, Dv]``, and the weights ``[B, N, Tq, Tk]`` or None. Under autocast both
        are computed in, and have, the autocast dtype.

    Raises:
        ValueError: ``score``, a rank, a dtype or ``dropout``; ``v`` is missing or in the way.
        RuntimeError: sizes or devices do not fit.
        TypeError: not a tensor.
        BackendError: the backend asked for by name cannot run this call.
    """
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(query.device.type):
        device_type = query.device.type
        query, key, value, v, mask = (
            in_autocast(t, torch.get_autocast_dtype(device_type)) for t in (query, key, value, v, mask)
        )
        with torch.autocast(device_type, enabled=False):
            return attend(
                score, query, key, value, v, mask=mask, lengths=lengths, scale=scale, dropout=dropout,
                need_weights=need_weights,
            )  # fmt: skip
    _check(score, query, key, value, v, mask, lengths, dropout)
    if lengths is not None:
        lengths = lengths.long()
    tensors = (query, key, value, v, mask, lengths)
    unobserved = autograd.unobserved(tensors)
    plain = not need_weights and (unobserved or not differentiated(tensors))
    if not unobserved and needs_torch(tensors):
        backend = "torch"
    else:
        narrow = False
        if query.shape[-1] <= hand_over.SMALL_HEAD:  # a branch settles a symbolic size
            narrow = True
        backend = _chosen(
            score, query.dtype, query.device.type, plain, mask is not None, lengths is not None, narrow,
            select.requested(),
        )  # fmt: skip
    if backend != "torch":
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64) if dropout > 0 else None
        return ops.attend(score, *tensors, scale, dropout, seed, need_weights, backend, unobserved)
    if score == "dot" and plain:
        joined = _joined(mask, lengths, key.shape[-2])
        context = nn.functional.scaled_dot_product_attention(query, key, value, joined, dropout, scale=scale)
        return context, None
    context, weights = reference.attend(score, *tensors, scale, dropout, None)
    return context, weights if need_weights else None


def attend_step(
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
    """Additive attention of a few queries ``[B, ..., Q]``, projected here, to keys that stay.

    Arguments: ``step`` in backends/native/attend.py. It validates none, and refuses what it does not know.

    Returns:
        Context and weights; None where nothing has been done and :func:`attend` has to be called: somebody
        looks on (derivatives, a compiler), there is no kernel, or it does not know such arguments.
    """
    kernels = _stepping(select.requested())
    tensors = (query, weight, bias, v, g, key, value)
    if (
        kernels is None
        or not query.is_cpu
        or torch._C._is_any_autocast_enabled()
        or autograd.watched(tensors)
    ):
        return None
    return kernels.step(query, weight, bias, v, g, key, value, lengths, mask, scale, need_weights)


@cache
def _stepping(wanted: str | None) -> Any:
    """The backend with a kernel for a step, unless another was asked for."""
    request = select.Request("additive", torch.float32, "cpu", "attend")
    if wanted not in (None, "native") or select.against("native", request) is not None:
        return None
    return select.kernels("native", "attend")


# ---- where it runs -----------------------------------------------------------------------------


def needs_torch(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether something looks on that knows torch's own operators only."""
    return (
        any(type(t) not in _TENSORS for t in tensors)
        or torch.jit.is_tracing()
        or (torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export())
    )


def _chosen(
    score: str,
    dtype: torch.dtype,
    device_type: str,
    plain: bool,
    masked: bool,
    ragged: bool,
    narrow: bool,
    wanted: str | None,
) -> str:
    # `wanted` is what select reads by itself; as an argument it makes a compiled graph depend on it
    request = select.Request(score, dtype, device_type, "attend")
    if wanted is None:
        reason = hand_over.attend_reason(request, plain, masked, ragged, narrow, announce=True)
        if reason is not None:
            return "torch"
    return select.choose(request).backend


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether derivatives may be asked for: that of torch's fused kernel has none itself, nor a tangent."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and autograd.in_transform()


def _joined(mask: Tensor | None, lengths: Tensor | None, keys: int) -> Tensor | None:
    """Mask and lengths as one mask."""
    if lengths is None:
        return mask
    within = torch.arange(keys, device=lengths.device) < lengths[:, None, None, None]
    if mask is None:
        return within
    return mask & within if mask.dtype is torch.bool else mask.masked_fill(~within, -torch.inf)


# ---- validation --------------------------------------------------------------------------------


def _check(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    dropout: float,
) -> None:
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    check_dropout(dropout)
    _check_rows("query", query, "[B, N, Tq, D]")
    _check_rows("key", key, "[B, N, Tk, D]")
    _check_rows("value", value, "[B, N, Tk, Dv]")
    _check_like("key", key, query)
    _check_like("value", value, query)
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    if key.shape != (batch, heads, keys, size):
        raise RuntimeError(
            f"key: expected shape [{batch}, {heads}, Tk, {size}] as query has it, got {list(key.shape)}"
        )
    if value.shape[:3] != (batch, heads, keys):
        raise RuntimeError(
            f"value: expected shape [{batch}, {heads}, {keys}, Dv] as key has it, got {list(value.shape)}"
        )
    if (v is not None) != SCORES[score].weighted:
        raise ValueError(f"v: expected {'a tensor [D]' if v is None else 'None'} for score {score!r}")
    if v is not None:
        check_tensor("v", v)
        if v.shape != (size,):
            raise RuntimeError(f"v: expected shape [{size}] as query has it, got {list(v.shape)}")
        _check_like("v", v, query)
    if mask is not None:
        check_tensor("mask", mask)
        if mask.dim() != 4:
            raise ValueError(
                f"mask: expected 4 dimensions [B or 1, N or 1, Tq or 1, Tk], got shape {list(mask.shape)}"
            )
        wanted = (batch, heads, queries)
        if mask.shape[3] != keys or any(m not in (1, n) for m, n in zip(mask.shape, wanted)):
            raise RuntimeError(
                f"mask: expected shape [{batch} or 1, {heads} or 1, {queries} or 1, {keys}], "
                f"got {list(mask.shape)}"
            )
        _check_like("mask", mask, query, or_bool=True)
    if lengths is not None:
        if not isinstance(lengths, Tensor):
            raise TypeError(f"lengths: expected a tensor of integers, got {type(lengths).__name__}")
        if lengths.dtype is torch.bool or lengths.is_floating_point():
            raise ValueError(f"lengths: expected integers, got {lengths.dtype}")
        if lengths.shape != (batch,):
            raise RuntimeError(f"lengths: expected shape [{batch}], got {list(lengths.shape)}")
        if lengths.device != query.device:
            raise RuntimeError(f"lengths: expected device {query.device} of query, got {lengths.device}")


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_tensor(name: str, tensor: Any, expected: str = "a tensor") -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(tensor).__name__}")


def _check_rows(name: str, tensor: Tensor, layout: str) -> None:
    check_tensor(name, tensor)
    if tensor.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions {layout}, got shape {list(tensor.shape)}")


def _check_like(name: str, tensor: Tensor, query: Tensor, or_bool: bool = False) -> None:
    if tensor.dtype is not query.dtype and not (or_bool and tensor.dtype is torch.bool):
        either = "torch.bool or " if or_bool else ""
        raise ValueError(f"{name}: expected dtype {either}{query.dtype} of query, got {tensor.dtype}")
    if tensor.device != query.device:
        raise RuntimeError(f"{name}: expected device {query.device} of query, got {tensor.device}")
