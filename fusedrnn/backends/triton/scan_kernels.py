"""One time loop for every cell and schedule, forward and backward.

A program owns a tile of BB rows of the batch and BU hidden units, with all their gates and states.
In the resident schedule the tile has all units, so h never leaves the program. In the others a step
reads the h (backward: the gates' gradients) of all units from where the step before stored them for good:
persistent programs wait for each other once a step, stepped ones are launched once a step. Each row is
stored once and read only afterwards, so one barrier a step is enough, and nothing is stored twice.

Rows are packed by time: step t has rows offsets[t] .. offsets[t + 1] of N, one per sequence that is still
running, longest first. Dense input needs no offsets. Directions are the third axis of the grid; the second
one runs backwards in time.
"""

import triton
import triton.language as tl

from .barrier import arrive, wait

# Nothing is compiled for a length or a batch size.
ANY = ["N", "T", "B", "first", "count"]


@triton.jit
def _rows(offsets_ptr, t, b, B, RAGGED: tl.constexpr):
    """The rows of N that step t has for the sequences b, and how many sequences are running."""
    if RAGGED:
        first = tl.load(offsets_ptr + t)
        size = (tl.load(offsets_ptr + t + 1) - first).to(tl.int32)
    else:
        first = t.to(tl.int64) * B
        size = B
    return first + b, size


@triton.jit
def _sources(offsets_ptr, t, before, is_later, b, B, keep, RAGGED: tl.constexpr):
    """The rows with the states before step t: which have stored them, and which start with it (in reverse,
    short sequences start late). Without `keep`, neither."""
    rows, size = _rows(offsets_ptr, tl.where(is_later, before, t), b, B, RAGGED)
    size = tl.where(is_later, size, 0)
    return rows, keep & (b < size), keep & (b >= size)


@triton.jit
def columns(weight_ptr, block, k, H, K, G: tl.constexpr, GP: tl.constexpr, BU: tl.constexpr):
    """Tile [K's, BU * GP] of the weights: a unit's gates side by side, padded to a power of two."""
    column = tl.arange(0, BU * GP)
    gate = column % GP
    unit = block * BU + column // GP
    at = (gate * H + unit)[None, :] * K + k[:, None]
    mask = ((gate < G) & (unit < H))[None, :] & (k[:, None] < K)
    return tl.load(weight_ptr + at, mask=mask, other=0)


