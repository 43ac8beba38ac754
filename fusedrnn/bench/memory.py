"""`--memory`, and of an attention always: the peak extra memory of a training step, of torch and of fusedrnn.

What is measured is the peak of the resident set (VmHWM of /proc/self/status, set back through
/proc/self/clear_refs) over the resident set before the step: the first forward and backward of a module in a
process of its own, after a tiny one of another size has loaded every library. torch's profiler would see
tensors only; the resident peak also counts oneDNN's scratch, ours, and packed weights, each once touched. It
counts in pages, and huge ones where the kernel grants them: differences of some hundred kilobytes mean
nothing. What is freed goes back to the system at once (glibc's MALLOC_MMAP_THRESHOLD_).
Weights, input and the output's gradient exist before; output, saved tensors and gradients are the step's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch

from ..backends import select
from .attention import PreparedAttention
from .cases import AnyCase, AttentionCase, Case, grid
from .groups import CELLS, TIME
from .prepared import Prepared

SIDES = ("torch", "fused")
COLUMNS = ("case", "torch MB", "fused MB", "torch / fused")
CASES = tuple(grid(CELLS, (128, 256, 512), (8, 64), TIME, ("training",), ("dense",)))


def missing() -> str | None:
    """Why this system cannot be asked; None if it can."""
    return None if Path("/proc/self/clear_refs").exists() else "--memory: needs Linux's /proc/self/clear_refs"


def measure(case: AnyCase) -> dict[str, int]:
    """Peak extra bytes of a training step per side, each in a fresh process.

    Raises:
        RuntimeError: a process failed; with what it said.
    """
    found = {}
    # each tensor a mapping of its own: the peak is of what is alive, not of what glibc keeps for later
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment["FUSEDRNN_BACKEND"] = select.requested() or ""
    for side in SIDES:
        code = f"from {__name__} import report_peak; report_peak()"
        command = [sys.executable, "-c", code, side, json.dumps([type(case).__name__, *astuple(case)])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case.label} {side}: {done.stderr}")
        found[side] = int(done.stdout)
    return found


def run(step: Callable[[str], None], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Records of cases; ``step`` is told each one's label before it runs."""
    records = []
    for case in cases:
        step(case.label)
        peak = measure(case)
        records.append(
            {**asdict(case), "label": case.label, "bytes": peak, "ratio": peak["torch"] / peak["fused"]}
        )
    return records


def cells(record: dict[str, Any]) -> tuple[str, ...]:
    """The row of the table."""
    sizes = [f"{record['bytes'][side] / 1e6:.1f}" for side in SIDES]
    return record["label"], *sizes, f"{record['ratio']:.2f}"


def report_peak() -> None:
    """What the fresh process does: print the peak of a side and a case, as `measure` names them."""
    side, (kind, *fields) = sys.argv[1], json.loads(sys.argv[2])
    kinds = {cls.__name__: cls for cls in (Case, AttentionCase)}
    print(_peak(kinds[kind](*fields), side))


def _peak(case: AnyCase, side: str) -> int:
    _training_step(_tiny(case), side)()
    step = _training_step(case, side)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _tiny(case: AnyCase) -> AnyCase:
    """A case that runs the same code: its pages are no memory of a step."""
    if isinstance(case, AttentionCase):
        return replace(case, batch=1, queries=16, keys=16)
    return Case(case.cell, 8, 1, 4, "training", "dense")


def _training_step(case: AnyCase, side: str) -> Callable[[], Any]:
    if isinstance(case, AttentionCase):
        return PreparedAttention.of(case).call(side)
    prepared = Prepared.of(case)
    module = prepared.stock if side == "torch" else prepared.fused
    input, hx = prepared.inputs
    input.requires_grad_()
    grad = torch.ones(case.time, case.batch, case.hidden)
    return lambda: torch.autograd.grad(module(input, hx)[0], [input, *module.parameters()], grad)


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")
