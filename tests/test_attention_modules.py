"""The attention modules against their published equations: results, gradients, masks, beams, state."""

from __future__ import annotations

import importlib
import pickle

import pytest
import torch
from attending import BACKENDS
from torch import Tensor, nn

import fusedrnn
from fusedrnn.budget import check
from fusedrnn.modules import Memory

B, Tq, Tk, Q, M, H = 3, 4, 7, 5, 6, 17
FORMS = {
    "bahdanau": lambda **options: fusedrnn.BahdanauAttention(Q, M, H, **options),
    "bahdanau-normalized": lambda **options: fusedrnn.BahdanauAttention(Q, M, H, True, **options),
    "bahdanau-nobias": lambda **options: fusedrnn.BahdanauAttention(Q, M, H, bias=False, **options),
    "luong-dot": lambda **options: fusedrnn.LuongAttention(M, M, "dot", **options),
    "luong-dot-scaled": lambda **options: fusedrnn.LuongAttention(M, M, "dot", scale=True, **options),
    "luong-general": lambda **options: fusedrnn.LuongAttention(Q, M, "general", **options),
    "luong-concat": lambda **options: fusedrnn.LuongAttention(Q, M, "concat", H, **options),
}


def energies(module: nn.Module, query: Tensor, memory: Tensor) -> Tensor:
    """[B, Tq, Tk], as the papers write them."""
    if isinstance(module, fusedrnn.BahdanauAttention):
        hidden = module.query_layer(query)[:, :, None] + module.memory_layer(memory)[:, None]
        v = module.v if module.g is None else module.g * module.v / module.v.square().sum().sqrt()
        return (hidden.tanh() * v).sum(-1)
    if module.kind == "concat":
        both = [t.expand(-1, Tq, Tk, -1) for t in (query[:, :, None], memory[:, None])]
        return (module.W(torch.cat(both, -1)).tanh() * module.v).sum(-1)
    query = query if module.W is None else query @ module.W.weight.t()
    return query @ memory.transpose(1, 2) * (1 if module.g is None else module.g)


def published(module, query, memory, lengths=None, mask=None) -> tuple[Tensor, Tensor]:
    e = energies(module, query, memory) / module.temperature
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[:, None]
        e = e.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else e + mask
    if lengths is not None:
        e = e.masked_fill(torch.arange(Tk) >= lengths[:, None, None], -torch.inf)
    weights = e.softmax(-1)
    return weights @ memory, weights


def drawn(module, dtype) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    shapes = (B, Tq, module.query_size), (B, Tk, M)
    return tuple(torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes)


def everything(run, module, query, memory, **options) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in (query, memory)]
    outputs = run(*leaves, **options)
    leaves += module.parameters()
    names = ["query", "memory", *(name for name, _ in module.named_parameters())]
    make = torch.Generator().manual_seed(2)
    pull = [torch.randint(-4, 5, out.shape, generator=make).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, leaves, pull)
    return dict(zip(("context", "weights"), outputs)) | {f"grad {n}": g for n, g in zip(names, grads)}


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parity(backend, form, dtype):
    torch.manual_seed(0)
    module = FORMS[form](temperature=1.5).to(dtype)
    exact = pickle.loads(pickle.dumps(module)).double()
    query, memory = drawn(module, dtype)
    some = torch.rand(B, 1, Tk) < 0.7
    some[..., 0] = True
    for options in ({}, {"lengths": torch.tensor([7, 1, 4])}, {"mask": some}):
        with fusedrnn.use_backend(backend):
            ours = everything(
                lambda *a, **o: module(*a, **o, need_weights=True), module, query, memory, **options
            )
        theirs = everything(lambda *a, **o: published(module, *a, **o), module, query, memory, **options)
        result = check(
            ours,
            theirs,
            lambda o=options: everything(
                lambda *a, **o: published(exact, *a, **o), exact, query.double(), memory.double(), **o
            ),
        )
        assert result.ok, result


