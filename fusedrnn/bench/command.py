"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from .. import terminal
from ..backends import select
from ..cells import CELLS
from ..parity import DTYPES
from ..testing import Parity
from . import ceilings, goals, loaded, memory
from .cases import MODES, Case, grid
from .groups import full, one_step
from .prepared import prepare
from .report import COLUMNS, Result, environment, markdown
from .timing import interleave

Report = dict[str, Any]
_SECONDS, _SECONDS_FULL = 0.5, 0.15
_LAYOUTS = {
    "ragged": "packed sequences of random lengths, T/4 to T",
    "bidirectional": "both directions",
    "projection": "LSTM with proj_size = H / 2",
    "stacked": "three layers",
}


def run(group: str, case: Case, gate: Callable[[Case], Parity], seconds: float) -> Result:
    """Check a case against the error budget, and time it if it is within."""
    prepared = prepare(case)
    backend, parity = prepared.backend(), gate(case.gate())
    if not parity.ok:
        return Result(group, case, backend, parity.failures[0])
    with case.grad_mode():
        times, rounds = interleave(prepared.calls(), seconds)
    return Result(group, case, backend, parity.worst, times, rounds)


def _groups(arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """The cases by group."""
    if arguments.full or arguments.one_step:
        groups = full() if arguments.full else one_step()
        kept = {name: [case for case in cases if _wanted(case, arguments)] for name, cases in groups.items()}
        return {name: cases for name, cases in kept.items() if cases}
    by_layout: dict[str, list[Case]] = {}
    for case in _cases(arguments):
        by_layout.setdefault(case.cell if case.layout == "dense" else case.layout, []).append(case)
    return by_layout


def _wanted(case: Case, arguments: argparse.Namespace) -> bool:
    """Whether a case of --full or --one-step is one of those that arguments name."""
    named = (
        (case.cell, arguments.cell),
        (case.hidden, arguments.hidden),
        (case.batch, arguments.batch),
        (case.mode, _modes(arguments)),
    )
    return all(not wanted or value in wanted for value, wanted in named)


def _modes(arguments: argparse.Namespace) -> Sequence[str]:
    return MODES if arguments.mode == "both" else (arguments.mode,)


def _cases(arguments: argparse.Namespace) -> list[Case]:
    """The README's grid, as far as arguments do not change it."""
    modes = _modes(arguments)
    cells = arguments.cell or ("lstm", "gru", "rnn_tanh")
    hidden = arguments.hidden or ((64, 256) if arguments.quick else (64, 128, 256, 512))
    batch = arguments.batch or ((1, 8) if arguments.quick else (1, 8, 32))
    time, dtype = arguments.time, arguments.dtype
    layouts = [layout for layout in _LAYOUTS if getattr(arguments, layout)]
    if "projection" in layouts:
        cells = [cell for cell in cells if CELLS[cell].projectable]
    if layouts:
        return list(grid(cells, hidden, batch, time, modes, layouts, dtype))
    cases = list(grid(cells, hidden, batch, time, modes, ("dense",), dtype))
    if not (arguments.hidden or arguments.batch):
        cases += grid(cells, (256,), (8 if arguments.quick else 32,), time, modes, ("ragged",), dtype)
        cases += grid(cells, (256,), (8,), time, modes, ("bidirectional",), dtype)
    return cases


def _lines(report: dict[str, Any]) -> str:
    """JSON with a line for each result, which is what changes from one run to the next."""
    fields = []
    for key, value in report.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value)
        fields.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn bench",
        description="torch.nn against fusedrnn on the same weights and input, in turns. A case that is not "
        "within the error budget is not timed. Without options: the table of the README.",
    )
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a smaller grid")
    what.add_argument("--full", action="store_true", help="every group and its goals, in about ten minutes")
    what.add_argument("--one-step", action="store_true", help="one step of a stream, and its goals")
    what.add_argument("--memory", action="store_true", help="peak memory of a training step instead of times")
    what.add_argument("--loaded", action="store_true", help="slowdown beside a busy process per core")
    parser.add_argument("--cell", nargs="+", choices=CELLS, help="default: lstm gru rnn_tanh")
    parser.add_argument("--hidden", nargs="+", type=int, metavar="H", help="default: 64 128 256 512")
    parser.add_argument("--batch", nargs="+", type=int, metavar="B", help="default: 1 8 32")
    parser.add_argument("--time", type=int, default=128, metavar="T", help="default: 128")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    for layout, help in _LAYOUTS.items():
        parser.add_argument(f"--{layout}", action="store_true", help=help)
    parser.add_argument("--backend", choices=select.NAMES, help="default: the automatic choice")
    parser.add_argument(
        "--seconds", type=float, help=f"per case, at least (default: {_SECONDS}; --full: {_SECONDS_FULL})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    return parser


def _grid(arguments: argparse.Namespace, seconds: float) -> tuple[Report, bool]:
    """Time the cases and print them; the report, and whether all are within the error budget."""
    groups = _groups(arguments)
    # equal cases of different lengths run the same kernels
    gate = cache(lambda case: prepare(case).parity())
    results = []
    with terminal.progress(sum(map(len, groups.values()))) as step:
        found = ceilings.measure()
        for group, cases in groups.items():
            for case in cases:
                step(case.label)
                results.append(run(group, case, gate, seconds))
        found = found.best(ceilings.measure())
    terminal.table(COLUMNS, [result.cells(found) for result in results])
    print(f"\n{found}\n")
    terminal.table(goals.GROUP_COLUMNS, goals.groups(results))
    report: Report = {"ceilings": asdict(found), "results": [result.record(found) for result in results]}
    if arguments.full or arguments.one_step:
        verdicts = goals.verdicts(results, found)
        terminal.heading("Goals")
        terminal.table(goals.GOAL_COLUMNS, [verdict.cells() for verdict in verdicts])
        report["goals"] = [verdict.record() for verdict in verdicts]
    if arguments.markdown:
        print(f"\n{markdown(results)}")
    return report, all(result.times for result in results)


def _memory() -> Report:
    with terminal.progress(len(memory.CASES)) as step:
        records = memory.run(step, memory.CASES)
    terminal.table(memory.COLUMNS, [memory.cells(record) for record in records])
    return {"memory": records}


def _loaded(seconds: float) -> Report:
    with terminal.progress(2 * len(loaded.CASES)) as step:
        records = loaded.run(step, seconds, loaded.CASES)
    terminal.table(loaded.COLUMNS, [loaded.cells(record) for record in records])
    return {"loaded": records}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0, or 1 if a case is over the error budget."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.memory and (why_not := memory.missing()):
        parser.error(why_not)
    seconds = arguments.seconds
    if seconds is None:
        seconds = _SECONDS_FULL if arguments.full else _SECONDS
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores / 2:
        print(
            f"this machine is busy (load {load:.1f}, {cores} cores): do not trust these times",
            file=sys.stderr,
        )
    within = True
    with select.use_backend(arguments.backend) if arguments.backend else nullcontext():
        if arguments.memory:
            report = _memory()
        elif arguments.loaded:
            report = _loaded(seconds)
        else:
            report, within = _grid(arguments, seconds)
    if arguments.json:
        command = shlex.join(["python", "-m", "fusedrnn", "bench", *(argv or [])])
        report = {**environment(command), "load": load, **report}
        arguments.json.write_text(_lines(report))
    return 0 if within else 1
