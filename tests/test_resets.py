"""`resets`: a sequence of several pieces equals the pieces run one by one, on every backend of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import LEVELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pieces import draw, in_pieces, resetting
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn import functional
from fusedrnn.backends import native, select
from fusedrnn.testing import assert_parity

STACKS = ["RNN", "LSTM", "GRU"]
BACKENDS = ["reference"] + ["native"] * bool(LEVELS)


def assert_same(module: nn.Module, inputs: Any, **options: Any) -> None:
    assert_parity(resetting(module), in_pieces(module), inputs, **options)


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fusedrnn.use_backend(request.param):
        yield request.param


# ---- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [4, 3, 3, 1], [2, 4, 1, 4]])
@pytest.mark.parametrize(
    "kw",
    [
        {"bias": False},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bidirectional": True, "dtype": torch.float64},
        {"bidirectional": True, "dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", STACKS)
def test_pieces(name, kw, lengths):
    module = getattr(fusedrnn, name)(3, 5, **kw)
    assert_same(module, draw(module, 0.4, time=4, batch=4, lengths=lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [None, [2, 4, 1, 4]])
def test_projection(lengths, dtype):
    for kw in ({}, {"num_layers": 2, "bidirectional": True, "bias": False}):
        module = fusedrnn.LSTM(3, 9, proj_size=4, dtype=dtype, **kw)
        assert_same(module, draw(module, 0.4, time=4, batch=4, lengths=lengths))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", STACKS)
def test_unbatched(name, batch_first):
    module = getattr(fusedrnn, name)(3, 5, bidirectional=True, batch_first=batch_first)
    x, hx = torch.randn(6, 3), torch.randn(2, 5)
    resets = torch.tensor([0, 1, 0, 0, 1, 0]).bool()
    assert_same(module, (x, (hx, hx.neg()) if name == "LSTM" else hx, resets))


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("name", STACKS)
def test_one_step(name, time):
    for hidden in (1, 33):
        module = getattr(fusedrnn, name)(3, hidden)
        assert_same(module, draw(module, 0.5, time=time, batch=5))


def test_second_order():
    module = fusedrnn.GRU(3, 4, bidirectional=True, dtype=torch.float64)
    assert_same(module, draw(module, 0.4, time=4, batch=3), second_order=True)


@pytest.mark.parametrize("batch", [3, 24])
@pytest.mark.parametrize("name", STACKS)
def test_threads_that_share_units_or_rows(name, batch):
    torch.set_num_threads(2)
    for kw in ({}, {"bidirectional": True}, {"proj_size": 40} if name == "LSTM" else {"bias": False}):
        module = getattr(fusedrnn, name)(8, 96, **kw)
        assert_same(module, draw(module, 0.2, time=6, batch=batch))


@pytest.mark.parametrize("level", LEVELS or [""])
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_resets(level, data, backend):
    name = data.draw(st.sampled_from(STACKS))
    kw: dict[str, Any] = {
        "num_layers": data.draw(st.integers(1, 2)),
        "bidirectional": data.draw(st.booleans()),
        "dtype": data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
    }
    hidden = data.draw(st.sampled_from([1, 7, 16, 20]))
    if name == "LSTM" and hidden > 1 and data.draw(st.booleans()):
        kw["proj_size"] = data.draw(st.integers(1, hidden - 1))
    module = getattr(fusedrnn, name)(3, hidden, **kw)
    lengths = data.draw(st.none() | st.lists(st.integers(1, 5), min_size=1, max_size=5))
    inputs = draw(
        module,
        data.draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        time=data.draw(st.integers(1, 5)),
        batch=data.draw(st.integers(1, 5)),
        lengths=lengths,
        seed=data.draw(st.integers(0, 99)),
    )
    if backend == "native":
        native._C.set_isa(level)
    try:
        assert_same(module, inputs)
    finally:
        if backend == "native":
            native._C.set_isa("")


@pytest.mark.parametrize("name", STACKS)
def test_nothing_leaks_from_piece_to_piece(name):
    """Not even what is not a number."""
    module = getattr(fusedrnn, name)(3, 5, bidirectional=True)
    x, hx, resets = draw(module, 0.0, time=6, batch=2)
    resets[0] = resets[2, 0] = resets[4, 0] = True
    x[2:4, 0] = torch.nan
    if name == "LSTM":
        hx = tuple(s.clone() for s in hx)
    for state in hx if name == "LSTM" else [hx]:
        state[0] = torch.inf
    x.requires_grad_()
    output, _ = module(x, hx, resets=resets)
    assert output[2:4, 0].isnan().all()
    assert output[[0, 1, 4, 5], 0].isfinite().all()
    (found,) = torch.autograd.grad(output[[0, 1, 4, 5], 0].sum() + output[:, 1].sum(), x)
    assert found[[0, 1, 4, 5], 0].isfinite().all()
    assert found[:, 1].isfinite().all()


def test_dropout_and_autocast_are_as_without():
    module = fusedrnn.LSTM(3, 5, num_layers=2, dropout=0.5)
    x, resets = torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.bool)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(0)
            expected = module(x)
            torch.manual_seed(0)
            found = module(x, resets=resets)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_state():
    module = fusedrnn.LSTM(3, 5, proj_size=2, bidirectional=True)
    x, resets = torch.randn(4, 2, 3), torch.rand(4, 2) < 0.5
    expected = module(x, (torch.zeros(2, 2, 2), torch.zeros(2, 2, 5)), resets=resets)
    torch.testing.assert_close(module(x, resets=resets), expected, rtol=0, atol=0)
    packed = [pack_padded_sequence(t, [4, 3]) for t in (x, resets)]
    found, (h, c) = module(packed[0], resets=packed[1])
    output, lengths = pad_packed_sequence(found)
    torch.testing.assert_close(output[:, 0], expected[0][:, 0])
    assert lengths.tolist() == [4, 3]
    assert h.shape == (2, 2, 2)
    assert c.shape == (2, 2, 5)


# ---- entries -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, [2, 4, 3]])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_compile(name, lengths):
    module = getattr(fusedrnn, name)(3, 5, bidirectional=True)
    compiled = resetting(module)
    compiled.compile(fullgraph=True, backend="aot_eager")
    assert_parity(compiled, in_pieces(module), draw(module, 0.4, time=4, batch=2, lengths=lengths))


def test_export_of_any_length():
    module = fusedrnn.GRU(3, 4, batch_first=True, bidirectional=True)

    class Model(nn.Module):
        def forward(self, x, resets):
            return module(x, resets=resets)[0]

    dims = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("T", min=2, max=64)}
    x, resets = torch.randn(2, 6, 3), torch.rand(2, 6) < 0.4
    program = torch.export.export(Model(), (x, resets), dynamic_shapes={"x": dims, "resets": dims})
    x, resets = torch.randn(3, 9, 3), torch.rand(3, 9) < 0.4
    torch.testing.assert_close(program.module()(x, resets), Model()(x, resets))


def test_transforms():
    module = fusedrnn.GRU(3, 4, bidirectional=True, dtype=torch.float64)
    x, resets = torch.randn(5, 4, 2, 3, dtype=torch.float64), torch.rand(5, 4, 2) < 0.4

    def run(x, resets):
        return module(x, resets=resets)[0]

    expected = torch.stack([run(x[i], resets[i]) for i in range(5)])
    torch.testing.assert_close(torch.func.vmap(run)(x, resets), expected)
    torch.testing.assert_close(torch.func.vmap(run, (0, None))(x, resets[0])[0], expected[0])
    _, found = torch.func.jvp(lambda x: run(x, resets[0]), (x[0],), (torch.ones_like(x[0]),))
    rows = torch.func.jacrev(lambda x: run(x, resets[0]))(x[0]).sum((-3, -2, -1))
    torch.testing.assert_close(found, rows)


# ---- what is refused ---------------------------------------------------------------------------


def test_errors():
    module = fusedrnn.LSTM(3, 5)
    x, resets = torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="resets: expected a bool tensor, got list"):
        module(x, resets=[[True]])
    with pytest.raises(ValueError, match=r"resets: expected torch.bool, got torch.uint8"):
        module(x, resets=resets.byte())
    with pytest.raises(RuntimeError, match=r"resets: expected shape \(4, 2\), got \(2, 4\)"):
        module(x, resets=resets.t())
    with pytest.raises(RuntimeError, match=r"resets: expected shape \(2, 4\), got \(4, 2\)"):
        fusedrnn.GRU(3, 5, batch_first=True)(x.transpose(0, 1), resets=resets)
    with pytest.raises(RuntimeError, match="resets: expected the input's device cpu, got meta"):
        module(x, resets=resets.to("meta"))
    packed = pack_padded_sequence(x, [4, 2])
    with pytest.raises(TypeError, match="resets: expected a PackedSequence as the input is, got Tensor"):
        module(packed, resets=resets)
    with pytest.raises(RuntimeError, match="resets: expected to be packed by the input's lengths"):
        module(packed, resets=pack_padded_sequence(resets, [4, 3]))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        module(torch.randn(4, 2, 7), resets=resets)


def test_torch_itself_is_never_chosen(backend):
    module = fusedrnn.RNN(3, 4)
    x, resets = torch.randn(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    with fusedrnn.use_backend(None):
        assert fusedrnn.explain(module, x).backend == "torch"
        with torch.no_grad():
            choice = fusedrnn.explain(module, x, resets=resets)
            assert choice.backend in BACKENDS
            assert choice.why_not["torch"] == "torch.nn has no resets in mid-sequence"
            module(x, resets=resets)
        hx = torch.randn(1, 2, 4)
        with pytest.raises(select.BackendError, match=r"no resets.*torch.jit.trace records"):
            torch.jit.trace(resetting(module), (x, hx, resets), check_trace=False)
    with (
        fusedrnn.use_backend("torch"),
        pytest.raises(select.BackendError, match=r"cannot run this: torch\.nn has no resets"),
    ):
        module(x, resets=resets)
    stack = (list(module.parameters()), True, 1, 0.0, False, False, False)
    with pytest.raises(select.BackendError, match="no other can run this call: a state has the wrong shape"):
        functional.rnn_tanh(x, torch.zeros(1, 3, 4), *stack, resets=resets)
