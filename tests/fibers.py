"""csrc/cuda on a CPU: the kernels' own sources, compiled by g++ over fibers, behind Triton's layer.

The products around the scan, the shapes and what is saved are Triton's: `on_fibers` sends the launches of its
two scan kernels here. What the emulation shows and what not: csrc/cuda/{fibers,emulation}.h.
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
from unittest import mock

import torch

from fusedrnn.backends.triton import plan
from fusedrnn.backends.triton.call import Call, precision
from fusedrnn.backends.triton.cells import CELLS
from fusedrnn.backends.triton.scan import scan_bwd_kernel, scan_fwd_kernel

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SCANS = ("scan", "scan_rnn_tanh", "scan_rnn_relu", "scan_lstm", "scan_gru")

ORDERS = ("forward", "reversed", "random", "eager", "lagging")
RACES = ("none", "wait", "barrier before arrival", "barrier in a block", "second buffer")
SCHEDULES = ("cta", "grid", "cluster")
NAMES = {cell: i for i, cell in enumerate(("rnn_tanh", "rnn_relu", "lstm", "gru"))}
STORAGES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
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


def padded(weight: torch.Tensor) -> torch.Tensor:
    """Rows of whole 16 bytes, the new ones zero."""
    return torch.nn.functional.pad(
        weight, (0, -weight.shape[-1] % (16 // weight.element_size()))
    ).contiguous()


@contextmanager
def on_fibers(
    schedule: str,
    *,
    order: str = "forward",
    seed: int = 0,
    multiprocessors: int = 16,
    shared: int = 227 << 10,
    race: str = "none",
) -> Iterator[list[str]]:
    """Run Triton's scans by the CUDA kernels; yields the passes that ran.

    Args:
        schedule: one of SCHEDULES.
        order: who runs when several threads can, one of ORDERS; drawn with `seed` if random.
        multiprocessors, shared: of the GPU: how many blocks run at once, and bytes of shared memory of each.
        race: what is left out, one of RACES.

    Raises:
        ScanError: by a launch that fails.
    """
    run = library()
    run.fusedrnn_fibers_machine(ORDERS.index(order), seed, multiprocessors, shared, RACES.index(race))
    ran: list[str] = []

    def launch(c: Call, kernel: object, first: int, count: int, *args: object, **constants: object) -> None:
        counters = torch.zeros(c.directions * c.batch, dtype=torch.int32)
        storage = STORAGES[c.x.dtype]
        if storage == 0 and precision() == "tf32":
            storage = 1
        cell = next(name for name, spec in CELLS.items() if spec is c.cell)
        sizes = [NAMES[cell], storage, SCHEDULES.index(schedule), c.directions]
        sizes += [c.time, c.batch, c.hidden, c.rows]
        ends = [c.resets, c.offsets, c.lengths, counters]
        if kernel is scan_fwd_kernel:
            x_gates, weight, bias, start, states, _h, output, saved, cells, _d, _r, direction, row = args
            values = [
                x_gates,
                padded(weight),
                bias,
                start,
                states,
                output,
                direction,
                row,
                saved,
                cells,
                *ends,
            ]
            struct, function = Forward, run.fusedrnn_cuda_scan_forward
        else:
            assert kernel is scan_bwd_kernel
            weight, saved, cells, cells0, h, start, grad, d_states, d_x, d_h, *strides = args
            weight = weight.transpose(1, 2).unflatten(2, (-1, c.hidden))
            values = [padded(weight), saved, *strides[:2], cells, cells0, h, *strides[2:4], start]
            values += [grad, *strides[4:], d_states, d_x, d_h, *ends]
            struct, function = Backward, run.fusedrnn_cuda_scan_backward
        plain = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        code = function(ctypes.byref(struct(*sizes, *plain)), ctypes.c_ssize_t(0))
        if code:
            raise ScanError(code)
        ran.append(struct.__name__.lower())

    persistent = plan.Plan("persistent", 16, 16, 16, 1, 4, 1)
    chosen = mock.patch.object(plan, "choose", return_value=persistent)
    with mock.patch.object(Call, "launch", launch), chosen:
        yield ran
