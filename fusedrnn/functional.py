"""The functions behind torch.nn's recurrent modules, with the signatures of ``torch._VF`` and ``resets``.

They validate and call :func:`fusedrnn.stack.layers` or :func:`fusedrnn.ops.layer`. A call that torch
refuses, or that no backend knows, goes to torch's own function as it came: its error or its result is the
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from . import autograd, ops, stack, straight
from .backends import hand_over, select
from .cells import CELLS
from .dtypes import DTYPES, in_autocast


def lstm(*args: Any, resets: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A stack of LSTM layers; torch._VF.lstm's two signatures.

    Dense: ``(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)``.
    Packed: ``(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)``.

    Args:
        input: ``[T, B, I]``, or ``[B, T, I]`` if ``batch_first``.
        data, batch_sizes: ``[N, I]`` and int64 ``[T]``, as in a ``PackedSequence``.
        hx: ``(h_0 [L*D, B, P], c_0 [L*D, B, H])``.
        params: per layer and direction ``weight_ih, weight_hh, (bias_ih, bias_hh), (weight_hr)``.
        resets: bool, ``[T, B]``, or ``[B, T]`` if ``batch_first``; ``[N]`` for packed data. True where a
            piece begins: the states before that step are zeros, in every layer, and in both directions each
            piece is computed as if it were alone. ``hx`` is for the piece of the first step, unless that step
            too is a reset; in reverse for the piece of the last step. The last states are those of the last
            piece, in reverse of the first one.

    Returns:
        ``(output, h_n, c_n)``, the states shaped as in ``hx``. Under autocast all are computed in,
        and have, the autocast dtype.

    Raises:
        BackendError: the backend asked for by name cannot run this call; or nothing can but torch's own
            path, which has no ``resets``.
        TypeError, ValueError, RuntimeError: ``resets`` is no tensor, not of bool, or of another shape or
            device than the input's.
        Otherwise what torch's own function raises.
    """
    return _stack("lstm", args, resets)  # type: ignore[return-value]


