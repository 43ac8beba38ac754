"""enable(): torch's own operators on fused kernels, and nothing else changed."""

import copy
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn import ops
from fusedrnn.backends import select
from fusedrnn.testing import assert_parity, draw_inputs

switch = sys.modules["fusedrnn.enable"]  # fusedrnn.enable is the function
NATIVE = select.get("native").unavailable() is None
RUNS = [nn.LSTM, nn.GRU, nn.RNN]
CELLS = [nn.LSTMCell, nn.GRUCell, nn.RNNCell]


@pytest.fixture(autouse=True)
def left_disabled():
    yield
    assert switch._count == 0
    assert switch._library is None


def tables():
    return {op: torch._C._dispatch_dump_table(op.name()).splitlines() for op in switch._OPERATORS}


def enabled(module):
    """A copy of a module that is enabled during its own forward only."""
    twin = copy.deepcopy(module)

    def forward(self, input, hx=None):
        with fusedrnn.enable():
            return type(module).forward(self, input, hx)

    twin.__class__ = type("Enabled", (type(module),), {"forward": forward})
    return twin


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("lengths", [None, [5, 7, 2]], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", RUNS)
def test_parity(kind, options, lengths, calls):
    module = kind(6, 8, **options)
    assert_parity(enabled(module), module, draw_inputs(module, lengths=lengths))
    assert len(calls) == options.get("num_layers", 1)


@pytest.mark.usefixtures("fused")
def test_parity_of_relu_and_projection(calls):
    for module in (nn.RNN(6, 8, nonlinearity="relu"), nn.LSTM(6, 8, proj_size=4)):
        assert_parity(enabled(module), module, draw_inputs(module))
    assert len(calls) == 2


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_parity_of_cells(kind, bias, calls):
    module = kind(6, 8, bias)
    assert_parity(enabled(module), module, draw_inputs(module))
    assert len(calls) == 1


@pytest.mark.usefixtures("fused")
def test_double_backward():
    module = nn.GRU(3, 4).double()
    assert_parity(enabled(module), module, draw_inputs(module, time=3, batch=2), second_order=True)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", RUNS + CELLS)
def test_without_gradients(kind, mode, calls):
    module = kind(6, 8)
    x = torch.randn(3, 6) if kind in CELLS else torch.randn(5, 3, 6)
    with mode():
        expected = module(x)
        with fusedrnn.enable():
            torch.testing.assert_close(module(x), expected)
    assert len(calls) == 1


@pytest.mark.usefixtures("fused")
def test_everything_made_in_inference_mode(calls):
    with torch.inference_mode(), fusedrnn.enable():
        nn.LSTM(3, 4)(torch.randn(5, 2, 3))
    assert len(calls) == 1


@pytest.mark.usefixtures("fused")
def test_dropout_draws_what_torch_draws():
    module, x = nn.LSTM(3, 4, num_layers=3, dropout=0.5), torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected, after = module(x)[0], torch.get_rng_state()
    torch.manual_seed(1)
    with fusedrnn.enable():
        torch.testing.assert_close(module(x)[0], expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("x", "hx"),
    [
        (torch.randn(5, 2, 7), None),
        (torch.randn(5, 2, 3, 1), None),
        (torch.randn(5, 2, 3), (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))),
        (torch.randn(5, 2, 3).double(), None),
        (torch.zeros(0, 2, 3), None),
    ],
    ids=["width", "rank", "state", "dtype", "no time"],
)
def test_errors_are_torchs(x, hx):
    module = nn.LSTM(3, 4)
    with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever torch raises
        module(x, hx)
    with fusedrnn.enable(), pytest.raises(expected.type) as found:
        module(x, hx)
    assert str(found.value) == str(expected.value)


# ---- who is taken ------------------------------------------------------------------------------


def test_without_a_kernel_torch_runs_silently(monkeypatch, calls):
    monkeypatch.setattr(switch.select, "no_kernel", lambda request: "no kernel")
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = module(x)
    with fusedrnn.use_backend("auto"), fusedrnn.enable(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.skipif(not NATIVE, reason="fusedrnn._C is not built")
def test_with_a_kernel_it_runs_unasked(calls, monkeypatch):
    monkeypatch.setattr(fusedrnn.functional.hand_over, "reason", lambda *_, **__: None)
    with fusedrnn.use_backend("auto"), fusedrnn.enable():
        nn.GRU(3, 4)(torch.randn(5, 2, 3))
    assert calls == ["native"]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell, fusedrnn.LSTM, fusedrnn.GRUCell])
