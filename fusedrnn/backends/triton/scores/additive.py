"""sum_h v_h tanh(q_h + k_h). Bahdanau et al. 2014, arXiv 1409.0473.

tanh(q + k) = s / (s + 2) = 1 - 2 / a with a = exp(2q) exp(2k) + 1 and s = a - 2: the exponentials belong to
the elements of q and k, not to their pairs, and terms share a reciprocal.

fp16 and bf16 sum -2v / a, which is 1e-7 off tanh near zero: nothing that a storage type of 16 bits shows.
With w = -1 / 2v, which belongs to an element too, -2v / a = 1 / (w a), w a = exp(2q) (w exp(2k)) + w: four
terms take twelve instructions: n / m + 1 / e = (n e + m) / (m e). The product of four is a number where the
largest q and k of its columns say so; elsewhere each pair has its own exponential of q + k and reciprocal.

fp32 keeps what rounding took from the exponentials, so that s is right where q + k is small, and makes them
of polynomials; two terms share a reciprocal, n / d + m / e = (n e + m d) / (d e), where |q| + |k| is small
enough for all pairs, and else tanh is taken itself.
"""

import triton
import triton.language as tl

from ..math import exp_with_rest, reciprocal, tanh

_SCALE = tl.constexpr(2.885390081777927)  # exp2(x * it) = exp(2x)
_LARGE = tl.constexpr(22.0)  # what vanishes below 2^-126 does not count after a product with exp(2 * it)
_SHARED = tl.constexpr(2.0**125)  # a larger product's reciprocal vanishes
_LEAST = tl.constexpr(2.0**-30)  # of |2v|: no softmax sees the difference
_FAR = tl.constexpr(16.0)  # exp(4 * it) v is a number


@triton.jit
def _exp(x):
    """exp(2x)."""
    return tl.exp2(x.to(tl.float32) * _SCALE)


@triton.jit
def _most(rows, p: tl.constexpr, ABSOLUTE: tl.constexpr):
    """The largest of each column of part p of several rows."""
    most = tl.abs(rows[p]) if ABSOLUTE else rows[p]
    for r in tl.static_range(p + 4, len(rows), 4):
        most = tl.maximum(most, tl.abs(rows[r]) if ABSOLUTE else rows[r])
    return most


