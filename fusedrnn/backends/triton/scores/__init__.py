"""Every attention score as Triton jit functions, forward and backward side by side. Scores know no loop."""

from __future__ import annotations

from typing import Any, NamedTuple

from . import additive, dot


class Score(NamedTuple):
    """What the loops over tiles need to know of a score. Both scores are symmetric in queries and keys.

    Attributes:
        parts: a tile has this many tensors of D's columns, side by side, in tuples.
        start: (n, BK, BD) -> the sums of no column: [n, BK], or of additive scores n tensors [BK, BD].
        add: (sums, queries, keys, v, how many of the queries exist, of the keys, precision) -> the sums with
            these columns. A dot's queries are [BQ, BD] and its keys [BK, BD]; additive ones are several of
            both, each in its own tensors [1, BD] or [BK, BD], and there is a sum for each pair of such; v is
            [1, BD] fp32.
        finish: sums of one query, of a dot of BQ -> energies [BQ, BK], up to a number that is the same for
            all keys of a query.
        prepare: own rows, four tensors [1, BD] each -> what `backward` keeps of them; None of a dot, as are
            the next two.
        backward: (d_own, d_v, own, prepared, other, g, how many of own exist, whether v's gradient is needed)
            -> d_own and d_v with what these pairs add; g has a number for each, those of a row of own side by
            side; own are queries and other keys, or the other way round.
        close: (d_own of a row, d_v, v, whether of fp32) -> their gradients.
    """

    parts: int
    start: Any
    add: Any
    finish: Any
    prepare: Any = None
    backward: Any = None
    close: Any = None


SCORES = {
    "additive": Score(
        4, additive.start, additive.add, additive.finish, additive.prepare, additive.backward, additive.close
    ),
    "dot": Score(1, dot.start, dot.add, dot.finish),
}
