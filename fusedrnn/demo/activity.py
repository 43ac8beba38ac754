"""A voice-activity style loop: one LSTMCell step per frame of 10 ms, before and after `streaming()`.

The cell has the size of those in small voice-activity detectors; its weights are random, since it is
the loop that is shown: the same number for every frame, and how long a frame takes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fusedrnn

from .voice import SPOKEN, mel_frames, speech


class ActivityLoop:
    """The loop over the stock cell, and over a stepper of it."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.cell, self.head = nn.LSTMCell(40, 128), nn.Linear(128, 1)
        self.stepper = fusedrnn.streaming(self.cell)

    @torch.inference_mode()
    def stock(self, frames: Tensor) -> Tensor:
        """Mel energies [F, 40] -> a number between 0 and 1 for each frame, [F]."""
        state, found = None, []
        for frame in frames.unbind():
            state = self.cell(frame, state)
            found.append(self.head(state[0]))
        return torch.cat(found).sigmoid()

    @torch.inference_mode()
    def fused(self, frames: Tensor) -> Tensor:
        """The same through the stepper."""
        self.stepper.reset()
        return torch.cat([self.head(self.stepper.step(frame)) for frame in frames.unbind()]).sigmoid()


def frames() -> Tensor:
    """Of one synthetic voice, [F, 40], in decibels relative to the loudest over ten."""
    energies = mel_frames(speech("alto", SPOKEN[0], 0))
    return (energies / energies.max()).clamp(min=1e-8).log10()
