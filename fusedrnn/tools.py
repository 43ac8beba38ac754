"""What the commands and the benchmarks share: names of dtypes, the machine, modules to run on it."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from . import modules
from .backends import native

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(library: str) -> str | None:
    """The version of an installed distribution; None if there is none."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def kernels() -> Any:
    """The compiled module."""
    return import_module(f"{__package__}._C")


def instruction_sets() -> list[str]:
    """What the native kernels can use here, the best last; empty without them."""
    if native.unavailable() is not None:
        return []
    found: list[str] = kernels().isa_levels()
    return found


def instruction_set() -> str:
    """What the native kernels use; the reason where FUSEDRNN_ISA asks for one that is not there."""
    reason = native.unavailable()
    if reason is not None:
        return f"missing ({reason})"
    try:
        return native.isa()
    except ValueError as error:
        return f"missing ({error})"


def no_gpu() -> str | None:
    """Why torch cannot use a CUDA GPU here; None if it can."""
    if torch.cuda.is_available():
        return None
    built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU or no driver"
    return f"--device cuda: torch {torch.__version__} {built}"


@contextmanager
def tf32(wanted: str | None) -> Iterator[None]:
    """TF32 in fp32 products on a GPU, of cuDNN and of matmul: torch's settings put back at the end.

    Args:
        wanted: ``"on"``, ``"off"``, or None for torch's own settings; ``"strict"`` is off and "ieee" for
            recurrent networks: of no parts in tf32 either (backends/native/cuda.py).
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    if wanted is not None:
        matmul.allow_tf32 = cudnn.allow_tf32 = wanted == "on"
    if wanted == "strict":  # torch refuses to say what cuDNN allows where the two differ
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """What `parity` and `bench` have in common."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument(
        "--tf32",
        choices=("on", "off", "strict"),
        help="TF32 in fp32 products on a GPU, of both sides; strict: nor several products in TF32 for one in "
        "fp32 (default: torch's own settings)",
    )


def make_module(
    cell: str, input_size: int, hidden_size: int, proj_size: int = 0, **options: object
) -> torch.nn.RNNBase:
    """A fused module with weights that depend on nothing but the arguments.

    Args:
        cell: lstm, gru, rnn_tanh or rnn_relu.
        options: keyword arguments of torch.nn's constructor.
    """
    make = getattr(modules, cell.partition("_")[0].upper())
    if proj_size:
        options["proj_size"] = proj_size
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(input_size, hidden_size, **options)
