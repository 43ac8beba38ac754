"""The layer's kernels: tensors to raw pointers, and weight packing. CUDA tensors go to `cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import gpu
from . import _C, _STORAGE, _pointer, _stored, _sums, _wide, cuda, no_kernel
from .kept import Kept


class _Cell(NamedTuple):
    number: int  # in csrc/cpu/scan.h
    gates: int
    states: int
    saves_gates: bool
    extra: bool
    split_gate: bool  # the last gate's h_gates gradient is not its x_gates gradient


_CELLS = {
    "rnn_tanh": _Cell(0, 1, 1, False, False, False),
    "rnn_relu": _Cell(1, 1, 1, False, False, False),
    "lstm": _Cell(2, 4, 2, True, True, False),
    "gru": _Cell(3, 3, 1, True, True, True),
}
_T = TypeVar("_T")


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
    if spec.saves_gates:
        shapes.append((directions, rows, spec.gates * hidden))
    if spec.extra:
        shapes.append((directions, rows, hidden))
    if proj:
        shapes.append((directions, rows, hidden))
    return [(shape, _sums(dtype)) for shape in shapes]


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


# ---- packed weights ----------------------------------------------------------------------------


# For each weight, by kind: what the pack was made from, and the pack.
_packs: Kept[dict[str, tuple[tuple[object, ...], Tensor]]] = Kept(lambda weight: {})


def _packed(weight: Tensor, kind: str, gates: int = 1) -> Tensor:
    """The weight packed by "rows" or "columns" (csrc/cpu/pack.h), from the table while it is the same.

    The version counter misses writes through `.data`, so the content itself is part of the key.
    A pack is never changed once made: another thread may be using it.
    """
    pointer = weight.data_ptr()
    key = (
        pointer,
        weight.shape,
        None if weight.is_inference() else weight._version,
        _C.fingerprint(pointer, weight.nbytes),
        _C.isa(),
        gates,
    )
    packs = _packs.of(weight)
    found = packs.get(kind)
    if found is not None and found[0] == key:
        return found[1]
    pack = _pack(_stored(weight), kind, gates)
    packs[kind] = (key, pack)
    return pack


def _pack(weight: Tensor, kind: str, gates: int) -> Tensor:
    storage = _STORAGE[weight.dtype]
    width = _C.width(storage)
    per = 2 if weight.dtype is torch.bfloat16 else 1  # values that a product takes at once
    rows, columns = weight.shape
    threads = torch.get_num_threads()
    if kind == "rows":
        weight = _even(weight)
        columns = weight.shape[-1]
        n = rows // gates
        pack = weight.new_empty(-(-n // width) * width * gates * columns)
        _C.pack_rows(storage, weight.data_ptr(), gates, n, columns, pack.data_ptr(), threads)
    else:
        pack = weight.new_empty(-(-columns // width) * width * -(-rows // per) * per)
        _C.pack_columns(storage, weight.data_ptr(), rows, columns, pack.data_ptr(), threads)
    return pack


def _as_stored(weight: Tensor, kind: str, gates: int) -> Tensor:
    return _stored(weight)


def _even(tensor: Tensor) -> Tensor:
    """bf16 with a column of zeros where the number of columns is odd: they are multiplied in pairs."""
    if tensor.dtype is torch.bfloat16 and tensor.shape[-1] % 2:
        return torch.nn.functional.pad(tensor, (0, 1))
    return tensor


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype. `to` takes a microsecond to find that there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


# ---- the layer ---------------------------------------------------------------------------------


class _Weights(NamedTuple, Generic[_T]):
    ih: _T  # [G*H, I]
    hh: _T  # [G*H, P]
    bias_ih: _T | None  # [G*H]
    bias_hh: _T | None  # [G*H]
    hr: _T | None  # [P, H]


def _weights(flat: Sequence[_T], directions: int) -> list[_Weights[_T]]:
    each = len(flat) // directions
    found = []
    for d in range(directions):
        w = flat[d * each : (d + 1) * each]
        bias = each >= 4
        found.append(
            _Weights(
                w[0], w[1], w[2] if bias else None, w[3] if bias else None, w[-1] if each in (3, 5) else None
            )
        )
    return found


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
    spec = _CELLS[cell]
    dtype = input.dtype
    gates = spec.gates
    _, batch, proj = states[0].shape
    hidden = weights[0].shape[0] // gates
    x = _even(_stored(input))
    *lead, inputs = x.shape
    time, rows = (lead[0], lead[0] * lead[1]) if batch_sizes is None else (batch_sizes.shape[0], lead[0])
    size, wide = x.element_size(), 8 if dtype is torch.float64 else 4
    per_direction = _weights(weights, directions)

    width = directions * proj
    output = x.new_empty((*lead, width))
    sums = _sums(dtype)
    last = [s.clone() if dtype is sums else s.to(sums) for s in states]  # run in place
    saved: list[Tensor] = []
    if save:
        projected = per_direction[0].hr is not None
        found = saved_tensors(cell, directions, rows, hidden, projected, dtype, save, "cpu")
        saved = [x.new_empty(shape, dtype=kept) for shape, kept in found]
    if rows:
        pointers = [t.data_ptr() for t in saved]
        gates_at = pointers.pop(0) if save and spec.saves_gates else 0
        extra_at = pointers.pop(0) if save and spec.extra else 0
        raw_at = pointers.pop(0) if pointers else 0
        output_at = output.data_ptr()
        last0, last1 = last[0].data_ptr(), last[1].data_ptr() if spec.states == 2 else 0
        shape = (time, batch, hidden, proj, rows, _pointer(batch_sizes))
        # One step reads its weights once: packing them, or checking a pack, would read them again.
        pack = _packed if time > 1 or dtype is torch.bfloat16 else _as_stored
        args, alive = [], []
        for d, w in enumerate(per_direction):
            tensors = (
                pack(w.ih, "rows", gates),
                pack(w.hh, "rows", gates),
                None if w.bias_ih is None else _wide(w.bias_ih),
                None if w.bias_hh is None else _wide(w.bias_hh),
                None if w.hr is None else pack(w.hr, "rows", 1),
            )
            alive.append(tensors)  # the table may drop a pack while it is in use
            args.append(
                (
                    *shape,
                    d,
                    x.data_ptr(),
                    inputs,
                    pack is _packed,
                    *map(_pointer, tensors),
                    output_at + d * proj * size,
                    width,
                    last0 + d * batch * proj * wide,
                    last1 and last1 + d * batch * hidden * wide,
                    gates_at and gates_at + d * rows * gates * hidden * wide,
                    extra_at and extra_at + d * rows * hidden * wide,
                    raw_at and raw_at + d * rows * hidden * wide,
                    0 if resets is None else resets[d].data_ptr(),
                )
            )
        _C.forward(spec.number, _STORAGE[x.dtype], torch.get_num_threads(), *args)
    return _as(output, dtype), [_as(s, dtype) for s in last], saved


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
    spec = _CELLS[cell]
    dtype = input.dtype
    gates = spec.gates
    _, batch, proj = states[0].shape
    hidden = weights[0].shape[0] // gates
    time = input.shape[0] if batch_sizes is None else batch_sizes.shape[0]
    x = _stored(input).view(-1, input.shape[-1])
    rows, size, width = x.shape[0], x.element_size(), directions * proj
    per_direction = _weights(weights, directions)
    projected = per_direction[0].hr is not None

    sums = _sums(dtype)
    initial = [_stored(states[0]), *map(_wide, states[1:])]
    out = _stored(output).view(rows, width)
    d_out = None if grad_output is None else _stored(grad_output)
    d_states = [
        torch.zeros_like(s, dtype=sums) if g is None else g.to(sums, copy=True)
        for s, g in zip(states, grad_last)
    ]
    # Each direction makes a gradient of the input of its own; they are added at the end.
    new = x.new_empty if rows else x.new_zeros
    d_input = new((directions, rows, x.shape[1])) if needs[0] else None
    d_weights = [new(w.shape, dtype=sums) if need else None for w, need in zip(weights, needs[1])]
    if rows:
        args, alive = [], []
        for d, (w, d_w) in enumerate(zip(per_direction, _weights(d_weights, directions))):
            packs = (
                None if d_input is None else _packed(w.ih, "columns"),
                _packed(w.hh, "columns"),
                None if w.hr is None else _packed(w.hr, "columns"),
            )
            alive.append(packs)  # the table may drop a pack while it is in use
            args.append(
                (
                    time,
                    batch,
                    hidden,
                    proj,
                    rows,
                    _pointer(batch_sizes),
                    d,
                    x.data_ptr(),
                    x.shape[1],
                    *map(_pointer, packs),
                    saved[0][d].data_ptr() if spec.saves_gates else 0,
                    saved[1][d].data_ptr() if spec.extra else 0,
                    saved[2][d].data_ptr() if projected else 0,
                    out.data_ptr() + d * proj * size,
                    width,
                    initial[0][d].data_ptr(),
                    initial[1][d].data_ptr() if spec.states == 2 else 0,
                    d_out.data_ptr() + d * proj * size if d_out is not None else 0,
                    width,
                    d_states[0][d].data_ptr(),
                    d_states[1][d].data_ptr() if spec.states == 2 else 0,
                    0 if d_input is None else d_input[d].data_ptr(),
                    *map(_pointer, d_w),
                    0 if resets is None else resets[d].data_ptr(),
                )
            )
        _C.backward(spec.number, _STORAGE[x.dtype], torch.get_num_threads(), *args)

    grad_input = None
    if d_input is not None:
        grad_input = (d_input[0] if directions == 1 else d_input[0].add_(d_input[1])).view(input.shape)
        grad_input = _as(grad_input, dtype)
    grad_weights = [None if g is None else _as(g, dtype) for g in d_weights]
    grad_states = [_as(s, dtype) if need else None for s, need in zip(d_states, needs[2])]
    return grad_input, grad_weights, grad_states
