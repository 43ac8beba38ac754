"""Streaming: a loop of steps is the module run over the sequence; state, weights, threads, errors."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import stored
from fusedrnn.backends import native, select
from fusedrnn.budget import check

NATIVE = native.unavailable() is None
LEVELS = native._C.isa_levels() if NATIVE else []
needs_native = pytest.mark.skipif(not NATIVE, reason=str(native.unavailable()))
WEIGHTS = ["fp32", "bf16", "int8"]


MAKERS: dict[str, Any] = {
    "RNN": lambda i, h: nn.RNN(i, h),
    "RNN relu": lambda i, h: nn.RNN(i, h, nonlinearity="relu", bias=False),
    "LSTM": lambda i, h: fusedrnn.LSTM(i, h),
    "LSTM proj": lambda i, h: nn.LSTM(i, h + 1, 2, proj_size=(h + 1) // 2),
    "GRU": lambda i, h: fusedrnn.GRU(i, h, 3, dropout=0.5, batch_first=True),
    "RNNCell": lambda i, h: fusedrnn.RNNCell(i, h),
    "RNNCell relu": lambda i, h: nn.RNNCell(i, h, nonlinearity="relu"),
    "LSTMCell": lambda i, h: nn.LSTMCell(i, h),
    "GRUCell": lambda i, h: fusedrnn.GRUCell(i, h, bias=False),
}
SIZES = [(1, 1, 33), (5, 17, 1), (300, 96, 3), (5, 200, 33), (3, 200, None)]  # I, H, B


def make(kind: str, inputs: int, hidden: int) -> nn.Module:
    torch.manual_seed(inputs * 1000 + hidden)
    return MAKERS[kind](inputs, hidden)


def twin(module: nn.Module, weights: str, dtype: torch.dtype) -> nn.Module:
    """The module in eval mode, with the weights that a stepper computes with."""
    found = copy.deepcopy(module).eval()
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(stored.rounded(p, weights))
    return found.to(dtype)


def flat(state: Any) -> dict[str, Tensor]:
    return dict(zip(("h", "c"), state if isinstance(state, tuple) else (state,)))


def run(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Torch's own path over x [T, B, I] or [T, I]: outputs and last states."""
    with fusedrnn.use_backend("torch"), torch.no_grad():
        if isinstance(module, nn.RNNCellBase):
            outputs, hx = [], None
            for frame in x:
                hx = module(frame, hx)
                outputs.append(flat(hx)["h"])
            return {"output": torch.stack(outputs), **flat(hx)}
        turned = module.batch_first and x.dim() == 3
        output, hx = module(x.transpose(0, 1) if turned else x)
        return {"output": output.transpose(0, 1) if turned else output, **flat(hx)}


def steps(stepper: Any, x: Tensor) -> dict[str, Tensor]:
    outputs = torch.stack([stepper.step(frame).clone() for frame in x])
    return {"output": outputs, **flat(stepper.state)}


def assert_steps(module: nn.Module, batch: int | None, weights: str = "fp32", time: int = 5) -> None:
    lead = () if batch is None else (batch,)
    x = torch.randn(time, *lead, module.input_size)
    ours = steps(fusedrnn.streaming(module, batch, weights), x)
    exact = twin(module, weights, torch.float64)
    result = check(ours, run(twin(module, weights, torch.float32), x), lambda: run(exact, x.double()))
    assert result.ok, f"\n{result}"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_steps_are_the_sequence(kind: str, weights: str, path: str) -> None:
    for inputs, hidden, batch in SIZES:
        assert_steps(make(kind, inputs, hidden), batch, weights)


@needs_native
@pytest.mark.parametrize("weights", WEIGHTS)
def test_large_steps_share_threads(weights: str) -> None:
    torch.set_num_threads(3)
    for kind, batch in [("LSTM proj", None), ("GRU", 4), ("RNN", 1)]:
        assert_steps(make(kind, 700, 389), batch, weights)


