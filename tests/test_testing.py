"""The error budget: what it lets pass, and the bugs that it must catch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from fusedrnn.budget import Rounded
from fusedrnn.testing import (
    assert_parity,
    check,
    compare,
    draw_inputs,
    parity,
    poison,
    rounding,
    stock,
)  # fmt: skip

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MODULES = [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN, fusedrnn.LSTMCell, fusedrnn.GRUCell, fusedrnn.RNNCell]
pytestmark = pytest.mark.filterwarnings("ignore:fusedrnn runs its reference path")


# ---- one tensor --------------------------------------------------------------------------------


def test_the_budget_is_twice_torchs_error_and_one_rounding() -> None:
    exact = torch.tensor([0.5, -4.0], dtype=torch.float64)
    theirs = torch.tensor([0.5 + 2**-20, -4.0])
    row = compare("y", torch.tensor([0.5, -4.0 + 2**-20]), theirs, exact)
    assert row.theirs == 2**-20
    assert row.budget == pytest.approx(2 * (2**-20 + 4 * 2**-23))
    assert (row.ours, row.index, row.ok) == (2**-20, (1,), True)
    assert not compare("y", torch.tensor([0.5, -4.0 + 2**-18]), theirs, exact).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_the_spacing_at_the_largest_magnitude(dtype: torch.dtype) -> None:
    values = torch.tensor([1e-3, -8.0, math.inf], dtype=torch.float64)
    info = torch.finfo(dtype)
    assert rounding(values, dtype) == 8 * info.eps + info.smallest_normal * info.eps


def test_zeros_have_to_be_zeros() -> None:
    zeros = torch.zeros(3)
    assert compare("y", zeros, zeros, zeros.double()).ok
    assert not compare("y", zeros + 1e-30, zeros, zeros.double()).ok


def test_results_below_the_range_may_vanish() -> None:
    tiny = torch.full((2,), 3e-8, dtype=torch.float64)
    assert compare("y", torch.zeros(2, dtype=torch.float16), tiny.half(), tiny).ok


def test_empty_tensors_agree() -> None:
    assert compare("y", torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3).double()).ok


def test_what_is_not_finite_has_to_be_the_same() -> None:
    exact = torch.tensor([1.0, math.nan, math.inf, 1e300], dtype=torch.float64)
    same = torch.tensor([1.0, math.nan, math.inf, math.inf])
    assert compare("y", same, same, exact).ok
    for i, wrong in ((0, math.nan), (0, math.inf), (1, 1.0), (2, -math.inf), (2, math.nan), (3, 3e38)):
        ours = same.clone()
        ours[i] = wrong
        row = compare("y", ours, same, exact)
        assert not row.ok
        assert row.index == (i,)
        assert "expected" in str(row)


def test_torchs_own_nan_opens_no_budget() -> None:
    row = compare("y", torch.tensor([2.0]), torch.tensor([math.nan]), torch.tensor([1.0]).double())
    assert not row.ok


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        (None, "missing"),
        (torch.zeros(2), r"shape (2,), expected (3,)"),
        (torch.zeros(3).half(), "dtype torch.float16, expected torch.float32"),
    ],
)
def test_what_cannot_be_compared_is_named(ours: Tensor | None, note: str) -> None:
    row = compare("y", ours, torch.zeros(3), torch.zeros(3).double())
    assert not row.ok
    assert str(row) == f"y: {note}"


def test_a_lucky_run_of_torchs_is_not_the_measure() -> None:
    """(1 - y) y at saturation: one rounding of y is far more than one of the result."""
    x = torch.tensor([9.0], dtype=torch.float64)

    def slope(x: Tensor) -> Tensor:
        return 1 - x.tanh().square()

    exact = slope(x)
    y = x.tanh() * (1 - 2**-53)
    ours = {"slope": 1 - y.square()}
    assert not compare("slope", ours["slope"], exact, exact).ok
    assert check(ours, {"slope": exact}, lambda: {"slope": slope(x)}).ok
    assert not check({"slope": exact * (1 + 1e-6)}, {"slope": exact}, lambda: {"slope": slope(x)}).ok


def test_rounded_moves_every_result_by_half_a_spacing() -> None:
    x = torch.linspace(1, 2, 50, dtype=torch.float64)
    before = x.clone()
    with Rounded(torch.float32, seed=0):
        moved = (x.view(5, 10) * 3).reshape(50)
    half = torch.finfo(torch.float32).eps / 2
    assert torch.equal(x, before)
    relative = (moved / (3 * x) - 1).abs()
    assert torch.allclose(relative, torch.full_like(relative, half), rtol=1e-6)


# ---- modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", MODULES)
def test_fused_modules_are_at_parity(make: Any, dtype: torch.dtype) -> None:
    second = dtype.itemsize > 2
    result = assert_parity(make(5, 7, dtype=dtype), second_order=second)
    names = {row.name for row in result.rows}
    assert "grad input" in names
    assert any(name.startswith("grad bias_hh") for name in names)
    assert ("second input" in names) == second


def test_packed_and_batch_first_inputs() -> None:
    module = fusedrnn.GRU(3, 4, batch_first=True, bidirectional=True)
    packed = draw_inputs(module, lengths=[2, 5, 1])
    assert isinstance(packed[0], PackedSequence)
    assert "grad input.data" in str(assert_parity(module, inputs=packed))
    assert assert_parity(module, inputs=torch.randn(2, 6, 3)).ok


def test_a_small_module_draws_no_false_alarm() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        for make in MODULES[:3]:
            module = make(2, 1, dtype=torch.float64 if seed % 2 else torch.float32)
            assert_parity(module, inputs=draw_inputs(module, time=1 + seed % 4, batch=1, seed=seed))


def test_nothing_is_left_changed() -> None:
    module = fusedrnn.LSTM(3, 4, num_layers=2, dropout=0.5)
    before = {name: p.clone() for name, p in module.named_parameters()}
    state = torch.get_rng_state()
    assert_parity(module)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in module.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_poison_fills_and_is_undone() -> None:
    with poison():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(2).isnan().all()
        assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_default_reference_is_torchs_own() -> None:
    module = fusedrnn.LSTM(3, 4)
    twin = stock(module)
    assert type(twin) is nn.LSTM
    assert twin.weight_hh_l0 is not module.weight_hh_l0
    assert torch.equal(twin.weight_hh_l0, module.weight_hh_l0)
    with pytest.raises(
        TypeError, match=r"module: expected a subclass of RNN, .* got Linear; give a reference"
    ):
        stock(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="parametrized"):
        stock(nn.utils.parametrizations.weight_norm(fusedrnn.LSTM(3, 4), "weight_hh_l0"))


def test_a_module_around_one_takes_a_reference() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})

    class Model(nn.Module):
        def __init__(self, parts: nn.ModuleDict, rnn: nn.Module) -> None:
            super().__init__()
            self.rnn, self.head = rnn, parts["head"]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(self.rnn(x)[0])}

    fused = fusedrnn.LSTM(3, 4)
    fused.load_state_dict(plain["rnn"].state_dict())
    result = assert_parity(Model(plain, fused), Model(plain, plain["rnn"]), torch.randn(6, 2, 3))
    assert {"output['logits']", "grad x", "grad rnn.weight_ih_l0", "grad head.bias"} <= {
        row.name for row in result.rows
    }


# ---- planted bugs ------------------------------------------------------------------------------


class WrongGateOrder(nn.LSTM):
    """i and f swapped."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        h = self.hidden_size
        rows = torch.cat([torch.arange(h, 2 * h), torch.arange(h), torch.arange(2 * h, 4 * h)])
        swapped = {name: p[rows] for name, p in self.named_parameters()}
        return torch.func.functional_call(stock(self), swapped, (input, hx))


