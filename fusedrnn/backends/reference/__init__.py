"""Every operation in plain torch: any device, any floating dtype, differentiable to any order.

It is the oracle in fp64, the composite behind double backward, jvp, and the path that
runs where no kernel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def unavailable() -> str | None:
    return None


@contextmanager
def autograd_on() -> Iterator[None]:
    """Record gradients also inside an operator's implementation, below the Autograd key."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
