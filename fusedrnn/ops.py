"""Run an operation: :func:`layer`, :func:`layers` and :func:`attend` are what `autograd` records of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import autograd, saving
from .backends.reference import attend as reference_attend
from .backends.reference import layer as reference
from .operators import Grads, first_order
from .operators import attend as attend_operator
from .operators import layer as layer_operator

Optional = Tensor | None


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
    output, *last = autograd.run(call, input, *weights, *states, batch_sizes, resets)
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
        return (output, *last), [output, *between, *saved]

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
        outputs = [*saved[1 : self.layers], saved[0]]
        return layer_operator.launch_layers_backward(
            grads[0], grads[1:], input, weights, states, outputs, saved[self.layers :], self.cell,
            self.layers, needs,
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
    output, *last = autograd.Fast.apply(call, input, *weights, *states)
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
    context, *weights = autograd.run(
        call, query, key, value, *floats, None if is_float else mask, lengths, seed
    )
    return context, weights[0] if weights else None
