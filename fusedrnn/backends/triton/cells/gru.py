"""The GRU as in torch.nn.GRU: gates r, z, n; the reset gate is applied after the recurrent product."""

import triton
import triton.language as tl

from ..math import tanh


@triton.jit
def activate(x, h):
    r = tl.sigmoid(x[0] + h[0])
    z = tl.sigmoid(x[1] + h[1])
    return r, z, tanh(x[2] + r * h[2]), h[2]


@triton.jit
def update(saved, states):
    _r, z, n, _h_n = saved
    return ((1 - z) * n + z * states[0],)


@triton.jit
def backward(saved, states, d):
    r, z, n, h_n = saved
    d_n = d[0] * (1 - z) * (1 - n * n)
    d_r = d_n * h_n * r * (1 - r)
    d_z = d[0] * (states[0] - n) * z * (1 - z)
    return (d_r, d_z, d_n), (d_r, d_z, d_n * r), (d[0] * z,)
