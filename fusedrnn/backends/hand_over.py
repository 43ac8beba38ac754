"""Where torch's own path is measured faster than every backend here."""

from __future__ import annotations

import torch


def reason(
    cell: str, device_type: str, dtype: torch.dtype, time: int, batch: int, hidden: int, train: bool
) -> str | None:
    """Why a call should run on torch's own path; None if it should not.

    Asked in eager mode only, and only when no backend was asked for by name.

    Args:
        cell: the cell's name.
        device_type: the tensors' ``device.type``.
        dtype: the dtype that the call computes in.
        time, batch, hidden: T, B and H; for packed input B is the number of sequences.
        train: whether a gradient will be recorded.
    """
    return None
