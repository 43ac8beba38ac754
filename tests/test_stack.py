"""Stacks as a wavefront over chunks of time: on the CPU, with lanes that only note what comes after what."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import stack, straight
from fusedrnn.testing import assert_parity, draw_inputs

CELLS = {"lstm": fusedrnn.LSTM, "gru": fusedrnn.GRU, "rnn": fusedrnn.RNN}


class Notes:
    """In place of Lanes. `seen[k]`: of each layer, how many pieces the stream of layer k comes after."""

    instances: ClassVar[list[Notes]] = []

    def __init__(self, device: torch.device, layers: int) -> None:
        self.ran = [0] * layers
        self.seen = [[0] * layers for _ in range(layers)]
        self.joined: list[Tensor] = []
        self.layer: int | None = None
        Notes.instances.append(self)

    @contextmanager
    def on(self, layer: int) -> Any:
        if layer > 0:
            piece = self.ran[layer]
            assert self.seen[layer][layer - 1] > piece, f"layer {layer} reads piece {piece} too early"
        yield
        self.ran[layer] += 1

    def hand_on(self, layer: int, output: Tensor) -> None:
        if layer + 1 < len(self.ran):
            self.seen[layer + 1][layer] = self.ran[layer] + 1  # still inside `on`

    def join(self, tensors: list[Tensor]) -> None:
        assert len(set(self.ran)) == 1, f"not all layers ran all pieces: {self.ran}"
        self.joined = tensors


@pytest.fixture
def wavefronts(monkeypatch: pytest.MonkeyPatch) -> list[Notes]:
    monkeypatch.setattr(straight, "layers", lambda *_: None)  # on a GPU it knows nothing
    monkeypatch.setattr(stack, "Lanes", Notes)
    monkeypatch.setattr(stack, "STEPS", 4)
    monkeypatch.setattr(stack, "_overlaps", lambda input: input.shape[0] >= 2 * stack.STEPS)
    Notes.instances = []
    return Notes.instances


@pytest.mark.parametrize("time", [8, 9, 23])
@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_parity(wavefronts: list[Notes], cell: str, layers: int, time: int) -> None:
    module = CELLS[cell](5, 7, layers)
    assert_parity(module, inputs=draw_inputs(module, time=time, batch=3))
    assert wavefronts
    assert wavefronts[0].ran == [-(-time // 4)] * layers


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(wavefronts: list[Notes], dtype: torch.dtype) -> None:
    module = fusedrnn.LSTM(5, 7, 2, dtype=dtype)
    assert_parity(module, inputs=draw_inputs(module, time=32, batch=3))
    assert wavefronts


def test_projection_batch_first_and_no_bias(wavefronts: list[Notes]) -> None:
    module = fusedrnn.LSTM(5, 7, 3, proj_size=4, batch_first=True, bias=False)
    assert_parity(module, inputs=draw_inputs(module, time=13, batch=3))
    assert wavefronts


def test_what_the_caller_reads_is_joined(wavefronts: list[Notes]) -> None:
    module = fusedrnn.LSTM(5, 7, 2)
    module(torch.randn(9, 3, 5))
    assert len(wavefronts[0].joined) == 3 + 2 * 2


def run(module: nn.Module, input: Tensor, **kwargs: Any) -> list[Tensor]:
    input = input.clone().requires_grad_()
    output, last = module(input, **kwargs)
    outputs = [output, *last]
    weights = list(module.parameters())
    return [*outputs, *torch.autograd.grad([o.square().sum() for o in outputs], [input, *weights])]


def test_resets(wavefronts: list[Notes], monkeypatch: pytest.MonkeyPatch) -> None:
    module = fusedrnn.LSTM(5, 7, 3, dtype=torch.float64)
    input, resets = torch.randn(14, 3, 5, dtype=torch.float64), torch.rand(14, 3) < 0.3
    resets[8, 0] = True  # where a chunk begins
    ours = run(module, input, resets=resets)
    assert wavefronts
    monkeypatch.setattr(stack, "_overlaps", lambda *_: False)
    for wave, line in zip(ours, run(module, input, resets=resets)):
        torch.testing.assert_close(wave, line, rtol=1e-12, atol=1e-12)


def test_dropout_is_between_layers_alone(wavefronts: list[Notes]) -> None:
    module = fusedrnn.LSTM(5, 7, 2, dropout=1.0)
    output, _ = module(torch.randn(9, 3, 5))
    silent = fusedrnn.LSTM(7, 7)
    silent.load_state_dict({f"{n[:-2]}l0": w for n, w in module.state_dict().items() if n.endswith("l1")})
    expected, _ = silent(torch.zeros(9, 3, 7))
    torch.testing.assert_close(output, expected)
    assert wavefronts


def test_gradients_of_gradients(wavefronts: list[Notes]) -> None:
    module = fusedrnn.GRU(2, 3, 2, dtype=torch.float64)
    input = torch.randn(9, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], [input])
    assert wavefronts


def test_packed_and_bidirectional_stacks_run_in_line(wavefronts: list[Notes]) -> None:
    lengths = torch.tensor([12, 9, 2])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(12, 3, 5), lengths)
    fusedrnn.LSTM(5, 7, 2)(packed)
    fusedrnn.LSTM(5, 7, 2, bidirectional=True)(torch.randn(12, 3, 5))
    assert not wavefronts


def test_a_cpu_has_no_lanes() -> None:
    assert not stack._overlaps(torch.randn(999, 1, 5))
