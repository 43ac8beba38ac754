"""`python -m fusedrnn bench attention`: cases, sides, report, goals and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fusedrnn
from fusedrnn.__main__ import main
from fusedrnn.backends.reference import attend as reference
from fusedrnn.bench import ceilings, command, goals, memory
from fusedrnn.bench.attention import PreparedAttention
from fusedrnn.bench.cases import MODES, AttentionCase
from fusedrnn.bench.ceilings import Ceilings
from fusedrnn.bench.gpu import GpuCeilings
from fusedrnn.bench.groups import attention
from fusedrnn.bench.report import Result
from fusedrnn.bench.timing import FEWEST, Times
from fusedrnn.budget import Row

needs_proc = pytest.mark.skipif(memory.missing() is not None, reason="no /proc/self/clear_refs here")
FORMS = ["operator", "module", "decoder", "location", "multihead"]


def tiny(form: str, mode: str, compiled: bool = False) -> AttentionCase:
    step = form in ("decoder", "location")
    beams = 3 if form == "decoder" else 1
    keys = 4 if form == "multihead" else 5  # it attends to itself
    return AttentionCase(form, 2, beams, 1 if step else 4, keys, 16, mode, compiled)


TINY = [tiny(form, mode) for form in FORMS for mode in MODES if mode == "inference" or form not in FORMS[2:4]]
every_case = pytest.mark.parametrize("case", TINY, ids=lambda case: f"{case.form}-{case.mode}")


@every_case
def test_the_sides_agree(case: AttentionCase) -> None:
    prepared = PreparedAttention.of(case)
    parity = prepared.parity()
    assert parity.ok, parity
    calls = prepared.calls()
    assert list(calls) == ["torch", "fused"]
    with case.grad_mode():
        found = [call() for call in calls.values()]
    for ours, theirs in zip(found[1], found[0]):
        if ours is not None:  # weights that were not asked for
            torch.testing.assert_close(ours, theirs)


@every_case
def test_bytes_are_those_of_inputs_weights_and_outputs(case: AttentionCase) -> None:
    prepared = PreparedAttention.of(case)
    leaves = [
        leaf for value in prepared.inputs for leaf in (value if type(value) is not torch.Tensor else [value])
    ]
    unused = "memory_layer" if case.form in ("decoder", "location") else "nothing"
    weights = [w for name, w in prepared.fused.named_parameters() if unused not in name]
    outputs = [t for t in prepared.plain(*prepared.inputs) if t is not None]
    size = sum(t.numel() for t in (*leaves, *weights, *outputs))
    assert case.work().bytes == 4 * size * (2 if case.mode == "training" else 1)


def test_elements_and_divisions() -> None:
    case = AttentionCase("operator", 2, 3, 4, 5, 6, "training")
    assert case.elements == 2 * 3 * 4 * 5 * 6
    assert case.work().divisions == 2 * case.elements
    assert replace(case, mode="inference").work().divisions == case.elements
    assert replace(case, form="multihead", beams=1).work().divisions == 0


@pytest.mark.slow
def test_torch_compile_is_a_side() -> None:
    case = tiny("operator", "inference", compiled=True)
    with case.grad_mode():
        calls = PreparedAttention.of(case).calls()
        assert list(calls) == ["torch", "fused", "compile"]
        torch.testing.assert_close(calls["compile"](), calls["torch"]())


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form once, and ceilings at once."""
    monkeypatch.setattr(ceilings, "_SECONDS", 0.0)
    monkeypatch.setattr(
        command, "attention", lambda compiled: {f: [tiny(f, "inference", compiled)] for f in FORMS}
    )


@pytest.mark.usefixtures("few")
def test_a_table_json_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = ["attention", "--no-compile", "--seconds", "0", "--backend", "reference", "--json", str(file)]
    assert main(["bench", *arguments, "--markdown"]) == 0
    report = json.loads(file.read_text())
    assert report["ceilings"]["divisions"] > 0
    assert [record["form"] for record in report["results"]] == FORMS
    for record, form in zip(report["results"], FORMS):
        assert record["backend"] == "reference"
        assert record["parity"]["ok"]
        assert record["rounds"] >= FEWEST
        assert record["ratios"].keys() == {"torch"}
        per_second = tiny(form, "inference").elements / record["seconds"]["fused"]["p50"]
        assert record["elements_per_second"] == pytest.approx(per_second)
        assert record["of_ceiling"] > 0
    assert [goal["groups"] for goal in report["goals"]] == [["operator"], ["module"], ["multihead"]]
    out = capsys.readouterr().out
    assert "Gelements/s" in out
    assert "| multihead B2 Tq4 Tk4 H16 inference fp32 |" in out


