"""Interleaved timing: what is compared takes turns, so that noise and clock changes hit both."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

SHORTEST = 2e-3  # seconds of one sample, far above the clock's resolution and a call's jitter
FEWEST = 7  # rounds


@dataclass(frozen=True)
class Times:
    """Seconds per call: quantiles over the rounds."""

    p20: float
    p50: float
    p80: float


def _sample(call: Callable[[], Any], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def interleave(calls: Sequence[Callable[[], Any]], seconds: float) -> tuple[list[Times], int]:
    """Time calls in turns.

    Args:
        seconds: for how long; at least FEWEST rounds are made.

    Returns:
        One Times per call, and the number of rounds.
    """
    repeats = []
    for call in calls:
        call()
        call()
        repeats.append(max(1, round(SHORTEST / max(_sample(call, 2), 1e-7) + 0.5)))
    samples: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    end = perf_counter() + seconds
    rounds = 0
    while rounds < FEWEST or perf_counter() < end:
        for k in order:
            samples[k].append(_sample(calls[k], repeats[k]))
        # whoever runs second finds a warmer machine
        order.reverse()
        rounds += 1
    return [_quantiles(column) for column in samples], rounds


def _quantiles(values: Sequence[float]) -> Times:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Times(fifths[0], statistics.median(values), fifths[3])
