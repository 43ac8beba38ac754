"""`python -m benchmarks.sync_latency`, with a GPU that this file plays."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import sync_latency
from benchmarks.gpu.driver import ROOT, SKIPPED
from benchmarks.sync_latency import MECHANISMS, Case, Sample, cases, cells, measure, rows


class Gpu:
    """Launches take 5 us and 1 us a round of 1980 cycles; so many blocks run at once, of a cluster none."""

    def __init__(self, blocks: int = 132, wrong: int = 0) -> None:
        self.blocks, self.wrong = blocks, wrong
        self.launched: list[Case] = []

    def capacity(self, mechanism: int, threads: int, cluster: int, size: int) -> int:
        return self.blocks if cluster == 1 else 0

    def launch(self, case: Case, rounds: int) -> Sample:
        self.launched.append(case)
        return Sample(5e-6 + rounds * 1e-6, rounds * 1980, self.wrong)

    def rows(self, *todo: Case) -> list[dict[str, object]]:
        return rows(todo, 3, self.capacity, self.launch)


def test_the_order_is_that_of_the_header() -> None:
    text = (ROOT / "csrc" / "cuda" / "sync_latency.h").read_text()
    (body,) = re.findall(r"enum Mechanism \{(.*?)\}", text, re.S)
    assert [name.lower() for name in re.findall(r"^  k(\w+),", body, re.M)] == [*MECHANISMS, "mechanisms"]


@pytest.mark.parametrize("processors", [64, 108, 132, 148])
def test_every_case_is_one_that_the_kernel_takes(processors: int) -> None:
    found = cases(processors)
    assert {case.mechanism for case in found} == set(MECHANISMS)
    for case in found:
        assert case.bytes % 16 == 0
        assert case.bytes == 0 or case.bytes // 16 >= case.blocks, "every block has a share"
        assert case.bytes or case.mechanism not in ("flags", "push")
        assert (case.cluster > 1) == (case.mechanism in ("cluster", "push"))
        assert case.blocks % case.cluster == 0


def test_what_a_launch_costs_is_no_part_of_a_round() -> None:
    case = Case("counter", 132, bytes=4096)
    found = measure([case], 5, Gpu().launch)[case]
    assert found["wrong"] == 0
    assert found["ns"] == {"p20": 1000.0, "p50": 1000.0, "p80": 1000.0}
    assert found["cycles"]["p50"] == 1980.0


def test_what_does_not_fit_is_not_launched() -> None:
    gpu = Gpu(blocks=64)
    fits, large, cluster = gpu.rows(Case("grid", 64), Case("grid", 132), Case("cluster", 16, cluster=16))
    assert {case.blocks for case in gpu.launched} == {64}
    assert "ns" in fits
    assert cells(large)[5] == "not run: 64 blocks run at once"
    assert cells(cluster)[5] == "not run: 0 blocks run at once"


def test_no_number_of_blocks_means_all_that_fit() -> None:
    (row,) = Gpu(blocks=120).rows(Case("grid", 0))
    assert row["blocks"] == 120
    assert cells(row)[:2] == ("grid", "120")


def test_stale_data_is_red() -> None:
    (row,) = Gpu(wrong=2).rows(Case("flags", 8, bytes=4096))
    assert cells(row)[5] == "RED: 16 threads read what was not written"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sync_latency.main([])
    assert stop.value.code == 2
    assert "times a GPU, but torch" in capsys.readouterr().err


def test_without_cuda_code_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sync_latency, "no_gpu", lambda: None)
    monkeypatch.setattr(sync_latency.native, "unavailable", lambda: None)
    built = SimpleNamespace(cuda=SimpleNamespace(missing="no nvcc"))
    monkeypatch.setattr(sync_latency, "kernels", lambda: built)
    assert sync_latency.main([]) == SKIPPED
    assert capsys.readouterr().out == "no CUDA code in fusedrnn._C: no nvcc\n"
