"""The Triton kernels of a layer: parity with torch.nn in every schedule, dtype and awkward size.

Without a GPU they run in Triton's interpreter, persistent ones under the co-scheduler.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import fusedrnn
from fusedrnn import saving
from fusedrnn.backends import select
from fusedrnn.testing import assert_parity, draw_inputs

triton = pytest.importorskip("triton")
pytest.importorskip("greenlet")

import gpu_layers  # noqa: E402
import triton.language as tl  # noqa: E402
from cooperative import Deadlock, cooperative  # noqa: E402
from gpu_layers import CELLS, DTYPES  # noqa: E402
from interpreter import DEVICE, INTERPRETED  # noqa: E402
from pieces import draw, in_pieces, resetting  # noqa: E402

from fusedrnn.backends.triton import layer, plan, scan_kernels  # noqa: E402

SCHEDULES = ["resident", "persistent", "streamed", "stepped"]
# hidden, batch, time, lengths
SIZES = [(1, 33, 2, None), (17, 3, 3, [3, 1, 2]), (96, 1, 2, None), (200, 3, 2, [2, 2, 1])]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch):
    """Every call on the Triton backend, also on the CPU, and fp32 exact."""
    monkeypatch.setattr(layer, "no_kernel", lambda dtype, device_type: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    select._table.cache_clear()
    with fusedrnn.use_backend("triton"):
        yield
    select._table.cache_clear()


def planned(schedule):
    """A plan of this schedule for every scan. Streamed is persistent with weights that are not held."""

    def choose(gates, hidden, size, batch, directions, backward, machine):
        rows, units = 16, 16
        if schedule == "resident":
            units = max(16, plan.power_of_two(hidden))
            return plan.Plan(schedule, rows, units, units, 1, 4, 1)
        if schedule == "persistent":
            depth = -(-gates * hidden // 4) if backward else hidden
            return plan.Plan(schedule, rows, units, 32, -(-depth // 32), 4, 1)
        return plan.Plan("stepped" if schedule == "stepped" else "persistent", rows, units, 64, 0, 4, 1)

    return mock.patch.object(plan, "choose", choose)


def together(schedule, **order):
    """Persistent programs must run at once."""
    return cooperative(**order) if INTERPRETED and schedule in ("persistent", "streamed") else nullcontext()


def make(cell, inputs, hidden, dtype=torch.float32, **options):
    return gpu_layers.make(cell, inputs, hidden, dtype, DEVICE, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, schedule, dtype):
    for hidden, batch, time, lengths in SIZES:
        module = make(cell, 5, hidden, DTYPES[dtype], bidirectional=hidden % 2 == 1, bias=hidden != 96)
        inputs = draw_inputs(module, time=time, batch=batch, lengths=lengths)
        with planned(schedule), together(schedule):
            assert_parity(module, inputs=inputs)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_many_tiles(schedule):
    """Tiles of the batch beyond the first, K in several tiles, and rows that end early."""
    module = make("gru", 3, 40, bidirectional=True)
    inputs = draw_inputs(module, lengths=[1, 3, 2] * 6)
    with planned(schedule), together(schedule, order="random", seed=1):
        assert_parity(module, inputs=inputs)


@pytest.mark.parametrize("cell", CELLS)
def test_automatic_plans(cell):
    for hidden in (16, 64, 72):
        module = make(cell, 3, hidden, torch.bfloat16)
        with together("persistent"):
            assert_parity(module, inputs=draw_inputs(module, time=2, batch=2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection(dtype):
    with together("persistent"):
        gpu_layers.projection(DTYPES[dtype], DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_one_step(cell, dtype):
    gpu_layers.one_step(cell, DTYPES[dtype], DEVICE)


@pytest.mark.parametrize("schedule", ["resident", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_recompute(cell, schedule):
    with planned(schedule), together(schedule):
        gpu_layers.recompute(cell, DEVICE)
    everything = layer.saved_tensors(cell, 2, 9, 17, False, torch.float32, saving.EVERYTHING, DEVICE)
    little = layer.saved_tensors(cell, 2, 9, 17, False, torch.float32, saving.LITTLE, DEVICE)
    assert little == [row for row in everything if row[0][-1] == 17]
    assert saving.saving() == saving.EVERYTHING


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_resets(cell, schedule):
    """States that are zeroed in mid-sequence, against the pieces run one by one."""
    for lengths in (None, [3, 1, 2]):
        module = make(cell, 5, 17, bidirectional=lengths is not None)
        inputs = draw(module, 0.4, time=3, batch=2, lengths=lengths)
        with planned(schedule), together(schedule, order="lagging"):
            assert_parity(resetting(module), in_pieces(module), inputs)


def test_resets_of_a_projection_a_recomputation_and_a_single_step():
    with together("persistent"):
        module = make("lstm", 5, 17, proj_size=5, bidirectional=True)
        assert_parity(resetting(module), in_pieces(module), draw(module, 0.4, lengths=[3, 1, 2]))
        module = make("gru", 5, 17)
        with fusedrnn.recompute():
            assert_parity(resetting(module), in_pieces(module), draw(module, 0.4, time=3, batch=3))
        assert_parity(resetting(module), in_pieces(module), draw(module, 0.5, time=1, batch=5))


# ---- the barrier -------------------------------------------------------------------------------


@triton.jit
def no_wait(counter_ptr, arrivals):
    tl.debug_barrier()


@triton.jit
def early(counter_ptr, arrivals):
    while tl.load(counter_ptr, volatile=True) < arrivals - 1:
        pass


@triton.jit
def late(counter_ptr, arrivals):
    while tl.load(counter_ptr, volatile=True) < arrivals + 1:
        pass


@pytest.mark.skipif(not INTERPRETED, reason="plants bugs into interpreted functions")
@pytest.mark.parametrize("wrong", [no_wait, early, late])
def test_a_wrong_barrier_is_caught(wrong, monkeypatch):
    module = make("gru", 5, 40)
    inputs = draw_inputs(module, time=5, batch=2)
    monkeypatch.setattr(scan_kernels, "wait", wrong)
    caught = []
    for order in ({"order": "eager"}, {"order": "lagging", "program": 1}, {"order": "random", "seed": 3}):
        try:
            with planned("persistent"), cooperative(**order):
                assert_parity(module, inputs=inputs)
        except (AssertionError, Deadlock) as error:
            caught.append(error)
    assert caught


@pytest.mark.skipif(not INTERPRETED, reason="orders what runs at once on a GPU")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize(
    "order",
    [{"order": "eager"}, {"order": "lagging", "program": 1}, {"order": "random", "seed": 3}],
    ids=lambda order: order["order"],
)
def test_in_any_order(cell, order):
    module = make(cell, 5, 40, bidirectional=True)
    inputs = draw_inputs(module, lengths=[5, 2, 4])
    with planned("persistent"), cooperative(**order):
        assert_parity(module, inputs=inputs)


# ---- choosing ----------------------------------------------------------------------------------


def test_a_gpu_gets_these_kernels(monkeypatch):
    monkeypatch.undo()
    for dtype in DTYPES.values():
        assert select.against("triton", select.Request("gru", dtype, "cuda")) is None
    assert "torch.float64" in (select.against("triton", select.Request("gru", torch.float64, "cuda")) or "")
    assert "device cpu" in (select.against("triton", select.Request("gru", torch.float32, "cpu")) or "")


def test_without_triton_it_says_so(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "fusedrnn.backends.triton.find_spec", lambda name: None if name == "triton" else find(name)
    )
    assert "Triton is not there" in (
        select.against("triton", select.Request("gru", torch.float32, "cuda")) or ""
    )


def test_plans_never_depend_on_time_and_little_on_the_batch():
    plans = {plan.choose(4, 512, 2, batch, 1, False, plan.H100) for batch in range(1, 129)}
    assert len(plans) == 2
    small = plan.Machine(sms=20, shared=100 << 10)
    assert plan.choose(4, 512, 2, 16, 1, False, small).schedule == "stepped"
    assert plan.choose(4, 512, 2, 16, 1, False, plan.H100).schedule == "persistent"
    assert plan.choose(4, 64, 2, 16, 1, False, plan.H100).schedule == "resident"
