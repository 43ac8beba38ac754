"""The CUDA kernels' own sources on the CPU, over fibers: parity, races, and what a launch refuses."""

from __future__ import annotations

import pytest
import torch

import fusedrnn
from fusedrnn.budget import check
from fusedrnn.cells import CELLS as STEPS
from fusedrnn.testing import assert_parity, draw_inputs

fibers = pytest.importorskip("fibers")
from fibers import ORDERS, SCHEDULES, ScanError, on_fibers  # noqa: E402
from gpu_layers import CELLS, DTYPES, make  # noqa: E402
from pieces import draw, in_pieces, resetting  # noqa: E402

pytestmark = pytest.mark.skipif(fibers.missing() is not None, reason=fibers.missing() or "")

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
def exact(monkeypatch):
    """fp32 as it is."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, schedule, dtype):
    for hidden, batch, time, lengths in SIZES:
        module = make(cell, 5, hidden, DTYPES[dtype], bidirectional=hidden % 2 == 1, bias=hidden != 40)
        inputs = draw_inputs(module, time=time, batch=batch, lengths=lengths)
        with on_fibers(schedule, shared=256 << 10) as ran:
            assert_parity(module, inputs=inputs)
        assert ran == [("forward", schedule), ("backward", schedule)]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_streamed_weights(cell, dtype):
    """Several chunks of K for each warp, tiles of 8 to 32 rows, rings of 2 to 4 chunks."""
    for hidden, batch, shared, lengths in ((280, 2, 227, None), (136, 33, 99, [2] * 20 + [1] * 13)):
        module = make(cell, 3, hidden, DTYPES[dtype])
        with on_fibers("stepped", shared=shared << 10):
            assert_parity(module, inputs=draw_inputs(module, time=2, batch=batch, lengths=lengths))


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
    """States that are zeroed in mid-sequence, against the pieces run one by one."""
    for lengths in (None, [3, 1, 2]):
        module = make(cell, 5, 17, bidirectional=lengths is not None)
        inputs = draw(module, 0.4, time=3, batch=2, lengths=lengths)
        with on_fibers(schedule, order="lagging"):
            assert_parity(resetting(module), in_pieces(module), inputs)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_split(cell, schedule):
    """fp32 in two parts of tf32 is as exact as fp32."""
    for hidden, batch, time, lengths in SIZES[2:]:
        module = make(cell, 5, hidden, bidirectional=hidden % 2 == 1)
        with on_fibers(schedule, shared=256 << 10, split=True) as ran:
            assert_parity(module, inputs=draw_inputs(module, time=time, batch=batch, lengths=lengths))
        assert ran == [("forward", schedule), ("backward", schedule)]


def test_who_splits(monkeypatch):
    """Only where torch's flags ask for nothing; what is split differs from what is not, but not by much."""
    module = make("lstm", 5, 64)
    x = torch.randn(12, 2, 5)

    def run(split):
        with on_fibers("cta", split=split), torch.no_grad():
            return module(x)[0]

    strict, split = run(False), run(True)
    assert not torch.equal(strict, split)
    assert (strict - split).abs().max() < 1e-6
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    assert torch.equal(strict, run(True))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_split_too(value):
    """Weights that tf32 holds exactly have low parts of zero, which make NaN of an infinity."""
    module = make("rnn_relu", 3, 16)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.where(torch.rand(16, 16) < 0.5, 0.5, 0.1))
    x, h = torch.zeros(1, 2, 3), torch.zeros(1, 2, 16)
    h[0, 1, 3] = value
    with torch.no_grad():
        expected = module.to(torch.float64)(x.double(), h.double())[0]
        with on_fibers("cta", split=True):
            got = module.to(torch.float32)(x, h)[0]
    torch.testing.assert_close(got, expected.float(), equal_nan=True)


# ---- what goes wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "race"),
    [
        *(("grid", race) for race in ("wait", "barrier before arrival", "barrier in a block")),
        *(("cluster", race) for race in ("wait", "barrier in a block", "second buffer")),
        *(("stepped", race) for race in ("wait", "barrier in a block", "second buffer", "wait for a launch")),
    ],
)
def test_a_race_is_caught(schedule, race):
    # stepped: more than one chunk of K for a warp
    module = make("gru", 5, 40, torch.float32 if schedule == "stepped" else torch.bfloat16)
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
        ("stepped", 8, {"shared": 64 << 10}),  # two chunks
    ):
        module = make("lstm", 3, hidden)
        with on_fibers(schedule, **limits) as ran, pytest.raises(fusedrnn.BackendError, match="no schedule"):
            module(torch.zeros(2, 1, 3))
        assert not ran
