"""The co-scheduler: a persistent kernel runs in every order, and each way to get it wrong is caught."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("greenlet")

import triton.language as tl  # noqa: E402
from cooperative import ORDERS, Deadlock, cooperative  # noqa: E402
from interpreter import DEVICE, INTERPRETED  # noqa: E402

from fusedrnn.budget import compare  # noqa: E402

STEPS, HIDDEN, PROGRAMS = 5, 16, 4
SCHEDULES = [
    *({"order": order} for order in ("round-robin", "reversed")),
    *({"order": "random", "seed": seed} for seed in range(3)),
    *(
        {"order": order, "program": program}
        for order in ("eager", "lagging")
        for program in (0, PROGRAMS - 1)
    ),
]


@triton.jit
def recurrence_fwd_kernel(
    x_ptr,  # [T, H]
    weight_ptr,  # [H, H]
    h_ptr,  # [BUFFERS, H], h_ptr[0] holds the first state
    y_ptr,  # [T, H]
    counter_ptr,  # [1]
    T,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BUFFERS: tl.constexpr,
    BARRIER: tl.constexpr,
    EXPECTED: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """h[t + 1] = x[t] + W h[t], the rows of W split over the programs; one grid barrier a step."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, H)
    weight = tl.load(weight_ptr + rows[:, None] * H + columns[None, :])
    for t in range(T):
        h = tl.load(h_ptr + (t % BUFFERS) * H + columns)
        y = tl.load(x_ptr + t * H + rows) + tl.sum(weight * h[None, :], 1)
        tl.store(h_ptr + ((t + 1) % BUFFERS) * H + rows, y)
        tl.store(y_ptr + t * H + rows, y)
        if BARRIER:
            tl.debug_barrier()
            tl.atomic_add(counter_ptr, 1, sem="release")
            arrivals = EXPECTED
            if ADVANCE:
                arrivals = EXPECTED * (t + 1)
            while tl.atomic_add(counter_ptr, 0, sem="acquire") < arrivals:
                pass


def agrees(
    schedule: dict[str, str | int],
    *,
    buffers: int = 2,
    barrier: bool = True,
    expected: int = PROGRAMS,
    advance: bool = True,
    reset: bool = True,
) -> bool:
    """Whether two launches, the second with other input, give what a loop in fp64 gives."""
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(HIDDEN, HIDDEN, generator=make, dtype=torch.float64) / HIDDEN**0.5
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    good = True
    for _ in range(2):
        x = torch.randn(STEPS, HIDDEN, generator=make, dtype=torch.float64)
        h = torch.full((buffers, HIDDEN), torch.nan, device=DEVICE)
        h[0] = 0
        y = torch.full((STEPS, HIDDEN), torch.nan, device=DEVICE)
        if reset:
            counter.zero_()
        with cooperative(**schedule):
            recurrence_fwd_kernel[(PROGRAMS,)](
                x.float().to(DEVICE),
                weight.float().to(DEVICE),
                h,
                y,
                counter,
                STEPS,
                H=HIDDEN,
                ROWS=HIDDEN // PROGRAMS,
                BUFFERS=buffers,
                BARRIER=barrier,
                EXPECTED=expected,
                ADVANCE=advance,
                launch_cooperative_grid=True,
            )
        exact, plain = (loop(x.to(dtype), weight.to(dtype)) for dtype in (torch.float64, torch.float32))
        good = good and compare("y", y.cpu(), plain, exact).ok
    return good


def loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    states = [torch.zeros_like(x[0])]
    for step in x:
        states.append(step + weight @ states[-1])
    return torch.stack(states[1:])


def test_every_order_is_scheduled():
    assert {schedule["order"] for schedule in SCHEDULES} == set(ORDERS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_right_kernel_is_right_in_every_order(schedule):
    assert agrees(schedule)


interpreted = pytest.mark.skipif(not INTERPRETED, reason="a wrong barrier would hang a GPU")

BUGS = {
    "no barrier": {"barrier": False},
    "one buffer": {"buffers": 1},
    "one arrival too few": {"expected": PROGRAMS - 1},
    "the target stays": {"advance": False},
    "the counter stays": {"reset": False},
}


@interpreted
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_race_is_caught(bug):
    assert not all(agrees(schedule, **bug) for schedule in SCHEDULES)


@interpreted
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_deadlock_raises(schedule):
    with pytest.raises(Deadlock, match="wait for each other"):
        agrees(schedule, expected=PROGRAMS + 1)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"order must be one of round-robin, .*, got 'sideways'"):
        cooperative("sideways").__enter__()
