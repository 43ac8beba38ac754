"""`python -m benchmarks.gpu`: the driver with steps of our own, and every real step in its smallest size."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedrnn.backends import native, select
from fusedrnn.bench.cases import Case
from fusedrnn.bench.device import Call, Cpu
from fusedrnn.bench.gpu import DEVICES

if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks.gpu import build, checks, floors
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.driver import LATE, ROOT, SKIPPED, Outcome, Step, run, start
from benchmarks.gpu.steps import steps
from benchmarks.gpu.summary import ATTENTION, report, show

# ---- the driver --------------------------------------------------------------------------------


class World:
    """A clock, and processes that take the seconds that their command names: [status, seconds, output]."""

    def __init__(self) -> None:
        self.now = 100.0
        self.given: dict[str, float] = {}
        self.env: list[Mapping[str, str]] = []

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int, str]:
        name, status, wanted, text = command
        self.given[name] = seconds
        self.env.append(env)
        self.now += min(seconds, float(wanted))
        return (LATE if float(wanted) > seconds else int(status)), text


def step(name: str, seconds: float, status: int = 0, wanted: float = 1, text: str = "fine\n") -> Step:
    return Step(name, lambda left, result: (name, str(status), str(wanted), text), seconds)


def drive(todo: Sequence[Step], seconds: float, folder: Path) -> tuple[list[Outcome], World, list[int]]:
    world, saved = World(), []
    outcomes = run(
        todo, seconds, folder / "log", lambda known: saved.append(len(known)), world.start, world.clock
    )
    return outcomes, world, saved


def test_unused_time_is_left_to_those_after_it(tmp_path: Path) -> None:
    _, world, saved = drive([step("a", 10, wanted=2), step("b", 5), step("last", 0)], 60, tmp_path)
    assert world.given == {"a": 10, "b": 13, "last": 57}
    assert saved == [1, 2, 3]


def test_a_step_that_is_late_takes_no_time_from_the_others(tmp_path: Path) -> None:
    outcomes, world, _ = drive([step("a", 10, wanted=99), step("b", 5), step("last", 0)], 60, tmp_path)
    assert world.given == {"a": 10, "b": 5, "last": 49}
    assert [(o.state, o.seconds, o.green) for o in outcomes[:2]] == [
        ("out of time", 10, False),
        ("ok", 1, True),
    ]


def test_no_step_begins_after_the_end(tmp_path: Path) -> None:
    outcomes, world, saved = drive([step("a", 10, wanted=99), step("b", 5), step("last", 0)], 10, tmp_path)
    assert world.given == {"a": 10}
    assert [o.line for o in outcomes[1:]] == ["not begun: no time was left"] * 2
    assert saved[-1] == 3


def test_failures_are_collected_and_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    todo = [
        step("breaks", 5, status=1, text="first\nRuntimeError: no\n\n"),
        step("absent", 5, status=SKIPPED, text="there is none\n"),
        step("works", 5, text=""),
    ]
    outcomes, _, _ = drive(todo, 60, tmp_path)
    assert [(o.state, o.green) for o in outcomes] == [
        ("failed (1)", False),
        ("skipped", True),
        ("ok", True),
    ]
    assert [o.line for o in outcomes] == ["RuntimeError: no", "there is none", "it printed nothing"]
    assert outcomes[0].cells() == ("breaks", "RED failed (1)", "1.0", "RuntimeError: no")
    printed = capsys.readouterr().out
    assert "[2/3] absent" in printed
    assert "    first\n" in printed, "what a failed step said"
    log = (tmp_path / "log").read_text()
    assert "==== breaks: failed (1)\nfirst" in log
    assert "==== works: ok" in log


def test_a_step_gets_its_time_environment_and_file(tmp_path: Path) -> None:
    def command(seconds: float, result: Path) -> Sequence[str]:
        code = "import json, os, sys; json.dump([os.environ['WORD'], sys.argv[1]], open(sys.argv[2], 'w'))"
        return sys.executable, "-c", code, f"{seconds:.0f}", str(result)

    (outcome,) = run([Step("one", command, 0, {"WORD": "said"})], 30, tmp_path / "log", lambda known: None)
    assert outcome.result == ["said", "30"]


def test_a_process_that_does_not_end_is_ended_with_its_own(tmp_path: Path) -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
print(child.pid, flush=True)
time.sleep(99)
"""
    status, text = start((sys.executable, "-c", code), {}, 3)
    assert status == LATE
    stat = Path(f"/proc/{int(text)}/stat")
    for _ in range(200):  # a signal takes a turn of the scheduler
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child of the ended process still runs")


