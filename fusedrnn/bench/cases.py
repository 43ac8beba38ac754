"""What is timed: a stock module and a fused one with the same weights, on the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..cells import CELLS
from ..explain import explain
from ..parity import DTYPES, make_module
from ..testing import Parity, draw_inputs, parity, stock

LAYOUTS = ("dense", "ragged", "bidirectional")
MODES = ("inference", "training")
_GATE_STEPS = 16


@dataclass(frozen=True)
class Case:
    """One layer with as many inputs as hidden units.

    Attributes:
        cell: lstm, gru, rnn_tanh or rnn_relu.
        hidden, batch, time: H, B and T. Ragged: T is the longest of B random lengths.
        mode: inference (``torch.inference_mode``), or training: forward, and the gradients of the
            input and of every weight.
        layout: dense, ragged (a PackedSequence) or bidirectional.
        dtype: a key of fusedrnn.parity.DTYPES.
    """

    cell: str
    hidden: int
    batch: int
    time: int
    mode: str
    layout: str
    dtype: str = "fp32"

    @property
    def label(self) -> str:
        sizes = f"H{self.hidden} B{self.batch} T{self.time}"
        return f"{self.cell} {sizes} {self.layout} {self.mode} {self.dtype}"

    def lengths(self) -> list[int] | None:
        """T and B - 1 lengths between 1 and T; None if all are T."""
        if self.layout != "ragged":
            return None
        make = torch.Generator().manual_seed(0)
        rest = torch.randint(1, self.time + 1, (self.batch - 1,), generator=make)
        return [self.time, *rest.tolist()]

    def prepare(self) -> Prepared:
        fused = make_module(
            self.cell,
            self.hidden,
            self.hidden,
            bidirectional=self.layout == "bidirectional",
            dtype=DTYPES[self.dtype],
        )
        inputs = draw_inputs(fused, time=self.time, batch=self.batch, lengths=self.lengths())
        return Prepared(self, stock(fused), fused, inputs)

    def work(self) -> tuple[int, int]:
        """Floating-point operations of the matrix products, and bytes that must move at least once.

        Bytes are those of the weights, of the input and of the output; of training also of their
        gradients.
        """
        directions = 2 if self.layout == "bidirectional" else 1
        rows = sum(self.lengths() or [self.time * self.batch])
        gates = len(CELLS[self.cell].gates)
        weights = directions * gates * self.hidden * (2 * self.hidden + 2)
        values = weights + rows * self.hidden * (1 + directions)
        flops = 2 * rows * directions * gates * self.hidden * 2 * self.hidden
        size = DTYPES[self.dtype].itemsize
        return (3 * flops, 2 * values * size) if self.mode == "training" else (flops, values * size)


@dataclass(frozen=True)
class Prepared:
    """A case with its modules and its input."""

    case: Case
    stock: nn.Module
    fused: nn.Module
    inputs: tuple[Any, ...]

    def parity(self) -> Parity:
        """Of the first steps: an fp64 oracle of all of them takes longer than the timing."""
        case = replace(self.case, time=min(self.case.time, _GATE_STEPS))
        inputs = draw_inputs(self.fused, time=case.time, batch=case.batch, lengths=case.lengths())
        return parity(self.fused, self.stock, inputs, gradients=case.mode == "training")

    def backend(self) -> str:
        """What the fused module runs on."""
        with torch.set_grad_enabled(self.case.mode == "training"):
            return explain(self.fused, *self.inputs).backend

    def calls(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """What is timed, of the stock module and of the fused one."""
        make = _training_call if self.case.mode == "training" else _inference_call
        return make(self.stock, self.inputs), make(self.fused, self.inputs)


def _inference_call(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return call


def _training_call(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    input, *hx = inputs
    if isinstance(input, PackedSequence):
        data = input.data.detach().requires_grad_()
        input = input._replace(data=data)
    else:
        data = input = input.detach().requires_grad_()
    wanted = [data, *module.parameters()]

    def forward() -> Tensor:
        output = module(input, *hx)[0]
        return output.data if isinstance(output, PackedSequence) else output

    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), wanted, grad)


def grid(
    cells: Sequence[str],
    hidden: Sequence[int],
    batch: Sequence[int],
    time: int,
    modes: Sequence[str],
    layouts: Sequence[str],
    dtype: str = "fp32",
) -> Iterator[Case]:
    """Every combination."""
    for layout in layouts:
        for cell in cells:
            for mode in modes:
                for h in hidden:
                    for b in batch:
                        yield Case(cell, h, b, time, mode, layout, dtype)
