"""pytest-benchmark over the cases of `python -m fusedrnn bench --full`.

They are many: `pytest benchmarks -k "ragged and H256"` runs some.
For ratios use the command: it alternates torch.nn and fusedrnn, while these run one after the other.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusedrnn.bench.cases import Case
from fusedrnn.bench.groups import full
from fusedrnn.bench.prepared import prepare

CASES = [
    pytest.param(case, id=f"{group} {case.label}".replace(" ", "-"))
    for group, cases in full().items()
    for case in cases
]


@pytest.mark.parametrize("side", ["torch", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_layer(case: Case, side: str, benchmark: Any) -> None:
    prepared = prepare(case)
    if side == "fused":
        parity = prepare(case.gate()).parity()
        assert parity.ok, parity
    benchmark.group = case.label
    benchmark.extra_info["backend"] = "torch" if side == "torch" else prepared.backend()
    with case.grad_mode():
        benchmark(prepared.calls()[side])
