"""The CPU kernels of attention on every instruction set: parity, masks, dropout, awkward shapes, extremes."""

from functools import partial

import attend_kernels
import pytest
import torch
from attend_kernels import INF, MASKS, SCORES, kept, problem

from fusedrnn.backends import native
from fusedrnn.backends.native import attend

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
IDS = ["f32", "f64", "bf16", "f16"]
# B, N, Tq, Tk, D, Dv: each awkward in its own way (not a multiple of a vector, of a tile, of a thread)
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 7, 17, 5),
    (3, 1, 3, 100, 96, 64),
    (2, 2, 33, 7, 17, 130),
    (1, 2, 34, 50, 33, 64),
    (2, 1, 7, 33, 1, 80),
]
run = partial(attend_kernels.run, attend)
by_kernel = partial(attend_kernels.by_kernel, attend)
assert_parity = partial(attend_kernels.assert_parity, attend)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("score", SCORES)
def test_against_the_formula(score, dtype, kind, level, poisoned):
    for shape in SHAPES:
        assert_parity(score, problem(score, shape, kind, dtype))


@pytest.mark.parametrize("size", [1e-3, 0.05, 6.0, 300.0, 1e4])
@pytest.mark.parametrize("score", SCORES)
def test_small_and_large_inputs(score, size, level, poisoned):
    """Where the exponential of each element would lose digits, and where it would overflow."""
    for dtype in (torch.float32, torch.float64):
        assert_parity(score, problem(score, (2, 1, 9, 20, 33, 8), "none", dtype, size), scale=size**-2)


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["context", "weights"])
@pytest.mark.parametrize("score", SCORES)
def test_a_gradient_of_one_output_alone(score, use, poisoned):
    args = problem(score, (2, 2, 9, 20, 33, 8), "all")
    ours = assert_parity(score, args, use=use)
    if not use[0]:
        assert not ours["grad value"].any()


@pytest.mark.parametrize("dropout", [0.1, 0.75])
@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
def test_dropout_is_a_hash_of_the_position(dropout, seed, level, poisoned):
    for score in SCORES:
        shape = (2, 3, 9, 50, 17, 8)
        ours = assert_parity(score, problem(score, shape, "lengths"), dropout=dropout, seed=seed)
        dropped = ~kept((2, 3, 9, 50), dropout, seed)
        assert 0.5 * dropout < dropped.float().mean() < 1.5 * dropout + 0.1
        assert not ours["weights"][dropped].any()


@pytest.mark.parametrize("score", SCORES)
def test_a_row_without_keys_is_zero(score, poisoned):
    query, key, value, v, _, _ = problem(score, (2, 1, 3, 5, 17, 4))
    for mask, lengths in [
        (None, torch.tensor([5, 0])),
        (torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5).contiguous(), None),
        (torch.tensor([0.0, -INF])[:, None, None, None].expand(2, 1, 3, 5).contiguous(), None),
    ]:
        grads = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 5)
        ours = by_kernel(score, (query, key, value, v, mask, lengths), 1.0, grads)
        for name in ["context", "weights", "grad query", "grad key", "grad value"]:
            assert not ours[name][1].any(), name
            assert ours[name][0].any(), name


@pytest.mark.parametrize("kind", ["bool", "lengths"])
@pytest.mark.parametrize("score", SCORES)
def test_saved_is_what_it_says(score, kind, poisoned):
    args = problem(score, (2, 3, 5, 9, 17, 4), kind)
    _, weights, (before,) = run(score, args, 0.3, weights=True, save=True)
    assert [before.shape] == [torch.Size(s) for s in attend.saved_shapes(2, 3, 5, 9)]
    torch.testing.assert_close(before, weights)
    _, weights, saved = run(score, args)
    assert weights is None
    assert saved == []


@pytest.mark.parametrize("score", SCORES)
def test_keys_beyond_a_length_are_not_looked_at(score, poisoned):
    query, key, value, v, _, lengths = problem(score, (3, 1, 4, 20, 17, 4), "lengths")
    beyond = (torch.arange(20) >= lengths[:, None])[:, None, :, None]
    grads = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 20)
    clean = by_kernel(score, (query, key, value, v, None, lengths), 1.0, grads)
    holes = key.masked_fill(beyond, torch.nan), value.masked_fill(beyond, torch.nan)
    ours = by_kernel(score, (query, *holes, v, None, lengths), 1.0, grads)
    assert all(torch.equal(ours[name], clean[name]) for name in clean)
    assert not ours["grad key"].masked_select(beyond).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("score", SCORES)
