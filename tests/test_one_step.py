"""A single step that nobody looks on at goes to csrc/one_step.cpp; everything else the ordinary way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fusedrnn
from fusedrnn import _C
from fusedrnn.backends.native import layer
from fusedrnn.budget import check

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


@pytest.fixture(params=_C.isa_levels())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def made(monkeypatch):
    """For every question to the kernel, whether it had an answer."""
    answers = []
    ask = layer.one_step

    def spy(*args):
        result = ask(*args)
        answers.append(result is not None)
        return result

    monkeypatch.setattr(layer, "one_step", spy)
    return answers


def make(name, inputs=5, hidden=17, **options):
    torch.manual_seed(hidden)
    return getattr(fusedrnn, name)(inputs, hidden, **options)


def draw(module, *lead):
    """An input and states for a cell [*lead], for a layer [1, *lead]."""
    lead = lead if isinstance(module, torch.nn.RNNCellBase) else (1, *lead)
    states = [torch.randn(*lead, module.hidden_size) for _ in range(1 + ("LSTM" in type(module).__name__))]
    return torch.randn(*lead, module.input_size), tuple(states) if len(states) == 2 else states[0]


def flat(result):
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def stock(module, dtype=torch.float32):
    """torch's own module of the same weights."""
    names = ("input_size", "hidden_size", "bias", "nonlinearity", "batch_first")
    options = {name: getattr(module, name) for name in names if hasattr(module, name)}
    theirs = getattr(torch.nn, type(module).__name__)(**options)
    theirs.load_state_dict(module.state_dict())
    return theirs.to(dtype)


def in_dtype(value, dtype):
    return value.to(dtype) if isinstance(value, Tensor) else tuple(v.to(dtype) for v in value)


def assert_right(module, x, hx):
    with torch.no_grad():
        ours, theirs = flat(module(x, hx)), flat(stock(module)(x, hx))
        exact = flat(stock(module, torch.float64)(x.double(), in_dtype(hx, torch.float64)))
    named = [{str(i): t for i, t in enumerate(each)} for each in (ours, theirs, exact)]
    result = check(named[0], named[1], lambda: named[2])
    assert result.ok, str(result)


@pytest.mark.parametrize("name", NAMES)
def test_parity(name, isa, made):
    for hidden, inputs, batch in ((1, 3, 2), (17, 5, 1), (96, 40, 3), (200, 7, 4)):
        for options in ({}, {"bias": False}, *([{"nonlinearity": "relu"}] if name.startswith("RNN") else [])):
            module = make(name, inputs, hidden, **options)
            assert_right(module, *draw(module, batch))
    assert made
    assert all(made)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout(name, made):
    """No batch, batch_first, rows apart; and what the kernel does not know is right all the same."""
    module = make(name)
    x, hx = draw(module, 3)
    assert_right(module, *draw(module)) if name.endswith("Cell") else None
    apart = torch.randn(*x.shape[:-1], 9)[..., :5]
    assert_right(module, apart, hx)
    if not name.endswith("Cell"):
        first = make(name, batch_first=True)
        assert_right(first, x.transpose(0, 1).contiguous(), hx)
    assert all(made)
    made.clear()
    across = torch.randn(*x.shape[:-2], 5, 3).transpose(-1, -2)
    assert_right(module, across, hx)
    assert_right(module, torch._neg_view(x), hx)
    assert made
    assert not any(made)


@pytest.mark.parametrize("name", NAMES)
def test_results_have_memory_of_their_own(name):
    module = make(name)
    x, hx = draw(module, 2)
    with torch.inference_mode():
        results = flat(module(x, hx))
        before = [t.clone() for t in flat(hx)]
        memory = [t.untyped_storage().data_ptr() for t in (*results, *flat(hx), x)]
    assert len(set(memory)) == len(memory)
    assert all(torch.equal(a, b) for a, b in zip(flat(hx), before))


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_each_time(name, made):
    module = make(name)
    x, hx = draw(module, 2)
    assert_right(module, x, hx)
    for parameter in module.parameters():
        parameter.data.mul_(0.5)  # moves no version counter
    assert_right(module, x, hx)
    assert made == [True] * 2


@pytest.mark.parametrize("name", NAMES)
def test_who_looks_on_gets_the_ordinary_way(name, made):
    module = make(name)
    x, hx = draw(module, 2)
    flat(module(x, hx))[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        flat(torch.func.vmap(lambda x: module(x, hx))(torch.stack([x, x])))
        with fusedrnn.use_backend("reference"):
            module(x, hx)
        module.double()(x.double(), in_dtype(hx, torch.float64))
    assert not any(made)


def test_only_a_step_of_one_layer(made):
    for name, options, x in (
        ("LSTM", {"num_layers": 2}, torch.randn(1, 2, 5)),
        ("LSTM", {"bidirectional": True}, torch.randn(1, 2, 5)),
        ("LSTM", {"proj_size": 3}, torch.randn(1, 2, 5)),
        ("GRU", {}, torch.randn(2, 2, 5)),
    ):
        with torch.no_grad():
            make(name, **options)(x)
    assert not any(made)


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_torchs(name):
    module = make(name)
    x, hx = draw(module, 2)
    wrong = draw(module, 3)[1]
    with torch.no_grad():
        for args in ((x, wrong), (x[..., :4], hx), (x.double(), hx), (x.long(), hx)):
            with pytest.raises((RuntimeError, ValueError)) as expected:
                stock(module)(*args)
            with pytest.raises(expected.type) as got:
                module(*args)
            assert str(got.value) == str(expected.value)


def test_many_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    module = make("LSTMCell", 128, 256)
    x, hx = draw(module, 1)
    with torch.no_grad():
        expected = module(x, hx)

    def run(_):
        with torch.no_grad():
            return all(torch.equal(a, b) for a, b in zip(module(x, hx), expected))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(200)))
