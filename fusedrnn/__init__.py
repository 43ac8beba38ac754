"""fusedrnn: fused recurrent kernels for PyTorch, as drop-in modules."""

from .backends.select import BackendError, use_backend
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendError",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "use_backend",
]
