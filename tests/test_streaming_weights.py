"""Streaming: a change of the parameters is noticed, and what is kept of them."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fusedrnn
from fusedrnn import stored
from fusedrnn.backends import native

NATIVE = native.unavailable() is None
LEVELS = native._C.isa_levels() if NATIVE else []
needs_native = pytest.mark.skipif(not NATIVE, reason=str(native.unavailable()))
WEIGHTS = ["fp32", "bf16", "int8"]


def nudge(module: nn.Module, kind: Any = torch.optim.SGD, **options: Any) -> None:
    x = torch.randn(2, 3)
    optimizer = kind(module.parameters(), 1.0, **options)
    module(x)[0].sum().backward()
    optimizer.step()


CHANGES: dict[str, Any] = {
    "optimizer": nudge,
    "fused SGD": lambda m: nudge(m, fused=True),
    "fused Adam": lambda m: nudge(m, torch.optim.Adam, fused=True),
    "load_state_dict": lambda m: m.load_state_dict(nn.LSTM(3, 4).state_dict()),
    "assigned": lambda m: m.load_state_dict(nn.LSTM(3, 4).state_dict(), assign=True),
    "new parameter": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.randn(16, 4))),
    "new bias": lambda m: setattr(m, "bias_hh_l0", nn.Parameter(torch.randn(16))),
    "other memory": lambda m: setattr(m.weight_ih_l0, "data", torch.randn(16, 3)),
    "in place": lambda m: nn.init.orthogonal_(m.weight_ih_l0),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_parameter_is_noticed(change: str, weights: str, path: str) -> None:
    module = nn.LSTM(3, 4)
    steppers = [fusedrnn.streaming(module, 2, weights) for _ in range(2)]
    x = torch.randn(2, 3)
    before = steppers[0].step(x).clone()
    steppers[1].step(x)
    state = steppers[0].state
    CHANGES[change](module)
    for stepper in steppers:
        stepper.state = state
        fresh = fusedrnn.streaming(module, 2, weights)
        fresh.state = state
        got = stepper.step(x)
        assert torch.equal(got, fresh.step(x))
        assert not torch.equal(got, before)


def test_refresh_after_a_write_through_data(path: str) -> None:
    module = nn.LSTM(3, 4)
    steppers = [fusedrnn.streaming(module, 2) for _ in range(2)]
    x = torch.randn(2, 3)
    for stepper in steppers:
        stepper.step(x)
        stepper.reset()
    module.weight_ih_l0.data.zero_()
    steppers[0].refresh()
    want = fusedrnn.streaming(module, 2).step(x)
    for stepper in steppers:
        assert torch.equal(stepper.step(x), want)


def test_refresh_reaches_every_stepper_and_storage() -> None:
    module, x = nn.GRU(3, 4), torch.randn(3)
    steppers = [fusedrnn.streaming(module, None, weights) for weights in ("fp32", "fp32", "bf16")]
    for caller in steppers:
        module.weight_ih_l0.data.normal_()
        caller.refresh()
        for stepper in steppers:
            stepper.reset()
            fresh = fusedrnn.streaming(copy.deepcopy(module), None, stepper._weights)
            assert torch.equal(stepper.step(x), fresh.step(x))


@needs_native
def test_a_parameter_that_was_away_when_it_changed() -> None:
    module, x = nn.GRU(3, 4), torch.randn(2, 3)
    old, other = module.weight_ih_l0, nn.Parameter(torch.randn(12, 3))
    stepper, watcher = fusedrnn.streaming(module, 2), fusedrnn.streaming(module, 2)
    module.weight_ih_l0 = other
    watcher.step(x)
    module.weight_ih_l0 = old
    nudge(module, fused=True)
    assert torch.equal(stepper.step(x), fusedrnn.streaming(copy.deepcopy(module), 2).step(x))


@needs_native
def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        module = nn.GRUCell(3, 4)
        stepper = fusedrnn.streaming(module)
        stepper.step(torch.randn(3))
    x = torch.randn(3)

    def assert_follows() -> None:
        stepper.reset()
        torch.testing.assert_close(stepper.step(x)[None], twin_cell(module)(x[None]))

    assert_follows()
    with torch.inference_mode():
        module.weight_hh.mul_(2)
        module.bias_ih.add_(1)
    assert_follows()
    module.weight_ih = nn.Parameter(torch.randn(12, 3))
    assert_follows()


def twin_cell(module: nn.Module) -> Any:
    found = nn.GRUCell(3, 4)
    found.load_state_dict(module.state_dict())
    return found.requires_grad_(False)


@needs_native
def test_steppers_share_one_pack_which_dies_with_them() -> None:
    module = nn.LSTM(3, 4)
    steppers = [fusedrnn.streaming(module, b) for b in (None, 1, 7)]
    assert len({id(s._pack) for s in steppers}) == 1
    steppers.append(fusedrnn.streaming(module, weights="int8"))
    assert steppers[-1]._pack is not steppers[0]._pack
    assert len(stored._packs[module]) == 2
    alive = weakref.ref(module)
    del module, steppers
    gc.collect()
    assert alive() is None


@needs_native
def test_a_stepper_keeps_its_level() -> None:
    module, x = nn.LSTM(5, 40), torch.randn(3, 5)
    for first in LEVELS:
        native._C.set_isa(first)
        stepper = fusedrnn.streaming(module, 3)
        for then in LEVELS:
            native._C.set_isa(then)
            stepper.reset()
            torch.testing.assert_close(stepper.step(x), fusedrnn.streaming(module, 3).step(x))
    native._C.set_isa("")


@needs_native
def test_a_parameter_that_refers_to_its_module_keeps_nothing_alive() -> None:
    module = nn.GRU(3, 4)
    module.weight_ih_l0.owner = module
    fusedrnn.streaming(module).step(torch.randn(3))
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


@needs_native
def test_torchs_defaults_do_not_matter() -> None:
    module, x = nn.LSTM(3, 4, 2, bias=False), torch.randn(3)
    want = fusedrnn.streaming(module).step(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fusedrnn.streaming(module).step(x), want)
    finally:
        torch.set_default_dtype(torch.float32)
    stepper = fusedrnn.streaming(module)
    with torch.device("meta"):
        assert torch.equal(fusedrnn.streaming(module).step(x), want)
        module.weight_ih_l0.data = module.weight_ih_l0.detach().clone()  # read again, here
        assert torch.equal(stepper.step(x), want)


@needs_native
def test_tensors_without_memory_are_refused() -> None:
    module = nn.GRU(3, 4)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="FakeTensor"):
        fusedrnn.streaming(module)


def test_steps_while_the_parameters_change() -> None:
    """Each step is one of the parameters before or after a change, and none is an error."""
    module, x = nn.GRU(8, 64), torch.randn(8)
    stepper = fusedrnn.streaming(module)
    end = threading.Event()

    def train() -> None:
        with torch.no_grad():
            while not end.is_set():
                module.weight_hh_l0.mul_(1)

    other = threading.Thread(target=train)
    other.start()
    try:
        want = fusedrnn.streaming(copy.deepcopy(module)).step(x)
        for _ in range(300):
            stepper.reset()
            assert torch.equal(stepper.step(x), want)
    finally:
        end.set()
        other.join()


@needs_native
def test_rows_of_subnormal_weights() -> None:
    module = nn.RNN(2, 3, bias=False)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.tensor([190.0, 30]) * 2.0**-149)
    x = torch.tensor([3e38, 0])
    assert (fusedrnn.streaming(module, None, "int8").step(x) >= 0).all()
