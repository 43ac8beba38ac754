"""Layers of CUDA tensors on the native backend, from modules down to the structs of scan.h.

Without a GPU the kernels run over fibers on CPU tensors (tests/fibers.py); each schedule alone is in
test_cuda_fibers.py.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fusedrnn
from fusedrnn import explain, saving
from fusedrnn.backends import select
from fusedrnn.backends.native import cuda, layer
from fusedrnn.bench import command
from fusedrnn.bench.cases import Case
from fusedrnn.bench.gpu import DEVICES
from fusedrnn.testing import assert_parity, draw_inputs

fibers = pytest.importorskip("fibers")
import gpu_layers  # noqa: E402
from fibers import on_fibers  # noqa: E402
from gpu_layers import CELLS, DTYPES, make  # noqa: E402
from pieces import draw, in_pieces, resetting  # noqa: E402

ON_GPU = torch.cuda.is_available() and cuda.kernels is not None and cuda.kernels.missing is None
DEVICE = "cuda" if ON_GPU else "cpu"
needs_fibers = pytest.mark.skipif(
    ON_GPU or fibers.missing() is not None, reason=fibers.missing() or "plans of a GPU that is not this one"
)
needs_kernels = pytest.mark.skipif(not ON_GPU and fibers.missing() is not None, reason=fibers.missing() or "")


@pytest.fixture
def ran(monkeypatch, poisoned):
    """Layers of DEVICE go to the CUDA kernels, fp32 exact; the passes that ran."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with recorded() if ON_GPU else on_fibers() as ran:
        yield ran


@contextmanager
def recorded():
    """On a GPU: what `on_fibers` yields."""
    kernels, ran = cuda.kernels, []

    def spy(name):
        def launch(fields, stream):
            ran.append((name, fibers.SCHEDULES[fields[2]]))
            getattr(kernels, f"scan_{name}")(fields, stream)

        return launch

    spies = {f"scan_{name}": spy(name) for name in ("forward", "backward")}
    instead = SimpleNamespace(missing=None, scan_fits=kernels.scan_fits, **spies)
    with mock.patch.object(cuda, "kernels", instead), fusedrnn.use_backend("native"):
        yield ran


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", CELLS)
def test_parity(cell, dtype, ran):
    """Two layers in two directions, initial states, ragged; the smallest schedule that holds the weights."""
    expected = {17: "cta"} | ({130: "cluster"} if dtype == "bf16" else {})
    for hidden, schedule in expected.items():
        module = make(
            cell, 5, hidden, DTYPES[dtype], num_layers=1 + (hidden == 17), bidirectional=hidden == 17
        )
        ran.clear()
        for lengths in (None, [3, 1, 2]):
            assert_parity(module, inputs=draw_inputs(module, time=3, batch=3, lengths=lengths))
        assert set(ran) == {("forward", schedule), ("backward", schedule)}


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_strict_fp32(cell, ran, monkeypatch):
    """`ran` asks for fp32 but not for how."""
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    module = make(cell, 5, 17, device=DEVICE, bidirectional=True)
    assert_parity(module, inputs=draw_inputs(module, time=3, batch=3))
    assert ran


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_more_than_a_chip_holds(cell, monkeypatch):
    """Every H runs: the weights come from memory in every step."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    hidden = 130 if not ON_GPU else 2048 if cell in ("lstm", "gru") else 4096
    with recorded() if ON_GPU else on_fibers(multiprocessors=1, shared=99 << 10) as ran:
        module = make(cell, 64, hidden, device=DEVICE, bidirectional=True)
        for lengths in (None, [3, 1, 2]):
            assert_parity(module, inputs=draw_inputs(module, time=3, batch=3, lengths=lengths))
    assert set(ran) == {("forward", "stepped"), ("backward", "stepped")}


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_projection(dtype, ran):
    gpu_layers.projection(DTYPES[dtype], DEVICE)
    assert ran


@needs_kernels
@pytest.mark.parametrize("cell", ["RNNCell", "LSTMCell", "GRUCell"])
def test_one_step(cell, ran):
    gpu_layers.one_step(cell, torch.bfloat16, DEVICE)
    assert ran


@needs_kernels
@pytest.mark.parametrize("cell", CELLS)
def test_recompute(cell, ran):
    gpu_layers.recompute(cell, DEVICE)
    if cell == "lstm":
        gpu_layers.recompute(cell, DEVICE, proj_size=5)
    shapes = [
        layer.saved_tensors(cell, 2, 9, 17, False, torch.float32, save, cuda.DEVICE_TYPE)
        for save in (saving.EVERYTHING, saving.LITTLE)
    ]
    assert shapes[1] == [row for row in shapes[0] if row[0][-1] == 17]


@needs_kernels
def test_resets(ran):
    """Of a projection, of a recomputation, of a single step; each schedule: test_cuda_fibers.py."""
    module = make("lstm", 5, 17, device=DEVICE, proj_size=5, bidirectional=True)
    assert_parity(resetting(module), in_pieces(module), draw(module, 0.4, lengths=[3, 1, 2]))
    module = make("gru", 5, 17, device=DEVICE)
    with fusedrnn.recompute():
        assert_parity(resetting(module), in_pieces(module), draw(module, 0.4, time=3, batch=3))
    assert_parity(resetting(module), in_pieces(module), draw(module, 0.5, time=1, batch=5))


@needs_kernels
def test_weights_anywhere_in_memory(ran):
    """Kernels read 16 bytes at a time."""
    module = make("gru", 3, 16, device=DEVICE)
    with torch.no_grad():
        for weight in module.parameters():
            weight.set_(torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view_as(weight))
    assert module.weight_hh_l0.data_ptr() % 16
    assert_parity(module, inputs=draw_inputs(module, time=3, batch=2))


@needs_fibers
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_more_than_runs_at_once(cell, monkeypatch):
    """A grid that is too large becomes several: parts of the batch, and one direction after the other."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for multiprocessors, bidirectional, batch in ((3, False, 70), (3, True, 5), (6, True, 70)):
        module = make(cell, 2, 40, bidirectional=bidirectional)
        lengths = [1 + b % 3 for b in range(batch)] if batch == 70 else None
        with on_fibers("grid", multiprocessors=multiprocessors) as ran:
            assert_parity(module, inputs=draw_inputs(module, time=2, batch=batch, lengths=lengths))
        assert len(ran) == 2