class Perturbed(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        return output + 1e-4, states


class OneNaN(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        hole = torch.zeros_like(output)
        hole[3, 1, 2] = math.nan
        return output + hole, states


class MissingGradient(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(input.detach(), hx)


class Unwritten(nn.LSTM):
    """Leaves the last row of the buffer as it was allocated."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, states = super().forward(input, hx)
        buffer = torch.empty_like(output)
        buffer[:-1] = output[:-1]
        return buffer, states


class SlightlyWrongGradient(nn.LSTM):
    """Off by 1e-4 of itself, in the weights' gradient only."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        weights = {name: _Scaled.apply(p) for name, p in self.named_parameters()}
        return torch.func.functional_call(stock(self), weights, (input, hx))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 + 1e-4)


class FirstOrderOnly(nn.LSTM):
    """The input's gradient is a constant to a second differentiation."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(_Constant.apply(input), hx)


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach()


class SinglePrecision(nn.LSTM):
    """fp64 computed in fp32."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        weights = {name: p.float() for name, p in self.named_parameters()}
        narrow = (input.float(), tuple(h.float() for h in hx))
        output, states = torch.func.functional_call(stock(self), weights, narrow)
        return output.double(), tuple(s.double() for s in states)


@pytest.mark.parametrize(
    ("bug", "tensor", "options"),
    [
        (WrongGateOrder, "output[0]", {}),
        (Perturbed, "output[0]", {}),
        (OneNaN, "output[0]", {}),
        (MissingGradient, "grad input", {}),
        (Unwritten, "output[0]", {}),
        (SlightlyWrongGradient, "grad weight_ih_l0", {}),
        (FirstOrderOnly, "second input", {"second_order": True}),
    ],
)
def test_planted_bugs_are_caught(bug: type[nn.LSTM], tensor: str, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    module = bug(5, 7)
    result = parity(module, **options)
    assert not result
    assert tensor in [row.name for row in result.failures]
    assert "RED" in str(result)
    with pytest.raises(AssertionError, match=f"{bug.__name__} is not at parity with torch") as caught:
        assert_parity(module, **options)
    assert tensor in str(caught.value)


def test_the_message_says_what_where_and_how_much() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError) as caught:
        assert_parity(OneNaN(5, 7))
    assert "output[0]: nan at index (3, 1, 2), expected " in str(caught.value)
    with pytest.raises(AssertionError) as caught:
        assert_parity(Perturbed(5, 7))
    assert "output[0]: error 0.0001 at index (" in str(caught.value)
    assert "budget " in str(caught.value)


def test_fp64_in_single_precision_is_caught() -> None:
    torch.manual_seed(0)
    assert not parity(SinglePrecision(5, 7, dtype=torch.float64))


def test_enable_does_not_make_kernels_their_own_judge() -> None:
    torch.manual_seed(0)
    with fusedrnn.enable():
        assert not parity(Perturbed(5, 7))


# ---- the pytest plugin -------------------------------------------------------------------------

USER_TEST = """
import fusedrnn
from fusedrnn.backends import select

def test_mine(assert_parity):
    assert select.requested() == "reference"
    assert assert_parity(fusedrnn.GRU(3, 4)).ok
"""


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(USER_TEST)
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedrnn.__file__).parents[1])}
    command = [sys.executable, "-m", "pytest", "-p", "fusedrnn.pytest_plugin", "-q", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_plugin_offers_a_fixture_and_a_backend(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--fusedrnn-backend=reference")
    assert "1 passed" in done.stdout, done.stdout
    assert run_pytest(tmp_path).returncode == 1


def test_the_plugin_refuses_an_unknown_backend(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--fusedrnn-backend=cudnn")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert (
        "--fusedrnn-backend: backend: expected one of native, triton, reference, torch or auto" in done.stderr
    )