@needs_native
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-5, 1.0, 1e30])
def test_inputs_of_any_size(size: float, batch: int | None) -> None:
    module, weights = nn.GRU(37, 50), "int8"
    lead = () if batch is None else (batch,)
    x = torch.rand(3, *lead, 37) * size
    result = check(
        steps(fusedrnn.streaming(module, batch, weights), x),
        run(twin(module, weights, torch.float32), x),
        lambda: run(twin(module, weights, torch.float64), x.double()),
    )
    assert result.ok, f"\n{result}"


@needs_native
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_inputs_that_are_no_numbers_stay_in_their_row(value: float, weights: str) -> None:
    module = nn.RNN(37, 50)
    x = torch.randn(3, 37)
    x[1, 5] = value
    stepper, clean = (fusedrnn.streaming(module, 3, weights) for _ in range(2))
    output, expected = stepper.step(x), clean.step(x.nan_to_num(0, 0))
    assert torch.equal(output[::2], expected[::2])
    exact = run(twin(module, weights, torch.float64), x[None].double())["output"][0, 1]
    assert torch.equal(output[1].isnan(), exact.isnan())
    if value == torch.inf:
        torch.testing.assert_close(output[1].double(), exact, rtol=0, atol=1e-6)


def test_the_output_is_one_buffer(path: str) -> None:
    stepper = fusedrnn.streaming(nn.GRU(3, 4), 2)
    x = torch.randn(2, 3)
    first = stepper.step(x)
    kept = first.clone()
    assert stepper.step(x) is first
    assert not torch.equal(first, kept)
    out = torch.full((2, 4), torch.nan)
    assert stepper.step(x, out) is out
    assert torch.equal(out, first)
    assert stepper.step(x, out=torch.empty(4, 2).t()).tolist() == first.tolist()


@needs_native
def test_no_step_allocates() -> None:
    module, x = nn.LSTM(8, 300, 2), torch.randn(4, 8)
    stepper = fusedrnn.streaming(module, 4)
    stepper.step(x)
    with torch.profiler.profile(profile_memory=True) as profile:
        for _ in range(3):
            stepper.step(x)
    assert [event.key for event in profile.key_averages() if event.self_cpu_memory_usage] == []


