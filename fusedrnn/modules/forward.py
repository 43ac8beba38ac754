"""torch.nn's own forward methods, with fusedrnn.functional where they call ``torch._VF``.

Checks, error texts and quirks are therefore those of the installed torch, by construction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType
from typing import Any

# What the borrowed code looks up by name; tests/test_modules.py checks that nothing is missing.
import torch  # noqa: F401
from torch import nn
from torch.nn.utils.rnn import PackedSequence  # noqa: F401

from .. import functional as _VF  # noqa: F401


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
