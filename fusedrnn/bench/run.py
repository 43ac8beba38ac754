"""One case: behind its gate, and timed in turns."""

from __future__ import annotations

from collections.abc import Callable

from ..budget import Parity, Row, raised
from .attention import PreparedAttention
from .cases import AnyCase
from .device import Device, in_turn
from .prepared import Prepared, prepare
from .report import Result
from .step import PreparedStep
from .timing import interleave

_GRAPH = " graph"


def run(
    group: str, case: AnyCase, gate: Callable[[AnyCase], Parity], seconds: float, device: Device
) -> Result:
    """Check a case against the error budget, and time it if it is within.

    A case that raises is over budget: those after it still run.
    """
    device.release()
    backend = "-"
    try:
        prepared = prepare(case, device)
        backend, parity = prepared.backend(), gate(case.gate())
        if not parity.ok:
            return Result(group, case, backend, parity.failures[0])
        with case.grad_mode():
            return _timed(prepared, seconds, device, (group, case, backend, parity.worst))
    except Exception as error:
        return Result(group, case, backend, raised(error).worst)


def _timed(
    prepared: Prepared | PreparedStep | PreparedAttention,
    seconds: float,
    device: Device,
    what: tuple[str, AnyCase, str, Row],
) -> Result:
    """Calls, and their replays where the device has graphs, all in turns."""
    calls = prepared.calls()
    replays, no_graph = {}, {}
    for side, call in calls.items() if device.graphs else ():
        try:
            replays[side + _GRAPH] = in_turn([device.capture(call) for _ in range(prepared.turns)])
        except Exception as error:
            first = error.__context__ or error  # ending a capture that failed raises once more
            no_graph[side] = f"{type(first).__name__}: {first}".splitlines()[0]
    times, rounds = interleave({**calls, **replays}, seconds, sample=device.sample)
    graph = {name.removesuffix(_GRAPH): times.pop(name) for name in replays}
    _, case, backend, _ = what
    return Result(*what, times, rounds, graph, no_graph, schedule=device.schedule(case, backend))
