"""`python -m fusedrnn bench --memory` and `--loaded`, which start processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fusedrnn
from fusedrnn.__main__ import main
from fusedrnn.bench import loaded, memory
from fusedrnn.bench.cases import Case

ROOT = Path(fusedrnn.__file__).parents[1]

# ---- memory ------------------------------------------------------------------------------------

needs_proc = pytest.mark.skipif(memory.missing() is not None, reason="no /proc/self/clear_refs here")


@needs_proc
def test_the_peak_holds_at_least_what_is_returned() -> None:
    case = Case("lstm", 128, 16, 128, "training", "dense")
    (record,) = memory.run(lambda label: None, [case])
    # the output, the gradients of the input and the weights
    least = 4 * (2 * 128 * 16 * 128 + 4 * 128 * (128 + 128 + 2))
    assert least <= min(record["bytes"].values()) < max(record["bytes"].values()) < 50 * least
    assert record["ratio"] == record["bytes"]["torch"] / record["bytes"]["fused"]
    assert memory.cells(record)[0] == case.label


@needs_proc
def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no attribute 'SRU'"):
        memory.measure(Case("sru", 8, 1, 4, "training", "dense"))


def test_memory_is_refused_where_it_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "missing", lambda: "--memory: not here")
    with pytest.raises(SystemExit):
        main(["bench", "--memory"])
    assert "--memory: not here" in capsys.readouterr().err


# ---- loaded ------------------------------------------------------------------------------------


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only waits to be collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def children(pid: int) -> set[int]:
    return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


@needs_proc
def test_burning_processes_end_with_the_block() -> None:
    before = children(os.getpid())
    with loaded.burning(2):
        burning = children(os.getpid()) - before
        assert len(burning) == 2
        assert not any(map(ended, burning))
    assert all(map(ended, burning))


@needs_proc
def test_burning_processes_end_with_a_parent_that_is_killed() -> None:
    code = "import time; from fusedrnn.bench.loaded import burning\n"
    code += "with burning(1): print(flush=True); time.sleep(99)"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        burning = children(parent.pid)
        parent.kill()
    assert len(burning) == 1
    end = time.monotonic() + 30
    while not all(map(ended, burning)) and time.monotonic() < end:
        time.sleep(0.05)
    assert all(map(ended, burning))


def test_the_fair_share() -> None:
    assert loaded.fair(burning=2, threads=2, cores=2) == 2
    assert loaded.fair(burning=2, threads=1, cores=2) == 1.5
    assert loaded.fair(burning=1, threads=1, cores=4) == 1


def test_loaded_reports_slowdowns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaded, "CASES", (Case("gru", 8, 2, 3, "inference", "dense"),))
    monkeypatch.setattr(loaded, "_SAMPLE", 0.0)
    file = tmp_path / "out.json"
    assert main(["bench", "--loaded", "--seconds", "0", "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["loaded"]
    for side in ("torch", "fused"):
        times = record["loaded"][side]["p50"], record["alone"][side]["p50"]
        assert record["slowdown"][side] == pytest.approx(times[0] / times[1])
    assert record["met"] == (record["slowdown"]["fused"] <= record["limit"])
    assert "gru H8 B2 T3" in capsys.readouterr().out
