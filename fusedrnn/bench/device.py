"""What the benchmark asks of the machine that it times, and a CPU's answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, Protocol

import torch

from ..tools import cpu_model, instruction_set
from . import ceilings
from .cases import AnyCase
from .ceilings import Limits
from .timing import on_host

Call = Callable[[], Any]


def in_turn(calls: Sequence[Call]) -> Call:
    """A call that makes one of them after the other."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()


class Device(Protocol):
    """A machine to time on.

    Attributes:
        name: torch's device type.
        graphs: whether calls can be captured once and replayed.
    """

    name: str
    graphs: bool

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds per call of that many calls in a row."""

    def sets(self, size: int) -> int:
        """How many inputs calls take in turn, where one call reads and writes ``size`` bytes of its own."""

    def capture(self, call: Call) -> Call:
        """A replay of what one ``call`` launches, after some to warm up. Raises what keeps it from that."""

    def side_stream(self) -> Any:
        """A context in which work runs beside what runs outside of it."""

    def synchronize(self) -> None:
        """Wait for all work."""

    def release(self) -> None:
        """Give back memory that is kept for reuse: the next case has other sizes."""

    def schedule(self, case: AnyCase, backend: str) -> str:
        """How that backend's forward scan of a layer is spread over the device; "" where there is one way."""

    def ceilings(self) -> Limits:
        """Measure what the machine can do."""

    def describe(self) -> dict[str, Any]:
        """What the report says about it, under "machine"."""


class Cpu:
    name, graphs = "cpu", False
    sample = staticmethod(on_host)

    def sets(self, size: int) -> int:
        return 1

    def capture(self, call: Call) -> Call:
        raise RuntimeError("a CPU has no graphs to capture")

    def side_stream(self) -> Any:
        raise RuntimeError("a CPU has no streams")

    def schedule(self, case: AnyCase, backend: str) -> str:
        return ""

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass

    def ceilings(self) -> Limits:
        return ceilings.measure()

    def describe(self) -> dict[str, Any]:
        return {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "isa": instruction_set(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
