"""Which Triton kernels a GPU gets: what the offline tables hold, and what it can launch."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fusedrnn.backends.triton import plan
from fusedrnn.backends.triton.cells import CELLS
from fusedrnn.backends.triton.instances import instances

TABLES = sorted((Path(__file__).parents[1] / "benchmarks" / "offline").glob("table-triton-*.json"))
GPUS = {
    "H100": plan.H100,
    "A100": plan.Machine(sms=108, shared=163 << 10),
    "RTX 4090": plan.RTX4090,
    "L4": plan.Machine(sms=58, shared=99 << 10),
    "40 SMs": plan.Machine(sms=40, shared=100 << 10),
    "16 SMs": plan.Machine(sms=16, shared=99 << 10),
}
KINDS = {
    "lstm bf16": 2,
    "lstm fp16": 2,
    "lstm fp32 ieee": 4,
    "gru bf16": 2,
    "gru fp32 tf32": 4,
    "rnn_tanh fp16": 2,
}
HIDDEN = (1, 16, 17, 32, 64, 65, 100, 128, 256, 300, 512, 768, 1024, 1025, 1500, 2048, 4096)


def plans(kind: str, machine: plan.Machine, backward: bool) -> set[plan.Plan]:
    """Every one that a scan of some size gets."""
    gates, found = CELLS[kind.split()[0]].gates, set()
    for hidden, batch, directions in product(HIDDEN, (1, 16, 17, 128), (1, 2)):
        chosen = plan.choose(gates, hidden, KINDS[kind], batch, directions, backward, machine)
        programs = -(-hidden // chosen.BU) * -(-batch // chosen.BB) * directions
        assert chosen.schedule != "persistent" or programs <= machine.sms
        found.add(chosen)
    return found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
@pytest.mark.parametrize("gpu", GPUS)
def test_every_plan_is_in_the_tables_and_fits(gpu, table):
    rows = json.loads(table.read_text())
    for kind, backward in product(KINDS, (False, True)):
        for p in plans(kind, GPUS[gpu], backward):
            tiles = f"{p.schedule} {p.BB}x{p.BU}x{p.BK}" + (f" held x{p.NK}" if p.hold else "")
            name = f"{'backward' if backward else 'forward'} {kind} {tiles} ragged"
            for arch in (80, 90, 100):
                assert rows[f"{name} sm_{arch}"]["shared"] <= GPUS[gpu].shared


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_the_tables_hold_what_there_is_and_nothing_spills(table):
    rows = json.loads(table.read_text())
    assert set(rows) == {f"{instance.name} sm_{arch}" for instance in instances() for arch in (80, 90, 100)}
    assert {row["spill"] + row["stack"] + row["LDL"] + row["STL"] for row in rows.values()} == {0}
