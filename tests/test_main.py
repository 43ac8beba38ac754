"""`python -m fusedrnn`: doctor, parity, and the way to the others."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedrnn
from fusedrnn import doctor, terminal
from fusedrnn.__main__ import main
from fusedrnn.backends import native
from fusedrnn.parity import ATTENTION
from fusedrnn.scores import SCORES

NO_NATIVE = "it is not built"
ROOT = Path(fusedrnn.__file__).parents[1]
needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="fusedrnn._C is not built")


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: NO_NATIVE)


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


# ---- the process -------------------------------------------------------------------------------


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fusedrnn", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    "argv",
    [["doctor"], ["parity", "--backend", "reference", "--cell", "AdditiveAttention"]],
)
def test_a_reader_who_leaves_is_no_error(argv: list[str]) -> None:
    process = start(*argv)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait() == 128 + signal.SIGPIPE


def test_doctor_without_a_standard_output() -> None:
    command = f"exec {sys.executable} -m fusedrnn doctor >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == (0 if native.unavailable() is None else 1)


@pytest.mark.slow
def test_an_interrupted_bench_leaves_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    sizes = map(str, range(8, 400))
    argv = ["--cell", "gru", "--batch", "1", "--time", "3", "--seconds", "0.1", "--json", str(file)]
    process = start("bench", *argv, "--hidden", *sizes, cwd=tmp_path)
    while not file.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, said
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert json.loads(file.read_text())["results"]


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
    assert lines.count("reference  available") == 2  # of layers, and of attention
    assert "Attention, cpu" in lines
    assert any(line.startswith("torch ") and line.endswith(torch.__version__) for line in lines)


@pytest.mark.parametrize(
    ("architectures", "missing", "line"),
    [(["80", "90a"], None, "sm_80 sm_90a"), ([], "FUSEDRNN_CUDA=0", "missing (FUSEDRNN_CUDA=0)")],
)
def test_doctor_names_the_cuda_architectures(
    architectures: list[str], missing: str | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(architectures=architectures, missing=missing)
    monkeypatch.setattr(doctor, "kernels", lambda: SimpleNamespace(cuda=cuda))
    assert doctor.cuda_architectures() == line


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


@pytest.mark.parametrize("value", ["", " "])
def test_doctor_takes_a_blank_compiler_for_none(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    usual = doctor._compiler()
    monkeypatch.setenv("CXX", value)
    assert doctor._compiler() == usual


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


@pytest.mark.parametrize("cell", ATTENTION)
def test_attention_is_at_parity(cell: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.random.get_rng_state()
    assert main(["parity", "--backend", "reference", "--cell", cell, "--dtype", "bf16"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:-2]] == list(ATTENTION[cell])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_module_of_attention_has_a_row() -> None:
    found = {name for name in fusedrnn.__all__ if name.endswith("Attention")}
    assert set(ATTENTION) == {*found, "MultiheadAttention", "attend"}
    assert ATTENTION["attend"] == tuple(SCORES)


@needs_native
def test_attention_is_at_parity_on_every_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    for dtype in ("fp64", "fp32", "bf16"):
        assert main(["parity", "--backend", "native", "--cell", "LuongAttention", "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    for level in importlib.import_module("fusedrnn._C").isa_levels():
        assert f"native {level}" in out


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
