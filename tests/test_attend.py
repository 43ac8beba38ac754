"""The attend: parity, masks, dropout, where it runs, what is refused; on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from attending import BACKENDS, Case, close, every_backend, every_score, everything
from torch import Tensor

import fusedrnn
from fusedrnn.backends import select
from fusedrnn.budget import check
from fusedrnn.scores import SCORES
from fusedrnn.testing import poison

MASKS = ("none", "lengths", "bool", "float", "both")
# B, N, Tq, Tk, D, Dv: sizes that no vector width divides, and one of each
SIZES = [
    (2, 2, 3, 7, 17, 5),
    (1, 1, 1, 100, 96, 64),
    (2, 1, 33, 7, 17, 1),
    (3, 1, 1, 1, 1, 5),
    (1, 2, 3, 100, 1, 64),
]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


@every_backend
@every_score
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_parity(backend, score, dtype, mask):
    for sizes, dropout in zip(SIZES, (0.3, 0.0, 0.0, 0.0, 0.5)):
        case = Case(score, mask, sizes, DTYPES[dtype], dropout)
        wide = [t.detach().double().requires_grad_() for t in case.floats]
        with poison():
            ours = everything(case.fused(backend), case.floats)
        theirs = everything(case.exact, case.floats)
        result = check(ours, theirs, lambda c=case, w=wide: everything(c.exact, w))
        assert result.ok, f"{sizes}\n{result}"


@every_backend
@every_score
@pytest.mark.parametrize("kind", ["lengths", "bool", "float"])
def test_a_row_masked_whole_is_zero_and_so_are_its_gradients(backend, score, kind):
    case = Case(score, "none")
    if kind == "lengths":
        case.lengths = torch.tensor([0, 5])
    else:
        case.mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
        case.mask[0] = False
        if kind == "float":
            case.mask = torch.zeros(2, 1, 3, 5, dtype=torch.float64).masked_fill(~case.mask, -torch.inf)
            case.mask.requires_grad_()
    with poison():
        context, weights = case.fused(backend)(*case.floats)
        grads = torch.autograd.grad(context.sum() + weights.square().sum(), case.floats)
    for t in (context, weights, *grads[:3]):
        assert not t[0].any()
    assert all(t.isfinite().all() for t in grads)
    close((context[1], weights[1]), tuple(t[1] for t in case.exact(*case.floats)))


@every_backend
@every_score
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_extreme_inputs(backend, score, dtype):
    case = Case(score, "float", (2, 1, 3, 7, 17, 5), DTYPES[dtype])
    for name in ("query", "key"):
        tensor = getattr(case, name)
        tensor.data.mul_(1e4 / tensor.data.abs().max())
    ours = everything(case.fused(backend), case.floats)
    wide = [t.detach().double().requires_grad_() for t in case.floats]
    assert all(t.isfinite().all() for t in ours.values())
    if score == "additive":  # a dot of 1e4 and 1e4 in another order is another row's maximum
        result = check(ours, everything(case.exact, case.floats), lambda: everything(case.exact, wide))
        assert result.ok, result


@every_backend
@every_score
def test_equal_scores_are_equal_weights(backend, score):
    case = Case(score, "none", (1, 1, 2, 7, 5, 3), torch.float32)
    case.key.data.copy_(case.key.data[:, :, :1].expand_as(case.key))
    _, weights = case.fused(backend)(*case.floats)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 7))


@every_backend
@every_score
@pytest.mark.parametrize(
    "sizes", [(0, 1, 2, 3, 4, 5), (2, 1, 0, 3, 4, 5), (2, 1, 2, 0, 4, 5), (2, 1, 2, 3, 4, 0)]
)
def test_nothing_at_all(backend, score, sizes):
    case = Case(score, "none", sizes)
    context, weights = case.fused(backend)(*case.floats)
    assert context.shape == (*sizes[:3], sizes[5])
    assert weights.shape == sizes[:4]
    assert not context.any()
    for t, g in zip(case.floats, torch.autograd.grad(context.sum() + weights.sum(), case.floats)):
        assert g.shape == t.shape
        assert g.isfinite().all()


@every_backend
@every_score
def test_heads_need_no_copy(backend, score):
    case = Case(score, "lengths", (2, 3, 4, 5, 6, 7))
    strided = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in case.floats[:3]]
    strided += case.floats[3:]
    assert not strided[0].is_contiguous()
    close(case.fused(backend)(*strided), case.exact(*case.floats))


# ---- dropout -----------------------------------------------------------------------------------


def kept(index: int, seed: int, dropout: float) -> bool:
    """The rule in plain integers of 32 bits."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    low = mix((index ^ seed) % 2**32)
    bits = mix((low + (index >> 32) * 0x9E3779B9 + (seed >> 32)) % 2**32)
    return (bits >> 8) * 2.0**-24 >= dropout


@every_backend
@every_score
def test_dropout_follows_the_rule_and_divides_what_is_kept(backend, score):
    case = Case(score, "none", (2, 2, 3, 50, 4, 3), dropout=0.4)
    context, weights = case.fused(backend)(*case.floats)
    rule = torch.tensor([kept(i, int(case.seed), 0.4) for i in range(weights.numel())]).view_as(weights)
    assert torch.equal(weights != 0, rule)
    assert 0.5 < rule.double().mean() < 0.7
    case.dropout = 0.0
    close(weights, case.exact(*case.floats)[1] * rule / 0.6)
    close(context, weights @ case.value)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_a_seed_reproduces_dropout(backend):
    case = Case("additive", "none", (1, 1, 2, 50, 4, 3))

    def run() -> Tensor:
        inputs = [t.detach() for t in (case.query, case.key, case.value, case.v)]
        return fusedrnn.attend("additive", *inputs, dropout=0.5, need_weights=True)[1]

    with fusedrnn.use_backend(backend):
        torch.manual_seed(3)
        first, second = run(), run()
        torch.manual_seed(3)
        assert torch.equal(run(), first)
    assert not torch.equal(first, second)


