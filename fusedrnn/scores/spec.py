"""What an attention score is: its name and its equation, written once in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Energies = Callable[[Tensor, Tensor, Any, float], Tensor]


@dataclass(frozen=True)
class Score:
    """The score of a query and a key.

    Attributes:
        name: the key that every backend knows the score by.
        energies: ``energies(query [B, N, Tq, D], key [B, N, Tk, D], v [D] or None, scale)
            -> [B, N, Tq, Tk]``, differentiable torch code and the oracle of every kernel.
        weighted: whether it has a vector ``v``; ``scale`` then does not count, as v can hold it.
        formula: where the equation is published.
    """

    name: str
    energies: Energies
    weighted: bool
    formula: str