@triton.jit
def start(PAIRS: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums += (tl.zeros([BK, BD], tl.float32),)
    return sums


@triton.jit
def add(sums, q, k, v, queries, keys, PRECISION: tl.constexpr):
    """With v tanh(q + k), of fp16 and bf16 less v, which no softmax sees."""
    if k[0].dtype == tl.float32:
        if not _all_near(q, k):
            sums = _rows(sums, _itself, _far, q, k, v, queries, keys)
        elif len(sums) == 1:
            sums = (_near_step(sums[0], q, k, v),)
        else:
            of_k = ()
            for j in tl.static_range(len(k)):
                of_k += exp_with_rest(k[j] + k[j])
            sums = _rows(sums, _exp_with_rest, _near, q, of_k, v, queries, keys)
    elif len(sums) == 1:
        sums = (_shared_step(sums[0], q, k, v),)
    elif _may_share(q, k, v):
        w = ()
        for p in tl.static_range(4):
            w += (_inverse(v[p]),)
        of_k = ()
        for j in tl.static_range(len(k)):
            of_k += (_exp(k[j]) * w[j % 4],)
        sums = _rows(sums, _exp_alone, _shared, q, of_k, w, queries, keys)
    else:
        sums = _rows(sums, _itself, _alone, q, k, v, queries, keys)
    return sums


@triton.jit
def _rows(sums, ELEMENT: tl.constexpr, PAIR: tl.constexpr, q, k, v, queries, keys):
    """A branch around a query's pairs skips those of none.

    It also keeps ptxas from beginning all pairs of a tile at once, which takes more registers than there are.
    """
    KEYS: tl.constexpr = len(sums) // (len(q) // 4)
    found = ()
    for i in tl.static_range(0, len(q), 4):
        row = sums[len(found) : len(found) + KEYS]
        if i // 4 < queries:
            row = _row(row, ELEMENT, PAIR, q[i : i + 4], k, v, keys)
        found += row
    return found


@triton.jit
def _row(row, ELEMENT: tl.constexpr, PAIR: tl.constexpr, q, k, v, keys):
    of_q = ()
    for p in tl.static_range(4):
        of_q += ELEMENT(q[p])
    HALF: tl.constexpr = (len(row) + 1) // 2
    SIZE: tl.constexpr = len(k) // len(row)
    first = _pairs(row[:HALF], PAIR, of_q, k[: HALF * SIZE], v)
    if len(row) > HALF:
        second = row[HALF:]
        if keys > HALF:
            second = _pairs(second, PAIR, of_q, k[HALF * SIZE :], v)
        first += second
    return first


@triton.jit
def _pairs(row, PAIR: tl.constexpr, q, k, v):
    SIZE: tl.constexpr = len(k) // len(row)
    found = ()
    for j in tl.static_range(len(row)):
        found += (PAIR(row[j], q, k[j * SIZE : j * SIZE + SIZE], v),)
    return found


@triton.jit
def _exp_alone(x):
    return (_exp(x),)


@triton.jit
def _exp_with_rest(x):
    return exp_with_rest(x + x)


@triton.jit
def _itself(x):
    return (x.to(tl.float32),)


@triton.jit
def _inverse(v):
    """-1 / 2v."""
    factor = -2 * v
    return reciprocal(tl.where(tl.abs(factor) < _LEAST, _LEAST, factor))


@triton.jit
def _may_share(q, k, v):
    product = tl.full(k[0].shape, 1.0, tl.float32)
    large = product
    for p in tl.static_range(4):
        of_q = _most(q, p, False).to(tl.float32)
        of_k = _most(k, p, False).to(tl.float32)
        w = tl.abs(_inverse(v[p]))
        product *= _exp(of_q + of_k) * w + w
        # the product of four w does not vanish either
        large = tl.maximum(tl.maximum(large, tl.abs(v[p]) * 2.0**-20), tl.maximum(of_q, of_k))
    return _all_below(large, product)


@triton.jit
def _all_below(large, product):
    return tl.max(tl.where((large <= _LARGE) & (product <= _SHARED), 0, 1)) == 0


@triton.jit
def _shared(total, q, k, w):
    m = q[0] * k[0] + w[0]
    e = q[1] * k[1] + w[1]
    n, m = m + e, m * e
    for p in tl.static_range(2, 4):
        e = q[p] * k[p] + w[p]
        n, m = n * e + m, m * e
    return total + n * reciprocal(m)


@triton.jit
def _shared_step(total, q, k, v):
    """Of one query, whose pairs are as many as its keys' elements: so are exponentials of q + k."""
    e = ()
    m = tl.full(k[0].shape, 1.0, tl.float32)
    n = tl.zeros(k[0].shape, tl.float32)
    for p in tl.static_range(4):
        e += (_exp(q[p].to(tl.float32) + k[p].to(tl.float32)),)
        w = _inverse(v[p])
        factor = e[p] * w + w
        n, m = n * factor + m, m * factor
    size = tl.abs(m)
    if tl.max(tl.where((size <= _SHARED) & (size >= 1 / _SHARED), 0, 1)) == 0:
        total += n * reciprocal(m)
    else:
        for p in tl.static_range(4):
            total += -2 * v[p] * reciprocal(1 + e[p])
    return total


@triton.jit
def _alone(total, q, k, v):
    for p in tl.static_range(4):
        total += -2 * v[p] * reciprocal(1 + _exp(q[p] + k[p].to(tl.float32)))
    return total


@triton.jit
def _all_near(q, k):
    far = _most(q, 0, True) + _most(k, 0, True)
    for p in tl.static_range(1, 4):
        far = tl.maximum(far, _most(q, p, True) + _most(k, p, True))
    return tl.max(far) <= _FAR


@triton.jit
def _s(e_q, rest_q, e_k, rest_k):
    """exp(2 (q + k)) - 1."""
    return tl.fma(e_q, e_k, -1.0) + (rest_q + rest_k)


@triton.jit
def _near(total, q, k, v):
    """q and k: four exponentials, each with what its rounding took."""
    return _near_two(_near_two(total, q[:4], k[:4], v[0], v[1]), q[4:], k[4:], v[2], v[3])


@triton.jit
def _near_two(total, q, k, v, w):
    s, t = _s(q[0], q[1], k[0], k[1]), _s(q[2], q[3], k[2], k[3])
    d, e = s + 2, t + 2
    return total + (v * s * e + w * t * d) * reciprocal(d * e)


@triton.jit
def _near_step(total, q, k, v):
    """Of one query: no other one needs its keys' exponentials."""
    for p in tl.static_range(0, 4, 2):
        of_q = _exp_with_rest(q[p]) + _exp_with_rest(q[p + 1])
        of_k = _exp_with_rest(k[p]) + _exp_with_rest(k[p + 1])
        total = _near_two(total, of_q, of_k, v[p], v[p + 1])
    return total


@triton.jit
def _far(total, q, k, v):
    for p in tl.static_range(4):
        total += v[p] * tanh(q[p] + k[p])
    return total


@triton.jit
def finish(sums):
    return tl.sum(sums[0], 1)[None, :]


@triton.jit
def prepare(own):
    """What the pairs of a row share: its exponentials and the largest of each column."""
    elements = ()
    for r in tl.static_range(len(own)):
        if own[r].dtype == tl.float32:
            elements += exp_with_rest(own[r] + own[r])
        else:
            elements += _exp_alone(own[r])
    most = ()
    for p in tl.static_range(4):
        most += (_most(own, p, own[p].dtype == tl.float32).to(tl.float32),)
    return elements, most


@triton.jit
def backward(d_own, d_v, own, prepared, other, g, owns, NEEDS_V: tl.constexpr):
    of_own, most = prepared
    if other[0].dtype == tl.float32:
        far = most[0] + _most(other, 0, True)
        for p in tl.static_range(1, 4):
            far = tl.maximum(far, most[p] + _most(other, p, True))
        if tl.max(far) <= _FAR:
            of_other = ()
            for j in tl.static_range(len(other)):
                of_other += exp_with_rest(other[j] + other[j])
            d_own, d_v = _rows_bwd(d_own, d_v, _near_bwd, of_own, of_other, g, owns, NEEDS_V)
        else:
            d_own, d_v = _rows_bwd(d_own, d_v, _far_bwd, own, other, g, owns, NEEDS_V)
    else:
        product = tl.full(most[0].shape, 1.0, tl.float32)
        large = product
        for p in tl.static_range(4):
            of_other = _most(other, p, False).to(tl.float32)
            product *= _exp(most[p] + of_other) + 1
            large = tl.maximum(large, tl.maximum(most[p], of_other))
        if _all_below(large, product):
            elements = ()
            for j in tl.static_range(len(other)):
                elements += _exp_alone(other[j])
            d_own, d_v = _rows_bwd(d_own, d_v, _shared_bwd, of_own, elements, g, owns, NEEDS_V)
        else:
            d_own, d_v = _rows_bwd(d_own, d_v, _alone_bwd, own, other, g, owns, NEEDS_V)
    return d_own, d_v


@triton.jit
def _rows_bwd(d_own, d_v, PAIR: tl.constexpr, own, other, g, owns, NEEDS_V: tl.constexpr):
    OTHERS: tl.constexpr = len(g) // (len(d_own) // 4)
    SIZE: tl.constexpr = len(other) // OTHERS
    found = ()
    for r in tl.static_range(len(d_own) // 4):
        row = d_own[4 * r : 4 * r + 4]
        if r < owns:
            of_row = own[SIZE * r : SIZE * r + SIZE]
            for j in tl.static_range(OTHERS):
                of_other = other[SIZE * j : SIZE * j + SIZE]
                row, d_v = PAIR(row, d_v, of_row, of_other, g[OTHERS * r + j], NEEDS_V)
        found += row
    return found, d_v


@triton.jit
def _shared_bwd(row, d_v, own, other, g, NEEDS_V: tl.constexpr):
    a, b, c, d = own[0] * other[0] + 1, own[1] * other[1] + 1, own[2] * other[2] + 1, own[3] * other[3] + 1
    ab, cd = a * b, c * d
    r = reciprocal(ab * cd)
    of_ab, of_cd = r * cd, r * ab
    return _by_reciprocals(row, d_v, (of_ab * b, of_ab * a, of_cd * d, of_cd * c), g, NEEDS_V)


@triton.jit
def _alone_bwd(row, d_v, own, other, g, NEEDS_V: tl.constexpr):
    r = ()
    for p in tl.static_range(4):
        r += (reciprocal(1 + _exp(own[p].to(tl.float32) + other[p].to(tl.float32))),)
    return _by_reciprocals(row, d_v, r, g, NEEDS_V)


@triton.jit
def _by_reciprocals(row, d_v, r, g, NEEDS_V: tl.constexpr):
    """tanh = 1 - 2r, its slope 4 (r - r^2), and the g of a query have no sum."""
    found = ()
    of_v = ()
    for p in tl.static_range(4):
        found += (row[p] + g * (r[p] - r[p] * r[p]),)
        of_v += (d_v[p] + g * r[p] if NEEDS_V else d_v[p],)
    return found, of_v


@triton.jit
def _near_bwd(row, d_v, own, other, g, NEEDS_V: tl.constexpr):
    tanhs = ()
    for p in tl.static_range(0, 4, 2):
        s = _s(own[2 * p], own[2 * p + 1], other[2 * p], other[2 * p + 1])
        t = _s(own[2 * p + 2], own[2 * p + 3], other[2 * p + 2], other[2 * p + 3])
        r = reciprocal((s + 2) * (t + 2))
        tanhs += (s * (t + 2) * r, t * (s + 2) * r)
    return _by_tanhs(row, d_v, tanhs, g, NEEDS_V)


@triton.jit
def _far_bwd(row, d_v, own, other, g, NEEDS_V: tl.constexpr):
    tanhs = ()
    for p in tl.static_range(4):
        tanhs += (tanh(own[p] + other[p]),)
    return _by_tanhs(row, d_v, tanhs, g, NEEDS_V)


@triton.jit
def _by_tanhs(row, d_v, t, g, NEEDS_V: tl.constexpr):
    found = ()
    of_v = ()
    for p in tl.static_range(4):
        found += (row[p] + g * (1 - t[p] * t[p]),)
        of_v += (d_v[p] + g * t[p] if NEEDS_V else d_v[p],)
    return found, of_v


@triton.jit
def close(d_own, d_v, v, EXACT: tl.constexpr):
    """The gradients of a row and of v in four parts each, of what `backward` has added up."""
    row = ()
    of_v = ()
    for p in tl.static_range(4):
        row += (d_own[p] * v[p] if EXACT else 4 * d_own[p] * v[p],)
        of_v += (d_v[p] if EXACT else -2 * d_v[p],)
    return row, of_v
