"""The mended interpreter computes what a GPU does: on a machine with one, these tests run there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from interpreter import DEVICE, INTERPRETED  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from fusedrnn.budget import compare  # noqa: E402

N = 256
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
HALVES = {name: dtype for name, dtype in DTYPES.items() if dtype != torch.float32}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a check that only the interpreter makes")


def draw(dtype, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def empty(dtype, *shape):
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype, device=DEVICE)


@triton.jit
def convert_kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y_ptr + n, tl.load(x_ptr + n).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("target", [*DTYPES.values(), torch.int32], ids=[*DTYPES, "i32"])
@pytest.mark.parametrize("source", [*DTYPES.values(), torch.int32], ids=[*DTYPES, "i32"])
def test_conversions_round_to_nearest_even(source, target):
    if torch.int32 in (source, target):
        x = torch.arange(N).to(source).to(DEVICE)
    else:
        x = draw(torch.float32, N) * torch.logspace(-6, 4, N, device=DEVICE)
        # a carry into the exponent, ties, what is out of range, what is no number
        special = [
            1.99999,
            1.00390625,
            1.01171875,
            65504.0,
            3.3895e38,
            0.0,
            -0.0,
            torch.inf,
            -torch.inf,
            torch.nan,
        ]
        x[: len(special)] = torch.tensor(special)
        x = x.to(source)
    y = empty(target, N)
    convert_kernel[(1,)](x, y, N)
    assert torch.equal(y.isnan(), x.to(target).isnan())
    assert torch.equal(y.nan_to_num(), x.to(target).nan_to_num())


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    a, b = tl.load(a_ptr + n), tl.load(b_ptr + n)
    tl.store(y_ptr + n, a + b)
    tl.store(y_ptr + N + n, a - b)
    tl.store(y_ptr + 2 * N + n, a * b)
    tl.store(y_ptr + 3 * N + n, -a)
    tl.store(y_ptr + 4 * N + n, tl.where(a < b, a, b))
    tl.store(y_ptr + 5 * N + n, tl.maximum(a, b))
    tl.store(y_ptr + 6 * N + n, 2.0 * tl.abs(a))
    tl.store(y_ptr + 7 * N + n, a + tl.full((N,), 1.5, a.dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_arithmetic(dtype):
    a, b, y = draw(dtype, N), draw(dtype, N, seed=1), empty(dtype, 8, N)
    arithmetic_kernel[(1,)](a, b, y, N)
    expected = [a + b, a - b, a * b, -a, a.minimum(b), a.maximum(b), 2 * a.abs(), a + 1.5]
    assert torch.equal(y, torch.stack(expected))


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, argmax_ptr, cumsum_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(sum_ptr + m, tl.sum(x, 1))
    tl.store(max_ptr + m, tl.max(x, 1))
    tl.store(argmax_ptr + m, tl.argmax(x, 1))
    tl.store(cumsum_ptr + m[:, None] * N + n[None, :], tl.cumsum(x, 1))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_reductions(dtype):
    # small integers: exact in every order and precision
    x = torch.randint(-3, 4, (8, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[torch.arange(8), torch.arange(8)] = 9
    x = x.to(DEVICE)
    total, top, index, running = empty(dtype, 8), empty(dtype, 8), empty(torch.int32, 8), empty(dtype, 8, 16)
    reduce_kernel[(1,)](x, total, top, index, running, 8, 16)
    assert torch.equal(total, x.float().sum(1).to(dtype))
    assert torch.equal(top, x.amax(1))
    assert torch.equal(index, x.argmax(1).int())
    assert torch.equal(running, x.float().cumsum(1).to(dtype))


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    y = tl.dot(a, tl.trans(b), tl.full((M, N), 1.0, tl.float32), input_precision="ieee")
    tl.store(y_ptr + m[:, None] * N + n[None, :], y)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dot_keeps_an_fp32_sum(dtype):
    a, b, y = draw(dtype, 16, 64), draw(dtype, 32, 64, seed=1), empty(torch.float32, 16, 32)
    dot_kernel[(1,)](a, b, y, 16, 32, 64)
    stock = a.float() @ b.float().T + 1
    error = compare("dot", y, stock, a.double() @ b.double().T + 1)
    assert error.ok, error


RAW = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr, y_ptr, N: tl.constexpr):
    n = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + n)
    tl.store(y_ptr + n, tl.dot(x, x))
x, y = torch.eye(16, dtype=torch.bfloat16), torch.empty(16, 16)
kernel[(1,)](x, y, 16)
assert not torch.equal(y, x.float())
"""


