"""`python -m fusedrnn parity`: cells and attention, by dtype, backend and instruction set, against torch."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import modules, terminal
from .attend import attend
from .backends import select
from .budget import raised
from .cells import CELLS
from .testing import Parity, draw_inputs, parity, stock
from .tools import DTYPES, add_device_arguments, instruction_sets, kernels, make_module, no_gpu, tf32

BACKENDS = select.ORDER
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
# sizes that no vector width divides
INPUT, HIDDEN, PROJ, TIME, BATCH = 11, 37, 13, 12, 5
LENGTHS = (5, 12, 1, 12, 8)
HEADS, QUERIES = 2, 3
ATTENTION = {
    "attend": ("additive", "dot"),
    "BahdanauAttention": ("dense", "normalize"),
    "LuongAttention": ("dot", "general", "concat"),
    "LocationSensitiveAttention": ("step",),
    "CoverageAttention": ("step",),
    "ForwardAttention": ("step",),
    "AdditiveAttention": ("dense",),
    "MultiheadAttention": ("dense",),
}


@dataclass(frozen=True)
class Case:
    """One module and its input."""

    cell: str
    dtype: str
    layout: str

    def request(self, device: str) -> select.Request:
        return select.Request(self.cell, DTYPES[self.dtype], device)

    def run(self, device: str = "cpu") -> Parity:
        bidirectional = self.layout == "bidirectional"
        module = make_module(
            self.cell,
            INPUT,
            HIDDEN,
            num_layers=2 if bidirectional else 1,
            bidirectional=bidirectional,
            proj_size=PROJ if self.layout == "projection" else 0,
            dtype=DTYPES[self.dtype],
        ).to(device)
        lengths = LENGTHS if self.layout == "ragged" else None
        inputs = draw_inputs(module, time=TIME, batch=BATCH, lengths=lengths)
        # a half-precision second order is below its own rounding
        second = self.layout == "dense" and self.dtype in ("fp64", "fp32")
        return parity(module, inputs=inputs, second_order=second)


class Attend(nn.Module):
    """``fusedrnn.attend``, its vector v a parameter."""

    def __init__(self, score: str, size: int) -> None:
        super().__init__()
        self.score = score
        self.v = nn.Parameter(torch.randn(size)) if score == "additive" else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        v, scale = self.v, query.shape[-1] ** -0.5
        return attend(
            self.score, query, key, value, v, mask=mask, lengths=lengths, scale=scale, need_weights=True
        )


@dataclass(frozen=True)
class AttentionCase:
    """A score or a module of attention, its weights asked for, and its input; against plain torch code.

    Attributes:
        cell, layout: a key of ATTENTION and one of its values.
    """

    cell: str
    dtype: str
    layout: str

    @property
    def _score(self) -> str:
        dot = self.cell == "MultiheadAttention" or self.layout in ("dot", "general")
        return "dot" if dot else "additive"

    def request(self, device: str) -> select.Request:
        return select.Request(self._score, DTYPES[self.dtype], device, "attend")

    def run(self, device: str = "cpu") -> Parity:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self._module().to(device, DTYPES[self.dtype])
            inputs = self._inputs(module, lambda *shape: torch.randn(shape).to(device, DTYPES[self.dtype]))
        return parity(module, stock(module) if isinstance(module, nn.MultiheadAttention) else module, inputs)

    def _module(self) -> Any:
        if self.cell == "attend":
            return Attend(self.layout, HIDDEN)
        make = getattr(modules, self.cell)
        if self.cell == "LuongAttention":
            query_size = HIDDEN if self.layout == "dot" else INPUT
            return make(query_size, HIDDEN, self.layout, PROJ if self.layout == "concat" else None)
        if self.cell == "MultiheadAttention":
            return make(HEADS * HIDDEN, HEADS, batch_first=True)
        if self.cell == "AdditiveAttention":
            return make(HIDDEN)
        if self.cell == "LocationSensitiveAttention":
            return make(INPUT, HIDDEN, PROJ, 4, 5)
        return make(INPUT, HIDDEN, PROJ, normalize=self.layout == "normalize")

    def _inputs(self, module: Any, draw: Callable[..., Tensor]) -> tuple[Any, ...]:
        memory = draw(BATCH, TIME, HIDDEN)
        lengths = torch.tensor(LENGTHS, device=memory.device)
        if self.cell == "attend":
            allowed = torch.rand(BATCH, 1, QUERIES, TIME) < 0.7
            query, key, value = (draw(BATCH, HEADS, n, HIDDEN) for n in (QUERIES, TIME, TIME))
            return query, key, value, allowed.to(memory.device), lengths
        if self.cell == "MultiheadAttention":
            query, key, value = (draw(BATCH, n, HEADS * HIDDEN) for n in (QUERIES, TIME, TIME))
            return query, key, value
        if self.cell == "AdditiveAttention":
            return [draw(BATCH, QUERIES, HIDDEN), memory], None, True
        query = draw(BATCH, QUERIES, module.query_size)
        if self.layout != "step":
            return query, memory, lengths, None, True
        state = modules.Alignments(*(draw(BATCH, TIME).softmax(-1) for _ in range(2)))
        if self.cell == "LocationSensitiveAttention":
            padded = torch.arange(TIME, device=memory.device) >= lengths[:, None]
            return query[:, 0], memory, draw(BATCH, TIME, PROJ), state.cat(), padded
        return query[:, 0], memory, state, lengths


def layouts(cell: str) -> Sequence[str]:
    if cell in ATTENTION:
        return ATTENTION[cell]
    return ["dense", "ragged", "bidirectional"] + ["projection"] * CELLS[cell].projectable


@contextmanager
def _at(level: str) -> Iterator[None]:
    """The native kernels at one instruction set; an empty name leaves them as they are."""
    if not level:
        yield
        return
    before = kernels().isa()
    kernels().set_isa(level)
    try:
        yield
    finally:
        kernels().set_isa(before)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0 when every row is within budget, 1 when not, 2 when nothing was compared."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn parity",
        description="Outputs and every gradient of every cell and attention against torch, under the error "
        "budget of fusedrnn.testing: error <= 2 x (torch's own error + one rounding), against fp64.",
    )
    add_device_arguments(parser)
    parser.add_argument("--backend", choices=BACKENDS, help="default: every backend that is here")
    parser.add_argument("--cell", choices=(*CELLS, *ATTENTION), help="or attention; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument(
        "--isa",
        choices=("all", *LEVELS),
        default="all",
        help="of the native kernels; default: all of this cpu",
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and (why_not := no_gpu()):
        parser.error(why_not)
    work = list(_work(arguments))
    if not work:
        return 2
    rows, red = [], []
    with terminal.progress(len(work)) as step, tf32(arguments.tf32):
        for backend, level, case in work:
            where = f"{backend} {level}".rstrip()
            label = f"{where} {case.cell} {case.dtype} {case.layout}"
            step(label)
            with _at(level), select.use_backend(backend):
                try:
                    result = case.run(arguments.device)
                except Exception as error:
                    result = raised(error)
            worst, verdict = result.worst, "ok" if result.ok else "RED"
            count, used = str(len(result.rows)), f"{worst.used:6.0%}"
            rows.append((where, case.cell, case.dtype, case.layout, count, used, worst.name, verdict))
            red += [f"{label}: {row}" for row in result.failures]
    terminal.table(
        ("backend", "cell", "dtype", "layout", "tensors", "of budget", "worst tensor", "verdict"), rows
    )
    for line in red:
        print(f"RED {line}")
    print(f"\n{len(rows)} comparisons, {sum(row[-1] == 'RED' for row in rows)} red")
    return 1 if red else 0


def _work(arguments: argparse.Namespace) -> Iterator[tuple[str, str, Case | AttentionCase]]:
    """What to compare: backend, instruction set of the native kernels on a CPU, and case.

    Prints why a backend is left out, or some of its cases are.
    """
    cases = [
        AttentionCase(cell, dtype, layout) if cell in ATTENTION else Case(cell, dtype, layout)
        for cell in ([arguments.cell] if arguments.cell else (*CELLS, *ATTENTION))
        for dtype in ([arguments.dtype] if arguments.dtype else DTYPES)
        for layout in layouts(cell)
    ]
    for name in [arguments.backend] if arguments.backend else BACKENDS:
        levels = [""]
        if name == "native" and arguments.device == "cpu":
            levels = [level for level in instruction_sets() if arguments.isa in ("all", level)]
        runs, refused = [], []
        for case in cases:
            reason = select.against(name, case.request(arguments.device))
            if reason is None and not levels:
                reason = f"this cpu cannot run {arguments.isa}"
            if reason is None:
                runs.append(case)
            else:
                refused.append(reason)
        for reason, times in Counter(refused).items():
            some = "" if times == len(cases) else f"{times} of {len(cases)} cases "
            print(f"{name}: {some}not compared: {reason}")
        yield from ((name, level, case) for level in levels for case in runs)
