"""What more than one test file needs."""

import pytest

import fusedrnn
from fusedrnn import ops
from fusedrnn.backends import select


@pytest.fixture
def fused():
    """A backend for every call, asked for by name: what fits no kernel would be an error."""
    native = select.get("native").unavailable() is None
    with fusedrnn.use_backend("native" if native else "reference"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The backend of every layer that our own operators ran."""
    seen = []
    layer = ops.layer

    def spy(*args):
        seen.append(args[-1])
        return layer(*args)

    monkeypatch.setattr(ops, "layer", spy)
    return seen