@pytest.mark.usefixtures("few")
def test_a_red_case_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = reference.forward
    monkeypatch.setattr(command, "attention", lambda compiled: {"operator": [tiny("operator", "inference")]})
    monkeypatch.setattr(reference, "forward", lambda *args: (forward(*args)[0] + 1e-3, None, []))
    assert main(["bench", "attention", "--no-compile", "--seconds", "0", "--backend", "reference"]) == 1
    assert "RED output[0]: error 0.001" in capsys.readouterr().out


@pytest.mark.usefixtures("few")
def test_without_torch_compile_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "compile_missing", lambda: "InvalidCxxCompiler: no compiler")
    assert main(["bench", "attention", "--seconds", "0", "--hidden", "8"]) == 2  # no case is of this size
    assert capsys.readouterr().out.startswith("torch.compile: not timed: InvalidCxxCompiler: no compiler\n")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--full", "--full: of layers"),
        ("--ragged", "--ragged: of layers"),
        ("--cell=gru", "--cell: of layers"),
    ],
)
def test_options_of_layers_are_refused(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "attention", argument])
    assert said in capsys.readouterr().err


# ---- the grid and its goals --------------------------------------------------------------------


def test_the_grid() -> None:
    groups = attention(compiled=True)
    assert {name: len(cases) for name, cases in groups.items()} == {
        "operator": 4, "module": 4, "decoder step": 3, "location": 1, "multihead": 2,
    }  # fmt: skip
    labels = [case.label for cases in groups.values() for case in cases]
    assert len(labels) == len(set(labels))


def test_every_goal_is_about_cases_of_the_grid() -> None:
    sides = dict.fromkeys(("torch", "compile", "fused"), Times(1.0, 1.0, 1.0))
    results = [
        Result(group, case, "native", Row("output[0]", 0.0, 0.0, 1.0), sides, 7, memory={"fused": 1})
        for group, cases in attention(compiled=True).items()
        for case in cases
    ]
    machine = Ceilings(1, {"L1": 1, "L2": 2, "L3": 3}, {"fp32": 1e9}, {}, 1e9)
    verdicts = goals.verdicts(results, machine, goals.ATTENTION_GOALS)
    assert [verdict.goal for verdict in verdicts] == list(goals.ATTENTION_GOALS)
    assert all(verdict.reached is not None for verdict in verdicts)


def test_what_binds_an_attention() -> None:
    machine = Ceilings(1, {"L1": 1, "L2": 2, "L3": 3}, {"fp32": 1e12}, {1: {"DRAM": 1e12}}, 1e9)
    case = AttentionCase("operator", 8, 1, 32, 64, 256, "inference")
    assert machine.bound(case) == "division"
    assert machine.seconds(case) == case.elements / 1e9
    assert replace(machine, flops={"fp32": 1e6}).bound(case) == "GEMM"
    assert replace(machine, bandwidth={1: {"DRAM": 1e3}}).bound(case) == "DRAM"


# ---- memory ------------------------------------------------------------------------------------


@needs_proc
def test_plain_torch_code_holds_the_large_tensor() -> None:
    case = AttentionCase("operator", 4, 1, 64, 64, 128, "training")
    result = command._with_memory(
        Result("operator", case, "native", Row("", 0, 0, 1), {"fused": Times(1, 1, 1)})
    )
    assert result.memory["torch"] >= 4 * case.elements
    assert result.memory.keys() == {"torch", "fused"}
    inference = replace(result, case=replace(case, mode="inference"), memory={})
    assert command._with_memory(inference) is inference


def test_memory_is_that_of_the_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(command: list[str], env: dict[str, str], **options: bool) -> SimpleNamespace:
        seen.append((command[-2], env["FUSEDRNN_BACKEND"]))
        return SimpleNamespace(returncode=0, stdout="4096")

    monkeypatch.setattr(memory.subprocess, "run", run)
    with fusedrnn.use_backend("reference"):
        assert memory.measure(tiny("operator", "training")) == {"torch": 4096, "fused": 4096}
    memory.measure(tiny("operator", "training"))
    assert seen == [("torch", "reference"), ("fused", "reference"), ("torch", ""), ("fused", "")]


# ---- on a GPU ----------------------------------------------------------------------------------


def test_cases_and_goals_of_a_gpu() -> None:
    arguments = command._parser().parse_args(["attention", "--device", "cuda", "--no-compile"])
    plan = command._plan(arguments)
    assert {case.dtype for _, case in plan} == {"bf16"}
    assert {case.mode for _, case in plan} == {"inference", "training"}
    slow = {side: Times(t, t, t) for side, t in (("torch", 1e-3), ("fused", 50e-6))}
    results = [
        Result(group, case, "triton", Row("output[0]", 0.0, 0.0, 1.0), slow, 7) for group, case in plan
    ]
    limits = GpuCeilings({"bf16": 1e15}, 3e12, "fp32")
    verdicts = goals.verdicts(results, limits, command._goals(arguments))
    assert {verdict.goal.measure for verdict in verdicts} >= {"best_seconds", "torch"}
    assert all(verdict.met for verdict in verdicts)
