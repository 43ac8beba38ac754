"""The loops over tiles of every attend, forward and backward; scores are handed in, as a scan's cells are.

Forward: a program owns BQ queries of a head. It makes their scores, a tile of keys at a time, and with them
the softmax's maximum and sum; then the probabilities; then the context, a tile of values' columns at a time,
so that no size of anything has to fit. Additive scores of several queries come from a kernel of their own,
whose programs own a tile of pairs, so that there are enough of them; the context's own queries and columns.
What they store for themselves is [Tq, Tk]. Backward: the scores' gradients, again [Tq, Tk], by rows; then
those of queries and of keys, each by programs that own the rows, so that every sum has one order.
"""

import triton
import triton.language as tl

# Nothing is compiled for a number of heads, queries or keys.
ANY = ["N", "Tq", "Tk", "T_own", "T_other", "threshold", "seed"]


@triton.jit
def _place(T, N, B: tl.constexpr):
    """This program's head, sequence, and tile of B of T rows."""
    head, b, n, first = _first(tl.program_id(0), T, N, B)
    return head, b, n, first + tl.arange(0, B)


@triton.jit
def _first(tile, T, N, B: tl.constexpr):
    """A tile's head, sequence, and first of its B of T rows."""
    tiles = tl.cdiv(T, B)
    head = tile // tiles
    return head.to(tl.int64), (head // N).to(tl.int64), (head % N).to(tl.int64), (tile % tiles) * B


@triton.jit
def _keys(lengths_ptr, b, Tk):
    """How many keys a sequence has."""
    if lengths_ptr is None:
        return Tk
    else:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Tk).to(tl.int32)


@triton.jit
def _tile(ptr, rows, stride, T, columns, width):
    """Rows below T, columns below width; zeros beyond."""
    mask = (rows < T)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0)


@triton.jit
def _parts(x, PARTS: tl.constexpr):
    """Columns of a tile in four tensors: what a thread loads at once is one of each, and the order none's."""
    if PARTS == 1:
        return (x,)
    else:
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
        return tl.split(a) + tl.split(b)


@triton.jit
def _whole(parts):
    """What :func:`_parts` took apart in four."""
    x = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
    return tl.reshape(x, (x.shape[0], 4 * x.shape[1]))


@triton.jit
def _tiles(ptr, rows, stride, T, first, width, PARTS: tl.constexpr, BD: tl.constexpr):
    """PARTS tiles of the columns from a first one on."""
    return _parts(_tile(ptr, rows, stride, T, first + tl.arange(0, PARTS * BD), width), PARTS)


@triton.jit
def _ends(lengths_ptr, b, row, T_own, T_other, KEYS: tl.constexpr):
    """Before which of its own and of the others a program whose first row is `row` finds pairs."""
    if KEYS:
        own_end = _keys(lengths_ptr, b, T_own)
        return own_end, tl.where(row < own_end, T_other, 0)
    else:
        return T_own, _keys(lengths_ptr, b, T_other)


@triton.jit
def _square(i, j, Tq, Tk):
    """Where a tile lies in [Tq, Tk], and what of it is inside."""
    return i.to(tl.int64)[:, None] * Tk + j[None, :], (i < Tq)[:, None] & (j < Tk)[None, :]


