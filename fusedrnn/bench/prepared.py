"""A case with its modules: what each side calls, and whether they agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..explain import explain
from ..parity import DTYPES, make_module
from ..testing import Parity, draw_inputs, parity, stock
from .cases import Case
from .step import PreparedStep

Call = Callable[[], Any]


@dataclass(frozen=True)
class Prepared:
    """A case with a stock module and a fused one with the same weights, and their input."""

    case: Case
    stock: nn.Module
    fused: nn.Module
    inputs: tuple[Any, ...]

    @classmethod
    def of(cls, case: Case) -> Prepared:
        fused = make_module(
            case.cell, case.input_size, case.hidden, dtype=DTYPES[case.dtype], **case.options()
        )
        inputs = draw_inputs(fused, time=case.time, batch=case.batch, lengths=case.lengths())
        return cls(case, stock(fused), fused, inputs)

    def parity(self) -> Parity:
        return parity(self.fused, self.stock, self.inputs, gradients=self.case.mode == "training")

    def backend(self) -> str:
        """What the fused module runs on."""
        with self.case.grad_mode():
            return explain(self.fused, *self.inputs).backend

    def calls(self) -> dict[str, Call]:
        """What is timed in ``case.grad_mode()``: torch, fused, and of half precision also fused in fp32."""
        make = _training_call if self.case.mode == "training" else _inference_call
        calls = {"torch": make(self.stock, self.inputs), "fused": make(self.fused, self.inputs)}
        if self.case.dtype in ("bf16", "fp16"):
            wide = copy.deepcopy(self.fused).float()
            calls["fused_fp32"] = make(wide, _float(self.inputs))
        return calls


def _float(tree: Any) -> Any:
    return tuple(map(_float, tree)) if type(tree) is tuple else tree.float()


def _inference_call(module: nn.Module, inputs: tuple[Any, ...]) -> Call:
    return lambda: module(*inputs)


def _training_call(module: nn.Module, inputs: tuple[Any, ...]) -> Call:
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


def prepare(case: Case) -> Prepared | PreparedStep:
    return (PreparedStep if case.layout == "step" else Prepared).of(case)
