"""`python -m fusedrnn bench`: cases, timing, ceilings and goals."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fusedrnn.__main__ import main
from fusedrnn.backends import native
from fusedrnn.bench import ceilings, command, goals
from fusedrnn.bench.cases import Case
from fusedrnn.bench.ceilings import Ceilings
from fusedrnn.bench.goals import Goal
from fusedrnn.bench.groups import full
from fusedrnn.bench.prepared import Prepared, prepare
from fusedrnn.bench.report import Result, markdown
from fusedrnn.bench.timing import FEWEST, Times, interleave
from fusedrnn.budget import Row

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="fusedrnn._C is not built")


@pytest.fixture(autouse=True)
def ceilings_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SECONDS", 0.0)


# ---- the command -------------------------------------------------------------------------------

SMALL = ["--cell", "gru", "--hidden", "8", "--batch", "2", "--time", "3", "--seconds", "0"]


@pytest.mark.parametrize("layout", [[], ["--ragged"], ["--bidirectional"], ["--stacked"], ["--resets"]])
def test_bench_leaves_json_and_a_table(
    layout: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = [*SMALL, *layout, "--backend", "reference", "--json", str(file), "--markdown"]
    assert main(["bench", *arguments]) == 0
    report = json.loads(file.read_text())
    assert report["command"] == "python -m fusedrnn bench " + " ".join(arguments)
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["versions"]["torch"] == torch.__version__
    assert [r["mode"] for r in report["results"]] == ["inference", "training"]
    for record in report["results"]:
        assert record["backend"] == "reference"
        assert record["parity"]["ok"]
        assert record["rounds"] >= FEWEST
        times = record["seconds"]
        for side in ("torch", "fused"):
            assert 0 < times[side]["p20"] <= times[side]["p50"] <= times[side]["p80"]
        assert record["ratio"] == pytest.approx(times["torch"]["p50"] / times["fused"]["p50"])
        assert record["of_ceiling"] == max(record["of_gemm"], record["of_read"])
    out = capsys.readouterr().out
    assert "| --- |" in out
    assert "geomean" in out


def test_a_red_case_is_not_timed(red: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = [*SMALL, "--mode", "inference", "--backend", "reference", "--json", str(file), "--markdown"]
    assert main(["bench", *arguments]) == 1
    (record,) = json.loads(file.read_text())["results"]
    assert record["seconds"] == {}
    assert record["ratio"] is None
    assert not record["parity"]["ok"]
    assert "RED output[0]: error 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--time", "0"], "--time: expected an integer greater than zero, got '0'"),
        (["--hidden", "64", "0"], "--hidden: expected an integer greater than zero, got '0'"),
        (["--hidden", "-3"], "--hidden: expected an integer greater than zero, got '-3'"),
        (["--batch", "1.5"], "--batch: expected an integer greater than zero, got '1.5'"),
        (["--seconds", "-1"], "--seconds: expected a number of seconds, not negative, got '-1'"),
        (["--seconds", "nan"], "--seconds: expected a number of seconds, not negative, got 'nan'"),
        (["--deadline", "soon"], "--deadline: expected a number of seconds, not negative, got 'soon'"),
        (["--json", "/nowhere/out.json"], "--json: cannot write /nowhere/out.json: No such file"),
        (["--json", "."], "--json: cannot write .: it is a directory"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    option: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        main(["bench", *option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_the_check_of_the_file_leaves_it_alone(tmp_path: Path) -> None:
    file, part = tmp_path / "out.json", tmp_path / "out.part"
    command._check_file(command._parser(), file)
    assert not list(tmp_path.iterdir())
    part.write_text("of a run that was cut off")
    command._check_file(command._parser(), file)
    assert part.read_text() == "of a run that was cut off"


@pytest.mark.parametrize("argv", [["--full", "--hidden", "3"], ["--deadline", "0"]])
def test_nothing_measured_is_no_success(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *SMALL[:2], *argv, "--json", str(tmp_path / "out.json")]) == 2
    assert "no case was measured: " in capsys.readouterr().out


def test_timing_takes_turns() -> None:
    order: list[str] = []
    times, rounds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0)
    assert rounds == FEWEST
    assert all(0 < t.p20 <= t.p50 <= t.p80 for t in times.values())
    turns = [side for i, side in enumerate(order) if i == 0 or order[i - 1] != side]
    assert turns[:2] == ["a", "b"]
    # within a round each runs once; the next round begins with who came last
    assert len(turns) == 3 + FEWEST


def test_the_table_of_the_readme() -> None:
    red = timed(128, 8, "dense", None)
    text = markdown(
        [timed(64, 1, "dense", 2.0), timed(64, 8, "dense", 1.25), red, timed(64, 8, "ragged", 4.0)]
    )
    assert text.splitlines() == [
        "| torch time / fused time, B = 1 / 8 | H = 64 | H = 128 |",
        "| --- | --- | --- |",
        "| lstm inference | 2.0 / 1.2 | - / RED |",
        "",
        "| case | torch ms | fused ms | torch time / fused time |",
        "| --- | --- | --- | --- |",
        "| lstm H64 B8 T128 ragged inference fp32 | 4000.00 | 1000.00 | 4.0 |",
    ]


def test_work_counts_rows_that_exist() -> None:
    dense = Case("gru", 10, 4, 8, "inference", "dense")
    assert dense.work().flops == 2 * (8 * 4) * 3 * 10 * (10 + 10)
    ragged = Case("gru", 10, 4, 8, "training", "ragged")
    assert ragged.work().flops == 3 * 2 * sum(ragged.lengths() or []) * 3 * 10 * (10 + 10)


def test_work_counts_every_matrix() -> None:
    wide = Case("lstm", 10, 4, 8, "inference", "dense", inputs=7)
    assert wide.work().flops == 2 * (8 * 4) * 4 * 10 * (10 + 7)
    projected = Case("lstm", 10, 4, 8, "inference", "projection")
    assert projected.work().flops == 2 * (8 * 4) * (4 * 10 * (10 + 5) + 5 * 10)
    both = Case("lstm", 10, 4, 8, "inference", "bidirectional")
    assert both.work().flops == 2 * (8 * 4) * 2 * 4 * 10 * (10 + 10)
    stacked = Case("lstm", 10, 4, 8, "inference", "stacked")
    assert stacked.work().flops == 3 * 2 * (8 * 4) * 4 * 10 * (10 + 10)


@pytest.mark.parametrize(
    ("layout", "mode", "dtype", "resident", "times"),
    [
        ("dense", "inference", "fp32", 4 * 10 * 10 * 4, 8),
        ("dense", "training", "fp32", 4 * 10 * 10 * 4, 16),
        ("bidirectional", "inference", "bf16", 2 * 4 * 10 * 10 * 2, 8),
        ("projection", "inference", "fp32", (4 * 10 * 5 + 5 * 10) * 4, 8),
        ("stacked", "inference", "fp32", 4 * 10 * 10 * 4, 3 * 8),
        ("step", "inference", "int8", 4 * 10 * (10 + 10), 8),
    ],
)
def test_what_every_step_reads_again(layout: str, mode: str, dtype: str, resident: int, times: int) -> None:
    work = Case("lstm", 10, 4, 8, mode, layout, dtype).work()
    assert work.resident == resident
    assert work.streamed == times * resident


def test_ragged_lengths() -> None:
    lengths = Case("lstm", 8, 500, 128, "inference", "ragged").lengths() or []
    assert len(lengths) == 500
    assert max(lengths) == 128
    assert min(lengths) in range(32, 36)
    assert Case("lstm", 8, 3, 1, "inference", "ragged").lengths() == [1, 1, 1]


@pytest.mark.parametrize("layout", ["dense", "ragged", "bidirectional", "projection", "stacked"])
def test_modules_have_the_sizes_of_their_case(layout: str) -> None:
    case = Case("lstm", 6, 3, 4, "training", layout, inputs=5)
    prepared = Prepared.of(case)
    calls = prepared.calls()
    assert list(calls) == ["torch", "fused"]
    shapes = [[g.shape for g in call()] for call in calls.values()]
    assert shapes[0] == shapes[1]
    assert prepared.fused.input_size == 5
    work = case.work()
    stock: Counter[bool] = Counter()
    for name, weight in prepared.stock.named_parameters():
        stock[name.startswith("weight")] += weight.numel()
    rows = sum(case.lengths() or [4 * 3])
    width = {"bidirectional": 12, "projection": 3}.get(layout, 6)
    assert work.flops == 3 * 2 * rows * stock[True]
    assert work.bytes == 2 * 4 * (sum(stock.values()) + rows * (5 + width))


def test_bf16_is_timed_against_fp32_too() -> None:
    calls = Prepared.of(Case("gru", 6, 3, 4, "inference", "dense", "bf16")).calls()
    outputs = {side: call()[0].dtype for side, call in calls.items()}
    assert outputs == {"torch": torch.bfloat16, "fused": torch.bfloat16, "fused_fp32": torch.float32}


def test_one_gate_serves_cases_that_differ_in_time() -> None:
    short, long = (Case("gru", 32, 1, time, "inference", "dense").gate() for time in (128, 20000))
    assert short == long
    assert short.time == 16
    assert Case("lstm", 1024, 64, 128, "training", "dense").gate().time == 2
    assert Case("lstm", 128, 8, 1, "inference", "dense").gate().time == 1


# ---- groups and goals --------------------------------------------------------------------------


def test_the_full_grid() -> None:
    groups = full()
    sizes = {name: len(cases) for name, cases in groups.items()}
    dense = 6 * 4 * 2
    assert {cell: sizes[cell] for cell in ("lstm", "gru", "rnn_tanh")} == dict.fromkeys(
        ("lstm", "gru", "rnn_tanh"), dense
    )
    assert sizes["ragged"] == 3 * 4 * 3 * 2
    assert sizes["projection"] == sizes["bidirectional"] == sizes["stacked"] == 4 * 3 * 2
    assert sizes["bf16"] == 3 * 4 * 4
    assert sizes["one step"] == 2 * 3 * 5
    labels = [case.label for cases in groups.values() for case in cases]
    assert len(labels) == len(set(labels))


def timed(hidden: int, batch: int, layout: str, ratio: float | None, group: str = "lstm") -> Result:
    case = Case("lstm", hidden, batch, 128, "inference", layout)
    times = {"torch": ratio, "fused": 1.0} if ratio else {}
    row = Row("output[0]", 0.0, 0.0, 1.0)
    return Result(group, case, "native", row, {side: Times(t, t, t) for side, t in times.items()}, 7)


@pytest.fixture
def machine() -> Ceilings:
    bandwidth = {"L1": 8e9, "L2": 4e9, "L3": 2e9, "DRAM": 1e9}
    cache = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}
    return Ceilings(2, cache, {"fp32": 1e9, "fp64": 5e8, "bf16": 2e9}, {1: bandwidth, 2: bandwidth}, 1e8)


def test_every_goal_is_about_cases_of_the_full_grid(machine: Ceilings) -> None:
    row, second = Row("output[0]", 0.0, 0.0, 1.0), Times(1.0, 1.0, 1.0)
    sides = {
        "bf16": ("torch", "fused", "fused_fp32"),
        "one step": ("torch", "cell", "fused"),
    }
    results = [
        Result(group, case, "native", row, dict.fromkeys(sides.get(group, ("torch", "fused")), second), 7)
        for group, cases in full().items()
        for case in cases
    ]
    verdicts = goals.verdicts(results, machine)
    assert [verdict.goal for verdict in verdicts] == list(goals.GOALS)
    assert all(verdict.reached is not None for verdict in verdicts)


def test_a_goal_is_met_or_not(machine: Ceilings) -> None:
    results = [timed(64, 1, "dense", 4.0), timed(512, 1, "dense", 1.0)]
    geomean = Goal(("lstm",), "", "torch", "geomean", 2.0)
    verdict = geomean.judge(results, machine)
    assert verdict is not None
    assert verdict.met
    assert verdict.reached == pytest.approx(2.0)
    assert verdict.worst == results[1].case.label
    assert verdict.cells() == ("lstm: ", "geomean >= 2.00", "2.00", "ok", verdict.worst)
    assert not replace(geomean, statistic="min", limit=1.1).judge(results, machine).met
    assert replace(geomean, measure="seconds", statistic="max", limit=1.0).judge(results, machine).met
    assert not replace(geomean, measure="seconds", statistic="max", limit=0.9).judge(results, machine).met
    assert replace(geomean, groups=("gru",)).judge(results, machine) is None
    assert replace(geomean, where=lambda case: case.hidden == 64).judge(results, machine).reached == 4.0


def test_a_goal_with_a_red_case_is_not_met(machine: Ceilings) -> None:
    results = [timed(64, 1, "dense", 4.0), timed(512, 1, "dense", None)]
    goal = Goal(("lstm",), "", "torch", "geomean", 2.0)
    verdict = goal.judge(results, machine)
    assert verdict.reached == 4.0
    assert not verdict.met
    assert verdict.cells()[3] == "RED 1"
    assert goal.judge(results[1:], machine).reached is None


def test_the_summary_of_groups() -> None:
    results = [
        timed(64, 1, "dense", 4.0),
        timed(512, 1, "dense", 1.0),
        timed(64, 8, "dense", None),
        timed(64, 8, "ragged", None, "ragged"),
    ]
    assert goals.groups(results) == [
        ("lstm", "3", "1", "2.00", "1.00", results[1].case.label),
        ("ragged", "1", "1", "-", "-", ""),
    ]


# ---- one step ----------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_the_sides_of_a_step_agree(cell: str, storage: str) -> None:
    prepared = prepare(Case(cell, 6, 1, 1, "inference", "step", storage, inputs=5))
    parity = prepared.parity()
    assert parity.ok, parity
    with torch.inference_mode():
        calls = prepared.calls()
        assert list(calls) == ["torch", "cell", "fused"]
        for _ in range(3):
            module, ours = calls["torch"](), calls["cell"]()
            assert calls["fused"]().shape == (6,)
    for a, b in zip(*([side] if cell == "gru" else side for side in (module, ours))):
        torch.testing.assert_close(a[0], b)


# ---- ceilings ----------------------------------------------------------------------------------


def test_the_level_that_holds_the_recurrent_matrix(machine: Ceilings) -> None:
    def level(hidden: int, dtype: str = "fp32") -> str:
        return machine.level(Case("lstm", hidden, 1, 128, "inference", "dense", dtype))

    # 4 * H * H * 4 bytes; two threads share L1 and L2 out, and have one L3
    assert [level(h) for h in (64, 65, 256, 512, 1024, 2048)] == ["L1", "L2", "L2", "L3", "L3", "DRAM"]
    assert level(512, "bf16") == "L2"


def test_the_ceiling_is_the_longer_of_two_times(machine: Ceilings) -> None:
    few, many = (Case("lstm", 512, batch, 10, "inference", "dense") for batch in (1, 64))
    assert machine.read_seconds(few) == machine.read_seconds(many) == 10 * 4 * 512 * 512 * 4 / 2e9
    assert machine.gemm_seconds(few) == 2 * 10 * 4 * 512 * 1024 / 1e9
    assert machine.seconds(few) == max(machine.gemm_seconds(few), machine.read_seconds(few))
    assert machine.seconds(many) == machine.gemm_seconds(many)
    assert machine.gemm_seconds(replace(few, dtype="bf16")) == machine.gemm_seconds(few) / 2
    assert replace(machine, bandwidth={}).read_seconds(few) == 0


def test_of_two_measurements_the_better_rates_count(machine: Ceilings) -> None:
    busy = {"L1": 9e9, "L2": 1e9, "L3": 1e9, "DRAM": 1e9}
    flops = {"fp32": 2e9, "fp64": 1e8, "bf16": 2e9}
    other = replace(machine, flops=flops, bandwidth={1: busy, 2: busy}, divisions=2e8)
    best = machine.best(other)
    assert best.divisions == 2e8
    assert best.flops == {"fp32": 2e9, "fp64": 5e8, "bf16": 2e9}
    assert best.bandwidth[2] == {"L1": 9e9, "L2": 4e9, "L3": 2e9, "DRAM": 1e9}


@needs_native
def test_ceilings_are_measured() -> None:
    found = ceilings.measure()
    assert found.threads == 1
    assert set(found.bandwidth) == {1}
    assert all(rate > 0 for rate in (*found.flops.values(), *found.bandwidth[1].values()))
    assert found.divisions > 0
    assert "read, 1 threads: L1 " in str(found)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_the_plain_read_reads_everything(threads: int) -> None:
    native = importlib.import_module("fusedrnn._C")
    data = torch.zeros(512 * 7 // 8, dtype=torch.int64)
    before = native.isa()
    try:
        for level in native.isa_levels():
            native.set_isa(level)
            for at in (0, 63, 200, data.numel() - 1):
                data.zero_()[at] = 1 << 40
                # its threads' results are combined by exclusive or: an odd number of reads leaves the value
                assert native.read(data.data_ptr(), data.nbytes, 3, threads) == 1 << 40
    finally:
        native.set_isa(before)
