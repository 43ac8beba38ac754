"""csrc/cuda on a CPU: the kernels' own sources, compiled by g++ over fibers, in place of `_C.cuda`.

`on_fibers` sends CPU tensors on the native backend the way of CUDA tensors. What the emulation shows and what
not: csrc/cuda/{fibers,emulation}.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from fusedrnn import use_backend
from fusedrnn.backends import native, select
from fusedrnn.backends.native import cuda

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SCANS = ("scan", "scan_rnn_tanh", "scan_rnn_relu", "scan_lstm", "scan_gru")

ORDERS = ("forward", "reversed", "random", "eager", "lagging")
RACES = ("none", "wait", "barrier before arrival", "barrier in a block", "second buffer", "wait for a launch")
SCHEDULES = ("cta", "grid", "cluster", "stepped")
INVALID, TOO_LARGE, DEADLOCK = -1, -2, -3


class ScanError(Exception):
    """A launch that returned a code of scan.h."""


def missing() -> str | None:
    """Why the kernels cannot run here."""
    if not SOURCES.is_dir():
        return "needs the source tree"
    return None if shutil.which("g++") else "needs g++"


@cache
def library() -> ctypes.CDLL:
    """The kernels; built again when a source has changed."""
    parts = [*sorted(SOURCES.glob("*.h")), *sorted((ROOT / "csrc" / "cells").glob("*.h"))]
    parts += [SOURCES / f"{name}.cu" for name in SCANS]
    text = b"".join(part.read_bytes() for part in parts)
    flags = [*FLAGS, "-DFUSEDRNN_FIBERS", "-I", str(ROOT / "csrc")]
    key = hashlib.sha256(text + repr(flags).encode()).hexdigest()[:16]
    made = ROOT / "build" / "fibers" / f"{key}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        begun = made.with_suffix(f".{os.getpid()}")
        objects = []
        for name in SCANS:
            objects.append(f"{begun}.{name}.o")
            subprocess.run(
                ["g++", "-x", "c++", *flags, "-c", SOURCES / f"{name}.cu", "-o", objects[-1]], check=True
            )
        subprocess.run(["g++", "-shared", *objects, "-o", begun], check=True)
        for path in objects:
            os.unlink(path)
        os.replace(begun, made)
    return ctypes.CDLL(str(made))


def fields(**types: str) -> list[tuple[str, type]]:
    """Of a struct of scan.h: i int32, l int64, p pointer."""
    ctype = {"i": ctypes.c_int32, "l": ctypes.c_int64, "p": ctypes.c_void_p}
    return [(name, ctype[t]) for name, t in types.items()]


_SIZES = dict.fromkeys(("cell", "storage", "schedule", "directions"), "i")
_SIZES |= dict.fromkeys(("time", "batch", "hidden", "rows"), "l")


class Forward(ctypes.Structure):
    _fields_ = fields(
        **_SIZES,
        **dict.fromkeys(("x_gates", "weight", "bias", "start", "states", "output"), "p"),
        **dict.fromkeys(("output_direction", "output_row"), "l"),
        **dict.fromkeys(("saved", "cells", "resets", "offsets", "lengths", "counters"), "p"),
    )


class Backward(ctypes.Structure):
    _fields_ = fields(
        **_SIZES,
        **dict.fromkeys(("weight", "saved"), "p"),
        **dict.fromkeys(("saved_direction", "saved_row"), "l"),
        **dict.fromkeys(("cells", "cells0", "output"), "p"),
        **dict.fromkeys(("output_direction", "output_row"), "l"),
        **dict.fromkeys(("start", "grad"), "p"),
        **dict.fromkeys(("grad_direction", "grad_row"), "l"),
        **dict.fromkeys(
            ("d_states", "d_x_gates", "d_h_gates", "resets", "offsets", "lengths", "counters"), "p"
        ),
    )


class Kernels:
    """`fusedrnn._C.cuda`'s functions, and the passes that ran, each with its schedule."""

    missing = None

    def __init__(self, schedule: str | None) -> None:
        self.run = library()
        self.only = None if schedule is None else SCHEDULES.index(schedule)
        self.ran: list[tuple[str, str]] = []

    def scan_fits(self, cell: int, storage: int, schedule: int, hidden: int, backward: bool) -> bool:
        if self.only is not None and schedule != self.only:
            return False
        code = self.run.fusedrnn_cuda_scan_fits(cell, storage, schedule, ctypes.c_int64(hidden), backward)
        if code not in (0, TOO_LARGE):
            raise ScanError(code)
        return code == 0

    def scan_forward(self, values: tuple[int, ...], stream: int) -> None:
        self._launch(self.run.fusedrnn_cuda_scan_forward, Forward(*values), stream)

    def scan_backward(self, values: tuple[int, ...], stream: int) -> None:
        self._launch(self.run.fusedrnn_cuda_scan_backward, Backward(*values), stream)

    def _launch(self, function: Any, struct: Forward | Backward, stream: int) -> None:
        code = function(ctypes.byref(struct), ctypes.c_ssize_t(stream))
        if code:
            raise ScanError(code)
        self.ran.append((type(struct).__name__.lower(), SCHEDULES[struct.schedule]))


@contextmanager
def on_fibers(
    schedule: str | None = None,
    *,
    order: str = "forward",
    seed: int = 0,
    multiprocessors: int = 16,
    shared: int = 227 << 10,
    race: str = "none",
    split: bool = False,
) -> Iterator[list[tuple[str, str]]]:
    """Run CPU tensors by the CUDA kernels; yields the passes that ran, each with its schedule.

    Args:
        schedule: one of SCHEDULES, where it fits; None leaves the choice to the backend.
        order: who runs when several threads can, one of ORDERS; drawn with `seed` if random.
        multiprocessors, shared: of the GPU: how many blocks run at once, and bytes of shared memory of each.
        race: what is left out, one of RACES.
        split: fp32 in parts of tf32, unless torch's flags ask for another way.

    Raises:
        ScanError: by a launch that fails.
        BackendError: by a call that no schedule takes.
    """
    kernels = Kernels(schedule)
    kernels.run.fusedrnn_fibers_machine(ORDERS.index(order), seed, multiprocessors, shared, RACES.index(race))

    def forget() -> None:
        for cached in (cuda._schedule, select._table, select.no_kernel):
            cached.cache_clear()

    forget()
    instead = {"kernels": kernels, "DEVICE_TYPE": "cpu", "_device": lambda: 0, "_stream": lambda: 0}
    instead["_split_pays"] = lambda device: split
    built = mock.patch.object(native, "unavailable", return_value=None)
    with mock.patch.multiple(cuda, **instead), built, use_backend("native"):
        yield kernels.ran
    forget()
