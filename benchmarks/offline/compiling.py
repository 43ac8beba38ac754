"""One kernel compiled for one architecture, and what its machine code needs."""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import sass
from .ptx import unguarded_releases
from .sass import Row

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Instance(Protocol):
    """What to compile: a kernel and everything that the backend fixes before a launch.

    Attributes:
        name: unique.
        kernel: a triton.JITFunction.
        signature: argument -> "*bf16", "*fp32", "i32", ..., or "constexpr". Pointers are aligned to 16
            bytes; "i32:16" is a multiple of 16.
        constexprs: argument -> value; numbers, strings, None, jit functions, tuples of these.
        num_warps, num_stages: as at a launch.
        maxnreg: registers of a thread; None leaves them to ptxas.
        cooperative: whether all programs must run at once.
        matrix: whether its products must be matrix instructions.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel(self) -> Any: ...
    @property
    def signature(self) -> dict[str, str]: ...
    @property
    def constexprs(self) -> dict[str, object]: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def maxnreg(self) -> int | None: ...
    @property
    def cooperative(self) -> bool: ...
    @property
    def matrix(self) -> bool: ...


class Compiled(NamedTuple):
    """A row, the releases in its PTX that nothing orders, and the CPU seconds it took, tools included."""

    row: Row
    unguarded: list[str]
    seconds: float


def load(module: str) -> dict[str, Instance]:
    """The instances of a module by name.

    Raises:
        ValueError: two have the same name.
    """
    found: dict[str, Instance] = {}
    for instance in importlib.import_module(module).instances():
        if instance.name in found:
            raise ValueError(f"{module}: two instances are named {instance.name!r}")
        found[instance.name] = instance
    return found


class _Source(ASTSource):
    """Triton's cache key takes a tuple of functions by their names: this one takes their source."""

    def hash(self) -> str:
        keys = (value.cache_key for value in _leaves(self.constants.values()) if hasattr(value, "cache_key"))
        return hashlib.sha256("-".join([super().hash(), *keys]).encode()).hexdigest()


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _leaves(value) if isinstance(value, tuple) else [value]


def compile_for(instance: Instance, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` (80, 90, 100) and read the machine code.

    Raises:
        ValueError: the signature does not name the kernel's arguments.
    """
    names = instance.kernel.arg_names
    if set(instance.signature) != set(names):
        wrong = sorted(set(instance.signature) ^ set(names))
        raise ValueError(
            f"signature must name the arguments of {instance.kernel.__name__}, differs in {wrong}"
        )
    types = [instance.signature[name] for name in names]
    aligned = [i for i, kind in enumerate(types) if kind.startswith("*") or kind.endswith(":16")]
    began = os.times()
    compiled = triton.compile(
        _Source(
            fn=instance.kernel,
            signature={name: kind.removesuffix(":16") for name, kind in zip(names, types)},
            constexprs=instance.constexprs,
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": instance.num_warps,
            "num_stages": instance.num_stages,
            "maxnreg": instance.maxnreg,
            "launch_cooperative_grid": instance.cooperative,
            "enable_fp_fusion": True,  # its default differs between versions
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (row,) = sass.read(file.name, TOOLS).values()
    row = row._replace(shared=compiled.metadata.shared)  # it is given at the launch
    unguarded = unguarded_releases(compiled.asm["ptx"])
    return Compiled(row, unguarded, sum(os.times()[:4]) - sum(began[:4]))


# ---- in a process of the pool, which Python does not let live in __main__.py --------------------

_instances: dict[str, Instance] = {}


def start(module: str) -> None:
    _instances.update(load(module))


def work(name: str, arch: int) -> tuple[str, int, Compiled | str]:
    """The task and what came of it; of a failure its message, since not every exception travels."""
    try:
        return name, arch, compile_for(_instances[name], arch)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return name, arch, f"{type(error).__name__}: {lines[-1] if lines else ''}"