@needs_fibers
def test_compiled_graphs_know_what_is_saved(ran):
    """The fake operator's shapes are those of the CUDA kernels, not of the CPU's."""
    module = make("lstm", 3, 5)
    weights = [p.detach() for p in module.parameters()]
    states = [torch.zeros(1, 2, 5) for _ in range(2)]
    arguments = (torch.randn(4, 2, 3), None, weights, states, "lstm", 1, saving.EVERYTHING, "native", None)
    torch.library.opcheck(torch.ops.fusedrnn.layer, arguments, test_utils="test_faketensor")


# ---- choosing ----------------------------------------------------------------------------------


@needs_fibers
def test_what_does_not_fit_is_refused_before_a_launch():
    """By a GPU with too little shared memory for any schedule; on others every H fits."""
    request = select.Request("lstm", torch.float32, "cpu", hidden=1000)
    with on_fibers():
        assert select.against("native", request) is None
    module = make("lstm", 2, 1000)
    reason = "has no schedule for lstm with H = 1000 on this GPU"
    with on_fibers(shared=48 << 10) as ran:
        assert select.against("native", request._replace(hidden=None)) is None
        assert reason in (select.against("native", request) or "")
        with pytest.raises(fusedrnn.BackendError, match=reason):
            module(torch.zeros(2, 1, 2))
        with fusedrnn.use_backend("auto"):
            choice = explain(module, torch.zeros(2, 1, 2))
        assert choice.backend == "torch"
        assert reason in choice.why_not["native"]
    assert not ran


@needs_fibers
def test_a_benchmark_leaves_out_what_does_not_fit(capsys):
    small, large = (Case("gru", hidden, 1, 1, "inference", "dense") for hidden in (8, 2000))
    plan = [("named", small), ("named", large)]
    with on_fibers("cta"):
        assert command._runnable(plan, DEVICES["cpu"]()) == plan[:1]
    assert "not measured: native has no schedule for gru with H = 2000" in capsys.readouterr().out


@needs_fibers
def test_a_plan_is_asked_for_once(ran, monkeypatch):
    asked = []
    fits = cuda.kernels.scan_fits
    monkeypatch.setattr(cuda.kernels, "scan_fits", lambda *args: asked.append(args) or fits(*args))
    module = make("gru", 2, 6)
    for time, batch in ((2, 1), (5, 9), (3, 40)):
        module(torch.randn(time, batch, 2))[0].sum().backward()
    assert len(asked) == 2  # forward and backward


@needs_fibers
def test_an_error_of_cuda_is_no_answer(ran, monkeypatch):
    """It is raised, and remembered by nobody; that a GPU runs no code of this build is an answer."""
    request = select.Request("gru", torch.float32, "cpu", hidden=6)
    failures = [RuntimeError("CUDA: out of memory"), RuntimeError("CUDA: out of memory")]
    fits = cuda.kernels.scan_fits

    def fails(*args):
        if failures:
            raise failures.pop()
        return fits(*args)

    monkeypatch.setattr(cuda.kernels, "scan_fits", fails)
    with pytest.raises(RuntimeError, match="CUDA: out of memory"):
        select.no_kernel(request)
    with pytest.raises(RuntimeError, match="CUDA: out of memory"):
        make("gru", 2, 6)(torch.zeros(2, 1, 2))
    assert select.against("native", request) is None
    cuda._schedule.cache_clear()
    failures.append(NotImplementedError("has no code that this GPU runs"))
    assert select.against("native", request) == "has no code that this GPU runs"


def test_without_cuda_the_reason_is_said(monkeypatch):
    gone = SimpleNamespace(missing="FUSEDRNN_CUDA=0")
    monkeypatch.setattr(cuda, "kernels", gone)
    assert "no CUDA kernels in this build (FUSEDRNN_CUDA=0)" in layer.unsupported(
        "gru", torch.float32, "cuda"
    )
    gone.missing = None
    assert layer.unsupported("gru", torch.float32, "cuda") is None
    assert "torch.float64" in layer.unsupported("gru", torch.float64, "cuda")
    if not torch.cuda.is_available():
        cuda._schedule.cache_clear()
        assert "there is no GPU" in layer.unsupported("gru", torch.float32, "cuda", 8)
