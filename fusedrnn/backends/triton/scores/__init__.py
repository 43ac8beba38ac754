"""Every attention score as Triton jit functions, forward and backward side by side. Scores know no loop."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import additive, dot


class Score(NamedTuple):
    """What the loops over tiles need to know of a score. Both scores are symmetric in queries and keys.

    Attributes:
        parts: a tile has this many tensors of D's columns, side by side, in tuples.
        start: (BQ, BK, BD) -> the sums of no column.
        add: (sums, queries [BQ, BD], keys [BK, BD], v [BD] fp32, precision) -> the sums with these columns.
        finish: sums -> energies [BQ, BK], up to a number that is the same for all keys of a query.
        backward: (d_own, d_v, own [BO, BD], other [BT, BD], g [BO, BT], precision) -> d_own and d_v with the
            gradients that these pairs add, tuples of [BO, BD] and of [BD] fp32, d_own without the factor v;
            own are queries and other keys, or the other way round.
    """

    parts: int
    start: Any
    add: Any
    finish: Any
    backward: Any


SCORES = {
    "additive": Score(4, additive.start, additive.add, additive.finish, additive.backward),
    "dot": Score(1, dot.start, dot.add, dot.finish, dot.backward),
}
