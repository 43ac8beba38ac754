"""`fusedrnn::attend` and `fusedrnn::attend_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference import attend as reference
from ..dtypes import accumulation
from . import Grads, lib, second_order, without_autocast

# attend returns [context, *([weights] if need_weights), *saved]; attend_backward returns one gradient
# per [query, key, value, v, mask], an empty tensor where `needs` is false.
lib.define(
    "attend(str score, Tensor query, Tensor key, Tensor value, Tensor? v, Tensor? mask, Tensor? lengths,"
    " float scale, float dropout, Tensor? seed, bool need_weights, bool save, str backend) -> Tensor[]"
)
lib.define(
    "attend_backward(Tensor? grad_context, Tensor? grad_weights, str score, Tensor query, Tensor key,"
    " Tensor value, Tensor? v, Tensor? mask, Tensor? lengths, float scale, float dropout, Tensor? seed,"
    " Tensor[] saved, str backend, bool[] needs) -> Tensor[]"
)


# ---- launches ----------------------------------------------------------------------------------


def _rows(tensor: Tensor | None) -> Tensor | None:
    """A tensor whose last dimension is contiguous in memory, and holds its values."""
    if tensor is None:
        return None
    if tensor.is_neg() or tensor.stride()[-1] != 1:
        tensor = tensor.resolve_neg().contiguous()
    return tensor


def _number(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


@without_autocast
def launch_forward(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_weights: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    kernels = select.kernels(backend, "attend")
    return kernels.forward(
        score, _rows(query), _rows(key), _rows(value), _rows(v), _rows(mask), _rows(lengths), scale, dropout,
        _number(seed), need_weights, save,
    )  # fmt: skip


@without_autocast
def launch_backward(
    grad_context: Tensor | None,
    grad_weights: Tensor | None,
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    saved: Sequence[Tensor],
    backend: str,
    needs: Sequence[bool],
) -> Grads:
    tensors = map(_rows, (query, key, value, v, mask, lengths))
    grads = map(_rows, (grad_context, grad_weights))
    kernels = select.kernels(backend, "attend")
    return kernels.backward(score, *tensors, scale, dropout, _number(seed), saved, *grads, list(needs))


def _attend_impl(*args: Any) -> list[Tensor]:
    context, weights, saved = launch_forward(*args)
    return [t.contiguous() for t in (context, weights, *saved) if t is not None]  # as the fake has them


def _attend_backward_impl(*args: Any) -> list[Tensor]:
    inputs, needs = args[3:8], args[-1]
    return [
        (
            inputs[0].new_empty(0)
            if not need
            else like.new_zeros(like.shape)
            if grad is None
            else grad.contiguous()
        )
        for grad, need, like in zip(launch_backward(*args), needs, inputs)
    ]


lib.impl("attend", _attend_impl, "CompositeExplicitAutograd")
lib.impl("attend_backward", _attend_backward_impl, "CompositeExplicitAutograd")


# ---- fakes -------------------------------------------------------------------------------------


@torch.library.register_fake("fusedrnn::attend", lib=lib)
def _attend_fake(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    dropout: float,
    seed: Tensor | None,
    need_weights: bool,
    save: bool,
    backend: str,
) -> list[Tensor]:
    rows, keys = query.shape[:3], key.shape[2]
    context = query.new_empty((*rows, value.shape[-1]))
    weights = [query.new_empty((*rows, keys))] if need_weights else []
    shapes = select.kernels(backend, "attend").saved_shapes(*rows, keys) if save else []
    saved = [query.new_empty(shape, dtype=accumulation(query.dtype)) for shape in shapes]
    return [context, *weights, *saved]


@torch.library.register_fake("fusedrnn::attend_backward", lib=lib)
def _attend_backward_fake(*args: Any) -> list[Tensor]:
    inputs, needs = args[3:8], args[-1]
    return [
        like.new_empty(like.shape) if need else inputs[0].new_empty(0) for like, need in zip(inputs, needs)
    ]


# ---- autograd of the operators -----------------------------------------------------------------


def call_attend(*args: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """`launch_forward` through the dispatcher."""
    found = torch.ops.fusedrnn.attend(*args)
    need_weights = args[10]
    return found[0], found[1] if need_weights else None, list(found[1 + need_weights :])


def _attend_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    score, *tensors, ctx.scale, ctx.dropout, seed, ctx.need_weights, ctx.save, ctx.backend = inputs
    ctx.score = score
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, *output[1 + ctx.need_weights :])


def _attend_grad(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors[:7]
    saved = ctx.saved_tensors[7:]
    if not ctx.save:  # recorded without gradients in mind: make the saved tensors now
        *_, saved = call_attend(
            ctx.score, *tensors, ctx.scale, ctx.dropout, seed, False, True, ctx.backend
        )  # fmt: skip
    needs = [bool(need) for need in ctx.needs_input_grad[1:6]]
    grad_weights = grads[1] if ctx.need_weights else None
    found = torch.ops.fusedrnn.attend_backward(
        grads[0], grad_weights, ctx.score, *tensors, ctx.scale, ctx.dropout, seed, saved, ctx.backend,
        needs,
    )  # fmt: skip
    return None, *(g if need else None for g, need in zip(found, needs)), *[None] * 7


def _attend_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_context, grad_weights, ctx.score, *tensors, ctx.scale, ctx.dropout, seed = inputs[:12]
    ctx.op_needs, ctx.n_saved = inputs[14], len(inputs[12])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_context, grad_weights, *tensors, seed)


def _attend_backward_grad(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    grad_context, grad_weights, *tensors, lengths, seed = ctx.saved_tensors
    real = [t is not None and t.is_floating_point() for t in tensors]

    def run(*varied: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(varied)
        full: list[Any] = [next(given) if is_real else t for t, is_real in zip(tensors, real)]
        return reference.attend(ctx.score, *full, lengths, ctx.scale, ctx.dropout, seed)  # type: ignore[call-arg]

    def of_real(values: Sequence[Any]) -> list[Any]:
        return [value for value, is_real in zip(values, real) if is_real]

    starts, found = second_order(
        run, [grad_context, grad_weights], of_real(tensors), of_real(ctx.op_needs), of_real(grads)
    )
    rest = iter(found)
    return (
        *starts, None, *(next(rest) if is_real else None for is_real in real),
        None, None, None, None, [None] * ctx.n_saved, None, None,
    )  # fmt: skip


torch.library.register_autograd("fusedrnn::attend", _attend_grad, setup_context=_attend_setup, lib=lib)
torch.library.register_autograd(
    "fusedrnn::attend_backward", _attend_backward_grad, setup_context=_attend_backward_setup, lib=lib
)
