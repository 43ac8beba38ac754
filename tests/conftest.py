"""What more than one test file needs."""

import os

import pytest
import torch

import fusedrnn
from fusedrnn import ops
from fusedrnn.backends import reference, select


@pytest.fixture(autouse=True)
def _one_thread_per_worker():
    """Workers of pytest-xdist share the cores: more threads than those would wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(before)
    else:
        yield


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


@pytest.fixture
def one_thread():
    """Test processes run side by side: threads that wait for each other would only wait longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def red(monkeypatch):
    """A reference that is off by 1e-3."""
    layer = reference.layer

    def off(*args):
        output, last = layer(*args)
        return output + 1e-3, last

    monkeypatch.setattr(reference, "layer", off)
