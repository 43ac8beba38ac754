"""The layer's kernels: csrc/layer.cpp reads tensors and keeps packed weights. CUDA tensors go to `cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dtypes import accumulation
from .. import gpu
from . import _C, _stored, cuda, no_kernel


class _Cell(NamedTuple):
    number: int  # in csrc/cpu/scan.h
    gates: int
    saves: bool  # the gates, and c or the n gate's recurrent half


_CELLS = {
    "rnn_tanh": _Cell(0, 1, False),
    "rnn_relu": _Cell(1, 1, False),
    "lstm": _Cell(2, 4, True),
    "gru": _Cell(3, 3, True),
}


def unsupported(cell: str, dtype: torch.dtype, device_type: str, hidden: int | None = None) -> str | None:
    """Why a request cannot run here; None if it can."""
    if cell not in _CELLS:
        return f"has no kernel for cell {cell!r}"
    if device_type == cuda.DEVICE_TYPE:
        return cuda.unsupported(cell, dtype, hidden)
    return no_kernel(dtype, device_type)


def saved_tensors(
    cell: str, directions: int, rows: int, hidden: int, proj: bool, dtype: torch.dtype, save: int, device: str
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what `forward` returns as saved."""
    if device == cuda.DEVICE_TYPE:
        return gpu.saved_tensors(cuda.CELLS[cell], directions, rows, hidden, proj, dtype, save)
    spec = _CELLS[cell]
    shapes: list[tuple[int, ...]] = []
    if spec.saves:
        shapes += [(directions, rows, spec.gates * hidden), (directions, rows, hidden)]
    if proj:
        shapes.append((directions, rows, hidden))
    return [(shape, accumulation(dtype)) for shape in shapes]


def one_step(
    cell: str, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None], is_layer: bool
) -> tuple[Tensor, ...] | None:
    """The states after a step of a cell, [B, H] or [H]; of a layer [1, B, H], and its output before them.

    It validates (csrc/one_step.cpp), and returns None where it does not know such arguments.

    Args:
        input: [B, I] or [I]; of a layer [1, B, I] or [B, 1, I].
        states: of the step before.
        weights: ih, hh, and both biases or none.
    """
    if input.device.type == cuda.DEVICE_TYPE:
        return None
    c = states[1] if len(states) == 2 else None
    biases = weights[2:] or (None, None)
    return _C.one_step(  # type: ignore[union-attr]
        _CELLS[cell].number, torch.get_num_threads(), is_layer, input, states[0], c, *weights[:2], *biases
    )


def stack(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Any,
    params: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    watched: bool,
) -> tuple[Tensor, ...] | bool | None:
    """A stack's output ``[T, B, D*P]`` (``[N, D*P]`` packed) and last states, where nobody looks on.

    Args: as torch._VF has them; ``hx`` is a state, a tuple of them, or None for zeros.
        watched: whether a derivative is wanted: then nothing is computed.

    Returns:
        None where the arguments are not plain tensors in the CPU's memory that fit each other; True of a
        watched call whose arguments are.
    """
    if input.device.type == cuda.DEVICE_TYPE:
        return None
    return _C.layers(  # type: ignore[union-attr]
        _CELLS[cell].number, torch.get_num_threads(), input, batch_sizes, hx, params, has_biases, num_layers,
        bidirectional, batch_first, watched,
    )  # fmt: skip


def forward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    save: int,
    resets: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One layer. Shapes: docs/architecture.md, "The layer". Everything is contiguous."""
    if input.device.type == cuda.DEVICE_TYPE:
        with torch.cuda.device_of(input):
            return gpu.forward(cuda, cell, input, batch_sizes, weights, states, directions, save, resets)
    dtype = input.dtype
    if dtype is torch.float16:
        input, weights, states = _stored(input), [*map(_stored, weights)], [*map(_stored, states)]
    (output,), last, saved = _C.layer_forward(
        _CELLS[cell].number, torch.get_num_threads(), directions, 1, save, input, batch_sizes, weights,
        states, resets,
    )  # fmt: skip
    if dtype is torch.float16:
        return output.to(dtype), [s.to(dtype) for s in last], saved
    return output, last, saved


def backward(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    output: Tensor,
    saved: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    resets: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of `input`, `weights` and `states`, in their order; None where not needed.

    Reads `saved` and leaves it as it is.
    """
    if input.device.type == cuda.DEVICE_TYPE:
        with torch.cuda.device_of(input):
            return gpu.backward(
                cuda, cell, input, batch_sizes, weights, states, directions, output, saved, grad_output,
                grad_last, needs, resets,
            )  # fmt: skip
    dtype = input.dtype
    if dtype is torch.float16:
        input, output = _stored(input), _stored(output)
        weights, states = [*map(_stored, weights)], [*map(_stored, states)]
        grad_output = None if grad_output is None else _stored(grad_output)
        grad_last = [None if g is None else _stored(g) for g in grad_last]
    d_inputs, d_weights, d_states = _C.layer_backward(
        _CELLS[cell].number, torch.get_num_threads(), directions, 1, input, batch_sizes, weights, states,
        [output], saved, grad_output, grad_last, needs, resets,
    )  # fmt: skip
    return _gradients(dtype, d_inputs, d_weights, d_states)


def _gradients(
    dtype: torch.dtype, d_inputs: list[Tensor], d_weights: list[Any], d_states: list[Any]
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    # each direction makes a gradient of the input of its own
    d_input = None if not d_inputs else d_inputs[0] if len(d_inputs) == 1 else d_inputs[0].add_(d_inputs[1])
    if accumulation(dtype) is not dtype:
        d_input = None if d_input is None else d_input.to(dtype)
        d_weights = [None if g is None else g.to(dtype) for g in d_weights]
        d_states = [None if g is None else g.to(dtype) for g in d_states]
    return d_input, d_weights, d_states


# ---- several layers at once ----------------------------------------------------------------------


def forward_layers(
    cell: str, input: Tensor, weights: Sequence[Tensor], states: Sequence[Tensor], layers: int, save: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Dense layers of one direction, on the CPU, in fp32, fp64 or bf16: `forward` of all of them.

    Args:
        weights, states: of all layers; ``states`` each ``[L, B, ...]``.

    Returns:
        The output of each layer, the last states as `states`, and what each layer has saved.
    """
    return _C.layer_forward(  # type: ignore[union-attr]
        _CELLS[cell].number, torch.get_num_threads(), 1, layers, save, input, None, weights, states, None
    )


def backward_layers(
    cell: str,
    input: Tensor,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    layers: int,
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    grad_output: Tensor | None,
    grad_last: Sequence[Tensor | None],
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """`backward` of `forward_layers`."""
    found = _C.layer_backward(  # type: ignore[union-attr]
        _CELLS[cell].number, torch.get_num_threads(), 1, layers, input, None, weights, states, outputs, saved,
        grad_output, grad_last, needs, None,
    )  # fmt: skip
    return _gradients(input.dtype, *found)
