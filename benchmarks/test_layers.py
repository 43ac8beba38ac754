"""pytest-benchmark over a few cases of `python -m fusedrnn bench`: run `pytest benchmarks`.

For ratios use the command: it alternates torch.nn and fusedrnn, while these run one after the other.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusedrnn.bench.cases import LAYOUTS, MODES, Case

CASES = [
    Case(cell, hidden, batch, 64, mode, layout)
    for cell in ("lstm", "gru", "rnn_tanh")
    for hidden, batch in ((64, 1), (256, 8))
    for layout in LAYOUTS
    for mode in MODES
]


@pytest.mark.parametrize("side", ["torch", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label.replace(" ", "-"))
def test_layer(case: Case, side: str, benchmark: Any) -> None:
    prepared = case.prepare()
    if side == "fused":
        parity = prepared.parity()
        assert parity.ok, parity
    benchmark.group = case.label
    benchmark.extra_info["backend"] = "torch" if side == "torch" else prepared.backend()
    stock, fused = prepared.calls()
    benchmark(stock if side == "torch" else fused)
