"""What forward and backward make of a layer's arguments alike, and what a backend brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ...saving import LITTLE

_NAMES = {
    2: ("ih", "hh"),
    3: ("ih", "hh", "hr"),
    4: ("ih", "hh", "bias_ih", "bias_hh"),
    5: ("ih", "hh", "bias_ih", "bias_hh", "hr"),
}


class Cell(Protocol):
    """What is around a scan depends on this much of its cell.

    Attributes:
        gates, states: how many there are, as in fusedrnn.cells.
        saved: how many values of a unit a step saves for the backward; 0 if its output says it all.
        split: the gradients of the gates' two halves differ.
    """

    @property
    def gates(self) -> int: ...
    @property
    def states(self) -> int: ...
    @property
    def saved(self) -> int: ...
    @property
    def split(self) -> bool: ...


class Scans(Protocol):
    """The kernels of a backend, a module. h is [D, N, H] with strides of which the last is 1."""

    @property
    def CELLS(self) -> Mapping[str, Cell]: ...

    def forward(
        self, c: Call, x_gates: Tensor, start: Tensor, states: Tensor, h: Tensor, saved: Saved
    ) -> None:
        """Fills h and `saved`; states fp32 [S, D, B, H] go from those before the first step to the last ones.

        Args:
            x_gates: the input's half of the gates [D, N, G*H].
            start: h before the first step [D, B, H].
        """

    def backward(
        self,
        c: Call,
        saved: Saved,
        states: Sequence[Tensor],
        h: Tensor,
        grad: Tensor | None,
        d_states: Tensor,
        d_x_gates: Tensor,
        d_h_gates: Tensor,
    ) -> None:
        """Fills the gates' gradients [D, N, G*H], one tensor unless the cell is split.

        Args:
            states: those before the first step [D, B, H].
            grad: the gradient of h, strides as h.
            d_states: fp32 [S, D, B, H], from the last states' gradients to the first ones'.
        """

    def step(self, c: Call, states: Sequence[Tensor], output: Tensor, saved: Saved) -> list[Tensor] | None:
        """Fills output and `saved` of a call for a single step and returns its last states, as the layer has
        them; or None, and `forward` runs."""

    def gates_again(self, c: Call, states: Sequence[Tensor], output: Tensor) -> Tensor:
        """`Saved.gates`, of a forward that kept none.

        Args:
            states: before the first step, as the layer has them.
            output: [D, N, P].
        """


class Saved(NamedTuple):
    """What a forward keeps for the backward."""

    gates: Tensor | None  # [D, N, SAVED*H]: activated, of a GRU also n's recurrent half
    cells: Tensor | None  # [S-1, D, N, H] fp32: the other states
    raw: Tensor | None  # [D, N, H]: h before its projection


class Call(NamedTuple):
    """What forward and backward make of their arguments alike."""

    name: str
    cell: Cell
    time: int
    batch: int
    hidden: int
    proj: int
    directions: int
    x: Tensor  # [N, I]
    weights: list[dict[str, Tensor]]  # by direction, under _NAMES
    weight_hh: Tensor  # [D, G*H, H]: of the scan
    resets: Tensor | None  # [D, N] bool
    offsets: Tensor | None  # [T+1] int64
    lengths: Tensor | None  # [B] int64

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def projected(self) -> bool:
        return "hr" in self.weights[0]

    def stacked(self, name: str) -> Tensor | None:
        """A weight of all directions [D, ...]."""
        return _stacked([w[name] for w in self.weights]) if name in self.weights[0] else None

    def by_direction(self, output: Tensor) -> Tensor:
        """[T, B, D*P] or [N, D*P] seen as [D, N, P]."""
        return output.view(self.rows, self.directions, -1).transpose(0, 1)

    def ends(self, d: int) -> tuple[Tensor, Tensor]:
        """The rows of every sequence's first step and of its last one, in the order of a direction, [B]."""
        early = torch.arange(self.batch, device=self.x.device)
        if self.offsets is None or self.lengths is None:
            late = early + (self.time - 1) * self.batch
        else:
            late = early + self.offsets[self.lengths - 1]
        return (early, late) if d == 0 else (late, early)


def precision() -> str:
    """Of fp32 products, what torch's flags say for recurrent networks on a GPU: "tf32", "ieee", or "none".

    "none" asks for fp32 but not for how; `torch.backends.cudnn.allow_tf32 = False` leaves it.
    """
    return torch.backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined,no-any-return]


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
    scans: Scans,
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    weights: Sequence[Tensor],
    states: Sequence[Tensor],
    directions: int,
    resets: Tensor | None,
) -> Call:
    spec = scans.CELLS[cell]
    _, batch, proj = states[0].shape
    each = len(weights) // directions
    directed = [dict(zip(_NAMES[each], weights[d * each : (d + 1) * each])) for d in range(directions)]
    time, offsets, lengths = input.shape[0], None, None
    if batch_sizes is not None:
        time = batch_sizes.shape[0]
        offsets, lengths = _steps(batch_sizes, input.device)
    return Call(
        name=cell,
        cell=spec,
        time=time,
        batch=batch,
        hidden=weights[0].shape[0] // spec.gates,
        proj=proj,
        directions=directions,
        x=input.view(-1, input.shape[-1]),
        weights=directed,
        # Projected, W_hh (W_hr h) = (W_hh W_hr) h: a scan of h before its projection, like any other
        weight_hh=_stacked([w["hh"] @ w["hr"] if "hr" in w else w["hh"] for w in directed]),
        resets=resets,
        offsets=offsets,
        lengths=lengths,
    )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def saved_tensors(
    cell: Cell, directions: int, rows: int, hidden: int, proj: bool, dtype: torch.dtype, save: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of what `forward` returns as saved, as in Saved."""
    found: list[tuple[tuple[int, ...], torch.dtype]] = []
    if cell.saved and save != LITTLE:
        found.append(((directions, rows, cell.saved * hidden), dtype))
    if cell.states > 1:
        found.append(((cell.states - 1, directions, rows, hidden), torch.float32))
    if proj:
        found.append(((directions, rows, hidden), dtype))
    return found


def named(c: Call, tensors: Sequence[Tensor]) -> Saved:
    """What `forward` saved, from the last one on: the gates may be left out."""
    left = list(tensors)
    raw = left.pop() if c.projected else None
    cells = left.pop() if c.cell.states > 1 else None
    return Saved(left.pop() if left else None, cells, raw)
