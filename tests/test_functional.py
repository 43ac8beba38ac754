"""fusedrnn.functional against torch._VF: signatures, values, randomness, and who runs what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import functional
from fusedrnn.backends import hand_over, select
from fusedrnn.testing import check

STACKS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
I, H, B, T = 3, 5, 4, 6


def weights(
    name: str, layers: int = 1, directions: int = 1, bias: bool = True, proj: int = 0
) -> list[Tensor]:
    rows, out = GATES[name] * H, proj or H
    found = []
    for k in range(layers):
        for _ in range(directions):
            found += [torch.randn(rows, I if k == 0 else directions * out), torch.randn(rows, out)]
            found += [torch.randn(rows), torch.randn(rows)] if bias else []
            found += [torch.randn(proj, H)] if proj else []
    return [0.3 * w for w in found]


def states(name: str, rows: int = 1, batch: int = B, proj: int = 0) -> Any:
    h = torch.randn(rows, batch, proj or H)
    return (h, torch.randn(rows, batch, H)) if name == "lstm" else h


def dense(name: str) -> tuple[Any, ...]:
    return torch.randn(T, B, I), states(name), weights(name), True, 1, 0.0, False, False, False


def packed(name: str) -> tuple[Any, ...]:
    data, sizes, _, _ = pack_padded_sequence(torch.randn(T, B, I), torch.tensor([6, 4, 4, 1]))
    return data, sizes, states(name), weights(name), True, 1, 0.0, False, False


def tree_map(tree: Any, function: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree) if tree.is_floating_point() else tree
    return type(tree)(tree_map(t, function) for t in tree) if isinstance(tree, (tuple, list)) else tree


def assert_same(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Ours within the budget of torch's, and the random state afterwards the same."""

    def run(function: Any, args: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        torch.manual_seed(3)
        out = function(*args)
        return out if isinstance(out, tuple) else (out,), torch.get_rng_state()

    own = getattr(_VF, name)
    ours, state = run(getattr(functional, name), args)
    theirs, own_state = run(own, args)

    def named(tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return {f"{name}[{i}]": t for i, t in enumerate(tensors)}

    result = check(named(ours), named(theirs), lambda: named(run(own, tree_map(args, Tensor.double))[0]))
    assert result.ok, result
    assert [t.stride() for t in ours] == [t.stride() for t in theirs]
    assert torch.equal(state, own_state)
    return ours


@pytest.mark.parametrize("name", STACKS)
def test_dense_signature(name: str) -> None:
    torch.manual_seed(0)
    assert_same(name, dense(name))


@pytest.mark.parametrize("name", STACKS)
def test_packed_signature(name: str) -> None:
    torch.manual_seed(0)
    assert_same(name, packed(name))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_layers_directions_and_dropout(name: str, batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    input = torch.randn(B, T, I) if batch_first else torch.randn(T, B, I)
    args = (states(name, 6), weights(name, 3, 2, bias), bias, 3, 0.4, True, True, batch_first)
    ours = assert_same(name, (input, *args))
    assert all(s.is_contiguous() for s in ours[1:])


@pytest.mark.parametrize("name", STACKS)
def test_packed_layers_directions_and_dropout(name: str) -> None:
    torch.manual_seed(0)
    data, sizes, *_ = packed(name)
    assert_same(name, (data, sizes, states(name, 6), weights(name, 3, 2), True, 3, 0.4, True, True))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_its_ends(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(T, B, I)
    assert_same("gru", (x, states("gru", 2), weights("gru", 2), True, 2, p, True, False, False))


def test_projection() -> None:
    torch.manual_seed(0)
    x, hx = torch.randn(T, B, I), states("lstm", 4, proj=2)
    assert_same("lstm", (x, hx, weights("lstm", 2, 2, proj=2), True, 2, 0.0, False, True, False))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_cells(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    hx = states(name)
    hx = tuple(s[0] for s in hx) if name == "lstm" else hx[0]
    own = weights(name, bias=bias) + ([] if bias else [None, None])
    assert_same(f"{name}_cell", (torch.randn(B, I), hx, *own))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", STACKS)
def test_last_states_share_no_memory_with_the_output(name: str, layers: int) -> None:
    x = torch.randn(1, B, I)
    args = (states(name, layers), weights(name, layers), True, layers, 0.0, False, False, False)
    outs = getattr(functional, name)(x, *args)
    assert len({o.untyped_storage().data_ptr() for o in outs}) == len(outs)


# ---- autocast: one rule ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("name", STACKS)
def test_autocast_computes_and_returns_its_dtype(name: str, make: Any) -> None:
    args = make(name)
    with torch.autocast("cpu", torch.bfloat16):
        outs = getattr(functional, name)(*args)
    expected = getattr(functional, name)(*tree_map(args, Tensor.bfloat16))
    for out, want in zip(outs, expected):
        assert out.dtype is torch.bfloat16
        torch.testing.assert_close(out, want, rtol=0, atol=0)


@pytest.mark.usefixtures("fused")
def test_autocast_cell_and_gradients() -> None:
    w = [p.requires_grad_() for p in weights("lstm")]
    hx = (torch.zeros(B, H), torch.zeros(B, H))
    with torch.autocast("cpu", torch.bfloat16):
        h, c = functional.lstm_cell(torch.randn(B, I), hx, *w)
    assert h.dtype is c.dtype is torch.bfloat16
    (h.sum() + c.sum()).backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in w)


def test_autocast_leaves_fp64_alone() -> None:
    args = tree_map(dense("gru"), Tensor.double)
    with torch.autocast("cpu", torch.bfloat16):
        outs = functional.gru(*args)
    assert outs[0].dtype is torch.float64


# ---- who runs what -----------------------------------------------------------------------------


class Subclass(Tensor):
    pass


def complex_args() -> tuple[Any, ...]:
    return tree_map(dense("gru"), lambda t: t.to(torch.complex64))


def subclass_args() -> tuple[Any, ...]:
    x, *rest = dense("gru")
    return (x.as_subclass(Subclass), *rest)


def meta_args() -> tuple[Any, ...]:
    return tree_map(dense("gru"), lambda t: t.to("meta"))


def negated_args() -> tuple[Any, ...]:
    x, *rest = dense("gru")
    return (torch._neg_view(x), *rest)


@pytest.fixture
def no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("ops.layer was called")

    monkeypatch.setattr(functional.ops, "layer", refuse)


@pytest.mark.usefixtures("no_layer")
class TestTorchRuns:
    @pytest.mark.parametrize("make", [complex_args, subclass_args, meta_args, negated_args])
    def test_what_no_backend_knows(self, make: Any) -> None:
        args = make()
        ours, theirs = functional.gru(*args), _VF.gru(*args)
        assert type(ours[0]) is type(theirs[0])
        if not ours[0].is_meta:
            torch.testing.assert_close(ours[0], theirs[0])

    @pytest.mark.parametrize("make", [complex_args, subclass_args, meta_args])
    def test_but_an_explicit_request_never_falls_back(self, make: Any) -> None:
        with (
            fusedrnn.use_backend("reference"),
            pytest.raises(fusedrnn.BackendError, match="'reference' was asked for"),
        ):
            functional.gru(*make())

    def test_on_request(self) -> None:
        args = dense("lstm")
        with fusedrnn.use_backend("torch"):
            ours = functional.lstm(*args)
        assert all(torch.equal(a, b) for a, b in zip(ours, _VF.lstm(*args)))

    def test_where_it_is_faster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(hand_over, "reason", lambda *a, **_: asked.append(a) or "measured")
        functional.lstm(*dense("lstm"))
        functional.gru(*packed("gru"))
        functional.gru_cell(torch.randn(B, I).requires_grad_(), torch.randn(B, H), *weights("gru"))
        assert asked == [
            ("lstm", "cpu", torch.float32, T, B, H, False),
            ("gru", "cpu", torch.float32, T, B, H, False),
            ("gru_cell", "cpu", torch.float32, 1, B, H, True, None),
        ]

    def test_under_jit_trace(self) -> None:
        args = dense("gru")
        traced = torch.jit.trace(lambda x: functional.gru(x, *args[1:])[0], (args[0],), check_trace=False)
        assert "aten::gru" in str(traced.graph)

    def test_its_errors(self) -> None:
        x, h, w, *rest = dense("gru")
        bad = {
            "no step": (x[:0], h, w, *rest),
            "input width": (x[..., :2], h, w, *rest),
            "batch": (x, h[:, :2], w, *rest),
            "state width": (x, h[..., :2], w, *rest),
            "a weight short": (x, h, w[:3], *rest),
            "weight shape": (x, h, [w[0], w[1][:, :2], *w[2:]], *rest),
            "integers": (x.long(), h, w, *rest),
            "sparse": (x.to_sparse(), h, w, *rest),
            "dtypes": (x.double(), h, w, *rest),
            "devices": (x, h.to("meta"), w, *rest),
            "no tensor": (None, h, w, *rest),
            "no weights": (x, h, None, *rest),
            "a weight is None": (x, h, [None, *w[1:]], *rest),
            "no states": (x, (), w, *rest),
            "arguments": (x, h, w),
            "state": (x, (h, h), w, *rest),
            "one dimension": (x[0, 0], h, w, *rest),
        }
        for what, args in bad.items():
            with pytest.raises(Exception) as theirs:  # noqa: PT011 - whatever torch raises
                _VF.gru(*args)
            with pytest.raises(type(theirs.value)) as ours:
                functional.gru(*args)
            assert str(ours.value) == str(theirs.value), what

    @pytest.mark.parametrize(
        "sizes", [[4, 3, 2, 2, 2, 2, 9], [2, 3, 3, 3, 2, 2], [5, 3, 3, 3, 1], [4, 4, 4, 3, 0]]
    )
    def test_on_malformed_batch_sizes(self, sizes: list[int]) -> None:
        data, _, hx, w, *rest = packed("lstm")
        args = (data, torch.tensor(sizes, dtype=torch.int64), hx, w, *rest)
        outcomes = []
        for function in (functional.lstm, _VF.lstm):
            try:
                outcomes.append([t.shape for t in function(*args)])
            except (RuntimeError, ValueError, IndexError) as error:
                outcomes.append((type(error), str(error)))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("how", ["requested", "compiled"])
def test_speed_is_not_asked_about_when(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("hand_over.reason was called")

    monkeypatch.setattr(hand_over, "reason", refuse)
    args = dense("gru")
    if how == "requested":
        with fusedrnn.use_backend("reference"):
            functional.gru(*args)
    else:
        torch.compile(lambda x: functional.gru(x, *args[1:]), backend="eager", fullgraph=True)(args[0])


def test_a_compiled_graph_depends_on_the_requested_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    choose = select.choose
    monkeypatch.setattr(select, "choose", lambda request: seen.append(request) or choose(request))
    args = dense("gru")
    compiled = torch.compile(lambda x: functional.gru(x, *args[1:]), backend="eager", fullgraph=True)
    compiled(args[0])
    compiled(args[0])
    assert len(seen) == 1
    with fusedrnn.use_backend("reference"):
        compiled(args[0])
    assert len(seen) == 2


# ---- function transforms -----------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKS)
def test_vmap(name: str) -> None:
    _, *rest = dense(name)
    xs = torch.randn(3, T, B, I)
    function = getattr(functional, name)
    mapped = torch.vmap(lambda x: function(x, *rest))(xs)
    for i, x in enumerate(xs):
        for ours, alone in zip(mapped, function(x, *rest)):
            torch.testing.assert_close(ours[i], alone)


@pytest.mark.parametrize("name", STACKS)
def test_jvp_is_the_transpose_of_vjp(name: str) -> None:
    x, *rest = tree_map(dense(name), Tensor.double)

    def output(x: Tensor) -> Tensor:
        return getattr(functional, name)(x, *rest)[0]

    tangent, cotangent = torch.randn_like(x), torch.randn(T, B, H, dtype=torch.float64)
    _, forward = torch.func.jvp(output, (x,), (tangent,))
    (backward,) = torch.func.vjp(output, x)[1](cotangent)
    torch.testing.assert_close((forward * cotangent).sum(), (backward * tangent).sum())


def test_grad_of_grad() -> None:
    w = [p.double() for p in weights("gru")]
    x, h = torch.randn(2, 1, I, dtype=torch.float64), states("gru", batch=1).double()
    rest = (True, 1, 0.0, False, False, False)

    def loss(x: Tensor) -> Tensor:
        return functional.gru(x, h, w, *rest)[0].square().sum()

    hessian = torch.func.hessian(loss)(x)
    expected = torch.autograd.functional.hessian(lambda x: _VF.gru(x, h, w, *rest)[0].square().sum(), x)
    torch.testing.assert_close(hessian, expected)


def test_per_sample_gradients() -> None:
    module = fusedrnn.LSTM(I, H).double()
    parameters = {k: p.detach() for k, p in module.named_parameters()}
    xs = torch.randn(3, T, I, dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, xs)
    stock = nn.LSTM(I, H).double()
    stock.load_state_dict(module.state_dict())
    for i, x in enumerate(xs):
        stock.zero_grad()
        stock(x)[0].square().sum().backward()
        for key, p in stock.named_parameters():
            torch.testing.assert_close(per_sample[key][i], p.grad)
