"""What the benchmark leaves: a table, JSON with the machine it ran on, and the README's table."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..doctor import cpu_model, instruction_set, version
from ..testing import Row
from .cases import Case
from .timing import Times

COLUMNS = (
    "case",
    "backend",
    "torch p50 (p20-p80) ms",
    "fused p50 (p20-p80) ms",
    "ratio",
    "GFLOP/s",
    "of GEMM",
)


@dataclass(frozen=True)
class Result:
    """A case that was timed, or, without times, the row of it that is over budget."""

    case: Case
    backend: str
    worst: Row
    stock: Times | None = None
    fused: Times | None = None
    rounds: int = 0

    @property
    def ratio(self) -> float | None:
        """Of medians; above 1 the fused module is faster."""
        return self.stock.p50 / self.fused.p50 if self.stock and self.fused else None

    def cells(self, gemm: float) -> tuple[str, ...]:
        """The row of the table; ``gemm`` is what the machine reaches in a large matrix product, in flop/s."""
        if self.stock is None or self.fused is None:
            return self.case.label, self.backend, f"RED {self.worst}", "", "", "", ""
        rate = self.case.work()[0] / self.fused.p50
        times = (_milliseconds(self.stock), _milliseconds(self.fused))
        ratio = self.stock.p50 / self.fused.p50
        return (
            self.case.label,
            self.backend,
            *times,
            f"{ratio:.2f}",
            f"{rate / 1e9:.1f}",
            f"{rate / gemm:.0%}",
        )

    def record(self, gemm: float) -> dict[str, Any]:
        flops, moved = self.case.work()
        return {
            **asdict(self.case),
            "backend": self.backend,
            "parity": {**asdict(self.worst), "ok": self.worst.ok},
            "seconds": {side: asdict(t) for side, t in (("torch", self.stock), ("fused", self.fused)) if t},
            "ratio": self.ratio,
            "rounds": self.rounds,
            "flops": flops,
            "bytes": moved,
            "of_gemm": flops / self.fused.p50 / gemm if self.fused else None,
        }


def _milliseconds(times: Times) -> str:
    return f"{times.p50 * 1e3:.3f} ({times.p20 * 1e3:.3f}-{times.p80 * 1e3:.3f})"


def environment(command: str, gemm: float) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": instruction_set(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gemm_flops_per_second": gemm,
            "platform": platform.platform(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "fusedrnn": version("fusedrnn"),
        },
    }


def _commit() -> str | None:
    """The checkout's commit, with -dirty when files differ from it; None outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(git, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def markdown(results: Sequence[Result]) -> str:
    """Ratios torch time / fused time: a table by H, with B=a / b / c in a cell, and one of the rest."""
    dense = [r for r in results if r.case.layout == "dense"]
    hidden = sorted({r.case.hidden for r in dense})
    batch = sorted({r.case.batch for r in dense})
    lines = []
    if dense:
        lines += [
            f"| torch time / fused time, B = {' / '.join(map(str, batch))} | "
            + " | ".join(f"H = {h}" for h in hidden)
            + " |",
            "| --- |" + " --- |" * len(hidden),
        ]
        for cell, mode in dict.fromkeys((r.case.cell, r.case.mode) for r in dense):
            found = {
                (r.case.hidden, r.case.batch): r for r in dense if (r.case.cell, r.case.mode) == (cell, mode)
            }
            row = [" / ".join(_short(found.get((h, b))) for b in batch) for h in hidden]
            lines.append(f"| {cell} {mode} | " + " | ".join(row) + " |")
    rest = [r for r in results if r.case.layout != "dense"]
    if rest:
        lines += ["", "| case | torch ms | fused ms | torch time / fused time |", "| --- | --- | --- | --- |"]
        for r in rest:
            times = [f"{t.p50 * 1e3:.2f}" if t else "RED" for t in (r.stock, r.fused)]
            lines.append(f"| {r.case.label} | {times[0]} | {times[1]} | {_short(r)} |")
    return "\n".join(lines)


def _short(result: Result | None) -> str:
    if result is None:
        return "-"
    return "RED" if result.ratio is None else f"{result.ratio:.1f}"
