"""The GRU as in torch.nn.GRU: gates r, z, n, the reset gate applied after the recurrent product."""

from __future__ import annotations

from torch import Tensor

from .spec import Cell


def step(x_gates: Tensor, h_gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x_r, x_z, x_n = x_gates.chunk(3, -1)
    h_r, h_z, h_n = h_gates.chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return ((1 - z) * n + z * states[0],)


GRU = Cell("gru", ("r", "z", "n"), ("h",), step, formula="Cho et al. 2014, arXiv 1406.1078v1 (version 1)")
