"""Every cell as Triton jit functions, forward and backward beside each other. Cells know no time loop."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import gru, lstm, rnn


class Cell(NamedTuple):
    """What a time loop needs to know of a cell.

    All values are fp32 tensors [rows, units] in tuples; `x` and `h` are the gates' two halves.

    Attributes:
        gates, states: how many there are, as in fusedrnn.cells.
        saved: how many values a step saves for the backward; 0 if its output says it all.
        split: the gradients of x and h differ.
        reads_h: whether `backward` reads the hidden state before the step.
        activate: (x, h) -> what is saved.
        update: (saved, states) -> the states after the step.
        backward: (saved, states before, gradients of the states after) ->
            (gradients of x, gradients of h, gradients of the states before, but for what goes through h).
    """

    gates: int
    states: int
    saved: int
    split: bool
    reads_h: bool
    activate: Any
    update: Any
    backward: Any


CELLS = {
    "rnn_tanh": Cell(1, 1, 0, False, False, rnn.tanh_activate, rnn.update, rnn.tanh_backward),
    "rnn_relu": Cell(1, 1, 0, False, False, rnn.relu_activate, rnn.update, rnn.relu_backward),
    "lstm": Cell(4, 2, 4, False, False, lstm.activate, lstm.update, lstm.backward),
    "gru": Cell(3, 1, 4, True, True, gru.activate, gru.update, gru.backward),
}