# ---- where it runs -----------------------------------------------------------------------------


def test_a_backend_without_kernels_says_so():
    request = select.Request("additive", torch.float32, "cpu", "nothing")
    assert select.against("reference", request) == "has no nothing kernels"
    if "native" not in BACKENDS:
        with (
            fusedrnn.use_backend("native"),
            pytest.raises(fusedrnn.BackendError, match="has no attend kernels"),
        ):
            fusedrnn.attend("dot", *(torch.zeros(1, 1, 1, 1),) * 3)


@every_score
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", [False, True])
def test_plain_torch_is_right(score, mask, weights):
    case = Case(score, mask, weights=weights)

    def run(*floats: Tensor) -> tuple[Tensor, ...]:
        query, key, value, v, mask = case.filled(floats)
        found = fusedrnn.attend(
            score,
            query,
            key,
            value,
            v,
            mask=mask,
            lengths=case.lengths,
            scale=case.scale,
            need_weights=weights,
        )
        return tuple(t for t in found if t is not None)

    with fusedrnn.use_backend("torch"):
        for ours, theirs in zip(*(everything(f, case.floats).values() for f in (run, case.exact))):
            close(ours, theirs)
        with torch.no_grad():
            close(run(*case.floats), case.exact(*case.floats))
        assert torch.autograd.gradgradcheck(run, case.floats, fast_mode=True)


def test_scaled_dot_product_attention_runs_where_nothing_else_is_asked(monkeypatch):
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        calls.append(args)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q = torch.randn(2, 1, 3, 4)
    fusedrnn.attend("dot", q, q, q)
    assert len(calls) == 1
    fusedrnn.attend("dot", q, q, q, need_weights=True)
    fusedrnn.attend("dot", q.clone().requires_grad_(), q, q)  # its gradient has none itself
    torch.func.jvp(lambda q: fusedrnn.attend("dot", q, q, q)[0], (q,), (q,))
    assert len(calls) == 1


def test_autocast_computes_in_and_returns_its_dtype():
    case = Case("additive", "float", dtype=torch.float32)
    query, key, value, v, mask = case.inputs
    with torch.autocast("cpu", torch.bfloat16):
        context, weights = fusedrnn.attend("additive", query, key, value, v, mask=mask, need_weights=True)
    assert context.dtype is weights.dtype is torch.bfloat16
    context.sum().backward()
    assert query.grad.dtype is torch.float32


# ---- what is refused ---------------------------------------------------------------------------

q = torch.zeros(2, 1, 3, 4)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, "score: expected one of additive, dot, got 'cosine'", ("cosine", q, q, q), {}),
        (TypeError, "query: expected a tensor, got list", ("dot", [1.0], q, q), {}),
        (ValueError, r"key: expected 4 dimensions \[B, N, Tk, D\], got shape", ("dot", q, q[0], q), {}),
        (ValueError, "value: expected dtype torch.float32 of query", ("dot", q, q, q.double()), {}),
        (RuntimeError, r"key: expected shape \[2, 1, Tk, 4\]", ("dot", q, q[:1], q), {}),
        (RuntimeError, r"value: expected shape \[2, 1, 3, Dv\]", ("dot", q, q, q[:, :, :2]), {}),
        (RuntimeError, "key: expected device cpu of query, got meta", ("dot", q, q.to("meta"), q), {}),
        (ValueError, "v: expected None for score 'dot'", ("dot", q, q, q, q[0, 0, 0]), {}),
        (ValueError, r"v: expected a tensor \[D\] for score 'additive'", ("additive", q, q, q), {}),
        (RuntimeError, r"v: expected shape \[4\]", ("additive", q, q, q, q[0, 0, :, 0]), {}),
        (ValueError, "dropout: expected a probability", ("dot", q, q, q), {"dropout": 1.0}),
        (ValueError, "mask: expected 4 dimensions", ("dot", q, q, q), {"mask": q[0, 0]}),
        (ValueError, "mask: expected dtype torch.bool or", ("dot", q, q, q), {"mask": q[..., :3].int()}),
        (RuntimeError, r"mask: expected shape \[2 or 1, 1 or 1, 3 or 1, 3\]", ("dot", q, q, q), {"mask": q}),
        (TypeError, "lengths: expected a tensor of integers", ("dot", q, q, q), {"lengths": [3, 3]}),
        (ValueError, "lengths: expected integers", ("dot", q, q, q), {"lengths": torch.ones(2)}),
        (RuntimeError, r"lengths: expected shape \[2\]", ("dot", q, q, q), {"lengths": torch.ones(3).int()}),
    ],
)
def test_errors_name_the_argument(error, message, args, options):
    with pytest.raises(error, match=message):
        fusedrnn.attend(*args, **options)


def test_every_score_says_where_it_is_published():
    assert all("arXiv" in score.formula for score in SCORES.values())
    assert list(itertools.chain(SCORES)) == ["additive", "dot"]
