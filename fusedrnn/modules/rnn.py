"""RNN, LSTM and GRU: torch.nn's modules on fused kernels.

Constructor, attributes, state_dict, forward's arguments, results and errors are torch's: each class
is a subclass whose instances differ from torch's in nothing but the class, so that assigning
``module.__class__`` turns one into the other. Two differences can be seen:

* Under autocast everything is computed in, and has, the autocast dtype, states included.
* ``torch.ao.quantization.quantize_dynamic`` goes by exact type and skips these classes silently:
  turn them into torch's first (``fusedrnn.replace`` returns a report that can ``revert()``).

torch.jit.script and torch.jit.trace record torch's own operators. torch.fx.symbolic_trace keeps a
module whole by the name of its package: use :class:`fusedrnn.modules.Tracer`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Fused, borrowed


class _FusedRNN(Fused, nn.RNNBase):
    def _update_flat_weights(self) -> None:
        """Read every weight by name: once, as a parametrized weight is computed at each access."""
        own = self._parameters
        weights = [own[n] if n in own else getattr(self, n, None) for n in self._flat_weights_names]
        if any(new is not old for new, old in zip(weights, self._flat_weights)):
            self._flat_weights = weights
            self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        if batch_sizes is not None and torch.compiler.is_compiling():
            self.check_input(input, batch_sizes)  # a graph cannot ask how many sequences there are
        else:
            super().check_forward_args(input, hidden, batch_sizes)


class LSTM(_FusedRNN, nn.LSTM):
    """Drop-in :class:`torch.nn.LSTM`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.LSTM.forward)


class GRU(_FusedRNN, nn.GRU):
    """Drop-in :class:`torch.nn.GRU`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.GRU.forward)


class RNN(_FusedRNN, nn.RNN):
    """Drop-in :class:`torch.nn.RNN`: same arguments, shapes, results and errors."""

    forward = borrowed(nn.RNN.forward)
