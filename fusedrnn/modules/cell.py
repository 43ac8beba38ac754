"""RNNCell, LSTMCell and GRUCell: torch.nn's modules on fused kernels; see :mod:`fusedrnn.modules.rnn`."""

from __future__ import annotations

from torch import nn

from .forward import Fused, borrowed


class RNNCell(Fused, nn.RNNCell):
    """Drop-in :class:`torch.nn.RNNCell`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.RNNCell.forward)


class LSTMCell(Fused, nn.LSTMCell):
    """Drop-in :class:`torch.nn.LSTMCell`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.LSTMCell.forward)


class GRUCell(Fused, nn.GRUCell):
    """Drop-in :class:`torch.nn.GRUCell`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.GRUCell.forward)
