"""How much of a time step is the wait that its schedule cannot do without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedrnn.bench.cases import ITEMSIZE

# What a step of a schedule waits for, as benchmarks.sync_latency names it; a stepped one waits for launches.
_WAITS = {
    "cta": "block",
    "resident": "block",
    "cluster": "push",
    "grid": "counter",
    "persistent": "counter",
}

Record = Mapping[str, Any]


def floor(name: str, size: int, exchanges: Sequence[Record]) -> float | None:
    """Seconds that the exchange of a step takes alone, by the rows of ``benchmarks.sync_latency``.

    Of the exchanges that the schedule waits for it is that among the most blocks, of the least data that is
    at least `size` bytes, or of the most there is. None where none was timed.
    """
    timed = [
        row for row in exchanges if row["mechanism"] == _WAITS.get(name) and "ns" in row and not row["wrong"]
    ]
    if not timed:
        return None
    enough = [row["bytes"] for row in timed if row["bytes"] >= size]
    data = min(enough) if enough else max(row["bytes"] for row in timed)
    widest = max(
        (row for row in timed if row["bytes"] == data), key=lambda row: (row["cluster"], row["blocks"])
    )
    return widest["ns"]["p50"] * 1e-9


def add(results: Sequence[dict[str, Any]], exchanges: Sequence[Record]) -> None:
    """Write `floor_seconds` and `of_floor`, its share of a step, into records of the benchmark.

    A training step has two exchanges, one each way.
    """
    for result in results:
        name, step = result.get("schedule"), result.get("step_seconds")
        if not name or not step:
            continue
        found = floor(name, result["batch"] * result["hidden"] * ITEMSIZE[result["dtype"]], exchanges)
        if found is not None:
            found *= 2 if result["mode"] == "training" else 1
        result["floor_seconds"] = found
        result["of_floor"] = None if found is None else found / step