@pytest.mark.parametrize("form", FORMS)
def test_shapes_beams_and_the_cached_memory(form):
    module = FORMS[form]().double()
    query, memory = drawn(module, torch.float64)
    lengths = torch.tensor([7, 0, 4])
    context, weights = module(query, memory, lengths, need_weights=True)
    assert (context.shape, weights.shape) == ((B, Tq, M), (B, Tq, Tk))
    assert not context[1].any()
    assert not weights[1].any()
    assert module(query, memory)[1] is None

    projected = module.project_memory(memory)
    assert isinstance(projected, Memory)
    for t in range(Tq):
        step, aligned = module(query[:, t], projected, lengths, need_weights=True)
        torch.testing.assert_close((step, aligned), (context[:, t], weights[:, t]))

    beams = torch.stack([query, 2 * query], 1)
    both, aligned = module(beams, projected, lengths, need_weights=True)
    assert (both.shape, aligned.shape) == ((B, 2, Tq, M), (B, 2, Tq, Tk))
    torch.testing.assert_close(both[:, 0], context)
    torch.testing.assert_close(both[:, 1], module(2 * query, memory, lengths)[0])


def test_masks_of_every_shape():
    module = FORMS["bahdanau"]().double()
    query, memory = drawn(module, torch.float64)
    beams = torch.stack([query, 2 * query], 1)
    full = torch.rand(B, 2, Tq, Tk) < 0.6
    full[..., 0] = True
    expected = [published(module, beams[:, i], memory, mask=full[:, i])[0] for i in (0, 1)]
    torch.testing.assert_close(module(beams, memory, mask=full)[0], torch.stack(expected, 1))
    for mask in (full[:, 0], full[:1, 0], full[:, 0, :1], full[:, 0, 0], full[:1, 0, 0]):
        expected, _ = published(module, query, memory, mask=mask)
        torch.testing.assert_close(module(query, memory, mask=mask)[0], expected)
        torch.testing.assert_close(module(beams, memory, mask=mask)[0][:, 0], expected)
    added = torch.randn(B, Tk, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(module(query, memory, mask=added)[0].sum(), added)
    (exact,) = torch.autograd.grad(published(module, query, memory, mask=added)[0].sum(), added)
    torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("form", FORMS)
def test_second_order_state_dict_and_dropout(form):
    module = FORMS[form](dropout=0.5).double()
    query, memory = (t.requires_grad_() for t in drawn(module, torch.float64))
    module.eval()
    assert torch.autograd.gradgradcheck(lambda q, m: module(q, m)[0], (query, memory), fast_mode=True)
    twin = FORMS[form]().double()
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin(query, memory), module(query, memory))
    module.train()
    torch.manual_seed(0)
    dropped = module(query, memory, need_weights=True)[1]
    assert (dropped == 0).any()
    torch.manual_seed(0)
    torch.testing.assert_close(module(query, memory, need_weights=True)[1], dropped)


def test_queries_from_a_cell_and_a_loss_over_its_steps():
    """Both step orders: the state before the step, or the new output, asks."""
    torch.manual_seed(0)
    attention, cell = fusedrnn.BahdanauAttention(H, M, 8), fusedrnn.LSTMCell(M, H)
    memory = torch.randn(B, Tk, M)
    projected = attention.project_memory(memory)
    h = c = torch.zeros(B, H)
    for _ in range(3):
        context, _ = attention(h, projected)
        h, c = cell(context, (h, c))
    h.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("beams", [None, 2])
@pytest.mark.parametrize("keys", [Tk, 0])
def test_no_sequences_give_no_results(beams, keys, backend):
    """As in torch.nn: a share of a batch may be empty."""
    query = torch.zeros(0, *(() if beams is None else (beams,)), Q)
    memory, lengths, mask = torch.zeros(0, keys, M), torch.zeros(0).long(), torch.ones(0, keys) > 0
    shapes = [(*query.shape[:-1], size) for size in (M, keys)]
    with fusedrnn.use_backend(backend):
        for module in (fusedrnn.CoverageAttention(Q, M, H), fusedrnn.ForwardAttention(Q, M, H)):
            for given in (memory, module.project_memory(memory)):
                state = fusedrnn.Alignments.zeros(memory, beams)
                *results, after = module(query, given, state, lengths, mask)
                assert [tuple(t.shape) for t in results] == shapes
                assert after.cumulative.shape == state.cumulative.shape
        for form in FORMS.values():
            module = form()
            asked = query if module.query_size == Q else torch.zeros(*query.shape[:-1], M)
            for given in (memory, module.project_memory(memory)):
                results = module(asked, given, lengths, mask, need_weights=True)
                assert [tuple(t.shape) for t in results] == shapes


# ---- Tacotron 2's ------------------------------------------------------------------------------


