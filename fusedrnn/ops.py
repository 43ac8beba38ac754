"""Run an operation: :func:`layer` and :func:`attend` pick the cheapest entry that is right for the moment.

Eager calls take a plain autograd Function or none; torch.compile, torch.export and tensor
subclasses take the operator; torch.func transforms a Function made for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from . import saving
from .backends.reference import attend as reference_attend
from .backends.reference import layer as reference
from .operators import Grads, any_grad, first_order
from .operators import attend as attend_operator
from .operators import layer as layer_operator

Optional = Tensor | None
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
# What a call may be of, with what a compiler has in a tensor's place.
TENSORS = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor})


class _Recorded(Protocol):
    """Everything of an eager call that is not a tensor. `tensors` are those that may be differentiated, all
    floating, then `constants` others, which may be None."""

    @property
    def constants(self) -> int: ...

    def forward(self, tensors: Sequence[Any], save: bool) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        """Outputs, and what the backward needs beyond inputs: some of the outputs may be among it."""

    def backward(
        self,
        grads: Sequence[Optional],
        tensors: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        """A gradient per differentiable tensor; with `differentiable` as differentiable code."""


class _Call(_Recorded, Protocol):
    """The same of a call that a compiler or a transform may look on at (opaque to pytree)."""

    @property
    def outputs(self) -> int: ...

    def reference(self, *tensors: Any) -> tuple[Tensor, ...]:
        """The outputs as differentiable torch code."""

    def operator(self, tensors: Sequence[Any], save: bool) -> tuple[Tensor, ...]:
        """The outputs by the operator."""


def unobserved(tensors: Sequence[Any]) -> bool:
    """Whether a call may go straight to its kernel: no derivative, compiler, transform, mode or subclass."""
    return not watched(tensors) and _PLAIN.issuperset(map(type, tensors))


def watched(tensors: Sequence[Any]) -> bool:
    """Whether a derivative, compiler, transform or mode looks on."""
    return (torch.is_grad_enabled() and any_grad(tensors)) or transformed()


def transformed() -> bool:
    """Whether a compiler, transform or mode looks on."""
    return (
        torch.compiler.is_compiling()
        or in_transform()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _run(call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
    """The outputs of a call: differentiable, compilable, vmappable."""
    wants_grad = torch.is_grad_enabled() and any_grad(tensors)
    if torch.compiler.is_compiling():
        return call.operator(tensors, wants_grad)
    if functorch.peek_interpreter_stack() is not None:
        return _Transformed.apply(call, *tensors)
    if torch.autograd.forward_ad._current_level >= 0:
        # a custom operator would drop the tangents without a word
        return call.reference(*tensors)
    if torch._C._len_torch_dispatch_stack() or any(type(t) not in _PLAIN for t in tensors):
        return call.operator(tensors, wants_grad)
    if wants_grad:
        return _Fast.apply(call, *tensors)
    return call.forward(tensors, False)[0]


# ---- eager fast path ---------------------------------------------------------------------------


class _Fast(torch.autograd.Function):
    """The operator without the dispatcher: about a third of its overhead."""

    @staticmethod
    def forward(ctx: Any, call: _Recorded, *tensors: Optional) -> tuple[Tensor, ...]:
        outputs, saved = call.forward(tensors, save=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Optional, ...]:
        needs = ctx.needs_input_grad[1:]
        n = len(needs)
        flat = ctx.saved_tensors
        constants = ctx.call.constants
        needs = needs[: n - constants]
        # create_graph=True: the operator knows its second order
        found = ctx.call.backward(grads, flat[:n], flat[n:], needs, differentiable=torch.is_grad_enabled())
        return (None, *(g if need else None for g, need in zip(found, needs)), *[None] * constants)


# ---- function transforms: vmap, jvp, func.grad -------------------------------------------------


def _samples(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The calls that a vmapped call stands for, one per sample."""
    columns = [
        arg.movedim(dim, 0).unbind(0) if dim is not None else [arg] * info.batch_size
        for arg, dim in zip(args, in_dims)
    ]
    return list(zip(*columns))


class _Transformable(torch.autograd.Function):
    """What both Functions below share; `plain(call, constants)` is each one as differentiable torch code."""

    @staticmethod
    def plain(call: _Call, constants: Sequence[Optional]) -> Any:
        raise NotImplementedError

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @classmethod
    def _jvp(cls, ctx: Any, tangents: tuple[Optional, ...]) -> tuple[Tensor, ...]:
        varied, constants = _split(ctx.call, ctx.saved_tensors)
        # make_dual refuses expanded tensors
        primals = tuple(p.contiguous() for p in varied)
        full = tuple(torch.zeros_like(p) if t is None else t.contiguous() for p, t in zip(primals, tangents))
        return torch.func.jvp(cls.plain(ctx.call, constants), primals, full)[1]

    @classmethod
    def _vmap(cls, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        outs = [cls.apply(*sample) for sample in _samples(info, in_dims, args)]
        return tuple(torch.stack(column) for column in zip(*outs)), (0,) * len(outs[0])


def _split(call: _Call, tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Optional]]:
    n = len(tensors) - call.constants
    return tensors[:n], tensors[n:]


