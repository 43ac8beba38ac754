"""A trained network before and after `replace()`: differences and times."""

from __future__ import annotations

import copy
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.explain import explain

LEAST = 11  # pairs of runs; a quantile of fewer says nothing


class MissingPackage(RuntimeError):
    """A package of the demo extra is not installed."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the demo needs the package {name}, which is not installed: run "
            "pip install 'fusedrnn[demo]', or make demo in a checkout"
        )


def require(module: str, package: str) -> Any:
    """The module, or MissingPackage with the name of the package that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(package) from error


class Sides(Protocol):
    """The same computation before and after."""

    @property
    def stock(self) -> Callable[[Any], Any]: ...
    @property
    def fused(self) -> Callable[[Any], Any]: ...


class Pair:
    """A trained network as it came, and a copy of it whose recurrent modules are replaced."""

    def __init__(self, stock: nn.Module) -> None:
        self.stock = stock
        self.fused = copy.deepcopy(stock)
        self.report = fusedrnn.replace(self.fused)

    @torch.inference_mode()
    def outputs(self, inputs: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Of all `inputs`, before and after."""
        return [self.stock(item) for item in inputs], [self.fused(item) for item in inputs]

    @torch.inference_mode()
    def enabled_outputs(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Of the network as it came, under `enable()`."""
        with fusedrnn.enable():
            return [self.stock(item) for item in inputs]

    @torch.inference_mode()
    def backend(self, item: Any) -> str:
        """What the replaced `lstm` runs on, given `item`."""
        seen: list[str] = []

        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(explain(module, *inputs).backend)

        hook = self.fused.get_submodule("lstm").register_forward_pre_hook(look)
        self.fused(item)
        hook.remove()
        return seen[0]


@dataclass(frozen=True)
class Timing:
    """Seconds per input from interleaved runs, and quantiles of the ratio within each pair of runs."""

    stock: float
    fused: float
    low: float
    high: float

    @property
    def ratio(self) -> float:
        return self.stock / self.fused

    def per(self, parts: int) -> Timing:
        """For each of the equal parts of an input."""
        return replace(self, stock=self.stock / parts, fused=self.fused / parts)


@torch.inference_mode()
def interleave(pair: Sides, inputs: Sequence[Any], seconds: float) -> Timing:
    """Time both sides over all `inputs`, in turns for `seconds`."""

    def run(network: Callable[[Any], Any]) -> float:
        start = time.perf_counter()
        for item in inputs:
            network(item)
        return (time.perf_counter() - start) / len(inputs)

    samples: list[tuple[float, float]] = []
    run(pair.stock)
    run(pair.fused)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples) < LEAST:
        # Whoever runs second finds warmer caches and a hotter machine.
        if len(samples) % 2:
            fused, stock = run(pair.fused), run(pair.stock)
        else:
            stock, fused = run(pair.stock), run(pair.fused)
        samples.append((stock, fused))
    ratios = statistics.quantiles([stock / fused for stock, fused in samples], n=5)
    stock, fused = (statistics.median(side) for side in zip(*samples))
    return Timing(stock, fused, ratios[0], ratios[-1])


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Infinite when either side has a NaN."""
    return max(float((a - b).abs().nan_to_num(nan=math.inf).max()) for a, b in zip(before, after))
