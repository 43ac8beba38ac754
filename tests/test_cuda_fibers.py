"""The CUDA kernels' own sources on the CPU, over fibers: parity, races, and what a launch refuses."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
from fusedrnn.backends import select
from fusedrnn.backends.reference import layer as reference
from fusedrnn.budget import check
from fusedrnn.testing import assert_parity, draw_inputs, stock

pytest.importorskip("triton")
pytest.importorskip("greenlet")

from interpreter import INTERPRETED

from fusedrnn.backends.triton import layer
from fusedrnn.cells import CELLS as STEPS

fibers = pytest.importorskip("fibers")
from fibers import ORDERS, RACES, SCHEDULES, ScanError, on_fibers  # noqa: E402

pytestmark = pytest.mark.skipif(
    not INTERPRETED or fibers.missing() is not None,
    reason=fibers.missing() or "the products around the scan are on the GPU",
)

CELLS = {
    "rnn_tanh": (fusedrnn.RNN, {}),
    "rnn_relu": (fusedrnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (fusedrnn.LSTM, {}),
    "gru": (fusedrnn.GRU, {}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# hidden, batch, time, lengths: less than a tile and more, whole chunks and odd ends
SIZES = [
    (1, 9, 2, None),
    (16, 1, 12, None),
    (17, 3, 3, [3, 1, 2]),
    (40, 9, 3, [3, 3, 2, 2, 2, 1, 1, 1, 1]),
    (64, 2, 5, None),
    (128, 2, 2, [2, 1]),
]


@pytest.fixture(autouse=True)
def behind_triton(monkeypatch):
    """Every call on the Triton backend, also on the CPU, and fp32 exact."""
    monkeypatch.setattr(layer, "no_kernel", lambda dtype, device_type: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    select._table.cache_clear()
    with fusedrnn.use_backend("triton"):
        yield
    select._table.cache_clear()


def make(cell, inputs, hidden, dtype=torch.float32, **options):
    cls, fixed = CELLS[cell]
    torch.manual_seed(hidden)
    return cls(inputs, hidden, **fixed, **options).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, schedule, dtype):
    for hidden, batch, time, lengths in SIZES:
        module = make(cell, 5, hidden, DTYPES[dtype], bidirectional=hidden % 2 == 1, bias=hidden != 40)
        inputs = draw_inputs(module, time=time, batch=batch, lengths=lengths)
        with on_fibers(schedule, shared=256 << 10) as ran:
            assert_parity(module, inputs=inputs)
        assert ran == ["forward", "backward"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_few_multiprocessors(cell, schedule):
    """Tiles of more rows and of more units: several of either in a block."""
    module = make(cell, 3, 40, torch.bfloat16, bidirectional=True)
    for batch, multiprocessors in ((17, 8), (9, 4), (3, 4)):
        inputs = draw_inputs(module, lengths=[1 + b % 3 for b in range(batch)])
        with on_fibers(schedule, multiprocessors=multiprocessors):
            assert_parity(module, inputs=inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_weights_in_shared_memory(cell):
    """More than the registers hold: of an LSTM in fp32 16 units."""
    module = make(cell, 3, 100)
    with on_fibers("cta", shared=256 << 10):
        assert_parity(module, inputs=draw_inputs(module, time=2, batch=1))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_any_order(schedule, order):
    for cell, dtype in (("lstm", torch.bfloat16), ("gru", torch.float32)):
        module = make(cell, 5, 40, dtype, bidirectional=True)
        inputs = draw_inputs(module, lengths=[5, 2, 4])
        with on_fibers(schedule, order=order, seed=3):
            assert_parity(module, inputs=inputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_resets(cell, schedule):
    """A state that is zeroed in mid-sequence, against the same sequence in calls of the reference."""
    module = make(cell, 5, 17)
    weights = [p.detach() for p in module.parameters()]
    count = len(STEPS[cell].states)
    x = torch.randn(5, 3, 5)
    states = [torch.randn(1, 3, 17) for _ in range(count)]
    resets = torch.zeros(5, 3, dtype=torch.uint8)
    resets[0, 1] = resets[2] = resets[4, 0] = 1
    pull = [torch.randint(-4, 5, (5, 3, 17)).float()]
    pull += [torch.randint(-4, 5, s.shape).float() for s in states]

    def named(tensors):
        return dict(zip(["output", "last_h", "last_c"][: 1 + count], tensors)) | {
            f"grad {i}": g for i, g in enumerate(tensors[1 + count :])
        }

    def oracle(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, *weights, *states)]
        now, outputs = leaves[1 + len(weights) :], []
        for t in range(5):
            keep = (resets[t] == 0).to(dtype)[None, :, None]
            now = [s * keep for s in now]
            out, now = reference.layer(cell, leaves[0][t : t + 1], None, leaves[1 : 1 + len(weights)], now, 1)
            outputs.append(out)
        made = [torch.cat(outputs), *now]
        grads = torch.autograd.grad(made, leaves, [p.to(dtype) for p in pull])
        return named([*(t.detach() for t in made), *grads])

    flat = resets.view(-1)
    with on_fibers(schedule, order="lagging"):
        output, last, saved = layer.forward(cell, x, None, weights, states, 1, 1, flat)
        needs = (True, [True] * len(weights), [True] * count)
        of_x, of_weights, of_states = layer.backward(
            cell, x, None, weights, states, 1, output, saved, pull[0], pull[1:], needs, flat
        )
    ours = named([output, *last, of_x, *of_weights, *of_states])
    result = check(ours, oracle(torch.float32), lambda: oracle(torch.float64))
    assert result.ok, str(result)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_of_the_last_states_alone(schedule):
    module = make("lstm", 5, 17)
    x = torch.randn(4, 3, 5)

    def run(module, dtype):
        leaf = x.to(dtype).requires_grad_()
        _, last = module(leaf)
        return {"x": torch.autograd.grad(last[0].sum() + last[1].sum(), leaf)[0]}

    with on_fibers(schedule):
        ours = run(module, torch.float32)
    with fusedrnn.use_backend("torch"):
        result = check(
            ours, run(stock(module), torch.float32), lambda: run(stock(module).double(), torch.float64)
        )
    assert result.ok, str(result)


def to_tf32(x):
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def test_tf32(monkeypatch):
    """Within the budget of an LSTM whose recurrent product takes factors rounded to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    module = make("lstm", 5, 40)
    x, (h, c) = draw_inputs(module, time=4, batch=3)

    def run(dtype, rounded):
        w_ih, w_hh, b_ih, b_hh = (p.detach().to(dtype) for p in module.parameters())
        now, outputs = (h[0].to(dtype), c[0].to(dtype)), []
        for t in range(4):
            product = rounded(now[0]) @ rounded(w_hh).t()
            now = STEPS["lstm"].step(x[t].to(dtype) @ w_ih.t() + b_ih, product + b_hh, now)
            outputs.append(now[0])
        return {"output": torch.stack(outputs), "h": now[0], "c": now[1]}

    exact = run(torch.float64, lambda t: t)
    for schedule in SCHEDULES:
        with on_fibers(schedule), torch.no_grad():
            output, (last_h, last_c) = module(x, (h, c))
        ours = {"output": output, "h": last_h[0], "c": last_c[0]}
        result = check(ours, run(torch.float32, to_tf32), lambda: exact)
        assert result.ok, str(result)
        assert (output - exact["output"]).abs().max() > 1e-6, "not in tf32"


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "race"),
    [("grid", race) for race in RACES[1:4]] + [("cluster", race) for race in (RACES[1], *RACES[3:])],
)
def test_a_race_is_caught(schedule, race):
    module = make("gru", 5, 40, torch.bfloat16)
    inputs = draw_inputs(module, time=5, batch=2)
    caught = []
    for order in ORDERS:
        try:
            with on_fibers(schedule, order=order, seed=1, race=race):
                assert_parity(module, inputs=inputs)
        except (AssertionError, ScanError) as error:
            caught.append(error)
    assert caught


def test_what_does_not_fit_is_refused():
    for schedule, hidden, limits in (
        ("grid", 100, {"multiprocessors": 0}),  # not all blocks at once
        ("cta", 129, {}),  # more units than a block has threads for
        ("cta", 128, {"shared": 32 << 10}),  # weights
        ("cluster", 1025, {}),  # more blocks than a cluster may have
        ("grid", 512, {"shared": 48 << 10, "multiprocessors": 8}),
    ):
        module = make("lstm", 3, hidden)
        with on_fibers(schedule, **limits) as ran, pytest.raises(ScanError, match=str(fibers.TOO_LARGE)):
            module(torch.zeros(2, 1, 3))
        assert not ran
