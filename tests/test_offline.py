"""The offline compiler fires on planted kernels, which this file also offers to it as instances."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.offline.ptx import unguarded_releases  # noqa: E402

ROOT = Path(__file__).parents[1]

# ---- planted kernels ---------------------------------------------------------------------------


@triton.jit
def double(x):
    return 2 * x


@triton.jit
def map_kernel(x_ptr, y_ptr, n, SHIFTS: tl.constexpr, MAP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, MAP[0](tl.load(x_ptr + i, mask=i < n, other=0.0)) + SHIFTS[1])


@triton.jit
def centre_kernel(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x - tl.sum(tl.sum(x, 1), 0))


@triton.jit
def product_kernel(a_ptr, b_ptr, y_ptr, steps, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    y = tl.zeros((M, M), tl.float32)
    for t in range(steps):
        a = tl.load(a_ptr + t * M * K + m[:, None] * K + k[None, :])
        b = tl.load(b_ptr + t * M * K + k[:, None] * M + m[None, :])
        y = tl.dot(a, b, y, input_precision="ieee")
    tl.store(y_ptr + m[:, None] * M + m[None, :], y)


@triton.jit
def release_kernel(y_ptr, flag_ptr, BARRIER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, i)
    if BARRIER:
        tl.debug_barrier()
    # not tl.atomic_add, before which Triton 3.9 puts a barrier of its own
    tl.inline_asm_elementwise(
        "{ red.global.gpu.release.add.u32 [$1], 1; mov.u32 $0, 0; }",
        "=r,l",
        [flag_ptr.to(tl.uint64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


class Planted(NamedTuple):
    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    cooperative: bool = False
    matrix: bool = False


def instances() -> Iterator[Planted]:
    def types(kernel: Any, pointer: str, constants: dict[str, object], **others: str) -> dict[str, str]:
        return {n: "constexpr" if n in constants else others.get(n, pointer) for n in kernel.arg_names}

    def planted(name: str, kernel: Any, pointer: str, constants: dict[str, object], **fields: Any) -> Planted:
        others = {"n": "i32:16", "steps": "i32", "flag_ptr": "*i32"}
        return Planted(name, kernel, types(kernel, pointer, constants, **others), constants, **fields)

    yield planted("good map", map_kernel, "*fp32", {"SHIFTS": (1, 2), "MAP": (double,), "N": 128})
    yield planted("good product", product_kernel, "*bf16", {"M": 64, "K": 64}, matrix=True)
    yield planted("good release", release_kernel, "*i32", {"BARRIER": True, "N": 512}, cooperative=True)
    yield planted("spill", centre_kernel, "*fp32", {"M": 64, "N": 256}, num_warps=1)
    yield planted("shared", product_kernel, "*bf16", {"M": 128, "K": 64}, num_stages=8, matrix=True)
    yield planted("fma", product_kernel, "*fp32", {"M": 16, "K": 16}, matrix=True)
    yield planted("release", release_kernel, "*i32", {"BARRIER": False, "N": 512})
    yield planted("broken", map_kernel, "*fp32", {"SHIFTS": (1, 2), "MAP": (double,), "N": 100})


# ---- the gates ---------------------------------------------------------------------------------


def offline(*args: str) -> tuple[int, str]:
    """The command's status and output, asked to compile what is planted here for sm_90."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-m", "benchmarks.offline", "--instances", Path(__file__).stem, "--arch", "90"]
    done = subprocess.run([*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offline") / "table.json"


@pytest.fixture(scope="module")
def written(table: Path) -> tuple[int, str]:
    return offline("--write", "--table", str(table))


@pytest.mark.parametrize(
    "message",
    [
        "spill sm_90: spills: ",
        "spill sm_90: uses a stack: ",
        "shared sm_90: needs 262144 bytes of shared memory, sm_90 has 232448",
        "fma sm_90: has no matrix instruction, its products are ",
        "release sm_90: releases without a barrier before it: line ",
        "broken sm_90: does not compile: CompilationError: arange's range must be a power of 2",
    ],
)
def test_a_gate_fires(written, message):
    status, output = written
    assert status == 1
    assert sum(line.startswith(message) for line in output.splitlines()) == 1, output


def test_good_kernels_pass_and_are_in_the_table(written, table):
    assert "good" not in written[1].replace("(good", ""), written[1]
    rows = json.loads(table.read_text())
    assert set(rows) == {f"{planted.name} sm_90" for planted in instances()} - {"broken sm_90"}
    product = rows["good product sm_90"]
    assert product["spill"] == product["stack"] == product["LDL"] == product["STL"] == 0
    assert product["registers"] > 0
    assert product["shared"] > 0
    assert product["matrix"]["HGMMA"] > 0
    assert rows["fma sm_90"]["FFMA"] >= 16 * 16 * 16 / 128


def test_the_table_is_compared(written, table, tmp_path):
    rows = json.loads(table.read_text())
    rows["good gone sm_90"] = rows["good gone sm_80"] = rows["bad sm_90"] = rows["good map sm_90"]
    del rows["good map sm_90"]
    rows["good product sm_90"]["registers"] += 9
    rows["good release sm_90"]["registers"] += 8
    changed = tmp_path / "table.json"
    changed.write_text(json.dumps(rows))
    status, output = offline("--only", "^good", "--table", str(changed))
    *problems, _ = output.splitlines()
    registers = rows["good product sm_90"]["registers"]
    assert status == 1
    assert problems == [
        "good gone sm_90: in the table, but no kernel any more",
        "good map sm_90: not in the table",
        f"good product sm_90: {registers - 9} registers, the table has {registers}",
    ]


def test_what_agrees_passes(written, table):
    status, output = offline("--only", "^good", "--table", str(table))
    assert status == 0, output
    assert output.endswith("; 0 problems\n")


# ---- the lint ----------------------------------------------------------------------------------

STORE, BARRIER = "st.global.v4.b32 [ %rd3 + 0 ], { %r1, %r2, %r3, %r4 };", "bar.sync 0;"
RELEASE = "@%p1 atom.global.gpu.release.add.u32 %r5, [ %rd4 + 0 ], %r6;"
POLL = "@%p1 ld.global.gpu.acquire.b32 %r7, [ %rd4 + 0 ];"


@pytest.mark.parametrize(
    ("lines", "bad"),
    [
        ([RELEASE], []),
        ([STORE, BARRIER, RELEASE], []),
        ([STORE, RELEASE], [2]),
        ([STORE, "@%p1 bar.sync 0;", RELEASE], [3]),
        ([STORE, BARRIER, STORE, "red.release.gpu.global.add.u32 [%rd4], 1;"], [4]),
        ([STORE, "{ red.release.gpu.global.add.u32 [%rd4], 1; mov.u32 %r5, 0; }"], [2]),
        (["ld.global.b32 %r1, [%rd3];", "st.release.gpu.global.b32 [%rd4], %r6;"], [2]),
        (["cp.async.cg.shared.global [ %r1 + 0 ], [ %rd3 + 0 ], 16;", RELEASE], [2]),
        (["st.shared.b32 [%r1], %r2;", "atom.global.gpu.relaxed.add.u32 %r5, [%rd4], 1;"], []),
        # a loop: the store of one turn reaches the release of the next
        (["$L__BB0_1:", BARRIER, RELEASE, STORE, "@%p2 bra $L__BB0_1;", "ret;"], []),
        (["$L__BB0_1: // a loop", RELEASE, STORE, "@%p2 bra \t$L__BB0_1;", "ret;"], [2]),
        (["$L__BB0_1:", STORE, BARRIER, RELEASE, "$L__BB0_2:", POLL, BARRIER, "@%p2 bra $L__BB0_2;", STORE,
          "@%p3 bra $L__BB0_1;"], []),
        # a branch around the barrier, and one around the store
        ([STORE, "@%p2 bra $L__BB0_1;", BARRIER, "$L__BB0_1:", RELEASE], [5]),
        ([BARRIER, "bra.uni $L__BB0_1;", STORE, "$L__BB0_1:", RELEASE], []),
    ],
)  # fmt: skip
def test_the_lint_follows_every_path(lines, bad):
    found = unguarded_releases("\n".join(lines))
    assert [int(text.split(":")[0].removeprefix("line ")) for text in found] == bad
