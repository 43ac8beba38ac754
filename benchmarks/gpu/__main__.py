"""The command line of `python -m benchmarks.gpu`."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import benchmarks.gpu
from fusedrnn import terminal
from fusedrnn.bench.gpu import DEVICES
from fusedrnn.bench.report import environment, lines
from fusedrnn.tools import no_gpu, version

from .driver import ROOT, Outcome, run
from .steps import steps
from .summary import report, show

_MINUTES, _MINUTES_QUICK = 8.0, 2.0
_PEERS = ("torchrl",)  # besides cuDNN, which torch brings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if all hold, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__)
    parser.add_argument(
        "--device", choices=DEVICES, default="cuda", help="cpu: every step, as small as can be"
    )
    parser.add_argument("--quick", action="store_true", help="the shorter proofs, and fewer cases measured")
    parser.add_argument(
        "--minutes", type=float, help=f"in all (default: {_MINUTES:.0f}, --quick: {_MINUTES_QUICK:.0f})"
    )
    names = [step.name for step in steps("cpu", quick=False)]
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results"),
        metavar="DIR",
        help="where the results go (default: $OUT, or benchmarks/results)",
    )
    parser.add_argument("--commit", help="of the tree, where it is a copy that git does not know")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and (why_not := no_gpu()):
        parser.error(f"{why_not}; --device cpu runs every step in its smallest size")

    minutes = arguments.minutes or (_MINUTES_QUICK if arguments.quick else _MINUTES)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    head = environment(command, DEVICES[arguments.device]())
    head["commit"] = head["commit"] or arguments.commit
    _introduce(head)
    machine = re.sub("[^a-z0-9]+", "-", head["machine"].get("gpu", "cpu").lower())
    name = arguments.out / f"{machine}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M%S}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = Path(f"{name}.json")

    def save(outcomes: Sequence[Outcome]) -> None:
        file.write_text(lines(report(head, outcomes)))

    known = steps(arguments.device, arguments.quick)
    todo = [step for step in known if step.name in (arguments.only or names)]
    outcomes = run(todo, 60 * minutes, Path(f"{name}.log"), save)
    terminal.heading(str(file))
    show(report(head, outcomes), outcomes)
    return 0 if all(outcome.green for outcome in outcomes) else 1


def _introduce(head: Mapping[str, Any]) -> None:
    machine, versions = head["machine"], head["versions"]
    what = {
        "device": machine.get("gpu", machine["cpu"]),
        "commit": head["commit"],
        **machine.get("state", {}),
    }
    what |= {name: machine[name] for name in ("cuda", "cudnn", "triton") if name in machine} | versions
    for peer in _PEERS:
        found = version(peer)
        what[peer] = "not installed, so not compared" if found is None else f"{found}, not compared yet"
    terminal.table(("", ""), [(name, str(value)) for name, value in what.items()])


if __name__ == "__main__":
    sys.exit(main())
