"""What more than one test file needs."""

import os

import pytest
import torch

import fusedrnn
from fusedrnn import ops, straight
from fusedrnn.backends import native, select
from fusedrnn.backends.native import layer as native_layer
from fusedrnn.backends.reference import layer as reference

# Triton reads it where a kernel is defined, so before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
LEVELS = [] if native.unavailable() else native._C.isa_levels()


@pytest.fixture(autouse=True)
def one_thread():
    """Test processes run side by side: more threads than cores would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[name for name in LEVELS if not name.endswith("bf16")])
def level(request):
    native._C.set_isa(request.param)
    yield request.param
    native._C.set_isa("")


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that is allocated without a value is full of NaN."""
    new_empty = torch.Tensor.new_empty

    def poison(self, *args, **kwargs):
        made = new_empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poison)


@pytest.fixture
def fused():
    """A backend for every call, asked for by name: what fits no kernel would be an error."""
    with fusedrnn.use_backend("native" if select.get("native").unavailable() is None else "reference"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The backend of every layer or single step that ran on our own."""
    seen = []
    layer, one_step, stack = ops.layer, straight.one_step, native_layer.stack

    def spy(*args):
        seen.append(args[6])
        return layer(*args)

    def spy_on_step(*args, **options):
        made = one_step(*args, **options)
        seen.extend(["native"] * (made is not None))
        return made

    def spy_on_stack(*args):
        made = stack(*args)
        layers, watched = args[6], args[-1]
        seen.extend(["native"] * (0 if made is None or watched else layers))
        return made

    monkeypatch.setattr(ops, "layer", spy)
    monkeypatch.setattr(native_layer, "stack", spy_on_stack)
    monkeypatch.setattr(straight, "one_step", spy_on_step)
    return seen


@pytest.fixture
def red(monkeypatch):
    """A reference that is off by 1e-3."""
    layer = reference.layer

    def off(*args):
        output, last = layer(*args)
        return output + 1e-3, last

    monkeypatch.setattr(reference, "layer", off)


@pytest.fixture(params=[*LEVELS, "module"])
def path(request):
    """Of a stepper: each ISA level of the kernels, and the module's own forward."""
    if request.param == "module":
        with fusedrnn.use_backend("torch"):
            yield request.param
        return
    native._C.set_isa(request.param)
    yield request.param
    native._C.set_isa("")