def test_autograd_notices_an_overwritten_output() -> None:
    stepper, head = fusedrnn.streaming(nn.RNNCell(3, 4)), nn.Linear(4, 1)
    loss = head(stepper.step(torch.randn(3))).sum()
    stepper.step(torch.randn(3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_gradient_is_recorded(context: Any, path: str) -> None:
    module = nn.LSTM(3, 4)
    with context():
        stepper = fusedrnn.streaming(module, 2)
        y = stepper.step(torch.randn(2, 3, requires_grad=context is torch.enable_grad))
        assert not y.requires_grad
        assert not any(s.requires_grad for s in stepper.state)
    stepper.reset(torch.tensor([True, False]))
    stepper.state = stepper.state
    assert not stepper.step(nn.Parameter(torch.randn(2, 3))).requires_grad


def test_input_of_any_strides(path: str) -> None:
    module = nn.GRU(5, 17)
    x = torch.randn(3, 5)
    want = fusedrnn.streaming(module, 3).step(x).clone()
    wide = torch.randn(3, 11)
    wide[:, 1::2] = x
    for other in (x.t().contiguous().t(), wide[:, 1::2]):
        assert not other.is_contiguous()
        torch.testing.assert_close(fusedrnn.streaming(module, 3).step(other), want)
    row = fusedrnn.streaming(module, 3).step(x[:1].expand(3, 5))
    torch.testing.assert_close(row[0], row[2])
    negative = torch._neg_view(-x)
    assert negative.is_neg()
    torch.testing.assert_close(fusedrnn.streaming(module, 3).step(negative), want)


def test_a_step_may_read_its_own_output(path: str) -> None:
    module = nn.LSTMCell(6, 6)
    stepper, other = fusedrnn.streaming(module, 2), fusedrnn.streaming(module, 2)
    y = stepper.step(torch.ones(2, 6))
    want = other.step(other.step(torch.ones(2, 6)).clone())
    assert torch.equal(stepper.step(y), want)


# ---- state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("kind", MAKERS)
def test_state_is_the_modules_hx(kind: str, batch: int | None, path: str) -> None:
    module = make(kind, 5, 17).eval()
    lead = () if batch is None else (batch,)
    x = torch.randn(4, *lead, 5)
    stepper = fusedrnn.streaming(module, batch)
    assert all(not s.any() for s in flat(stepper.state).values())
    first = steps(stepper, x)
    hx = stepper.state
    assert {k: v.shape for k, v in flat(hx).items()} == {
        k: v.shape for k, v in run(module, x).items() if k in "hc"
    }

    # from the stepper into the module, which goes on
    frame = torch.randn(*lead, 5)
    with torch.no_grad():
        if isinstance(module, nn.RNNCellBase):
            want = flat(module(frame, hx))["h"]
        else:
            as_sequence = frame.unsqueeze(1 if module.batch_first and batch else 0)
            want = module(as_sequence, hx)[0].squeeze(1 if module.batch_first and batch else 0)
    torch.testing.assert_close(stepper.step(frame).clone(), want)
    # and into another stepper
    other = fusedrnn.streaming(module, batch)
    other.state = hx
    assert torch.equal(other.step(frame), stepper.step.__self__._output)
    assert torch.equal(flat(hx)["h"], first["h"]), "state is a copy"


def test_reset(path: str) -> None:
    module = nn.LSTM(3, 4, 2)
    stepper = fusedrnn.streaming(module, 3)
    stepper.state = tuple(torch.full((2, 3, 4), torch.inf) for _ in range(2))
    stepper.reset(torch.tensor([True, False, True]))
    for state in stepper.state:
        assert (state[:, ::2] == 0).all()
        assert state[:, 1].isinf().all()
    stepper.reset()
    x = torch.randn(3, 3)
    assert torch.equal(stepper.step(x), fusedrnn.streaming(module, 3).step(x))

    alone = fusedrnn.streaming(module)
    alone.step(x[0])
    alone.reset(torch.tensor(False))
    assert alone.state[0].any()
    alone.reset(torch.tensor(True))
    assert not alone.state[0].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_goes_on_alone(copied: Any, path: str) -> None:
    stepper = fusedrnn.streaming(nn.LSTM(3, 4), 2, "bf16")
    x = torch.randn(2, 3)
    stepper.step(x)
    other = copied(stepper)
    assert torch.equal(other.step(x), stepper.step(x))
    stepper.reset()
    assert not torch.equal(other.step(x), stepper.step(x))


# ---- threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [16, 400])
def test_threads_with_a_stepper_each(hidden: int) -> None:
    """Small steps keep the GIL, large ones let it go."""
    module = nn.LSTM(6, hidden)
    x = torch.randn(8, 20, 6)
    want = [steps(fusedrnn.streaming(module), one)["output"] for one in x]
    start = threading.Barrier(8)

    def one(i: int) -> Tensor:
        torch.set_num_threads(1)
        stepper = fusedrnn.streaming(module)
        start.wait()
        return steps(stepper, x[i])["output"]

    with ThreadPoolExecutor(8) as pool:
        for got, expected in zip(pool.map(one, range(8)), want):
            assert torch.equal(got, expected)


class Named(nn.LSTM):
    pass


def test_a_subclass_with_torchs_forward() -> None:
    assert_steps(Named(3, 4), 2)


# ---- without kernels ---------------------------------------------------------------------------


def test_without_kernels_it_says_so_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_why_not", "no kernels today", raising=False)
    select.no_kernel.cache_clear()
    select.say_once.cache_clear()
    try:
        with pytest.warns(UserWarning, match="streaming runs the module's own forward, .*no kernels today"):
            assert_steps(nn.LSTM(3, 4), 2, "int8")
    finally:
        select.no_kernel.cache_clear()


def test_a_backend_by_name() -> None:
    with fusedrnn.use_backend("reference"):
        assert_steps(nn.LSTM(3, 4), 2)
    if NATIVE:
        with fusedrnn.use_backend("native"):
            assert fusedrnn.streaming(nn.LSTM(3, 4))._pack is not None
