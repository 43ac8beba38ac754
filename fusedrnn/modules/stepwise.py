"""Attention that looks at its own earlier weights, a step of the decoder a call: location-sensitive, coverage
and forward attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attend import attend, check_tensor
from ..linear import is_product, projected
from .attention import Attention, BahdanauAttention, Memory
from .checks import check_size, rows_of


class Alignments(NamedTuple):
    """The state: the weights of the step before, and their sum over all steps.

    Attributes:
        previous, cumulative: ``[B, Tk]``, or ``[B, beams, Tk]``.
    """

    previous: Tensor
    cumulative: Tensor

    @classmethod
    def zeros(cls, memory: Tensor | Memory, beams: int | None = None) -> Alignments:
        """Before the first step over a memory ``[B, Tk, M]``."""
        value = memory.value if isinstance(memory, Memory) else memory
        check_tensor("memory", value, "a tensor or Memory")
        batch, keys, _ = value.shape
        zeros = value.new_zeros((batch, keys) if beams is None else (batch, beams, keys))
        return cls(zeros, zeros)

    def after(self, weights: Tensor) -> Alignments:
        """The state after a step with these weights."""
        return Alignments(weights, self.cumulative + weights)

    def cat(self) -> Tensor:
        """Both as ``[B, 2, Tk]``, Tacotron 2's ``attention_weights_cat``."""
        return torch.stack(self, -2)


class LocationLayer(nn.Module):
    """The location term of the score: U = W_f conv(previous and cumulative weights)."""

    def __init__(self, filters: int, kernel_size: int, hidden_size: int, device: Any, dtype: Any) -> None:
        super().__init__()
        self.location_conv = nn.Conv1d(
            2, filters, kernel_size, padding=(kernel_size - 1) // 2, bias=False, device=device, dtype=dtype
        )
        self.location_dense = nn.Linear(filters, hidden_size, False, device, dtype)

    def forward(self, attention_weights_cat: Tensor) -> Tensor:
        """``[B, 2, Tk] -> [B, Tk, H]``."""
        return self.location_dense(self.location_conv(attention_weights_cat).transpose(1, 2))


