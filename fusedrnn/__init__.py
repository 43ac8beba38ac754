"""fusedrnn: fused recurrent kernels for PyTorch, as drop-in modules."""

from ._dynamo import make_traceable
from .attend import attend
from .backends.select import BackendError, use_backend
from .enable import disable, enable
from .explain import explain
from .modules import (
    GRU,
    LSTM,
    RNN,
    AdditiveAttention,
    Alignments,
    BahdanauAttention,
    CoverageAttention,
    ForwardAttention,
    GRUCell,
    LocationSensitiveAttention,
    LSTMCell,
    LuongAttention,
    MultiheadAttention,
    RNNCell,
)
from .plot import plot_alignment
from .replace import replace
from .saving import recompute
from .streaming import Stepper, streaming

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "Alignments",
    "BackendError",
    "BahdanauAttention",
    "CoverageAttention",
    "ForwardAttention",
    "GRUCell",
    "LSTMCell",
    "LocationSensitiveAttention",
    "LuongAttention",
    "MultiheadAttention",
    "RNNCell",
    "Stepper",
    "attend",
    "disable",
    "enable",
    "explain",
    "plot_alignment",
    "recompute",
    "replace",
    "streaming",
    "use_backend",
]

make_traceable(RNN, LSTM, GRU)
del make_traceable
