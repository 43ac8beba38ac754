"""A stack that nobody looks on at is one call of csrc/layer.cpp; everything else goes the ordinary way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.testing import assert_parity, draw_inputs

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
from fusedrnn.backends.native import layer

NAMES = ("RNN", "LSTM", "GRU")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture
def asked(monkeypatch):
    """Of every question to C++, whether a derivative was wanted and whether it knew the arguments."""
    answers: list[tuple[bool, bool]] = []
    ask = layer.stack

    def spy(*args):
        result = ask(*args)
        answers.append((args[-1], result is not None))
        return result

    monkeypatch.setattr(layer, "stack", spy)
    return answers


def make(name, dtype=torch.float32, inputs=5, hidden=17, **options):
    torch.manual_seed(hidden)
    return getattr(fusedrnn, name)(inputs, hidden, dtype=dtype, **options)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, dtype, level, asked):
    cases = [
        ({}, 1, 3, 1),
        ({"num_layers": 3}, 5, 17, 3),
        ({"bidirectional": True, "num_layers": 2}, 6, 96, 2),
        ({"bias": False, "batch_first": True}, 33, 40, 5),
    ]
    if name == "LSTM":
        cases.append(({"proj_size": 3, "num_layers": 2}, 4, 8, 2))
        cases.append(({"proj_size": 7, "bidirectional": True}, 8, 20, 3))
    for options, inputs, hidden, batch in cases:
        module = make(name, dtype, inputs, hidden, **options)
        for lengths in (None, [3, 7, 7, 1][:batch]):
            input, hx = draw_inputs(module, time=7, batch=batch, lengths=lengths)
            assert_parity(module, inputs=(input, hx), gradients=False)
            assert_parity(module, inputs=(input,), gradients=False)
    assert asked
    assert all(answer == (False, True) for answer in asked)


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_of_an_input(name, asked):
    for batch_first in (False, True):
        module = make(name, batch_first=batch_first)
        x = torch.randn(6, 4, 9)
        views = [x[..., 2:7], x[::2, 1:, :5], x.transpose(0, 1)[..., :5], x[:, :1, :5]]
        for input in (*views, x[:1, :, :5].expand(6, 4, 5)):
            assert_parity(module, inputs=(input,), gradients=False)
    assert all(known for _, known in asked)
    asked.clear()
    with torch.no_grad():
        across = torch.randn(6, 5, 4).transpose(1, 2)
        assert_parity(module, inputs=(across,), gradients=False)
    assert not any(known for _, known in asked)


@pytest.mark.parametrize("name", NAMES)
def test_training_asks_whether_the_arguments_are_sound(name, asked):
    two = {"num_layers": 2}
    for options in ({}, {**two, "bidirectional": True, "batch_first": True}, {**two, "dropout": 0.5}):
        module = make(name, **options)
        assert_parity(module, inputs=draw_inputs(module)[:1])
        assert_parity(module, inputs=draw_inputs(module))
    assert (True, True) in asked
    assert all(known for _, known in asked)


def test_dropout_draws_what_torch_draws(asked):
    ours, theirs = make("LSTM", num_layers=3, dropout=0.5), nn.LSTM(5, 17, 3, dropout=0.5)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        torch.manual_seed(1)
        expected, after = theirs(x)[0], torch.get_rng_state()
        torch.manual_seed(1)
        torch.testing.assert_close(ours(x)[0], expected)
        assert torch.equal(torch.get_rng_state(), after)
        torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("name", NAMES)
def test_results_have_memory_of_their_own(name):
    module = make(name, num_layers=2)
    x, hx = draw_inputs(module)
    with torch.inference_mode():
        results, before = flat(module(x, hx)), [t.clone() for t in flat(hx)]
        memory = [t.untyped_storage().data_ptr() for t in (*results, *flat(hx), x)]
    assert len(set(memory)) == len(memory)
    assert all(torch.equal(a, b) for a, b in zip(flat(hx), before))
    assert all(t.is_inference() for t in results)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_read_each_time(name):
    module = make(name, num_layers=2)
    x, hx = draw_inputs(module)
    for _ in range(2):
        assert_parity(module, inputs=(x, hx), gradients=False)
        for parameter in module.parameters():
            parameter.data.mul_(0.5)  # moves no version counter


def test_a_weight_that_changes_before_the_backward_spoils_no_later_one():
    module = make("GRU", hidden=33)
    (x, hx), weight = draw_inputs(module), module.weight_hh_l0
    output = module(x, hx)[0]
    weight.data.mul_(2)
    output.sum().backward()
    weight.data.div_(2)
    assert_parity(module, inputs=(x, hx))


@pytest.mark.parametrize("name", NAMES)
def test_what_torch_refuses_it_refuses_in_its_words(name, asked):
    ours, theirs = make(name), getattr(nn, name)(5, 17)
    x, hx = draw_inputs(ours)
    bad_hx = torch.randn(2, 5, 17)
    wrong: list[tuple[Any, ...]] = [
        (x[..., :4], hx), (x.double(), hx), (x[:0], hx), (torch.randn(1, 2, 3, 5),),
        (x, (bad_hx, bad_hx) if name == "LSTM" else bad_hx), (x, bad_hx if name == "LSTM" else (bad_hx,)),
    ]  # fmt: skip
    for args in wrong:
        with torch.no_grad(), pytest.raises(Exception) as theirs_said:  # noqa: PT011
            theirs(*args)
        with torch.no_grad(), pytest.raises(theirs_said.type) as ours_said:
            ours(*args)
        assert str(ours_said.value) == str(theirs_said.value)
    assert not any(known for _, known in asked)


def test_who_looks_on_gets_the_ordinary_way(asked):
    module = make("LSTM")
    x, _ = draw_inputs(module)
    with torch.no_grad():
        torch.func.vmap(lambda x: module(x)[0])(torch.stack([x, x]))
        with fusedrnn.use_backend("reference"):
            module(x)
        torch.jit.trace(module, (x,), check_trace=False)
    assert asked == []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x)[0].dtype is torch.bfloat16
    assert asked == [(False, True)]  # of what autocast has made of them


def test_packed_rows_must_fit(asked):
    module, packed = make("GRU"), pack_padded_sequence(torch.randn(4, 3, 5), torch.tensor([4, 2, 2]))
    broken = packed._replace(batch_sizes=torch.tensor([3, 3, 3, 3]))
    with torch.no_grad():
        module(packed)
        with pytest.raises(RuntimeError):
            module(broken)
    assert [known for _, known in asked] == [True, False]


# ---- the functions of bf16 ---------------------------------------------------------------------

WIDE = torch.cat([torch.logspace(-6, 4, 400), torch.tensor([0.0, torch.inf])])
WIDE = torch.cat([WIDE, -WIDE])


def alone(x: torch.Tensor, name: str) -> torch.Tensor:
    """What the bf16 scan makes of pre-activations: tanh (RNN), or sigmoid as the LSTM's input gate."""
    n = len(x)
    module = getattr(fusedrnn, name)(1, n, bias=True, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        if name == "RNN":
            module.bias_ih_l0.copy_(x)
            return module(torch.zeros(2, 1, 1, dtype=torch.bfloat16))[0][0, 0]
        module.bias_ih_l0[:n] = x
        module.bias_ih_l0[2 * n : 3 * n] = 1e4  # tanh is 1
        module.bias_ih_l0[n : 2 * n] = -1e4  # nothing is kept
        return module(torch.zeros(2, 1, 1, dtype=torch.bfloat16))[1][1][0, 0]


@pytest.mark.parametrize(("name", "function"), [("RNN", torch.tanh), ("LSTM", torch.sigmoid)])
def test_functions_of_bf16(name, function, level):
    x = WIDE.bfloat16()
    ours, exact = alone(x, name).double(), function(x.double())
    assert ours.isfinite().all()
    # a rounding of bf16, and 2^-14 of the value
    assert ((ours - exact).abs() <= exact.abs() * (2**-8 + 2**-14) + 2e-38).all()
    assert alone(torch.tensor([torch.nan, 1.0]).bfloat16(), name)[0].isnan()


# ---- layers beside each other ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16"])
def test_layers_of_a_stack_run_beside_each_other(dtype, threads):
    torch.set_num_threads(threads)
    cases = [("LSTM", 64, 1, 45), ("GRU", 96, 2, 30), ("RNN", 130, 3, 26), ("LSTM", 40, 5, 33)]
    for name, hidden, batch, time in cases:
        for options in ({"num_layers": 2}, {"num_layers": 5}, {"num_layers": 3, "batch_first": True}):
            module = make(name, dtype, 7, hidden, **options)
            assert_parity(module, inputs=draw_inputs(module, time=time, batch=batch), gradients=False)
    module = make("LSTM", dtype, 7, 90, num_layers=3, proj_size=48)
    x, hx = draw_inputs(module, time=40, batch=2)
    assert_parity(module, inputs=(x, hx), gradients=False)
    with torch.no_grad():
        runs = [flat(module(x, hx)) for _ in range(20)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))


