"""The fused CPU kernels of `fusedrnn._C`: what every operation's file needs of them.

fp32, fp64 and bf16 run as they are: gates, states and sums of bf16 are fp32, the factors of its products
are bf16. fp16 is computed in fp32 and rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor

from ...dtypes import DTYPES

try:
    from ... import _C  # after torch: both then share one OpenMP runtime
except ImportError as error:
    _C: ModuleType | None = None  # type: ignore[no-redef]
    _why_not = f"fusedrnn._C is not there ({error}); it is built by `pip install` where g++ works"


def unavailable() -> str | None:
    """Why the kernels cannot be used at all; None if they can."""
    return _why_not if _C is None else None


def no_kernel(dtype: torch.dtype, device_type: str) -> str | None:
    """Why tensors of a dtype and device have no kernel here; None if they do."""
    if device_type != "cpu":
        return f"has CPU kernels only, got device {device_type}"
    if dtype not in DTYPES:
        return f"has kernels for float32, float64, float16 and bfloat16, got {dtype}"
    return None


def isa() -> str:
    """The instruction set in use: portable, avx2, avx512 or avx512bf16."""
    return _C.isa()


def forget(weights: Iterable[Tensor | None]) -> None:
    """Drop what is kept of these: their packs, and the weak references that come with them."""
    if _C is not None:
        for weight in weights:
            _C.forget_packs(weight)


def cpu_features() -> list[str]:
    return _C.cpu_features()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stored(tensor: Tensor) -> Tensor:
    """In the dtype that kernels read."""
    return tensor.float() if tensor.dtype is torch.float16 else tensor
