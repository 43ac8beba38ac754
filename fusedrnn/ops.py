"""Run a layer: :func:`layer` picks the cheapest entry to the operator that is right for the moment.

Eager calls take a plain autograd Function or none; torch.compile, torch.export and tensor
subclasses take `torch.ops.fusedrnn.layer`; torch.func transforms a Function made for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor

from .backends.reference import layer as reference
from .cells import CELLS
from .operators import Grads, any_grad
from .operators.layer import call_layer, launch_backward, launch_forward, split

# ---- eager fast path ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Static:
    """Everything of a call that is not a differentiable tensor (opaque to pytree)."""

    cell: str
    batch_sizes: Tensor | None
    n_weights: int
    directions: int
    backend: str

    def forward(self, tensors: Sequence[Tensor], save: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        input, weights, states = split(tensors, self.n_weights)
        return launch_forward(
            input, self.batch_sizes, weights, states, self.cell, self.directions, save, self.backend
        )

    def backward(
        self,
        grads: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        output: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        input, weights, states = split(tensors, self.n_weights)
        grad_last: Sequence[Tensor | None] = grads[1:]
        launch = launch_backward
        if differentiable:
            grad_last = [torch.zeros_like(s) if g is None else g for s, g in zip(states, grad_last)]
            launch = torch.ops.fusedrnn.layer_backward
        return launch(
            grads[0], grad_last, input, self.batch_sizes, weights, states, output, saved, self.cell,
            self.directions, self.backend, needs,
        )  # fmt: skip

    def reference(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, weights, states = split(tensors, self.n_weights)
        output, last = reference.layer(self.cell, input, self.batch_sizes, weights, states, self.directions)
        return (output, *last)


class _Fast(torch.autograd.Function):
    """The operator without the dispatcher: about a third of its overhead."""

    @staticmethod
    def forward(ctx: Any, static: _Static, *tensors: Tensor) -> tuple[Tensor, ...]:
        output, last, saved = static.forward(tensors, save=True)
        ctx.static = static
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output, *saved)
        return (output, *last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        n = len(needs)
        flat = ctx.saved_tensors
        # create_graph=True: the operator knows its second order
        found = ctx.static.backward(
            grads, flat[:n], flat[n], flat[n + 1 :], needs, differentiable=torch.is_grad_enabled()
        )
        return (None, *(g if need else None for g, need in zip(found, needs)))


# ---- function transforms: vmap, jvp, func.grad -------------------------------------------------


def _samples(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The calls that a vmapped call stands for, one per sample."""
    columns = [
        arg.movedim(dim, 0).unbind(0) if dim is not None else [arg] * info.batch_size
        for arg, dim in zip(args, in_dims)
    ]
    return list(zip(*columns))


class _Transformable(torch.autograd.Function):
    """What both Functions below share; `plain(static)` is each one as differentiable torch code."""

    @staticmethod
    def plain(static: _Static) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.static = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @classmethod
    def _jvp(cls, ctx: Any, tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        # make_dual refuses expanded tensors
        primals = tuple(p.contiguous() for p in ctx.saved_tensors)
        full = tuple(torch.zeros_like(p) if t is None else t.contiguous() for p, t in zip(primals, tangents))
        return torch.func.jvp(cls.plain(ctx.static), primals, full)[1]

    @classmethod
    def _vmap(cls, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        outs = [cls.apply(*sample) for sample in _samples(info, in_dims, args)]
        return tuple(torch.stack(column) for column in zip(*outs)), (0,) * len(outs[0])


class _Transformed(_Transformable):
    """The operator under torch.func transforms; old-style Functions are refused there."""

    @staticmethod
    def plain(static: _Static) -> Any:
        return static.reference

    @staticmethod
    def forward(static: _Static, *tensors: Tensor) -> tuple[Tensor, ...]:
        output, last, _ = static.forward(tensors, save=False)
        return (output, *last)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_TransformedBackward.apply(ctx.static, *grads, *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _Transformed._jvp(ctx, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _Transformed._vmap(info, in_dims, args)


class _TransformedBackward(_Transformable):
    """The gradient of `_Transformed`, itself transformable."""

    @staticmethod
    def plain(static: _Static) -> Any:
        n = 1 + len(CELLS[static.cell].states)

        def vjp(*tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(static.reference, *tensors[n:])[1](tuple(tensors[:n]))

        return vjp

    @staticmethod
    def forward(static: _Static, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = 1 + len(CELLS[static.cell].states)
        grads, primals = tensors[:n], tensors[n:]
        output, _, saved = static.forward(primals, save=True)
        found = static.backward(grads, primals, output, saved, [True] * len(primals))
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, primals))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plain = _TransformedBackward.plain(ctx.static)
        return (None, *torch.func.vjp(plain, *ctx.saved_tensors)[1](grads))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        return _TransformedBackward._jvp(ctx, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _TransformedBackward._vmap(info, in_dims, args)


# ---- the entry ---------------------------------------------------------------------------------


def layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    directions: int,
    backend: str,
) -> tuple[Tensor, list[Tensor]]:
    """Run one layer, all its directions, on ``backend``; differentiable, compilable, vmappable.

    Shapes: docs/architecture.md, "The layer". Arguments are trusted: functional validates.

    Returns:
        The output ``[T, B, D*P]`` (``[N, D*P]`` packed) and the last states, each ``[D, B, ...]``.
    """
    wants_grad = torch.is_grad_enabled() and any_grad((input,), weights, states)
    if torch.compiler.is_compiling():
        output, last, _ = call_layer(
            input, batch_sizes, weights, states, cell, directions, wants_grad, backend
        )
        return output, last
    if functorch.peek_interpreter_stack() is not None:
        static = _Static(cell, batch_sizes, len(weights), directions, backend)
        output, *last = _Transformed.apply(static, input, *weights, *states)
        return output, last
    if torch.autograd.forward_ad._current_level >= 0:
        # a custom operator would drop the tangents without a word
        return reference.layer(cell, input, batch_sizes, weights, states, directions)
    if torch._C._len_torch_dispatch_stack() or not _plain(input, weights, states):
        output, last, _ = call_layer(
            input, batch_sizes, weights, states, cell, directions, wants_grad, backend
        )
        return output, last
    if wants_grad:
        static = _Static(cell, batch_sizes, len(weights), directions, backend)
        output, *last = _Fast.apply(static, input, *weights, *states)
        return output, last
    output, last, _ = launch_forward(input, batch_sizes, weights, states, cell, directions, False, backend)
    return output, last


_PLAIN = frozenset({Tensor, torch.nn.Parameter})


def _plain(input: Tensor, *groups: Sequence[Tensor]) -> bool:
    return type(input) in _PLAIN and all(type(t) in _PLAIN for group in groups for t in group)
