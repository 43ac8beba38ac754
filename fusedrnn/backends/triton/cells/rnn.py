"""The Elman cell as in torch.nn.RNN: h' = tanh(x + h), or relu(x + h)."""

import triton
import triton.language as tl

from ..math import tanh


@triton.jit
def tanh_activate(x, h):
    return (tanh(x[0] + h[0]),)


@triton.jit
def relu_activate(x, h):
    a = x[0] + h[0]
    return (tl.where(a < 0, 0.0, a),)  # NaN passes


@triton.jit
def update(saved, states):
    return (saved[0],)


@triton.jit
def tanh_backward(saved, states, d):
    a = d[0] * (1 - saved[0] * saved[0])
    return (a,), (a,), (tl.zeros_like(a),)


@triton.jit
def relu_backward(saved, states, d):
    a = tl.where(saved[0] > 0, d[0], 0.0)
    return (a,), (a,), (tl.zeros_like(a),)
