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
from fusedrnn.backends.reference import layer as reference
from fusedrnn.budget import check
from fusedrnn.testing import assert_parity, draw_inputs

triton = pytest.importorskip("triton")
pytest.importorskip("greenlet")

import gpu_layers  # noqa: E402
import triton.language as tl  # noqa: E402
from cooperative import Deadlock, cooperative  # noqa: E402
from gpu_layers import CELLS, DTYPES  # noqa: E402
from interpreter import DEVICE, INTERPRETED  # noqa: E402

from fusedrnn.backends.triton import layer, plan, scan  # noqa: E402

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
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_projection(schedule, dtype):
    with planned(schedule), together(schedule):
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
    """A state that is zeroed in mid-sequence, against the same sequence in two calls of the reference."""
    module = make(cell, 5, 17)
    weights = [p.detach() for p in module.parameters()]
    count = 2 if cell == "lstm" else 1
    x = torch.randn(5, 3, 5, device=DEVICE)
    states = [torch.randn(1, 3, 17, device=DEVICE) for _ in range(count)]
    resets = torch.zeros(5, 3, dtype=torch.uint8, device=DEVICE)
    resets[0, 1] = resets[2] = resets[4, 0] = 1
    pull = [torch.randint(-4, 5, (5, 3, 17), device=DEVICE).float()]
    pull += [torch.randint(-4, 5, s.shape, device=DEVICE).float() for s in states]

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

    flat = resets.view(1, -1).bool()
    with planned(schedule), together(schedule, order="lagging"):
        output, last, saved = layer.forward(cell, x, None, weights, states, 1, 1, flat)
        needs = (True, [True] * len(weights), [True] * count)
        of_x, of_weights, of_states = layer.backward(
            cell, x, None, weights, states, 1, output, saved, pull[0], pull[1:], needs, flat
        )
    ours = named([output, *last, of_x, *of_weights, *of_states])
    result = check(ours, oracle(torch.float32), lambda: oracle(torch.float64))
    assert result.ok, str(result)


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
    monkeypatch.setattr(scan, "wait", wrong)
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
