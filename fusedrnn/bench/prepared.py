"""A case with its modules: what each side calls, and whether they agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_sequence

from ..explain import explain
from ..testing import Parity, draw_inputs, parity, stock
from ..tools import DTYPES, make_module
from .attention import PreparedAttention
from .cases import HEADS, PIECE, AnyCase, AttentionCase, Case
from .device import Call, Cpu, Device, in_turn
from .step import PreparedStep


class Heads(nn.Module):
    """Independent layers side by side: each reads and writes a slice of the features."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> tuple[Tensor]:
        """``[T, B, HEADS * I]`` to ``[T, B, HEADS * H]``."""
        parts = input.chunk(len(self.layers), -1)
        return (torch.cat([layer(part)[0] for layer, part in zip(self.layers, parts)], -1),)


class Resetting(nn.Module):
    """A fused layer over sequences of several pieces."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = layers[0]

    def forward(self, input: Tensor, resets: Tensor) -> tuple[Tensor]:
        """``[T, B, I]`` and bool ``[T, B]`` to ``[T, B, H]``."""
        return (self.layer(input, resets=resets)[0],)


class Cutting(Resetting):
    """torch.nn's: every piece is a row of its own, padded to the longest."""

    def forward(self, input: Tensor, resets: Tensor) -> tuple[Tensor]:
        time, batch = resets.shape
        begins = resets.t().clone()
        begins[:, 0] = True
        first = begins.flatten().nonzero().flatten()
        lengths = torch.diff(first, append=first.new_tensor([time * batch]))
        padded = pad_sequence(input.transpose(0, 1).flatten(0, 1).split(lengths.tolist()))
        there = torch.arange(padded.shape[0], device=input.device) < lengths[:, None]
        output = self.layer(padded)[0].transpose(0, 1)[there]
        return (output.view(batch, time, -1).transpose(0, 1),)


# What a layout makes of fused layers and of torch.nn's.
_WRAPPERS: dict[str, tuple[Any, Any]] = {"heads": (Heads, Heads), "resets": (Resetting, Cutting)}


@dataclass(frozen=True)
class Prepared:
    """A case with a stock module and a fused one with the same weights, and their inputs.

    Attributes:
        inputs: what a call takes.
        others: more of them where calls take inputs in turn (Device.sets).
    """

    case: Case
    stock: nn.Module
    fused: nn.Module
    inputs: tuple[Any, ...]
    others: tuple[tuple[Any, ...], ...] = ()

    @classmethod
    def of(cls, case: Case, device: Device | None = None) -> Prepared:
        """On the CPU if ``device`` is None."""
        device = device or Cpu()
        layers = [_layer(case, device) for _ in range(HEADS if case.layout == "heads" else 1)]
        theirs = [stock(layer) for layer in layers]
        for layer in theirs:
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()  # cuDNN wants it, and copying undoes it
        ours, own = _WRAPPERS.get(case.layout, (itemgetter(0), itemgetter(0)))
        fused, twin = ours(layers), own(theirs)
        inputs = _draw(case, layers, 0)
        input = inputs[0]
        data = input.data if isinstance(input, PackedSequence) else input
        # the output is about as large as the input
        others = tuple(_draw(case, layers, seed) for seed in range(1, device.sets(2 * data.nbytes)))
        return cls(case, twin, fused, inputs, others)

    @property
    def turns(self) -> int:
        """How many inputs calls take in turn."""
        return 1 + len(self.others)

    def parity(self) -> Parity:
        return parity(self.fused, self.stock, self.inputs, gradients=self.case.mode == "training")

    def backend(self) -> str:
        """What the fused module runs on."""
        module, inputs = self.fused, self.inputs
        if isinstance(module, Heads):
            module, inputs = module.layers[0], tuple(x.chunk(HEADS, -1)[0] for x in inputs)
        with self.case.grad_mode():
            if isinstance(module, Resetting):
                return explain(module.layer, inputs[0], resets=inputs[1]).backend
            return explain(module, *inputs).backend

    def calls(self) -> dict[str, Call]:
        """What is timed in ``case.grad_mode()``: torch, fused, and of half on a CPU also fused in fp32."""
        calls = {"torch": self._call(self.stock), "fused": self._call(self.fused)}
        if self.case.dtype in ("bf16", "fp16") and not next(self.fused.parameters()).is_cuda:
            wide = copy.deepcopy(self.fused).float()
            calls["fused_fp32"] = self._call(wide, _float)
        return calls

    def _call(self, module: nn.Module, convert: Callable[[Any], Any] = lambda inputs: inputs) -> Call:
        make = _training_call if self.case.mode == "training" else _inference_call
        return in_turn([make(module, convert(inputs)) for inputs in (self.inputs, *self.others)])


def _layer(case: Case, device: Device) -> nn.RNNBase:
    options = case.options()
    return make_module(case.cell, case.input_size, case.hidden, dtype=DTYPES[case.dtype], **options).to(
        device.name
    )


def _draw(case: Case, layers: Sequence[nn.Module], seed: int) -> tuple[Any, ...]:
    def draw(layer: nn.Module, seed: int) -> tuple[Any, ...]:
        return draw_inputs(layer, time=case.time, batch=case.batch, lengths=case.lengths(), seed=seed)

    if case.layout == "heads":
        parts = [draw(layer, seed * HEADS + head)[0] for head, layer in enumerate(layers)]
        return (torch.cat(parts, -1),)
    if case.layout == "resets":
        input = draw(layers[0], seed)[0]
        make = torch.Generator().manual_seed(seed)
        resets = torch.rand(case.time, case.batch, generator=make) < 1 / PIECE
        resets[case.time // 2] = True  # also of a gate's few steps
        return input, resets.to(input.device)
    return draw(layers[0], seed)


def _float(tree: Any) -> Any:
    if type(tree) is tuple:
        return tuple(map(_float, tree))
    return tree.float() if tree.is_floating_point() else tree


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


def prepare(case: AnyCase, device: Device | None = None) -> Prepared | PreparedStep | PreparedAttention:
    """On the CPU if ``device`` is None; a step of a stream runs there only."""
    if isinstance(case, AttentionCase):
        return PreparedAttention.of(case, device)
    if case.layout == "step":
        return PreparedStep.of(case)
    return Prepared.of(case, device)
