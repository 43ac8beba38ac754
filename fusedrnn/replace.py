"""Swap the recurrent and attention modules of a model for fused ones, in place and reversibly.

A swap assigns ``module.__class__``. The fused classes add no state to torch's, so the object keeps
its identity, and with it its parameters, hooks, parametrizations and everyone who refers to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import modules

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
    nn.MultiheadAttention: modules.MultiheadAttention,
}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}
_NAMES = frozenset(stock.__name__ for stock in _FUSED)


@dataclass(frozen=True)
class Entry:
    """What became of one recurrent or attention module.

    Attributes:
        names: every qualified name the model knows it by; that of the model itself is "".
        cls: its class before the call.
        skipped: why it was left as it was; empty if it was swapped.
    """

    names: tuple[str, ...]
    cls: type[nn.Module]
    skipped: str = ""


class Report:
    """What :func:`replace` did; prints as a table. In a ``with`` statement, reverted at its end.

    Attributes:
        entries: one :class:`Entry` per module of torch.nn that fusedrnn knows, in the order of
            ``model.named_modules()``.
    """

    def __init__(self, entries: tuple[Entry, ...], swapped: list[nn.Module]) -> None:
        self.entries = entries
        self._swapped = swapped

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """The modules that run fused kernels now."""
        return tuple(entry for entry in self.entries if not entry.skipped)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The modules that were left as they were, each with the reason."""
        return tuple(entry for entry in self.entries if entry.skipped)

    def revert(self) -> None:
        """Give the swapped modules torch's classes back; those whose class has changed since stay."""
        for module in self._swapped:
            stock = _rebased(type(module), _STOCK)
            if stock is not None:
                module.__class__ = stock
        self._swapped = []

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.revert()

    def __repr__(self) -> str:
        counts = f"{len(self.swapped)} swapped, {len(self.skipped)} skipped"
        rows = [(", ".join(map(_shown, e.names)), e.cls.__name__, e.skipped) for e in self.entries]
        first, second = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
        lines = [
            f"  {names:{first}}  {cls:{second}}  {f'skipped: {why}' if why else 'swapped'}"
            for names, cls, why in rows
        ]
        return "\n".join([counts, *lines])


def replace(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None) -> Report:
    """Turn every nn.RNN, nn.LSTM, nn.GRU, cell and nn.MultiheadAttention of a model into a fused one.

    The model itself may be one. Works in place: modules, parameters, hooks and ``state_dict`` keys stay
    the same objects.

    Args:
        model: any module.
        filter_fn: ``filter_fn(qualified_name, module) -> bool``, asked under every name of every
            module that could be swapped; one False leaves it alone. The model itself is named "".

    Returns:
        A :class:`Report`: what was swapped, what was not and why, and ``revert()``.

    Raises:
        TypeError: ``model`` is not a module, or ``filter_fn`` is not callable.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a callable, got {type(filter_fn).__name__}")

    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_known(module):
            found.setdefault(id(module), (module, []))[1].append(name)

    # decided for all before the first swap: filter_fn may raise
    entries = []
    swaps: list[tuple[nn.Module, type[nn.Module]]] = []
    for module, names in found.values():
        fused = _rebased(type(module), _FUSED)
        skipped = _obstacle(module, fused)
        if not skipped and filter_fn is not None:
            refused = next((name for name in names if not filter_fn(name, module)), None)
            skipped = "" if refused is None else f"filter_fn refused {_shown(refused)}"
        if not skipped and fused is not None:
            swaps.append((module, fused))
        entries.append(Entry(tuple(names), type(module), skipped))
    for module, fused in swaps:
        module.__class__ = fused
    return Report(tuple(entries), [module for module, _ in swaps])


def _shown(name: str) -> str:
    return name or "(model)"


def _is_quantized(module: nn.Module) -> bool:
    # by name: torch.ao.nn takes long to import
    return type(module).__module__.startswith("torch.ao.nn.quant") and type(module).__name__ in _NAMES


def _is_known(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", None) in _NAMES
    return isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)) or _is_quantized(module)


def _obstacle(module: nn.Module, fused: type[nn.Module] | None) -> str:
    """Why a module cannot be swapped, or empty."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript runs operators, not classes; fusedrnn.enable() reaches it"
    if isinstance(module, tuple(_STOCK)):
        return "already fused"
    if _is_quantized(module):
        return "quantized"
    if fused is None:
        return "its class is not torch's own"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    return ""


def _rebased(cls: type[nn.Module], table: dict[type[nn.Module], type[nn.Module]]) -> type[nn.Module] | None:
    """The class that stands to ``table[base]`` as ``cls`` stands to ``base``, or None.

    Parametrizations, FSDP2 and replicate put a module into a class made for it, derived from the
    one it had. Such a class is made again: the old one may be shared with other modules.
    """
    if cls in table:
        return table[cls]
    if cls.__module__ != nn.utils.parametrize.__name__ and not cls.__module__.startswith(
        "torch.distributed."
    ):
        return None
    *mixins, base = cls.__bases__
    new_base = _rebased(base, table)
    if new_base is None:
        return None
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (*mixins, new_base), body)
