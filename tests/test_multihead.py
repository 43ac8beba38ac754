"""MultiheadAttention against torch's: results, weights, gradients, errors, state_dict, replace."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import modules
from fusedrnn.testing import assert_parity

E, N, L, S, B = 8, 2, 4, 5, 3
LAYOUTS = ("time_first", "batch_first", "unbatched")
OPTIONS = {
    "plain": {},
    "nobias": {"bias": False},
    "sizes": {"kdim": 5, "vdim": 3},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "everything": {"kdim": 5, "vdim": 3, "bias": False, "add_bias_kv": True, "add_zero_attn": True},
}


def pair(layout: str = "batch_first", dtype=torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(E, N, batch_first=layout == "batch_first", dtype=dtype, **options)
    fused = fusedrnn.MultiheadAttention(E, N, batch_first=layout == "batch_first", dtype=dtype, **options)
    fused.load_state_dict(stock.state_dict())
    return stock, fused


def laid(layout: str, *tensors: Tensor) -> list[Tensor]:
    """Of [T, B, E], as a module of that layout takes them."""
    if layout == "unbatched":
        return [t[:, 0] for t in tensors]
    return [t.transpose(0, 1) if layout == "batch_first" else t for t in tensors]


def drawn(stock: nn.MultiheadAttention, layout: str) -> list[Tensor]:
    shapes = ((L, B, E), (S, B, stock.kdim), (S, B, stock.vdim))
    return laid(layout, *(torch.randn(shape, dtype=stock.out_proj.weight.dtype) for shape in shapes))


def masks(kind: str, layout: str, dims: int) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask and attn_mask, under which every query has a key."""
    batch = 1 if layout == "unbatched" else B
    padding, mask = torch.rand(batch, S) > 0.6, torch.rand(*((batch * N,) if dims == 3 else ()), L, S) > 0.6
    padding[..., 0] = mask[..., 0] = False
    if kind == "float":
        padding, mask = (torch.randn(m.shape, dtype=torch.float64) for m in (padding, mask))
    return (padding[0] if layout == "unbatched" else padding), mask


def everything(module, inputs, **options):
    output, weights = module(*inputs, **options)
    loss = output.square().sum() + (0 if weights is None else weights.square().sum())
    return [output, weights, *torch.autograd.grad(loss, list(module.parameters()))]


