"""A stack of layers: one after the other, or, on a GPU, as a wavefront over chunks of time.

The steps of a scan wait for each other and leave most of a GPU idle. Layer k can run a chunk of time while
layer k + 1 runs the chunk before it, on a stream each: L layers of C chunks take the time of L + C - 1
chunks, not of L * C (Appleyard, Kocisky and Blunsom, "Optimizing Performance of Recurrent Neural Networks on
GPUs", 2016, 3.4). Autograd runs the backward of a chunk on the stream of its forward, so that gradients are
a wavefront too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import autograd, ops

# Steps of a chunk: as many as a layer's launches take on the host (docs/hardware.md: not yet measured).
STEPS = 128
# Rows of a batch up to which a layer is expected to leave room for another on a GPU (likewise).
_MOST_ROWS = 32


def layers(
    input: Tensor,
    batch_sizes: Tensor | None,
    params: Sequence[Tensor],
    states: Sequence[Tensor],
    cell: str,
    directions: int,
    num_layers: int,
    dropout: float,
    backend: str,
    resets: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a stack: the output of the last layer, and the last states of all, as :func:`fusedrnn.ops.layer`.

    Args:
        params, states: of all layers; ``states`` each ``[L*D, B, ...]``.
        dropout: the probability of a zero between layers.
    """
    if num_layers == 1:
        return ops.layer(input, batch_sizes, params, states, cell, directions, backend, resets)
    each = len(params) // num_layers
    weights = [params[k * each : (k + 1) * each] for k in range(num_layers)]
    starts = [[s[k * directions : (k + 1) * directions] for s in states] for k in range(num_layers)]
    if batch_sizes is None and directions == 1 and _overlaps(input):
        lanes = Lanes(input.device, num_layers)
        return wavefront(lanes, input, weights, starts, cell, dropout, backend, resets)
    lasts = []
    for k in range(num_layers):
        if dropout != 0 and k > 0:
            input = torch.dropout(input, dropout, True)
        input, last = ops.layer(input, batch_sizes, weights[k], starts[k], cell, directions, backend, resets)
        lasts.append(last)
    return input, _joined(lasts)


def _joined(lasts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(of_layers) for of_layers in zip(*lasts)]


def _overlaps(input: Tensor) -> bool:
    """Whether the layers of a dense stack should run beside each other."""
    if input.device.type != "cuda" or type(input) is not Tensor or autograd.transformed():
        return False
    return input.shape[0] >= 2 * STEPS and input.shape[1] <= _MOST_ROWS


class Lanes:
    """A stream per layer, forked from the current one."""

    def __init__(self, device: torch.device, layers: int) -> None:
        self.caller = torch.cuda.current_stream(device)
        self.streams = [_stream(device, k) for k in range(layers)]
        for stream in self.streams:
            stream.wait_stream(self.caller)

    def on(self, layer: int) -> Any:
        return torch.cuda.stream(self.streams[layer])

    def hand_on(self, layer: int, output: Tensor) -> None:
        """What the next layer launches from now on comes after what this one has launched."""
        if layer + 1 < len(self.streams):
            self.streams[layer + 1].wait_stream(self.streams[layer])
            output.record_stream(self.streams[layer + 1])

    def join(self, tensors: Sequence[Tensor]) -> None:
        """The caller's stream goes on after all layers; it reads these."""
        for stream in self.streams:
            self.caller.wait_stream(stream)
        for tensor in tensors:
            tensor.record_stream(self.caller)


@cache
def _stream(device: torch.device, layer: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def wavefront(
    lanes: Lanes,
    input: Tensor,
    weights: Sequence[Sequence[Tensor]],
    states: Sequence[Sequence[Tensor]],
    cell: str,
    dropout: float,
    backend: str,
    resets: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """`layers` of one direction, input ``[T, B, I]``; weights and states by layer."""
    pieces = list(input.split(STEPS))
    marks = [None] * len(pieces) if resets is None else resets.split(STEPS * input.shape[1], 1)
    now = list(states)
    for diagonal in range(len(weights) + len(pieces) - 1):
        # From the last layer on: each takes its piece before the layer in front hands on the next one.
        for k in reversed(range(len(weights))):
            c = diagonal - k
            if not 0 <= c < len(pieces):
                continue
            with lanes.on(k):
                piece = torch.dropout(pieces[c], dropout, True) if dropout != 0 and k > 0 else pieces[c]
                pieces[c], now[k] = ops.layer(piece, None, weights[k], now[k], cell, 1, backend, marks[c])
                lanes.hand_on(k, pieces[c])
    lanes.join([*pieces, *(s for last in now for s in last)])
    return torch.cat(pieces), _joined(now)
