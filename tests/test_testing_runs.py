"""What a comparison may do to the modules and inputs that it is given, and what of a result it compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedrnn.testing import assert_parity, draw_inputs, parity

# ---- inputs and modules ------------------------------------------------------------------------


class Overwrites(nn.LSTM):
    """Leaves zeros where its input and its states were."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        for tensor in (input, *hx):
            tensor.data.zero_()
        return output, states


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_an_overwritten_input_is_caught_and_not_the_callers(gradients: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = Overwrites(5, 7, dtype=dtype)
    inputs = draw_inputs(module)
    before = inputs[0].clone(), [h.clone() for h in inputs[1]]
    result = parity(module, inputs=inputs, gradients=gradients)
    notes = {row.name: row.note for row in result.failures}
    for name in ("input", "hx[0]", "hx[1]"):
        assert notes[name] == "overwritten by the call, as torch's is not"
    torch.testing.assert_close((inputs[0], list(inputs[1])), before, rtol=0, atol=0)


class Scaled(nn.Module):
    """Scales in place, and returns what it was given."""

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        x.data.mul_(2)
        rows.add_(1)
        return x


def test_what_the_reference_overwrites_too_is_no_bug() -> None:
    x, rows = torch.randn(6, 4), torch.arange(6)
    before = x.clone()
    assert_parity(Scaled(), Scaled(), (x[:, 1:3], rows), gradients=False)
    assert torch.equal(x, before)
    assert torch.equal(rows, torch.arange(6))


@pytest.mark.parametrize(
    "x", [torch.randn(5, 1).expand(5, 4), torch.randn(9, 8)[2:7, 3:7], torch.randn(0, 4)]
)
def test_a_run_sees_the_layout_of_its_input(x: Tensor) -> None:
    seen = []

    class Look(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append((input.stride(), input.data_ptr() % 64))
            return super().forward(input)

    module = Look(4, 3)
    assert_parity(module, module, x)
    assert {stride for stride, _ in seen[:2]} == {x.stride()}
    assert not x.numel() or {place for _, place in seen[:2]} == {x.data_ptr() % 64}


def test_statistics_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    buffers = dict(ours.named_buffers())
    before = [{n: b.clone() for n, b in m.named_buffers()} for m in (ours, theirs)]
    assert_parity(ours, theirs, torch.randn(8, 3))
    for module, kept in zip((ours, theirs), before):
        torch.testing.assert_close(dict(module.named_buffers()), kept, rtol=0, atol=0)
    assert all(buffer is buffers[name] for name, buffer in ours.named_buffers())
