"""What the attention modules ask of their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..attend import check_tensor


def check_size(name: str, size: Any) -> None:
    if not isinstance(size, int):
        raise TypeError(f"{name}: expected an int, got {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{name}: expected a size greater than zero, got {size}")


def rows_of(mask: Tensor, batch: int, beams: int, steps: int, keys: int) -> Tensor:
    """A module's mask as attend's, whose queries are the steps of all beams."""
    check_tensor("mask", mask, "a tensor or None")
    if not 2 <= mask.dim() <= 4:
        raise ValueError(
            "mask: expected 2 to 4 dimensions [B, Tk], [B, Tq, Tk] or [B, beams, Tq, Tk], "
            f"got shape {list(mask.shape)}"
        )
    sizes = ((batch,), (batch, steps), (batch, beams, steps))[mask.dim() - 2]
    if mask.shape[-1] != keys or any(m not in (1, n) for m, n in zip(mask.shape, sizes)):
        said = ", ".join(f"{n} or 1" for n in sizes)
        raise RuntimeError(f"mask: expected shape [{said}, {keys}], got {list(mask.shape)}")
    while mask.dim() < 4:
        mask = mask.unsqueeze(1)
    if mask.shape[1:3] != (1, 1):
        mask = mask.expand(-1, beams, steps, -1)
    return mask.flatten(1, 2).unsqueeze(1)
