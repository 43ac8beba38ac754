"""Every cell, by name. A new cell is a file here, a kernel header per backend, and a module."""

from .gru import GRU
from .lstm import LSTM
from .rnn import RNN_RELU, RNN_TANH
from .spec import Cell

CELLS: dict[str, Cell] = {cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU)}

__all__ = ["CELLS", "Cell"]
