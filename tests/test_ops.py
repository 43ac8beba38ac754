"""The operator: gradients of every order, transforms, opcheck; on every backend that is here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.backends import select
from fusedrnn.backends.reference import layer as reference
from fusedrnn.cells import CELLS

T, B, I, H = 3, 2, 3, 4
ON_CPU = select.Request("lstm", torch.float32, "cpu")
BACKENDS = [name for name in select.ORDER if select.against(name, ON_CPU) is None]
CASES = [
    pytest.param(cell, directions, proj, bias, ragged, "resets" in label, id=label)
    for label, cell, directions, proj, bias, ragged in (
        ("rnn_tanh", "rnn_tanh", 1, None, True, False),
        ("rnn_relu-2", "rnn_relu", 2, None, True, False),
        ("lstm", "lstm", 1, None, True, False),
        ("lstm-2-ragged", "lstm", 2, None, True, True),
        ("lstm-nobias-proj", "lstm", 1, 2, False, False),
        ("lstm-2-proj-ragged", "lstm", 2, 3, True, True),
        ("gru-2", "gru", 2, None, True, False),
        ("gru-nobias-ragged", "gru", 1, None, False, True),
        ("lstm-proj-ragged-resets", "lstm", 1, 3, False, True),
        ("gru-2-resets", "gru", 2, None, False, False),
    )
]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


class Case:
    """One layer call in fp64 as a function of its differentiable tensors."""

    def __init__(
        self,
        backend: str,
        cell: str,
        directions: int,
        proj: int | None,
        bias: bool,
        ragged: bool,
        resets: bool = False,
    ):
        generator = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            return (torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.5).requires_grad_()

        spec, out = CELLS[cell], proj or H
        g = len(spec.gates)
        self.cell, self.directions, self.backend = cell, directions, backend
        self.batch_sizes = torch.tensor([2, 2, 1]) if ragged else None
        self.weights: list[Tensor] = []
        for _ in range(directions):
            self.weights += [make(g * H, I), make(g * H, out)]
            self.weights += [make(g * H), make(g * H)] if bias else []
            self.weights += [make(out, H)] if proj else []
        self.states = [make(directions, B, out if k == 0 else H) for k in range(len(spec.states))]
        self.input = make(5, I) if ragged else make(T, B, I)
        self.tensors = (self.input, *self.weights, *self.states)
        rows = self.input[..., 0].numel()
        self.resets = torch.rand(directions, rows, generator=generator) < 0.4 if resets else None

    def split(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        n = 1 + len(self.weights)
        return tensors[0], list(tensors[1:n]), list(tensors[n:])

    def fused(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, weights, states = self.split(tensors)
        output, last = ops.layer(
            input, self.batch_sizes, weights, states, self.cell, self.directions, self.backend, self.resets
        )
        return (output, *last)

    def operator(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.fusedrnn.layer(*self.operator_args(*tensors)))[: 1 + len(self.states)]

    def operator_args(self, *tensors: Tensor) -> tuple:
        input, weights, states = self.split(tensors)
        return (
            input, self.batch_sizes, weights, states, self.cell, self.directions, True, self.backend,
            self.resets,
        )  # fmt: skip

    def exact(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        input, weights, states = self.split(tensors)
        output, last = reference.layer(
            self.cell, input, self.batch_sizes, weights, states, self.directions, self.resets
        )
        return (output, *last)

    def scalar(self, run, *tensors: Tensor) -> Tensor:
        return sum((k + 1) * out.square().sum() for k, out in enumerate(run(*tensors)))


@pytest.fixture
def case(request, backend) -> Case:
    return Case(backend, *request.param)


every_case = pytest.mark.parametrize("case", [pytest.param(p.values, id=p.id) for p in CASES], indirect=True)
one_lstm = pytest.mark.parametrize("case", [("lstm", 2, None, True, False)], ids=["lstm"], indirect=True)
plain_cases = pytest.mark.parametrize(
    "case", [(c, 1, None, True, False) for c in CELLS], ids=list(CELLS), indirect=True
)


def close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@every_case
@pytest.mark.parametrize("entry", ["fused", "operator"])
def test_gradcheck_and_gradgradcheck(case, entry):
    run = getattr(case, entry)
    close(run(*case.tensors), case.exact(*case.tensors))
    assert torch.autograd.gradcheck(run, case.tensors)
    assert torch.autograd.gradgradcheck(run, case.tensors)


@one_lstm
def test_third_order(case):
    def third(run):
        value = case.scalar(run, *case.tensors)
        for _ in range(2):
            grads = torch.autograd.grad(value, case.tensors, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(value, case.tensors)

    close(third(case.fused), third(case.exact))


@one_lstm
def test_second_order_through_an_input_that_depends_on_the_weights(case):
    def second(run):
        value = case.scalar(run, case.input * case.weights[0].sum(), *case.tensors[1:])
        grads = torch.autograd.grad(value, case.tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), case.tensors)

    close(second(case.fused), second(case.exact))


@every_case
def test_opcheck(case):
    torch.library.opcheck(torch.ops.fusedrnn.layer.default, case.operator_args(*case.tensors))
    detached = [t.detach() for t in case.tensors]
    flat = torch.ops.fusedrnn.layer(*case.operator_args(*detached))
    n = 1 + len(case.states)
    # Compiled graphs have no second order over ragged rows: the composite reads batch_sizes.
    input, weights, states = case.split(detached if case.batch_sizes is not None else case.tensors)
    grads = [torch.ones_like(t) for t in flat[:n]]
    torch.library.opcheck(
        torch.ops.fusedrnn.layer_backward.default,
        (grads[0], grads[1:], input, case.batch_sizes, weights, states, flat[0], list(flat[n:]),
         case.cell, case.directions, case.backend, [True] * len(case.tensors), case.resets),
    )  # fmt: skip


@plain_cases
def test_jvp_and_hessian(case):
    detached = tuple(t.detach() for t in case.tensors)
    tangents = tuple(torch.ones_like(t) for t in detached)
    close(torch.func.jvp(case.fused, detached, tangents), torch.func.jvp(case.exact, detached, tangents))

    def hessian(run):
        return torch.func.hessian(lambda w: case.scalar(run, *detached[:2], w, *detached[3:]))(detached[2])

    close(hessian(case.fused), hessian(case.exact))


@plain_cases
def test_forward_mode_is_never_silently_zero(case):
    import torch.autograd.forward_ad as forward_ad

    def tangent_of(run):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(case.input.detach(), torch.ones_like(case.input))
            out = run(dual, *case.tensors[1:])[0]
            return forward_ad.unpack_dual(out).tangent

    close(tangent_of(case.fused), tangent_of(case.exact))


@plain_cases
def test_per_sample_gradients(case):
    detached = tuple(t.detach() for t in case.tensors)
    samples = torch.randn(5, T, 1, I, dtype=torch.float64)
    n = 1 + len(case.weights)
    one_state = [s[:, :1] for s in detached[n:]]

    def per_sample(run):
        def loss(weights, x):
            return case.scalar(run, x, *weights, *one_state)

        return torch.func.vmap(torch.func.grad(loss), (None, 0))(list(detached[1:n]), samples)

    close(per_sample(case.fused), per_sample(case.exact))


@one_lstm
def test_vmap_over_weights_is_an_ensemble(case):
    detached = tuple(t.detach() for t in case.tensors)
    stacked = tuple(torch.stack([t, 2 * t]) for t in detached)
    ours = torch.func.vmap(case.fused)(*stacked)
    for k in range(2):
        close(tuple(o[k] for o in ours), case.exact(*(t[k] for t in stacked)))


@every_case
def test_only_what_is_needed_gets_a_gradient(case):
    for k in range(len(case.tensors)):
        tensors = tuple(t.detach().requires_grad_(j == k) for j, t in enumerate(case.tensors))
        case.scalar(case.fused, *tensors).backward()
        exact = torch.autograd.grad(case.scalar(case.exact, *tensors), tensors[k])[0]
        close(tensors[k].grad, exact)
        assert all(t.grad is None for j, t in enumerate(tensors) if j != k)


@every_case
def test_gradients_of_one_output_alone(case):
    for k in range(1 + len(case.states)):
        ours = torch.autograd.grad(case.fused(*case.tensors)[k].sum(), case.tensors, allow_unused=True)
        exact = torch.autograd.grad(case.exact(*case.tensors)[k].sum(), case.tensors, allow_unused=True)
        zero = [torch.zeros_like(t) for t in case.tensors]
        close(
            [z if o is None else o for o, z in zip(ours, zero)],
            [z if e is None else e for e, z in zip(exact, zero)],
        )


@one_lstm
def test_backward_twice_and_checkpoint(case):
    out = case.scalar(case.fused, *case.tensors)
    first = torch.autograd.grad(out, case.tensors, retain_graph=True)
    close(torch.autograd.grad(out, case.tensors), first)
    again = torch.utils.checkpoint.checkpoint(
        lambda *tensors: case.scalar(case.fused, *tensors), *case.tensors, use_reentrant=False
    )
    close(torch.autograd.grad(again, case.tensors), first)


@one_lstm
def test_a_weight_changed_between_forward_and_backward_is_an_error(case):
    out = case.scalar(case.fused, *case.tensors)
    with torch.no_grad():
        case.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@every_case
def test_outputs_do_not_alias(case):
    with torch.no_grad():
        outs = case.fused(*case.tensors)
    pointers = [t.untyped_storage().data_ptr() for t in (*outs, *case.tensors)]
    assert len(set(pointers)) == len(pointers)


@one_lstm
def test_backward_inside_autocast_keeps_its_dtype(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grads = torch.autograd.grad(case.scalar(case.fused, *case.tensors), case.tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), case.tensors)
    exact = torch.autograd.grad(case.scalar(case.exact, *case.tensors), case.tensors, create_graph=True)
    close(grads, exact)
    close(second, torch.autograd.grad(sum(g.square().sum() for g in exact), case.tensors))


def test_backward_inside_autocast_in_fp32(backend):
    case = Case(backend, "gru", 1, None, True, False)
    tensors = tuple(t.detach().float().requires_grad_() for t in case.tensors)
    out = case.scalar(case.fused, *tensors)
    plain = torch.autograd.grad(out, tensors, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, tensors)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


@one_lstm
def test_a_lazily_negated_gradient(case):
    outs = case.fused(*case.tensors)
    pull = torch.complex(torch.zeros_like(outs[0]), torch.ones_like(outs[0])).conj().imag
    assert pull.is_neg()
    ours = torch.autograd.grad(outs[0], case.tensors, pull, allow_unused=True)
    exact = torch.autograd.grad(case.exact(*case.tensors)[0], case.tensors, -torch.ones_like(outs[0]))
    close(ours, exact)
