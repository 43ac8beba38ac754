"""What the groups are meant to reach, and whether they do: the summary after the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from .ceilings import Limits
from .groups import CELLS
from .report import Result

GROUP_COLUMNS = ("group", "cases", "red", "geomean", "min", "slowest case")
GOAL_COLUMNS = ("goal", "limit", "reached", "verdict", "worst case")

Where = Callable[[Any], bool]  # of a case
_STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "geomean": geometric_mean,
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Goal:
    """A statistic of some cases and what it is meant to be.

    Attributes:
        groups: names of groups.full().
        about: which cases of the groups and what of them, in words.
        measure: a key of Result.measures.
        statistic: geomean, min or max.
        limit: at least this; of max, at most.
        where: which cases of the groups.
        backend: the one that it is about; any if None.
    """

    groups: tuple[str, ...]
    about: str
    measure: str
    statistic: str
    limit: float
    where: Where = lambda case: True
    backend: str | None = None

    def judge(self, results: Sequence[Result], ceilings: Limits) -> Verdict | None:
        """None if no case is meant."""
        meant = [
            r
            for r in results
            if r.group in self.groups and self.where(r.case) and self.backend in (None, r.backend)
        ]
        found = [(m[self.measure], r) for r in meant if self.measure in (m := r.measures(ceilings))]
        red = sum(not r.times for r in meant)
        if not found:
            return Verdict(self, None, "", red) if red else None
        reached = _STATISTICS[self.statistic]([value for value, _ in found])
        worst = (max if self.statistic == "max" else min)(found, key=lambda pair: pair[0])
        return Verdict(self, reached, worst[1].case.label, red)


@dataclass(frozen=True)
class Verdict:
    """A goal and what was reached; a case that was red, and so not timed, is a goal not met."""

    goal: Goal
    reached: float | None
    worst: str
    red: int

    @property
    def met(self) -> bool:
        if self.reached is None or self.red:
            return False
        most = self.goal.statistic == "max"
        return self.reached <= self.goal.limit if most else self.reached >= self.goal.limit

    def cells(self) -> tuple[str, ...]:
        goal = self.goal
        sign = "<=" if goal.statistic == "max" else ">="
        return (
            f"{', '.join(goal.groups)}: {goal.about}",
            f"{goal.statistic} {sign} {_number(goal, goal.limit)}",
            _number(goal, self.reached),
            f"RED {self.red}" if self.red else "ok" if self.met else "missed",
            self.worst,
        )

    def record(self) -> dict[str, Any]:
        goal = self.goal
        return {
            "groups": goal.groups,
            "about": goal.about,
            "measure": goal.measure,
            "statistic": goal.statistic,
            "limit": goal.limit,
            "reached": self.reached,
            "red": self.red,
            "met": self.met,
            "worst": self.worst,
        }


def _number(goal: Goal, value: float | None) -> str:
    if value is None:
        return "-"
    if goal.measure.endswith("seconds"):
        return f"{value * 1e6:.1f} us"
    return f"{value:.0%}" if goal.measure.startswith("of_") else f"{value:.2f}"


def _stored(storage: str, smallest: int, cell: str | None = None) -> Where:
    return lambda case: case.dtype == storage and case.hidden >= smallest and cell in (None, case.cell)


def _step_goals(storage: str, smallest: int, module: float, cell: float) -> list[Goal]:
    about, group = f"{storage}, H >= {smallest}", ("one step",)
    return [
        Goal(group, f"{about}, over nn.LSTM", "torch", "min", module, _stored(storage, smallest, "lstm")),
        Goal(group, f"{about}, over the cells", "cell", "min", cell, _stored(storage, smallest)),
    ]


# "Over" is torch's time over ours unless it says something else. A goal that names no statistic holds for
# every case: min.
GOALS = (
    Goal(("lstm",), "over torch", "torch", "geomean", 1.6),
    Goal(
        ("lstm",),
        "B <= 4, H <= 256, over torch",
        "torch",
        "geomean",
        2.5,
        lambda case: case.batch <= 4 and case.hidden <= 256,
    ),
    Goal(("lstm",), "over torch", "torch", "min", 1.0),
    Goal(("gru",), "over torch", "torch", "geomean", 5.0),
    Goal(("gru",), "over torch", "torch", "min", 1.3),
    Goal(("rnn_tanh",), "over torch", "torch", "geomean", 5.0),
    Goal(("rnn_tanh",), "over torch", "torch", "min", 1.3),
    Goal(("ragged",), "over torch", "torch", "geomean", 2.5),
    Goal(("projection",), "over torch", "torch", "geomean", 2.0),
    Goal(("bidirectional",), "over torch", "torch", "geomean", 2.0),
    Goal(("stacked",), "over torch", "torch", "geomean", 2.0),
    Goal(("bf16",), "H >= 256, over our fp32", "fused_fp32", "min", 1.4, lambda case: case.hidden >= 256),
    Goal(("bf16",), "lstm, over torch's bf16", "torch", "min", 1.0, lambda case: case.cell == "lstm"),
    Goal(
        ("bf16",), "gru, rnn_tanh, over torch's bf16", "torch", "min", 3.0, lambda case: case.cell != "lstm"
    ),
    *_step_goals("fp32", 64, 20.0, 4.0),
    *_step_goals("bf16", 256, 30.0, 8.0),
    *_step_goals("int8", 256, 30.0, 8.0),
    Goal(
        ("one step",),
        "fp32, H = 32: a call",
        "seconds",
        "max",
        5e-6,
        lambda case: case.dtype == "fp32" and case.hidden == 32,
    ),
    Goal(
        CELLS,
        "B = 64, H >= 256, inference: of the GEMM",
        "of_gemm",
        "min",
        0.85,
        lambda case: case.batch == 64 and case.hidden >= 256 and case.mode == "inference",
    ),
    Goal(
        (*CELLS, "one step"),
        "B = 1, inference, R beyond L2: of its level's bandwidth",
        "of_read_beyond_l2",
        "min",
        0.7,
        lambda case: case.batch == 1 and case.mode == "inference",
    ),
)


def _sized(layout: str, mode: str, hidden: int) -> Where:
    return lambda case: (case.layout, case.mode, case.hidden) == (layout, mode, hidden)


def _step_time(about: str, limit: float, where: Where, backend: str | None = None) -> Goal:
    about = f"lstm bf16 T1024 {about}: a step"
    return Goal(("named",), about, "step_seconds", "max", limit, where, backend)


# Times are of a graph's replay where the call could be captured, input projection included. FlashRNN's are
# those of its own chart (Pöppel, Beck, Hochreiter 2024, https://arxiv.org/abs/2412.07752): CUDA fused,
# H100 SXM, without the input projection.
GPU_GOALS = (
    _step_time("H64 B16 forward", 1.4e-6, _sized("dense", "inference", 64)),
    _step_time("H512 B16 forward, Triton", 3e-6, _sized("dense", "inference", 512), "triton"),
    _step_time("H512 B16 forward, CUDA", 1e-6, _sized("dense", "inference", 512), "native"),
    _step_time("H768 B16 forward, FlashRNN's", 4.76e-6, _sized("dense", "inference", 768)),
    _step_time("H768 B16 forward and backward, FlashRNN's", 13.3e-6, _sized("dense", "training", 768)),
    _step_time("12 x H64 B16 forward and backward, FlashRNN's", 8.44e-6, _sized("heads", "training", 64)),
    Goal(("named",), "over torch", "torch", "min", 1.0),
    Goal(("named",), "over torch, both replayed", "graph", "min", 1.0),
    Goal(CELLS, "over torch", "torch", "min", 1.0),
    Goal(CELLS, "over torch, both replayed", "graph", "min", 1.0),
)


def _least(group: str, over_torch: float, over_compile: float) -> list[Goal]:
    return [
        Goal((group,), "over plain torch code", "torch", "min", over_torch),
        Goal((group,), "over torch.compile of it", "compile", "min", over_compile),
    ]


ATTENTION_GOALS = (
    *_least("operator", 20.0, 8.0),
    *_least("module", 9.0, 4.0),
    Goal(
        ("operator", "module"),
        "peak extra memory, of inputs, weights, outputs and their gradients",
        "memory_fused",
        "max",
        1.2,
    ),
    # the operator is there for comparison: it is not told that the keys stay
    Goal(
        ("decoder step",),
        "memory projected, without beams: a call",
        "seconds",
        "max",
        15e-6,
        lambda case: case.form == "decoder" and case.beams == 1,
    ),
    Goal(
        ("decoder step",),
        "memory projected: over plain torch code",
        "torch",
        "min",
        5.0,
        lambda case: case.form == "decoder",
    ),
    Goal(("multihead",), "over nn.MultiheadAttention", "torch", "min", 1.0),
)


def _attend_time(about: str, mode: str, limit: float) -> Goal:
    about = f"B128 Tq50 Tk50 H1024 bf16 {about}"
    return Goal(
        ("operator",),
        about,
        "best_seconds",
        "max",
        limit,
        lambda case: case.hidden == 1024 and case.mode == mode,
    )


# Times are of a graph's replay where the call could be captured.
GPU_ATTENTION_GOALS = (
    _attend_time("forward", "inference", 60e-6),
    _attend_time("forward and backward", "training", 220e-6),
    *_least("operator", 15.0, 3.0),
    Goal(("multihead",), "with weights, over nn.MultiheadAttention", "torch", "min", 2.0),
)


def groups(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Rows of the summary, one per group, of torch's time over ours."""
    rows: list[tuple[str, ...]] = []
    for name in dict.fromkeys(result.group for result in results):
        mine = [result for result in results if result.group == name]
        timed = [result for result in mine if result.times]
        found: tuple[str, ...] = ("-", "-", "")
        if timed:
            slowest = min(timed, key=lambda result: result.ratios["torch"])
            mean = geometric_mean(result.ratios["torch"] for result in timed)
            found = (f"{mean:.2f}", f"{slowest.ratios['torch']:.2f}", slowest.case.label)
        rows.append((name, str(len(mine)), str(len(mine) - len(timed)), *found))
    return rows


def verdicts(results: Sequence[Result], ceilings: Limits, goals: Sequence[Goal] = GOALS) -> list[Verdict]:
    """Of every goal that a case of the results is meant by."""
    return [v for goal in goals if (v := goal.judge(results, ceilings)) is not None]
