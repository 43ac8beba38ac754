"""`fusedrnn::layer` and `fusedrnn::layer_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import select
from ..backends.reference import layer as reference
from ..cells import CELLS
from ..saving import EVERYTHING
from . import Grads, lib, second_order, without_autocast

# Lists are flat so that one schema serves every cell: layer returns
# [output, *last_states, *saved]; layer_backward returns one gradient per
# [input, *weights, *states], an empty tensor where `needs` is false.
lib.define(
    "layer(Tensor input, Tensor? batch_sizes, Tensor[] weights, Tensor[] states, str cell,"
    " int directions, int save, str backend, Tensor? resets) -> Tensor[]"
)
lib.define(
    "layer_backward(Tensor? grad_output, Tensor[] grad_last, Tensor input, Tensor? batch_sizes,"
    " Tensor[] weights, Tensor[] states, Tensor output, Tensor[] saved, str cell, int directions,"
    " str backend, bool[] needs, Tensor? resets) -> Tensor[]"
)


def split(flat: Sequence[Any], weights: int) -> tuple[Any, list[Any], list[Any]]:
    return flat[0], list(flat[1 : 1 + weights]), list(flat[1 + weights :])


# ---- launches ----------------------------------------------------------------------------------


def _memory(tensor: Tensor | None) -> Tensor | None:
    """A tensor whose memory holds its values: contiguous, and not lazily negated."""
    return None if tensor is None else tensor.contiguous().resolve_neg()


@without_autocast
def launch_forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    directions: int,
    save: int,
    backend: str,
    resets: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return select.kernels(backend, "layer").forward(
        cell,
        input.contiguous(),
        batch_sizes,
        [w.contiguous() for w in weights],
        [s.contiguous() for s in states],
        directions,
        save,
        None if resets is None else resets.contiguous(),
    )


@without_autocast
def launch_backward(
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    output: Tensor,
    saved: Sequence[Tensor],
    cell: str,
    directions: int,
    backend: str,
    needs: Sequence[bool],
    resets: Tensor | None,
) -> Grads:
    grad_input, grad_weights, grad_states = select.kernels(backend, "layer").backward(
        cell,
        input.contiguous(),
        batch_sizes,
        [w.contiguous() for w in weights],
        [s.contiguous() for s in states],
        directions,
        output.contiguous(),
        [t.contiguous() for t in saved],
        _memory(grad_output),
        [_memory(g) for g in grad_last],
        split(needs, len(weights)),
        None if resets is None else resets.contiguous(),
    )
    return [grad_input, *grad_weights, *grad_states]


def launch_layers(
    input: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    layers: int,
    save: int,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    kernels = select.kernels("native", "layer")
    return kernels.forward_layers(cell, input.contiguous(), weights, states, layers, save)


def launch_layers_backward(
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    input: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    cell: str,
    layers: int,
    needs: Sequence[bool],
) -> Grads:
    # hooks of saved tensors may have changed how they lie
    lists = weights, states, outputs, saved
    weights, states, outputs, saved = ([t.contiguous() for t in tensors] for tensors in lists)
    grad_input, grad_weights, grad_states = select.kernels("native", "layer").backward_layers(
        cell, input.contiguous(), weights, states, layers, outputs, saved, _memory(grad_output),
        [_memory(g) for g in grad_last], split(needs, len(weights)),
    )  # fmt: skip
    return [grad_input, *grad_weights, *grad_states]


def _layer_impl(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    states: list[Tensor],
    cell: str,
    directions: int,
    save: int,
    backend: str,
    resets: Tensor | None,
) -> list[Tensor]:
    output, last, saved = launch_forward(
        input, batch_sizes, weights, states, cell, directions, save, backend, resets
    )
    return [output, *last, *saved]


def _layer_backward_impl(
    grad_output: Tensor | None,
    grad_last: list[Tensor],
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    states: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    cell: str,
    directions: int,
    backend: str,
    needs: list[bool],
    resets: Tensor | None,
) -> list[Tensor]:
    grads = launch_backward(
        grad_output, grad_last, input, batch_sizes, weights, states, output, saved, cell, directions,
        backend, needs, resets,
    )  # fmt: skip
    return [
        (input.new_empty(0) if not need else torch.zeros_like(like) if grad is None else grad)
        for grad, need, like in zip(grads, needs, (input, *weights, *states))
    ]


lib.impl("layer", _layer_impl, "CompositeExplicitAutograd")
lib.impl("layer_backward", _layer_backward_impl, "CompositeExplicitAutograd")


# ---- fakes -------------------------------------------------------------------------------------


@torch.library.register_fake("fusedrnn::layer", lib=lib)
def _layer_fake(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    states: list[Tensor],
    cell: str,
    directions: int,
    save: int,
    backend: str,
    resets: Tensor | None,
) -> list[Tensor]:
    rows = input.shape[:-1]
    proj = len(weights) // directions in (3, 5)
    hidden = weights[0].shape[0] // len(CELLS[cell].gates)
    output = input.new_empty((*rows, directions * states[0].shape[-1]))
    last = [s.new_empty(s.shape) for s in states]
    saved = []
    if save:
        n = rows[0] if len(rows) == 1 else rows[0] * rows[1]
        kernels = select.kernels(backend, "layer")
        sizes = (directions, n, hidden, proj)
        found = kernels.saved_tensors(cell, *sizes, input.dtype, save, input.device.type)
        saved = [input.new_empty(shape, dtype=dtype) for shape, dtype in found]
    return [output, *last, *saved]


@torch.library.register_fake("fusedrnn::layer_backward", lib=lib)
def _layer_backward_fake(
    grad_output: Tensor | None,
    grad_last: list[Tensor],
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: list[Tensor],
    states: list[Tensor],
    output: Tensor,
    saved: list[Tensor],
    cell: str,
    directions: int,
    backend: str,
    needs: list[bool],
    resets: Tensor | None,
) -> list[Tensor]:
    return [
        like.new_empty(like.shape) if need else input.new_empty(0)
        for like, need in zip((input, *weights, *states), needs)
    ]


# ---- autograd of the operators -----------------------------------------------------------------


def _layer_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    input, batch_sizes, weights, states, ctx.cell, ctx.directions, ctx.save, ctx.backend, resets = inputs
    ctx.set_materialize_grads(False)
    ctx.counts = len(weights), len(states)
    ctx.batch_sizes, ctx.resets = batch_sizes, resets
    saved = output[1 + len(states) :]
    # Whoever gets the output may write into it.
    ctx.save_for_backward(input, *weights, *states, output[0].clone(), *saved)


def _layer_grad(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    n_weights, n_states = ctx.counts
    flat = ctx.saved_tensors
    input, weights, rest = split(flat, n_weights)
    states, output, saved = rest[:n_states], rest[n_states], rest[n_states + 1 :]
    if not ctx.save:  # recorded without gradients in mind: make the saved tensors now
        *_, saved = call_layer(
            input, ctx.batch_sizes, weights, states, ctx.cell, ctx.directions, EVERYTHING, ctx.backend,
            ctx.resets,
        )  # fmt: skip
    grad_last = [torch.zeros_like(s) if g is None else g for s, g in zip(states, grads[1 : 1 + n_states])]
    grad_needs = ctx.needs_input_grad  # register_autograd nests the flags of a list argument
    needs = [bool(grad_needs[0]), *map(bool, grad_needs[2]), *map(bool, grad_needs[3])]
    found = torch.ops.fusedrnn.layer_backward(
        grads[0], grad_last, input, ctx.batch_sizes, weights, states, output, saved, ctx.cell,
        ctx.directions, ctx.backend, needs, ctx.resets,
    )  # fmt: skip
    kept = [g if need else None for g, need in zip(found, needs)]
    grad_input, grad_weights, grad_states = split(kept, n_weights)
    return grad_input, None, grad_weights, grad_states, None, None, None, None, None


def call_layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    directions: int,
    save: int,
    backend: str,
    resets: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    out = torch.ops.fusedrnn.layer(
        input, batch_sizes, list(weights), list(states), cell, directions, save, backend, resets
    )
    return out[0], list(out[1 : 1 + len(states)]), list(out[1 + len(states) :])


def _layer_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grad_output, grad_last, input, batch_sizes, weights, states = inputs[:6]
    ctx.cell, ctx.directions, ctx.op_needs = inputs[8], inputs[9], inputs[11]
    ctx.set_materialize_grads(False)
    ctx.batch_sizes, ctx.resets = batch_sizes, inputs[12]
    ctx.counts = len(weights), len(states), len(inputs[7])
    ctx.has_grad_output = grad_output is not None
    head = (grad_output,) if grad_output is not None else ()
    ctx.save_for_backward(*head, *grad_last, input, *weights, *states)


def _layer_backward_grad(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Second order, by the reference: differentiate its first-order gradient."""
    n_weights, n_states, n_saved = ctx.counts
    flat = list(ctx.saved_tensors)
    head = flat.pop(0) if ctx.has_grad_output else None
    grad_last, tensors = flat[:n_states], flat[n_states:]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        input, weights, states = split(tensors, n_weights)
        output, last = reference.layer(
            ctx.cell, input, ctx.batch_sizes, weights, states, ctx.directions, ctx.resets
        )
        return (output, *last)

    (grad_head, *grad_grad_last), found = second_order(run, [head, *grad_last], tensors, ctx.op_needs, grads)
    grad_input, grad_weights, grad_states = split(found, n_weights)
    return (
        grad_head, grad_grad_last, grad_input, None, grad_weights, grad_states,
        None, [None] * n_saved, None, None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("fusedrnn::layer", _layer_grad, setup_context=_layer_setup, lib=lib)
torch.library.register_autograd(
    "fusedrnn::layer_backward", _layer_backward_grad, setup_context=_layer_backward_setup, lib=lib
)
