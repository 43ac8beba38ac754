"""What a cell is: its names and one step of its equation, written once in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Step = Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        name: the key that every backend knows the cell by.
        gates: gate names in the order of the weights' rows (torch's order).
        states: state names; the first is the hidden state that is the output.
        step: ``step(x_gates [B, G*H], h_gates [B, G*H], states) -> states``, differentiable torch
            code and the oracle of every kernel. ``x_gates = W_ih x + b_ih``, ``h_gates = W_hh h + b_hh``.
        projectable: whether the hidden state may be projected (``weight_hr``).
        formula: where the equation is published.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    step: Step
    projectable: bool = False
    formula: str = ""