@triton.jit
def gates_of(sums, BB: tl.constexpr, BU: tl.constexpr, GP: tl.constexpr):
    """The gates [BB, BU] of sums [BB, BU * GP]."""
    if GP == 1:
        return (sums,)
    else:
        even, odd = tl.split(tl.reshape(sums, [BB, BU, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _hidden(row_ptrs, known, k, K):
    """Tile [BB, BK] of the hidden states before a step. Past L1, which does not see other SMs' stores."""
    mask = known[:, None] & (k[None, :] < K)
    return tl.load(row_ptrs[:, None] + k[None, :], mask=mask, other=0, cache_modifier=".cg")


@triton.jit(do_not_specialize=ANY)
def scan_fwd_kernel(
    x_gates_ptr,  # [D, N, G*H]
    weight_ptr,  # [D, G*H, K]
    bias_ptr,  # [D, G*H], if HAS_BIAS
    start_ptr,  # [D, B, K]: the hidden state before the first step, as products take it
    states_ptr,  # [S, D, B, H] fp32: before step `first`; after the last one
    h_ptr,  # strides h_direction, h_row, 1: [N, K] a direction, the hidden states as products take them
    output_ptr,  # strides output_direction, output_row, 1: [N, H] a direction; h_ptr's
    saved_ptr,  # [D, N, SAVED*H], if SAVE
    cells_ptr,  # [S-1, D, N, H] fp32: the other states, if SAVE
    h_direction, h_row, output_direction, output_row,
    resets_ptr,  # [D, N] uint8, if RESETS: the states are zero before these rows
    offsets_ptr,  # [T+1] int64, if RAGGED
    lengths_ptr,  # [B] int64, if RAGGED
    counters_ptr,  # [D, batch tiles] int32, zeros, if PERSISTENT
    N, T, B, H, K,
    first,  # the first step, and how many there are at most
    count,
    ACTIVATE: tl.constexpr,
    UPDATE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,  # G rounded up to a power of two
    S: tl.constexpr,
    SAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    RESETS: tl.constexpr,
    RAGGED: tl.constexpr,
    RESIDENT: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,  # number of tiles of K, if HOLD
):  # fmt: skip
    tile = tl.program_id(1)
    d = tl.program_id(2)
    direction = d.to(tl.int64)
    units = tl.program_id(0) * BU + tl.arange(0, BU)
    b = tile * BB + tl.arange(0, BB)
    own = (b[:, None] < B) & (units[None, :] < H)
    dtype = weight_ptr.dtype.element_ty

    x_gates_ptr += direction * N * G * H
    weight_ptr += direction * G * H * K
    start_ptr += direction * B * K
    h_ptr += direction * h_direction
    output_ptr += direction * output_direction
    if SAVE and SAVED > 0:
        saved_ptr += direction * N * SAVED * H
    if RESETS:
        resets_ptr += direction * N
    if PERSISTENT:
        counter_ptr = counters_ptr + d * tl.num_programs(1) + tile

    length = T
    if RAGGED and (RESIDENT or PERSISTENT):  # stepped: all tiles of a launch are at one time
        length = tl.load(lengths_ptr + tile * BB).to(tl.int32)
    end = tl.minimum(first + count, length)

    held = ()
    if HOLD:
        for k in tl.static_range(NK):
            ks = k * BK + tl.arange(0, BK)
            held += (columns(weight_ptr, tl.program_id(0), ks, H, K, G, GP, BU),)
    bias = ()
    for g in tl.static_range(G):
        if HAS_BIAS:
            part = tl.load(bias_ptr + d * G * H + g * H + units, mask=units < H, other=0).to(tl.float32)
        else:
            part = tl.zeros([BU], tl.float32)
        bias += (part,)
    states = ()
    for s in tl.static_range(S):
        at = ((s * tl.num_programs(2) + direction) * B + b[:, None]) * H + units[None, :]
        states += (tl.load(states_ptr + at, mask=own, other=0),)

    for i in range(first, end):
        t = tl.where(d == 0, i, length - 1 - i)
        rows, size = _rows(offsets_ptr, t, b, B, RAGGED)
        active = b < size
        mask = active[:, None] & (units[None, :] < H)
        x = ()
        for g in tl.static_range(G):
            at = rows[:, None] * (G * H) + g * H + units[None, :]
            x += (tl.load(x_gates_ptr + at, mask=mask, other=0).to(tl.float32),)
        keep = active
        if RESETS:
            keep = active & (tl.load(resets_ptr + rows, mask=active, other=0) == 0)
            kept = ()
            for s in tl.static_range(S):
                kept += (tl.where(keep[:, None], states[s], 0.0),)
        else:
            kept = states

        sums = tl.zeros([BB, BU * GP], tl.float32)
        if RESIDENT:
            sums = tl.dot(kept[0].to(dtype), held[0], sums, input_precision=PRECISION)
        else:
            before = tl.where(d == 0, t - 1, t + 1)
            sources, stored, starts = _sources(offsets_ptr, t, before, i > 0, b, B, keep, RAGGED)
            start_ptrs = start_ptr + b.to(tl.int64) * K
            row_ptrs = tl.where(starts, start_ptrs, h_ptr + sources * h_row)
            known = stored | starts
            if PERSISTENT and i > 0:
                wait(counter_ptr, i * tl.num_programs(0))
            if HOLD:
                for k in tl.static_range(NK):
                    a = _hidden(row_ptrs, known, k * BK + tl.arange(0, BK), K)
                    sums = tl.dot(a, held[k], sums, input_precision=PRECISION)
            else:
                for k in range(tl.cdiv(K, BK)):
                    ks = k * BK + tl.arange(0, BK)
                    w = columns(weight_ptr, tl.program_id(0), ks, H, K, G, GP, BU)
                    sums = tl.dot(_hidden(row_ptrs, known, ks, K), w, sums, input_precision=PRECISION)
        products = gates_of(sums, BB, BU, GP)
        h = ()
        for g in tl.static_range(G):
            h += (products[g] + bias[g][None, :],)

        saved = ACTIVATE(x, h)
        new = UPDATE(saved, kept)
        merged = ()
        for s in tl.static_range(S):
            merged += (tl.where(active[:, None], new[s], states[s]),)
        states = merged
        tl.store(output_ptr + rows[:, None] * output_row + units[None, :], states[0].to(dtype), mask=mask)
        if SAVE:
            for k in tl.static_range(SAVED):
                at = rows[:, None] * (SAVED * H) + k * H + units[None, :]
                tl.store(saved_ptr + at, saved[k].to(dtype), mask=mask)
            for s in tl.static_range(1, S):
                at = (((s - 1) * tl.num_programs(2) + direction) * N + rows[:, None]) * H + units[None, :]
                tl.store(cells_ptr + at, states[s], mask=mask)
        if PERSISTENT:
            arrive(counter_ptr)

    for s in tl.static_range(S):
        at = ((s * tl.num_programs(2) + direction) * B + b[:, None]) * H + units[None, :]
        tl.store(states_ptr + at, states[s], mask=own)


@triton.jit
def _rows_of_weights(weight_ptr, j, units, GH, K):
    """Tile [..., j, units] of the [G*H, K] weights, j of any rank."""
    at = j * K + units
    return tl.load(weight_ptr + at, mask=(j < GH) & (units < K), other=0)


@triton.jit
def _through_weights(
    sums, d_h_gates_ptr, resets_ptr, offsets_ptr, t, b, weight_ptr, held, units, B, H, K,
    G: tl.constexpr, RESETS: tl.constexpr, RAGGED: tl.constexpr, HOLD: tl.constexpr,
    BB: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, NK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums + d_h_gates @ W of step t, from what all programs have stored.

    The product is summed in four parts, because one of so few columns would keep one or two warps busy.
    """
    rows, size = _rows(offsets_ptr, t, b, B, RAGGED)
    active = b < size
    if RESETS:
        active = active & (tl.load(resets_ptr + rows, mask=active, other=0) == 0)
    row = rows[None, :, None] * (G * H)
    mask = active[None, :, None]
    part = tl.arange(0, 4)[:, None, None]
    parts = tl.zeros([4, BB, BU], tl.float32)
    if HOLD:
        for k in tl.static_range(NK):
            j = (k * 4 + part) * BK + tl.arange(0, BK)[None, None, :]
            a = tl.load(d_h_gates_ptr + row + j, mask=mask & (j < G * H), other=0, cache_modifier=".cg")
            parts = tl.dot(a, held[k], parts, input_precision=PRECISION)
    else:
        for k in range(tl.cdiv(G * H, 4 * BK)):
            j = (k * 4 + part) * BK + tl.arange(0, BK)[None, None, :]
            a = tl.load(d_h_gates_ptr + row + j, mask=mask & (j < G * H), other=0, cache_modifier=".cg")
            j = (k * 4 + part) * BK + tl.arange(0, BK)[None, :, None]
            w = _rows_of_weights(weight_ptr, j, units[None, None, :], G * H, K)
            parts = tl.dot(a, w, parts, input_precision=PRECISION)
    return sums + tl.sum(parts, 0)


@triton.jit(do_not_specialize=ANY)
def scan_bwd_kernel(
    weight_ptr,  # [D, G*H, K]
    saved_ptr,  # strides saved_direction, saved_row, 1: [N, SAVED*H] a direction
    cells_ptr,  # [S-1, D, N, H] fp32
    cells0_ptr,  # [S-1, D, B, H]: the other states before the first step
    h_ptr,  # strides h_direction, h_row, 1: [N, H] a direction, if READS_H
    start_ptr,  # [D, B, H], if READS_H
    grad_ptr,  # strides grad_direction, grad_row, 1: [N, H] a direction, the output's gradient, if HAS_GRAD
    d_states_ptr,  # [S, D, B, H] fp32: of the last states; of those before the first step
    d_x_gates_ptr,  # [D, N, G*H]
    d_h_gates_ptr,  # [D, N, G*H]; d_x_gates_ptr's memory unless SPLIT
    saved_direction, saved_row, h_direction, h_row, grad_direction, grad_row,
    resets_ptr,  # [D, N] uint8, if RESETS
    offsets_ptr,  # [T+1] int64, if RAGGED
    lengths_ptr,  # [B] int64, if RAGGED
    counters_ptr,  # [D, batch tiles] int32, zeros, if PERSISTENT
    N, T, B, H, K,
    first,  # the first step, counted from the last one on, and how many there are at most
    count,
    BACKWARD: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    SAVED: tl.constexpr,
    SPLIT: tl.constexpr,  # whether d_h_gates differ from d_x_gates
    READS_H: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    RESETS: tl.constexpr,
    RAGGED: tl.constexpr,
    RESIDENT: tl.constexpr,
    PERSISTENT: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BB: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,  # number of tiles of H, if HOLD
):  # fmt: skip
    tile = tl.program_id(1)
    d = tl.program_id(2)
    direction = d.to(tl.int64)
    units = tl.program_id(0) * BU + tl.arange(0, BU)
    b = tile * BB + tl.arange(0, BB)
    own = (b[:, None] < B) & (units[None, :] < H)
    dtype = weight_ptr.dtype.element_ty

    weight_ptr += direction * G * H * K
    saved_ptr += direction * saved_direction
    h_ptr += direction * h_direction
    start_ptr += direction * B * H
    d_x_gates_ptr += direction * N * G * H
    d_h_gates_ptr += direction * N * G * H
    if HAS_GRAD:
        grad_ptr += direction * grad_direction
    if RESETS:
        resets_ptr += direction * N
    if PERSISTENT:
        counter_ptr = counters_ptr + d * tl.num_programs(1) + tile

    length = T
    if RAGGED and (RESIDENT or PERSISTENT):  # stepped: all tiles of a launch are at one time
        length = tl.load(lengths_ptr + tile * BB).to(tl.int32)
    end = tl.minimum(first + count, length)

    held = ()
    if HOLD:
        if RESIDENT:
            for g in tl.static_range(G):
                at = (g * H + units[:, None]) * K + units[None, :]
                held += (tl.load(weight_ptr + at, mask=(units[:, None] < H) & (units[None, :] < K), other=0),)
        else:
            for k in tl.static_range(NK):
                j = (k * 4 + tl.arange(0, 4)[:, None, None]) * BK + tl.arange(0, BK)[None, :, None]
                held += (_rows_of_weights(weight_ptr, j, units[None, None, :], G * H, K),)
    # Of the states after a step, but for what comes through the weights from steps that come later in time
    d_states = ()
    for s in tl.static_range(S):
        at = ((s * tl.num_programs(2) + direction) * B + b[:, None]) * H + units[None, :]
        d_states += (tl.load(d_states_ptr + at, mask=own, other=0),)

    for i in range(first, end):
        t = tl.where(d == 0, length - 1 - i, i)
        rows, size = _rows(offsets_ptr, t, b, B, RAGGED)
        active = b < size
        mask = active[:, None] & (units[None, :] < H)
        keep = active
        if RESETS:
            keep = active & (tl.load(resets_ptr + rows, mask=active, other=0) == 0)
        # The step before this one, in the order of the forward, is the next one of this loop
        before = tl.where(d == 0, t - 1, t + 1)
        sources, stored, starts = _sources(offsets_ptr, t, before, i + 1 < length, b, B, keep, RAGGED)
        saved = ()
        for k in tl.static_range(SAVED):
            at = rows[:, None] * saved_row + k * H + units[None, :]
            saved += (tl.load(saved_ptr + at, mask=mask, other=0).to(tl.float32),)
        from_stored = stored[:, None] & (units[None, :] < H)
        from_start = starts[:, None] & (units[None, :] < H)
        at_start = b.to(tl.int64)[:, None] * H + units[None, :]
        if READS_H:
            at = sources[:, None] * h_row + units[None, :]
            h = tl.load(h_ptr + at, mask=from_stored, other=0).to(tl.float32)
            h += tl.load(start_ptr + at_start, mask=from_start, other=0).to(tl.float32)
        else:
            h = tl.zeros([BB, BU], tl.float32)
        states = (h,)
        for s in tl.static_range(1, S):
            plane = (s - 1) * tl.num_programs(2) + direction
            at = (plane * N + sources[:, None]) * H + units[None, :]
            c = tl.load(cells_ptr + at, mask=from_stored, other=0)
            c += tl.load(cells0_ptr + plane * B * H + at_start, mask=from_start, other=0).to(tl.float32)
            states += (c,)
        d_h = d_states[0]
        if not RESIDENT and i > 0:
            if PERSISTENT:
                wait(counter_ptr, i * tl.num_programs(0))
            d_h = _through_weights(
                d_h, d_h_gates_ptr, resets_ptr, offsets_ptr, tl.where(d == 0, t + 1, t - 1), b, weight_ptr,
                held, units, B, H, K, G, RESETS, RAGGED, HOLD, BB, BU, BK, NK, PRECISION,
            )  # fmt: skip
        # Of rows that do not run in this step: not yet, or not any more
        resting = d_h
        if HAS_GRAD:
            at = rows[:, None] * grad_row + units[None, :]
            d_h += tl.load(grad_ptr + at, mask=mask, other=0).to(tl.float32)

        gradients = (d_h,)
        for s in tl.static_range(1, S):
            gradients += (d_states[s],)
        d_x, d_h_gates, d_before = BACKWARD(saved, states, gradients)
        for g in tl.static_range(G):
            at = rows[:, None] * (G * H) + g * H + units[None, :]
            tl.store(d_x_gates_ptr + at, d_x[g].to(dtype), mask=mask)
            if SPLIT:
                tl.store(d_h_gates_ptr + at, d_h_gates[g].to(dtype), mask=mask)
        d_h = d_before[0]
        if RESIDENT:
            for g in tl.static_range(G):
                d_h = tl.dot(d_h_gates[g].to(dtype), held[g], d_h, input_precision=PRECISION)
        merged = (tl.where(active[:, None], tl.where(keep[:, None], d_h, 0.0), resting),)
        for s in tl.static_range(1, S):
            d_s = tl.where(keep[:, None], d_before[s], 0.0)
            merged += (tl.where(active[:, None], d_s, d_states[s]),)
        d_states = merged
        if PERSISTENT:
            arrive(counter_ptr)

    if not RESIDENT and first + count > length and first <= length:
        if PERSISTENT:
            wait(counter_ptr, length * tl.num_programs(0))
        d_h = _through_weights(
            d_states[0], d_h_gates_ptr, resets_ptr, offsets_ptr, tl.where(d == 0, 0, length - 1), b,
            weight_ptr, held, units, B, H, K, G, RESETS, RAGGED, HOLD, BB, BU, BK, NK, PRECISION,
        )  # fmt: skip
        tl.store(d_states_ptr + (direction * B + b[:, None]) * H + units[None, :], d_h, mask=own)
    else:
        tl.store(d_states_ptr + (direction * B + b[:, None]) * H + units[None, :], d_states[0], mask=own)
    for s in tl.static_range(1, S):
        at = ((s * tl.num_programs(2) + direction) * B + b[:, None]) * H + units[None, :]
        tl.store(d_states_ptr + at, d_states[s], mask=own)
