"""What `resets` must equal: every piece of every sequence on its own, by torch.nn."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fusedrnn.testing import draw_inputs, stock


def draw(module: nn.Module, chance: float, **options: Any) -> tuple[Any, Any, Any]:
    """Random (input, hx, resets) for a stack; options as those of `draw_inputs`."""
    input, hx = draw_inputs(module, **options)
    make = torch.Generator().manual_seed(options.get("seed", 0))

    def like(data: Tensor) -> Tensor:
        return (torch.rand(data.shape[:-1], generator=make) < chance).to(data.device)

    packed = isinstance(input, PackedSequence)
    return input, hx, input._replace(data=like(input.data)) if packed else like(input)


def resetting(module: nn.Module) -> nn.Module:
    """The module, taking `resets` as its third positional argument."""
    base = type(module)

    def forward(self: Any, input: Any, hx: Any, resets: Any) -> Any:
        return base.forward(self, input, hx, resets=resets)

    return _as(copy.deepcopy(module), forward)


def in_pieces(module: nn.Module) -> nn.Module:
    """torch.nn's module of the same weights, that runs the pieces one by one."""
    twin = stock(module)
    base: Any = type(twin)

    def forward(self: Any, input: Any, hx: Any, resets: Any) -> Any:
        if isinstance(input, PackedSequence):
            padded, lengths = pad_packed_sequence(input)
            starts, _ = pad_packed_sequence(resets)
            output, last = _run(self, base, padded, _tuple(hx), starts, lengths.tolist())
            output = pack_padded_sequence(output, lengths, enforce_sorted=False)
            return output, _own(self, last)
        lone = input.dim() == 2
        if lone:
            input, resets = input[:, None], resets[:, None]
            hx = _own(self, [s[:, None] for s in _tuple(hx)])
        elif self.batch_first:
            input, resets = input.transpose(0, 1), resets.t()
        output, last = _run(self, base, input, _tuple(hx), resets, [input.shape[0]] * input.shape[1])
        if lone:
            output, last = output[:, 0], [s[:, 0] for s in last]
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, _own(self, last)

    return _as(twin, forward)


def _run(
    self: Any, base: Any, input: Tensor, hx: tuple[Tensor, ...], resets: Tensor, lengths: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """Of [T, B, I], each sequence up to its length."""
    directions = 2 if self.bidirectional else 1
    outputs, lasts = [], []
    for b, length in enumerate(lengths):
        starts = [0, *(t for t in range(1, length) if resets[t, b])]
        pieces = list(zip(starts, [*starts[1:], length]))
        made = []
        for i, (begin, end) in enumerate(pieces):
            of_hx = [i == 0 and not resets[0, b], i == len(pieces) - 1][:directions]
            keep = torch.tensor(of_hx * self.num_layers, device=input.device)[:, None, None]
            states = [torch.where(keep, s[:, b : b + 1], 0) for s in hx]
            piece = input[begin:end, b : b + 1]
            found, after = base.forward(
                self, piece.transpose(0, 1) if self.batch_first else piece, _own(self, states)
            )
            made.append((found.transpose(0, 1) if self.batch_first else found, _tuple(after)))
        zeros = made[0][0].new_zeros(input.shape[0] - length, 1, made[0][0].shape[2])
        outputs.append(torch.cat([*(found for found, _ in made), zeros]))
        forward = torch.tensor([True, False][:directions] * self.num_layers, device=input.device)
        ends = zip(made[-1][1], made[0][1])
        lasts.append([torch.where(forward[:, None, None], late, early) for late, early in ends])
    return torch.cat(outputs, 1), [torch.cat(parts, 1) for parts in zip(*lasts)]


def _tuple(states: Any) -> tuple[Tensor, ...]:
    return tuple(states) if isinstance(states, (tuple, list)) else (states,)


def _own(self: Any, states: Any) -> Any:
    return tuple(states) if isinstance(self, nn.LSTM) else states[0]


def _as(module: nn.Module, forward: Any) -> nn.Module:
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})
    return module
