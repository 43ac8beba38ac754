"""Drop-in subclasses of torch.nn's recurrent modules, and the attention that goes with them."""

from .additive import AdditiveAttention
from .attention import BahdanauAttention, LuongAttention, Memory
from .cell import GRUCell, LSTMCell, RNNCell
from .multihead import MultiheadAttention
from .rnn import GRU, LSTM, RNN
from .stepwise import Alignments, CoverageAttention, ForwardAttention, LocationSensitiveAttention
from .tracer import Tracer

__all__ = [
    "GRU", "LSTM", "RNN", "AdditiveAttention", "Alignments", "BahdanauAttention", "CoverageAttention",
    "ForwardAttention", "GRUCell", "LSTMCell", "LocationSensitiveAttention", "LuongAttention",
    "Memory", "MultiheadAttention", "RNNCell", "Tracer",
]  # fmt: skip