def test_strides(score, dtype, poisoned):
    """Heads that are columns of a projection, a memory that beams share, a mask for all heads."""
    torch.manual_seed(0)
    query = torch.randn(2, 9, 3 * 16, dtype=torch.float32).to(dtype).view(2, 9, 3, 16).transpose(1, 2)
    key = torch.randn(1, 3, 20, 16).to(dtype).expand(2, 3, 20, 16)
    value = torch.randn(2, 1, 20, 40).to(dtype)[..., 3:27].expand(2, 3, 20, 24)
    v = torch.randn(16).to(dtype) if score == "additive" else None
    mask = (torch.rand(2, 1, 9, 20) < 0.7).expand(2, 3, 9, 20)
    args = query, key, value, v, mask, None
    grads = torch.randn(2, 9, 3, 24).to(dtype).transpose(1, 2), torch.randn(2, 3, 9, 20).to(dtype)
    ours = by_kernel(score, args, 0.3, grads)
    plain = by_kernel(
        score, [t if t is None else t.contiguous() for t in args], 0.3, [g.contiguous() for g in grads]
    )
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("score", SCORES)
def test_equal_scores(score, dtype, level):
    """All weights are 1 / Tk, however large the scores are."""
    for size in (0.0, 1.0, 1e4):
        query, key = (torch.full((1, 2, n, 33), size, dtype=dtype) for n in (5, 100))
        value = torch.randn(1, 2, 100, 7, dtype=dtype)
        v = torch.randn(33, dtype=dtype) if score == "additive" else None
        context, weights, _ = attend.forward(
            score, query, key, value, v, None, None, 1.0, 0.0, 0, True, False
        )
        torch.testing.assert_close(weights, torch.full_like(weights, 0.01))
        torch.testing.assert_close(context, value.mean(2, keepdim=True).expand_as(context))


def test_opposite_large_inputs_cancel(level):
    """q + k is small where both are far beyond the range of exp."""
    query, key, value, v, _, _ = problem("additive", (1, 1, 6, 9, 33, 4))
    for shift in (15.0, 1000.0):
        assert_parity("additive", (query.round() + shift, key.round() - shift, value, v, None, None))


@pytest.mark.parametrize("score", SCORES)
def test_nan_stays_in_its_row(score, level):
    query, key, value, v, _, _ = problem(score, (2, 2, 7, 9, 17, 4))
    query = query.clone()
    query[0, 1, 2, 3] = torch.nan
    context = run(score, (query, key, value, v, None, None))[0]
    expected = torch.zeros(2, 2, 7, dtype=torch.bool)
    expected[0, 1, 2] = True
    assert torch.equal(context.isnan().all(-1), expected)
    assert torch.equal(context.isnan().any(-1), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 300, 256, 96), (1, 1, 90, 70, 256, 64), (5, 2, 30, 70, 64, 80)])
@pytest.mark.parametrize("score", SCORES)
def test_any_number_of_threads_gives_the_same(score, shape):
    args = problem(score, shape, "lengths")
    B, N, Tq, Tk, _, Dv = shape
    grads = torch.randn(B, N, Tq, Dv), torch.randn(B, N, Tq, Tk)
    alone = by_kernel(score, args, 1.0, grads)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for _ in range(3):
            ours = by_kernel(score, args, 1.0, grads)
            assert all(torch.equal(ours[name], alone[name]) for name in alone)


def test_every_fp16_is_read_and_written_right(level):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    one = torch.ones(1, 1, 2, 1, dtype=torch.float16)
    value = torch.stack([patterns, patterns.flip(0)])[None, None]
    mean = attend.forward("dot", one[:, :, :1], one, value, None, None, None, 1.0, 0.0, 0, False, False)[0]
    exact = (value.float() * 0.5).sum(2, keepdim=True).half()
    assert torch.equal(mean.isnan(), exact.isnan())
    assert torch.equal(mean.nan_to_num(0, 7, 8), exact.nan_to_num(0, 7, 8))


@pytest.mark.parametrize("empty", range(6))
@pytest.mark.parametrize("score", SCORES)
def test_empty(score, empty, poisoned):
    """No batch, head, query, key, column of a query, column of a value."""
    shape = [0 if i == empty else n for i, n in enumerate((2, 3, 4, 5, 6, 7))]
    query, key, value, v, _, _ = problem(score, tuple(shape))
    B, N, Tq, Tk, _, Dv = shape
    grads = torch.ones(B, N, Tq, Dv), torch.ones(B, N, Tq, Tk)
    ours = by_kernel(score, (query, key, value, v, None, None), 1.0, grads)
    assert not any(t.isnan().any() for t in ours.values())
    assert ours["context"].shape == (B, N, Tq, Dv)
    if Tk == 0:
        assert not ours["context"].any()


def test_what_is_unsupported_has_a_reason():
    assert attend.unsupported("dot", torch.float16, "cpu") is None
    assert "cuda" in attend.unsupported("dot", torch.float32, "cuda")
    assert "int" in attend.unsupported("dot", torch.int32, "cpu")
    assert "cosine" in attend.unsupported("cosine", torch.float32, "cpu")