def agree(stock, fused, inputs, **options) -> None:
    for theirs, ours in zip(everything(stock, inputs, **options), everything(fused, inputs, **options)):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_results_weights_and_gradients(backend, layout, options):
    stock, fused = pair(layout, **OPTIONS[options])
    inputs = drawn(stock, layout)
    with fusedrnn.use_backend(backend):
        for need_weights, average in ((True, True), (True, False), (False, True)):
            asked = {"need_weights": need_weights, "average_attn_weights": average}
            agree(stock, fused, inputs, **asked)
            for kind, dims in itertools.product(("bool", "float"), (2, 3)):
                padding, mask = masks(kind, layout, dims)
                agree(stock, fused, inputs, **asked, key_padding_mask=padding)
                agree(stock, fused, inputs, **asked, attn_mask=mask)
                agree(stock, fused, inputs, **asked, key_padding_mask=padding, attn_mask=mask)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_self_attention_and_the_causal_hint(need_weights, training):
    stock, fused = (m.train(training) for m in pair("batch_first"))
    x = torch.randn(B, S, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(S, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for options in ({}, {"attn_mask": causal, "is_causal": True}, {"attn_mask": causal}):
                theirs, ours = (m(x, x, x, need_weights=need_weights, **options) for m in (stock, fused))
                torch.testing.assert_close(ours, theirs)
    theirs, ours = (m(x[:, :2], x, x, need_weights=need_weights) for m in (stock, fused))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_parity(dtype, need_weights):
    stock, fused = pair("batch_first", dtype)
    query, key, value = drawn(stock, "batch_first")
    padding = torch.arange(S) >= torch.tensor([5, 2, 4])[:, None]
    assert_parity(fused, stock, (query, key, value, padding, need_weights))
    assert_parity(fused, inputs=(query, key, value, padding, need_weights))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_row_masked_whole_is_zero(need_weights, training, kind):
    _, fused = (m.train(training) for m in pair("batch_first"))
    x = torch.randn(B, S, E, dtype=torch.float64)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    mask = padding if kind is torch.bool else torch.zeros(B, S).double().masked_fill(padding, -torch.inf)
    output, weights = fused(x, x, x, mask, need_weights)
    grads = torch.autograd.grad(output.square().sum(), list(fused.parameters()))
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(output[1], fused.out_proj.bias.expand_as(output[1]))
    assert weights is None or not weights[1].any()
    with torch.no_grad():
        torch.testing.assert_close(fused(x, x, x, mask, need_weights)[0], output)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_batch(layout, options):
    stock, fused = pair(layout, **OPTIONS[options])
    inputs = laid(
        layout, *(torch.randn(t, 0, n).double() for t, n in ((L, E), (S, stock.kdim), (S, stock.vdim)))
    )
    padding, mask = torch.zeros(0, S, dtype=torch.bool), torch.zeros(L, S, dtype=torch.bool)
    agree(stock, fused, inputs, key_padding_mask=padding)
    agree(stock, fused, inputs, key_padding_mask=padding, attn_mask=mask)
    expected, _ = stock(*inputs)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found, weights = fused(*inputs, padding, need_weights=False)
            assert weights is None
            torch.testing.assert_close(found, expected)


def test_dropout_is_reproducible_and_only_in_training():
    stock, fused = pair("batch_first", dropout=0.5)
    inputs = drawn(stock, "batch_first")

    def run():
        torch.manual_seed(1)
        return fused(*inputs)

    torch.testing.assert_close(run(), run())
    dropped = run()[1]
    torch.testing.assert_close(fused.eval()(*inputs), stock.eval()(*inputs))
    assert not torch.equal(dropped, run()[1])
    nothing = fusedrnn.MultiheadAttention(E, N, dropout=1.0)
    assert not nothing(*(torch.randn(L, B, E) for _ in range(3)))[1].any()


def test_state_dict_pickle_and_class_go_both_ways():
    stock, fused = pair("time_first", **OPTIONS["everything"])
    stock.load_state_dict(fused.state_dict())
    assert isinstance(fused, nn.MultiheadAttention)
    assert vars(fused).keys() == vars(stock).keys()
    inputs = drawn(stock, "time_first")
    expected = stock(*inputs)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(*inputs), expected)


def test_the_seed_draws_the_same_weights():
    torch.manual_seed(0)
    stock = nn.MultiheadAttention(E, N, add_bias_kv=True, kdim=3)
    torch.manual_seed(0)
    for a, b in zip(
        stock.parameters(), fusedrnn.MultiheadAttention(E, N, add_bias_kv=True, kdim=3).parameters()
    ):
        assert torch.equal(a, b)


def refusal(call) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    pytest.fail("it was not refused")


x = torch.zeros(L, B, E)
k = torch.zeros(S, B, E)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((x[0, 0], k, k), {}),
        ((x, k[:, 0], k), {}),
        ((x, k, k[:2]), {}),
        ((x, k[:, :2], k[:, :2]), {}),
        ((x[..., :5], k, k), {}),
        ((x, k[..., :5], k[..., :5]), {}),
        ((x.double(), k, k), {}),
        ((x, k, k), {"key_padding_mask": torch.zeros(B, L, dtype=torch.bool)}),
        ((x, k, k), {"key_padding_mask": torch.zeros(S, dtype=torch.bool)}),
        ((x, k, k), {"key_padding_mask": torch.zeros(B, S, dtype=torch.int32)}),
        ((x, k, k), {"attn_mask": torch.zeros(S, L)}),
        ((x, k, k), {"attn_mask": torch.zeros(B, L, S)}),
        ((x, k, k), {"attn_mask": torch.zeros(1, B, L, S)}),
        ((x, k, k), {"attn_mask": torch.zeros(L, S, dtype=torch.float64)}),
        ((x, k, k), {"is_causal": True}),
    ],
)
@pytest.mark.parametrize("need_weights", [True, False])
def test_errors_are_torchs_word_for_word(args, options, need_weights):
    stock, fused = pair("time_first", torch.float32)
    theirs, ours = (
        refusal(lambda m=m: m(*args, need_weights=need_weights, **options)) for m in (stock, fused)
    )
    assert ours == theirs


@pytest.mark.parametrize("sizes", [(0, 2), (8, 0), (8, 3)])
def test_constructor_errors_are_torchs(sizes):
    ours, theirs = (
        refusal(lambda c=c: c(*sizes)) for c in (fusedrnn.MultiheadAttention, nn.MultiheadAttention)
    )
    assert ours == theirs


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_compiled_whole(backend):
    torch._dynamo.reset()
    _, fused = pair("batch_first")
    x = torch.randn(B, S, E, dtype=torch.float64)
    padding = torch.arange(S) >= torch.tensor([5, 2, 0])[:, None]
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with fusedrnn.use_backend(backend):
        for need_weights in (True, False):
            torch.testing.assert_close(
                compiled(x, x, x, padding, need_weights), fused(x, x, x, padding, need_weights)
            )


def test_vmap_and_per_sample_gradients():
    _, fused = pair("batch_first")
    inputs = torch.randn(4, L, E, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in fused.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(fused, parameters, (x, x, x))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    for i, x in enumerate(inputs):
        one = torch.func.grad(loss)(parameters, x)
        for name in one:
            torch.testing.assert_close(found[name][i], one[name])


def test_scripting_and_tracing_record_torchs_operators():
    stock, fused = pair("batch_first", torch.float32)
    x = torch.randn(B, S, E)
    expected = stock(x, x, x)
    torch.testing.assert_close(torch.jit.script(fused)(x, x, x), expected)
    traced = torch.jit.trace(fused, (x, x, x), check_trace=False)
    assert "fusedrnn::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x, x, x), expected)


def test_fx_keeps_it_whole():
    _, fused = pair("batch_first")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = fused

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = Model()
    graph = torch.fx.GraphModule(model, modules.Tracer().trace(model))
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["attention"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_replace_inside_a_transformer_and_back(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(E, N, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    padding = torch.arange(S) >= torch.tensor([5, 2, 4])[:, None]
    expected = model(x, memory, memory_key_padding_mask=padding)
    with fusedrnn.replace(model) as report:
        assert len(report.swapped) == 4
        assert isinstance(model.layers[0].multihead_attn, fusedrnn.MultiheadAttention)
        torch.testing.assert_close(model(x, memory, memory_key_padding_mask=padding), expected)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
