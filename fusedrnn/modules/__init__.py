"""Drop-in subclasses of torch.nn's recurrent modules."""

from .cell import GRUCell, LSTMCell, RNNCell
from .rnn import GRU, LSTM, RNN
from .tracer import Tracer

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell", "Tracer"]
