"""Attention: our operator and modules against the same in plain torch, and that under torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import modules
from ..attend import attend
from ..backends import select
from ..explain import explain
from ..modules import Memory
from ..testing import Parity, parity, stock
from ..tools import DTYPES
from .cases import FILTERS, KERNEL_SIZE, AttentionCase
from .device import Call, Cpu, Device


class Operator(nn.Module):
    """``fusedrnn.attend`` with the vector v of an additive score."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        self.v = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        """``[B, Tq, H]``, ``[B, Tk, H]`` twice, to ``[B, Tq, H]``."""
        context, _ = attend("additive", query[:, None], key[:, None], value[:, None], self.v)
        return (context[:, 0],)


class SelfAttention(nn.Module):
    """A MultiheadAttention whose weights are asked for."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        context, weights = self.attention(input, input, input, need_weights=True)
        return context, weights


# ---- plain torch -------------------------------------------------------------------------------


def _additive(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As people write it, with an ``nn.Linear(H, 1)`` for v: context ``[B, Tq, M]`` and weights."""
    scores = F.linear(torch.tanh(query[:, :, None] + key[:, None]), v[None]).squeeze(-1)
    weights = scores.softmax(-1)
    return torch.bmm(weights, value), weights


class EagerOperator(Operator):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor]:
        return _additive(query, key, value, self.v)[:1]


class EagerBahdanau(modules.BahdanauAttention):
    def forward(self, query: Tensor, memory: Tensor | Memory) -> tuple[Tensor]:  # type: ignore[override]
        if not isinstance(memory, Memory):
            memory = Memory(self.memory_layer(memory), memory)
        rows = query.flatten(1, -2)  # beams as more queries of the memory that they share
        context, _ = _additive(self.query_layer(rows), *memory, self.v)
        return (context.view_as(query),)


class EagerLocation(modules.LocationSensitiveAttention):
    def forward(  # type: ignore[override]
        self, query: Tensor, memory: Tensor, processed: Tensor, weights_cat: Tensor
    ) -> tuple[Tensor, Tensor]:
        key = processed + self.location_layer(weights_cat)
        context, weights = _additive(self.query_layer(query[:, None]), key, memory, self.v.weight[0])
        return context[:, 0], weights[:, 0]


_PLAIN = {
    Operator: EagerOperator,
    modules.BahdanauAttention: EagerBahdanau,
    modules.LocationSensitiveAttention: EagerLocation,
}


def _plain(module: nn.Module) -> nn.Module:
    """The same module, with the same parameters, in plain torch."""
    if isinstance(module, SelfAttention):
        return SelfAttention(stock(module.attention))
    twin = copy.deepcopy(module)
    twin.__class__ = _PLAIN[type(module)]
    return twin


@cache
def compile_missing() -> str | None:
    """Why torch.compile cannot run here; None if it can. Finds out by trying."""
    try:
        torch.compile(torch.neg)(torch.ones(2))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


# ---- a case ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreparedAttention:
    """A case with our module, its twin in plain torch, and their inputs."""

    case: AttentionCase
    plain: nn.Module
    fused: nn.Module
    inputs: tuple[Any, ...]

    @classmethod
    def of(cls, case: AttentionCase, device: Device | None = None) -> PreparedAttention:
        """On the CPU if ``device`` is None."""
        device, dtype = device or Cpu(), DTYPES[case.dtype]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = _make(case).train(case.mode == "training").to(device.name, dtype)
            inputs = _draw(case, lambda *shape: torch.randn(shape).to(device.name, dtype))
        return cls(case, _plain(module), module, inputs)

    @property
    def turns(self) -> int:
        return 1

    def parity(self) -> Parity:
        return parity(self.fused, self.plain, self.inputs, gradients=self.case.mode == "training")

    def backend(self) -> str:
        """What the fused module runs on."""
        with self.case.grad_mode():
            if isinstance(self.fused, SelfAttention):
                return explain(self.fused.attention, *self.inputs * 3).backend
            like = self.fused.v if isinstance(self.fused, Operator) else next(self.fused.parameters())
            return select.choose(select.Request("additive", like.dtype, like.device.type, "attend")).backend

    def calls(self) -> dict[str, Call]:
        """What is timed in ``case.grad_mode()``: torch, fused, and compile if the case wants it."""
        calls = {"torch": self.call("torch"), "fused": self.call("fused")}
        if self.case.compiled:
            torch.compiler.reset()  # after some sizes of one code torch.compile leaves it as it is
            calls["compile"] = self._call(torch.compile(self.plain, dynamic=False))
        return calls

    def call(self, side: str) -> Call:
        """What is timed of torch or of fused. Nothing has run before its first call."""
        return self._call(self.plain if side == "torch" else self.fused)

    def _call(self, module: Any) -> Call:
        if self.case.mode == "inference":
            return lambda: module(*self.inputs)
        inputs = [t.detach().requires_grad_() for t in self.inputs]
        wanted = [*inputs, *module.parameters()]
        grad = torch.ones_like(inputs[0])  # a context has the shape of the query
        return lambda: torch.autograd.grad(module(*inputs)[0], wanted, grad)


def _make(case: AttentionCase) -> nn.Module:
    hidden = case.hidden
    if case.form == "operator":
        return Operator(hidden)
    if case.form == "multihead":
        return SelfAttention(modules.MultiheadAttention(hidden, case.heads, batch_first=True))
    if case.form == "location":
        return modules.LocationSensitiveAttention(hidden, hidden, hidden, FILTERS, KERNEL_SIZE)
    return modules.BahdanauAttention(hidden, hidden, hidden)


def _draw(case: AttentionCase, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
    """What a call of the form takes."""
    beams = (case.beams,) if case.beams > 1 else ()
    query = draw(case.batch, *beams, case.queries, case.hidden)
    if case.form == "multihead":
        return (query,)
    memory, key = (draw(case.batch, case.keys, case.hidden) for _ in range(2))
    if case.form == "module":
        return query, memory
    if case.form == "decoder":
        return query, Memory(key, memory)
    if case.form == "location":
        before = draw(case.batch, 2, case.keys).softmax(-1)
        return query[:, 0], memory, key, before
    return query, key, memory
