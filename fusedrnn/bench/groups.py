"""The grids of `--full`, `--one-step`, `--grid gpu` and of attention, group by group."""

from __future__ import annotations

from itertools import product

from .cases import MODES, AttentionCase, Case, grid

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


def attention(compiled: bool) -> dict[str, list[AttentionCase]]:
    """Every group, by name."""

    def both(form: str, batch: int, queries: int, keys: int, hidden: int) -> list[AttentionCase]:
        return [AttentionCase(form, batch, 1, queries, keys, hidden, mode, compiled) for mode in MODES]

    def steps(form: str, beams: int) -> AttentionCase:
        return AttentionCase(form, 1, beams, 1, 100, 256, MODES[0], compiled)

    # B, Tq, Tk, H
    sizes = ((8, 32, 64, 256), (16, 50, 50, 512))
    return {
        **{form: [case for size in sizes for case in both(form, *size)] for form in ("operator", "module")},
        "decoder step": [steps("operator", 1), steps("decoder", 1), steps("decoder", 16)],
        "location": [AttentionCase("location", 16, 1, 1, 100, 256, MODES[0], compiled)],
        "multihead": both("multihead", 8, 128, 128, 512),
    }


def attention_gpu(compiled: bool) -> dict[str, list[AttentionCase]]:
    """Every group, by name, in bf16."""

    def both(form: str, *sizes: int) -> list[AttentionCase]:
        batch, queries, keys, hidden = sizes
        return [AttentionCase(form, batch, 1, queries, keys, hidden, m, compiled, "bf16") for m in MODES]

    return {
        "operator": both("operator", 128, 50, 50, 1024) + both("operator", 64, 32, 32, 512),
        "multihead": both("multihead", 32, 128, 128, 512),
    }


# Of the grid against cuDNN: the values of each axis, what matters most first.
_DTYPES, _HIDDEN, _BATCH = ("bf16", "fp32", "fp16"), (512, 256, 1024, 128, 64, 2048), (32, 8, 1, 128)


def gpu() -> list[tuple[str, Case]]:
    """The grid against cuDNN, each case with its group; what matters most comes first: time may run out."""
    named = [
        *grid(("lstm",), (64, 512, 768), (16,), 1024, MODES[:1], ("dense",), "bf16"),
        Case("lstm", 768, 16, 1024, "training", "dense", "bf16"),
        Case("lstm", 64, 16, 1024, "training", "heads", "bf16"),
        *grid(("lstm",), (512,), (32,), 512, MODES, ("ragged",), "bf16"),
        *grid(("lstm",), (256,), (8,), 512, MODES, ("deep",), "bf16"),
    ]
    cases = [
        Case(cell, hidden, batch, 512, mode, "dense", dtype)
        for cell, dtype, hidden, batch, mode in product(CELLS, _DTYPES, _HIDDEN, _BATCH, MODES)
    ]
    return [*(("named", case) for case in named), *((case.cell, case) for case in sorted(cases, key=_rank))]


def _rank(case: Case) -> int:
    """How far its values are from the head of their axes."""
    places = (CELLS.index(case.cell), _DTYPES.index(case.dtype), MODES.index(case.mode))
    return sum(places) + _HIDDEN.index(case.hidden) + _BATCH.index(case.batch)


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
