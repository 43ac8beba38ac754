"""What streaming refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.backends import native


@pytest.fixture(params=["kernels", "module"])
def path(request: Any) -> Any:
    """The kernels where there are any, and the module's own forward."""
    with fusedrnn.use_backend("torch" if request.param == "module" else None):
        yield request.param


class Own(nn.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(-input, hx)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((nn.Linear(2, 2),), TypeError, "expected RNN, LSTM, .* got Linear"),
        ((Own(2, 2),), TypeError, "expected LSTM's forward, got Own with its own"),
        ((nn.LSTM(2, 2, bidirectional=True),), ValueError, "bidirectional"),
        ((nn.LSTM(2, 2).double(),), ValueError, "weight_ih_l0 of torch.float64"),
        ((nn.GRUCell(2, 2).bfloat16(),), ValueError, r"weight_ih of torch.bfloat16; use module.float\(\)"),
        (
            (nn.utils.parametrizations.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"),),
            ValueError,
            "parametrization",
        ),
        ((nn.RNNCell(2, 2, nonlinearity="selu"),), ValueError, "nonlinearity tanh or relu, got 'selu'"),
        ((nn.LSTM(2, 2), 0), ValueError, "batch: expected None or an int of at least 1, got 0"),
        ((nn.LSTM(2, 2), True), ValueError, "batch"),
        ((nn.LSTM(2, 2), 1, "int4"), ValueError, "weights: expected one of fp32, bf16, int8, got 'int4'"),
    ],
)
def test_what_cannot_be_streamed(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedrnn.streaming(*args)


def test_weights_that_int8_cannot_hold() -> None:
    module = nn.LSTM(2, 2)
    with torch.no_grad():
        module.weight_hh_l0[1, 1] = torch.nan
    with pytest.raises(ValueError, match="weight_hh_l0 holds, which is not finite"):
        fusedrnn.streaming(module, weights="int8")
    assert fusedrnn.streaming(module, weights="bf16").step(torch.randn(2)).shape == (2,)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(3, 5), RuntimeError, r"x: expected shape \[3, 4\], got \[3, 5\]"),
        (torch.randn(2, 4), RuntimeError, r"x: expected shape \[3, 4\], got \[2, 4\]"),
        (torch.randn(4), RuntimeError, "x: expected shape"),
        (torch.randn(3, 4).double(), ValueError, "x: expected torch.float32, got torch.float64"),
        (torch.randn(3, 4, device="meta"), RuntimeError, "x: expected device cpu, got meta"),
        (torch.randn(3, 4).to_sparse(), RuntimeError, "x: expected a strided tensor, got torch.sparse_coo"),
        ([1.0], TypeError, "x: expected a Tensor, got list"),
        (None, TypeError, "x: expected a Tensor, got NoneType"),
    ],
)
def test_input_that_is_refused(x: Any, error: type[Exception], message: str, path: str) -> None:
    stepper = fusedrnn.streaming(nn.LSTM(4, 5), 3)
    with pytest.raises(error, match=message):
        stepper.step(x)
    assert not stepper.state[0].any()
    stepper.step(torch.randn(3, 4))


def test_other_arguments_that_are_refused(path: str) -> None:
    stepper = fusedrnn.streaming(nn.LSTM(4, 5), 3)
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=r"out: expected shape \[3, 5\], got \[5\]"):
        stepper.step(x, torch.empty(5))
    with pytest.raises(ValueError, match=r"mask: expected torch\.bool, got torch\.int64"):
        stepper.reset(torch.tensor([1, 0, 1]))
    with pytest.raises(RuntimeError, match=r"mask: expected shape \[3\]"):
        stepper.reset(torch.tensor([True]))
    with pytest.raises(TypeError, match=r"state: expected \(h, c\), got 1"):
        stepper.state = torch.zeros(1, 3, 5)
    with pytest.raises(RuntimeError, match=r"state c: expected shape \[1, 3, 5\], got \[3, 5\]"):
        stepper.state = (torch.zeros(1, 3, 5), torch.zeros(3, 5))
    assert not stepper.state[0].any()


def test_parameters_that_changed_their_dtype(path: str) -> None:
    module = nn.LSTM(4, 5)
    stepper = fusedrnn.streaming(module)
    module.double()
    with pytest.raises(ValueError, match="expected fp32 parameters"):
        stepper.step(torch.randn(4))
    module.float()
    stepper.step(torch.randn(4))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_vmap_is_refused() -> None:
    stepper = fusedrnn.streaming(nn.GRUCell(4, 5))
    with pytest.raises(RuntimeError, match="x: expected a tensor with memory of its own"):
        torch.vmap(stepper.step)(torch.randn(3, 4))


def test_parameters_that_changed_their_shape(path: str) -> None:
    module = nn.LSTM(4, 5)
    stepper = fusedrnn.streaming(module)
    module.weight_ih_l0 = nn.Parameter(torch.randn(20, 3))
    with pytest.raises(ValueError, match=r"weight_ih_l0 .* shape \[20, 4\], got .* \[20, 3\]"):
        stepper.step(torch.randn(4))


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda: torch.zeros(4, requires_grad=True), "a leaf that requires grad"),
        (lambda: inference_tensor(4), "one made in inference mode"),
        (lambda: torch.zeros(1).expand(4), "an expanded one"),
    ],
)
def test_an_out_that_cannot_be_written_costs_no_step(out: Any, message: str, path: str) -> None:
    stepper, x = fusedrnn.streaming(nn.GRU(3, 4)), torch.randn(3)
    before = stepper.state
    with pytest.raises(RuntimeError, match=f"out: expected a tensor to write to, got {message}"):
        stepper.step(x, out())
    assert torch.equal(stepper.state, before)


def inference_tensor(size: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(size)
