"""The grids of `--full` and `--one-step`, group by group."""

from __future__ import annotations

from itertools import product

from .cases import MODES, Case, grid

CELLS = ("lstm", "gru", "rnn_tanh")
TIME = 128


def one_step() -> dict[str, list[Case]]:
    sizes = (32, 64, 128, 256, 512)
    return {
        "one step": [
            Case(cell, hidden, 1, 1, "inference", "step", storage)
            for cell, storage, hidden in product(("lstm", "gru"), ("fp32", "bf16", "int8"), sizes)
        ]
    }


def full() -> dict[str, list[Case]]:
    """Every group, by name."""
    groups = {
        cell: list(grid((cell,), (32, 64, 128, 256, 512, 1024), (1, 4, 16, 64), TIME, MODES, ("dense",)))
        for cell in CELLS
    }
    groups["ragged"] = list(grid(CELLS, (64, 128, 256, 512), (8, 24, 64), TIME, MODES, ("ragged",)))
    for layout in ("projection", "bidirectional", "stacked"):
        groups[layout] = list(grid(("lstm",), (64, 128, 256, 512), (1, 8, 32), TIME, MODES, (layout,)))
    halves = grid(CELLS, (128, 256, 512, 1024), (1, 4, 16, 64), TIME, ("inference",), ("dense",), "bf16")
    return {**groups, "bf16": list(halves), **one_step(), "odd shapes": _odd()}


def _odd() -> list[Case]:
    # I, H, B, T
    sizes = [(hidden, hidden, batch, TIME) for hidden in (1, 17, 33, 100, 250) for batch in (1, 8)]
    sizes += [(1024, 64, 8, TIME), (3, 256, 8, TIME), (128, 128, 8, 1), (128, 128, 1, 1), (32, 32, 1, 20000)]
    return [
        Case(cell, hidden, batch, time, mode, "dense", inputs=None if inputs == hidden else inputs)
        for cell in CELLS
        for inputs, hidden, batch, time in sizes
        for mode in (MODES if time < 20000 else MODES[:1])
    ]
