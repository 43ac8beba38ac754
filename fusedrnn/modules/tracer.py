"""torch.fx, told that fused modules are leaves as torch.nn's are."""

from __future__ import annotations

import torch.fx
from torch import nn

from .forward import Fused


class Tracer(torch.fx.Tracer):
    """``torch.fx.GraphModule(model, Tracer().trace(model))`` is symbolic_trace with fused leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Fused) or super().is_leaf_module(m, module_qualified_name)
