"""Functions of fp32 that the cells and scores share: right where they saturate and where they vanish."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Polynomial of Cephes' tanhf near zero, where (1 - t) / (1 + t) would cancel; t never overflows."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    t = tl.exp(-2 * tl.abs(x))
    far = 1 - 2 * t / (1 + t)
    return tl.where(z < 0.39, near, tl.where(x < 0, -far, far))


@triton.jit
def reciprocal(x):
    """1 / x of normal numbers to one unit in the last place: one instruction; a division takes eight."""
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp_with_rest(x):
    """exp(x) for |x| up to 80, and what its rounding took away, relative to it.

    Cephes' expf, which uses no special function.
    """
    n = tl.floor(x * 1.44269504088896341 + 0.5)
    f = (x - n * 0.693359375) + n * 2.12194440e-4
    p = ((1.9875691500e-4 * f + 1.3981999507e-3) * f + 8.3334519073e-3) * f + 4.1665795894e-2
    p = ((p * f + 1.6666665459e-1) * f + 5.0000001201e-1) * (f * f) + f
    e = 1 + p
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return e * power, ((1 - e) + p) * (1 - p + p * p)  # about 1 / e