def test_the_report_has_a_line_for_every_result() -> None:
    outcomes = [
        Outcome("graphs", "ok", 1.0, "", [{"cell": "lstm"}]),
        Outcome("benchmark", "ok", 2.0, "", {"date": "other", "results": [1], "goals": []}),
    ]
    found = report({"date": "mine"}, outcomes)
    assert found["date"] == "mine"
    assert found["results"] == [1]
    assert [s["name"] for s in found["steps"]] == ["graphs", "benchmark"]
    assert found["steps"][0]["result"] == [{"cell": "lstm"}]
    assert "result" not in found["steps"][1]
    assert "results" not in report({}, [Outcome("benchmark", "out of time", 1.0, "")])


def exchange(mechanism: str, blocks: int, size: int, ns: float | None, cluster: int = 1) -> dict[str, Any]:
    row = {"mechanism": mechanism, "blocks": blocks, "cluster": cluster, "bytes": size, "wrong": 0}
    return row if ns is None else {**row, "ns": {"p50": ns}}


EXCHANGES = [
    exchange("block", 1, 0, 20),
    exchange("counter", 8, 4096, 500),
    exchange("counter", 132, 4096, 900),
    exchange("counter", 132, 32768, 1000),
    exchange("counter", 132, 0, 700),
    exchange("push", 16, 4096, None, 16),
    exchange("push", 8, 4096, 300, 8),
]


@pytest.mark.parametrize(
    ("schedule", "size", "ns"),
    [
        ("cta", 128, 20),
        ("resident", 9999, 20),
        ("grid", 4096, 900),
        ("persistent", 4097, 1000),
        ("grid", 1 << 20, 1000),
        ("cluster", 64, 300),
        ("stepped", 64, None),
    ],
)
def test_the_floor_is_the_exchange_that_a_schedule_waits_for(
    schedule: str, size: int, ns: float | None
) -> None:
    found = floors.floor(schedule, size, EXCHANGES)
    assert found == (None if ns is None else pytest.approx(ns * 1e-9))


def test_steps_are_held_against_their_floor(capsys: pytest.CaptureFixture[str]) -> None:
    case = asdict(Case("lstm", 512, 4, 64, "training", "dense", "bf16"))
    shared = {**case, "group": "named", "parity": {"ok": True}, "ratio": 2.0, "graph_ratio": None}
    slow = {**shared, "backend": "native", "schedule": "grid", "step_seconds": 7.2e-6}
    plain = {**shared, "backend": "triton", "schedule": "stepped", "step_seconds": 1e-5}
    outcomes = [
        Outcome("latency", "ok", 1.0, "", {"results": EXCHANGES}),
        Outcome("native benchmark", "ok", 1.0, "", {"results": [slow]}),
        Outcome("benchmark", "ok", 2.0, "", {"results": [plain]}),
    ]
    found = report({}, outcomes)
    (native,) = found["steps"][1]["result"]["results"]
    assert native["floor_seconds"] == pytest.approx(1.8e-6)
    assert native["of_floor"] == pytest.approx(0.25)
    assert found["results"][0]["of_floor"] is None
    show(found, outcomes)
    printed = capsys.readouterr().out
    assert "25%" in printed
    assert "grid" in printed


def test_every_check_is_a_step() -> None:
    assert set(checks.CHECKS) <= {step.name for step in steps("cuda", quick=False)}


# ---- the steps ---------------------------------------------------------------------------------


def test_the_steps_leave_time_to_measure() -> None:
    full, quick = steps("cuda", quick=False), steps("cuda", quick=True)
    assert full[-1].name == quick[-1].name == "benchmark"
    assert {s.name for s in quick} < {s.name for s in full}
    assert sum(s.seconds for s in full) <= 480 - 100
    assert sum(s.seconds for s in quick) <= 120 - 20


def test_the_tests_that_run_are_those_of_gpu_kernels(tmp_path: Path) -> None:
    def command(device: str = "cuda") -> Sequence[str]:
        (found,) = (s for s in steps(device, quick=False, tests=tmp_path) if s.name == "tests")
        return found.command(9, tmp_path)

    assert f"SystemExit({SKIPPED})" in command()[-1]
    for name in ("test_triton_layer.py", "test_native_cuda.py", "test_cuda_fibers.py", "test_other.py"):
        (tmp_path / name).touch()
    assert [Path(a).name for a in command() if a.endswith(".py")] == [
        "test_native_cuda.py",
        "test_triton_layer.py",
    ]


def test_the_sanitizer_runs_parity_or_says_that_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command() -> Sequence[str]:
        (found,) = (s for s in steps("cuda", quick=False) if s.name == "racecheck")
        assert found.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        return found.command(9, tmp_path)

    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    assert "compute-sanitizer is neither on PATH" in command()[-1]
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/opt/{name}")
    assert command()[:3] == ("/opt/compute-sanitizer", "--tool", "racecheck")
    assert "parity" in command()


