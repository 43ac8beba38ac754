"""What is done on a GPU, in order: the build, proofs, measurements."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from .checks import CHECKS
from .driver import ROOT, SKIPPED, Step
from .summary import ATTENTION, BENCHMARK, LATENCY, NATIVE

# What tests without a GPU set would run here too.
_COMPILED = {"TRITON_INTERPRET": "0"}
# cuBLAS gives the same bits from run to run with a workspace of fixed size.
_REPEATABLE = {**_COMPILED, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
# Each tensor in an allocation of its own: the sanitizer sees where it ends.
_SANITIZED = {**_REPEATABLE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_ENVIRONMENT = {
    "memcheck": _SANITIZED,
    "racecheck": _SANITIZED,
    NATIVE: _COMPILED,
    BENCHMARK: _COMPILED,
}
# Those that run on the hardware where there is a GPU, elsewhere in an interpreter.
_TESTS = ("test_triton*.py", "test_native_cuda.py")
_TINY_PARITY = ("--cell", "lstm", "--dtype", "fp32")
# Seconds of each step, and for --quick, which leaves out those without. The benchmark has what is left.
_SECONDS: dict[str, tuple[float, float | None]] = {
    "build": (60, 45),
    "doctor": (10, None),
    "tests": (45, None),
    "parity": (60, 15),
    "memcheck": (25, None),
    "racecheck": (25, None),
    "graphs": (20, 12),
    "sync": (10, 8),
    "streams": (10, 8),
    "wavefront": (10, None),
    "determinism": (15, 8),
    "long": (20, None),
    LATENCY: (10, None),
    ATTENTION: (20, None),
    NATIVE: (40, None),
    BENCHMARK: (0, 0),
}
_MARGIN = 0.15  # of the benchmark's time, for the case that it is at and for its report


def steps(device: str, quick: bool, tests: Path = ROOT / "tests") -> list[Step]:
    """The steps on a device; on the CPU with the smallest sizes, to show that each of them works."""
    dry = device == "cpu"
    commands = {
        "build": _python("benchmarks.gpu.build"),
        "doctor": _python("fusedrnn", "doctor"),
        "tests": _pytest(tests) if device == "cuda" else _skip("tests of GPU kernels on hardware need one"),
        "parity": _parity(device, *(_TINY_PARITY if dry or quick else ())),
        "memcheck": _sanitizer(device, "memcheck"),
        "racecheck": _sanitizer(device, "racecheck"),
        **{name: _check(device, name, *(("--tiny",) if dry else ())) for name in CHECKS},
        LATENCY: _latency(device),
        ATTENTION: _attention(device),
        NATIVE: _benchmark(device, "native"),
        BENCHMARK: _benchmark(device, "triton"),
    }
    found = []
    for name, shares in _SECONDS.items():
        seconds = shares[quick]
        if seconds is not None:
            found.append(Step(name, commands[name], seconds, _ENVIRONMENT.get(name, _REPEATABLE)))
    return found


Command = Callable[[float, Path], Sequence[str]]


def _python(module: str, *arguments: str) -> Command:
    return lambda seconds, result: (sys.executable, "-m", module, *arguments)


def _skip(reason: str) -> Command:
    code = f"print({reason!r}); raise SystemExit({SKIPPED})"
    return lambda seconds, result: (sys.executable, "-c", code)


def _pytest(folder: Path) -> Command:
    files = sorted(str(file) for pattern in _TESTS for file in folder.glob(pattern))
    if not files:
        return _skip(f"there is no {' or '.join(_TESTS)} yet")
    if find_spec("pytest") is None:
        return _skip("pytest is not installed")
    parallel = ("-n", str(min(8, os.cpu_count() or 1))) if find_spec("xdist") else ()
    return _python("pytest", "-q", "--tb=short", *parallel, *files)


def _parity(device: str, *arguments: str) -> Command:
    return _python("fusedrnn", "parity", "--device", device, "--tf32", "off", *arguments)


def _sanitizer(device: str, tool: str) -> Command:
    if device == "cpu":
        return _skip("compute-sanitizer checks kernels of a GPU")
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if path is None:
        return _skip("compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin")
    run = _parity(device, *_TINY_PARITY)
    options = ("--tool", tool, "--error-exitcode", "9")
    return lambda seconds, result: (path, *options, *run(seconds, result))


def _check(device: str, name: str, *size: str) -> Command:
    def command(seconds: float, result: Path) -> Sequence[str]:
        arguments = (name, "--device", device, "--json", str(result), *size)
        return sys.executable, "-m", "benchmarks.gpu.checks", *arguments

    return command


def _latency(device: str) -> Command:
    if device == "cpu":
        return _skip("what blocks of a GPU wait for is timed on one")
    command = (sys.executable, "-m", "benchmarks.sync_latency", "--json")
    return lambda seconds, result: (*command, str(result))


def _attention(device: str) -> Command:
    if device == "cpu":
        return _skip("its cases are of a GPU's size")
    arguments = ("bench", "attention", "--device", device, "--backend", "triton", "--no-compile", "--json")
    return lambda seconds, result: (sys.executable, "-m", "fusedrnn", *arguments, str(result))


def _benchmark(device: str, backend: str) -> Command:
    smallest = ("--hidden", "64", "--batch", "1", "--time", "8", "--seconds", "0", "--dtype", "fp32")

    def command(seconds: float, result: Path) -> Sequence[str]:
        end = f"{seconds * (1 - _MARGIN):.0f}"
        arguments = ("--device", device, "--grid", "gpu", "--deadline", end, "--json", str(result))
        further = smallest if device == "cpu" else ("--backend", backend)
        return sys.executable, "-m", "fusedrnn", "bench", *arguments, *further

    return command
