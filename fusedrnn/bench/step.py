"""One step of one stream: `fusedrnn.streaming` against torch.nn's modules and cells called with hx."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import select
from ..budget import Parity, check
from ..stored import rounded
from ..streaming import Stepper, streaming
from ..testing import stock
from ..tools import make_module
from .cases import Case

_GATE_STEPS = 16


@dataclass(frozen=True)
class PreparedStep:
    """A step case with a stock module, the stock cell with the same weights, and our stepper of it."""

    case: Case
    module: nn.Module
    cell: nn.Module
    stepper: Stepper
    input: Tensor  # [T, I]

    @classmethod
    def of(cls, case: Case) -> PreparedStep:
        fused = make_module(case.cell, case.input_size, case.hidden).eval()
        module = stock(fused)
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}[case.cell](case.input_size, case.hidden)
        cell.load_state_dict({name.removesuffix("_l0"): w for name, w in module.state_dict().items()})
        input = torch.randn(_GATE_STEPS, case.input_size, generator=torch.Generator().manual_seed(0))
        return cls(case, module, cell, streaming(fused, weights=case.dtype), input)

    def parity(self) -> Parity:
        """Of every output of a few steps, with weights as they are stored: what storing costs is no error."""
        module = stock(self.module)
        with torch.no_grad():
            for weight in module.parameters():
                weight.copy_(rounded(weight, self.case.dtype))
        exact = stock(module).double()
        self.stepper.reset()
        ours = torch.stack([self.stepper.step(x).clone() for x in self.input])

        def run(module: nn.Module, input: Tensor) -> dict[str, Tensor | None]:
            with torch.no_grad():
                return {"output": module(input)[0]}

        return check({"output": ours}, run(module, self.input), lambda: run(exact, self.input.double()))

    def backend(self) -> str:
        return select.choose(select.Request(self.case.cell, torch.float32, "cpu")).backend

    @property
    def turns(self) -> int:
        return 1

    def calls(self) -> dict[str, Callable[[], Any]]:
        """torch: the module on [1, 1, I] with hx; cell: the cell on [1, I] with hx; fused: the stepper."""
        x, step = self.input[0], self.stepper.step
        return {
            "torch": _carry(lambda hx: self.module(x[None, None], hx)[1], self.module),
            "cell": _carry(lambda hx: self.cell(x[None], hx), self.cell),
            "fused": lambda: step(x),
        }


def _carry(call: Callable[[Any], Any], module: Any) -> Callable[[], Any]:
    """A call that takes what it returned the last time, beginning with zeros."""
    zeros = torch.zeros(1, *([1] if isinstance(module, nn.RNNBase) else []), module.hidden_size)
    hx: Any = (zeros, zeros) if isinstance(module, (nn.LSTM, nn.LSTMCell)) else zeros

    def step() -> Any:
        nonlocal hx
        hx = call(hx)
        return hx

    return step
