"""What a comparison may do to the modules and inputs that it is given, and what of a result it compares."""

from __future__ import annotations

import dataclasses
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


# ---- what is compared --------------------------------------------------------------------------


class Returns(nn.Linear):
    """What `make` makes of its input and output."""

    def __init__(self, make: Any, twin: nn.Linear | None = None) -> None:
        super().__init__(4, 3)
        self.make = make
        if twin is not None:
            self.load_state_dict(twin.state_dict())

    def forward(self, input: Tensor) -> Any:
        return self.make(super().forward(input))


def failures(ours: Any, theirs: Any, **options: Any) -> dict[str, str]:
    torch.manual_seed(0)
    reference = Returns(theirs)
    result = parity(Returns(ours, reference), reference, torch.randn(5, 4), **options)
    return {row.name: row.note for row in result.failures}


@pytest.mark.parametrize("options", [{}, {"gradients": False}, {"second_order": True}])
def test_an_output_too_many_is_red(options: dict[str, bool]) -> None:
    found = failures(lambda y: (y, y.tanh(), y.detach()), lambda y: (y, y.tanh()), **options)
    assert found == {"output[2]": "not expected: torch has no such tensor"}
    assert failures(lambda y: (y,), lambda y: (y, y.tanh()), **options)["output[1]"] == "missing"
    assert failures(lambda y: (y, y > 0), lambda y: (y, None), **options).keys() == {"output[1]"}


@pytest.mark.parametrize("options", [{}, {"gradients": False}, {"second_order": True}])
def test_integers_and_bools_are_compared_exactly(options: dict[str, bool]) -> None:
    def both(y: Tensor) -> Any:
        return y, y.argmax(-1), y > 0

    assert failures(both, both, **options) == {}
    found = failures(lambda y: (y, (y.argmax(-1) + 1) % 3, y <= 0), both, **options)
    assert found.keys() == {"output[1]", "output[2]"}
    assert "at index (0,), expected" in found["output[1]"]
    assert "dtype" in failures(lambda y: (y, y.argmax(-1).int(), y > 0), both, **options)["output[1]"]
    assert failures(lambda y: y > 0, lambda y: y > 0, **options) == {}
    assert failures(lambda y: y < 0, lambda y: y > 0, **options).keys() >= {"output"}
    assert str(parity(Returns(both), Returns(both), torch.zeros(0, 4)).worst)


@dataclasses.dataclass(frozen=True)
class Pair:
    value: Tensor
    rows: Any = None


def test_dataclasses_are_compared() -> None:
    def pair(y: Tensor) -> Pair:
        return Pair(y, [y.argmax(-1)])

    assert failures(pair, pair) == {}
    assert failures(lambda y: Pair(y + 1e-3, [y.argmax(-1)]), pair) == {"output.value": ""}
    assert failures(lambda y: Pair(y, [y.argmin(-1)]), pair).keys() == {"output.rows[0]"}


class OfPair(nn.Linear):
    def forward(self, pair: Pair) -> Tensor:
        return super().forward(pair.value)[pair.rows]


def test_a_dataclass_may_be_an_input() -> None:
    module, x = OfPair(4, 3), torch.randn(5, 4)
    result = assert_parity(module, module, Pair(x, torch.tensor([3, 0])))
    assert {"output", "grad pair.value"} <= {row.name for row in result.rows}
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: None, "output: expected a tensor, or some in a container, got NoneType"),
        (lambda y: {}, "output: expected a tensor, or some in a container, got dict"),
        (
            lambda y: (y, {"cache": object()}),
            r"output\[1\]\['cache'\]: expected a tensor, or tuples, .* got object",
        ),
        (lambda y: torch.complex(y, y), "output: expected a tensor of real numbers, got torch.complex64"),
    ],
)
def test_what_cannot_be_compared_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        failures(make, make)


class Variadic(nn.Linear):
    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(sum(inputs[1:], inputs[0]))


def test_a_reference_may_take_any_number_of_arguments() -> None:
    class Two(nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a + b)

    theirs, ours = Variadic(4, 3), Two(4, 3)
    ours.load_state_dict(theirs.state_dict())
    inputs = torch.randn(5, 4), torch.randn(5, 4)
    assert "grad inputs[1]" in {row.name for row in assert_parity(ours, theirs, inputs).rows}
    assert_parity(theirs, ours, inputs)
