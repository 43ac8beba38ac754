"""What is timed: one layer or stack, its sizes, and the work that it cannot do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..cells import CELLS

MODES = ("inference", "training")
ITEMSIZE = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}  # bytes of a value
HEADS = 12  # of the layout of that name
_GATE_STEPS, _GATE_WORK = 16, 5e8


class Work(NamedTuple):
    """What a case cannot do without.

    Attributes:
        flops: floating-point operations of the matrix products; training makes three of each.
        bytes: what must move at least once: weights, input and output; in training also their gradients.
        resident: bytes of what every step reads again: the recurrent matrices of one layer (G*H*P, and P*H
            with a projection, per direction); for a single step every weight of the module.
        streamed: ``resident`` once per step and layer, in training once more for the backward: the least that
            the level of memory that holds it has to deliver.
    """

    flops: float
    bytes: float
    resident: float
    streamed: float


@dataclass(frozen=True)
class Case:
    """One module and its sizes.

    Attributes:
        cell: lstm, gru, rnn_tanh or rnn_relu.
        hidden, batch, time: H, B and T. Ragged: T is the longest of B random lengths.
        mode: inference (``torch.inference_mode``), or training: forward, and the gradients of the
            input and of every weight.
        layout: dense; ragged (a PackedSequence); bidirectional; projection (P = H / 2); stacked (3 layers);
            deep (4 bidirectional layers); heads (HEADS independent layers, each with sizes I and H);
            step (one step of a stream, state kept: ``fusedrnn.streaming`` against torch.nn called with hx).
        dtype: a key of fusedrnn.parity.DTYPES; of a step what its weights are stored in: fp32, bf16 or int8.
        inputs: I; as many as hidden units if None.
    """

    cell: str
    hidden: int
    batch: int
    time: int
    mode: str
    layout: str
    dtype: str = "fp32"
    inputs: int | None = None

    @property
    def input_size(self) -> int:
        return self.hidden if self.inputs is None else self.inputs

    @property
    def label(self) -> str:
        wide = "" if self.inputs is None else f" I{self.inputs}"
        sizes = f"H{self.hidden}{wide} B{self.batch} T{self.time}"
        return f"{self.cell} {sizes} {self.layout} {self.mode} {self.dtype}"

    def lengths(self) -> list[int] | None:
        """T and B - 1 lengths, uniform between T/4 and T; None if all are T."""
        if self.layout != "ragged":
            return None
        make = torch.Generator().manual_seed(0)
        rest = torch.randint(max(self.time // 4, 1), self.time + 1, (self.batch - 1,), generator=make)
        return [self.time, *rest.tolist()]

    def grad_mode(self) -> AbstractContextManager[object]:
        """What its calls run in."""
        return torch.inference_mode(self.mode == "inference")

    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of the module's constructor."""
        layouts: dict[str, dict[str, int | bool]] = {
            "bidirectional": {"bidirectional": True},
            "projection": {"proj_size": self.hidden // 2},
            "stacked": {"num_layers": 3},
            "deep": {"num_layers": 4, "bidirectional": True},
        }
        return layouts.get(self.layout, {})

    def gate(self) -> Case:
        """The case whose parity speaks for this one: the first steps, as an fp64 oracle takes its time."""
        per_step = self.work().flops / self.time
        return replace(self, time=min(self.time, max(2, min(_GATE_STEPS, int(_GATE_WORK / per_step)))))

    def work(self) -> Work:
        if self.layout == "heads":
            return Work(*(HEADS * value for value in replace(self, layout="dense").work()))
        options = self.options()
        layers, directions = int(options.get("num_layers", 1)), 2 if "bidirectional" in options else 1
        projected = "proj_size" in options
        proj = int(options.get("proj_size", self.hidden))
        gates = len(CELLS[self.cell].gates)
        rows = sum(self.lengths() or [self.time * self.batch])
        recurrent = directions * (gates * self.hidden * proj + projected * proj * self.hidden)
        inputs = [self.input_size] + [directions * proj] * (layers - 1)
        matrices = sum(recurrent + directions * gates * self.hidden * i for i in inputs)
        biases = layers * directions * gates * self.hidden * 2
        flops = 2.0 * rows * matrices
        values = matrices + biases + rows * (self.input_size + directions * proj)
        size = ITEMSIZE[self.dtype]
        resident = (matrices if self.layout == "step" else recurrent) * size
        streamed = (1 if self.layout == "step" else layers) * self.time * resident
        if self.mode == "training":
            return Work(3 * flops, 2 * values * size, resident, 2 * streamed)
        return Work(flops, values * size, resident, streamed)


def grid(
    cells: Sequence[str],
    hidden: Sequence[int],
    batch: Sequence[int],
    time: int,
    modes: Sequence[str],
    layouts: Sequence[str],
    dtype: str = "fp32",
) -> Iterator[Case]:
    """Every combination."""
    for layout in layouts:
        for cell in cells:
            for mode in modes:
                for h in hidden:
                    for b in batch:
                        yield Case(cell, h, b, time, mode, layout, dtype)
