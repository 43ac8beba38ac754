"""sum_h v_h tanh(q_h + k_h). Bahdanau et al. 2014, arXiv 1409.0473.

tanh(q + k) = s / (s + 2) = 1 - 2 / a with a = exp(2q) exp(2k) and s = a - 1: the exponentials belong to the
elements of q and k, not to their pairs, and terms share a reciprocal, as n / d + m / e = (n e + m d) / (d e).
Beyond 2^28 a is clamped, where tanh is 1 to the last place; a tile that holds a number whose exponential
may overflow, or a NaN, takes tanh itself.

fp32 keeps what rounding took from the exponentials, so that s is right where q + k is small, and makes them
of polynomials. fp16 and bf16 sum v / a, which is 1e-7 off there, with half the additions: nothing that a
storage type of 16 bits shows.
"""

import triton
import triton.language as tl

from ..math import exp_with_rest, reciprocal, tanh

_MOST = tl.constexpr(20.0)  # exp(2 * (20 + 20)) is a number
_ONE = tl.constexpr(2.0**28)  # four of them have a product


@triton.jit
def _any_large(x):
    """How many elements are beyond _MOST or no number."""
    return tl.sum((~(tl.abs(x.to(tl.float32)) <= _MOST)).to(tl.int32))


@triton.jit
def _are_small(q, k):
    large = 0
    for p in tl.static_range(4):
        large += _any_large(q[p]) + _any_large(k[p])
    return large == 0


@triton.jit
def _exp(x):
    """exp(2x)."""
    return tl.exp2(x.to(tl.float32) * 2.885390081777927)


@triton.jit
def _a(q, k):
    """1 + exp(2 (q + k)) of all pairs [BQ, BK, BD]."""
    return tl.minimum(_exp(q)[:, None, :] * _exp(k)[None, :, :] + 1, _ONE)


@triton.jit
def _s(q, k):
    """exp(2 (q + k)) - 1 of all pairs [BQ, BK, BD]."""
    if q.dtype == tl.float32:
        e_q, rest_q = exp_with_rest(q + q)
        e_k, rest_k = exp_with_rest(k + k)
        s = tl.fma(e_q[:, None, :], e_k[None, :, :], -1.0) + (rest_q[:, None, :] + rest_k[None, :, :])
    else:
        s = _exp(q)[:, None, :] * _exp(k)[None, :, :] - 1
    return tl.minimum(s, _ONE)


@triton.jit
def _tanh(q, k):
    return tanh(q.to(tl.float32)[:, None, :] + k.to(tl.float32)[None, :, :])


@triton.jit
def start(BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    return tl.zeros([BQ, BK, BD], tl.float32)


@triton.jit
def add(sums, q, k, v, PRECISION: tl.constexpr):
    """With v tanh(q + k), of fp16 and bf16 less v, which no softmax sees."""
    if _are_small(q, k):
        if q[0].dtype == tl.float32:
            for p in tl.static_range(0, 4, 2):
                s, t = _s(q[p], k[p]), _s(q[p + 1], k[p + 1])
                d, e = s + 2, t + 2
                sums += (v[p] * s * e + v[p + 1] * t * d) * reciprocal(d * e)
        else:
            a, b, c, d = _a(q[0], k[0]), _a(q[1], k[1]), _a(q[2], k[2]), _a(q[3], k[3])
            ab, cd = a * b, c * d
            n = (v[0] * b + v[1] * a) * cd + (v[2] * d + v[3] * c) * ab
            sums += n * (-2 * reciprocal(ab * cd))
    else:
        for p in tl.static_range(4):
            t = _tanh(q[p], k[p])
            if q[0].dtype == tl.float32:
                sums += v[p] * t
            else:
                sums += v[p] * (t - 1)
    return sums


@triton.jit
def finish(sums):
    return tl.sum(sums, 2)


@triton.jit
def _gradients(d_own, d_v, t, g):
    slope = 1 - t * t
    return d_own + tl.sum(g[:, :, None] * slope, 1), d_v + tl.sum(tl.sum(g[:, :, None] * t, 1), 0)


@triton.jit
def backward(d_own, d_v, own, other, g, PRECISION: tl.constexpr):
    a, b, c, d = d_own
    of_a, of_b, of_c, of_d = d_v
    if _are_small(own, other):
        s, t = _s(own[0], other[0]), _s(own[1], other[1])
        r = reciprocal((s + 2) * (t + 2))
        a, of_a = _gradients(a, of_a, s * (t + 2) * r, g)
        b, of_b = _gradients(b, of_b, t * (s + 2) * r, g)
        s, t = _s(own[2], other[2]), _s(own[3], other[3])
        r = reciprocal((s + 2) * (t + 2))
        c, of_c = _gradients(c, of_c, s * (t + 2) * r, g)
        d, of_d = _gradients(d, of_d, t * (s + 2) * r, g)
    else:
        a, of_a = _gradients(a, of_a, _tanh(own[0], other[0]), g)
        b, of_b = _gradients(b, of_b, _tanh(own[1], other[1]), g)
        c, of_c = _gradients(c, of_c, _tanh(own[2], other[2]), g)
        d, of_d = _gradients(d, of_d, _tanh(own[3], other[3]), g)
    return (a, b, c, d), (of_a, of_b, of_c, of_d)
