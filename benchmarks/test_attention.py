"""pytest-benchmark over the cases of `python -m fusedrnn bench attention`.

`pytest benchmarks/test_attention.py -k "module and not compile"` runs some. For ratios use the command: it
alternates the sides, while these run one after the other.
"""

from __future__ import annotations

from typing import Any

import pytest

from fusedrnn.bench.attention import compile_missing
from fusedrnn.bench.cases import AttentionCase
from fusedrnn.bench.groups import attention
from fusedrnn.bench.prepared import prepare

CASES = [
    pytest.param(case, id=f"{group} {case.label}".replace(" ", "-"))
    for group, cases in attention(compiled=True).items()
    for case in cases
]


@pytest.mark.parametrize("side", ["torch", "compile", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_attention(case: AttentionCase, side: str, benchmark: Any) -> None:
    if side == "compile" and (why_not := compile_missing()):
        pytest.skip(why_not)
    prepared = prepare(case)
    if side == "fused":
        parity = prepare(case.gate()).parity()
        assert parity.ok, parity
    benchmark.group = case.label
    benchmark.extra_info["backend"] = prepared.backend() if side == "fused" else "torch"
    with case.grad_mode():
        benchmark(prepared.calls()[side])
