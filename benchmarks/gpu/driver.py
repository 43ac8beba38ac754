"""Runs steps one after the other, each a process with its time, and collects what became of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).parents[2]
_GRACE = 5.0  # seconds to end in when told
SKIPPED = 77  # a step's exit status for "does not apply here"; its last line says why
LATE = 124  # of a step that was stopped at the end of its time
_STATES = {0: "ok", SKIPPED: "skipped", LATE: "out of time"}
_TAIL, _WIDTH = 15, 100  # lines of a failed step that are shown, characters of the last one


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        command: what to run, given the seconds it has and the file for JSON results, which it may
            leave unwritten.
        seconds: its share. What it does not use is left to those after it; the last takes all that is left.
        env: added to the environment.
    """

    name: str
    command: Callable[[float, Path], Sequence[str]]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: ok, skipped, failed or out of time; ``line`` is the last that it printed."""

    name: str
    state: str
    seconds: float
    line: str
    result: Any = None

    @property
    def green(self) -> bool:
        return self.state in ("ok", "skipped")

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        state = self.state if self.green else f"RED {self.state}"
        return self.name, state, f"{self.seconds:.1f}", self.line

    def record(self) -> dict[str, Any]:
        return asdict(self)


Start = Callable[[Sequence[str], Mapping[str, str], float], tuple[int, str]]
COLUMNS = ("step", "state", "seconds", "last line")


def start(command: Sequence[str], env: Mapping[str, str], seconds: float) -> tuple[int, str]:
    """Run a command for at most that long; its exit status and all that it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = LATE
        finally:
            _stop(process)
        output.seek(0)
        return status, output.read()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still running, with what it started itself, such as compilers."""
    for how in (signal.SIGTERM, signal.SIGKILL):  # a compiler that is told removes what it has half written
        if process.poll() is None:
            os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)


def run(
    steps: Sequence[Step],
    seconds: float,
    log: Path,
    save: Callable[[Sequence[Outcome]], None],
    start: Start = start,
    clock: Callable[[], float] = perf_counter,
) -> list[Outcome]:
    """Run all steps in at most ``seconds``, whatever becomes of each.

    Args:
        log: gets everything that they print.
        save: told after each step what is known by then.
        start: as :func:`start`.
    """
    begin, due = clock(), 0.0
    outcomes: list[Outcome] = []
    log.write_text("")
    for number, step in enumerate(steps, 1):
        due = seconds if step is steps[-1] else min(due + step.seconds, seconds)
        began = clock()
        print(f"[{number}/{len(steps)}] {step.name} ...", flush=True)
        outcome, text = _run(step, due - (began - begin), start)
        outcome = replace(outcome, seconds=clock() - began)
        with log.open("a") as file:
            file.write(f"\n==== {step.name}: {outcome.state}\n{text}")
        if not outcome.green:
            print("\n".join(f"    {line}" for line in text.splitlines()[-_TAIL:]))
        print(f"    {outcome.state} after {outcome.seconds:.1f} s: {outcome.line}", flush=True)
        outcomes.append(outcome)
        save(outcomes)
    return outcomes


def _run(step: Step, left: float, start: Start) -> tuple[Outcome, str]:
    if left < 1:
        return Outcome(step.name, _STATES[LATE], 0.0, "not begun: no time was left"), ""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        status, text = start(step.command(left, result), step.env, left)
        found = json.loads(result.read_text()) if result.exists() else None
    printed = [line for line in text.splitlines() if line.strip()]
    line = printed[-1].strip()[:_WIDTH] if printed else "it printed nothing"
    return Outcome(step.name, _STATES.get(status, f"failed ({status})"), 0.0, line, found), text
