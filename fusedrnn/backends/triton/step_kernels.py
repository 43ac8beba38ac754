"""One step in one launch, the input's product included; and the gates of all steps again, for a backward."""

import triton
import triton.language as tl

from .scan_kernels import columns, gates_of


@triton.jit
def _product(
    a_ptr, weight_ptr, b, B, K, H,
    G: tl.constexpr, GP: tl.constexpr, PRECISION: tl.constexpr,
    BB: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """a [B, K] @ weight [G*H, K] transposed: this program's gates, a tuple of [BB, BU]."""
    sums = tl.zeros([BB, BU * GP], tl.float32)
    for k in range(tl.cdiv(K, BK)):
        ks = k * BK + tl.arange(0, BK)
        mask = (b[:, None] < B) & (ks[None, :] < K)
        a = tl.load(a_ptr + b.to(tl.int64)[:, None] * K + ks[None, :], mask=mask, other=0)
        w = columns(weight_ptr, tl.program_id(0), ks, H, K, G, GP, BU)
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    return gates_of(sums, BB, BU, GP)


@triton.jit(do_not_specialize=["B"])
def step_fwd_kernel(
    x_ptr,  # [B, I]
    weight_ih_ptr,  # [G*H, I]
    bias_ih_ptr,  # [G*H], if HAS_BIAS
    h_ptr,  # [B, H]
    weight_hh_ptr,  # [G*H, H]
    bias_hh_ptr,  # [G*H], if HAS_BIAS
    cell_ptr,  # [B, H], if S > 1: the second state
    output_ptr,  # [B, H]
    last_h_ptr,  # [B, H]
    last_cell_ptr,  # [B, H], if S > 1
    saved_ptr,  # [B, SAVED*H]
    kept_ptr,  # [B, H] fp32, if KEEP: the second state, for the backward
    B, I, H,
    ACTIVATE: tl.constexpr,
    UPDATE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    S: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    units = tl.program_id(0) * BU + tl.arange(0, BU)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    mask = (b[:, None] < B) & (units[None, :] < H)
    at = b.to(tl.int64)[:, None] * H + units[None, :]
    dtype = weight_hh_ptr.dtype.element_ty

    x_products = _product(x_ptr, weight_ih_ptr, b, B, I, H, G, GP, PRECISION, BB, BU, BK)
    h_products = _product(h_ptr, weight_hh_ptr, b, B, H, H, G, GP, PRECISION, BB, BU, BK)
    x = ()
    h = ()
    for g in tl.static_range(G):
        if HAS_BIAS:
            at_bias = g * H + units
            of_x = tl.load(bias_ih_ptr + at_bias, mask=units < H, other=0).to(tl.float32)
            of_h = tl.load(bias_hh_ptr + at_bias, mask=units < H, other=0).to(tl.float32)
            x += (x_products[g] + of_x[None, :],)
            h += (h_products[g] + of_h[None, :],)
        else:
            x += (x_products[g],)
            h += (h_products[g],)
    states = (tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32),)
    if S > 1:
        states += (tl.load(cell_ptr + at, mask=mask, other=0).to(tl.float32),)
    saved = ACTIVATE(x, h)
    states = UPDATE(saved, states)

    tl.store(output_ptr + at, states[0].to(dtype), mask=mask)
    tl.store(last_h_ptr + at, states[0].to(dtype), mask=mask)
    if S > 1:
        tl.store(last_cell_ptr + at, states[1].to(dtype), mask=mask)
    if KEEP:
        tl.store(kept_ptr + at, states[1], mask=mask)
    for k in tl.static_range(SAVED):
        at_saved = b.to(tl.int64)[:, None] * (SAVED * H) + k * H + units[None, :]
        tl.store(saved_ptr + at_saved, saved[k].to(dtype), mask=mask)


@triton.jit(do_not_specialize=["N"])
def activate_kernel(
    x_gates_ptr,  # [N, G*H]
    h_gates_ptr,  # [N, G*H]
    saved_ptr,  # [N, SAVED*H]
    N, H,
    ACTIVATE: tl.constexpr,
    G: tl.constexpr,
    SAVED: tl.constexpr,
    BB: tl.constexpr,
    BU: tl.constexpr,
):  # fmt: skip
    """What a forward saves of all rows, from the two halves of their gates."""
    rows = tl.program_id(0).to(tl.int64) * BB + tl.arange(0, BB)
    units = tl.program_id(1) * BU + tl.arange(0, BU)
    mask = (rows[:, None] < N) & (units[None, :] < H)
    x = ()
    h = ()
    for g in tl.static_range(G):
        at = rows[:, None] * (G * H) + g * H + units[None, :]
        x += (tl.load(x_gates_ptr + at, mask=mask, other=0).to(tl.float32),)
        h += (tl.load(h_gates_ptr + at, mask=mask, other=0).to(tl.float32),)
    saved = ACTIVATE(x, h)
    for k in tl.static_range(SAVED):
        at = rows[:, None] * (SAVED * H) + k * H + units[None, :]
        tl.store(saved_ptr + at, saved[k].to(saved_ptr.dtype.element_ty), mask=mask)
