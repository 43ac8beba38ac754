"""tanh of the gates in fp32, right where it saturates and where it vanishes."""

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
