"""Triton's interpreter, set right: import this before launching a kernel on a machine without a GPU.

Triton 3.6 to 3.9 interpret bfloat16 as the integers that store it: tl.dot, arithmetic, comparisons and
reductions are silently wrong, conversions truncate. Importing this module mends that, and:

* lanes that a masked load leaves without ``other`` are NaN, since the language calls them undefined;
* a 32-bit offset that overflows raises, instead of addressing other memory;
* a fused multiply-add rounds once;
* ``range`` takes a kernel's argument under Triton 3.6 and NumPy 2.4;
* a jit function that a kernel calls costs no longer ten times its work.

What stays different from a GPU: fp32 products are exact whatever ``input_precision`` says, Python integers
(loop counters) divide and wrap as Python's do, a program's own threads never race, and inline assembly but
for a reciprocal, libdevice and bf16 atomics raise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED: bool = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"

Handle = interpreter.TensorHandle


def _widen(handle: Any) -> Any:
    """A bf16 handle as the fp32 handle of the same values; anything else as it is."""
    if not isinstance(handle, Handle) or handle.dtype.scalar != tl.bfloat16:
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(handle: Any) -> Any:
    """An fp32 handle rounded to nearest even in bf16."""
    values = torch.from_numpy(np.array(handle.data, dtype=np.float32))
    return Handle(values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), tl.bfloat16)


def _through_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of the builder whose result has the type of its last operand, as all of them have."""

    @functools.wraps(method)
    def through(self: Any, *args: Any) -> Any:
        operands = [arg for arg in args if isinstance(arg, Handle)]
        result = method(self, *map(_widen, args))
        if operands[-1].dtype.scalar != tl.bfloat16:
            return result
        if result.data.dtype == np.float32:
            return _narrow(result)
        return Handle(result.data, tl.bfloat16)  # a comparison: booleans, and the type of what it compared

    return through


def _cast(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def cast(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        if target.scalar == tl.bfloat16:
            return _narrow(_widen(source))
        if source.dtype.scalar == tl.bfloat16:
            data = _widen(source).data.astype(interpreter._get_np_dtype(target))
            return Handle(data, target.scalar)
        return method(self, source, target, *rounding)

    return cast


def _reduce(method: Callable[..., Any]) -> Callable[..., Any]:
    """Reductions and scans of tuples of tensors, each result in the type of its operand."""

    def convert(tensor: Any, handle: Any) -> Any:
        return tl.tensor(handle, tensor.type.with_element_ty(handle.dtype) if tensor.shape else handle.dtype)

    @functools.wraps(method)
    def reduce(self: Any, operands: Any) -> Any:
        if not isinstance(operands, tuple):
            return method(self, operands)  # which calls itself with a tuple
        results = method(self, tuple(convert(x, _widen(x.handle)) for x in operands))
        return tuple(
            convert(result, _narrow(result.handle))
            if operand.dtype == tl.bfloat16 and result.dtype == tl.float32
            else result
            for operand, result in zip(operands, results)
        )

    return reduce


def _masked_load(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *hints: Any, **named: Any) -> Any:
        element = pointers.get_element_ty()
        if other is None and element.is_floating():
            dtype = interpreter._get_np_dtype(element)
            nan = np.full(1, 0x7FC0, dtype) if element == tl.bfloat16 else np.full(1, np.nan, dtype)
            other = Handle(np.broadcast_to(nan, pointers.data.shape), element)
        return method(self, pointers, mask, other, *hints, **named)

    return masked_load


def _patch_language_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton patches its language anew for every jit function that is called; once a launch is enough."""
    patched: set[int] = set()

    @functools.wraps(patch)
    def patch_language(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return None  # the caller of a called function drops it; a launch always finds the set empty
        scope = patch(fn)
        patched.add(id(fn.__globals__))
        restore = scope.restore

        def restore_all() -> None:
            patched.clear()
            restore()

        scope.restore = restore_all
        return scope

    return patch_language


def _patch_tensor(patch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(patch)
    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_tensor


def _inline_asm(
    self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
) -> SimpleNamespace:
    """The one instruction that a kernel here names."""
    if text != "rcp.approx.ftz.f32 $0, $1;":
        raise NotImplementedError(f"inline assembly {text!r}")
    handle = Handle(np.reciprocal(values[0].data), tl.float32)
    return SimpleNamespace(get_result=lambda i: handle)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """With one rounding, as a GPU has it: in 64 bits a product of two floats is exact."""
    found = x.data.astype(np.float64) * y.data + z.data
    return Handle(found.astype(x.data.dtype), x.dtype)


def _install() -> None:
    builder = interpreter.InterpreterBuilder
    builder.create_fma = _fma
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
        setattr(builder, name, _through_fp32(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    builder.create_inline_asm = _inline_asm
    builder.create_masked_load = _masked_load(builder.create_masked_load)
    builder.get_bf16 = lambda self, value: _narrow(self.get_fp32(value))
    # checks of overflow are part of a debug build; the splits of fp32 products exist for CUDA alone
    shared = interpreter.interpreter_builder
    precisions = (*shared.options.allowed_dot_input_precisions, "bf16x3", "bf16x6")
    shared.options = dataclasses.replace(shared.options, debug=True, allowed_dot_input_precisions=precisions)
    interpreter.ReduceScanOpInterface.apply = _reduce(interpreter.ReduceScanOpInterface.apply)
    interpreter._patch_lang = _patch_language_once(interpreter._patch_lang)
    interpreter._patch_lang_tensor = _patch_tensor(interpreter._patch_lang_tensor)


if INTERPRETED:
    _install()