class Tacotron(nn.Module):
    """Location-sensitive attention as Tacotron 2 has it (arXiv 1712.05884, section 2.2; arXiv 1506.07503)."""

    def __init__(self, query: int, memory: int, hidden: int, filters: int, kernel: int) -> None:
        super().__init__()
        self.query_layer = nn.Linear(query, hidden, bias=False)
        self.memory_layer = nn.Linear(memory, hidden, bias=False)
        self.v = nn.Linear(hidden, 1, bias=False)
        self.location_layer = nn.Module()
        self.location_layer.location_conv = nn.Conv1d(2, filters, kernel, padding=kernel // 2, bias=False)
        self.location_layer.location_dense = nn.Linear(filters, hidden, bias=False)

    def forward(self, state, memory, processed, weights_cat, mask):
        features = self.location_layer.location_conv(weights_cat).transpose(1, 2)
        hidden = self.query_layer(state)[:, None] + processed + self.location_layer.location_dense(features)
        weights = self.v(hidden.tanh()).squeeze(-1).masked_fill(mask, -torch.inf).softmax(-1)
        return torch.einsum("bk,bkm->bm", weights, memory), weights


def torchaudio_attention():
    try:
        return importlib.import_module("torchaudio.models.tacotron2")._Attention
    except (ImportError, OSError) as error:  # OSError: built for another torch
        pytest.skip(f"torchaudio: {error}")


@pytest.mark.parametrize("theirs", [lambda: Tacotron, torchaudio_attention], ids=["paper", "torchaudio"])
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_location_sensitive_attention_is_tacotrons(theirs, backend):
    torch.manual_seed(0)
    stock = theirs()(Q, M, H, 4, 3).double()
    ours = fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3).double()
    assert ours.state_dict().keys() == stock.state_dict().keys()
    ours.load_state_dict(stock.state_dict())
    memory = torch.randn(B, Tk, M, dtype=torch.float64)
    mask = torch.arange(Tk) >= torch.tensor([7, 1, 4])[:, None]
    queries = torch.randn(3, B, Q, dtype=torch.float64)

    def decode(module):
        processed = module.memory_layer(memory)
        state, contexts = fusedrnn.Alignments.zeros(memory), []
        for query in queries:
            context, weights = module(query, memory, processed, state.cat(), mask)
            state = state.after(weights)
            contexts.append(context)
        return torch.stack(contexts), state

    def results(module):
        contexts, state = decode(module)
        loss = contexts.square().sum() + state.cumulative.square().sum()
        return contexts, *state, torch.autograd.grad(loss, list(module.parameters()))

    with fusedrnn.use_backend(backend):
        torch.testing.assert_close(results(ours), results(stock))


def test_location_sensitive_attention_of_padding_alone_is_zero():
    module = fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3)
    memory = torch.randn(B, Tk, M)
    zeros = fusedrnn.Alignments.zeros(memory).cat()
    query, padding = torch.randn(B, Q), torch.ones(B, Tk, dtype=torch.bool)
    context, weights = module(query, memory, module.memory_layer(memory), zeros, padding)
    assert not context.any()
    assert not weights.any()
    assert module(query, memory, module.memory_layer(memory), zeros)[1].sum(-1).allclose(torch.ones(B))


# ---- coverage and forward attention ------------------------------------------------------------


@pytest.mark.parametrize("beams", [None, 2])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 1, 4])])
def test_coverage_follows_the_paper(beams, lengths):
    torch.manual_seed(0)
    module = fusedrnn.CoverageAttention(Q, M, H, temperature=2.0).double()
    memory = torch.randn(B, Tk, M, dtype=torch.float64)
    queries = torch.randn(3, *((B,) if beams is None else (B, beams)), Q, dtype=torch.float64)
    state = fusedrnn.Alignments.zeros(memory, beams)
    projected = module.project_memory(memory)
    covered = torch.zeros_like(state.cumulative)
    for query in queries:
        context, weights, state = module(query, projected, state, lengths)
        wide = query.unsqueeze(-2), covered.unsqueeze(-1) * module.coverage
        keys = module.memory_layer(memory)
        keys = keys if beams is None else keys[:, None]
        e = ((module.query_layer(wide[0]) + keys + wide[1]).tanh() @ module.v) / 2
        if lengths is not None:
            beyond = torch.arange(Tk) >= lengths[:, None]
            e = e.masked_fill(beyond if beams is None else beyond[:, None], -torch.inf)
        expected = e.softmax(-1)
        covered = covered + expected
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(context, torch.einsum("b...k,bkm->b...m", expected, memory))
    torch.testing.assert_close(state, fusedrnn.Alignments(expected, covered))