@triton.jit
def _mix(x):
    """lowbias32, as in backends/reference/attend.py."""
    x = x ^ (x >> 16)
    x = tl.mul(x, 0x7FEB352D, sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, 0x846CA68B, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _keep(index, threshold, seed):
    """Which of the weights dropout keeps; the rule is in docs/architecture.md, "The attend"."""
    seed = seed.to(tl.int64)
    low = _mix(index.to(tl.uint32) ^ seed.to(tl.uint32))
    high = tl.mul((index >> 32).to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    high = tl.add(high, (seed >> 32).to(tl.uint32), sanitize_overflow=False)
    bits = _mix(tl.add(low, high, sanitize_overflow=False))
    return (bits >> 8).to(tl.int32) >= threshold


@triton.jit
def _masked(energies, mask_ptr, i, j, m_t, Tq, length):
    """With the mask, and -inf from the length on."""
    inside = (i < Tq)[:, None] & (j < length)[None, :]
    if mask_ptr is not None:
        at = i.to(tl.int64)[:, None] * m_t + j[None, :]
        mask = tl.load(mask_ptr + at, mask=inside, other=0)
        if mask_ptr.dtype.element_ty == tl.uint8:
            inside = inside & (mask != 0)
        else:
            energies += mask.to(tl.float32)
    return tl.where(inside, energies, -float("inf"))


@triton.jit
def _weights(energies_ptr, i, j, Tq, Tk, length, most, share):
    """The softmax's, of what a row has for its maximum and for one over its sum."""
    at, inside = _square(i, j, Tq, Tk)
    energies = tl.load(energies_ptr + at, mask=inside & (j < length)[None, :], other=-float("inf"))
    return tl.exp(energies - most[:, None]) * share[:, None]


@triton.jit
def _rows(ptr, first, stride, T, column, width, R: tl.constexpr, PARTS: tl.constexpr, BD: tl.constexpr):
    """R rows from a first one on, the last one instead of those beyond, in PARTS [1, BD] each."""
    columns = column + tl.arange(0, PARTS * BD)[None, :]
    found = ()
    for r in tl.static_range(R):
        row = ptr + tl.maximum(tl.minimum(first + r, T - 1), 0).to(tl.int64) * stride
        found += _parts(tl.load(row + columns, mask=columns < width, other=0), PARTS)
    return found


@triton.jit
def _side_by_side(x):
    """Of 2^n tensors [1, D] one [D, 2^n]."""
    COUNT: tl.constexpr = len(x)
    if COUNT == 1:
        return tl.reshape(x[0], (x[0].shape[1], x[0].numel // x[0].shape[1]))
    else:
        found = ()
        for i in tl.static_range(COUNT // 2):
            found += (tl.join(x[i], x[COUNT // 2 + i]),)
        return _side_by_side(found)


@triton.jit
def _columns(v_ptr, first, D, PARTS: tl.constexpr, BD: tl.constexpr):
    """v's in fp32, in parts as those of queries and keys; one beyond D, where queries and keys are zero."""
    if v_ptr is None:
        return ()
    else:
        columns = first + tl.arange(0, PARTS * BD)[None, :]
        return _parts(tl.load(v_ptr + columns, mask=columns < D, other=1).to(tl.float32), PARTS)


@triton.jit(do_not_specialize=ANY)
def attend_scores_fwd_kernel(
    query_ptr,  # [B, N, Tq, D], strides q_b, q_n, q_t, 1
    key_ptr,  # [B, N, Tk, D], strides k_b, k_n, k_t, 1
    v_ptr,  # [D]
    mask_ptr,  # [B, N, Tq, Tk], strides m_b, m_n, m_t, 1: uint8 or floating; or None
    lengths_ptr,  # [B] int64 or None
    energies_ptr,  # [B, N, Tq, Tk] fp32
    q_b, q_n, q_t, k_b, k_n, k_t, m_b, m_n, m_t,
    N, Tq, Tk, D,
    START: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(Tk, BK)
    head, b, n, query = _first(tl.program_id(0) // tiles, Tq, N, BQ)
    key = (tl.program_id(0) % tiles) * BK
    length = _keys(lengths_ptr, b, Tk)
    query_ptr += b * q_b + n * q_n
    key_ptr += b * k_b + n * k_n
    energies_ptr += head * Tq * Tk
    if mask_ptr is not None:
        mask_ptr += b * m_b + n * m_n

    sums = START(BQ * BK, 1, BD)
    for d in range(0, tl.where(key < length, D, 0), PARTS * BD):
        q = _rows(query_ptr, query, q_t, Tq, d, D, BQ, PARTS, BD)
        k = _rows(key_ptr, key, k_t, length, d, D, BK, PARTS, BD)
        v = _columns(v_ptr, d, D, PARTS, BD)
        sums = ADD(sums, q, k, v, Tq - query, length - key, None)
    i = query + tl.arange(0, BQ)
    for c in tl.static_range(BK):
        if key + c < length:
            j = key + c + tl.arange(0, 1)
            at, inside = _square(i, j, Tq, Tk)
            energies = tl.sum(_side_by_side(sums[c::BK]), 0)[:, None]
            energies = _masked(energies, mask_ptr, i, j, m_t, Tq, length)
            tl.store(energies_ptr + at, energies, mask=inside)


@triton.jit(do_not_specialize=ANY)
def attend_fwd_kernel(
    query_ptr,  # [B, N, Tq, D], strides q_b, q_n, q_t, 1; or None where energies are given
    key_ptr,  # [B, N, Tk, D], strides k_b, k_n, k_t, 1
    value_ptr,  # [B, N, Tk, Dv], strides u_b, u_n, u_t, 1
    v_ptr,  # [D] or None
    mask_ptr,  # [B, N, Tq, Tk], strides m_b, m_n, m_t, 1: uint8 or floating; or None
    lengths_ptr,  # [B] int64 or None
    energies_ptr,  # [B, N, Tq, Tk] fp32
    context_ptr,  # [B, N, Tq, Dv]
    weights_ptr,  # [B, N, Tq, Tk] or None
    probabilities_ptr,  # [B, N, Tq, Tk] fp32, before dropout; or None
    q_b, q_n, q_t, k_b, k_n, k_t, u_b, u_n, u_t, m_b, m_n, m_t,
    N, Tq, Tk, D, Dv,
    scale,
    threshold,  # of 24 random bits
    kept,  # 1 / (1 - dropout)
    seed,
    START: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
    PARTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,  # keys of a tile of scores
    BT: tl.constexpr,  # keys of a tile of weights
    BD: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    head, b, n, i = _place(Tq, N, BQ)
    length = _keys(lengths_ptr, b, Tk)
    value_ptr += b * u_b + n * u_n
    context_ptr += head * Tq * Dv
    energies_ptr += head * Tq * Tk
    dtype = context_ptr.dtype.element_ty

    most = tl.full([BQ], -float("inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    for first in range(0, length, BK):
        j = first + tl.arange(0, BK)
        at, inside = _square(i, j, Tq, Tk)
        if query_ptr is None:
            energies = tl.load(energies_ptr + at, mask=inside & (j < length)[None, :], other=-float("inf"))
        else:
            sums = START(BQ, BK, BD)
            for d in range(0, D, PARTS * BD):
                q = _tiles(query_ptr + b * q_b + n * q_n, i, q_t, Tq, d, D, PARTS, BD)
                k = _tiles(key_ptr + b * k_b + n * k_n, j, k_t, length, d, D, PARTS, BD)
                v = _columns(v_ptr, d, D, PARTS, BD)
                sums = ADD(sums, q, k, v, Tq, length - first, PRECISION)
            if mask_ptr is None:
                energies = _masked(FINISH(sums) * scale, None, i, j, m_t, Tq, length)
            else:
                energies = _masked(FINISH(sums) * scale, mask_ptr + b * m_b + n * m_n, i, j, m_t, Tq, length)
            tl.store(energies_ptr + at, energies, mask=inside)
        # of a row that has had no key yet, zero: -inf less -inf is none
        higher = tl.maximum(most, tl.max(energies, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(most - finite) + tl.sum(tl.exp(energies - finite[:, None]), 1)
        most = higher

    tl.debug_barrier()  # other threads read what these stored
    most = tl.where(most == -float("inf"), 0.0, most)
    share = tl.where(total == 0, 0.0, 1 / tl.where(total == 0, 1.0, total))
    for first in range(0, tl.where(tl.program_id(1) == 0, Tk, 0), BT):
        j = first + tl.arange(0, BT)
        at, inside = _square(i, j, Tq, Tk)
        weights = _weights(energies_ptr, i, j, Tq, Tk, length, most, share)
        if probabilities_ptr is not None:
            tl.store(probabilities_ptr + head * Tq * Tk + at, weights, mask=inside)
        if weights_ptr is not None:
            if DROPOUT:
                weights = tl.where(_keep(head * Tq * Tk + at, threshold, seed), weights * kept, 0.0)
            tl.store(weights_ptr + head * Tq * Tk + at, weights.to(dtype), mask=inside)

    for column in range(tl.program_id(1) * BV, Dv, tl.num_programs(1) * BV):
        columns = column + tl.arange(0, BV)
        context = tl.zeros([BQ, BV], tl.float32)
        for first in range(0, length, BT):
            j = first + tl.arange(0, BT)
            weights = _weights(energies_ptr, i, j, Tq, Tk, length, most, share)
            if DROPOUT:
                at, _ = _square(i, j, Tq, Tk)
                weights = tl.where(_keep(head * Tq * Tk + at, threshold, seed), weights * kept, 0.0)
            value = _tile(value_ptr, j, u_t, length, columns, Dv)
            context = tl.dot(weights.to(dtype), value, context, input_precision=PRECISION)
        at = i.to(tl.int64)[:, None] * Dv + columns[None, :]
        tl.store(context_ptr + at, context.to(dtype), mask=(i < Tq)[:, None] & (columns < Dv)[None, :])


@triton.jit(do_not_specialize=ANY)
def attend_scores_bwd_kernel(
    value_ptr,  # [B, N, Tk, Dv], strides u_b, u_n, u_t, 1
    lengths_ptr,  # [B] int64 or None
    probabilities_ptr,  # [B, N, Tq, Tk] fp32
    grad_context_ptr,  # [B, N, Tq, Dv], strides c_b, c_n, c_t, 1; or None
    grad_weights_ptr,  # [B, N, Tq, Tk], strides w_b, w_n, w_t, 1; or None
    d_scores_ptr,  # [B, N, Tq, Tk] fp32
    dropped_ptr,  # [B, N, Tq, Tk] fp32: the weights after dropout, if DROPOUT
    u_b, u_n, u_t, c_b, c_n, c_t, w_b, w_n, w_t,
    N, Tq, Tk, Dv,
    threshold,
    kept,
    seed,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    head, b, n, i = _place(Tq, N, BQ)
    length = _keys(lengths_ptr, b, Tk)
    value_ptr += b * u_b + n * u_n
    probabilities_ptr += head * Tq * Tk
    d_scores_ptr += head * Tq * Tk

    mean = tl.zeros([BQ], tl.float32)
    for first in range(0, Tk, BK):
        j = first + tl.arange(0, BK)
        at, inside = _square(i, j, Tq, Tk)
        probabilities = tl.load(probabilities_ptr + at, mask=inside, other=0)
        d_weights = tl.zeros([BQ, BK], tl.float32)
        if grad_context_ptr is not None:
            for column in range(0, tl.where(first < length, Dv, 0), BV):
                columns = column + tl.arange(0, BV)
                grad = _tile(grad_context_ptr + b * c_b + n * c_n, i, c_t, Tq, columns, Dv)
                value = _tile(value_ptr, j, u_t, length, columns, Dv)
                d_weights = tl.dot(grad, tl.trans(value), d_weights, input_precision=PRECISION)
        if grad_weights_ptr is not None:
            d_weights += _tile(grad_weights_ptr + b * w_b + n * w_n, i, w_t, Tq, j, Tk).to(tl.float32)
        if DROPOUT:
            keep = _keep(head * Tq * Tk + at, threshold, seed)
            d_weights = tl.where(keep, d_weights * kept, 0.0)
            dropped = tl.where(keep, probabilities * kept, 0.0)
            tl.store(dropped_ptr + head * Tq * Tk + at, dropped, mask=inside)
        mean += tl.sum(probabilities * d_weights, 1)
        tl.store(d_scores_ptr + at, d_weights, mask=inside)

    tl.debug_barrier()
    for first in range(0, Tk, BK):
        j = first + tl.arange(0, BK)
        at, inside = _square(i, j, Tq, Tk)
        probabilities = tl.load(probabilities_ptr + at, mask=inside, other=0)
        d_weights = tl.load(d_scores_ptr + at, mask=inside, other=0)
        tl.store(d_scores_ptr + at, probabilities * (d_weights - mean[:, None]), mask=inside)


@triton.jit(do_not_specialize=ANY)
def attend_rows_bwd_kernel(
    other_ptr,  # [B, N, T_other, D], strides other_b, other_n, other_t, 1: keys or queries
    lengths_ptr,  # [B] int64 or None
    g_ptr,  # [B, N, Tq, Tk] fp32
    d_own_ptr,  # [B, N, T_own, D]: of queries or keys
    other_b, other_n, other_t, g_own, g_other,
    N, T_own, T_other, D,
    scale,
    KEYS: tl.constexpr,  # whether own are keys
    PRECISION: tl.constexpr,
    BO: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Of a dot: sums over the others, weighted by the scores' gradients."""
    head, b, n, i = _place(T_own, N, BO)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    own_end, other_end = _ends(lengths_ptr, b, tl.min(i), T_own, T_other, KEYS)
    other_ptr += b * other_b + n * other_n
    g_ptr += head * T_own * T_other

    d_own = tl.zeros([BO, BD], tl.float32)
    for first in range(0, other_end, BT):
        j = first + tl.arange(0, BT)
        other = _tile(other_ptr, j, other_t, other_end, columns, D)
        at = i.to(tl.int64)[:, None] * g_own + j.to(tl.int64)[None, :] * g_other
        g = tl.load(g_ptr + at, mask=(i < own_end)[:, None] & (j < other_end)[None, :], other=0)
        d_own = tl.dot((g * scale).to(other.dtype), other, d_own, input_precision=PRECISION)
    at = (head * T_own + i)[:, None] * D + columns[None, :]
    inside = (i < T_own)[:, None] & (columns < D)[None, :]
    tl.store(d_own_ptr + at, d_own.to(d_own_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=ANY)
def attend_pairs_bwd_kernel(
    own_ptr,  # [B, N, T_own, D], strides own_b, own_n, own_t, 1: queries or keys
    other_ptr,  # [B, N, T_other, D], strides other_b, other_n, other_t, 1: keys or queries
    v_ptr,  # [D]
    lengths_ptr,  # [B] int64 or None
    g_ptr,  # [B, N, Tq, Tk] fp32, and room for BO rows more
    d_own_ptr,  # [B, N, T_own, D]
    d_v_ptr,  # [B, N, tiles of T_own, D] fp32 or None
    own_b, own_n, own_t, other_b, other_n, other_t,
    N, T_own, T_other, D,
    PREPARE: tl.constexpr,
    BACKWARD: tl.constexpr,
    CLOSE: tl.constexpr,
    PARTS: tl.constexpr,
    KEYS: tl.constexpr,  # whether own are keys
    BO: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    head, b, n, row = _first(tl.program_id(0), T_own, N, BO)
    column = tl.program_id(1) * PARTS * BD
    own_end, other_end = _ends(lengths_ptr, b, row, T_own, T_other, KEYS)
    other_ptr += b * other_b + n * other_n
    g_ptr += head * T_own * T_other + row.to(tl.int64) * (1 if KEYS else T_other)

    own = _rows(own_ptr + b * own_b + n * own_n, row, own_t, own_end, column, D, BO, PARTS, BD)
    prepared = PREPARE(own)
    d_own = ()
    d_v = ()
    for _ in tl.static_range(BO * PARTS):
        d_own += (tl.zeros([1, BD], tl.float32),)
    for _ in tl.static_range(PARTS):
        d_v += (tl.zeros([1, BD], tl.float32),)
    for first in range(0, other_end, BT):
        other = _rows(other_ptr, first, other_t, other_end, column, D, BT, PARTS, BD)
        j0 = first + tl.zeros([1, BD], tl.int32)  # the same for all columns
        g = ()
        for r in tl.static_range(BO):
            for j in tl.static_range(BT):
                at = (j0.to(tl.int64) + j) * T_own + r if KEYS else j0 + (r * T_other + j)
                g += (tl.load(g_ptr + at, mask=j0 + j < other_end, other=0),)
        d_own, d_v = BACKWARD(d_own, d_v, own, prepared, other, g, own_end - row, d_v_ptr is not None)

    v = _columns(v_ptr, column, D, PARTS, BD)
    columns = column + tl.arange(0, PARTS * BD)[None, :]
    for r in tl.static_range(BO):
        row_sums = d_own[r * PARTS : r * PARTS + PARTS]
        made, of_v = CLOSE(row_sums, d_v, v, own_ptr.dtype.element_ty == tl.float32)
        i = row + r + tl.arange(0, 1)[:, None]
        inside = (i < T_own) & (columns < D)
        at = (head * T_own + i) * D + columns
        tl.store(d_own_ptr + at, _whole(made).to(d_own_ptr.dtype.element_ty), mask=inside)
        if d_v_ptr is not None and r == 0:
            tl.store(d_v_ptr + tl.program_id(0).to(tl.int64) * D + columns, _whole(of_v), mask=columns < D)
