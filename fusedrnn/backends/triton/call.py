"""What forward and backward make of a layer's arguments alike, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...saving import LITTLE
from . import plan
from .cells import CELLS, Cell

_NAMES = {
    2: ("ih", "hh"),
    3: ("ih", "hh", "hr"),
    4: ("ih", "hh", "bias_ih", "bias_hh"),
    5: ("ih", "hh", "bias_ih", "bias_hh", "hr"),
}


class Call(NamedTuple):
    """What forward and backward make of their arguments alike."""

    cell: Cell
    plan: plan.Plan
    time: int
    batch: int
    hidden: int
    proj: int
    directions: int
    x: Tensor  # [N, I]
    weights: list[dict[str, Tensor]]  # by direction, under _NAMES
    weight_hh: Tensor  # [D, G*H, P]
    resets: Tensor | None  # [D, N] bool
    batch_sizes: Tensor | None  # [T], on the CPU
    offsets: Tensor | None  # [T+1] int64
    lengths: Tensor | None  # [B] int64

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def projected(self) -> bool:
        return "hr" in self.weights[0]

    def step(self, t: int) -> slice:
        """The rows of a step."""
        if self.batch_sizes is None:
            return slice(t * self.batch, (t + 1) * self.batch)
        end = int(self.batch_sizes[: t + 1].sum())
        return slice(end - int(self.batch_sizes[t]), end)

    def times(self, i: int) -> list[int]:
        """Which step of time is the i-th step, per direction."""
        return [i, self.time - 1 - i][: self.directions]

    def launch(self, kernel: Any, first: int, count: int, *args: Any, **constants: Any) -> None:
        p = self.plan
        grid = (-(-self.hidden // p.BU), -(-self.batch // p.BB), self.directions)
        persistent = p.schedule == "persistent"
        options = {"launch_cooperative_grid": True} if persistent else {}
        # Of the barriers; zeros, because they only grow
        counters = self.x.new_zeros(grid[1] * grid[2], dtype=torch.int32) if persistent else None
        kernel[grid](
            *args,
            None if self.resets is None else self.resets.view(torch.uint8),
            self.offsets,
            self.lengths,
            counters,
            self.rows,
            self.time,
            self.batch,
            self.hidden,
            self.proj,
            first,
            count,
            G=self.cell.gates,
            S=self.cell.states,
            RESETS=self.resets is not None,
            RAGGED=self.offsets is not None,
            RESIDENT=p.schedule == "resident",
            PERSISTENT=persistent,
            HOLD=p.hold,
            PRECISION=precision(),
            BB=p.BB,
            BU=p.BU,
            BK=p.BK,
            NK=p.NK,
            num_warps=p.num_warps,
            num_stages=p.num_stages,
            maxnreg=p.maxnreg,
            **constants,
            **options,
        )


def precision() -> str:
    """Of fp32 products: what torch's flags say for recurrent networks on a GPU."""
    precision = torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"


_on_device: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _steps(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each step's rows begin, and each sequence's length, on the device; once per tensor."""
    key = (device, batch_sizes._version)
    found = _on_device.get(batch_sizes)
    if found is None or found[0] != key:
        offsets = torch.nn.functional.pad(batch_sizes.cumsum(0), (1, 0))
        lengths = (batch_sizes[:, None] > torch.arange(int(batch_sizes[0]))).sum(0)
        found = (key, offsets.to(device), lengths.to(device))
        _on_device[batch_sizes] = found
    return found[1], found[2]


def call(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    resets: Tensor | None,
    backward: bool,
) -> Call:
    spec = CELLS[cell]
    _, batch, proj = states[0].shape
    hidden = weights[0].shape[0] // spec.gates
    each = len(weights) // directions
    directed = [dict(zip(_NAMES[each], weights[d * each : (d + 1) * each])) for d in range(directions)]
    time, offsets, lengths = input.shape[0], None, None
    if batch_sizes is not None:
        time = batch_sizes.shape[0]
        offsets, lengths = _steps(batch_sizes, input.device)
    projected = "hr" in directed[0]
    size = input.element_size()
    if time == 1:
        chosen = plan.one_step(batch, size)
    else:
        machine = plan.machine(input.device)
        chosen = plan.choose(spec.gates, hidden, size, batch, directions, projected, backward, machine)
    return Call(
        cell=spec,
        plan=chosen,
        time=time,
        batch=batch,
        hidden=hidden,
        proj=proj,
        directions=directions,
        x=input.view(-1, input.shape[-1]),
        weights=directed,
        weight_hh=stacked(directed, "hh"),
        resets=resets,
        batch_sizes=batch_sizes,
        offsets=offsets,
        lengths=lengths,
    )


def stacked(weights: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    tensors = [w[name] for w in weights]
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def saved_tensors(
    cell: str, directions: int, rows: int, hidden: int, proj: bool, dtype: torch.dtype, save: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what `forward` returns as saved: gates, further states, unprojected h."""
    spec = CELLS[cell]
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    if spec.saved and save != LITTLE:
        found.append(((directions, rows, spec.saved * hidden), dtype))
    if spec.states > 1:
        found.append(((spec.states - 1, directions, rows, hidden), torch.float32))
    if proj:
        found.append(((directions, rows, hidden), dtype))
    return found


class Saved(NamedTuple):
    gates: Tensor | None
    cells: Tensor | None
    raw: Tensor | None


def named(c: Call, tensors: Sequence[Tensor]) -> Saved:
    """What `forward` saved, from the last one on: the gates may be left out."""
    left = list(tensors)
    raw = left.pop() if c.projected else None
    cells = left.pop() if c.cell.states > 1 else None
    return Saved(left.pop() if left else None, cells, raw)
