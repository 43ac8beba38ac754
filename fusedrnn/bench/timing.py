"""Interleaved timing: what is compared takes turns, so that noise and clock changes hit both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

SHORTEST = 5e-3  # seconds of one sample: behind the other side a small call takes ten calls to be itself
TRIES = 3  # calls that tell how many a sample takes
FEWEST = 7  # rounds
SLOW = 0.05  # seconds of a call
FEWEST_SLOW, PATIENCE = 3, 2.0  # rounds that are enough once this many seconds are over


@dataclass(frozen=True)
class Times:
    """Seconds per call: quantiles over the rounds."""

    p20: float
    p50: float
    p80: float


def on_host(call: Callable[[], Any], repeats: int) -> float:
    """Seconds per call, by the host's clock."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    seconds: float,
    shortest: float = SHORTEST,
    sample: Callable[[Callable[[], Any], int], float] = on_host,
) -> tuple[dict[str, Times], int]:
    """Time calls in turns.

    A turn begins with a sample that is not counted, unless a call is slow: memory that the other side has
    given back to the system, and what it has left in the caches, would be counted as this side's.

    Args:
        calls: by name.
        seconds: for how long; at least FEWEST rounds are made, or FEWEST_SLOW of slow calls.
        shortest: seconds of one sample; a shorter call is repeated for as long.
        sample: seconds per call of that many calls.

    Returns:
        Times by name, and the number of rounds.
    """
    repeats, warms = {}, {}
    for name, call in calls.items():
        call()
        once = min(sample(call, 1) for _ in range(TRIES))
        warms[name] = once <= SLOW
        repeats[name] = max(1, round(shortest / max(once, 1e-7) + 0.5))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin, rounds = perf_counter(), 0
    while not _enough(rounds, perf_counter() - begin, seconds):
        for name in order:
            if warms[name]:
                sample(calls[name], repeats[name])
            samples[name].append(sample(calls[name], repeats[name]))
        # whoever runs second finds a warmer machine
        order.reverse()
        rounds += 1
    return {name: _quantiles(column) for name, column in samples.items()}, rounds


def _enough(rounds: int, elapsed: float, seconds: float) -> bool:
    return rounds >= (FEWEST if elapsed < PATIENCE else FEWEST_SLOW) and elapsed >= seconds


def _quantiles(values: Sequence[float]) -> Times:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Times(fifths[0], statistics.median(values), fifths[3])
