"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from .. import terminal
from ..backends import select
from ..cells import CELLS
from ..tools import DTYPES, add_device_arguments, no_gpu, tf32
from . import goals, loaded, memory
from .attention import compile_missing
from .cases import MODES, PIECE, AnyCase, AttentionCase, Case, grid
from .ceilings import Limits
from .device import Device
from .goals import ATTENTION_GOALS, GOALS, GPU_ATTENTION_GOALS, GPU_GOALS
from .gpu import DEVICES
from .groups import TIME, attention, attention_gpu, full, gpu, one_step
from .prepared import prepare
from .report import ATTENTION_COLUMNS, COLUMNS, GRAPH_COLUMNS, Result, environment, lines, markdown
from .run import run

Report = dict[str, Any]
_SECONDS, _SECONDS_FULL = 0.5, 0.15
_LAYOUTS = {
    "ragged": "packed sequences of random lengths, T/4 to T",
    "bidirectional": "both directions",
    "projection": "LSTM with proj_size = H / 2",
    "stacked": "three layers",
    "resets": f"a new piece begins at one step in {PIECE}; torch.nn gets the pieces as a padded batch",
}


def _plan(arguments: argparse.Namespace) -> list[tuple[str, AnyCase]]:
    """The cases, each with its group."""
    if arguments.cases == "attention":
        groups = (attention_gpu if arguments.device == "cuda" else attention)(arguments.compile)
        return [(g, case) for g, cases in groups.items() for case in cases if _fits(case, arguments)]
    if not arguments.grid:
        return [(group, case) for group, cases in _groups(arguments).items() for case in cases]
    wanted = [(group, case) for group, case in gpu() if _wanted(case, arguments)]
    if arguments.time is not None:
        wanted = [(group, replace(case, time=arguments.time)) for group, case in wanted]
    return list(wanted)


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
    """Whether a case of --full, --one-step or --grid is one of those that arguments name."""
    if arguments.cell and case.cell not in arguments.cell:
        return False
    return arguments.dtype in (None, case.dtype) and _fits(case, arguments)


