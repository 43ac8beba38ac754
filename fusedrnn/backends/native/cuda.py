"""The CUDA scans of `fusedrnn._C` (csrc/cuda/scan.h): the schedule, weights as they are read, launches.

float32, float16 and bfloat16 are stored as they are. Products of float32 are as torch's flags for recurrent
networks say: "tf32"; "ieee", by plain instructions; where neither is said, by three products in tf32 for
one, as exact as float32's, if that is faster on this GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gpu
from . import _C, _pointer

DEVICE_TYPE = "cuda"
kernels: Any = None if _C is None else _C.cuda


class _Cell(NamedTuple):
    number: int  # in csrc/cuda/scan.h
    gates: int
    states: int
    saved: int
    split: bool


CELLS = {
    "rnn_tanh": _Cell(0, 1, 1, 0, False),
    "rnn_relu": _Cell(1, 1, 1, 0, False),
    "lstm": _Cell(2, 4, 2, 4, False),
    "gru": _Cell(3, 3, 1, 4, True),
}
_STORAGE = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}  # in csrc/cuda/scan.h
_TF32, _SPLIT = 1, 4
# Compute capabilities whose instructions for matrices do three products in tf32 while plain ones do one:
# 512 to 64 a clock on 8.0, at least 512 to 128 on 9.0 and 10.0; elsewhere 128 to 128.
_SPLIT_PAYS = {(8, 0), (9, 0), (10, 0), (10, 3)}
_SCHEDULES = {"cta": 0, "cluster": 2, "grid": 1, "stepped": 3}  # the less a step waits for, the better
_PIECE = 16  # bytes that a row of weights is filled up to


def unsupported(cell: str, dtype: torch.dtype, hidden: int | None) -> str | None:
    """Why a layer cannot run on the current device; None if it can. Without `hidden`, one of any size.

    Raises:
        RuntimeError: CUDA failed while it was asked, which says nothing of the next time.
    """
    if kernels.missing is not None:
        return f"has no CUDA kernels in this build ({kernels.missing})"
    if dtype not in _STORAGE:
        return f"has CUDA kernels for float32, float16 and bfloat16, got {dtype}"
    if hidden is None:
        return None
    try:
        for backward in (False, True):
            _schedule(cell, _storage(dtype), hidden, backward, _device())
    except NotImplementedError as error:
        return str(error)
    return None


def step(c: gpu.Call, states: Sequence[Tensor], output: Tensor, saved: gpu.Saved) -> None:
    """Nothing of its own: a scan of one step."""


def forward(c: gpu.Call, x_gates: Tensor, start: Tensor, states: Tensor, h: Tensor, saved: gpu.Saved) -> None:
    weight, bias = _in_pieces(c.weight_hh), c.stacked("bias_hh")
    schedule, ends = _planned(c, backward=False)
    fields = (
        *_sizes(c, schedule),
        *map(_pointer, (x_gates, weight, bias, start, states)),
        *_strided(h),
        *map(_pointer, (saved.gates, saved.cells, *ends)),
    )
    kernels.scan_forward(fields, _stream())


def backward(
    c: gpu.Call,
    saved: gpu.Saved,
    states: Sequence[Tensor],
    h: Tensor,
    grad: Tensor | None,
    d_states: Tensor,
    d_x_gates: Tensor,
    d_h_gates: Tensor,
) -> None:
    weight = _in_pieces(c.weight_hh.transpose(1, 2).unflatten(2, (c.cell.gates, c.hidden)))
    schedule, ends = _planned(c, backward=True)
    fields = (
        *_sizes(c, schedule),
        _pointer(weight),
        *_strided(h if saved.gates is None else saved.gates),
        *map(_pointer, (saved.cells, states[-1])),
        *_strided(h),
        _pointer(states[0]),
        *_strided(grad),
        *map(_pointer, (d_states, d_x_gates, d_h_gates, *ends)),
    )
    kernels.scan_backward(fields, _stream())


def gates_again(c: gpu.Call, states: Sequence[Tensor], output: Tensor) -> Tensor:
    """By the scan once more."""
    gates = c.x.new_empty((c.directions, c.rows, c.cell.saved * c.hidden))
    h = c.x.new_empty((c.directions, c.rows, c.hidden))
    forward(c, *gpu.prepared(c, states), h, gpu.Saved(gates, None, None))
    return gates


# ---- which schedule ----------------------------------------------------------------------------


def schedule(cell: str, dtype: torch.dtype, hidden: int, backward: bool = False) -> str:
    """The name of the schedule that runs a scan on the current device. Raises what `_schedule` does."""
    number = _schedule(cell, _storage(dtype), hidden, backward, _device())
    return next(name for name, known in _SCHEDULES.items() if known == number)


@cache
def _schedule(cell: str, storage: int, hidden: int, backward: bool, device: int) -> int:
    """The first that can run the scan, asked of the code that launches it.

    Raises:
        NotImplementedError: none can, or the device runs no code of this build.
        RuntimeError: CUDA failed.
    """
    for schedule in _SCHEDULES.values():
        if kernels.scan_fits(CELLS[cell].number, storage, schedule, hidden, backward):
            return schedule
    raise NotImplementedError(f"has no schedule for {cell} with H = {hidden} on this GPU")


def _planned(c: gpu.Call, backward: bool) -> tuple[int, tuple[Tensor | None, ...]]:
    """The schedule, and what both structs of scan.h end with."""
    schedule = _schedule(c.name, _storage(c.x.dtype), c.hidden, backward, _device())
    counters = None
    if schedule == _SCHEDULES["grid"]:
        counters = c.x.new_zeros(c.directions * c.batch, dtype=torch.int32)
    return schedule, (c.resets, c.offsets, c.lengths, counters)


def _storage(dtype: torch.dtype) -> int:
    if dtype is torch.float32:
        precision = gpu.precision()
        if precision == "tf32":
            return _TF32
        if precision != "ieee" and _split_pays(_device()):
            return _SPLIT
    return _STORAGE[dtype]


@cache
def _split_pays(device: int) -> bool:
    return torch.cuda.get_device_capability(device) in _SPLIT_PAYS


def _device() -> int:
    if not torch.cuda.is_available():
        raise NotImplementedError("there is no GPU to ask whether it can hold the weights")
    return torch.cuda.current_device()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


# ---- fields of scan.h --------------------------------------------------------------------------


def _sizes(c: gpu.Call, schedule: int) -> tuple[int, ...]:
    number = CELLS[c.name].number
    return number, _storage(c.x.dtype), schedule, c.directions, c.time, c.batch, c.hidden, c.rows


def _strided(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of [D, N, ...]."""
    return (0, 0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _in_pieces(weight: Tensor) -> Tensor:
    """With rows of whole pieces, the new columns zero, in aligned memory."""
    short = -weight.shape[-1] % (_PIECE // weight.element_size())
    weight = torch.nn.functional.pad(weight, (0, short)) if short else weight
    weight = weight.contiguous()
    return weight if weight.data_ptr() % _PIECE == 0 else weight.clone()
