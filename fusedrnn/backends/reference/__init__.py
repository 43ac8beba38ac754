"""Every operation in plain torch: any device, any floating dtype, differentiable to any order.

It is the oracle in fp64, the composite behind double backward, jvp, and the path that
runs where no kernel does.
"""


def unavailable() -> str | None:
    return None
