"""Send torch's own recurrent operators to the fused kernels, whoever calls them.

Every recurrent module of torch.nn, every TorchScript file and every direct call ends in the same
twelve operators, ``aten::lstm`` and its kin. :func:`enable` registers kernels for them with the
dispatcher, :func:`disable` takes them back; no model and no type is touched.

Only plain eager calls on CPU tensors are taken. All others, and all that no kernel knows, run the
kernel that torch had there before: tracing, exporting, function transforms, tensor subclasses and
dispatch modes see what they saw before.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

from . import functional
from .backends import select

_aten = torch.ops.aten
# operator -> (cell, what runs instead)
_OPERATORS: dict[torch._ops.OpOverload, tuple[str, Callable[..., Any]]] = {
    _aten.lstm.input: ("lstm", functional.lstm),
    _aten.lstm.data: ("lstm", functional.lstm),
    _aten.gru.input: ("gru", functional.gru),
    _aten.gru.data: ("gru", functional.gru),
    _aten.rnn_tanh.input: ("rnn_tanh", functional.rnn_tanh),
    _aten.rnn_tanh.data: ("rnn_tanh", functional.rnn_tanh),
    _aten.rnn_relu.input: ("rnn_relu", functional.rnn_relu),
    _aten.rnn_relu.data: ("rnn_relu", functional.rnn_relu),
    _aten.lstm_cell.default: ("lstm", functional.lstm_cell),
    _aten.gru_cell.default: ("gru", functional.gru_cell),
    _aten.rnn_tanh_cell.default: ("rnn_tanh", functional.rnn_tanh_cell),
    _aten.rnn_relu_cell.default: ("rnn_relu", functional.rnn_relu_cell),
}

# AutogradCPU sees every call outside inference mode, BackendSelect those inside. A kernel under CPU
# would see the latter too, but torch's tracers take an operator with a CPU kernel for one that they
# must not decompose.
_KEYS = ("AutogradCPU", "BackendSelect")
_EAGER_CPU = DispatchKeySet(DispatchKey.CPU) | DispatchKeySet(DispatchKey.BackendSelect)
# Any further key in a call's set is a wrapper tensor, a mode, a function transform or another layout.
_PLAIN = frozenset({_EAGER_CPU.raw_repr(), (_EAGER_CPU | DispatchKeySet(DispatchKey.AutogradCPU)).raw_repr()})


class _Thread(threading.local):
    inside = False  # functional hands calls over to torch, which arrive here again


_thread = _Thread()


def _takes(keys: DispatchKeySet, cell: str, input: torch.Tensor) -> bool:
    return (
        keys.raw_repr() in _PLAIN
        and not _thread.inside
        and torch._C._get_tracing_state() is None
        # torch's output dtypes under autocast differ by cell and layout; ours are one rule
        and not torch.is_autocast_enabled("cpu")
        and (select.requested() is not None or not select.no_kernel(select.Request(cell, input.dtype, "cpu")))
    )


def _kernel(operator: torch._ops.OpOverload, cell: str, fused: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(keys: DispatchKeySet, *args: Any) -> Any:
        if _takes(keys, cell, args[0]):
            _thread.inside = True
            try:
                return fused(*args)
            finally:
                _thread.inside = False
        if keys.has(DispatchKey.PythonDispatcher):
            return operator.decompose(*args)
        return operator._op_dk(DispatchKey.CompositeImplicitAutograd, *args)

    # Dynamo must not compile Python that the dispatcher calls in between two of its graphs.
    # torch.compiler.disable says the same, but imports torch._dynamo, which takes seconds.
    set_code_exec_strategy(kernel.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return kernel


_lock = threading.Lock()
_count = 0
_library: torch.library.Library | None = None


def _switch(change: int) -> None:
    """Count up or down; (un)register at the borders."""
    global _count, _library
    with _lock:
        before, _count = _count, max(0, _count + change)
        if bool(before) == bool(_count):
            return
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
            for operator, (cell, fused) in _OPERATORS.items():
                for key in _KEYS:
                    _library.impl(operator, _kernel(operator, cell, fused), key, with_keyset=True)
        else:
            _library._destroy()
            _library = None
        for operator in _OPERATORS:
            operator._dispatch_cache.clear()  # which kernel the Python dispatcher found for a key


class enable:
    """Run torch's own recurrent operators on the fused kernels, in code that nobody can edit.

    ::

        fusedrnn.enable()              # from here on, until fusedrnn.disable()
        with fusedrnn.enable():        # or for a while
            y = torch.jit.load("model.pt")(x)
        @fusedrnn.enable()             # or in every call of a function
        def predict(x): ...

    Takes effect at once, for all threads; calls are counted, and the last :func:`disable` or the
    end of the last ``with`` restores torch's kernels. Switch while no other thread is inside a
    recurrent module: the dispatcher's table is not guarded against that. A process that is
    spawned, not forked, has to call it again. Activation checkpointing needs it enabled until
    after ``backward()``, because the recomputation must take the path of the forward.

    What has no fused kernel runs on torch's own, silently, unless :func:`use_backend` asks for a
    backend by name; so does everything that is not a plain eager call on CPU tensors: autocast,
    ``torch.func``, tensor subclasses, fake and meta tensors, dispatch modes, export.
    """

    def __init__(self) -> None:
        _switch(1)

    def __enter__(self) -> enable:
        return self

    def __exit__(self, *exc: Any) -> None:
        disable()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        disable()  # building the decorator has enabled already

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with enable():
                return function(*args, **kwargs)

        return wrapper


def disable() -> None:
    """Undo one :func:`enable`; the last one restores torch's kernels. Without one, do nothing."""
    _switch(-1)
