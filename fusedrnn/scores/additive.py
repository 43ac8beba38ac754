"""The additive score of projected queries and keys: sum_h v_h tanh(q_h + k_h)."""

from __future__ import annotations

from torch import Tensor

from .spec import Score


def energies(query: Tensor, key: Tensor, v: Tensor, scale: float) -> Tensor:
    return (query.unsqueeze(-2) + key.unsqueeze(-3)).tanh() @ v


ADDITIVE = Score("additive", energies, weighted=True, formula="Bahdanau et al. 2014, arXiv 1409.0473, A.1.2")
