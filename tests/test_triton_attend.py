"""The Triton kernels of the attend: parity in every dtype, mask and awkward size, extremes, where they run.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

from functools import partial

import attend_kernels
import pytest
import torch
from attend_kernels import INF, MASKS, SCORES, kept

import fusedrnn
from fusedrnn.backends import hand_over, select

pytest.importorskip("triton")

from interpreter import DEVICE, INTERPRETED

from fusedrnn.backends.triton import attend, attend_launch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
by_kernel = partial(attend_kernels.by_kernel, attend)
assert_parity = partial(attend_kernels.assert_parity, attend)
every_score = pytest.mark.parametrize("score", SCORES)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter's time goes by operations, whatever they have to do."""
    if INTERPRETED:
        monkeypatch.setattr(attend_launch, "PAIRS", attend_launch.Tiles(2, 5, 8, 1))
        monkeypatch.setattr(attend_launch, "GRADIENTS", attend_launch.Tiles(3, 2, 8, 1))
        monkeypatch.setattr(attend_launch, "STEP", dict.fromkeys((2, 4), attend_launch.Tiles(1, 64, 8, 4)))


def problem(*args, **options):
    return [t if t is None else t.to(DEVICE) for t in attend_kernels.problem(*args, **options)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@every_score
def test_against_the_formula(score, dtype, mask, poisoned):
    """One step, and several tiles of queries, keys and values' columns, none of them full."""
    for shape in ((2, 1, 1, 7, 17, 5), (1, 2, 5, 20, 1, 33)):
        assert_parity(score, problem(score, shape, mask, DTYPES[dtype]))


@every_score
def test_several_tiles_of_features(score, poisoned):
    assert_parity(score, problem(score, (1, 1, 3, 5, 40, 3)))
    assert_parity(score, problem(score, (1, 1, 1, 70, 40, 3), "lengths"))


@pytest.mark.parametrize("size", [1e-3, 0.05, 0.5, 6.0, 300.0, 1e4])
@every_score
def test_small_and_large_inputs(score, size, poisoned):
    """Where the exponential of each element would lose digits, and where it would overflow."""
    assert_parity(score, problem(score, (1, 1, 4, 9, 33, 8), "none", torch.float32, size), scale=size**-2)


@pytest.mark.parametrize("size", [1e-3, 6.0, 300.0])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_small_and_large_inputs_of_16_bits(dtype, size, poisoned):
    assert_parity("additive", problem("additive", (1, 1, 4, 9, 33, 8), "none", DTYPES[dtype], size))


@pytest.mark.parametrize("v", [0.0, 1e-9, 3e4, "some zeros"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_v_that_a_reciprocal_does_not_stand(dtype, v, poisoned):
    query, key, value, given, _, _ = problem("additive", (1, 1, 4, 9, 70, 8), "none", DTYPES[dtype])
    other = given * (torch.arange(70, device=DEVICE) % 3) if v == "some zeros" else torch.full_like(given, v)
    assert_parity("additive", (query, key, value, other.to(given), None, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_large_number_among_small_ones(dtype, poisoned):
    """Its tile takes another path than those beside it."""
    query, key, value, v, _, _ = problem("additive", (1, 1, 4, 9, 70, 8), "none", DTYPES[dtype])
    for sign in (-1, 1):
        query, key = query.clone(), key.clone()
        query[0, 0, 1, 50], key[0, 0, 7, 50] = 60.0 * sign, -60.5 * sign
        assert_parity("additive", (query, key, value, v, None, None))


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["context", "weights"])
@every_score
def test_a_gradient_of_one_output_alone(score, use, poisoned):
    ours = assert_parity(score, problem(score, (2, 2, 3, 7, 17, 8), "all"), use=use)
    if not use[0]:
        assert not ours["grad value"].any()


@pytest.mark.parametrize("seed", [1, 2**63 - 1])
@every_score
def test_dropout_is_a_hash_of_the_position(score, seed, poisoned):
    ours = assert_parity(score, problem(score, (2, 1, 5, 40, 5, 8), "lengths"), dropout=0.3, seed=seed)
    assert not ours["weights"].cpu()[~kept((2, 1, 5, 40), 0.3, seed)].any()


@every_score
def test_a_row_without_keys_is_zero(score, poisoned):
    query, key, value, v, _, _ = problem(score, (2, 1, 3, 5, 17, 4))
    for mask, lengths in [
        (None, torch.tensor([5, 0])),
        (torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5).contiguous(), None),
        (torch.tensor([0.0, -INF])[:, None, None, None].expand(2, 1, 3, 5).contiguous(), None),
    ]:
        given = [t if t is None else t.to(DEVICE) for t in (mask, lengths)]
        grads = torch.randn(2, 1, 3, 4, device=DEVICE), torch.randn(2, 1, 3, 5, device=DEVICE)
        ours = by_kernel(score, (query, key, value, v, *given), 1.0, grads)
        for name in ["context", "weights", "grad query", "grad key", "grad value"]:
            assert not ours[name][1].any(), name
            assert ours[name][0].any(), name


@every_score
def test_keys_beyond_a_length_are_not_looked_at(score, poisoned):
    query, key, value, v, _, lengths = problem(score, (2, 1, 4, 20, 17, 4), "lengths")
    beyond = (torch.arange(20, device=DEVICE) >= lengths[:, None])[:, None, :, None]
    grads = torch.randn(2, 1, 4, 4, device=DEVICE), torch.randn(2, 1, 4, 20, device=DEVICE)
    clean = by_kernel(score, (query, key, value, v, None, lengths), 1.0, grads)
    holes = key.masked_fill(beyond, torch.nan), value.masked_fill(beyond, torch.nan)
    ours = by_kernel(score, (query, *holes, v, None, lengths), 1.0, grads)
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    assert not ours["grad key"].masked_select(beyond).any()


@every_score
def test_strides(score, poisoned):
    """Heads that are columns of a projection, a memory that beams share, a mask for all heads."""
    torch.manual_seed(0)
    query = torch.randn(2, 5, 2 * 8).view(2, 5, 2, 8).transpose(1, 2)
    key = torch.randn(1, 2, 9, 8).expand(2, 2, 9, 8)
    value = torch.randn(2, 1, 9, 40)[..., 3:27].expand(2, 2, 9, 24)
    v = torch.randn(8) if score == "additive" else None
    mask = (torch.rand(2, 1, 5, 9) < 0.7).expand(2, 2, 5, 9)
    args = [t if t is None else t.to(DEVICE) for t in (query, key, value, v, mask, None)]
    grads = [torch.randn(2, 5, 2, 24).transpose(1, 2).to(DEVICE), torch.randn(2, 2, 5, 9).to(DEVICE)]
    ours = by_kernel(score, args, 0.3, grads)
    plain = by_kernel(
        score, [t if t is None else t.contiguous() for t in args], 0.3, [g.contiguous() for g in grads]
    )
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_opposite_large_inputs_cancel():
    """q + k is small where both are far beyond the range of exp."""
    query, key, value, v, _, _ = problem("additive", (1, 1, 5, 9, 33, 4))
    for shift in (15.0, 1000.0):
        assert_parity("additive", (query.round() + shift, key.round() - shift, value, v, None, None))


@every_score
def test_nan_stays_in_its_row(score):
    query, key, value, v, _, _ = problem(score, (2, 1, 5, 9, 17, 4))
    query = query.clone()
    query[0, 0, 2, 3] = torch.nan
    context = attend_kernels.run(attend, score, (query, key, value, v, None, None))[0]
    expected = torch.zeros(2, 1, 5, dtype=torch.bool, device=DEVICE)
    expected[0, 0, 2] = True
    assert torch.equal(context.isnan().all(-1), expected)
    assert torch.equal(context.isnan().any(-1), expected)


@pytest.mark.parametrize("empty", range(6))
@every_score
def test_empty(score, empty, poisoned):
    """No batch, head, query, key, column of a query, column of a value."""
    shape = [0 if i == empty else n for i, n in enumerate((2, 3, 4, 5, 6, 7))]
    query, key, value, v, _, _ = problem(score, tuple(shape))
    B, N, Tq, Tk, _, Dv = shape
    grads = torch.ones(B, N, Tq, Dv, device=DEVICE), torch.ones(B, N, Tq, Tk, device=DEVICE)
    ours = by_kernel(score, (query, key, value, v, None, None), 1.0, grads)
    assert not any(t.isnan().any() for t in ours.values())
    assert ours["context"].shape == (B, N, Tq, Dv)
    if Tk == 0:
        assert not ours["context"].any()


# ---- choosing ----------------------------------------------------------------------------------


@every_score
def test_a_gpu_gets_these_kernels_once_they_are_proven(score, monkeypatch):
    monkeypatch.setattr(select, "UNPROVEN", frozenset())
    for choice in ("_table", "no_kernel"):
        monkeypatch.setattr(select, choice, getattr(select, choice).__wrapped__)
    request = select.Request(score, torch.bfloat16, "cuda", "attend")
    assert select.against("triton", request) is None
    assert select._table(request, None).backend == "triton"
    assert "torch.float64" in (select.against("triton", request._replace(dtype=torch.float64)) or "")
    assert "device cpu" in (select.against("triton", request._replace(device_type="cpu")) or "")
    assert "cosine" in (select.against("triton", request._replace(kind="cosine")) or "")
    sdpa = hand_over.attend_reason(request, plain=True, masked=False, ragged=False, narrow=False)
    assert (sdpa is not None) == (score == "dot")
    assert hand_over.attend_reason(request, plain=False, masked=True, ragged=False, narrow=False) is None


def test_through_the_operator(monkeypatch):
    """The function that users call, with a second derivative."""
    monkeypatch.setattr(attend, "no_kernel", lambda dtype, device_type: None)
    select._table.cache_clear()
    query, key, value, v, mask, _ = problem("additive", (1, 1, 2, 3, 4, 2), "bool")
    query.requires_grad_()
    with fusedrnn.use_backend("triton"):
        context, weights = fusedrnn.attend("additive", query, key, value, v, mask=mask, need_weights=True)
        (grad,) = torch.autograd.grad(context.sum() + weights.square().sum(), query, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), query)
    select._table.cache_clear()
    exact, of_exact = attend_kernels.formula("additive", query, key, value, v, mask, None, 1.0)
    (first,) = torch.autograd.grad(exact.sum() + of_exact.square().sum(), query, create_graph=True)
    torch.testing.assert_close(context, exact)
    torch.testing.assert_close(grad, first)
    torch.testing.assert_close(second, torch.autograd.grad(first.square().sum(), query)[0])
