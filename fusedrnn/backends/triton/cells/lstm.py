"""The LSTM as in torch.nn.LSTM: gates i, f, g, o; states h, c."""

import triton
import triton.language as tl

from ..math import tanh


@triton.jit
def activate(x, h):
    return tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1]), tanh(x[2] + h[2]), tl.sigmoid(x[3] + h[3])


@triton.jit
def update(saved, states):
    i, f, g, o = saved
    c = f * states[1] + i * g
    return o * tanh(c), c


@triton.jit
def backward(saved, states, d):
    i, f, g, o = saved
    c = tanh(f * states[1] + i * g)
    d_c = d[1] + d[0] * o * (1 - c * c)
    d_i = d_c * g * i * (1 - i)
    d_f = d_c * states[1] * f * (1 - f)
    d_g = d_c * i * (1 - g * g)
    d_o = d[0] * c * o * (1 - o)
    gates = (d_i, d_f, d_g, d_o)
    return gates, gates, (tl.zeros_like(d_c), d_c * f)
