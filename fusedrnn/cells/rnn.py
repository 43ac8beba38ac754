"""The Elman RNN: h' = phi(W_ih x + b_ih + W_hh h + b_hh)."""

from __future__ import annotations

from torch import Tensor

from .spec import Cell


def tanh_step(x_gates: Tensor, h_gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x_gates + h_gates).tanh(),)


def relu_step(x_gates: Tensor, h_gates: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((x_gates + h_gates).relu(),)


_SOURCE = "Elman 1990, https://doi.org/10.1207/s15516709cog1402_1"
RNN_TANH = Cell("rnn_tanh", ("h",), ("h",), tanh_step, formula=_SOURCE)
RNN_RELU = Cell("rnn_relu", ("h",), ("h",), relu_step, formula=_SOURCE)
