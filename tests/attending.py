"""What the tests of the attend share: a call on random numbers, and its formulas once more."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.backends import select
from fusedrnn.backends.reference import attend as reference
from fusedrnn.scores import SCORES

BACKENDS = [
    name
    for name in select.ORDER
    if select.against(name, select.Request("additive", torch.float32, "cpu", "attend")) is None
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_score = pytest.mark.parametrize("score", SCORES)


class Case:
    """The arguments of one attend, on random numbers; `floats` are those that have a gradient."""

    def __init__(self, score, mask, sizes=(2, 2, 3, 5, 4, 3), dtype=torch.float64, dropout=0.0, weights=True):
        make = torch.Generator().manual_seed(sum(sizes))
        batch, heads, queries, keys, size, values = sizes

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()

        self.score, self.weights, self.dropout = score, weights, dropout
        self.query, self.key = draw(batch, heads, queries, size), draw(batch, heads, keys, size)
        self.value = draw(batch, heads, keys, values)
        self.v = draw(size) if score == "additive" else None
        self.mask = self.lengths = None
        if mask == "bool":
            self.mask = torch.rand(batch, 1, queries, keys, generator=make) < 0.7
        elif mask in ("float", "both"):
            self.mask = draw(1, heads, 1, keys)
            self.mask.data[..., keys // 2] = -torch.inf
        if mask in ("lengths", "both"):
            self.lengths = torch.randint(0, keys + 1, (batch,), generator=make)
            self.lengths[0] = keys
        self.scale = size**-0.5
        self.seed = torch.tensor(0x1234567890ABCDE) if dropout else None

    @property
    def inputs(self):
        return [self.query, self.key, self.value, self.v, self.mask]

    @property
    def floats(self) -> list[Tensor]:
        return [t for t in self.inputs if t is not None and t.is_floating_point()]

    def filled(self, floats) -> list[Tensor | None]:
        """The inputs, with these in the place of `floats`."""
        given = iter(floats)
        return [next(given) if t is not None and t.is_floating_point() else t for t in self.inputs]

    def fused(self, backend):
        def run(*floats: Tensor) -> tuple[Tensor, ...]:
            context, weights = ops.attend(
                self.score, *self.filled(floats), self.lengths, self.scale, self.dropout, self.seed,
                self.weights, backend,
            )  # fmt: skip
            return (context, weights) if self.weights else (context,)

        return run

    def operator(self, backend):
        def run(*floats: Tensor) -> tuple[Tensor, ...]:
            found = torch.ops.fusedrnn.attend(*self.operator_args(backend, *floats))
            return tuple(found[: 1 + self.weights])

        return run

    def operator_args(self, backend, *floats):
        return (
            self.score, *self.filled(floats), self.lengths, self.scale, self.dropout, self.seed, self.weights,
            True, backend,
        )  # fmt: skip

    def exact(self, *floats: Tensor) -> tuple[Tensor, ...]:
        """The formulas, once more."""
        query, key, value, v, mask = self.filled(floats)
        if self.score == "additive":
            energies = (torch.tanh(query[:, :, :, None] + key[:, :, None]) * v).sum(-1)
        else:
            energies = self.scale * torch.einsum("bnid,bnjd->bnij", query, key)
        allowed = torch.ones_like(energies, dtype=torch.bool)
        if mask is not None and mask.is_floating_point():
            allowed = allowed & (mask > -torch.inf)
            energies = energies + mask.masked_fill(mask == -torch.inf, 0)
        elif mask is not None:
            allowed = allowed & mask
        if self.lengths is not None:
            allowed = allowed & (torch.arange(key.shape[2]) < self.lengths[:, None, None, None])
        some = allowed.any(-1, keepdim=True)
        weights = torch.where(allowed | ~some, energies, -torch.inf).softmax(-1) * some
        if self.dropout:
            keep = reference.keep(weights.shape, self.dropout, self.seed, weights.device)
            weights = weights * keep / (1 - self.dropout)
        return (weights @ value, weights) if self.weights else (weights @ value,)


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def everything(run, floats) -> dict[str, Tensor]:
    outputs = run(*floats)
    make = torch.Generator().manual_seed(1)
    # small integers are exact in every dtype
    pull = [torch.randint(-4, 5, out.shape, generator=make).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, floats, pull)
    return {f"output {i}": t for i, t in enumerate(outputs)} | {f"grad {i}": g for i, g in enumerate(grads)}
