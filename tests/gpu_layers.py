"""What a layer on any GPU backend must pass. Which backend, and where it runs, is the caller's."""

from __future__ import annotations

import torch

import fusedrnn
from fusedrnn.testing import assert_parity, draw_inputs

CELLS = {
    "rnn_tanh": (fusedrnn.RNN, {}),
    "rnn_relu": (fusedrnn.RNN, {"nonlinearity": "relu"}),
    "lstm": (fusedrnn.LSTM, {}),
    "gru": (fusedrnn.GRU, {}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make(cell, inputs, hidden, dtype=torch.float32, device="cpu", **options):
    cls, fixed = CELLS[cell]
    torch.manual_seed(hidden)
    return cls(inputs, hidden, **fixed, **options).to(device, dtype)


def projection(dtype, device):
    """Wider and narrower than the input; longer than a single step, and one."""
    for options in ({}, {"bidirectional": True, "bias": False}):
        module = make("lstm", 5, 17, dtype, device, proj_size=5, **options)
        for lengths in (None, [3, 1, 2]):
            assert_parity(module, inputs=draw_inputs(module, time=3, batch=3, lengths=lengths))
    module = make("lstm", 3, 24, dtype, device, proj_size=20)
    assert_parity(module, inputs=draw_inputs(module, time=1, batch=2))


def one_step(cell, dtype, device):
    for hidden, batch, inputs in ((1, 33, 1), (17, 3, 40), (200, 1, 7)):
        torch.manual_seed(hidden)
        module = getattr(fusedrnn, cell)(inputs, hidden, bias=hidden != 1).to(device, dtype)
        assert_parity(module, inputs=draw_inputs(module, batch=batch))


def recompute(cell, device, **options):
    """The same gradients from less: no gates are kept."""
    module = make(cell, 5, 17, device=device, bidirectional=True, **options)
    with fusedrnn.recompute():
        for lengths in (None, [3, 1, 2]):
            assert_parity(module, inputs=draw_inputs(module, time=3, batch=3, lengths=lengths))
