"""Projections by our own products: parity, derivatives of every order, and who gets torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedrnn
from fusedrnn import linear as projections
from fusedrnn.backends import hand_over, native
from fusedrnn.budget import check

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
from fusedrnn.backends.native import linear as kernels

# R, I, O
SIZES = [(1, 1, 1), (3, 33, 7), (17, 5, 200), (300, 96, 33), (700, 64, 48), (64, 300, 16), (20, 2100, 20)]


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """Of every question to the kernels, whether they knew the arguments; asked for any size, on any CPU."""
    answers = []

    def spied(ask):
        def spy(*args):
            made = ask(*args)
            answers.append(made is not None)
            return made

        return spy

    monkeypatch.setattr(hand_over, "linear_reason", lambda *_: None)
    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, spied(getattr(kernels, name)))
    return answers


def draw(rows, inputs, outputs, lead=()):
    torch.manual_seed(rows + inputs)
    x, weight = torch.randn(*lead, rows, inputs), torch.randn(outputs, inputs) / inputs**0.5
    return [t.requires_grad_() for t in (x, weight, torch.randn(outputs))], torch.randn(*lead, rows, outputs)


def results(function, tensors, grad, dtype=torch.float32):
    tensors = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*tensors)
    grads = torch.autograd.grad(out, tensors, grad.to(dtype))
    return {"out": out, **{f"grad {i}": g for i, g in enumerate(grads)}}


@pytest.mark.parametrize("threads", [1, 2])
def test_parity(level, threads, ours, poisoned):
    torch.set_num_threads(threads)
    for sizes in SIZES:
        for bias in (True, False):
            tensors, grad = draw(*sizes)
            tensors = tensors if bias else tensors[:2]
            found = results(projections.linear, tensors, grad)
            theirs = results(F.linear, tensors, grad)
            result = check(found, theirs, lambda: results(F.linear, tensors, grad, torch.float64))  # noqa: B023
            assert result.ok, f"{sizes} {result}"
            with torch.no_grad():
                assert torch.equal(projections.linear(*tensors), found["out"])
    assert all(ours)
    assert ours


def test_gradients_that_nobody_needs(ours):
    (x, w, b), grad = draw(40, 30, 20, lead=(2,))
    every = torch.autograd.grad(projections.linear(x, w, b), [x, w, b], grad)
    for i, wanted in enumerate((x, w, b)):
        args = [t if t is wanted else t.detach() for t in (x, w, b)]
        (found,) = torch.autograd.grad(projections.linear(*args), [wanted], grad)
        assert torch.equal(found, every[i])
    assert all(ours)


def test_second_order():
    (x, w, b), grad = draw(9, 8, 7)

    def second(function):
        first = torch.autograd.grad(function(x, w, b), [x, w], grad, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x, w])

    for a, b_ in zip(second(projections.linear), second(F.linear)):
        torch.testing.assert_close(a, b_)


def test_a_weight_is_read_each_time():
    layer, x = nn.Linear(30, 20), torch.randn(50, 30)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(projections.projected(layer, x), F.linear(x, layer.weight, layer.bias))
            layer.weight.data.mul_(0.5)
    out = projections.projected(layer, x)
    layer.weight.data.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(out, F.linear(x, layer.weight / 2, layer.bias))


def test_what_they_do_not_know_is_right_all_the_same(ours):
    (x, w, b), _ = draw(40, 30, 20)
    with torch.no_grad():
        negated = torch._neg_view(x.detach())
        odd = [(x[:, ::2], w[:, ::2], b), (x, torch.randn(30, 20).T, b), (negated, w, b), (x[:0], w, b)]
        for args in odd:
            torch.testing.assert_close(projections.linear(*args), F.linear(*args))
    assert not any(ours)
    ours.clear()
    with torch.no_grad():
        with fusedrnn.use_backend("reference"):
            projections.linear(x, w, b)
        with torch.autocast("cpu", torch.bfloat16):
            assert projections.linear(x, w, b).dtype is torch.bfloat16
        torch.func.vmap(lambda row: projections.linear(row, w, b))(x)
    torch.func.jvp(lambda x: projections.linear(x, w, b), (x,), (x,))
    assert ours == []
    for args in ((x[:, :3], w, b), (x.double(), w, b), (x, w, b[:3])):
        with pytest.raises(RuntimeError) as theirs:
            F.linear(*args)
        with pytest.raises(RuntimeError) as said:
            projections.linear(*args)
        assert str(said.value) == str(theirs.value)


def test_a_layer_that_does_more_is_called():
    layer, x = nn.Linear(30, 20), torch.randn(50, 30)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    projections.projected(layer, x)
    assert seen == [1]
    nn.utils.parametrizations.weight_norm(layer)
    assert not projections.is_plain(layer)


def test_where_torch_is_faster(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(hand_over, "_mkl_is_slower", lambda: True)
    assert hand_over.linear_reason(torch.float32, 1 << 22) is None
    assert "small" in hand_over.linear_reason(torch.float32, 1 << 10)
    assert "float32" in hand_over.linear_reason(torch.float64, 1 << 22)
    monkeypatch.setattr(hand_over, "_mkl_is_slower", lambda: False)
    assert "not measured" in hand_over.linear_reason(torch.float32, 1 << 22)
