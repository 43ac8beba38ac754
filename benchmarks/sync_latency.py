"""What a time step of a scan must wait for on a GPU: `python -m benchmarks.sync_latency`.

Every step of a scan that is split over blocks ends with an exchange: each block writes its share of the new
state, all wait, each reads all of it. This times the exchange alone, by each mechanism that a scan could use
(csrc/cuda/sync_latency.cu), as nanoseconds per round between events and as cycles of the first block. A round
without bytes is the barrier alone. Every word that is read is checked.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedrnn import terminal
from fusedrnn.backends import native
from fusedrnn.bench.gpu import Cuda
from fusedrnn.bench.report import environment, lines
from fusedrnn.tools import kernels, no_gpu

from .gpu.driver import SKIPPED

# In the order of csrc/cuda/sync_latency.h.
MECHANISMS = ("block", "grid", "counter", "flags", "cluster", "push")
_ALONE = ("block", "grid", "counter", "cluster")  # can wait without data
_BYTES = (0, 4096, 32768)  # of the state of one step: B x H = 4 x 512 and 16 x 1024 in bf16
_BLOCKS, _CLUSTERS = (8, 16, 32, 64), (2, 4, 8, 16)
_THREADS = 256
_ROUNDS, _LONGER = 500, 5  # of a launch, and how many times as many the other one has
_LINE = 128  # bytes of the counter, before two buffers of data with as many bytes of flags

COLUMNS = ("mechanism", "blocks", "threads", "cluster", "bytes", "ns p50 (p20-p80)", "cycles p50 (p20-p80)")


class Case(NamedTuple):
    """An exchange; with 0 blocks between as many as run at once."""

    mechanism: str
    blocks: int = 1
    threads: int = _THREADS
    cluster: int = 1
    bytes: int = 0

    @property
    def kernel(self) -> tuple[int, int, int]:
        """What decides how many blocks run at once, beside the mechanism."""
        return self.threads, self.cluster, self.bytes


class Sample(NamedTuple):
    """A launch: seconds between events around it, cycles of its first block, threads that read stale data."""

    seconds: float
    cycles: int
    wrong: int


def cases(processors: int) -> list[Case]:
    """What is timed on a GPU of that many multiprocessors."""
    found = [Case("block", threads=n, bytes=size) for size in _BYTES[:2] for n in (128, 256, 512, 1024)]
    for size in _BYTES:
        shared = [Case(m, n, bytes=size) for m in MECHANISMS[1:4] for n in (*_BLOCKS, processors)]
        clusters = [
            Case(m, n, cluster=k, bytes=size) for m in MECHANISMS[4:] for k in _CLUSTERS for n in (k, 0)
        ]
        found += [case for case in shared + clusters if size or case.mechanism in _ALONE]
    return found


def launch(case: Case, rounds: int) -> Sample:
    """Run a case once on the current stream, and wait for it.

    Raises:
        RuntimeError: the blocks do not all run at once (before anything is launched), or CUDA failed.
    """
    scratch = torch.empty(_LINE + 4 * case.bytes, dtype=torch.uint8, device="cuda")
    result = torch.empty(2, dtype=torch.int64, device="cuda")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream()
    index, (threads, cluster, size) = MECHANISMS.index(case.mechanism), case.kernel
    begin.record()
    kernels().cuda.sync_rounds(
        *(index, case.blocks, threads, cluster, size, rounds),
        *(scratch.data_ptr(), result.data_ptr(), stream.cuda_stream),
    )
    end.record()
    end.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3, *result.tolist())


def measure(
    todo: Sequence[Case], repeats: int, launch: Callable[[Case, int], Sample] = launch
) -> dict[Case, dict[str, Any]]:
    """Quantiles of a round, in turns over all cases.

    A launch takes time beside its rounds, so nanoseconds are those by which a longer one takes longer.
    """
    rates: dict[Case, list[tuple[float, float]]] = {case: [] for case in todo}
    wrong = dict.fromkeys(todo, 0)
    for repeat in range(-1, repeats):  # the first loads the kernels
        for case in todo:
            short, long = launch(case, _ROUNDS), launch(case, _ROUNDS * _LONGER)
            wrong[case] += short.wrong + long.wrong
            if repeat >= 0:
                seconds = (long.seconds - short.seconds) / (_ROUNDS * (_LONGER - 1))
                rates[case].append((seconds * 1e9, long.cycles / (_ROUNDS * _LONGER)))
    return {
        case: {"wrong": wrong[case], **dict(zip(("ns", "cycles"), map(_quantiles, zip(*rates[case]))))}
        for case in todo
    }


def _quantiles(samples: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return {f"p{percent}": round(cuts[percent // 10 - 1], 1) for percent in (20, 50, 80)}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The line of the table."""
    names = tuple(str(row[name]) for name in Case._fields)
    if "ns" not in row:
        return *names, f"not run: {row['fits']} blocks run at once", ""
    if row["wrong"]:
        return *names, f"RED: {row['wrong']} threads read what was not written", ""
    times = (row[name] for name in ("ns", "cycles"))
    return *names, *(f"{t['p50']:.0f} ({t['p20']:.0f}-{t['p80']:.0f})" for t in times)


def rows(
    todo: Sequence[Case],
    repeats: int,
    capacity: Callable[[int, int, int, int], int],
    launch: Callable[[Case, int], Sample] = launch,
) -> list[dict[str, Any]]:
    """Every case with its times; without them, and with what fits, where not all blocks run at once."""
    fits = {case: capacity(MECHANISMS.index(case.mechanism), *case.kernel) for case in todo}
    exact = {case._replace(blocks=case.blocks or most): most for case, most in fits.items()}
    found = measure([case for case, most in exact.items() if 0 < case.blocks <= most], repeats, launch)
    return [{**case._asdict(), "fits": most, **found.get(case, {})} for case, most in exact.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that was read had been written, 1 if not, 2 without a GPU, 77 without CUDA code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.sync_latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repeats", type=int, default=15, help="launches of each case (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the machine there")
    options = parser.parse_args(argv)
    if options.repeats < 2:
        parser.error(f"--repeats: expected at least 2, for quantiles, got {options.repeats}")
    if why_not := no_gpu():
        parser.error(f"times a GPU, but {why_not.removeprefix('--device cuda: ')}")
    if why_not := native.unavailable() or kernels().cuda.missing:
        print(f"no CUDA code in fusedrnn._C: {why_not}")
        return SKIPPED

    device = Cuda()
    command = shlex.join(
        ["python", "-m", "benchmarks.sync_latency", *(sys.argv[1:] if argv is None else argv)]
    )
    head = environment(command, device)
    found = rows(cases(head["machine"]["multiprocessors"]), options.repeats, kernels().cuda.sync_capacity)
    terminal.table(COLUMNS, [cells(row) for row in found])
    if options.json:
        options.json.write_text(lines({**head, "results": found}))
    timed = [row for row in found if "ns" in row]
    red = sum(bool(row["wrong"]) for row in timed)
    print(f"{len(timed)} exchanges timed, {len(found) - len(timed)} do not fit, {red} red")
    return bool(red)


if __name__ == "__main__":
    sys.exit(main())