@pytest.mark.parametrize("make", [fusedrnn.CoverageAttention, fusedrnn.ForwardAttention])
def test_masks_of_a_step(make):
    """[B or 1, Tk], or [B or 1, beams or 1, Tk]."""
    torch.manual_seed(0)
    module = make(Q, M, H).double()
    memory, query = torch.randn(B, Tk, M).double(), torch.randn(B, 2, Q).double()
    state = fusedrnn.Alignments(*(torch.rand(B, 2, Tk).double() for _ in range(2)))
    full = torch.rand(B, 2, Tk) < 0.6
    full[..., 0] = True
    for mask in (full, full[:1], full[:, :1], full[:, 0], full[:1, 0]):
        weights = module(query, memory, state, mask=mask)[1]
        wide = mask if mask.dim() == 3 else mask[:, None]
        assert torch.equal(weights != 0, wide.expand(B, 2, Tk))
        for i in (0, 1):
            alone = fusedrnn.Alignments(*(t[:, i] for t in state))
            mine = wide.expand(B, 2, Tk)[:, i]
            torch.testing.assert_close(module(query[:, i], memory, alone, mask=mine)[1], weights[:, i])


@pytest.mark.parametrize("beams", [None, 2])
def test_forward_attention_follows_the_paper(beams):
    torch.manual_seed(0)
    module = fusedrnn.ForwardAttention(Q, M, H).double()
    memory = torch.randn(B, Tk, M, dtype=torch.float64)
    queries = torch.randn(4, *((B,) if beams is None else (B, beams)), Q, dtype=torch.float64)
    state = module.initial_state(memory, beams)
    mask = torch.ones(B, Tk, dtype=torch.bool)
    mask[1] = False
    content = fusedrnn.BahdanauAttention(Q, M, H).double()
    content.load_state_dict(module.state_dict())
    previous = state.previous.clone()
    for t, query in enumerate(queries):
        context, weights, state = module(query, memory, state, mask=mask)
        steps = query if beams is None else query[:, :, None]
        y = content(steps, memory, mask=mask, need_weights=True)[1].view_as(previous)
        moved = torch.cat([torch.zeros_like(previous[..., :1]), previous[..., :-1]], -1)
        previous = (previous + moved) * y
        previous = (previous / previous.sum(-1, keepdim=True)).nan_to_num()
        torch.testing.assert_close(weights, previous)
        torch.testing.assert_close(context, torch.einsum("b...k,bkm->b...m", previous, memory))
        assert not weights[..., t + 2 :].any()  # at most one key further a step
    context.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "make",
    [
        *FORMS.values(),
        lambda **options: fusedrnn.CoverageAttention(Q, M, H, normalize=True, **options),
        lambda **options: fusedrnn.ForwardAttention(Q, M, H, **options),
        lambda **options: fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3, **options),
        lambda **options: fusedrnn.AdditiveAttention(M, **options),
    ],
)
def test_reset_parameters_leaves_none_as_it_was_allocated(make):
    """A model made on meta gets its memory from to_empty, and its values from reset_parameters alone."""
    module = make(device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)
    module.reset_parameters()
    assert all(p.isfinite().all() for p in module.parameters())


# ---- Keras's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("three", [True, False])
def test_additive_attention_is_keras_formula(use_scale, causal, three):
    module = fusedrnn.AdditiveAttention(M, use_scale).double()
    query, value, key = (torch.randn(B, t, M, dtype=torch.float64) for t in (Tq, Tk, Tk))
    inputs = [query, value, key] if three else [query, value]
    key = key if three else value
    query_mask, value_mask = torch.rand(B, Tq) < 0.7, torch.rand(B, Tk) < 0.7
    value_mask[:, 0] = True
    scale = module.scale if use_scale else 1
    scores = (scale * torch.tanh(query[:, :, None] + key[:, None])).sum(-1)
    allowed = value_mask[:, None] & (torch.ones(Tq, Tk).tril().bool() if causal else True)
    expected = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    context, weights = module(inputs, [query_mask, value_mask], True, use_causal_mask=causal)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(context, expected @ value * query_mask[..., None])
    torch.testing.assert_close(module(inputs, [query_mask, value_mask], use_causal_mask=causal), context)
    assert module(inputs).shape == (B, Tq, M)