def _fits(case: AnyCase, arguments: argparse.Namespace) -> bool:
    """Whether sizes and mode of a case are among those that arguments name."""
    named = (
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
    time, dtype = arguments.time or TIME, arguments.dtype or "fp32"
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn bench",
        description="torch.nn against fusedrnn on the same weights and input, in turns. A case that is not "
        "within the error budget is not timed. Without options: the table of the README.",
    )
    parser.add_argument(
        "cases",
        nargs="?",
        choices=("layers", "attention"),
        default="layers",
        help="attention: the operator and the modules against plain torch code, with their goals",
    )
    add_device_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a smaller grid")
    what.add_argument("--full", action="store_true", help="every group and its goals, in about ten minutes")
    what.add_argument("--one-step", action="store_true", help="one step of a stream, and its goals")
    what.add_argument(
        "--grid",
        choices=("gpu",),
        help="of a GPU against cuDNN, and its goals; what matters most comes first",
    )
    what.add_argument("--memory", action="store_true", help="peak memory of a training step instead of times")
    what.add_argument("--loaded", action="store_true", help="slowdown beside a busy process per core")
    parser.add_argument("--cell", nargs="+", choices=CELLS, help="default: lstm gru rnn_tanh")
    parser.add_argument(
        "--hidden", nargs="+", type=terminal.size, metavar="H", help="default: 64 128 256 512"
    )
    parser.add_argument("--batch", nargs="+", type=terminal.size, metavar="B", help="default: 1 8 32")
    parser.add_argument("--time", type=terminal.size, metavar="T", help=f"default: {TIME}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    for layout, help in _LAYOUTS.items():
        parser.add_argument(f"--{layout}", action="store_true", help=help)
    parser.add_argument(
        "--no-compile",
        action="store_false",
        dest="compile",
        help="of attention: without torch.compile's times",
    )
    parser.add_argument("--backend", choices=select.NAMES, help="default: the automatic choice")
    parser.add_argument(
        "--seconds",
        type=terminal.seconds,
        help=f"per case, at least (default: {_SECONDS}; --full: {_SECONDS_FULL})",
    )
    parser.add_argument(
        "--deadline",
        type=terminal.seconds,
        default=math.inf,
        metavar="SECONDS",
        help="begin no case after that",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--markdown", action="store_true", help="print the table for the README")
    return parser


def _grid(
    arguments: argparse.Namespace, seconds: float, device: Device, save: Callable[[Report], None]
) -> int:
    """Time the cases and print them; 0, 1 if one is over the error budget, 2 when none was measured.

    What is known is saved after every case: one that hangs loses no other.
    """
    end = perf_counter() + arguments.deadline
    plan = _runnable(_plan(arguments), device)
    if not plan:
        print("no case was measured: none is what the arguments name")
        return 2
    # equal cases of different lengths run the same kernels
    gate = cache(lambda case: prepare(case, device).parity())
    results: list[Result] = []
    with terminal.progress(len(plan)) as step:
        found = device.ceilings()
        for group, case in plan:
            if perf_counter() > end:
                break
            step(case.label)
            result = run(group, case, gate, seconds, device)
            results.append(_with_memory(result) if device.name == "cpu" else result)
            save(_report(results, found))
        found = found.best(device.ceilings())
    if not results:
        print("no case was measured: time ran out")
        return 2
    left_out = [case.label for _, case in plan[len(results) :]]
    columns: Sequence[str] = COLUMNS
    rows: list[tuple[str, ...]] = [result.cells(found) for result in results]
    if device.graphs:
        columns = (*COLUMNS, *GRAPH_COLUMNS)
        rows = [row + result.graph_cells(found) for row, result in zip(rows, results)]
    if arguments.cases == "attention":
        columns = (*columns, *ATTENTION_COLUMNS)
        rows = [row + result.attention_cells(found) for row, result in zip(rows, results)]
    terminal.table(columns, rows)
    if left_out:
        print(f"\nleft out, as time ran out: {len(left_out)} of {len(plan)} cases, from {left_out[0]} on")
    print(f"\n{found}\n")
    terminal.table(goals.GROUP_COLUMNS, goals.groups(results))
    report = {**_report(results, found), "left_out": left_out}
    wanted = _goals(arguments)
    if wanted:
        verdicts = goals.verdicts(results, found, wanted)
        terminal.heading("Goals")
        terminal.table(goals.GOAL_COLUMNS, [verdict.cells() for verdict in verdicts])
        report["goals"] = [verdict.record() for verdict in verdicts]
    if arguments.markdown:
        print(f"\n{markdown(results)}")
    save(report)
    return 0 if all(result.times for result in results) else 1


def _runnable(plan: Sequence[tuple[str, AnyCase]], device: Device) -> list[tuple[str, AnyCase]]:
    """Without the layers that the backend asked for cannot run, such as those too large for a GPU."""
    wanted = select.requested()
    found = []
    for group, case in plan:
        reason = None
        if wanted is not None and isinstance(case, Case):
            request = select.Request(case.cell, DTYPES[case.dtype], device.name, hidden=case.hidden)
            reason = select.against(wanted, request)
        if reason is None:
            found.append((group, case))
        else:
            print(f"{case.label}: not measured: {wanted} {reason}")
    return found


def _goals(arguments: argparse.Namespace) -> Sequence[goals.Goal]:
    if arguments.cases == "attention":
        return GPU_ATTENTION_GOALS if arguments.device == "cuda" else ATTENTION_GOALS
    if arguments.grid:
        return GPU_GOALS
    return GOALS if arguments.full or arguments.one_step else ()


def _with_memory(result: Result) -> Result:
    """With the memory of an attention's training step, where the system can be asked."""
    attention = isinstance(result.case, AttentionCase) and result.case.mode == "training"
    if not (attention and result.times) or memory.missing():
        return result
    return replace(result, memory=memory.measure(result.case))


def _report(results: Sequence[Result], found: Limits) -> Report:
    return {"ceilings": asdict(found), "results": [result.record(found) for result in results]}  # type: ignore[call-overload]


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
    """Run what is asked for; 0, 1 if a case is over the error budget, 2 when none was measured."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.cases == "attention":
        _check_attention(parser, arguments)
    if arguments.memory and (why_not := memory.missing()):
        parser.error(why_not)
    if arguments.device == "cuda":
        _check_gpu(parser, arguments)
    if arguments.json:
        _check_file(parser, arguments.json)
    seconds = arguments.seconds
    if seconds is None:
        seconds = _SECONDS_FULL if arguments.full or arguments.grid else _SECONDS
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores / 2:
        print(
            f"this machine is busy (load {load:.1f}, {cores} cores): do not trust these times",
            file=sys.stderr,
        )
    device = DEVICES[arguments.device]()
    status = 0
    with select.use_backend(arguments.backend) if arguments.backend else nullcontext(), tf32(arguments.tf32):
        head = {
            **environment(shlex.join(["python", "-m", "fusedrnn", "bench", *(argv or [])]), device),
            "load": load,
        }

        def save(report: Report) -> None:
            if arguments.json:
                part = _part(arguments.json)
                part.write_text(lines({**head, **report}))
                part.replace(arguments.json)  # whole at any moment

        if arguments.memory:
            save(_memory())
        elif arguments.loaded:
            save(_loaded(seconds))
        else:
            status = _grid(arguments, seconds, device, save)
    return status


def _part(file: Path) -> Path:
    return file.with_suffix(".part")


def _check_file(parser: argparse.ArgumentParser, file: Path) -> None:
    """Leave with an error where nothing can be written: not after what takes minutes."""
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        is_new = not _part(file).exists()
        _part(file).open("a").close()
        if is_new:
            _part(file).unlink()
    except OSError as error:
        parser.error(f"--json: cannot write {file}: {error.strerror}")


def _check_attention(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Leave with an error where an option is about layers; say what cannot be measured."""
    for name in ("quick", "full", "one_step", "grid", "memory", "loaded", "cell", "time", "dtype", *_LAYOUTS):
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')}: of layers, not of attention")
    if arguments.compile and (why_not := compile_missing()):
        print(f"torch.compile: not timed: {why_not}")
        arguments.compile = False
    if arguments.device == "cpu" and (why_not := memory.missing()):
        print(why_not.replace("--memory: ", "memory: not measured: "))


def _check_gpu(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Leave with an error where there is no GPU, or what is asked for is about CPUs."""
    for name in ("full", "one_step", "memory", "loaded"):
        if getattr(arguments, name):
            parser.error(f"--{name.replace('_', '-')}: measures the CPU, not with --device cuda")
    if why_not := no_gpu():
        parser.error(why_not)
