"""A CUDA GPU: timing by events, replays of graphs, and what the GPU can do, measured in the same run."""

from __future__ import annotations

import gc
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..backends.native import cuda
from ..backends.triton import plan
from ..cells import CELLS
from ..tools import DTYPES, tf32, version
from .cases import AnyCase, Case
from .device import Call, Cpu, Device

SETS = 4  # inputs in turn where one would stay in the L2 cache
_WARM = 3  # calls before a capture: what is compiled or allocated once must not be captured
_SIZE, _COPY = 8192, 1 << 30  # rows of the matrices, bytes of the copy
_TIMES = 5  # samples of a ceiling; the fastest counts
_QUERY = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")


@dataclass(frozen=True)
class GpuCeilings:
    """The least time of a case is the longer of two:

    * its floating-point operations at the rate of torch's product of matrices of 8192 x 8192 in its dtype
      (of fp32 in TF32 where cuDNN may use it);
    * the bytes that must move at least once (cases.Work.bytes) at the bandwidth of a copy within the memory
      of the device.

    A recurrent matrix that a kernel keeps on the chip is read once, so its repeated reads are no part of it;
    nor is the latency of one step after the other, which is what small cases are bound by.

    Attributes:
        flops: per second, by dtype, and of fp32 also in TF32.
        copy: bytes per second, read and written.
        fp32: under which key of ``flops`` the products of fp32 fall: fp32 or tf32.
    """

    flops: Mapping[str, float]
    copy: float
    fp32: str

    def level(self, case: AnyCase) -> str:
        return "DRAM"

    def moved(self, case: AnyCase) -> float:
        return case.work().bytes

    def gemm_seconds(self, case: AnyCase) -> float:
        return case.work().flops / self.flops[self.fp32 if case.dtype == "fp32" else case.dtype]

    def read_seconds(self, case: AnyCase) -> float:
        return self.moved(case) / self.copy

    def seconds(self, case: AnyCase) -> float:
        """No run of the case is faster."""
        return max(self.gemm_seconds(case), self.read_seconds(case))

    def bound(self, case: AnyCase) -> str:
        return "GEMM" if self.gemm_seconds(case) >= self.read_seconds(case) else self.level(case)

    def best(self, other: GpuCeilings) -> GpuCeilings:
        """The higher of each rate."""
        flops = {name: max(rate, other.flops[name]) for name, rate in self.flops.items()}
        return replace(self, flops=flops, copy=max(self.copy, other.copy))

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in self.flops.items())
        return f"GEMM: {rates} TFLOP/s; products of fp32 are {self.fp32}\ncopy: {self.copy / 1e9:.0f} GB/s"


class Cuda:
    """The current CUDA device."""

    name, graphs = "cuda", True

    @cached_property
    def _l2(self) -> int:
        return int(torch.cuda.get_device_properties().L2_cache_size)

    @cached_property
    def _filler(self) -> Tensor:
        """Twice the L2 cache: what is written there pushes out all else."""
        with torch.inference_mode(False):  # such a tensor may be written to in either mode
            return torch.empty(2 * self._l2, dtype=torch.uint8, device=self.name)

    def sample(self, call: Call, repeats: int) -> float:
        """Seconds per call between two events on the stream, with an L2 cache that holds nothing of it.

        While the cache is being filled the host gets ahead, so that the first launches do not wait for it.
        """
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._filler.zero_()
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    def sets(self, size: int) -> int:
        return SETS if size < self._l2 else 1

    def capture(self, call: Call) -> Call:
        before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM):
                    call()
            with torch.cuda.graph(graph, stream=stream):
                call()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        before.wait_stream(stream)
        replay: Call = graph.replay
        return replay

    def side_stream(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.Stream())
        return context

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def schedule(self, case: AnyCase, backend: str) -> str:
        if not isinstance(case, Case):
            return ""
        dtype = DTYPES[case.dtype]
        if backend == "native":
            return cuda.schedule(case.cell, dtype, case.hidden)
        if backend != "triton":
            return ""
        gates, directions = len(CELLS[case.cell].gates), 2 if case.layout == "bidirectional" else 1
        sizes = (gates, case.hidden, dtype.itemsize, case.batch, directions)
        found = plan.choose(*sizes, False, plan.machine(torch.device("cuda", torch.cuda.current_device())))
        return found.schedule

    def ceilings(self) -> GpuCeilings:
        flops = {name: self._gemm_rate(DTYPES[name], "off") for name in ("bf16", "fp16", "fp32", "fp64")}
        flops["tf32"] = self._gemm_rate(torch.float32, "on")
        source = torch.empty(_COPY, dtype=torch.uint8, device=self.name).random_()
        target = torch.empty_like(source)
        copy = 2 * _COPY / self._fastest(lambda: target.copy_(source))
        self.release()
        return GpuCeilings(flops, copy, "tf32" if torch.backends.cudnn.allow_tf32 else "fp32")

    def _gemm_rate(self, dtype: torch.dtype, reduced: str) -> float:
        # random: on zeros the chip needs less power and runs faster
        a, b = (torch.randn(_SIZE, _SIZE, device=self.name).to(dtype) for _ in range(2))
        with torch.inference_mode(), tf32(reduced):
            return 2 * _SIZE**3 / self._fastest(lambda: a @ b)

    def _fastest(self, call: Call) -> float:
        call()
        return min(self.sample(call, 3) for _ in range(_TIMES))

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties()
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        half = "allow_{}_reduced_precision_reduction"
        return {
            **Cpu().describe(),
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self._l2,
            "state": _state(),
            "cuda": torch.version.cuda,
            "cudnn": cudnn.version(),
            "triton": version("triton"),
            "flags": {
                "cudnn.allow_tf32": cudnn.allow_tf32,
                "cudnn.benchmark": cudnn.benchmark,
                "cudnn.deterministic": cudnn.deterministic,
                "matmul.allow_tf32": matmul.allow_tf32,
                **{f"matmul.{name}": getattr(matmul, name) for name in map(half.format, ("bf16", "fp16"))},
            },
        }


def _state() -> dict[str, str]:
    """Of the first GPU that nvidia-smi lists, as it is now; empty without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return dict(zip(_QUERY, map(str.strip, lines[0].split(",")))) if lines else {}


DEVICES: dict[str, Callable[[], Device]] = {"cpu": Cpu, "cuda": Cuda}
