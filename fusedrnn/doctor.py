"""`python -m fusedrnn doctor`: what runs on this machine, and what does not and why."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence

import torch

from . import terminal
from .backends import native, select
from .tools import cpu_model, instruction_set, instruction_sets, kernels, version

_SLOW = (
    "The native kernels are not built, so plain calls run torch's own path, no faster than torch.nn, and "
    "compiled graphs and function transforms run the reference, a Python loop over time, which is slow. "
    "With a C++17 compiler (g++) on PATH, install fusedrnn again to build them."
)
_LIBRARIES = ("fusedrnn", "triton", "numpy", "pybind11", "rich", "pytest", "hypothesis")


def backends() -> dict[str, str | None]:
    """Every backend, with the reason why it cannot be used, or None."""
    return {**{name: select.get(name).unavailable() for name in select.ORDER}, "torch": None}


def attention(device_type: str) -> dict[str, str | None]:
    """Every backend of our own, with the reason why it cannot run attention on a device, or None."""
    request = select.Request("additive", torch.float32, device_type, "attend")
    return {name: select.against(name, request) for name in select.ORDER}


def layers(device_type: str) -> dict[str, str | None]:
    """Every backend of our own, with the reason why it runs no layers on a device unasked, or None."""
    request = select.Request("lstm", torch.float32, device_type)
    return {name: select.passed_over(name, request) for name in select.ORDER}


def _compiler() -> str:
    command, *_ = os.environ.get("CXX", "").split() or ["g++"]  # a blank CXX names none
    path = shutil.which(command)
    if path is None:
        return "missing (no g++ on PATH, nor the compiler that CXX names)"
    first, *_ = subprocess.run([path, "--version"], capture_output=True, text=True).stdout.splitlines() or [
        path
    ]
    return first


def _machine() -> list[tuple[str, str]]:
    return [
        ("platform", platform.platform()),
        ("cpu", cpu_model()),
        ("cores", str(os.cpu_count())),
        ("torch threads", str(torch.get_num_threads())),
        ("torch cpu capability", torch.backends.cpu.get_cpu_capability()),
        ("oneDNN", "available" if torch.backends.mkldnn.is_available() else "missing"),
        ("MKL", "available" if torch.backends.mkl.is_available() else "missing"),
    ]


def cuda_architectures() -> str:
    """The GPU architectures whose code the compiled module holds; the reason where it holds none."""
    cuda = kernels().cuda
    if cuda.missing is not None:
        return f"missing ({cuda.missing})"
    return " ".join(f"sm_{name}" for name in cuda.architectures)


def _native() -> list[tuple[str, str]]:
    reason = native.unavailable()
    if reason is not None:
        return [("fusedrnn._C", f"missing ({reason})")]
    return [
        ("fusedrnn._C", "available"),
        ("instruction set", instruction_set()),
        ("instruction sets of this cpu", " ".join(instruction_sets())),
        ("cpu features", " ".join(native.cpu_features())),
        ("CUDA architectures", cuda_architectures()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; 0, or 1 when the native backend cannot be used."""
    argparse.ArgumentParser(
        prog="python -m fusedrnn doctor", description="What runs on this machine, and what does not and why."
    ).parse_args(argv)
    found = backends()
    reasons = {"Backends": found, "Attention, cpu": attention("cpu")}
    if torch.cuda.is_available():
        reasons |= {"Layers, cuda": layers("cuda"), "Attention, cuda": attention("cuda")}
    sections: dict[str, list[tuple[str, str]]] = {
        title: [(name, "available" if why is None else f"missing ({why})") for name, why in each.items()]
        for title, each in reasons.items()
    }
    variables = sorted((k, v) for k, v in os.environ.items() if k.startswith("FUSEDRNN_"))
    sections |= {
        "Native kernels": _native(),
        "Machine": _machine(),
        "Versions": [
            ("python", platform.python_version()),
            ("torch", torch.__version__),
            *((name, version(name) or "not installed") for name in _LIBRARIES),
            ("c++ compiler", _compiler()),
        ],
        "Variables": variables or [("FUSEDRNN_*", "none set")],
    }
    for title, rows in sections.items():
        terminal.heading(title)
        terminal.table(("", ""), rows)
    if found["native"] is not None:
        print(f"\n{_SLOW}")
        return 1
    return 0
