"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from .. import terminal
from ..backends import select
from ..cells import CELLS
from ..parity import DTYPES
from .cases import MODES, Case, grid
from .report import COLUMNS, Result, environment, markdown
from .timing import interleave


def _gemm_rate() -> float:
    """Flop/s of a large fp32 matrix product: what the kernels' own rates are held against."""
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    with torch.inference_mode():
        (times,), _ = interleave([lambda: a @ b], seconds=0.2)
    return 2 * n**3 / times.p20


def run(case: Case, seconds: float) -> Result:
    """Check a case against the error budget, and time it if it is within."""
    prepared = case.prepare()
    backend, parity = prepared.backend(), prepared.parity()
    if not parity.ok:
        return Result(case, backend, parity.failures[0])
    (stock, fused), rounds = interleave(prepared.calls(), seconds)
    return Result(case, backend, parity.worst, stock, fused, rounds)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """The README's grid, as far as arguments do not change it."""
    modes = MODES if arguments.mode == "both" else (arguments.mode,)
    cells = arguments.cell or ("lstm", "gru", "rnn_tanh")
    hidden = arguments.hidden or ((64, 256) if arguments.quick else (64, 128, 256, 512))
    batch = arguments.batch or ((1, 8) if arguments.quick else (1, 8, 32))
    time, dtype = arguments.time, arguments.dtype
    if arguments.ragged or arguments.bidirectional:
        layouts = ["ragged"] * arguments.ragged + ["bidirectional"] * arguments.bidirectional
        return list(grid(cells, hidden, batch, time, modes, layouts, dtype))
    cases = list(grid(cells, hidden, batch, time, modes, ("dense",), dtype))
    if not (arguments.hidden or arguments.batch):
        cases += grid(cells, (256,), (8 if arguments.quick else 32,), time, modes, ("ragged",), dtype)
        cases += grid(cells, (256,), (8,), time, modes, ("bidirectional",), dtype)
    return cases


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn bench",
        description="torch.nn against fusedrnn on the same weights and input, in turns. A case that is not "
        "within the error budget is not timed. Without options: the table of the README.",
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--cell", nargs="+", choices=CELLS, help="default: lstm gru rnn_tanh")
    parser.add_argument("--hidden", nargs="+", type=int, metavar="H", help="default: 64 128 256 512")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="default: 1 8 32")
    parser.add_argument("--time", type=int, default=128, metavar="T", help="default: 128")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    parser.add_argument("--ragged", action="store_true", help="packed sequences of random lengths up to T")
    parser.add_argument("--bidirectional", action="store_true", help="both directions")
    parser.add_argument("--backend", choices=select.NAMES, help="default: the automatic choice")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case, at least (default: 0.5)")
    parser.add_argument("--quick", action="store_true", help="a smaller grid")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid; 0, or 1 if a case is over the error budget."""
    arguments = _parser().parse_args(argv)
    cases = _cases(arguments)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores / 2:
        print(
            f"this machine is busy (load {load:.1f}, {cores} cores): do not trust these times",
            file=sys.stderr,
        )
    results = []
    backend = select.use_backend(arguments.backend) if arguments.backend else nullcontext()
    with backend, terminal.progress(len(cases)) as step:
        gemm = _gemm_rate()
        for case in cases:
            step(case.label)
            results.append(run(case, arguments.seconds))
    terminal.table(COLUMNS, [result.cells(gemm) for result in results])
    if arguments.markdown:
        print(f"\n{markdown(results)}")
    if arguments.json:
        command = shlex.join(["python", "-m", "fusedrnn", "bench", *(argv or [])])
        report = {
            **environment(command, gemm),
            "load": load,
            "results": [result.record(gemm) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(result.stock for result in results) else 1
