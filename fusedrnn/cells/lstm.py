"""The LSTM with forget gate, as in torch.nn.LSTM: gates i, f, g, o; states h, c."""

from __future__ import annotations

from torch import Tensor

from .spec import Cell


def step(x_gates: Tensor, h_gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (x_gates + h_gates).chunk(4, -1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


LSTM = Cell(
    "lstm",
    ("i", "f", "g", "o"),
    ("h", "c"),
    step,
    projectable=True,
    formula="Gers et al. 2000, https://doi.org/10.1162/089976600300015015; projection: arXiv 1402.1128",
)
