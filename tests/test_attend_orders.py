"""The attend: gradients of every order, transforms, opcheck, compile, export; on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from attending import BACKENDS, Case, close, every_backend, every_score
from torch import Tensor

import fusedrnn


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
        (torch.ones_like(context), grad_weights, *args[:10], rest, backend, needs),
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


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_dot_compiled_whole_with_every_size_dynamic(backend):
    torch._dynamo.reset()
    compiled = torch.compile(fusedrnn.attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with fusedrnn.use_backend(backend):
        for sizes in ((2, 1, 3, 4, 5, 6), (3, 2, 5, 7, 96, 9)):
            inputs = Case("dot", "none", sizes).floats
            torch.testing.assert_close(compiled("dot", *inputs), fusedrnn.attend("dot", *inputs))
            with torch.no_grad():
                torch.testing.assert_close(compiled("dot", *inputs), fusedrnn.attend("dot", *inputs))


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
