"""`python -m benchmarks.ptxas` on what its tools once printed: needs neither nvcc nor them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

if not (Path(__file__).parents[1] / "benchmarks").exists():
    pytest.skip("needs the source tree", allow_module_level=True)

from benchmarks import ptxas
from benchmarks.offline import sass
from benchmarks.offline.sass import Row
from benchmarks.ptxas import Compiled, Kernel, entries, judge, short

# ---- what the tools print ------------------------------------------------------------------------

A = "_ZN8fusedrnn4cuda19scan_forward_kernelI4LstmEEvPKf"
B = "_ZN8fusedrnn4cuda12other_kernelEi"
USAGE = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {A}:
  REG:255 STACK:16 SHARED:1040 LOCAL:0 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {B}:
  REG:30 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:392 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
LISTING = f"""
\t.target\tsm_90a

//--------------------- .text.{A} --------------------------
\t.section\t.text.{A},"ax",@progbits
\t.align\t128
.text.{A}:
        .type           {A},@function
{A}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   HMMA.16816.F32.BF16 R20, R4, R10, R20 ;
        /*0020*/              @!P0 STL.64 [R1+0x8], R2 ;
        /*0030*/                   LDL R3, [R1+0x8] ;
        /*0040*/              @UP1 MUFU.EX2 R0, R0 ;
        /*0050*/                   HMMA.16816.F32.BF16 R24, R4, R12, R24 ;

//--------------------- .text.{B} --------------------------
\t.section\t.text.{B},"ax",@progbits
.text.{B}:
        /*0000*/                   FFMA R0, R1, R2, R3 ;
        /*0010*/                   EXIT ;
