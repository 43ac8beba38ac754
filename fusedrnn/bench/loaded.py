"""`--loaded`: what other work on the machine costs torch.nn and fusedrnn.

As many processes as there are cores compute without pause beside the benchmark. A thread that shares its core
with one of them gets half of it, so the fair slowdown is (burning processes + threads of the call) / cores: 2
where all three are equal. More than that is time spent waiting for threads that do not run, at barriers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from .cases import MODES, Case, grid
from .groups import TIME
from .prepared import prepare
from .timing import Times, interleave

SIDES = ("torch", "fused")
COLUMNS = ("case", "torch ms, loaded", "slowdown", "fused ms, loaded", "slowdown", "verdict")
CASES = (
    *grid(("lstm", "gru"), (128, 256), (1, 8, 64), TIME, MODES, ("dense",)),
    *grid(("lstm", "gru"), (256,), (1,), 1, ("inference",), ("step",)),
)
WITHIN = 2.5  # of the fair slowdown
_SAMPLE = 0.05  # seconds: many turns of the scheduler
# It ends with its parent, however that one ends.
_BURN = """
import os, sys
print(flush=True)
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextmanager
def burning(processes: int) -> Iterator[None]:
    """That many processes compute until the end of the block."""
    with ExitStack() as stack:
        for _ in range(processes):
            command = [sys.executable, "-c", _BURN, str(os.getpid())]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE))
            stack.callback(process.kill)
            assert process.stdout is not None
            process.stdout.readline()
        yield


def fair(burning: int, threads: int, cores: int) -> float:
    """The slowdown of a call whose threads get as much of the cores as every other process."""
    return max(1.0, (burning + threads) / cores)


def run(step: Callable[[str], None], seconds: float, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Records of cases, timed in turns without the load and then with it.

    ``step`` is told the label of a case before each of its two timings.
    """
    cores = os.cpu_count() or 1
    limit = WITHIN * fair(cores, torch.get_num_threads(), cores)
    alone = [_time(step, case, seconds) for case in cases]
    with burning(cores):
        busy = [_time(step, case, seconds) for case in cases]
    records = []
    for case, before, after in zip(cases, alone, busy):
        slowdown = {side: after[side].p50 / before[side].p50 for side in SIDES}
        records.append(
            {
                **asdict(case),
                "label": case.label,
                "alone": {side: asdict(before[side]) for side in SIDES},
                "loaded": {side: asdict(after[side]) for side in SIDES},
                "slowdown": slowdown,
                "limit": limit,
                "met": slowdown["fused"] <= limit,
            }
        )
    return records


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """The row of the table."""
    sides = []
    for side in SIDES:
        sides += [f"{record['loaded'][side]['p50'] * 1e3:.2f}", f"{record['slowdown'][side]:.1f}"]
    return record["label"], *sides, "ok" if record["met"] else f"missed ({record['limit']:.1f})"


def _time(step: Callable[[str], None], case: Case, seconds: float) -> dict[str, Times]:
    step(case.label)
    prepared = prepare(case)
    with case.grad_mode():
        return interleave(prepared.calls(), seconds, shortest=_SAMPLE)[0]
