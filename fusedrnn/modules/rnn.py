"""RNN, LSTM and GRU: torch.nn's modules on fused kernels.

Constructor, attributes, state_dict, forward's arguments, results and errors are torch's: each class
is a subclass whose instances differ from torch's in nothing but the class, so that assigning
``module.__class__`` turns one into the other. The layers' forward takes one argument more, ``resets``
(:meth:`RNN.forward`). Two differences can be seen:

* Under autocast everything is computed in, and has, the autocast dtype, states included.
* ``torch.ao.quantization.quantize_dynamic`` goes by exact type and skips these classes silently:
  turn them into torch's first (``fusedrnn.replace`` returns a report that can ``revert()``).

torch.jit.script and torch.jit.trace record torch's own operators. torch.fx.symbolic_trace keeps a
module whole by the name of its package: use :class:`fusedrnn.modules.Tracer`.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional, straight
from .forward import Fused, borrowed


class _FusedRNN(Fused, nn.RNNBase):
    _without_resets: Any  # torch.nn's own code

    def forward(self, input: Any, hx: Any = None, *, resets: Any = None) -> Any:
        """torch.nn's forward; with ``resets``, over sequences of several pieces, one after the other.

        Each piece is computed as if it were alone, in all layers and both directions: the episodes of an
        environment (``is_init`` in TorchRL), or sentences laid end to end.

        Args:
            input, hx: as in torch.nn.
            resets: bool ``[T, B]``, ``[B, T]`` if ``batch_first``, ``[T]`` if unbatched; for a PackedSequence
                one that is packed alike. True where a piece begins: the states before that step are zeros.
                ``hx`` is for the piece of the first step, unless that step too is a reset; in reverse for
                the piece of the last step.

        Returns:
            As in torch.nn. The last states are those of the last piece, in reverse of the first one.

        Raises:
            BackendError: no kernel can run the call but torch's own, which know no resets.
            TypeError, ValueError, RuntimeError: ``resets`` is not of that kind, dtype, or shape and device.
            Otherwise what torch.nn raises.
        """
        if resets is not None:
            return self._with_resets(input, hx, resets)
        own, params = self._parameters, self._flat_weights
        if type(input) is Tensor and all(map(is_, map(own.get, self._flat_weights_names), params)):
            made = straight.layers(
                self.mode.lower(), input, None, hx, params, self.bias, self.num_layers,
                self.dropout if self.training else 0.0, self.bidirectional, self.batch_first,
            )  # fmt: skip
            if made is not None:
                return made[0], made[1:] if len(made) == 3 else made[1]
        return self._without_resets(input, hx)

    def _with_resets(self, input: Any, hx: Any, resets: Any) -> Any:
        self._update_flat_weights()
        batch_sizes = sorted_indices = unsorted_indices = None
        is_packed, batch_dim = isinstance(input, PackedSequence), 0 if self.batch_first else 1
        is_lone = not is_packed and input.dim() == 2
        is_lstm = isinstance(self, nn.LSTM)
        data = input
        if is_packed:
            resets = _packed_alike(resets, input)
            data, batch_sizes, sorted_indices, unsorted_indices = input
        elif is_lone:
            data = input.unsqueeze(batch_dim)
            resets = resets.unsqueeze(batch_dim) if isinstance(resets, Tensor) else resets
            if hx is not None:
                hx = tuple(s.unsqueeze(1) for s in hx) if is_lstm else hx.unsqueeze(1)
        if hx is None:
            batch = data.size(batch_dim) if batch_sizes is None else batch_sizes[0]
            runs = self.num_layers * (2 if self.bidirectional else 1)
            widths = (self.proj_size or self.hidden_size, self.hidden_size)
            zeros = tuple(data.new_zeros(runs, batch, width) for width in widths)
            hx = zeros if is_lstm else zeros[0]
        else:
            hx = self.permute_hidden(hx, sorted_indices)
        self.check_forward_args(data, hx, batch_sizes)

        head = (data, hx) if batch_sizes is None else (data, batch_sizes, hx)
        tail = () if is_packed else (self.batch_first,)
        output, *last = getattr(functional, self.mode.lower())(
            *head, self._flat_weights, self.bias, self.num_layers, self.dropout, self.training,
            self.bidirectional, *tail, resets=resets,
        )  # fmt: skip
        if is_packed:
            output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        elif is_lone:
            output, last = output.squeeze(batch_dim), [s.squeeze(1) for s in last]
        after: Any = tuple(last) if is_lstm else last[0]
        return output, self.permute_hidden(after, unsorted_indices)

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


def _packed_alike(resets: Any, input: PackedSequence) -> Tensor:
    """The data of ``resets``, whose rows are those of ``input``."""
    if not isinstance(resets, PackedSequence):
        raise TypeError(f"resets: expected a PackedSequence as the input is, got {type(resets).__name__}")
    if torch.compiler.is_compiling():  # a graph cannot look at lengths
        return resets.data
    pairs = zip(resets[1:3], input[1:3])  # batch_sizes, sorted_indices
    if not all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs):
        raise RuntimeError("resets: expected to be packed by the input's lengths, got other ones")
    return resets.data


class LSTM(_FusedRNN, nn.LSTM):
    """Drop-in :class:`torch.nn.LSTM`: same arguments, shapes, results and errors."""

    _without_resets = borrowed(nn.LSTM.forward)


class GRU(_FusedRNN, nn.GRU):
    """Drop-in :class:`torch.nn.GRU`: same arguments, shapes, results and errors."""

    _without_resets = borrowed(nn.GRU.forward)


class RNN(_FusedRNN, nn.RNN):
    """Drop-in :class:`torch.nn.RNN`: same arguments, shapes, results and errors."""

    _without_resets = borrowed(nn.RNN.forward)
