"""torch.nn's own forward methods, with fusedrnn.functional where they call ``torch._VF``.

Checks, error texts and quirks are therefore those of the installed torch, by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

# What the borrowed code looks up by name; tests/test_modules.py checks that nothing is missing.
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence  # noqa: F401

from .. import functional as _VF  # noqa: F401
from ..backends import native


def borrowed(forward: Callable[..., Any]) -> Any:
    """The code of a method of torch.nn.modules.rnn, looking its global names up in this file."""
    assert isinstance(forward, FunctionType)
    return FunctionType(
        forward.__code__, globals(), forward.__name__, forward.__defaults__, forward.__closure__
    )


class Fused(nn.Module):
    """A module that torch.jit.script takes for its last base class, which is torch's."""

    def __prepare_scriptable__(self) -> nn.Module:
        stock = type(self).__bases__[-1]
        if not stock.__module__.startswith("torch.nn.modules."):
            return self  # a user's subclass, or a parametrized one: theirs to script
        shared = copy.copy(self)
        shared.__class__ = stock
        return shared

    # torch.utils.swap_tensors refuses what there are weak references to, which tell of a weight's end.

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._let_go()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._let_go()
        super()._load_from_state_dict(*args, **kwargs)

    def _let_go(self) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():
            native.forget(self._parameters.values())
