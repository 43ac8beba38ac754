"""What the benchmark leaves: a table, JSON with the machine it ran on, and the README's table."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..testing import Row
from ..tools import version
from .cases import AnyCase, AttentionCase, Case
from .ceilings import Limits
from .device import Device
from .timing import Times

COLUMNS = (
    "case",
    "backend",
    "torch p50 (p20-p80) ms",
    "fused p50 (p20-p80) ms",
    "ratio",
    "other ratios",
    "GFLOP/s",
    "GB/s",
    "of ceiling",
)
GRAPH_COLUMNS = ("graph: torch ms", "fused ms", "ratio", "us a step")
ATTENTION_COLUMNS = ("Gelements/s", "memory, of the least: torch", "fused")


@dataclass(frozen=True)
class Result:
    """A case that was timed, or, without times, the row of it that is over budget.

    Attributes:
        times: per side: torch, fused, and what else the fused one was timed against.
        graph: of replays of a captured call, per side that could be captured.
        no_graph: why a side could not be.
        memory: peak extra bytes per side, where they were asked for.
        schedule: of a scan on a GPU.
    """

    group: str
    case: AnyCase
    backend: str
    worst: Row
    times: Mapping[str, Times] = field(default_factory=dict)
    rounds: int = 0
    graph: Mapping[str, Times] = field(default_factory=dict)
    no_graph: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    schedule: str = ""

    @property
    def ratios(self) -> dict[str, float]:
        """Of medians, per other side: above 1 the fused module is faster."""
        return {side: t.p50 / self.times["fused"].p50 for side, t in self.times.items() if side != "fused"}

    def measures(self, ceilings: Limits) -> dict[str, float]:
        """Every number that a goal may be about; none if the case was not timed."""
        if not self.times:
            return {}
        seconds, work = self.times["fused"].p50, self.case.work()
        best = self.graph.get("fused", self.times["fused"])
        measures = {
            **self.ratios,
            "seconds": seconds,
            "best_seconds": best.p50,
            "flops_per_second": work.flops / seconds,
            "step_seconds": best.p50 / self.case.time,
            "bytes_per_second": ceilings.moved(self.case) / seconds,
            "of_gemm": ceilings.gemm_seconds(self.case) / seconds,
            "of_read": ceilings.read_seconds(self.case) / seconds,
            "of_ceiling": ceilings.seconds(self.case) / seconds,
        }
        if ceilings.level(self.case) in ("L3", "DRAM"):
            measures["of_read_beyond_l2"] = measures["of_read"]
        if self.graph.keys() >= {"torch", "fused"}:
            measures["graph"] = self.graph["torch"].p50 / self.graph["fused"].p50
        if isinstance(self.case, AttentionCase):
            measures["elements_per_second"] = self.case.elements / seconds
        for side, peak in self.memory.items():
            measures[f"memory_{side}"] = peak / work.bytes
        return measures

    def attention_cells(self, ceilings: Limits) -> tuple[str, ...]:
        """What an attention adds to the row of the table."""
        found = self.measures(ceilings)
        if not found:
            return ("",) * len(ATTENTION_COLUMNS)
        memory = [found.get(f"memory_{side}") for side in ("torch", "fused")]
        return (
            f"{found['elements_per_second'] / 1e9:.2f}",
            *("-" if value is None else f"{value:.2f}" for value in memory),
        )

    def graph_cells(self, ceilings: Limits) -> tuple[str, ...]:
        """What a device with graphs adds to the row of the table."""
        if not self.times:
            return ("",) * len(GRAPH_COLUMNS)
        found = self.measures(ceilings)
        times = [f"{self.graph[s].p50 * 1e3:.4g}" if s in self.graph else "-" for s in ("torch", "fused")]
        ratio = f"{found['graph']:.2f}" if "graph" in found else "-"
        return *times, ratio, f"{found['step_seconds'] * 1e6:.2f}"

    def cells(self, ceilings: Limits) -> tuple[str, ...]:
        """The row of the table."""
        if not self.times:
            return self.case.label, self.backend, f"RED {self.worst}", *[""] * 6
        found = self.measures(ceilings)
        return (
            self.case.label,
            self.backend,
            _milliseconds(self.times["torch"]),
            _milliseconds(self.times["fused"]),
            f"{found['torch']:.2f}",
            ", ".join(f"{side} {ratio:.2f}" for side, ratio in self.ratios.items() if side != "torch"),
            f"{found['flops_per_second'] / 1e9:.1f}",
            f"{found['bytes_per_second'] / 1e9:.1f}",
            f"{found['of_ceiling']:.0%} {ceilings.bound(self.case)}",
        )

    def record(self, ceilings: Limits) -> dict[str, Any]:
        """For JSON; keys are only ever added, so that a later run can be held against an earlier one."""
        found, work = self.measures(ceilings), self.case.work()
        return {
            "group": self.group,
            **asdict(self.case),
            "backend": self.backend,
            "schedule": self.schedule,
            "parity": {**asdict(self.worst), "ok": self.worst.ok},
            "seconds": {side: asdict(t) for side, t in self.times.items()},
            "ratio": found.get("torch"),
            "ratios": self.ratios,
            "rounds": self.rounds,
            "graph_seconds": {side: asdict(t) for side, t in self.graph.items()},
            "graph_ratio": found.get("graph"),
            "no_graph": dict(self.no_graph),
            "step_seconds": found.get("step_seconds"),
            "flops": work.flops,
            "bytes": work.bytes,
            "resident_bytes": work.resident,
            "streamed_bytes": work.streamed,
            "level": ceilings.level(self.case),
            "bytes_per_second": found.get("bytes_per_second"),
            "of_gemm": found.get("of_gemm"),
            "of_read": found.get("of_read"),
            "of_ceiling": found.get("of_ceiling"),
            "bound": ceilings.bound(self.case),
            "divisions": work.divisions,
            "elements_per_second": found.get("elements_per_second"),
            "memory_bytes": dict(self.memory),
        }


def lines(report: Mapping[str, Any]) -> str:
    """JSON with a line for each result, which is what changes from one run to the next."""
    fields = []
    for key, value in report.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value)
        fields.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def _milliseconds(times: Times) -> str:
    p20, p50, p80 = (f"{seconds * 1e3:.4g}" for seconds in (times.p20, times.p50, times.p80))
    return f"{p50} ({p20}-{p80})"


def environment(command: str, device: Device) -> dict[str, Any]:
    """Where and with what the numbers were taken."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "commit": _commit(),
        "machine": {**device.describe(), "platform": platform.platform()},
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
    dense = {
        (case.cell, case.mode, case.hidden, case.batch): result
        for result in results
        if isinstance(case := result.case, Case) and case.layout == "dense"
    }
    hidden, batch = sorted({key[2] for key in dense}), sorted({key[3] for key in dense})
    lines = []
    if dense:
        lines += [
            f"| torch time / fused time, B = {' / '.join(map(str, batch))} | "
            + " | ".join(f"H = {h}" for h in hidden)
            + " |",
            "| --- |" + " --- |" * len(hidden),
        ]
        for cell, mode in dict.fromkeys(key[:2] for key in dense):
            row = [" / ".join(_short(dense.get((cell, mode, h, b))) for b in batch) for h in hidden]
            lines.append(f"| {cell} {mode} | " + " | ".join(row) + " |")
    rest = [result for result in results if result not in dense.values()]
    if rest:
        lines += ["", "| case | torch ms | fused ms | torch time / fused time |", "| --- | --- | --- | --- |"]
        for r in rest:
            times = [f"{r.times[side].p50 * 1e3:.2f}" if r.times else "RED" for side in ("torch", "fused")]
            lines.append(f"| {r.case.label} | {times[0]} | {times[1]} | {_short(r)} |")
    return "\n".join(lines)


def _short(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{result.ratios['torch']:.1f}" if result.times else "RED"