def test_handing_over_to_torch_ends(kind, mode, calls):
    module = kind(3, 4)
    x = torch.randn(2, 3) if issubclass(kind, nn.RNNCellBase) else torch.randn(5, 2, 3)
    with mode(), fusedrnn.use_backend("torch"):
        expected = module(x)
        with fusedrnn.enable():
            torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert not calls


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("packed", [False, True])
def test_autocast_is_torchs(kind, packed, calls):
    module, x = kind(3, 4), torch.randn(5, 2, 3)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 3]))
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(x)
        with fusedrnn.enable():
            found = module(x)
    assert not calls
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("fused")
def test_other_tensors_are_left_to_torch(calls):
    class Logged(torch.Tensor):
        pass

    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
    with fusedrnn.enable():
        assert type(module(fake)[0]) is type(fake)
        assert nn.LSTM(3, 4, device="meta")(x.to("meta"))[0].is_meta
        with torch.inference_mode():
            assert nn.LSTM(3, 4, device="meta")(x.to("meta"))[0].is_meta
        with fusedrnn.use_backend("auto"):
            assert type(module(x.as_subclass(Logged))[0]) is Logged
    assert not calls


# ---- switching ---------------------------------------------------------------------------------


def test_restores_the_dispatcher_and_warns_of_nothing():
    before = tables()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fusedrnn.enable():
            during = tables()
    assert tables() == before
    for op, rows in before.items():
        changed = [row.split(":")[0] for row, now in zip(rows, during[op], strict=True) if row != now]
        assert changed == ["BackendSelect", "AutogradCPU"]


def test_counts():
    before = tables()
    fusedrnn.enable()
    with fusedrnn.enable(), fusedrnn.enable():
        pass
    assert tables() != before
    fusedrnn.enable()
    fusedrnn.disable()
    assert tables() != before
    fusedrnn.disable()
    assert tables() == before
    fusedrnn.disable()  # nothing to undo
    assert tables() == before
    with fusedrnn.enable():
        assert tables() != before


def test_an_exception_disables():
    with pytest.raises(KeyError), fusedrnn.enable():
        raise KeyError
    assert switch._library is None


@pytest.mark.usefixtures("fused")
def test_an_exception_in_a_call_leaves_it_working(calls):
    module = nn.LSTM(3, 4)
    with fusedrnn.enable():
        with pytest.raises(RuntimeError):
            torch.ops.aten.lstm.input(torch.randn(5, 2, 9), [], [], True, 1, 0.0, False, False, False)
        module(torch.randn(5, 2, 3))
    assert len(calls) == 1


def test_decorator():
    before = tables()

    @fusedrnn.enable()
    def function(value):
        assert tables() != before
        return value

    assert tables() == before
    assert function(3) == 3
    assert function.__name__ == "function"
    assert tables() == before


@pytest.mark.usefixtures("fused")
def test_threads_do_not_see_each_other(monkeypatch):
    """A thread that is inside a call does not send the others to torch."""
    meet = threading.Barrier(2, timeout=30)
    layer, through = ops.layer, []

    def wait(*args):
        through.append(threading.get_ident())
        meet.wait()
        return layer(*args)

    monkeypatch.setattr(ops, "layer", wait)
    module, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    expected = module(x)[0]
    found = []
    with fusedrnn.enable():
        threads = [threading.Thread(target=lambda: found.append(module(x)[0])) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(through)) == 2
    for y in found:
        torch.testing.assert_close(y, expected)


ALONE = """
import warnings
warnings.simplefilter("error")
import torch
names = [f"aten::{n}.{o}" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu") for o in ("input", "data")]
names += [f"aten::{n}_cell" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
tables = lambda: [torch._C._dispatch_dump_table(n) for n in names]
before = tables()
import fusedrnn, sys
assert tables() == before, "import registers something"
fusedrnn.enable()
assert tables() != before
assert "torch._dynamo" not in sys.modules
torch.nn.LSTM(3, 4)(torch.randn(5, 2, 3))
"""


def test_nothing_happens_at_import_and_exit_is_clean():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
