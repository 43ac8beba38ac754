"""What autograd keeps between forward and backward: hooks of saved tensors, and writes into outputs."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fusedrnn

LAYERS = {
    "rnn": (fusedrnn.RNN, nn.RNN, {}),
    "gru": (fusedrnn.GRU, nn.GRU, {}),
    "lstm": (fusedrnn.LSTM, nn.LSTM, {}),
    "proj": (fusedrnn.LSTM, nn.LSTM, {"proj_size": 3}),
    "stack": (fusedrnn.GRU, nn.GRU, {"num_layers": 3}),
    "both ways": (fusedrnn.LSTM, nn.LSTM, {"bidirectional": True, "num_layers": 2}),
}


def pair(kind, **more):
    """Ours and torch's, with the same parameters."""
    ours, theirs, options = LAYERS[kind]
    ours, theirs = ours(4, 6, **options, **more), theirs(4, 6, **options, **more)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(module, x, edit=lambda output: output):
    x = x.clone().requires_grad_()
    edit(module(x)[0]).sin().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


def turned(t):
    """The same values in another order of memory."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_that_change_how_tensors_lie(kind):
    ours, theirs = pair(kind)
    x = torch.randn(5, 3, 4)
    with saved_tensors_hooks(lambda t: t, turned):
        found = gradients(ours, x)
    for a, b in zip(found, gradients(theirs, x)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "change",
    [lambda t: t.double() if t.dim() == 3 else t, lambda t: t.double() if t.dim() == 2 else t],
)
def test_hooks_that_change_dtypes(kind, change):
    ours, _ = pair(kind)
    with saved_tensors_hooks(lambda t: t, change), pytest.raises(RuntimeError):
        gradients(ours, torch.randn(5, 3, 4))


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_that_change_shapes(kind):
    ours, _ = pair(kind)
    with saved_tensors_hooks(lambda t: t, lambda t: t[..., :1]), pytest.raises(RuntimeError):
        gradients(ours, torch.randn(5, 3, 4))


@pytest.mark.parametrize("change", [turned, torch.Tensor.half, lambda t: t[..., :1]])
def test_hooks_of_attention(change):
    query, key, value = (torch.randn(2, 1, 3, 4, requires_grad=True) for _ in range(3))

    def run():
        context, weights = fusedrnn.attend("dot", query, key, value, need_weights=True)
        return torch.autograd.grad(context.sin().sum() + weights.cos().sum(), (query, key, value))

    expected = run()
    with saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.is_floating_point() else t):
        if change is not turned:
            with pytest.raises(RuntimeError):
                run()
            return
        found = run()
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)
