"""Compile every CUDA source as setup.py does, for GPUs that this machine does not have, and read the code.

Fails where a kernel spills, uses a stack, lost its matrix instructions or releases what no barrier ordered,
where nvcc warns, and where the table of registers no longer describes the kernels. Without nvcc it says so.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from fusedrnn.terminal import progress

from .offline import gates, sass
from .offline.ptx import unguarded_releases

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 100)
# The products of csrc/cuda/product.h that are matrix instructions.
MATRIX = re.compile(r"\b(Matrix<|Split\b|Tf32\b)")
# Needs clusters, which sm_90 brought: empty before.
CLUSTER, CLUSTERS_SINCE = re.compile(r"\bCluster\b"), 90
_NAMESPACES = re.compile(r"\(anonymous namespace\)::|\b\w+::")
_ENTRY = re.compile(r"^(?:\.visible |\.weak )*\.entry (\w+)\(", re.M)
_WARNING = re.compile(r"^(?!Remark).*\bwarning\b.*$", re.M)


Task = tuple[str, int]  # a source and a compute capability


class Kernel(NamedTuple):
    """What the machine code of a kernel needs, and the releases in its PTX that nothing orders."""

    row: sass.Row
    unguarded: list[str]


class Compiled(NamedTuple):
    """The kernels of a source by their short names, and nvcc's warnings."""

    kernels: dict[str, Kernel]
    warnings: list[str]


def short(demangled: str) -> str:
    """A kernel's name without namespaces, result and arguments; its template's arguments are kept."""
    name = _NAMESPACES.sub("", demangled).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def demangled(symbols: list[str]) -> list[str]:
    command = ["c++filt", *symbols]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def entries(ptx: str) -> dict[str, str]:
    """The PTX of every kernel by its symbol."""
    _, *parts = _ENTRY.split(ptx)
    return dict(zip(parts[::2], parts[1::2]))


def tools(nvcc: str) -> Path | None:
    """The folder of cuobjdump and nvdisasm: beside nvcc, on PATH, or Triton's own."""
    folders = [Path(nvcc).parent, *(Path(found).parent for found in [shutil.which("nvdisasm")] if found)]
    if triton := find_spec("triton"):
        folders += [
            Path(each) / "backends" / "nvidia" / "bin" for each in triton.submodule_search_locations or ()
        ]
    wanted = (sass.USAGE[0], sass.LISTING[0])
    return next((each for each in folders if all((each / name).exists() for name in wanted)), None)


