"""Interpreted programs side by side: persistent kernels with grid barriers run, and races show.

The interpreter runs the programs of a launch one after the other, so that a grid barrier would spin for
ever. Inside `cooperative` every program is a greenlet that lets the others run before each of its accesses
to memory. Memory is sequentially consistent and a tile is read or written at once: what a missing fence or
a missing barrier between a program's own threads does cannot show here, the lint of the PTX looks for it.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
from greenlet import GreenletExit, greenlet
from interpreter import INTERPRETED
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

ORDERS = ("round-robin", "reversed", "random", "eager", "lagging")
# Reads in a row that bring nothing new, by every program, before a launch counts as stuck.
_PATIENCE = 100


class Deadlock(Exception):
    """Every program that is left spins on memory that none of them changes."""


class _Program:
    def __init__(self, run: Callable[[], None], index: tuple[int, int, int]) -> None:
        self.index = index
        self.greenlet = greenlet(run)
        self.seen: dict[bytes, bytes] = {}
        self.change = -1
        self.repeats = 0


class _Scheduler:
    """One launch: which program runs next, and which of them merely poll."""

    def __init__(self, programs: Sequence[_Program], order: str, chosen: int, seed: int) -> None:
        self.programs, self.order = programs, order
        self.chosen = programs[chosen % len(programs)]
        self.random = random.Random(seed)
        self.current = programs[0]
        self.changes = 0

    def run(self) -> None:
        live = list(self.programs)
        try:
            while live:
                if all(self._repeats(program) >= _PATIENCE for program in live):
                    raise Deadlock(f"programs {[program.index for program in live]} wait for each other")
                ready = [program for program in live if not self._repeats(program)]
                self.current = self._pick(ready) if ready else min(live, key=self._repeats)
                interpreter.interpreter_builder.grid_idx = self.current.index
                self.current.greenlet.switch()
                if self.current.greenlet.dead:
                    live.remove(self.current)
        finally:
            for program in live:
                program.greenlet.throw(GreenletExit)

    def _pick(self, ready: list[_Program]) -> _Program:
        if self.order == "random":
            return self.random.choice(ready)
        if self.order == "eager" and self.chosen in ready:
            return self.chosen
        if self.order == "lagging":
            ready = [program for program in ready if program is not self.chosen] or ready
        step = -1 if self.order == "reversed" else 1
        place, count = self.programs.index(self.current), len(self.programs)
        return min(ready, key=lambda program: (step * (self.programs.index(program) - place) - 1) % count)

    def _repeats(self, program: _Program) -> int:
        return program.repeats if program.change == self.changes else 0

    def read(self, address: bytes, value: bytes) -> None:
        """The current program polls if it read this before and nothing has changed anywhere since."""
        program = self.current
        if program.change != self.changes:
            program.change, program.repeats = self.changes, 0
            program.seen.clear()
        program.repeats = program.repeats + 1 if program.seen.get(address) == value else 0
        program.seen[address] = value

    def access(self, pointers: Any, mask: Any, method: Callable[[], Any]) -> Any:
        """One access to memory, after the others had their turn."""
        self.current.greenlet.parent.switch()
        before = _peek(pointers, mask)
        result = method()
        if _peek(pointers, mask) != before:
            self.changes += 1
        else:
            self.read(pointers.data.tobytes(), before)
        return result


def _peek(pointers: Any, mask: Any) -> bytes:
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    shape = pointers.data.shape
    lanes = np.ones(shape, bool) if mask is None else np.broadcast_to(mask.data, shape)
    return interpreter._interpreter.load(pointers.data, lanes, np.zeros(shape, dtype), dtype).tobytes()


class _Collected:
    """Stands for a kernel: takes the calls of all programs, then runs them together."""

    def __init__(self, kernel: Any, start: Callable[[list[_Program]], None]) -> None:
        self.kernel, self.start = kernel, start
        self.programs: list[_Program] = []
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__
        self.__signature__ = inspect.signature(kernel)

    def __call__(self, **arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        self.programs.append(_Program(functools.partial(self.kernel, **arguments), builder.grid_idx))
        if len(self.programs) == math.prod(builder.grid_dim):
            self.start(self.programs)


@contextmanager
def cooperative(order: str = "round-robin", *, program: int = 0, seed: int = 0) -> Iterator[None]:
    """Run the programs of every launch inside interleaved, an access to memory at a time.

    On a GPU, where programs run side by side anyway, it does nothing.

    Args:
        order: round-robin or reversed: each in its turn; random: drawn anew after each access; eager: one
            program runs as far ahead as it gets without waiting; lagging: one program runs only while
            all others wait for it.
        program: the one that is eager or lagging, modulo the number of programs.
        seed: of the random order.

    Raises:
        ValueError: order is none of these.
        Deadlock: all programs wait for each other (raised by the launch).
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if not INTERPRETED:
        yield
        return
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    running: list[_Scheduler] = []  # the launch that is under way, if one is
    launch = executor.__call__

    def start(programs: list[_Program]) -> None:
        running.append(_Scheduler(programs, order, program, seed))
        try:
            running[-1].run()
        finally:
            running.pop()

    def together(self: Any, *args: Any, **kwargs: Any) -> None:
        self.fn = _Collected(self.fn, start)
        try:
            launch(self, *args, **kwargs)
        except InterpreterError as error:
            if isinstance(error.__cause__, Deadlock):
                raise error.__cause__ from None
            raise

    def yielding(method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def access(*operands: Any, **named: Any) -> Any:
            arguments = signature.bind(*operands, **named).arguments
            pointers = arguments.get("ptrs", arguments.get("ptr"))
            bound = functools.partial(method, *operands, **named)
            return running[-1].access(pointers, arguments.get("mask"), bound) if running else bound()

        return access

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(executor, "__call__", together))
        for name in (
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
        ):
            patches.enter_context(mock.patch.object(builder, name, yielding(getattr(builder, name))))
        yield
