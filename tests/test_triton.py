"""The Triton kernels of a layer: parity with torch.nn in every schedule, dtype and awkward size.

Without a GPU they run in Triton's interpreter, persistent ones under the co-scheduler.
"""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

import fusedrnn
from fusedrnn.backends import select
from fusedrnn.testing import assert_parity, draw_inputs

triton = pytest.importorskip("triton")
pytest.importorskip("greenlet")

from cooperative import ORDERS, Deadlock, cooperative  # noqa: E402
from interpreter import DEVICE, INTERPRETED  # noqa: E402

from fusedrnn.backends.triton import barrier, layer, plan, scan  # noqa: E402

CELLS = {
    "rnn_tanh": (fusedrnn.RNN, {}),
    "rnn_relu": (fusedrnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (fusedrnn.LSTM, {}),
    "gru": (fusedrnn.GRU, {}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
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

    def choose(gates, hidden, size, batch, directions, projected, backward, machine):
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
    cls, fixed = CELLS[cell]
    torch.manual_seed(hidden)
    return cls(inputs, hidden, **fixed, **options).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, schedule, dtype):
    for hidden, batch, time, lengths in SIZES:
        module = make(cell, 5, hidden, DTYPES[dtype], bidirectional=hidden % 2 == 1, bias=hidden != 96)
        inputs = draw_inputs(module, time=time, batch=batch, lengths=lengths)
        with planned(schedule), together(schedule):
            assert_parity(module, inputs=inputs)
