"""torch.compile, torch.export and dynamo's refusal of nn.LSTM, which the fused modules must escape."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.budget import check


class Model(nn.Module):
    """Speech-model shaped: one of each recurrent module, dropout between layers, a head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, bidirectional=True, dropout=dropout, proj_size=3)
        self.gru = nn.GRU(6, 7, batch_first=False)
        self.rnn = nn.RNN(7, 4, nonlinearity="relu", bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        y, g = self.gru(y)
        y, r = self.rnn(y)
        return self.head(y) + h.sum() + c.sum() + g.sum() + r.sum()


def fused_model(**kwargs) -> Model:
    torch.manual_seed(0)
    model = Model(**kwargs)
    fusedrnn.replace(model)
    return model


def results(model: nn.Module, run, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.detach().requires_grad_()
    out = run(x)
    names = ["output", "grad input", *(f"grad {name}" for name, _ in model.named_parameters())]
    return dict(zip(names, [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]))


def test_fullgraph_forward_and_backward_with_dynamic_time_and_batch():
    torch._dynamo.reset()
    model = fused_model()
    stock = Model()
    stock.load_state_dict(model.state_dict())
    exact = copy.deepcopy(stock).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for time, batch in ((4, 3), (7, 2), (9, 5)):
        x = torch.randn(time, batch, 5)
        theirs = results(stock, stock, x)
        parity = check(results(model, compiled, x), theirs, partial(results, exact, exact, x.double()))
        assert parity, str(parity)
    assert isinstance(model.lstm, nn.LSTM)


def test_dynamic_sizes_do_not_recompile():
    torch._dynamo.reset()
    model = fused_model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    compiled(torch.randn(4, 3, 5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for time, batch in ((7, 2), (12, 9)):
            compiled(torch.randn(time, batch, 5))


def test_dropout_between_layers_is_kept():
    torch._dynamo.reset()
    model = fused_model(dropout=0.5).train()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3, 5)
    outs = {compiled(x).sum().item() for _ in range(4)}
    assert len(outs) == 4
    torch.manual_seed(3)
    first = compiled(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), first)


def test_no_grad_and_inference_mode():
    torch._dynamo.reset()
    model = fused_model().eval()
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3, 5)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(compiled(x), model(x))


def test_cells_in_a_python_loop():
    torch._dynamo.reset()

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 5), nn.RNNCell(5, 2)

        def forward(self, xs: Tensor) -> Tensor:
            state, g, r = None, None, None
            for x in xs.unbind(0):
                state = self.lstm(x, state)
                g = self.gru(state[0], g)
                r = self.rnn(g, r)
            return r

    model = Loop()
    fusedrnn.replace(model)
    x = torch.randn(3, 2, 3)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(results(model, compiled, x), results(model, model, x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_time_and_batch(strict):
    model = fused_model().eval()
    dims = {0: torch.export.Dim("time", min=2), 1: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (torch.randn(4, 3, 5),), dynamic_shapes=(dims,), strict=strict)
    assert any("fusedrnn.layer" in str(node.target) for node in program.graph.nodes)
    for time, batch in ((4, 3), (9, 7)):
        x = torch.randn(time, batch, 5)
        torch.testing.assert_close(program.module()(x), model(x))


def test_packed_rows_compile():
    torch._dynamo.reset()
    model = fused_model().lstm
    lengths = torch.tensor([4, 2, 1])
    x = torch.randn(4, 3, 5)

    def run(x: Tensor) -> Tensor:
        packed = nn.utils.rnn.PackedSequence(x.reshape(-1, 5)[:7], torch.tensor([3, 2, 1, 1]))
        out, (h, c) = model(packed)
        return out.data.sum() + h.sum() + c.sum()

    assert lengths.sum() == 7
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


@pytest.mark.parametrize("first", ["fusedrnn", "torch._dynamo"])
def test_stock_modules_are_refused_as_before_in_the_same_process(first):
    script = f"""
        import {first}
        import torch, fusedrnn
        from torch import nn
        class Model(nn.Module):
            def __init__(self, rnn):
                super().__init__()
                self.rnn = rnn
            def forward(self, x):
                return self.rnn(x)[0]
        x = torch.randn(3, 2, 4)
        fused = Model(fusedrnn.LSTM(4, 5))
        out = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
        assert torch.allclose(out, fused(x)) and isinstance(fused.rnn, nn.LSTM)
        try:
            torch.compile(Model(nn.LSTM(4, 5)), fullgraph=True, backend="aot_eager")(x)
        except torch._dynamo.exc.Unsupported as error:
            assert "RNN, GRU, or LSTM" in str(error)
        else:
            raise SystemExit("a stock LSTM was traced")
        assert torch._dynamo.config.allow_rnn is False
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["reference", "native"])
def test_a_backend_request_reaches_compiled_code(name):
    if fusedrnn.backends.select.get(name).unavailable():
        pytest.skip("not built")
    torch._dynamo.reset()
    model = fused_model().gru
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    x = torch.randn(3, 2, 6)
    with fusedrnn.use_backend(name):
        torch.compile(model, fullgraph=True, backend=backend)(x)
    assert f"'{name}'" in graphs[0]
