"""Triton kernels: recurrent layers on NVIDIA GPUs without a CUDA toolkit.

Triton is imported when the first layer runs. Its interpreter (TRITON_INTERPRET=1) runs the kernels on CPU
tensors, slowly: that is how they are tested where there is no GPU.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def unavailable() -> str | None:
    """Why the kernels cannot be used at all; None if they can."""
    return None if find_spec("triton") else "Triton is not there; it comes with CUDA builds of torch"


def no_kernel(dtype: torch.dtype, device_type: str) -> str | None:
    """Why tensors of a dtype and device have no kernel here; None if they do."""
    if device_type != "cuda":
        return f"has CUDA kernels only, got device {device_type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"has kernels for float32, float16 and bfloat16, got {dtype}"
    return None
