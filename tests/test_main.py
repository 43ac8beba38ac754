"""`python -m fusedrnn`: doctor, parity, bench, and the way to the demo."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedrnn
from fusedrnn import terminal
from fusedrnn.__main__ import main
from fusedrnn.backends import native, reference
from fusedrnn.bench.cases import Case
from fusedrnn.bench.report import Result, markdown
from fusedrnn.bench.timing import FEWEST, Times, interleave
from fusedrnn.budget import Row

NO_NATIVE = "it is not built"
ROOT = Path(fusedrnn.__file__).parents[1]
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="fusedrnn._C is not built")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes run side by side: threads that wait for each other would only wait longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: NO_NATIVE)


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that is off by 1e-3."""
    layer = reference.layer

    def off(*args: Any) -> Any:
        output, last = layer(*args)
        return output + 1e-3, last

    monkeypatch.setattr(reference, "layer", off)


# ---- the entry ---------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("doctor", "parity", "bench", "demo"))


@pytest.mark.parametrize("argv", [[], ["prophet"], ["doctor", "--loud"], ["parity", "--cell", "sru"]])
def test_wrong_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: python -m fusedrnn" in capsys.readouterr().err


def test_the_demo_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = importlib.import_module("fusedrnn.demo")
    monkeypatch.setattr(demo, "main", lambda argv: 7 if argv == ["--seconds", "1"] else 0)
    assert main(["demo", "--seconds", "1"]) == 7


# ---- doctor ------------------------------------------------------------------------------------


def run_doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusedrnn", "doctor"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_doctor_in_a_process_of_its_own() -> None:
    done = run_doctor()
    assert done.returncode == (0 if native.unavailable() is None else 1), done.stderr
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert "reference  available" in lines
    assert any(line.startswith("torch ") and line.endswith(torch.__version__) for line in lines)


@needs_native
def test_doctor_names_the_instruction_sets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDRNN_SOMETHING", "on")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "portable" in out
    assert "FUSEDRNN_SOMETHING  on" in out


def test_doctor_without_kernels_says_why_it_is_slow(
    no_native: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"native     missing ({NO_NATIVE})" in out
    assert "a C++17 compiler" in out


@needs_native
@pytest.mark.parametrize("level", ["portable", "sse9"])
def test_doctor_survives_an_instruction_set_that_is_not_there(level: str) -> None:
    done = run_doctor(FUSEDRNN_ISA=level)
    assert done.returncode == 0, done.stderr
    assert f"FUSEDRNN_ISA  {level}" in done.stdout
    expected = "instruction set               portable" if level == "portable" else "got 'sse9'"
    assert expected in done.stdout


# ---- parity ------------------------------------------------------------------------------------


def test_parity_is_green(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "reference", "--cell", "lstm", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[3] for line in out.splitlines()[1:5]] == [
        "dense", "ragged", "bidirectional", "projection",
    ]  # fmt: skip
    assert out.endswith("4 comparisons, 0 red\n")


def test_a_red_row_fails_parity_and_is_named(red: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "reference", "--cell", "gru", "--dtype", "fp64"]) == 1
    out = capsys.readouterr().out
    assert "RED reference gru fp64 dense: output[0]: error 0.001 at index" in out
    assert out.endswith("3 comparisons, 3 red\n")


@needs_native
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_every_instruction_set_is_at_parity(cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = native.isa()
    assert main(["parity", "--backend", "native", "--cell", cell]) == 0
    out = capsys.readouterr().out
    for level in importlib.import_module("fusedrnn._C").isa_levels():
        assert f"native {level}" in out
    assert native.isa() == before


def test_parity_of_a_backend_that_is_not_there(no_native: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["parity", "--backend", "native"]) == 2
    assert capsys.readouterr().out == f"native: not compared: {NO_NATIVE}\n"


# ---- bench -------------------------------------------------------------------------------------

SMALL = ["--cell", "gru", "--hidden", "8", "--batch", "2", "--time", "3", "--seconds", "0"]


@pytest.mark.parametrize("layout", [[], ["--ragged"], ["--bidirectional"]])
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
    assert "| --- |" in capsys.readouterr().out


def test_a_red_case_is_not_timed(red: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    arguments = [*SMALL, "--mode", "inference", "--backend", "reference", "--json", str(file), "--markdown"]
    assert main(["bench", *arguments]) == 1
    (record,) = json.loads(file.read_text())["results"]
    assert record["seconds"] == {}
    assert record["ratio"] is None
    assert not record["parity"]["ok"]
    assert "RED output[0]: error 0.001" in capsys.readouterr().out


def test_timing_takes_turns() -> None:
    order: list[str] = []
    times, rounds = interleave([lambda: order.append("a"), lambda: order.append("b")], seconds=0)
    assert rounds == FEWEST
    assert all(0 < t.p20 <= t.p50 <= t.p80 for t in times)
    turns = [side for i, side in enumerate(order) if i == 0 or order[i - 1] != side]
    assert turns[:2] == ["a", "b"]
    # within a round each runs once; the next round begins with who came last
    assert len(turns) == 3 + FEWEST


def test_the_table_of_the_readme() -> None:
    row = Row("output[0]", 0.0, 0.0, 1.0)

    def result(hidden: int, batch: int, layout: str, ratio: float) -> Result:
        case = Case("lstm", hidden, batch, 128, "inference", layout)
        return Result(case, "native", row, Times(1.0, ratio, 1.0), Times(1.0, 1.0, 1.0), 7)

    red = Result(Case("lstm", 128, 8, 128, "inference", "dense"), "native", row)
    text = markdown(
        [result(64, 1, "dense", 2.0), result(64, 8, "dense", 1.25), red, result(64, 8, "ragged", 4)]
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
    assert dense.work()[0] == 2 * (8 * 4) * 3 * 10 * (10 + 10)
    ragged = Case("gru", 10, 4, 8, "training", "ragged")
    assert ragged.work()[0] == 3 * 2 * sum(ragged.lengths() or []) * 3 * 10 * (10 + 10)


# ---- the terminal ------------------------------------------------------------------------------


def test_a_terminal_gets_rich_and_a_pipe_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = pytest.importorskip("rich.console")
    terminal.table(("name", "verdict"), [("a", "RED a b"), ("long", "ok")])
    assert capsys.readouterr().out == "name  verdict\na     RED a b\nlong  ok\n"

    screen = io.StringIO()
    monkeypatch.setattr(
        terminal, "_console", lambda: console.Console(file=screen, force_terminal=True, width=80)
    )
    terminal.heading("Title")
    terminal.table(("name", "verdict"), [("a", "RED [b]"), ("long", "ok")])
    with terminal.progress(2) as step:
        step("one")
        step("two")
    assert "RED [b]" in screen.getvalue()
    assert "\x1b[1;31m" in screen.getvalue()
    assert capsys.readouterr().out == ""
