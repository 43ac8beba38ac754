"""How many threads a call takes, of those that torch has."""

import os
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

import fusedrnn
from fusedrnn.backends import native

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
_C = native._C

UNITS = 8  # of the smallest block, fp32 and AVX2


def members(batch: int, hidden: int, threads: int, steps: int = 128, directions: int = 1) -> int:
    """Of an LSTM's team for one direction."""
    return _C.share_layer(4, steps, batch, hidden, hidden, directions, threads)[0]


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("hidden", [16, 64, 130, 512])
def test_no_member_without_work(batch, hidden):
    for threads in (2, 3, 16, 128):
        most = max(batch, -(-hidden // UNITS))
        assert 0 <= members(batch, hidden, threads) <= min(most, threads)


@pytest.mark.parametrize("hidden", [48, 64, 128])
def test_a_small_layer_keeps_to_few_of_many_threads(hidden):
    """A barrier of 64 threads at every step would take longer than the step."""
    assert members(1, hidden, 64) <= 8


def test_more_work_never_takes_fewer_threads():
    for threads in (2, 4, 16):
        teams = [members(1, hidden, threads) for hidden in (16, 32, 64, 128, 256, 512, 1024)]
        assert teams == sorted(teams)
        assert teams[-1] == threads


def test_both_directions_have_a_team_each():
    assert members(1, 32, 2, directions=2) == 1
    assert members(1, 32, 2, steps=2, directions=2) == 0
    assert members(1, 512, 8, directions=2) == 4


def both_ways() -> Callable[[], object]:
    return partial(fusedrnn.GRU(48, 48, bidirectional=True), torch.rand(128, 1, 48))


def stack() -> Callable[[], object]:
    return partial(fusedrnn.LSTM(80, 80, 3), torch.rand(128, 1, 80))


def stepper() -> Callable[[], object]:
    return partial(fusedrnn.streaming(fusedrnn.GRU(256, 256)).step, torch.rand(256))


def tasks() -> set[str]:
    time.sleep(0.01)  # a thread that has been told to end is here for a moment
    return set(os.listdir("/proc/self/task"))


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
@pytest.mark.parametrize("make", [both_ways, stack, stepper])
def test_no_thread_of_torch_ends(make, four_threads):
    """A region of fewer threads would end the others, which torch's next operation would start again."""
    call = make()
    with torch.no_grad():
        for _ in range(40):  # beside other work a team may be smaller for a while
            torch.rand(1 << 20).exp_()
            before = tasks()
            call()
            if tasks() == before:
                return
            time.sleep(0.05)
    raise AssertionError("every call ended threads")
