"""What is kept for tensors that are met again: exponentials of keys. csrc/packs.cpp keeps weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

_T = TypeVar("_T")


class Kept(Generic[_T]):
    """A value per tensor, by identity and as long as the tensor lives.

    Never as the tensor's attribute, which would leak into pickles and copies.
    """

    def __init__(self, make: Callable[[Tensor], _T]) -> None:
        self._make = make
        self._entries: dict[int, tuple[weakref.ref[Tensor], _T]] = {}

    def of(self, tensor: Tensor) -> _T:
        """The value of a tensor, made where there is none."""
        number = id(tensor)
        entry = self._entries.get(number)
        if entry is None or entry[0]() is not tensor:
            owner = weakref.ref(tensor, lambda dead: self._forget(number, dead))
            entry = self._entries[number] = owner, self._make(tensor)
        return entry[1]

    def _forget(self, number: int, dead: weakref.ref[Tensor]) -> None:
        entry = self._entries.get(number)
        if entry is not None and entry[0] is dead:
            del self._entries[number]