class _Transformed(_Transformable):
    """The operator under torch.func transforms; old-style Functions are refused there."""

    @staticmethod
    def plain(call: _Call, constants: Sequence[Optional]) -> Any:
        return lambda *varied: call.reference(*varied, *constants)

    @staticmethod
    def forward(call: _Call, *tensors: Optional) -> tuple[Tensor, ...]:
        return call.forward(tensors, save=False)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional, ...]:
        found = _TransformedBackward.apply(ctx.call, *grads, *ctx.saved_tensors)
        return (None, *found, *[None] * ctx.call.constants)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Optional) -> tuple[Tensor, ...]:
        return _Transformed._jvp(ctx, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _Transformed._vmap(info, in_dims, args)


class _TransformedBackward(_Transformable):
    """The gradient of `_Transformed`, itself transformable."""

    @staticmethod
    def plain(call: _Call, constants: Sequence[Optional]) -> Any:
        n = call.outputs

        def vjp(*tensors: Tensor) -> tuple[Tensor, ...]:
            run = _Transformed.plain(call, constants)
            return torch.func.vjp(run, *tensors[n:])[1](tuple(tensors[:n]))

        return vjp

    @staticmethod
    def forward(call: _Call, *tensors: Optional) -> tuple[Tensor, ...]:
        grads, primals = tensors[: call.outputs], tensors[call.outputs :]
        varied, _ = _split(call, primals)
        _, saved = call.forward(primals, save=True)
        found = call.backward(grads, primals, saved, [True] * len(varied))
        return tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, varied))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional, ...]:
        varied, constants = _split(ctx.call, ctx.saved_tensors)
        plain = _TransformedBackward.plain(ctx.call, constants)
        return (None, *torch.func.vjp(plain, *varied)[1](grads), *[None] * len(constants))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Optional) -> tuple[Tensor, ...]:
        return _TransformedBackward._jvp(ctx, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _TransformedBackward._vmap(info, in_dims, args)


# ---- the layer ---------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Layer:
    """A layer's call, of [input, *weights, *states] and batch_sizes, resets."""

    cell: str
    n_weights: int
    n_states: int
    directions: int
    backend: str
    constants: int = 2

    @property
    def outputs(self) -> int:
        return 1 + self.n_states

    def _split(self, tensors: Sequence[Any]) -> tuple[Any, Optional, list[Any], list[Any]]:
        input, weights, states = layer_operator.split(tensors[:-2], self.n_weights)
        return input, tensors[-2], weights, states

    def forward(self, tensors: Sequence[Any], save: bool) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        output, last, saved = layer_operator.launch_forward(
            *self._split(tensors), self.cell, self.directions, save and saving.saving(), self.backend,
            tensors[-1],
        )  # fmt: skip
        return (output, *last), [output, *saved]

    def operator(self, tensors: Sequence[Any], save: bool) -> tuple[Tensor, ...]:
        output, last, _ = layer_operator.call_layer(
            *self._split(tensors), self.cell, self.directions, save and saving.saving(), self.backend,
            tensors[-1],
        )  # fmt: skip
        return (output, *last)

    def backward(
        self,
        grads: Sequence[Optional],
        tensors: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        input, batch_sizes, weights, states = self._split(tensors)
        grad_last: Sequence[Optional] = grads[1:]
        launch = layer_operator.launch_backward
        if differentiable:
            grad_last = [torch.zeros_like(s) if g is None else g for s, g in zip(states, grad_last)]
            launch = torch.ops.fusedrnn.layer_backward
        return launch(
            grads[0], grad_last, input, batch_sizes, weights, states, saved[0], saved[1:], self.cell,
            self.directions, self.backend, needs, tensors[-1],
        )  # fmt: skip

    def reference(self, *tensors: Any) -> tuple[Tensor, ...]:
        input, batch_sizes, weights, states = self._split(tensors)
        output, last = reference.layer(
            self.cell, input, batch_sizes, weights, states, self.directions, tensors[-1]
        )
        return (output, *last)


def layer(
    input: Tensor,
    batch_sizes: Optional,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    directions: int,
    backend: str,
    resets: Optional = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run one layer, all its directions, on ``backend``.

    Shapes: docs/architecture.md, "The layer". Arguments are trusted: functional validates.

    Returns:
        The output ``[T, B, D*P]`` (``[N, D*P]`` packed) and the last states, each ``[D, B, ...]``.
    """
    call = _Layer(cell, len(weights), len(states), directions, backend)
    output, *last = _run(call, input, *weights, *states, batch_sizes, resets)
    return output, last


# ---- layers at once ----------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Layers:
    """Dense layers of one direction on the CPU, of [input, *weights, *states]; for eager calls alone."""

    cell: str
    n_weights: int
    layers: int
    run_one_by_one: Callable[..., tuple[Tensor, Sequence[Tensor]]]
    constants: int = 0

    def forward(self, tensors: Sequence[Any], save: bool) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        input, weights, states = layer_operator.split(tensors, self.n_weights)
        (*between, output), last, saved = layer_operator.launch_layers(
            input, weights, states, self.cell, self.layers, save and saving.saving()
        )
        return (output, *last), [*between, output, *saved]

    def backward(
        self,
        grads: Sequence[Optional],
        tensors: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        if differentiable:
            return self._differentiable(grads, tensors, needs)
        input, weights, states = layer_operator.split(tensors, self.n_weights)
        return layer_operator.launch_layers_backward(
            grads[0], grads[1:], input, weights, states, saved[: self.layers], saved[self.layers :],
            self.cell, self.layers, needs,
        )  # fmt: skip

    def _differentiable(
        self, grads: Sequence[Optional], tensors: Sequence[Any], needs: Sequence[bool]
    ) -> Grads:
        """By the layers one after the other, whose operators know their second order."""

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            input, weights, states = layer_operator.split(tensors, self.n_weights)
            output, last = self.run_one_by_one(input, weights, states)
            return (output, *last)

        return first_order(run, grads, tensors, needs)


def layers(
    input: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    num_layers: int,
    run_one_by_one: Callable[..., tuple[Tensor, Sequence[Tensor]]],
) -> tuple[Tensor, list[Tensor]]:
    """Run dense layers of one direction in one call of the CPU's kernels that records a derivative.

    Nobody but autograd looks on, and the tensors are plain, sound and no fp16.

    Args:
        weights, states: of all layers; ``states`` each ``[L, B, ...]``.
        run_one_by_one: the same of (input, weights, states) by :func:`layer`, for derivatives of higher
            order.

    Returns:
        As :func:`layer`, of the last layer and of all.
    """
    call = _Layers(cell, len(weights), num_layers, run_one_by_one)
    output, *last = _Fast.apply(call, input, *weights, *states)
    return output, last


# ---- the attend --------------------------------------------------------------------------------


@dataclass(eq=False, slots=True)
class _Attend:
    """An attend's call, of [query, key, value, (v), (float mask)] and (bool mask), lengths, seed."""

    score: str
    has_v: bool
    has_float_mask: bool
    scale: float
    dropout: float
    need_weights: bool
    backend: str
    constants: int = 3

    @property
    def outputs(self) -> int:
        return 1 + self.need_weights

    def _split(self, tensors: Sequence[Any]) -> tuple[list[Any], Optional]:
        """What the kernels take between score and scale, and the seed."""
        *varied, mask, lengths, seed = tensors
        v = varied[3] if self.has_v else None
        return [*varied[:3], v, varied[-1] if self.has_float_mask else mask, lengths], seed

    def forward(self, tensors: Sequence[Any], save: bool) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        inputs, seed = self._split(tensors)
        context, weights, saved = attend_operator.launch_forward(
            self.score, *inputs, self.scale, self.dropout, seed, self.need_weights, save, self.backend
        )
        return (context,) if weights is None else (context, weights), saved

    def operator(self, tensors: Sequence[Any], save: bool) -> tuple[Tensor, ...]:
        inputs, seed = self._split(tensors)
        context, weights, _ = attend_operator.call_attend(
            self.score, *inputs, self.scale, self.dropout, seed, self.need_weights, save, self.backend
        )
        return (context,) if weights is None else (context, weights)

    def backward(
        self,
        grads: Sequence[Optional],
        tensors: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        inputs, seed = self._split(tensors)
        launch = attend_operator.launch_backward
        if differentiable:
            launch = torch.ops.fusedrnn.attend_backward
        full = [*needs[:3], self.has_v and needs[3], self.has_float_mask and needs[-1]]
        found = launch(
            grads[0], grads[1] if self.need_weights else None, self.score, *inputs, self.scale, self.dropout,
            seed, saved, self.backend, full,
        )  # fmt: skip
        present = (True, True, True, self.has_v, self.has_float_mask)
        return [g for g, is_present in zip(found, present) if is_present]

    def reference(self, *tensors: Any) -> tuple[Tensor, ...]:
        inputs, seed = self._split(tensors)
        run: Any = reference_attend.attend
        both = run(self.score, *inputs, self.scale, self.dropout, seed)
        return both[: self.outputs]


def attend(
    score: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Optional,
    mask: Optional,
    lengths: Optional,
    scale: float,
    dropout: float,
    seed: Optional,
    need_weights: bool,
    backend: str,
    straight: bool = False,
) -> tuple[Tensor, Optional]:
    """Run one attend on ``backend``; ``straight`` to its kernel if the caller knows it `unobserved`.

    Shapes: docs/architecture.md, "The attend". Arguments are trusted: fusedrnn.attend validates.

    Returns:
        The context ``[B, N, Tq, Dv]``, and the weights ``[B, N, Tq, Tk]`` if they are needed.
    """
    if straight:
        return attend_operator.launch_forward(
            score, query, key, value, v, mask, lengths, scale, dropout, seed, need_weights, False, backend
        )[:2]
    is_float = mask is not None and mask.is_floating_point()
    call = _Attend(score, v is not None, is_float, scale, dropout, need_weights, backend)
    floats = [t for t in (v, mask if is_float else None) if t is not None]
    context, *weights = _run(call, query, key, value, *floats, None if is_float else mask, lengths, seed)
    return context, weights[0] if weights else None
