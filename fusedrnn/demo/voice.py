"""Resemblyzer: speech to voice prints (after Wan et al., 2018, https://arxiv.org/abs/1710.10467).

An LSTM of three layers listens to voices that this file synthesises.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, interpolate, normalize

from .compare import MissingPackage

RATE, HOP = 16_000, 160
# The first three resonances of the vocal tract, in Hz (Peterson and Barney, 1952).
VOWELS = {
    "i": (270.0, 2290.0, 3010.0),
    "e": (530.0, 1840.0, 2480.0),
    "a": (730.0, 1090.0, 2440.0),
    "o": (570.0, 840.0, 2410.0),
    "u": (300.0, 870.0, 2240.0),
    "r": (490.0, 1350.0, 1690.0),
}
# pitch in Hz, resonances relative to an adult man's, breath noise
VOICES = {
    "bass": (88.0, 0.95, 0.04),
    "tenor": (125.0, 1.03, 0.10),
    "alto": (195.0, 1.16, 0.16),
    "child": (285.0, 1.36, 0.10),
}
SPOKEN = ("ieaou aeiro uiea roia oeui aireo uai", "oaire uoei ariou eai uo reiau ioae eur")


def speech(voice: str, text: str, seed: int) -> Tensor:
    """Samples [S] at 16 kHz of a voice that says the vowels of `text`: harmonics under formants."""
    pitch, tract, breath = VOICES[voice]
    random = torch.Generator().manual_seed(seed)
    frames: list[tuple[float, ...]] = []
    for vowel in text:
        length = int(torch.randint(9, 16, (), generator=random))
        loudness = 0.0 if vowel == " " else 1.0
        shape = frames[-1][1:] if vowel == " " else tuple(tract * hertz for hertz in VOWELS[vowel])
        frames += [(0.3 * loudness, *shape)] * 2 + [(loudness, *shape)] * (length - 2)
    track = torch.tensor(frames).T  # [1 + 3, F]
    track = avg_pool1d(track[None], 5, 1, 2, count_include_pad=False)[0]
    count = track.shape[1]
    place = torch.arange(count)
    melody = 1.08 - 0.16 * place / count + 0.05 * torch.sin(place * 0.14 + seed)
    melody = pitch * (melody + 0.008 * torch.randn(count, generator=random))

    higher = torch.tensor([[3500.0], [4500.0]]) * tract
    formants = torch.cat([track[1:], higher.expand(2, count)])[:, None]  # [5, 1, F]
    bandwidths = torch.tensor([60.0, 90.0, 150.0, 200.0, 250.0])[:, None, None] * tract
    order = torch.arange(1.0, 6300.0 / pitch)[:, None]  # [K, 1]
    relative = order * melody / formants
    resonance = ((1 - relative**2) ** 2 + (relative * bandwidths / formants) ** 2).rsqrt().prod(0)

    def stretch(rows: Tensor) -> Tensor:
        return interpolate(rows[None], scale_factor=HOP, mode="linear")[0]

    phase = 2 * math.pi / RATE * stretch(melody[None]).double().cumsum(1)
    harmonics = stretch(track[0] * resonance / order) * torch.sin(order * phase)
    wave = normalize(harmonics.sum(0), dim=0) * math.sqrt(count * HOP)
    noise = torch.randn(count * HOP, generator=random) * stretch(track[:1])[0]
    wave = wave + breath * noise
    # Resemblyzer brings its input to -30 dB of full scale.
    return (10**-1.5 * wave / wave.square().mean().sqrt()).float()


def mel_frames(wave: Tensor) -> Tensor:
    """Samples [S] -> energies [F, 40] on the mel scale of Slaney, as Resemblyzer was trained on."""
    logarithmic = 27 / math.log(6.4)
    top = 15 + logarithmic * math.log(RATE / 2 / 1000)
    mels = torch.linspace(0, top, 42)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) / logarithmic))[:, None]
    hertz = torch.linspace(0, RATE / 2, 201)
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(rising, falling).clamp(min=0) * 2 / (edges[2:] - edges[:-2])
    window = torch.hann_window(400)
    spectrum = torch.stft(wave, 400, HOP, window=window, pad_mode="constant", return_complex=True)
    return (bank @ spectrum.abs().square()).T


class VoiceEncoder(nn.Module):
    """Resemblyzer's network. Its weights are read without importing the package, which needs much more."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        try:
            package = importlib.metadata.distribution("Resemblyzer")
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingPackage("Resemblyzer") from error
        checkpoint = torch.load(
            str(package.locate_file("resemblyzer/pretrained.pt")), map_location="cpu", weights_only=True
        )
        own = self.state_dict()
        self.load_state_dict({name: checkpoint["model_state"][name] for name in own})
        self.eval()

    def forward(self, windows: Tensor) -> Tensor:
        """Mel energies [W, 160, 40] -> embeddings [W, 256] of length 1."""
        _, (h_n, _) = self.lstm(windows)
        return normalize(self.linear(h_n[-1]).relu())


class VoiceTask:
    """Two utterances of every voice, as windows of 1.6 s that overlap by half."""

    def __init__(self, voices: Iterable[str] = VOICES) -> None:
        self.voices = list(voices)
        utterances = [(voice, text) for text in SPOKEN for voice in self.voices]
        frames = [mel_frames(speech(*utterance, seed)) for seed, utterance in enumerate(utterances)]
        self.windows = [mels.unfold(0, 160, 80).mT.contiguous() for mels in frames]

    @staticmethod
    def prints(embeddings: Sequence[Tensor]) -> Tensor:
        """Embeddings of the windows of each utterance -> voice prints [utterances, 256]."""
        return normalize(torch.stack([windows.mean(0) for windows in embeddings]))


def similarity(prints: Tensor) -> Tensor:
    """Cosines [V, V] between the first and the second utterance of V voices."""
    first, second = prints.chunk(2)
    return first @ second.T