@interpreted
def test_without_the_mend_a_dot_is_wrong(tmp_path):
    (tmp_path / "raw.py").write_text(RAW)
    subprocess.run([sys.executable, tmp_path / "raw.py"], check=True)


@triton.jit
def hints_kernel(x_ptr, y_ptr, n, OTHER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=OTHER, cache_modifier=".cg", volatile=True)
    tl.store(y_ptr + i, x, mask=i < N - 1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_masks_and_hints(dtype):
    x, y = draw(dtype, 8), empty(dtype, 16)
    hints_kernel[(1,)](x, y, 8, -1.5, 16)
    assert torch.equal(y[:8], x)
    assert (y[8:15] == -1.5).all()
    assert y[15].isnan()


@triton.jit
def tail_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n))


@interpreted
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_lanes_without_other_are_nan(dtype):
    y = torch.zeros(8, dtype=dtype)
    tail_kernel[(1,)](torch.ones(8, dtype=dtype), y, 5, 8)
    assert y.isnan().tolist() == [False] * 5 + [True] * 3


@triton.jit
def far_kernel(x_ptr, y_ptr, stride):
    i = tl.program_id(0).to(tl.int64)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


def test_offsets_of_64_bits():
    x = torch.empty(2**31 + 1, dtype=torch.int8, device=DEVICE)  # of which two pages are touched
    x[0], x[2**31] = 3, 5
    y = empty(torch.int8, 3)
    far_kernel[(2,)](x, y, 2**31)
    assert y.tolist() == [3, 5, -1]


@triton.jit
def offset_kernel(y_ptr, stride):
    tl.store(y_ptr, (tl.program_id(0) + 2) * stride)


@interpreted
def test_an_offset_that_overflows_raises():
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        offset_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 2**30)


@triton.jit
def atomics_kernel(x_ptr, old_ptr):
    tl.store(old_ptr, tl.atomic_cas(x_ptr, 0, 5))
    tl.store(old_ptr + 1, tl.atomic_add(x_ptr, 2, sem="release", scope="gpu"))
    tl.store(old_ptr + 2, tl.atomic_xchg(x_ptr, 9))
    tl.store(old_ptr + 3, tl.atomic_max(x_ptr, 3))


def test_atomics():
    x, old = torch.zeros(1, dtype=torch.int32, device=DEVICE), empty(torch.int32, 4)
    atomics_kernel[(1,)](x, old)
    assert (x.tolist(), old.tolist()) == ([9], [0, 5, 7, 9])


@triton.jit
def sum_step(x, state):
    return (x[0] + state[0], x[1] * state[0] + state[1])


@triton.jit
def gated_step(x, state):
    return (tl.sigmoid(x[0]) * state[0] + x[1],)


@triton.jit
def scan_kernel(
    x_ptr, y_ptr, T, STEP: tl.constexpr, INPUTS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr
):
    n = tl.arange(0, N)
    state = ()
    for _ in tl.static_range(STATES):
        state += (tl.zeros((N,), tl.float32),)
    for t in range(T):
        x = ()
        for i in tl.static_range(INPUTS):
            x += (tl.load(x_ptr + (t * INPUTS + i) * N + n),)
        state = STEP(x, state)
        tl.debug_barrier()
    left = T
    while left > 0:
        left -= 1
    for s in tl.static_range(STATES):
        tl.store(y_ptr + s * N + n, state[s] + left)


@pytest.mark.parametrize(("step", "states"), [(sum_step, 2), (gated_step, 1)], ids=["sum", "gated"])
def test_jit_functions_and_tuples_as_arguments(step, states):
    x, y = draw(torch.float32, 3, 2, N), empty(torch.float32, states, N)
    scan_kernel[(1,)](x, y, 3, step, 2, states, N)
    state = x.new_zeros(states, N)
    for t in range(3):
        if states == 2:
            state = torch.stack([x[t, 0] + state[0], x[t, 1] * state[0] + state[1]])
        else:
            state = (x[t, 0].sigmoid() * state[0] + x[t, 1])[None]
    torch.testing.assert_close(y, state)