def compile_for(command: list[str], source: str, arch: str, tools: Path) -> Compiled:
    """Compile one source for one architecture ("80", "90a", ...).

    Raises:
        RuntimeError: nvcc refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        target, cubin = f"-gencode=arch=compute_{arch},code=sm_{arch}", f"{folder}/made.cubin"
        keep = ("--keep", "--keep-dir", folder)
        done = subprocess.run(
            [*command, target, *keep, "-cubin", source, "-o", cubin], capture_output=True, text=True, cwd=ROOT
        )
        if done.returncode:
            raise RuntimeError((done.stderr + done.stdout).strip())
        (ptx,) = Path(folder).glob("*.ptx")
        code = entries(ptx.read_text())
        rows = sass.read(cubin, tools) if code else {}
    named = dict(zip(rows, map(short, demangled(list(rows))))) if rows else {}
    kernels = {named[symbol]: Kernel(row, unguarded_releases(code[symbol])) for symbol, row in rows.items()}
    # a header's is said of each of its instances
    return Compiled(kernels, sorted(set(_WARNING.findall(done.stderr + done.stdout))))


def judge(compiled: dict[Task, Compiled], only: str) -> tuple[dict[str, sass.Row], list[str]]:
    """The rows whose names contain the pattern, and what is wrong with any of the sources by itself."""
    rows: dict[str, sass.Row] = {}
    problems = []
    for (source, arch), (kernels, warnings) in compiled.items():
        problems += [f"{source} sm_{arch}: {text}" for text in warnings]
        for name, kernel in kernels.items():
            row = gates.key(name, arch)
            if not re.search(only, name):
                continue
            if row in rows:
                problems.append(f"{row}: two kernels have this name, one of them in {source}")
            rows[row] = kernel.row
            empty = arch < CLUSTERS_SINCE and CLUSTER.search(name)
            matrix = bool(MATRIX.search(name)) and not empty
            found = gates.broken(arch, kernel.row, kernel.unguarded, matrix)
            problems += [f"{row}: {text}" for text in found]
    return rows, problems


def setup_py() -> dict[str, Any]:
    """What setup.py defines: how it finds nvcc, and what it compiles with which flags."""
    with chdir(ROOT):  # it names its sources from there
        return runpy.run_path("setup.py")


def main(argv: list[str] | None = None) -> int:
    """0 if nothing is wrong or there is no nvcc, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.ptxas", description=__doc__)
    add = parser.add_argument
    add("--only", metavar="PATTERN", default="", help="a regular expression that kernels' names must contain")
    add(
        "--arch", type=int, choices=ARCHITECTURES, action="append", help="compute capability; may be repeated"
    )
    add("--jobs", type=int, default=2, help="compilers at once (default: 2)")
    add("--write", action="store_true", help="write the table instead of comparing with it")
    add("--table", type=Path, help="default: the one of this version of nvcc in benchmarks/offline")
    options = parser.parse_args(argv)

    built = setup_py()
    nvcc = built["find_nvcc"]()
    if isinstance(nvcc, str):
        print(f"CUDA kernels: not compiled, {nvcc}")
        return 0
    folder = tools(nvcc.path)
    if folder is None:
        parser.error("needs cuobjdump and nvdisasm: beside nvcc, on PATH, or those that Triton brings")
    release = re.findall(r"release (\d+\.\d+)", nvcc.version)[0]
    path = options.table or ROOT / "benchmarks" / "offline" / f"table-nvcc-{release}.json"
    known = {int(name.rstrip("a")): name for name in nvcc.architectures}
    architectures = tuple(arch for arch in options.arch or ARCHITECTURES if arch in known)
    tasks = [(source, arch) for source in built["CUDA_SOURCES"] for arch in architectures]
    command = [nvcc.path, *built["NVCC_FLAGS"]]

    began, cpu = time.perf_counter(), _cpu_seconds()
    compiled: dict[Task, Compiled] = {}
    problems: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool, progress(len(tasks)) as step:
        futures = {pool.submit(compile_for, command, task[0], known[task[1]], folder): task for task in tasks}
        for future in as_completed(futures):
            source, arch = task = futures[future]
            step(f"{source} sm_{arch}")
            try:
                compiled[task] = future.result()
            except RuntimeError as error:
                problems.append(f"{source} sm_{arch}: {error}")

    rows, found = judge(compiled, options.only)
    table = gates.read(path)
    # a source that was not compiled says so itself
    here = (
        {}
        if problems
        else {row: table[row] for row in table if gates.selected(row, options.only, architectures)}
    )
    problems += found
    if options.write:
        gates.write(path, {row: table[row] for row in table if row not in here} | rows)
    elif path.exists():
        problems += gates.moved(rows, here)
    for problem in sorted(problems):
        print(problem)
    compared = "" if path.exists() else f", not compared: there is no {path.name}"
    print(
        f"nvcc {release}: {len(rows)} kernels from {len(tasks)} compilations{compared} in "
        f"{time.perf_counter() - began:.0f} s by {options.jobs} at once, {_cpu_seconds() - cpu:.0f} CPU s; "
        f"{len(problems)} problems"
    )
    return bool(problems)


def _cpu_seconds() -> float:
    return sum(os.times()[2:4])  # of processes that ended


if __name__ == "__main__":
    sys.exit(main())
