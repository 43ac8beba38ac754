"""Compile every Triton kernel that the backend can pick, for GPUs that this machine does not have.

Fails where one spills, uses a stack, needs more shared memory than there is, lost its matrix instructions
or releases what no barrier ordered, and where the table of registers no longer describes the kernels.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from fusedrnn.terminal import progress

if TYPE_CHECKING:
    from .compiling import Compiled

ARCHITECTURES = (80, 90, 100)
_HERE = Path(__file__).parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.offline", description=__doc__)
    add = parser.add_argument
    add("--only", metavar="PATTERN", default="", help="a regular expression that names must contain")
    add(
        "--arch", type=int, choices=ARCHITECTURES, action="append", help="compute capability; may be repeated"
    )
    add("--jobs", type=int, default=2, help="processes (default: 2)")
    add("--write", action="store_true", help="write the table instead of comparing with it")
    add("--table", type=Path, help="default: the one of this version of Triton beside this file")
    add("--instances", metavar="MODULE", default="fusedrnn.backends.triton.instances")
    options = parser.parse_args(argv)

    # Before Triton is imported: interpreted functions do not compile, and an own cache can be deleted.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(_HERE.parents[1] / "build" / "triton"))
    import triton

    from . import gates
    from .compiling import load, start, work

    release = ".".join(triton.__version__.split(".")[:2])
    path = options.table or _HERE / f"table-triton-{release}.json"
    instances = load(options.instances)
    architectures = tuple(options.arch or ARCHITECTURES)
    tasks = [(name, arch) for name in instances if re.search(options.only, name) for arch in architectures]
    if not tasks:
        parser.error(f"--only {options.only!r} matches none of {len(instances)} instances")

    began = time.perf_counter()
    done: dict[str, Compiled] = {}
    problems: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(options.jobs, spawn, start, (options.instances,)) as pool,
        progress(len(tasks)) as step,
    ):
        for task in as_completed([pool.submit(work, name, arch) for name, arch in tasks]):
            name, arch, result = task.result()
            row = gates.key(name, arch)
            step(row)
            if isinstance(result, str):
                problems.append(f"{row}: does not compile: {result}")
            else:
                done[row] = result
                found = gates.broken(arch, result.row, result.unguarded, instances[name].matrix)
                problems += [f"{row}: {text}" for text in found]

    rows = {row: compiled.row for row, compiled in done.items()}
    table = gates.read(path)
    failed = {gates.key(*task) for task in tasks} - set(rows)
    here = {row for row in table if row not in failed and gates.selected(row, options.only, architectures)}
    if options.write:
        gates.write(path, {row: table[row] for row in table if row not in here} | rows)
    else:
        problems += gates.moved(rows, {row: table[row] for row in here})

    for problem in sorted(problems):
        print(problem)
    seconds = {row: compiled.seconds for row, compiled in done.items()}
    slowest = max(seconds, key=seconds.__getitem__, default="none")
    print(
        f"Triton {triton.__version__}: {len(tasks)} compiled in {time.perf_counter() - began:.0f} s by "
        f"{options.jobs} processes, {sum(seconds.values()) / max(1, len(done)):.2f} CPU s each, at most "
        f"{seconds.get(slowest, 0):.1f} s ({slowest}); {len(problems)} problems"
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
