"""What the machine can do, measured in the same run: the rate of a GEMM, and how fast memory is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Protocol, Self

import torch

from ..backends import native
from ..backends.native import linear
from ..tools import DTYPES, kernels
from .cases import AnyCase

LEVELS = ("L1", "L2", "L3", "DRAM")
_GUESS = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}  # where the system does not say
_READ = 512  # bytes: kReadBytes of csrc/cpu/scan.h
_SAMPLE = 64 << 20  # bytes that one call reads at least
_SECONDS, _FEWEST = 0.2, 10  # of a measurement, and calls in it


class Limits(Protocol):
    """What a case can be held against: the least time that it could take on a machine."""

    def level(self, case: AnyCase) -> str:
        """The memory that ``read_seconds`` is about."""

    def moved(self, case: AnyCase) -> float:
        """Bytes that it has to deliver."""

    def gemm_seconds(self, case: AnyCase) -> float: ...

    def read_seconds(self, case: AnyCase) -> float: ...

    def seconds(self, case: AnyCase) -> float:
        """The least time of a case."""

    def bound(self, case: AnyCase) -> str:
        """What ``seconds`` is the time of."""

    def best(self, other: Self) -> Self:
        """The higher of each rate."""


@dataclass(frozen=True)
class Ceilings:
    """The least time of a case is the longest of three, with all threads of the run:

    * its floating-point operations at the rate of a product of matrices of 1024 x 1024, torch's or that of
      our projections, whichever is faster: in fp64, in fp32, or for half precision in fp32 or bf16;
    * the bytes that each step reads again (cases.Work.streamed) at the bandwidth of the level that holds
      them, which is the first level whose size is at least Work.resident (L1 and L2: sizes of all threads'
      cores together, as they share a matrix out);
    * its divisions at the rate of torch.reciprocal on numbers that stay in L2. A kernel in which several tanh
      share one division would need fewer; ours does not.

    The fraction of the ceiling is that time over the measured one. What the definition leaves out (input and
    output, activations, barriers, the first touch of a weight) makes the fraction smaller; a busy moment in
    which the ceiling was measured, or products of another shape that suit a cache better, make it larger.

    Attributes:
        threads: of torch.
        cache: bytes of the cache levels, L1 and L2 of one core.
        flops: per second, by dtype.
        bandwidth: bytes per second that a plain read reaches, by number of threads and level: every thread
            reads its own share of a buffer of half the level's size (DRAM: four times the last cache), again
            and again; the best of many times, as of the matrix products. Empty without fusedrnn._C.
        divisions: fp32, per second.
    """

    threads: int
    cache: Mapping[str, int]
    flops: Mapping[str, float]
    bandwidth: Mapping[int, Mapping[str, float]]
    divisions: float

    def level(self, case: AnyCase) -> str:
        """The level that holds what a case reads every step."""
        resident = case.work().resident
        fits = (name for name, size in _sizes(self.cache, self.threads).items() if resident <= size)
        return next(fits, "DRAM")

    def moved(self, case: AnyCase) -> float:
        return case.work().streamed

    def gemm_seconds(self, case: AnyCase) -> float:
        rate = self.flops["fp64" if case.dtype == "fp64" else "fp32"]
        if case.dtype in ("bf16", "fp16"):
            rate = max(rate, self.flops["bf16"])
        return case.work().flops / rate

    def read_seconds(self, case: AnyCase) -> float:
        """Zero where bandwidth was not measured."""
        if not self.bandwidth:
            return 0.0
        return self.moved(case) / self.bandwidth[self.threads][self.level(case)]

    def seconds(self, case: AnyCase) -> float:
        return self._bound(case)[0]

    def bound(self, case: AnyCase) -> str:
        return self._bound(case)[1]

    def _bound(self, case: AnyCase) -> tuple[float, str]:
        return max(
            (self.gemm_seconds(case), "GEMM"),
            (self.read_seconds(case), self.level(case)),
            (case.work().divisions / self.divisions, "division"),
            key=lambda pair: pair[0],
        )

    def best(self, other: Ceilings) -> Ceilings:
        """The higher of each rate: a busy moment lowers what is measured in it."""
        flops = {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()}
        bandwidth = {
            threads: {level: max(rate, other.bandwidth[threads][level]) for level, rate in levels.items()}
            for threads, levels in self.bandwidth.items()
        }
        divisions = max(self.divisions, other.divisions)
        return replace(self, flops=flops, bandwidth=bandwidth, divisions=divisions)

    def __str__(self) -> str:
        rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in self.flops.items())
        lines = [f"GEMM, {self.threads} threads: {rates} GFLOP/s"]
        for threads, levels in self.bandwidth.items():
            rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in levels.items())
            lines.append(f"read, {threads} threads: {rates} GB/s")
        lines.append(f"divisions, {self.threads} threads: {self.divisions / 1e9:.1f} G/s")
        return "\n".join(lines)


def measure() -> Ceilings:
    """The ceilings of this machine, in about two seconds."""
    cache, threads = cache_sizes(), torch.get_num_threads()
    counts = sorted({1, threads}) if native.unavailable() is None else []
    bandwidth = {count: {level: _read_rate(level, cache, count) for level in LEVELS} for count in counts}
    flops = {name: _gemm_rate(DTYPES[name]) for name in ("fp32", "fp64", "bf16")}
    return Ceilings(threads, cache, flops, bandwidth, _division_rate(cache, threads))


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches of core 0 as the system gives them; a guess where it does not."""
    found = dict(_GUESS)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        name, size = f"L{(index / 'level').read_text().strip()}", (index / "size").read_text().strip()
        if name in found and (index / "type").read_text().strip() != "Instruction":
            found[name] = int(size.rstrip("KM")) << {"K": 10, "M": 20}[size[-1]]
    return found


def _sizes(cache: Mapping[str, int], threads: int) -> dict[str, int]:
    """Bytes that each cache level holds for that many threads, a core each."""
    return {name: size if name == "L3" else threads * size for name, size in cache.items()}


def _gemm_rate(dtype: torch.dtype) -> float:
    n = 1024
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    with torch.inference_mode():
        seconds = _best(lambda: a @ b)
        if dtype is torch.float32 and native.unavailable() is None:
            # on AMD's CPUs twice as fast as MKL's
            seconds = min(seconds, _best(lambda: linear.forward(a, b, None, True)))
    return 2 * n**3 / seconds


def _division_rate(cache: Mapping[str, int], threads: int) -> float:
    """With numbers and results in half of L2."""
    numbers = torch.rand(threads * cache["L2"] // 16) + 1
    results = torch.empty_like(numbers)
    return numbers.numel() / _best(lambda: torch.reciprocal(numbers, out=results))


def _read_rate(level: str, cache: Mapping[str, int], threads: int) -> float:
    size = 4 * cache["L3"] if level == "DRAM" else _sizes(cache, threads)[level] // 2
    size -= size % (_READ * threads)
    buffer, repeats = torch.zeros(size, dtype=torch.uint8), max(1, _SAMPLE // size)
    read = kernels().read
    return size * repeats / _best(lambda: read(buffer.data_ptr(), size, repeats, threads))


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest call: other work on the machine makes calls slower, never faster."""
    times: list[float] = []
    end = perf_counter() + _SECONDS
    while perf_counter() < end or len(times) < _FEWEST:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)
