"""Attention over a memory, as recurrent decoders use it: Bahdanau's and Luong's.

A module projects; scores, mask, softmax and context are one call of :func:`fusedrnn.attend`. See
docs/attention.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attend import attend, attend_step, check_dropout, check_tensor
from ..linear import is_plain, is_product, projected
from .checks import check_size, rows_of


class Memory(NamedTuple):
    """A memory whose keys are projected, so that the steps of a decoder share them.

    Attributes:
        key: ``[B, Tk, D]``.
        value: ``[B, Tk, M]``.
    """

    key: Tensor
    value: Tensor


# Weight and bias of the query's projection, v, and g if v is g v / |v|.
Projection = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class Attention(nn.Module):
    """What the modules over one memory share: shapes, masks, beams, cached keys.

    A subclass has a ``score``, ``_project_query``, ``_project_key``, and ``_v`` or ``_scale``.
    """

    score = "additive"

    def __init__(
        self, query_size: int, memory_size: int, temperature: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, size in (("query_size", query_size), ("memory_size", memory_size)):
            check_size(name, size)
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature}")
        check_dropout(dropout)
        self.query_size = query_size
        self.memory_size = memory_size
        self.temperature = temperature
        self.dropout = dropout

    def forward(
        self,
        query: Tensor,
        memory: Tensor | Memory,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to one memory.

        Args:
            query: ``[B, Q]``, ``[B, Tq, Q]``, or ``[B, beams, Tq, Q]``, whose beams share a memory.
            memory: ``[B, Tk, M]``, or what :meth:`project_memory` made of it.
            lengths: ``[B]``, integers: how many steps of each memory exist.
            mask: ``[B or 1, Tk]``, ``[B or 1, Tq or 1, Tk]`` or ``[B or 1, beams or 1, Tq or 1, Tk]``;
                bool, True where a query attends, or floating, added to the scores.
            need_weights: return the weights too.

        Returns:
            The context, shaped as the query with M for Q, and the weights, with Tk for Q, or None. A row of
            which everything is masked gives zeros.

        Raises:
            ValueError, RuntimeError, TypeError: as :func:`fusedrnn.attend`, naming the argument.
        """
        if isinstance(memory, Memory):
            check_tensor("query", query)
            found = self._step(query, memory, lengths, mask, need_weights)
            if found is not None:
                return found
        self._check_query(query)
        memory = memory if isinstance(memory, Memory) else self.project_memory(memory)
        return self._attend(query, memory.key, memory.value, lengths, mask, need_weights)

    def project_memory(self, memory: Tensor) -> Memory:
        """Project a memory ``[B, Tk, M]`` once, to be given to :meth:`forward` at every step.

        Steps keep what they make of the keys. A write into them is noticed, but not one through ``.data``.

        Returns:
            Keys ``[B, Tk, D]`` and the memory itself.

        Raises:
            ValueError: ``memory`` has not 3 dimensions.
            RuntimeError: it has not M features.
        """
        check_tensor("memory", memory, "a tensor or Memory")
        if memory.dim() != 3:
            raise ValueError(f"memory: expected 3 dimensions [B, Tk, M], got shape {list(memory.shape)}")
        if memory.shape[-1] != self.memory_size:
            raise RuntimeError(f"memory: expected {self.memory_size} features, got {memory.shape[-1]}")
        key = self._project_key(memory)
        if not torch.compiler.is_compiling() and key is not memory and key.is_inference():
            with torch.inference_mode(False):
                key = key.clone()  # one with a version, by which a step sees faster whether it has changed
        return Memory(key, memory)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows = query.shape[:-1]
        beams, steps = (*(1, 1)[: 4 - query.dim()], *rows[1:])
        mask = None if mask is None else rows_of(mask, rows[0], beams, steps, value.shape[1])
        score, v = self.score, None
        if self._calls_a_layer():
            score = "dot"
            queries = query.reshape(rows[0], beams * steps, query.shape[-1])
            asked, key, mask = self._energies_as_mask(queries, key, value, mask)
        else:
            projected = self._project_query(query)
            asked, v = projected.reshape(rows[0], 1, beams * steps, projected.shape[-1]), self._scaled_v()
            key = key.unsqueeze(1)
        context, weights = attend(
            score,
            asked,
            key,
            value.unsqueeze(1),
            v,
            mask=mask,
            lengths=lengths,
            scale=1 / self.temperature,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        if weights is not None:
            weights = weights.reshape(*rows, weights.shape[-1])
        return context.reshape(*rows, context.shape[-1]), weights

    def _energies_as_mask(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys whose score is zero, and a mask that adds the energies to it."""
        energies = (self._energies(query, key, value) / self.temperature).unsqueeze(1)
        batch, _, rows, keys = energies.shape
        if mask is None:
            mask = energies
        elif mask.dtype is torch.bool:
            mask = energies.masked_fill(~mask, -torch.inf)
        else:
            mask = energies + mask
        return energies.new_zeros(batch, 1, rows, 1), energies.new_zeros(batch, 1, keys, 1), mask

    def _step(
        self,
        query: Tensor,
        memory: Memory,
        lengths: Tensor | None,
        mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """One call of a kernel that projects too; None where `_attend` has to do it."""
        if torch.compiler.is_compiling() or (self.training and self.dropout):
            return None
        taken = self._projection()
        if taken is None:
            return None
        weight, bias, v, g = taken
        key, value = memory
        scale = 1 / self.temperature
        return attend_step(query, weight, bias, v, g, key, value, lengths, mask, scale, need_weights)

    def _projection(self) -> Projection | None:
        """All that `_project_query` and `_v` compute with; None if there is more to it."""
        return None

    def _calls_a_layer(self) -> bool:
        """Whether a user's layer, of which no kernel knows, has to see every pair of a query and a key."""
        return False

    def _energies(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, R, Q], [B, Tk, D], [B, Tk, M] -> [B, R, Tk]``, where :meth:`_calls_a_layer`."""
        raise NotImplementedError

    def _check_query(self, query: Tensor) -> None:
        check_tensor("query", query)
        if not 2 <= query.dim() <= 4:
            raise ValueError(
                "query: expected 2 to 4 dimensions [B, Q], [B, Tq, Q] or [B, beams, Tq, Q], "
                f"got shape {list(query.shape)}"
            )
        if query.shape[-1] != self.query_size:
            raise RuntimeError(f"query: expected {self.query_size} features, got {query.shape[-1]}")

    def _project_query(self, query: Tensor) -> Tensor:
        return query

    def _project_key(self, memory: Tensor) -> Tensor:
        return memory

    def _v(self) -> Tensor | None:
        return None

    def _scaled_v(self) -> Tensor | None:
        v = self._v()
        return v if v is None or self.temperature == 1 else v / self.temperature

    def extra_repr(self) -> str:
        said = f"{self.query_size}, {self.memory_size}"
        said += f", temperature={self.temperature}" if self.temperature != 1 else ""
        return said + (f", dropout={self.dropout}" if self.dropout else "")


class BahdanauAttention(Attention):
    """Additive attention: v . tanh(W_q q + W_k k + b), Bahdanau et al. 2014, arXiv 1409.0473.

    With ``normalize``, v is g v / |v|: Salimans and Kingma 2016, arXiv 1602.07868, as in GNMT.

    Args:
        query_size, memory_size, hidden_size: Q, M and H.
        normalize: learn the direction and the norm of v apart.
        bias: b is there.
        temperature: divides the scores.
        dropout: of the weights, in training.

    Attributes:
        query_layer: ``nn.Linear(Q, H)``; its bias is b.
        memory_layer: ``nn.Linear(M, H, bias=False)``.
        v: ``[H]``; g: ``[]``, with ``normalize``, else None.
    """

    g: nn.Parameter | None

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        hidden_size: int,
        normalize: bool = False,
        *,
        bias: bool = True,
        temperature: float = 1.0,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(query_size, memory_size, temperature, dropout)
        check_size("hidden_size", hidden_size)
        self.query_layer = nn.Linear(query_size, hidden_size, bias, device, dtype)
        self.memory_layer = nn.Linear(memory_size, hidden_size, False, device, dtype)
        self.v = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        norm = torch.empty((), device=device, dtype=dtype)
        self.register_parameter("g", nn.Parameter(norm) if normalize else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's for the layers and v; g starts at 1 / sqrt(H)."""
        self.query_layer.reset_parameters()
        self.memory_layer.reset_parameters()
        bound = self.v.shape[0] ** -0.5
        nn.init.uniform_(self.v, -bound, bound)
        if self.g is not None:
            nn.init.constant_(self.g, bound)

    def _project_query(self, query: Tensor) -> Tensor:
        return projected(self.query_layer, query)

    def _project_key(self, memory: Tensor) -> Tensor:
        return projected(self.memory_layer, memory)

    def _v(self) -> Tensor:
        return self.v if self.g is None else self.g * self.v / self.v.norm()

    def _projection(self) -> Projection | None:
        layer: Any = self._modules["query_layer"]  # not by attributes, which take longer than the check
        own: Any = self._parameters
        if not is_plain(layer) or "v" not in own or "g" not in own:
            return None
        return layer._parameters["weight"], layer._parameters["bias"], own["v"], own["g"]


class LuongAttention(Attention):
    """Multiplicative attention, Luong et al. 2015, arXiv 1508.04025, section 3.1.

    Args:
        query_size, memory_size: Q and M; equal for ``"dot"``.
        score: ``"dot"``: q . k; ``"general"``: q W k; ``"concat"``: v . tanh(W [q; k]).
        hidden_size: H, of ``"concat"`` alone.
        scale: learn a factor g of the scores, as TensorFlow Addons does; not for ``"concat"``.
        temperature: divides the scores.
        dropout: of the weights, in training.

    Attributes:
        W: ``nn.Linear(Q, M, bias=False)`` (general), ``nn.Linear(Q + M, H, bias=False)`` (concat), or None.
        v: ``[H]`` (concat) or None; g: ``[]`` or None.
    """

    W: nn.Linear | None
    v: nn.Parameter | None
    g: nn.Parameter | None

    def __init__(
        self,
        query_size: int,
        memory_size: int,
        score: str = "general",
        hidden_size: int | None = None,
        *,
        scale: bool = False,
        temperature: float = 1.0,
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(query_size, memory_size, temperature, dropout)
        if score not in ("dot", "general", "concat"):
            raise ValueError(f"score: expected one of dot, general, concat, got {score!r}")
        if score == "dot" and query_size != memory_size:
            raise ValueError(
                f"query_size: expected memory_size {memory_size} for score 'dot', got {query_size}"
            )
        if (score == "concat") != (hidden_size is not None):
            raise ValueError(
                f"hidden_size: expected {'a size' if score == 'concat' else 'None'} for score {score!r}, "
                f"got {hidden_size}"
            )
        if scale and score == "concat":
            raise ValueError("scale: expected False for score 'concat', whose v holds the scale")
        self.kind = score
        self.score = "additive" if score == "concat" else "dot"
        self.W = self.v = self.g = None
        if score == "general":
            self.W = nn.Linear(query_size, memory_size, False, device, dtype)
        elif hidden_size is not None:
            check_size("hidden_size", hidden_size)
            self.W = nn.Linear(query_size + memory_size, hidden_size, False, device, dtype)
            self.v = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        if scale:
            self.g = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's for W and v; g starts at 1."""
        if self.W is not None:
            self.W.reset_parameters()
        if self.v is not None:
            bound = self.v.shape[0] ** -0.5
            nn.init.uniform_(self.v, -bound, bound)
        if self.g is not None:
            nn.init.ones_(self.g)

    def _project_query(self, query: Tensor) -> Tensor:
        if self.g is not None:
            query = query * self.g
        if self.W is None:
            return query
        if self.v is None:
            return projected(self.W, query)
        return F.linear(query, self.W.weight[:, : self.query_size], self.W.bias)

    def _project_key(self, memory: Tensor) -> Tensor:
        if self.W is None or self.v is None:
            return memory
        if not is_product(self.W):
            return memory[..., :0]  # W wants a query beside it; no other key is of this size
        return F.linear(memory, self.W.weight[:, self.query_size :])

    def _v(self) -> Tensor | None:
        return self.v

    def _calls_a_layer(self) -> bool:
        return self.W is not None and self.v is not None and not is_product(self.W)

    def _energies(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self.W is not None
        assert self.v is not None
        if value.shape[0] != query.shape[0]:
            raise RuntimeError(f"memory: expected a batch of {query.shape[0]} as query, got {value.shape[0]}")
        queries = query.unsqueeze(2).expand(-1, -1, value.shape[1], -1)
        memory = value.unsqueeze(1).expand(-1, query.shape[1], -1, -1)
        hidden: Tensor = self.W(torch.cat([queries, memory], -1))
        return hidden.tanh() @ self.v

    def _projection(self) -> Projection | None:
        if self.W is None or self.v is None or not is_plain(self.W):
            return None
        return self.W.weight[:, : self.query_size], self.W.bias, self.v, None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, score={self.kind!r}"