@pytest.mark.slow
def test_every_step_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the build, which compiles for a minute: it has a test of its own."""
    names = [s.name for s in steps("cpu", quick=False) if s.name != "build"]
    arguments = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--minutes", "9"]
    # a doctor without native kernels is not content
    expected = 0 if native.unavailable() is None else 1
    assert main([*arguments, "--only", *names]) == expected, capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    assert file.name.startswith("cpu-")
    assert found["versions"]["torch"] == torch.__version__
    assert found["commit"]
    states = {s["name"]: s["state"] for s in found["steps"]}
    assert list(states) == names
    assert {states.pop(name) for name in ("memcheck", "racecheck", "latency", ATTENTION)} == {"skipped"}
    del states["tests"], states["doctor"]
    assert set(states.values()) == {"ok"}
    assert all(result["parity"]["ok"] for result in found["results"])
    assert found["goals"]
    printed = capsys.readouterr().out
    assert "torchrl" in printed
    assert printed.splitlines()[-1].startswith("benchmark")
    assert "==== parity: ok" in file.with_suffix(".log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "--device cpu runs every step" in capsys.readouterr().err


# ---- the build ---------------------------------------------------------------------------------


def test_what_a_build_lacks_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.missing(("no_such_module",)) == "no_such_module is not installed: pip install no_such_module"
    assert build.missing(("json.nothing",)) == "json is too old, it lacks json.nothing: pip install -U json"
    monkeypatch.setattr(build, "missing", lambda: "pybind11 is not installed")
    assert build.main() == 1
    assert capsys.readouterr().out == "pybind11 is not installed\n"


def test_a_build_needs_nothing_of_pyproject(tmp_path: Path) -> None:
    """Without a compiler, so that it is over at once and leaves the built extension alone."""
    if build.missing():
        pytest.skip(build.missing())
    code = (
        "import pathlib, sys; from benchmarks.gpu import build; exit(build.build(pathlib.Path(sys.argv[1])))"
    )
    env = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no working C++17 compiler" in done.stderr
    assert "pyproject.toml" not in build.NEEDED


# ---- the checks --------------------------------------------------------------------------------

ONE = ["--device", "cpu", "--tiny", "--cell", "gru", "--backend", "reference"]


class Graphs(Cpu):
    """The CPU, as a device with graphs and streams; its replays do what `replay` makes of a call."""

    graphs = True

    def capture(self, call: Call) -> Call:
        call()
        return self.replay(call)

    def replay(self, call: Call) -> Call:
        return call

    def side_stream(self) -> Any:
        return torch.enable_grad()


class Stale(Graphs):
    def replay(self, call: Call) -> Call:
        return lambda: None


@pytest.mark.parametrize("name", checks.CHECKS)
def test_a_check_holds(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DEVICES, "cpu", Graphs)
    file = tmp_path / "rows.json"
    assert checks.main([name, *ONE, "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == [
        {"backend": "reference", "cell": "gru", "dtype": "fp32", "wrong": ""}
    ]


def test_a_replay_that_trains_nothing_is_red(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DEVICES, "cpu", Stale)
    assert checks.main(["graphs", *ONE]) == 1
    printed = capsys.readouterr().out
    assert "reference gru fp32: RED weight_ih_l0: error" in printed
    assert printed.endswith("graphs: 1 checked, 1 red reference gru fp32\n")


def test_a_wrong_result_of_many_steps_is_red(red: None) -> None:
    assert checks.main(["long", *ONE]) == 1


@pytest.mark.parametrize("name", ["determinism", "streams"])
def test_a_bit_that_differs_is_red(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = select.kernels("reference", "layer")
    layer, runs = reference.layer, iter(range(99))

    def drifting(*arguments: Any) -> Any:
        output, last = layer(*arguments)
        return output * (1 + torch.finfo(output.dtype).eps * next(runs)), last

    monkeypatch.setattr(reference, "layer", drifting)
    assert checks.main([name, *ONE]) == 1
    assert "output" in capsys.readouterr().out


def test_a_check_that_raises_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits(device: Any, cell: str, dtype: str, sizes: Any) -> str:
        if cell == "gru":
            raise RuntimeError("called a synchronizing CUDA operation")
        return ""

    monkeypatch.setitem(checks.CHECKS, "sync", waits)
    arguments = ["sync", "--device", "cpu", "--backend", "reference", "--cell", "gru", "lstm"]
    assert checks.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "reference gru fp32: RED run: RuntimeError: called a synchronizing CUDA operation" in printed
    assert "reference lstm fp32: ok" in printed


def test_waiting_is_an_error_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    device = Cpu()
    device.name = "cuda"
    with pytest.raises(ZeroDivisionError), checks._no_waiting(device):
        _ = 1 / 0
    assert modes == ["error", "default"]


def test_what_no_backend_can_run_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(select.kernels("reference", "layer"), "unsupported", lambda *_: "has no GRU")
    assert checks.main(["sync", *ONE]) == SKIPPED
    assert "reference gru fp32: not checked: has no GRU" in capsys.readouterr().out
