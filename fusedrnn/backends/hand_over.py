"""Where torch's own path is the faster one: measured, or because nothing here has a kernel."""

from __future__ import annotations

from functools import cache

import torch

from . import select

# One call for one step of at most this many multiply-adds is bound by its overhead, and torch's
# dispatcher is leaner than Python. Measured: the T = 1 rows of
# `python -m fusedrnn bench --full`.
_ONE_STEP = 1 << 20
# Up to this many features of a query torch's batched products beat our dot kernel. Measured with B, N, Tq, Tk
# of 8, 8, 64, 64 to 1, 8, 1024, 1024.
SMALL_HEAD = 64
# Multiply-adds of a projection from which our products are worth their call.
_PROJECTION = 1 << 20


def reason(
    function: str,
    device_type: str,
    dtype: torch.dtype,
    time: int,
    batch: int,
    hidden: int,
    train: bool,
    device_index: int | None = None,
    announce: bool = False,
) -> str | None:
    """Why a call should run on torch's own path; None if it should not.

    Asked in eager mode only, outside function transforms, and only when no backend was asked for
    by name.

    Args:
        function: torch's name of the call: ``lstm``, ``gru_cell``, ...
        device_type: the tensors' ``device.type``.
        dtype: the dtype that the call computes in.
        time, batch, hidden: T, B and H; for packed input B is the number of sequences.
        train: whether a gradient will be recorded.
        device_index: the tensors' ``device.index``; None means the current GPU.
        announce: say, once, where it is for lack of a kernel: for a caller that acts on the answer.
    """
    kind = function.removesuffix("_cell")
    request = select.Request(kind, dtype, device_type, "layer", hidden, False, device_index)
    missing = select.no_kernel(request.located())
    if missing is not None:
        # of others torch has an error or no values
        if announce and dtype.is_floating_point and device_type != "meta":
            select.say_once(f"fusedrnn has no fused kernel for this, torch's own path runs ({missing})")
        return f"no fused kernel can run it ({missing})"
    at_once = device_type == "cpu" and dtype is torch.float32 and not train  # native's one_step
    if time == 1 and not at_once and function != "lstm" and batch * hidden * hidden <= _ONE_STEP:
        # recorded by autograd: 1.2 to 1.7 times torch where there is something to gain
        elman, cell = function.startswith("rnn"), function.endswith("_cell")
        gains = not (elman and cell) if batch >= 4 else not (elman or cell) and hidden <= 256
        if train and gains:
            return None
        return "a single small step is bound by the overhead of the call, where torch's own is leaner"
    return None


@cache
def _mkl_is_slower() -> bool:
    """On AMD's CPUs torch's fp32 products reach half of the cores' rate; on others nothing is measured."""
    return "amd" in select.get("native").cpu_features()


def linear_reason(dtype: torch.dtype, work: int) -> str | None:
    """Why a projection of so many multiply-adds should run on torch's own product; None if it should not.

    Asked of CPU tensors, where there are kernels.
    """
    if dtype is not torch.float32:
        return "there are kernels for float32 only"
    if work < _PROJECTION:
        return "a small product is bound by the overhead of the call, where torch's own is leaner"
    return None if _mkl_is_slower() else "torch's product is not measured slower on this CPU"


def attend_reason(
    request: select.Request, plain: bool, masked: bool, ragged: bool, narrow: bool, announce: bool = False
) -> str | None:
    """Why an attend should run as plain torch code; None if it should not.

    Asked only when no backend was asked for by name.

    Args:
        plain: neither weights nor derivatives are wanted.
        masked: there is a mask.
        ragged: there are lengths, of which our kernel skips the rest.
        narrow: a query has at most SMALL_HEAD features.
        announce: as of :func:`reason`.
    """
    if request.kind == "dot" and plain and not ragged:
        return "torch's scaled_dot_product_attention is faster where no key can be skipped"
    if request.kind == "dot" and not masked and not ragged and narrow:
        return "torch's matrix products are faster for small heads of which nothing is masked"
    missing = select.no_kernel(request)
    if missing is None:
        return None
    if announce and request.kind != "dot" and request.device_type != "meta":
        select.say_once(f"fusedrnn has no fused kernel for this, plain torch code runs ({missing})")
    return f"no fused kernel can run it ({missing})"
