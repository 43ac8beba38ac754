"""`python -m fusedrnn parity`: every cell, dtype and instruction set against torch.nn."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import modules, terminal
from .backends import select
from .cells import CELLS
from .doctor import instruction_sets, kernels
from .testing import Parity, draw_inputs, parity

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = select.ORDER
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
# sizes that no vector width divides
INPUT, HIDDEN, PROJ, TIME, BATCH = 11, 37, 13, 12, 5
LENGTHS = (5, 12, 1, 12, 8)


@dataclass(frozen=True)
class Case:
    """One module and its input."""

    cell: str
    dtype: str
    layout: str

    def run(self) -> Parity:
        bidirectional = self.layout == "bidirectional"
        module = make_module(
            self.cell,
            INPUT,
            HIDDEN,
            num_layers=2 if bidirectional else 1,
            bidirectional=bidirectional,
            proj_size=PROJ if self.layout == "projection" else 0,
            dtype=DTYPES[self.dtype],
        )
        lengths = LENGTHS if self.layout == "ragged" else None
        inputs = draw_inputs(module, time=TIME, batch=BATCH, lengths=lengths)
        # a half-precision second order is below its own rounding
        second = self.layout == "dense" and self.dtype in ("fp64", "fp32")
        return parity(module, inputs=inputs, second_order=second)


def make_module(
    cell: str, input_size: int, hidden_size: int, proj_size: int = 0, **options: object
) -> torch.nn.RNNBase:
    """A fused module with weights that depend on nothing but the arguments.

    Args:
        cell: lstm, gru, rnn_tanh or rnn_relu.
        options: keyword arguments of torch.nn's constructor.
    """
    make = getattr(modules, cell.partition("_")[0].upper())
    if proj_size:
        options["proj_size"] = proj_size
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(input_size, hidden_size, **options)


def layouts(cell: str) -> list[str]:
    return ["dense", "ragged", "bidirectional"] + ["projection"] * CELLS[cell].projectable


@contextmanager
def _at(level: str) -> Iterator[None]:
    """The native kernels at one instruction set; an empty name leaves them as they are."""
    if not level:
        yield
        return
    before = kernels().isa()
    kernels().set_isa(level)
    try:
        yield
    finally:
        kernels().set_isa(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 when every row is within budget, 1 when not, 2 when nothing was compared."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn parity",
        description="Outputs and every gradient of every cell against torch.nn, under the error budget of "
        "fusedrnn.testing: error <= 2 x (torch's own error + one rounding), against fp64.",
    )
    parser.add_argument("--backend", choices=BACKENDS, help="default: every backend that is here")
    parser.add_argument("--cell", choices=CELLS, help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument(
        "--isa",
        choices=("all", *LEVELS),
        default="all",
        help="of the native kernels; default: all of this cpu",
    )
    arguments = parser.parse_args(argv)

    runs: list[tuple[str, str]] = []
    for name in [arguments.backend] if arguments.backend else BACKENDS:
        reason = select.get(name).unavailable()
        if reason is None and name == "native" and arguments.isa not in ("all", *instruction_sets()):
            reason = f"this cpu cannot run {arguments.isa}"
        if reason is not None:
            print(f"{name}: not compared: {reason}")
        elif name == "native":
            runs += [(name, level) for level in instruction_sets() if arguments.isa in ("all", level)]
        else:
            runs.append((name, ""))
    cases = [
        Case(cell, dtype, layout)
        for cell in ([arguments.cell] if arguments.cell else CELLS)
        for dtype in ([arguments.dtype] if arguments.dtype else DTYPES)
        for layout in layouts(cell)
    ]
    if not runs:
        return 2

    rows, red = [], []
    with terminal.progress(len(runs) * len(cases)) as step:
        for backend, level in runs:
            with _at(level), select.use_backend(backend):
                for case in cases:
                    where = f"{backend} {level}".rstrip()
                    label = f"{where} {case.cell} {case.dtype} {case.layout}"
                    step(label)
                    result = case.run()
                    worst = result.worst
                    used = f"{worst.ours / worst.budget:6.0%}"
                    verdict = "ok" if result.ok else "RED"
                    rows.append(
                        (
                            where,
                            case.cell,
                            case.dtype,
                            case.layout,
                            str(len(result.rows)),
                            used,
                            worst.name,
                            verdict,
                        )
                    )
                    red += [f"{label}: {row}" for row in result.failures]
    terminal.table(
        ("backend", "cell", "dtype", "layout", "tensors", "of budget", "worst tensor", "verdict"), rows
    )
    for line in red:
        print(f"RED {line}")
    print(f"\n{len(rows)} comparisons, {sum(row[-1] == 'RED' for row in rows)} red")
    return 1 if red else 0