"""


def test_every_kernel_of_a_listing_is_read() -> None:
    found = sass.rows(USAGE, LISTING)
    assert found[A] == Row(255, 16, 12, 1040, {"HMMA": 2}, LDL=1, STL=1, MUFU=1, FFMA=0)
    assert found[B] == Row(30, 0, 0, 0, {}, LDL=0, STL=0, MUFU=0, FFMA=1)


def test_output_of_another_form_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no kernel in the usage"):
        sass.rows("nothing\n", LISTING)
    with pytest.raises(RuntimeError, match=f"no instruction of {B}"):
        sass.rows(USAGE, LISTING.replace(f".text.{B}:", "gone:"))


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void fusedrnn::cuda::scan_kernel<fusedrnn::Lstm, fusedrnn::cuda::Matrix<fusedrnn::cuda::Bf16> >"
         "(FusedrnnForward, fusedrnn::cuda::Tile)", "scan_kernel<Lstm, Matrix<Bf16> >"),
        ("void fusedrnn::cuda::(anonymous namespace)::exchange_kernel<(fusedrnn::cuda::Mechanism)5>"
         "(fusedrnn::cuda::(anonymous namespace)::Exchange)", "exchange_kernel<(Mechanism)5>"),
        ("fusedrnn::other_kernel(int)", "other_kernel"),
        ("plain", "plain"),
    ],
)  # fmt: skip
def test_names_are_short(demangled: str, name: str) -> None:
    assert short(demangled) == name


def test_ptx_is_split_by_kernel() -> None:
    release = "st.global.u32 [%rd1], 1;\nred.release.gpu.global.add.u32 [%rd2], 1;\nret;\n}\n"
    ptx = f".version 9.0\n.visible .entry {A}(\n.param .u64 p\n)\n{{\nret;\n}}\n.entry {B}(\n)\n{{\n{release}"
    found = entries(ptx)
    assert list(found) == [A, B]
    assert ptxas.unguarded_releases(found[A]) == []
    assert len(ptxas.unguarded_releases(found[B])) == 1


# ---- what is judged ------------------------------------------------------------------------------

GOOD = Row(128, 0, 0, 1024, {"HMMA": 4}, LDL=0, STL=0, MUFU=0, FFMA=0)


def made(warnings: tuple[str, ...] = (), **kernels: Row) -> Compiled:
    return Compiled({name: Kernel(row, []) for name, row in kernels.items()}, list(warnings))


def test_a_kernel_that_spills_is_a_problem() -> None:
    rows, problems = judge({("a.cu", 90): made(k=GOOD._replace(spill=8, LDL=1, STL=1, stack=8))}, "")
    assert list(rows) == ["k sm_90"]
    assert problems == [
        "k sm_90: spills: 1 LDL and 1 STL move 8 bytes a thread",
        "k sm_90: uses a stack: 8 bytes a thread",
    ]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("k<Lstm, Matrix<Bf16>, Cta>", True), ("k<Gru, Tf32>", True), ("k<Gru, Strict>", False)],
)
def test_products_that_should_be_matrix_instructions_are_known_by_name(name: str, wanted: bool) -> None:
    row = GOOD._replace(matrix={}, FFMA=99)
    _, problems = judge({("a.cu", 80): made(**{name: row})}, "")
    assert problems == [f"{name} sm_80: has no matrix instruction, its products are 99 FFMA"] * wanted


def test_what_needs_clusters_is_empty_before_sm_90() -> None:
    kernels = made(**{"k<Matrix<Bf16>, Cluster>": GOOD._replace(matrix={})})
    assert judge({("a.cu", 80): kernels}, "")[1] == []
    assert len(judge({("a.cu", 90): kernels}, "")[1]) == 1


def test_warnings_and_shared_names_are_problems() -> None:
    warned = made(("ptxas warning : setmaxnreg ignored",), k=GOOD)
    _, problems = judge({("a.cu", 90): warned, ("b.cu", 90): made(k=GOOD)}, "")
    assert problems == [
        "a.cu sm_90: ptxas warning : setmaxnreg ignored",
        "k sm_90: two kernels have this name, one of them in b.cu",
    ]


def test_a_release_that_no_barrier_orders_is_a_problem() -> None:
    _, problems = judge({("a.cu", 90): Compiled({"k": Kernel(GOOD, ["line 2: red.release"])}, [])}, "")
    assert problems == ["k sm_90: releases without a barrier before it: line 2: red.release"]


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """An nvcc that knows no sm_100 and makes of every source what this says."""
    makes: dict[str, Any] = {"a.cu": made(k=GOOD), "b.cu": made()}
    nvcc = SimpleNamespace(path="nvcc", version="release 12.4, V12.4", architectures=("80", "90a"))
    built = {"find_nvcc": lambda: nvcc, "CUDA_SOURCES": list(makes), "NVCC_FLAGS": ["-O3"]}

    def compile_for(command: list[str], source: str, arch: str, tools: Path) -> Compiled:
        assert command == ["nvcc", "-O3"]
        assert arch in nvcc.architectures
        if isinstance(makes[source], Exception):
            raise makes[source]
        return makes[source]

    monkeypatch.setattr(ptxas, "setup_py", lambda: built)
    monkeypatch.setattr(ptxas, "tools", lambda nvcc: tmp_path)
    monkeypatch.setattr(ptxas, "compile_for", compile_for)
    return makes


def test_what_is_written_agrees_until_it_changes(
    compiler: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    arguments = ["--table", str(table)]
    assert ptxas.main([*arguments, "--write"]) == 0
    assert set(json.loads(table.read_text())) == {"k sm_80", "k sm_90"}
    assert ptxas.main(arguments) == 0
    compiler["a.cu"] = made(k=GOOD._replace(registers=137))
    compiler["b.cu"] = made(new=GOOD)
    capsys.readouterr()
    assert ptxas.main([*arguments, "--arch", "90"]) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert problems == ["k sm_90: 137 registers, the table has 128", "new sm_90: not in the table"]
    assert last.startswith("nvcc 12.4: 2 kernels from 2 compilations in ")
    assert last.endswith("; 2 problems")
    compiler["a.cu"] = made()
    assert ptxas.main([*arguments, "--only", "^k"]) == 1
    assert "k sm_80: in the table, but no kernel any more" in capsys.readouterr().out


def test_a_source_that_does_not_compile_is_a_problem(
    compiler: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler["b.cu"] = RuntimeError("b.cu(3): error: expected a ;")
    assert ptxas.main(["--table", str(tmp_path / "none.json"), "--arch", "80"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "b.cu sm_80: b.cu(3): error: expected a ;"
    assert "not compared: there is no none.json" in last


def test_without_nvcc_it_says_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    folders = os.environ["PATH"].split(os.pathsep)
    without = [each for each in folders if shutil.which("nvcc", path=each) is None]
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    assert ptxas.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "CUDA kernels: not compiled, no nvcc in CUDA_HOME, /usr/local/cuda or PATH"
