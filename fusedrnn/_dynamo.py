"""Let torch.compile trace the fused modules although they are `nn.LSTM` to isinstance.

Dynamo refuses every instance of nn.RNN, nn.LSTM and nn.GRU because it cannot trace torch's own
forward; ours is plain traceable code. The check sits in `VariableBuilder.wrap_module` and reads
one global flag, so for exactly the fused modules that method runs with the flag set; a stock
module in the same process meets the check as before.

Importing torch._dynamo costs seconds and nothing needs it before the first compile: the wrapper is
installed when dynamo is imported. If a torch version moves the method, torch.compile gives its
usual message for RNNs, and tests/test_compile.py goes red.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_BUILDER = "torch._dynamo.variables.builder"


def _install(builder: ModuleType, traceable: tuple[type, ...]) -> None:
    wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
    if wrap_module is None:
        return

    @functools.wraps(wrap_module)
    def wrapped(self: Any, value: Any) -> Any:
        if not isinstance(value, traceable):
            return wrap_module(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrapped


class _InstallOnImport(importlib.abc.MetaPathFinder):
    def __init__(self, traceable: tuple[type, ...]) -> None:
        self.traceable = traceable

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_install(module: ModuleType) -> None:
            exec_module(module)
            _install(module, self.traceable)

        spec.loader.exec_module = exec_and_install  # type: ignore[method-assign]
        return spec


def make_traceable(*modules: type) -> None:
    """Let dynamo trace instances of these nn.RNN, nn.LSTM or nn.GRU subclasses."""
    if _BUILDER in sys.modules:
        _install(sys.modules[_BUILDER], modules)
    else:
        sys.meta_path.insert(0, _InstallOnImport(modules))
