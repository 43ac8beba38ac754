"""The scaled dot product: scale * q . k."""

from __future__ import annotations

from torch import Tensor

from .spec import Score


def energies(query: Tensor, key: Tensor, v: None, scale: float) -> Tensor:
    return (query * scale) @ key.transpose(-2, -1)


DOT = Score(
    "dot", energies, weighted=False, formula="Luong et al. 2015, arXiv 1508.04025; scaled: arXiv 1706.03762"
)
