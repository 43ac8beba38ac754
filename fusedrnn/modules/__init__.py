"""Drop-in subclasses of torch.nn's recurrent modules, and the attention that goes with them."""

from .attention import AdditiveAttention, BahdanauAttention, LuongAttention
from .cell import GRUCell, LSTMCell, RNNCell
from .rnn import GRU, LSTM, RNN
from .tracer import Tracer

__all__ = [
    "GRU", "LSTM", "RNN", "AdditiveAttention", "BahdanauAttention", "GRUCell", "LSTMCell", "LuongAttention",
    "RNNCell", "Tracer",
]  # fmt: skip
