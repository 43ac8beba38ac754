"""The error budget: how far from the exact result a kernel may be, for outputs and every gradient."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Row:
    """One tensor under the budget.

    Attributes:
        name: which tensor.
        ours: max|ours - exact|; inf if there is no number to speak of, and ``note`` says why.
        theirs: max|theirs - exact| over PyTorch's own runs.
        budget: what ``ours`` may be.
        index: where ``ours`` is worst.
        note: what is wrong beyond numbers; empty if nothing is.
    """

    name: str
    ours: float
    theirs: float
    budget: float
    index: tuple[int, ...] = ()
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.ours <= self.budget

    @property
    def used(self) -> float:
        """The part of the budget that ``ours`` takes: 1 is all of it."""
        if not self.ours:
            return 0.0
        return self.ours / self.budget if self.budget else math.inf

    def __str__(self) -> str:
        if self.note:
            return f"{self.name}: {self.note}"
        return (
            f"{self.name}: error {self.ours:.3g} at index {self.index}, "
            f"budget {self.budget:.3g} (torch's own error {self.theirs:.3g})"
        )


def rounding(exact: Tensor, dtype: torch.dtype) -> float:
    """One rounding of a tensor in its storage dtype: the dtype's spacing at its largest magnitude.

    At the largest magnitude, not at each element's own: an element near zero is a difference of
    larger terms, and no method that rounds those terms resolves it further. The spacing, not half
    of it: a function faithful to one unit in the last place may be off by that. One subnormal
    step is added, because a result below the dtype's range may become zero; it is also all that
    is left for a tensor of zeros, which therefore has to be matched by zeros.
    """
    info = torch.finfo(dtype)
    return info.eps * _largest(exact[exact.isfinite()].abs()) + info.smallest_normal * info.eps


def compare(name: str, ours: Tensor | None, theirs: Tensor | Sequence[Tensor], exact: Tensor) -> Row:
    """Judge one tensor: max|ours - exact| <= 2 * (max|theirs - exact| + one rounding of exact).

    Args:
        name: the tensor's name in messages.
        ours: any shape; None if it was not computed.
        theirs: the same from PyTorch's own path in the same precision. Of several runs the worst
            counts; :func:`check` says where more than one comes from.
        exact: the same in fp64.

    They may lie on different devices; the comparison is made where ``exact`` lies.
    Where ``exact`` is NaN or infinite once stored in the dtype of ``ours``, ``ours`` must be so too.
    Integers and bools have no rounding: they must be those of ``exact`` or of one of the runs.
    """
    runs = [theirs] if isinstance(theirs, Tensor) else list(theirs)
    if ours is None:
        return Row(name, math.inf, 0.0, 0.0, note="missing")
    if ours.shape != exact.shape:
        return Row(name, math.inf, 0.0, 0.0, note=f"shape {tuple(ours.shape)}, expected {tuple(exact.shape)}")
    if ours.dtype != runs[0].dtype:
        return Row(name, math.inf, 0.0, 0.0, note=f"dtype {ours.dtype}, expected {runs[0].dtype}")

    if not ours.is_floating_point():
        return _compare_integers(name, ours, [run.to(ours) for run in (exact, *runs)])
    exact = exact.detach().double()
    stored, got = exact.to(ours.dtype).double(), ours.detach().to(exact)
    finite = stored.isfinite()
    same = (got == stored) | (got.isnan() & stored.isnan())
    error = torch.where(finite, (got - exact).abs(), torch.where(same, 0.0, math.inf))
    error = error.nan_to_num(nan=math.inf, posinf=math.inf)
    theirs = [run.detach().to(exact) for run in runs]
    own = [(run - exact)[finite & run.isfinite()].abs() for run in theirs]
    own_error = max(_largest(e) for e in own)
    budget = 2 * (own_error + rounding(exact[finite], ours.dtype))
    if not error.numel():
        return Row(name, 0.0, own_error, budget)
    at = int(error.argmax())
    worst = float(error.flatten()[at])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))
    wrong = f"{float(got[index])} at index {index}, expected {float(stored[index])}"
    return Row(name, worst, own_error, budget, index, "" if math.isfinite(worst) else wrong)


def _compare_integers(name: str, ours: Tensor, runs: Sequence[Tensor]) -> Row:
    if any(torch.equal(ours, run) for run in runs):
        return Row(name, 0.0, 0.0, 0.0)
    at = (ours != runs[0]).nonzero()[0]
    index = tuple(int(i) for i in at)
    wrong = f"{ours[index].item()} at index {index}, expected {runs[0][index].item()}"
    return Row(name, math.inf, 0.0, 0.0, index, wrong)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


@dataclass(frozen=True)
class Parity:
    """The rows of a comparison; prints as a table, and is true if every row is within budget."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __bool__(self) -> bool:
        return self.ok

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def worst(self) -> Row:
        """The row that uses most of its budget."""
        return max(self.rows, key=lambda row: row.used)

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'tensor':{width}}  {'ours':>9}  {'theirs':>9}  {'budget':>9}"]
        for row in self.rows:
            verdict = "ok" if row.ok else f"RED {row.note}".rstrip()
            lines.append(
                f"{row.name:{width}}  {row.ours:9.2e}  {row.theirs:9.2e}  {row.budget:9.2e}  {verdict}"
            )
        return "\n".join(lines)


