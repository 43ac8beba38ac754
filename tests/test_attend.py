"""The attend: parity, masks, dropout, gradients of every order, transforms, compile; on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import fusedrnn
from fusedrnn import ops
from fusedrnn.backends import select
from fusedrnn.backends.reference import attend as reference
from fusedrnn.budget import check
from fusedrnn.scores import SCORES
from fusedrnn.testing import poison

BACKENDS = [
    name
    for name in select.ORDER
    if select.against(name, select.Request("additive", torch.float32, "cpu", "attend")) is None
]
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
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_score = pytest.mark.parametrize("score", SCORES)


class Case:
    """The arguments of one attend, on random numbers; `floats` are those that have a gradient."""

    def __init__(self, score, mask, sizes=(2, 2, 3, 5, 4, 3), dtype=torch.float64, dropout=0.0, weights=True):
        make = torch.Generator().manual_seed(sum(sizes))
        batch, heads, queries, keys, size, values = sizes

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=make, dtype=torch.float64).to(dtype).requires_grad_()

        self.score, self.weights, self.dropout = score, weights, dropout
        self.query, self.key = draw(batch, heads, queries, size), draw(batch, heads, keys, size)
        self.value = draw(batch, heads, keys, values)
        self.v = draw(size) if score == "additive" else None
        self.mask = self.lengths = None
        if mask == "bool":
            self.mask = torch.rand(batch, 1, queries, keys, generator=make) < 0.7
        elif mask in ("float", "both"):
            self.mask = draw(1, heads, 1, keys)
            self.mask.data[..., keys // 2] = -torch.inf
        if mask in ("lengths", "both"):
            self.lengths = torch.randint(0, keys + 1, (batch,), generator=make)
            self.lengths[0] = keys
        self.scale = size**-0.5
        self.seed = torch.tensor(0x1234567890ABCDE) if dropout else None

    @property
    def inputs(self):
        return [self.query, self.key, self.value, self.v, self.mask]

    @property
    def floats(self) -> list[Tensor]:
        return [t for t in self.inputs if t is not None and t.is_floating_point()]

    def filled(self, floats) -> list[Tensor | None]:
        """The inputs, with these in the place of `floats`."""
        given = iter(floats)
        return [next(given) if t is not None and t.is_floating_point() else t for t in self.inputs]

    def fused(self, backend):
        def run(*floats: Tensor) -> tuple[Tensor, ...]:
            context, weights = ops.attend(
                self.score, *self.filled(floats), self.lengths, self.scale, self.dropout, self.seed,
                self.weights, backend,
            )  # fmt: skip
            return (context, weights) if self.weights else (context,)

        return run

    def operator(self, backend):
        def run(*floats: Tensor) -> tuple[Tensor, ...]:
            found = torch.ops.fusedrnn.attend(*self.operator_args(backend, *floats))
            return tuple(found[: 1 + self.weights])

        return run

    def operator_args(self, backend, *floats):
        return (
            self.score, *self.filled(floats), self.lengths, self.scale, self.dropout, self.seed, self.weights,
            True, backend,
        )  # fmt: skip

    def exact(self, *floats: Tensor) -> tuple[Tensor, ...]:
        """The formulas, once more."""
        query, key, value, v, mask = self.filled(floats)
        if self.score == "additive":
            energies = (torch.tanh(query[:, :, :, None] + key[:, :, None]) * v).sum(-1)
        else:
            energies = self.scale * torch.einsum("bnid,bnjd->bnij", query, key)
        allowed = torch.ones_like(energies, dtype=torch.bool)
        if mask is not None and mask.is_floating_point():
            allowed = allowed & (mask > -torch.inf)
            energies = energies + mask.masked_fill(mask == -torch.inf, 0)
        elif mask is not None:
            allowed = allowed & mask
        if self.lengths is not None:
            allowed = allowed & (torch.arange(key.shape[2]) < self.lengths[:, None, None, None])
        some = allowed.any(-1, keepdim=True)
        weights = torch.where(allowed | ~some, energies, -torch.inf).softmax(-1) * some
        if self.dropout:
            keep = reference.keep(weights.shape, self.dropout, self.seed, weights.device)
            weights = weights * keep / (1 - self.dropout)
        return (weights @ value, weights) if self.weights else (weights @ value,)


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def everything(run, floats) -> dict[str, Tensor]:
    outputs = run(*floats)
    make = torch.Generator().manual_seed(1)
    # small integers are exact in every dtype
    pull = [torch.randint(-4, 5, out.shape, generator=make).to(out) for out in outputs]
    grads = torch.autograd.grad(outputs, floats, pull)
    return {f"output {i}": t for i, t in enumerate(outputs)} | {f"grad {i}": g for i, g in enumerate(grads)}


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


# ---- gradients of every order, transforms ------------------------------------------------------


@every_backend
@every_score
@pytest.mark.parametrize("entry", ["fused", "operator"])
@pytest.mark.parametrize(("mask", "dropout", "weights"), [("both", 0.3, True), ("bool", 0.0, False)])
def test_gradcheck_and_gradgradcheck(backend, score, entry, mask, dropout, weights):
    case = Case(score, mask, dropout=dropout, weights=weights)
    run = getattr(case, entry)(backend)
    close(run(*case.floats), case.exact(*case.floats))
    assert torch.autograd.gradcheck(run, case.floats, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, case.floats, fast_mode=True)


@every_backend
@every_score
def test_third_order(backend, score):
    case = Case(score, "both")

    def third(run):
        value = sum((out * out).sum() for out in run(*case.floats))
        for _ in range(2):
            grads = torch.autograd.grad(value, case.floats, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(value, case.floats)

    close(third(case.fused(backend)), third(case.exact))


@every_backend
def test_only_what_is_needed_gets_a_gradient(backend):
    case = Case("additive", "float")
    for k in range(len(case.floats)):
        floats = [t.detach().requires_grad_(j == k) for j, t in enumerate(case.floats)]
        case.fused(backend)(*floats)[0].square().sum().backward()
        exact = torch.autograd.grad(case.exact(*floats)[0].square().sum(), floats[k])[0]
        close(floats[k].grad, exact)
        assert all(t.grad is None for j, t in enumerate(floats) if j != k)


@every_backend
@every_score
def test_gradients_of_one_output_alone(backend, score):
    case = Case(score, "both")
    for k in (0, 1):
        ours, exact = (
            torch.autograd.grad(run(*case.floats)[k].square().sum(), case.floats, allow_unused=True)
            for run in (case.fused(backend), case.exact)
        )
        for a, b in zip(ours, exact):
            close(torch.zeros(()) if a is None or not a.any() else a, torch.zeros(()) if b is None else b)


@every_backend
@every_score
@pytest.mark.parametrize(("mask", "weights"), [("both", True), ("bool", False)])
def test_opcheck(backend, score, mask, weights):
    case = Case(score, mask, dropout=0.3, weights=weights)
    args = case.operator_args(backend, *case.floats)
    torch.library.opcheck(torch.ops.fusedrnn.attend.default, args)
    found = torch.ops.fusedrnn.attend(*case.operator_args(backend, *(t.detach() for t in case.floats)))
    context, *rest = found
    grad_weights = torch.ones_like(rest.pop(0)) if weights else None
    needs = [t is not None and t.is_floating_point() for t in case.inputs]
    torch.library.opcheck(
        torch.ops.fusedrnn.attend_backward.default,
        (torch.ones_like(context), grad_weights, *args[:10], context, rest, backend, needs),
    )


@every_backend
@every_score
def test_jvp_hessian_and_forward_mode(backend, score):
    case = Case(score, "both", dropout=0.3)
    run = case.fused(backend)
    floats = tuple(t.detach() for t in case.floats)
    tangents = tuple(torch.ones_like(t) for t in floats)
    expected = torch.func.jvp(case.exact, floats, tangents)
    close(torch.func.jvp(run, floats, tangents), expected)
    with forward_ad.dual_level():
        dual = run(*(forward_ad.make_dual(t, d) for t, d in zip(floats, tangents)))
        close(tuple(forward_ad.unpack_dual(out).tangent for out in dual), expected[1])

    def hessian(run):
        return torch.func.hessian(lambda q: run(q, *floats[1:])[0].square().sum())(floats[0])

    close(hessian(run), hessian(case.exact))


@every_backend
@every_score
def test_vmap_of_gradients_masks_and_lengths(backend, score):
    case = Case(score, "none", weights=False)
    floats = [t.detach() for t in case.floats]
    queries = torch.randn(4, *floats[0].shape, dtype=torch.float64)
    lengths = torch.randint(0, 6, (4, 2))
    masks = torch.rand(4, 1, 2, 1, 5) < 0.7

    def loss(run, query, length, mask):
        case.lengths, case.mask = length, mask
        return run(query, *floats[1:])[0].square().sum()

    def gradients(run):
        def one(query, length, mask):
            return torch.func.grad(lambda q: loss(run, q, length, mask))(query)

        return torch.func.vmap(one)(queries, lengths, masks)

    close(gradients(case.fused(backend)), gradients(case.exact))


# ---- compiled ----------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = fusedrnn.BahdanauAttention(5, 6, 7)
        self.out = torch.nn.Linear(6, 4)

    def forward(self, query: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
        context, weights = self.attention(query, memory, lengths, need_weights=True)
        return self.out(context).sum(-1) + weights.max(-1).values


def drawn(batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(0, keys + 1, (batch,))
    return torch.randn(batch, queries, 5), torch.randn(batch, keys, 6), lengths


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_compiled_whole_with_gradients(backend):
    torch._dynamo.reset()
    model = Decoder()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with fusedrnn.use_backend(backend):
        for sizes in ((2, 3, 4), (3, 5, 7)):
            args = drawn(*sizes)
            ours, eager = (
                [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]
                for out in (compiled(*args), model(*args))
            )
            torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_dropout(backend):
    torch._dynamo.reset()
    case = Case("additive", "none", weights=False)

    def run(*tensors: Tensor) -> Tensor:
        return fusedrnn.attend("additive", *tensors, dropout=0.5)[0]

    with fusedrnn.use_backend(backend):
        torch.manual_seed(0)
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*case.floats)
        torch.manual_seed(0)
        close(compiled, run(*case.floats))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_sizes(backend, strict):
    model = Decoder().eval()
    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys"))
    shapes = ({0: batch, 1: queries}, {0: batch, 1: keys}, {0: batch})
    with fusedrnn.use_backend(backend):
        program = torch.export.export(model, drawn(3, 4, 5), dynamic_shapes=shapes, strict=strict)
        assert any("fusedrnn.attend" in str(node.target) for node in program.graph.nodes)
        for sizes in ((3, 4, 5), (5, 2, 9)):
            args = drawn(*sizes)
            torch.testing.assert_close(program.module()(*args), model(*args))


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
