"""How a call is recorded: who looks on at it, and the autograd Functions that they are answered with.

Eager calls take a plain Function or none; torch.compile, torch.export and tensor subclasses take the
operator; torch.func transforms a Function made for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .operators import Grads, any_grad

Optional = Tensor | None
_PLAIN = frozenset({Tensor, torch.nn.Parameter, type(None)})
_NOTHING = torch.empty(0, device="cpu")
# What a call may be of, with what a compiler has in a tensor's place.
TENSORS = frozenset({Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor})


class Recorded(Protocol):
    """Everything of an eager call that is not a tensor. `tensors` are those that may be differentiated, all
    floating, then `constants` others, which may be None."""

    @property
    def constants(self) -> int: ...

    def forward(self, tensors: Sequence[Any], save: bool) -> tuple[tuple[Tensor, ...], Sequence[Tensor]]:
        """Outputs, and what the backward needs beyond inputs: the first output first, if it does."""

    def backward(
        self,
        grads: Sequence[Optional],
        tensors: Sequence[Any],
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        differentiable: bool = False,
    ) -> Grads:
        """A gradient per differentiable tensor; with `differentiable` as differentiable code."""


class Call(Recorded, Protocol):
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


def run(call: Call, *tensors: Any) -> tuple[Tensor, ...]:
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
        return Fast.apply(call, *tensors)
    return call.forward(tensors, False)[0]


# ---- eager fast path ---------------------------------------------------------------------------


class Fast(torch.autograd.Function):
    """The operator without the dispatcher: about a third of its overhead."""

    @staticmethod
    def forward(ctx: Any, call: Recorded, *tensors: Optional) -> tuple[Tensor, ...]:
        outputs, saved = call.forward(tensors, save=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        output = outputs[0]
        ctx.writes = None
        if saved and saved[0] is output:
            # Whoever gets it may write into it, as into what torch's modules give back.
            ctx.writes, ctx.version = _counter_of(output), output._version
            saved = [output.data, *saved[1:]]
        ctx.save_for_backward(*tensors, *saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Optional) -> tuple[Optional, ...]:
        needs = ctx.needs_input_grad[1:]
        n = len(needs)
        flat = ctx.saved_tensors
        constants = ctx.call.constants
        needs = needs[: n - constants]
        tensors, saved = flat[:n], flat[n:]
        if ctx.writes is not None and ctx.writes._version != ctx.version:
            with torch.no_grad():
                _, saved = ctx.call.forward(tensors, save=True)  # the output is no longer what it was
        # create_graph=True: the operator knows its second order
        found = ctx.call.backward(grads, tensors, saved, needs, differentiable=torch.is_grad_enabled())
        return (None, *(g if need else None for g, need in zip(found, needs)), *[None] * constants)


def _counter_of(tensor: Tensor) -> Tensor:
    """A tensor without memory whose version changes with every write into another one or a view of it."""
    counter = tensor.detach()
    counter.data = _NOTHING if tensor.is_cpu else tensor.new_empty(0)
    return counter


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
    def plain(call: Call, constants: Sequence[Optional]) -> Any:
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
        if info.batch_size == 0:
            raise RuntimeError("vmap: expected at least one sample, got a dimension of size 0")
        outs = [cls.apply(*sample) for sample in _samples(info, in_dims, args)]
        return tuple(torch.stack(column) for column in zip(*outs)), (0,) * len(outs[0])


def _split(call: Call, tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Optional]]:
    n = len(tensors) - call.constants
    return tensors[:n], tensors[n:]


class _Transformed(_Transformable):
    """The operator under torch.func transforms; old-style Functions are refused there."""

    @staticmethod
    def plain(call: Call, constants: Sequence[Optional]) -> Any:
        return lambda *varied: call.reference(*varied, *constants)

    @staticmethod
    def forward(call: Call, *tensors: Optional) -> tuple[Tensor, ...]:
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
    def plain(call: Call, constants: Sequence[Optional]) -> Any:
        n = call.outputs

        def vjp(*tensors: Tensor) -> tuple[Tensor, ...]:
            run = _Transformed.plain(call, constants)
            return torch.func.vjp(run, *tensors[n:])[1](tuple(tensors[:n]))

        return vjp

    @staticmethod
    def forward(call: Call, *tensors: Optional) -> tuple[Tensor, ...]:
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
