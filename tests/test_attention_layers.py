"""The layers inside the attention modules: with hooks, parametrized, or others in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from attending import BACKENDS
from torch import Tensor, nn
from torch.nn.utils import prune

import fusedrnn
from fusedrnn.linear import is_product

B, Tq, Tk, Q, M, H = 3, 4, 7, 5, 6, 17


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def doubled(layer: nn.Linear) -> nn.Module:
    made = Doubled(layer.in_features, layer.out_features, layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made.double()


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda _, inputs, output: 2 * output)
    return layer


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.random_unstructured(layer, "weight", 0.5)


def normed(layer: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer)


def biased(layer: nn.Linear) -> nn.Module:
    made = nn.Linear(layer.in_features, layer.out_features).double()
    made.weight = layer.weight
    return made


def sequence(layer: nn.Linear) -> nn.Module:
    return nn.Sequential(layer, nn.Softsign())


def concat(query_size: int = Q) -> fusedrnn.LuongAttention:
    torch.manual_seed(0)
    return fusedrnn.LuongAttention(query_size, M, "concat", H, temperature=2.0).double()


def energies(module: fusedrnn.LuongAttention, query: Tensor, memory: Tensor) -> Tensor:
    pairs = torch.cat(
        [query[:, :, None].expand(-1, -1, Tk, -1), memory[:, None].expand(-1, query.shape[1], -1, -1)], -1
    )
    return (module.W(pairs).tanh() * module.v).sum(-1) / 2


@pytest.mark.parametrize("backend", [*BACKENDS, "torch", "auto"])
@pytest.mark.parametrize("change", [doubled, hooked, pruned, normed, biased, sequence])
def test_another_w_of_concat_is_called(change, backend):
    module = concat()
    module.W = change(module.W)
    query, memory = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((B, Tq, Q), (B, Tk, M))
    )
    lengths, mask = torch.tensor([7, 1, 4]), torch.rand(B, Tq, Tk) < 0.7
    mask[..., 0] = True
    beyond = torch.arange(Tk) >= lengths[:, None, None]
    scores = energies(module, query, memory)
    expected = scores.masked_fill(~mask | beyond, -torch.inf).softmax(-1)
    weights_of = [query, memory, *module.parameters()]
    exact = torch.autograd.grad((expected @ memory).square().sum(), weights_of)
    with fusedrnn.use_backend(backend):
        for given in (memory, module.project_memory(memory)):
            context, weights = module(query, given, lengths, mask, need_weights=True)
            torch.testing.assert_close(weights, expected)
            torch.testing.assert_close(context, expected @ memory)
            found = torch.autograd.grad(context.square().sum(), weights_of)
            torch.testing.assert_close(found, exact)
        with torch.no_grad():
            projected = module.project_memory(memory)
            torch.testing.assert_close(module(query, projected, lengths, mask)[0], expected @ memory)
            one = module(query[:, 0], projected, lengths, mask[:, 0])[0]
            torch.testing.assert_close(one, (expected @ memory)[:, 0])
            beams = module(query[:, None], projected, lengths, mask[:, None], need_weights=True)
            torch.testing.assert_close(beams, ((expected @ memory)[:, None], expected[:, None]))
        added = torch.randn(B, 1, Tk, dtype=torch.float64)
        torch.testing.assert_close(
            module(query, memory, mask=added, need_weights=True)[1], (scores + added).softmax(-1)
        )


@pytest.mark.parametrize("layer", ["W", "v"])
def test_what_is_quantized_runs(layer):
    """quantize_dynamic's layer has no weight but a method of this name."""
    torch.manual_seed(0)
    module = fusedrnn.LuongAttention(Q, M, "concat", H)
    if layer == "v":
        module = fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3)
    memory, query = torch.randn(B, Tk, M), torch.randn(B, Q)

    def call(module):
        if layer == "W":
            return module(query, memory, need_weights=True)
        state = fusedrnn.Alignments.zeros(memory).cat()
        return module(query, memory, module.memory_layer(memory), state)

    # of equal weights these are 0.025 and 0.19 away
    atol = {"W": 0.006, "v": 0.03}[layer]
    quantized = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    torch.testing.assert_close(call(quantized), call(module), rtol=0, atol=atol)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch", "auto"])
@pytest.mark.parametrize("change", [doubled, hooked, pruned, normed, biased, sequence])
def test_another_v_of_location_sensitive_attention_is_called(change, backend):
    torch.manual_seed(0)
    module = fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3).double()
    module.v = change(module.v)
    memory, query = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((B, Tk, M), (B, Q)))
    padded = torch.arange(Tk) >= torch.tensor([7, 1, 4])[:, None]
    state = torch.rand(B, 2, Tk, dtype=torch.float64)
    processed = module.memory_layer(memory)
    hidden = (module.query_layer(query)[:, None] + processed + module.location_layer(state)).tanh()
    expected = module.v(hidden).squeeze(-1).masked_fill(padded, -torch.inf).softmax(-1)
    with fusedrnn.use_backend(backend):
        context, weights = module(query, memory, processed, state, padded)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, torch.einsum("bk,bkm->bm", expected, memory))
    wanted = [query, memory, module.query_layer.weight]
    found, exact = (
        torch.autograd.grad(w.square().sum(), wanted, retain_graph=True, allow_unused=True)
        for w in (weights, expected)
    )
    torch.testing.assert_close(found, exact)


def test_a_memory_projected_for_another_w_is_refused_or_right():
    """M = H: keys of another kind would fit."""
    torch.manual_seed(0)
    module = fusedrnn.LuongAttention(Q, M, "concat", M)
    query, memory = torch.randn(B, Q), torch.randn(B, Tk, M)
    plain = module.project_memory(memory)
    expected, _ = module(query, memory)
    handle = module.W.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(module(query, plain)[0], expected)
    called = module.project_memory(memory)
    torch.testing.assert_close(module(query, called)[0], expected)
    handle.remove()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="key: expected shape"):
            module(query, called)


def test_a_layer_that_is_called_takes_part_in_everything_else():
    module = concat()
    module.W = doubled(module.W)
    module.train().dropout = 0.5
    query, memory = torch.randn(B, Tq, Q).double(), torch.randn(B, Tk, M).double()
    assert (module(query, memory, need_weights=True)[1] == 0).any()
    module.eval()
    torch.testing.assert_close(copy.deepcopy(module)(query, memory), module(query, memory))
    context, weights = module(query, memory, torch.zeros(B).long(), need_weights=True)
    assert not context.any()
    assert not weights.any()
    with pytest.raises(RuntimeError, match="memory: expected a batch of 3 as query, got 4"):
        module(query, torch.zeros(4, Tk, M).double())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, memory)[0], module(query, memory)[0])


def test_what_is_a_product():
    layer = nn.Linear(3, 4)
    assert is_product(layer)
    assert is_product(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)))
    assert not is_product(Doubled(3, 4))
    assert not is_product(nn.Identity())
    layer.register_forward_pre_hook(lambda *_: None)
    assert not is_product(layer)


def test_explain_knows_that_a_layer_is_called():
    module = concat()
    query, memory = torch.zeros(B, Tq, Q).double(), torch.zeros(B, Tk, M).double()
    with torch.no_grad():
        before = fusedrnn.explain(module, query, memory)
        module.W = doubled(module.W)
        after = fusedrnn.explain(module, query, memory)
    assert "scaled_dot_product_attention" in after.why
    assert "scaled_dot_product_attention" not in before.why
