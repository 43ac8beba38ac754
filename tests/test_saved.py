"""What autograd keeps between forward and backward: hooks of saved tensors, and writes into outputs."""

import pytest
import torch
import torch.utils.checkpoint
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


# ---- writes into outputs -----------------------------------------------------------------------


def add(output):
    output += 1
    return output


def clear(output):
    output[:, 0] = 0
    return output


def behind_a_view(output):
    output.detach()[0].mul_(2)
    return output


EDITS = [add, clear, behind_a_view, torch.relu_]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["", "batch_first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_writes_into_the_output(kind, options, edit):
    """Torch's own LSTM of one direction refuses them; what it would answer is that of a copy."""
    ours, theirs = pair(kind, **options)
    x = torch.randn(5, 3, 4)
    expected = gradients(theirs, x, lambda output: edit(output.clone()))
    for a, b in zip(gradients(ours, x, edit), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("edit", EDITS)
def test_writes_into_the_output_with_a_graph_of_the_backward(edit):
    ours, theirs = (module.double() for module in pair("gru"))
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def second(module, copy):
        output = module(x)[0]
        output = edit(output.clone() if copy else output)
        (first,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *module.parameters()])

    for a, b in zip(second(ours, False), second(theirs, True)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("edit", [add, clear, torch.relu_])
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_writes_into_the_output_when_compiled(kind, edit):
    ours, theirs = pair(kind)
    x = torch.randn(5, 3, 4)
    expected = gradients(theirs, x, lambda output: edit(output.clone()))
    compiled = torch.compile(lambda x: edit(ours(x)[0]).sin().sum(), backend="aot_eager", fullgraph=True)
    x.requires_grad_()
    for a, b in zip(torch.autograd.grad(compiled(x), [x, *ours.parameters()]), expected):
        torch.testing.assert_close(a, b)


def test_writes_into_the_output_of_a_checkpoint():
    ours, theirs = pair("gru")
    x = torch.randn(5, 3, 4)
    expected = gradients(theirs, x, lambda output: add(output.clone()))
    for reentrant in (False, True):
        y = x.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(
            lambda x: add(ours(x)[0]), y, use_reentrant=reentrant
        ).sin().sum().backward()
        for a, b in zip([y.grad, *(p.grad for p in ours.parameters())], expected):
            torch.testing.assert_close(a, b)
        ours.zero_grad()


def test_writes_into_a_context():
    query, key, value = (torch.randn(2, 1, 3, 4, requires_grad=True) for _ in range(3))

    def run(edit):
        context, _ = fusedrnn.attend("dot", query, key, value)
        return torch.autograd.grad(edit(context).sin().sum(), (query, key, value))

    for a, b in zip(run(add), run(lambda context: context + 1)):
        torch.testing.assert_close(a, b)


def test_writes_into_an_input_are_noticed():
    ours, _ = pair("gru")
    x = torch.randn(5, 3, 4)
    output = ours(x)[0]
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