def gru(*args: Any, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A stack of GRU layers; as :func:`lstm`, with ``hx`` the tensor ``h_0``: ``(output, h_n)``."""
    return _stack("gru", args, resets)  # type: ignore[return-value]


def rnn_tanh(*args: Any, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A stack of Elman layers with tanh; as :func:`gru`."""
    return _stack("rnn_tanh", args, resets)  # type: ignore[return-value]


def rnn_relu(*args: Any, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A stack of Elman layers with ReLU; as :func:`gru`."""
    return _stack("rnn_relu", args, resets)  # type: ignore[return-value]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: input ``[B, I]``, hx ``(h [B, H], c [B, H])`` -> ``(h', c')``."""
    return _cell("lstm", (input, hx, w_ih, w_hh, b_ih, b_hh))


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One GRU step: input ``[B, I]``, hx ``[B, H]`` -> h' ``[B, H]``."""
    return _cell("gru", (input, hx, w_ih, w_hh, b_ih, b_hh))


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One Elman step with tanh; as :func:`gru_cell`."""
    return _cell("rnn_tanh", (input, hx, w_ih, w_hh, b_ih, b_hh))


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One Elman step with ReLU; as :func:`gru_cell`."""
    return _cell("rnn_relu", (input, hx, w_ih, w_hh, b_ih, b_hh))


# ---- what both kinds share ---------------------------------------------------------------------


def _stack(cell: str, args: tuple[Any, ...], resets: Tensor | None) -> tuple[Tensor, ...]:
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(args[0].device.type):
        return _in_autocast_dtype(_stack, cell, args, resets)
    if len(args) != 9:
        return _by_torch(cell, args, "the arguments match neither signature", resets)
    if isinstance(args[3], (list, tuple)):
        input, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional = args
        batch_first = False
    else:
        input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        batch_sizes = None
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    directions = 2 if bidirectional else 1

    if not isinstance(params, (list, tuple)):
        return _by_torch(cell, args, "params is no list of tensors", resets)
    if resets is None:
        made = straight.layers(
            cell, input, batch_sizes, hx, params, has_biases, num_layers, dropout if train else 0.0,
            bidirectional, batch_first,
        )  # fmt: skip
        if made is not None:
            return made
    steps = input if batch_sizes is None else batch_sizes
    if resets is None and type(steps) is Tensor and steps.dim() > batch_first:
        reason = _faster_by_torch(cell, input, steps.shape[int(batch_first)], states, params)
        if reason is not None:
            return _by_torch(cell, args, reason)
    reason = _unknown((input, *states, *params))
    if reason is None:
        if batch_first and input.dim() == 3:
            input = input.transpose(0, 1)
        reason = _misshapen(cell, input, batch_sizes, states, params, has_biases, num_layers, directions)
    if reason is not None:
        return _by_torch(cell, args, reason, resets)
    backend, reason = _backend(cell, input, params, resets is not None)
    if backend == "torch":
        return _by_torch(cell, args, reason, resets)
    if resets is not None:
        resets = _by_direction(resets, input, batch_sizes, batch_first, directions)

    output, last = stack.layers(
        input, batch_sizes, params, states, cell, directions, num_layers, dropout if train else 0.0, backend,
        resets,
    )  # fmt: skip
    if batch_first:
        output = output.transpose(0, 1)
    return (output, *last)


def _cell(cell: str, args: tuple[Any, ...]) -> Any:
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(args[0].device.type):
        return _in_autocast_dtype(_cell, cell, args)
    input, hx, w_ih, w_hh, b_ih, b_hh = args
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    has_biases = b_ih is not None or b_hh is not None
    params = (w_ih, w_hh, b_ih, b_hh) if has_biases else (w_ih, w_hh)

    made = straight.one_step(cell, input, states, params)
    if made is not None:
        return made if len(made) == 2 else made[0]
    reason = _faster_by_torch(f"{cell}_cell", input, 1, states, params)
    if reason is not None:
        return _by_torch(f"{cell}_cell", args, reason)
    reason = _unknown((input, *states, *params))
    if reason is None:
        input, states = input.unsqueeze(0), tuple([s.unsqueeze(0) for s in states])
        reason = _misshapen(cell, input, None, states, params, has_biases, 1, 1)
    if reason is not None:
        return _by_torch(f"{cell}_cell", args, reason)
    backend, reason = _backend(cell, input, params)
    if backend == "torch":
        return _by_torch(f"{cell}_cell", args, reason)
    _, last = ops.layer(input, None, params, states, cell, 1, backend)
    return (last[0].squeeze(0), last[1].squeeze(0)) if len(last) == 2 else last[0].squeeze(0)


def _in_autocast_dtype(function: Callable[..., Any], cell: str, args: tuple[Any, ...], *rest: Any) -> Any:
    """Compute and return in the autocast dtype, states included; fp64 is left alone, as in torch."""
    device_type = args[0].device.type
    dtype = torch.get_autocast_dtype(device_type)

    with torch.autocast(device_type, enabled=False):
        return function(cell, tuple(in_autocast(args, dtype)), *rest)


def _by_torch(name: str, args: tuple[Any, ...], reason: str, resets: Tensor | None = None) -> Any:
    """Torch's own function. What it refuses, it refuses in its own words, before ours are needed."""
    if resets is not None:
        raise select.BackendError(f"torch's own path has no resets, and no other can run this call: {reason}")
    result = getattr(_VF, name)(*args)
    wanted = select.requested()
    if wanted is not None and wanted != "torch":
        raise select.BackendError(f"backend {wanted!r} was asked for and cannot run this call: {reason}")
    return result


def _unknown(tensors: Sequence[Any]) -> str | None:
    """Why these are not tensors of one known kind, dtype and device, held by no tracer."""
    for t in tensors:
        if type(t) not in autograd.TENSORS:
            return f"{type(t).__name__} is no plain tensor"
    dtype, device = tensors[0].dtype, tensors[0].device
    for t in tensors:
        if t.dtype is not dtype or t.device != device:
            return "the tensors differ in dtype or device"
        if t.layout is not torch.strided:
            return f"{t.layout} is no plain memory"
    if dtype not in DTYPES:
        return f"{dtype} is no dtype of fusedrnn"
    if device.type == "meta":
        return "meta tensors hold no values"
    if torch.jit.is_tracing():
        return "torch.jit.trace records torch's operators"
    if not torch.compiler.is_compiling() and any(map(Tensor.is_neg, tensors)):
        return "the memory of a lazily negated tensor has the other sign"
    return None


def _misshapen(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    directions: int,
) -> str | None:
    """Why these shapes are no call: kernels read raw memory by them."""
    spec = CELLS[cell]
    dims = input.dim()
    if len(states) != len(spec.states) or dims != (3 if batch_sizes is None else 2):
        return "the number of states or of the input's dimensions is wrong"
    for s in states:
        if s.dim() != 3:
            return "a state is not 3-D"
    runs, batch, proj = states[0].shape
    hidden = states[-1].shape[2]
    if runs != num_layers * directions or (dims == 3 and batch != input.shape[1]):
        return "a state has the wrong shape"
    if states[-1].shape != (runs, batch, hidden):
        return "the states differ in shape"
    if input.shape[0] == 0:
        return "there is no time step"
    rows = len(spec.gates) * hidden
    expected: list[tuple[int, ...]] = [(rows, proj)]
    if has_biases:
        expected += [(rows,), (rows,)]
    if proj != hidden:
        expected += [(proj, hidden)]
    per_direction = 1 + len(expected)
    if len(params) != runs * per_direction:
        return "the number of weights is wrong"
    width = input.shape[-1]
    for i in range(0, len(params), per_direction):
        if i == directions * per_direction:
            width = directions * proj
        if params[i].shape != (rows, width):
            return "weight_ih has the wrong shape"
        for j, shape in enumerate(expected, i + 1):
            if params[j].shape != shape:
                return "a weight has the wrong shape"
    if batch_sizes is not None and type(batch_sizes) is Tensor and not torch.compiler.is_compiling():
        return _unpackable(batch_sizes, input.shape[0], batch)
    return None


def _unpackable(batch_sizes: Tensor, rows: int, batch: int) -> str | None:
    if batch_sizes.device.type != "cpu" or batch_sizes.dtype is not torch.int64 or batch_sizes.dim() != 1:
        return "batch_sizes is no int64 vector on the CPU"
    if int(batch_sizes[0]) != batch:
        return "batch_sizes does not fit the states"
    sizes = batch_sizes.tolist()
    if sizes[-1] < 1 or sum(sizes) != rows or sizes != sorted(sizes, reverse=True):
        return "batch_sizes does not fit the packed data"
    return None


def _by_direction(
    resets: Any, input: Tensor, batch_sizes: Tensor | None, batch_first: bool, directions: int
) -> Tensor:
    """Where the states are zero before a row's step, per direction [D, N].

    In reverse a piece begins at its last step, the one before the next reset.
    """
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a bool tensor, got {type(resets).__name__}")
    if resets.dtype is not torch.bool:
        raise ValueError(f"resets: expected torch.bool, got {resets.dtype}")
    if resets.device != input.device:
        raise RuntimeError(f"resets: expected the input's device {input.device}, got {resets.device}")
    shape = input.shape[:-1]
    expected = tuple(shape[::-1] if batch_first else shape)
    if resets.shape != expected:
        raise RuntimeError(f"resets: expected shape {expected}, got {tuple(resets.shape)}")
    if batch_first:
        resets = resets.t()
    flat = resets.reshape(-1)
    if directions == 1:
        return flat[None]
    if batch_sizes is None:
        return torch.stack([flat, torch.cat([resets[1:], torch.zeros_like(resets[:1])]).reshape(-1)])
    rows = input.shape[0]
    first, size, next_size = (
        t.repeat_interleave(batch_sizes, output_size=rows)
        for t in (batch_sizes.cumsum(0) - batch_sizes, batch_sizes, F.pad(batch_sizes[1:], (0, 1)))
    )
    row = torch.arange(rows)
    later = torch.where(row - first < next_size, row + size, rows).to(flat.device)
    return torch.stack([flat, F.pad(flat, (0, 1))[later]])


def _faster_by_torch(
    function: str, input: Any, time: int, states: Sequence[Any], params: Sequence[Any]
) -> str | None:
    """Why torch's own path should run a call, asked first: a small call has no time for checks."""
    # torch's own path knows no transform
    if select.requested() is not None or torch.compiler.is_compiling() or autograd.in_transform():
        return None
    if torch.jit.is_tracing():
        return "torch.jit.trace records torch's operators"
    if not states or not params or not (type(input) is type(states[-1]) is Tensor) or states[-1].dim() < 2:
        return None
    train = torch.is_grad_enabled() and (input.requires_grad or getattr(params[0], "requires_grad", False))
    batch, hidden = states[-1].shape[-2:]
    device = input.device
    return hand_over.reason(
        function, device.type, input.dtype, time, batch, hidden, train, device.index, announce=True
    )


def _backend(cell: str, input: Tensor, params: Sequence[Tensor], resets: bool = False) -> tuple[str, str]:
    """The backend to run on, and why where that is torch itself."""
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return "torch", "ONNX knows torch's operators"
    hidden = params[1].shape[0] // len(CELLS[cell].gates)
    wanted = select.requested()
    return _chosen(cell, input.dtype, input.device, hidden, resets, wanted), "asked for by name"


def _chosen(
    cell: str, dtype: torch.dtype, device: torch.device, hidden: int, resets: bool, wanted: str | None
) -> str:
    # `wanted` is what select reads by itself; as an argument it makes a compiled graph depend on it
    request = select.Request(cell, dtype, device.type, "layer", hidden, resets, device.index)
    return select.choose(request).backend


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