class LocationSensitiveAttention(Attention):
    """v . tanh(W_q q + W_k k + U): Chorowski et al. 2015, arXiv 1506.07503, and Tacotron 2, 1712.05884.

    A drop-in for the attention of torchaudio's Tacotron 2: constructor, names of the parameters, arguments
    and results are its. A row of which every key is masked gives zeros, where torchaudio gives NaN.

    Args:
        rnn_hidden_dim, encoder_embedding_dim, attention_hidden_dim: Q, M and H.
        attention_location_n_filter, attention_location_kernel_size: of the convolution; an odd size.
    """

    def __init__(
        self,
        rnn_hidden_dim: int,
        encoder_embedding_dim: int,
        attention_hidden_dim: int,
        attention_location_n_filter: int,
        attention_location_kernel_size: int,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(rnn_hidden_dim, encoder_embedding_dim)
        hidden, size = attention_hidden_dim, attention_location_kernel_size
        check_size("attention_hidden_dim", hidden)
        check_size("attention_location_n_filter", attention_location_n_filter)
        check_size("attention_location_kernel_size", size)
        if size % 2 == 0:
            raise ValueError(f"attention_location_kernel_size: expected an odd size, got {size}")
        self.query_layer = nn.Linear(rnn_hidden_dim, hidden, False, device, dtype)
        self.memory_layer = nn.Linear(encoder_embedding_dim, hidden, False, device, dtype)
        self.v = nn.Linear(hidden, 1, False, device, dtype)
        self.location_layer = LocationLayer(attention_location_n_filter, size, hidden, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier's, with the gain of tanh where tanh follows, as in Tacotron 2."""
        tanh = nn.init.calculate_gain("tanh")
        for layer in (self.query_layer, self.memory_layer, self.location_layer.location_dense):
            nn.init.xavier_uniform_(layer.weight, tanh)
        for weight in (self.v.weight, self.location_layer.location_conv.weight):
            nn.init.xavier_uniform_(weight)

    def forward(  # type: ignore[override]
        self,
        attention_hidden_state: Tensor,
        memory: Tensor,
        processed_memory: Tensor,
        attention_weights_cat: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step of a decoder.

        Args:
            attention_hidden_state: the query, ``[B, Q]``.
            memory: ``[B, Tk, M]``.
            processed_memory: ``memory_layer(memory)``, ``[B, Tk, H]``.
            attention_weights_cat: ``[B, 2, Tk]``, previous and cumulative weights: :meth:`Alignments.cat`.
            mask: ``[B, Tk]``, bool, True at padding.

        Returns:
            The context ``[B, M]`` and the weights ``[B, Tk]``.

        Raises:
            ValueError, RuntimeError: the query has another rank or not Q features.
            ValueError, RuntimeError, TypeError, BackendError: as :func:`fusedrnn.attend`, whose key is
                ``processed_memory`` and the location term.
        """
        self._check_query(attention_hidden_state)
        for name, tensor in (
            ("memory", memory),
            ("processed_memory", processed_memory),
            ("attention_weights_cat", attention_weights_cat),
        ):
            check_tensor(name, tensor)
        if mask is not None:
            check_tensor("mask", mask, "a tensor or None")
            if mask.dtype is not torch.bool:
                raise ValueError(f"mask: expected dtype torch.bool, True at padding, got {mask.dtype}")
        key = processed_memory + self.location_layer(attention_weights_cat)
        allowed = None if mask is None else ~mask
        context, weights = self._attend(attention_hidden_state, key, memory, None, allowed, True)
        assert weights is not None
        return context, weights

    def _project_query(self, query: Tensor) -> Tensor:
        return projected(self.query_layer, query)

    def _project_key(self, memory: Tensor) -> Tensor:
        return projected(self.memory_layer, memory)

    def _v(self) -> Tensor:
        return self.v.weight[0]

    def _calls_a_layer(self) -> bool:
        return not is_product(self.v)

    def _energies(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        hidden = self._project_query(query).unsqueeze(2) + key.unsqueeze(1)
        return self.v(hidden.tanh()).squeeze(-1)  # type: ignore[no-any-return]


class CoverageAttention(BahdanauAttention):
    """v . tanh(W_q q + W_k k + w_c sum(a) + b), See et al. 2017, arXiv 1704.04368, equation 11.

    Args:
        query_size, memory_size, hidden_size, options: as :class:`BahdanauAttention`.

    Attributes:
        coverage: w_c, ``[H]``; the others as :class:`BahdanauAttention`.
    """

    def __init__(self, query_size: int, memory_size: int, hidden_size: int, **options: Any) -> None:
        super().__init__(query_size, memory_size, hidden_size, **options)
        self.coverage = nn.Parameter(torch.empty_like(self.v))
        self._reset_coverage()

    def reset_parameters(self) -> None:
        """As :class:`BahdanauAttention`, and the coverage as v."""
        super().reset_parameters()
        if "coverage" in self._parameters:  # not yet where the constructor of the base class calls this
            self._reset_coverage()

    def _reset_coverage(self) -> None:
        bound = self.coverage.shape[0] ** -0.5
        nn.init.uniform_(self.coverage, -bound, bound)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        memory: Tensor | Memory,
        state: Alignments,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Alignments]:
        """One step of a decoder.

        Args:
            query: ``[B, Q]``, or ``[B, beams, Q]`` with a state of as many beams.
            memory, lengths: as :meth:`BahdanauAttention.forward`.
            state: :meth:`Alignments.zeros`, then what the step before returned.
            mask: ``[B or 1, Tk]``, or ``[B or 1, beams or 1, Tk]``.

        Returns:
            The context ``[B, M]`` and the weights ``[B, Tk]``, or with beams after B, and the next state.

        Raises:
            ValueError, RuntimeError: as :meth:`project_memory`; the query has another rank, not Q features,
                or not as many beams as ``state``.
            ValueError, RuntimeError, TypeError, BackendError: as :func:`fusedrnn.attend`.
        """
        memory = memory if isinstance(memory, Memory) else self.project_memory(memory)
        _check_state(self, query, memory, state)
        covered = _per_beam(state.cumulative).unsqueeze(-1) * self.coverage
        context, weights = _step(self, query, memory.key.unsqueeze(1) + covered, memory.value, lengths, mask)
        return context, weights, state.after(weights)


class ForwardAttention(BahdanauAttention):
    """a(j) proportional to (previous a(j) + previous a(j-1)) softmax(e)(j).

    Zhang et al. 2018, arXiv 1807.06736, with the energies e of :class:`BahdanauAttention`. The alignment
    stays or moves on by one, which suits monotonic tasks. Dropout acts on the softmax.

    Args:
        query_size, memory_size, hidden_size, options: as :class:`BahdanauAttention`.
    """

    @staticmethod
    def initial_state(memory: Tensor | Memory, beams: int | None = None) -> Alignments:
        """Before the first step over a memory ``[B, Tk, M]``: all weight on its first key."""
        zeros = Alignments.zeros(memory, beams)
        first = zeros.previous.clone()
        first[..., :1] = 1
        return Alignments(first, zeros.cumulative)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        memory: Tensor | Memory,
        state: Alignments,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Alignments]:
        """One step of a decoder; as :meth:`CoverageAttention.forward`, from :meth:`initial_state` on.

        Raises:
            As :meth:`CoverageAttention.forward`.
        """
        memory = memory if isinstance(memory, Memory) else self.project_memory(memory)
        _check_state(self, query, memory, state)
        energies_only = Memory(memory.key, memory.value[..., :0])
        _, content = BahdanauAttention.forward(self, query, energies_only, lengths, mask, need_weights=True)
        assert content is not None
        moved = nn.functional.pad(state.previous, (1, 0))[..., :-1]
        weights = (state.previous + moved) * content
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)
        context = (_per_beam(weights) @ memory.value).reshape(*query.shape[:-1], memory.value.shape[-1])
        return context, weights, state.after(weights)


def _per_beam(alignment: Tensor) -> Tensor:
    """[B, Tk] or [B, beams, Tk] as [B, beams, Tk]."""
    return alignment.unsqueeze(1) if alignment.dim() == 2 else alignment


def _step(
    attention: BahdanauAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Context and weights of one step whose keys [B, beams, Tk, H] each beam has for itself."""
    rows = query.shape[:-1]
    beams = key.shape[1]
    context, weights = attend(
        "additive",
        attention._project_query(query).reshape(rows[0], beams, 1, key.shape[-1]),
        key,
        value.unsqueeze(1).expand(-1, beams, -1, -1),
        attention._scaled_v(),
        mask=None if mask is None else rows_of(mask, rows[0], 1, beams, key.shape[2]).transpose(1, 2),
        lengths=lengths,
        dropout=attention.dropout if attention.training else 0.0,
        need_weights=True,
    )
    assert weights is not None
    return context.reshape(*rows, value.shape[-1]), weights.reshape(*rows, key.shape[-2])


def _check_state(attention: BahdanauAttention, query: Tensor, memory: Memory, state: Alignments) -> None:
    """Or a state that fits in size but not in layout would be broadcast, beams over sequences."""
    attention._check_query(query)
    if not isinstance(state, Alignments):
        raise TypeError(f"state: expected Alignments, got {type(state).__name__}")
    if query.dim() > 3:
        raise ValueError(f"query: expected [B, Q] or [B, beams, Q], got shape {list(query.shape)}")
    wanted = [*query.shape[:-1], memory.key.shape[1]]
    for name, tensor in zip(state._fields, state):
        check_tensor(f"state.{name}", tensor)
        if list(tensor.shape) != wanted:
            raise RuntimeError(
                f"state.{name}: expected shape {wanted} for query {list(query.shape)} and memory "
                f"{list(memory.value.shape)}, got {list(tensor.shape)}"
            )
