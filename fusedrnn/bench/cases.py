"""What is timed: a layer, a stack or an attention, its sizes, and the work that it cannot do without."""

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
PIECE = 32  # steps, on average
FILTERS, KERNEL_SIZE = 32, 31  # of the convolution of a location: Tacotron 2's
_GATE_STEPS, _GATE_WORK = 16, 5e8


class Work(NamedTuple):
    """What a case cannot do without.

    Attributes:
        flops: floating-point operations of the matrix products; training makes three of each.
        bytes: what must move at least once: weights, input and output; in training also their gradients.
        resident: bytes of what every step reads again: the recurrent matrices of one layer (G*H*P, and P*H
            with a projection, per direction); for a single step every weight of the module.
        streamed: ``resident`` once per step and layer, in training once more for the backward: the least that
            the level of memory that holds it has to deliver. Of an attention both are ``bytes``.
        divisions: of an additive attention: one per tanh, which the backward makes again.
    """

    flops: float
    bytes: float
    resident: float
    streamed: float
    divisions: float = 0.0


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
            resets (a new piece begins at one step in PIECE; torch.nn gets the pieces as a padded batch);
            step (one step of a stream, state kept: ``fusedrnn.streaming`` against torch.nn called with hx).
        dtype: a key of fusedrnn.tools.DTYPES; of a step what its weights are stored in: fp32, bf16 or int8.
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


@dataclass(frozen=True)
class AttentionCase:
    """One attention and its sizes.

    Attributes:
        form: operator (``fusedrnn.attend``, additive, of projected tensors); module (BahdanauAttention, its
            projections included); decoder (the same with its memory projected before); location
            (LocationSensitiveAttention); multihead (MultiheadAttention, whose weights are asked for).
        batch, beams, queries, keys, hidden: B, beams, Tq, Tk and H, which is also the features of queries and
            memory. The beams of a sequence share its memory.
        mode: as of a Case; of decoder and location inference alone.
        compiled: torch.compile of the eager code is timed too.
        heads: of multihead.
    """

    form: str
    batch: int
    beams: int
    queries: int
    keys: int
    hidden: int
    mode: str
    compiled: bool = True
    dtype: str = "fp32"
    heads: int = 8

    @property
    def time(self) -> int:
        """Steps of a decoder that one call answers."""
        return self.queries

    @property
    def label(self) -> str:
        beams = f" beams{self.beams}" if self.beams > 1 else ""
        sizes = f"B{self.batch}{beams} Tq{self.queries} Tk{self.keys} H{self.hidden}"
        return f"{self.form} {sizes} {self.mode} {self.dtype}"

    @property
    def elements(self) -> int:
        """B * beams * Tq * Tk * H: of the tensor that plain torch code of an additive score writes."""
        return self.batch * self.beams * self.queries * self.keys * self.hidden

    def grad_mode(self) -> AbstractContextManager[object]:
        """What its calls run in."""
        return torch.inference_mode(self.mode == "inference")

    def gate(self) -> AttentionCase:
        """The case whose parity speaks for this one: fewer sequences, as an fp64 oracle takes its time."""
        return replace(self, batch=min(self.batch, 2), compiled=False)

    def work(self) -> Work:
        hidden, square = self.hidden, self.hidden**2
        rows, keys = self.batch * self.beams * self.queries, self.batch * self.keys
        filters, convolution = FILTERS * hidden, FILTERS * 2 * KERNEL_SIZE
        # values but for query and context, products but for the context's
        values, products = {
            "operator": (2 * keys * hidden + hidden, 0),
            "module": (keys * hidden + 2 * square + 2 * hidden, (rows + keys) * square),
            "decoder": (2 * keys * hidden + square + 2 * hidden, rows * square),
            "location": (
                2 * keys * hidden + square + hidden + filters + convolution + 2 * keys + rows * self.keys,
                rows * square + keys * (filters + convolution),
            ),
            "multihead": (4 * square + 4 * hidden + rows * self.keys, 4 * rows * square + self.elements),
        }[self.form]
        passes, twice = (3, 2) if self.mode == "training" else (1, 1)
        flops = passes * 2.0 * (products + self.elements)
        moved = twice * (values + 2 * rows * hidden) * ITEMSIZE[self.dtype]
        return Work(flops, moved, moved, moved, 0 if self.form == "multihead" else twice * self.elements)


AnyCase = Case | AttentionCase


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
