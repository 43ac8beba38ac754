"""What a forward keeps for its backward."""

from __future__ import annotations

from typing import Any

EVERYTHING, LITTLE = 1, 2  # 0 is nothing: no backward will come
_saving = EVERYTHING


def saving() -> int:
    """EVERYTHING, or LITTLE inside `recompute`."""
    return _saving


class recompute:
    """Keep less for the backward and compute it again there: time for memory.

    On a GPU a training step of the native and the Triton backend then keeps no gates: nothing but the output
    for RNN and GRU, and the cell states for LSTM. On a CPU, and by torch, it keeps what it always does.

    Takes effect at once, for the process; used in a ``with`` statement it is undone at the end. A compiled
    graph keeps the choice it was traced with.
    """

    def __init__(self, on: bool = True) -> None:
        global _saving
        self._previous = _saving
        _saving = LITTLE if on else EVERYTHING

    def __enter__(self) -> recompute:
        return self

    def __exit__(self, *exc: Any) -> None:
        global _saving
        _saving = self._previous
