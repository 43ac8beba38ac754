"""The one file that a run leaves, and the short tables that it ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fusedrnn import terminal
from fusedrnn.bench.cases import Case

from . import floors
from .driver import COLUMNS, Outcome

BENCHMARK, NATIVE, LATENCY, ATTENTION = "benchmark", "native benchmark", "latency", "attention benchmark"
_CASE_COLUMNS = (
    "named case",
    "backend",
    "us a step",
    "over torch",
    "both replayed",
    "schedule",
    "of its floor",
)
_GOAL_COLUMNS = ("goal", "limit", "reached", "verdict")


def report(head: Mapping[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """``head``, every step, and what the benchmark found beside them: its results get a line each.

    Steps of a scan are held against their floor, where what they wait for was timed too.
    """
    records = [outcome.record() for outcome in outcomes]
    by_name = {record["name"]: record["result"] or {} for record in records if "result" in record}
    if exchanges := by_name.get(LATENCY, {}).get("results"):
        for name in (BENCHMARK, NATIVE):
            floors.add(by_name.get(name, {}).get("results", ()), exchanges)
    found: dict[str, Any] = {}
    for record in records:
        if record["name"] == BENCHMARK:
            found = record.pop("result") or {}
    return {**head, "steps": records, **{key: value for key, value in found.items() if key not in head}}


def show(found: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Print what a report says: the named cases, the goals, and the steps last."""
    of_step = {step["name"]: step.get("result") or {} for step in found["steps"]}
    results = [*of_step.get(NATIVE, {}).get("results", ()), *found.get("results", ())]
    named = [result for result in results if result["group"] == "named"]
    if named:
        terminal.table(_CASE_COLUMNS, [_case(result) for result in named])
        print()
    reached = [*found.get("goals", ()), *of_step.get(ATTENTION, {}).get("goals", ())]
    if reached:
        terminal.table(_GOAL_COLUMNS, [_goal(goal) for goal in reached])
        print()
    terminal.table(COLUMNS, [outcome.cells() for outcome in outcomes])


def _case(result: Mapping[str, Any]) -> tuple[str, ...]:
    label = Case(**{field.name: result[field.name] for field in fields(Case)}).label
    if not result["parity"]["ok"]:
        return label, result["backend"], "RED", *[""] * 4
    ratios = (result["ratio"], result["graph_ratio"])
    of_floor = result.get("of_floor")
    return (
        label,
        result["backend"],
        f"{result['step_seconds'] * 1e6:.2f}",
        *map(_number, ratios),
        result.get("schedule", "-"),
        "-" if of_floor is None else f"{of_floor:.0%}",
    )


def _goal(goal: Mapping[str, Any]) -> tuple[str, ...]:
    scale = 1e6 if goal["measure"] == "step_seconds" else 1
    numbers = (None if goal[key] is None else goal[key] * scale for key in ("limit", "reached"))
    about = f"{', '.join(goal['groups'])}: {goal['about']}"
    return about, *map(_number, numbers), "ok" if goal["met"] else "missed"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
