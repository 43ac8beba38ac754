"""Which backend runs a request, and why not the others: one table, asked by everyone."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

import torch

# In order of preference; `reference` can always run.
ORDER = ("native", "triton", "reference")
# Backend and device type: what no hardware has proven (docs/hardware.md) runs where it is asked for by name.
UNPROVEN = frozenset({("native", "cuda"), ("triton", "cuda")})
# `torch` is torch.nn's own path: functional hands the whole stack over to it.
NAMES = (*ORDER, "torch")


class Request(NamedTuple):
    """What the choice depends on. Other sizes decide only whether torch's own path is faster."""

    kind: str  # the cell of a layer, the score of an attend
    dtype: torch.dtype
    device_type: str
    operation: str = "layer"  # or "attend"
    hidden: int | None = None  # H of a layer: what a GPU must hold; None asks for no size in particular
    resets: bool = False
    device_index: int | None = None  # of a GPU; None asks about the current one

    def located(self) -> Request:
        """With the index of its GPU, so that what is remembered of one is not said of another."""
        if self.device_type != "cuda" or self.device_index is not None or not torch.cuda.is_initialized():
            return self
        return self._replace(device_index=torch.cuda.current_device())


@dataclass(frozen=True)
class Choice:
    """The backend chosen, and per backend that was not, the reason."""

    backend: str
    why: str
    why_not: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run the request."""


def get(name: str) -> ModuleType:
    """The module of a backend of ORDER."""
    return import_module(f"{__package__}.{name}")


@cache
def kernels(name: str, operation: str) -> ModuleType:
    """What a backend of ORDER runs an operation with.

    Raises:
        ModuleNotFoundError: it has nothing for this operation.
    """
    return import_module(f"{__package__}.{name}.{operation}")


def _checked(name: str | None, source: str = "backend") -> str | None:
    if name is None or name == "auto":
        return None
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)} or auto, got {name!r}")
    return name


_requested: str | None = _checked(os.environ.get("FUSEDRNN_BACKEND") or None, "FUSEDRNN_BACKEND")


def requested() -> str | None:
    """The backend asked for by `use_backend` or FUSEDRNN_BACKEND; None means automatic."""
    return _requested


class use_backend:
    """Ask for one backend: ``native``, ``triton``, ``reference``, ``torch``; or ``auto``, the table's choice.

    Takes effect at once, for the process; used in a ``with`` statement it is undone at the end.
    A request that the backend cannot run raises :class:`BackendError` with the reason.

    Raises:
        ValueError: the name is not a backend.
    """

    def __init__(self, name: str | None) -> None:
        global _requested
        self._previous = _requested
        _requested = _checked(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: Any) -> None:
        global _requested
        _requested = self._previous


def against(name: str, request: Request) -> str | None:
    """Why a backend cannot run a request; None if it can."""
    if name == "torch":
        return "torch.nn has no resets in mid-sequence" if request.resets else None
    reason = get(name).unavailable()
    if reason is not None:
        return reason
    if find_spec(f"{__package__}.{name}.{request.operation}") is None:
        return f"has no {request.operation} kernels"
    sizes = () if request.hidden is None else (request.hidden,)
    unsupported = kernels(name, request.operation).unsupported
    with _current(request):  # of which GPU kernels answer
        return unsupported(request.kind, request.dtype, request.device_type, *sizes)


def _current(request: Request) -> AbstractContextManager[Any]:
    if request.device_type != "cuda" or request.device_index is None or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.device(request.device_index)


def passed_over(name: str, request: Request) -> str | None:
    """Why the automatic choice does not consider a backend for a request; None if it does."""
    if (name, request.device_type) in UNPROVEN:
        return against(name, request) or f"waits for its proof on hardware; use_backend({name!r}) asks for it"
    return against(name, request)


@cache
def no_kernel(request: Request) -> str | None:
    """Why the automatic choice has no fused kernel for a located request, per backend; None if it has one."""
    reasons = {name: passed_over(name, request) for name in ORDER if name != "reference"}
    if None in reasons.values():
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


@cache
def _table(request: Request, wanted: str | None) -> Choice:
    if wanted is not None:
        reason = against(wanted, request)
        if reason is not None:
            raise BackendError(f"backend {wanted!r} was asked for and cannot run this: {reason}")
        return Choice(wanted, "asked for by use_backend or FUSEDRNN_BACKEND", {})
    why_not: dict[str, str] = {}
    for name in ORDER:
        reason = passed_over(name, request)
        if reason is None:
            return Choice(name, "the first of the table that can run this", why_not)
        why_not[name] = reason
    raise BackendError("; ".join(f"{name}: {reason}" for name, reason in why_not.items()))


@cache
def say_once(message: str) -> None:
    """Warn, the first time that this message comes."""
    warnings.warn(message, stacklevel=2)


def answer(request: Request) -> Choice:
    """The table's answer, for those who want to know it only.

    Raises:
        BackendError: a backend was asked for and cannot run the request.
    """
    return _table(request.located(), _requested)


def choose(request: Request) -> Choice:
    """:func:`answer`, to act on. Warns once per reason when nothing fused can run the request."""
    choice = answer(request)
    if choice.backend == "reference" and _requested is None:
        say_once(f"fusedrnn runs its reference path, which is slow ({no_kernel(request)})")
    return choice