def raised(error: Exception) -> Parity:
    """What stands for a comparison that raised, so that the others still run; prints the traceback."""
    traceback.print_exception(error)
    first, *_ = str(error).splitlines() or [""]
    return Parity((Row("run", math.inf, 0.0, 0.0, note=f"{type(error).__name__}: {first}"),))


class Rounded(TorchDispatchMode):
    """Torch code in fp64 whose every operation is rounded as in ``dtype``, up or down at random.

    Monte Carlo arithmetic: Parker, Pierce, Eggert 2000, https://doi.org/10.1109/5992.852391
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self.half = torch.finfo(dtype).eps / 2
        self.make = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or not any(map(_is_fp64, tree_leaves(args))):
            return result
        for tensor in filter(_is_fp64, tree_leaves(result)):
            up = torch.empty(tensor.shape).bernoulli_(generator=self.make).to(tensor)
            tensor.mul_(up.mul_(2 * self.half).add_(1 - self.half))
        return result


def _is_fp64(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.float64


Tensors = Mapping[str, Tensor | None]
# As many as a tensor of one element needs: of 15,000 random ones three were enough for all.
ROUNDED_RUNS = 8


def check(ours: Tensors, theirs: Tensors, oracle: Callable[[], Tensors]) -> Parity:
    """:func:`compare` tensors by name. One of ours that PyTorch lacks is red, as one that is missing is.

    PyTorch's error in one run can be small by luck: a tensor of one element, a sum over time and
    batch that cancels, and fp64, where PyTorch is its own oracle. So while a row is over budget,
    the oracle runs again with every operation rounded at random as in the dtype of ``theirs``
    (:class:`Rounded`), up to ROUNDED_RUNS times; each counts as a run of PyTorch's. This measures
    what one rounding does to terms that are far larger than their sum, to a saturated activation,
    or to a ReLU at its kink.

    Args:
        ours, theirs: what was computed; None where there was no result.
        oracle: computes the same with torch in fp64, again at each call.
    """
    exact, runs = oracle(), [theirs]
    dtype = next((t.dtype for t in theirs.values() if t is not None and t.is_floating_point()), None)
    note = "not expected: torch has no such tensor"
    extra = [
        Row(name, math.inf, 0.0, 0.0, note=note)
        for name, t in ours.items()
        if t is not None and name not in exact
    ]
    while True:
        rows = [*extra]
        for name, tensor in exact.items():
            own = [found for run in runs if (found := run[name]) is not None]
            got = ours.get(name)
            if tensor is None and got is not None:  # PyTorch's result does not depend on it
                tensor, own = torch.zeros_like(got), [torch.zeros_like(got)]
            if tensor is not None:
                rows.append(compare(name, got, own, tensor))
        result = Parity(tuple(rows))
        if dtype is None or result.ok or len(runs) > ROUNDED_RUNS or any(row.note for row in rows):
            return result
        with Rounded(dtype, seed=len(runs)):
            runs.append(oracle())