def test_stacks_of_many_threads_at_once():
    torch.set_num_threads(2)
    module = make("LSTM", hidden=64, num_layers=3)
    inputs = [torch.randn(60, 1, 5) for _ in range(8)]
    with torch.no_grad():
        expected = [module(x)[0] for x in inputs]

    def work(i):
        with torch.no_grad():
            return all(torch.equal(module(inputs[i])[0], expected[i]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


# ---- a stack that records a derivative -----------------------------------------------------------


@pytest.fixture
def stacks(monkeypatch):
    """How many layers each backward of several layers had."""
    seen: list[int] = []
    run = layer.backward_layers

    def spy(*args):
        seen.append(args[4])
        return run(*args)

    monkeypatch.setattr(layer, "backward_layers", spy)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("hidden", "options"),
    [
        (1, {"num_layers": 2}),
        (17, {"num_layers": 3}),
        (96, {"num_layers": 4, "batch_first": True}),
        (64, {"num_layers": 2, "bias": False}),
    ],
)
def test_training_parity_of_stacks(name, dtype, hidden, options, level, stacks):
    module = make(name, dtype, hidden=hidden, **options)
    for time, batch in ((1, 2), (40, 1), (13, 7)):
        assert_parity(module, inputs=draw_inputs(module, time=time, batch=batch))
    assert set(stacks) == {options["num_layers"]}


@pytest.mark.parametrize("proj", [4, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f64", "bf16"])
def test_training_parity_of_projected_stacks(proj, dtype, stacks):
    module = make("LSTM", dtype, hidden=20, num_layers=3, proj_size=proj)
    assert_parity(module, inputs=draw_inputs(module, time=9, batch=3))
    assert set(stacks) == {3}


@pytest.mark.parametrize("name", NAMES)
def test_some_gradients_of_a_stack(name, stacks):
    ours, theirs = make(name, num_layers=3), getattr(nn, name)(5, 17, 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 2, 5)
    h = torch.randn(3, 2, 17, requires_grad=True)
    hx = (h, torch.randn(3, 2, 17)) if name == "LSTM" else h
    choices = ["weight_hh_l0"], ["bias_ih_l2"], ["bias_hh_l1"], ["weight_ih_l1", "weight_hh_l2"], []
    for wanted in choices:
        found = []
        for module in (ours, theirs):
            parameters = dict(module.named_parameters())
            for key, parameter in parameters.items():
                parameter.requires_grad_(key in wanted)
            output, last = module(x, hx)
            last = last[0] if name == "LSTM" else last
            sources = [h, *(parameters[key] for key in wanted)]
            found.append(torch.autograd.grad((output * last[1, :, :1].sum()).sum(), sources))
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)
    assert stacks == [3] * len(choices)


@pytest.mark.parametrize("name", NAMES)
def test_last_states_alone_have_gradients_too(name, stacks):
    ours, theirs = make(name, torch.float64, num_layers=2), getattr(nn, name)(5, 17, 2, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)
    found = [torch.autograd.grad(flat(m(x)[1])[-1][0].sum(), [x, m.weight_hh_l0]) for m in (ours, theirs)]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    assert stacks == [2]


@pytest.mark.parametrize("name", NAMES)
def test_second_and_third_order_of_a_stack(name):
    module = make(name, torch.float64, inputs=2, hidden=3, num_layers=2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        output, last = torch.func.functional_call(module, dict(zip(parameters, values)), (x,))
        return [output, *flat(last)]

    values = [p.detach().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))

    def third(run):
        y = run(x, *values)[0].square().sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.square().sum()
        return torch.autograd.grad(y, [x, *values])

    theirs = getattr(nn, name)(2, 3, 2, dtype=torch.float64)

    def reference(x, *values):
        output, _ = torch.func.functional_call(theirs, dict(zip(parameters, values)), (x,))
        return [output]

    for a, b in zip(third(run), third(reference)):
        torch.testing.assert_close(a, b)


def test_a_weight_changed_in_place_before_the_backward_is_an_error():
    module = make("LSTM", num_layers=2)
    output, _ = module(torch.randn(4, 2, 5))
    with torch.no_grad():
        module.weight_hh_l1.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_dropout_and_both_ways_go_layer_by_layer(stacks):
    for options in ({"dropout": 0.5}, {"bidirectional": True}):
        module = make("GRU", num_layers=2, **options)
        module(torch.randn(4, 2, 5))[0].sum().backward()
    assert stacks == []


@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("module", [fusedrnn.GRU, fusedrnn.RNN])
def test_a_state_in_a_tuple_is_refused_as_by_torch(module, time):
    x, h = torch.randn(time, 2, 4), torch.zeros(1, 2, 6)
    with torch.no_grad(), pytest.raises(AttributeError):
        module(4, 6)(x, (h,))
