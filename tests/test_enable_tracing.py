"""enable() beside function transforms, tracers, torch.compile and TorchScript."""

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

import fusedrnn


def outcome(function):
    """What a call gives, errors included."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def transforms():
    module, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    return {
        "vmap": lambda: torch.vmap(module)(torch.stack([x, x])),
        "vmap beside": lambda: torch.vmap(lambda y: y + module(x)[0])(torch.ones(2, 1, 1, 1)),
        "grad": lambda: torch.func.grad(loss)(weights, x),
        "jvp": lambda: torch.func.jvp(lambda x: module(x)[0], (x,), (x,)),
        "per sample": lambda: torch.vmap(torch.func.grad(loss), (None, 0))(weights, torch.stack([x, x])),
        "functionalize": lambda: torch.func.functionalize(lambda x: module(x)[0])(x),
    }


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", transforms())
def test_transforms_are_torchs(name):
    function = transforms()[name]
    expected = outcome(function)
    with fusedrnn.enable():
        found = outcome(function)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


def graphs(module, x):
    def targets(graph):
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    exported = torch.export.export(module, (x,))
    return [
        targets(exported.graph),
        targets(exported.run_decompositions().graph),
        targets(make_fx(lambda x: module(x)[0])(x).graph),
        outcome(lambda: targets(make_fx(lambda x: module(x)[0], tracing_mode="symbolic")(x).graph)),
    ]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_traced_graphs_are_torchs_during_and_after(kind, mode, calls):
    module, x = kind(3, 4), torch.randn(5, 2, 3)
    with mode():
        expected = graphs(module, x)
        with fusedrnn.enable():
            assert graphs(module, x) == expected
        assert graphs(module, x) == expected
    assert not calls


@pytest.mark.usefixtures("fused")
def test_the_python_dispatcher_looks_again():
    def kernels():
        with enable_python_dispatcher():
            nn.LSTM(3, 4)(torch.randn(5, 2, 3))
        return dict(torch.ops.aten.lstm.input._dispatch_cache)

    expected = kernels()
    with fusedrnn.enable():
        assert kernels() != expected
    assert kernels() == expected


@pytest.mark.usefixtures("fused")
def test_compile_as_before(calls):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x):
            x = x * 2
            torch._dynamo.graph_break()
            return self.rnn(x)[0] + 1

    def run():
        torch._dynamo.reset()
        seen = []

        def backend(graph, example):
            seen.append([str(node.target) for node in graph.graph.nodes])
            return graph.forward

        found = torch.compile(model, backend=backend)(x)
        return found, seen

    model, x = Model(), torch.randn(5, 2, 3)
    expected, before = run()
    assert not calls
    with fusedrnn.enable():
        found, seen = run()
    assert seen == before
    torch.testing.assert_close(found, expected)
    assert calls


# ---- TorchScript -------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, bidirectional=True)
        self.cell = nn.GRUCell(8, 5)

    def forward(self, x):
        return self.cell(self.rnn(x)[0][-1])


@pytest.mark.usefixtures("fused")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_from_disk(how, tmp_path, calls):
    model, x = Tagger().eval(), torch.randn(5, 2, 3)
    made = torch.jit.trace(model, (x,)) if how == "trace" else torch.jit.script(model)
    torch.jit.save(torch.jit.freeze(made) if how == "freeze" else made, tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    expected = model(x)
    expected.sum().backward()

    with fusedrnn.enable():
        found = [loaded(x) for _ in range(3)]  # the profiling executor optimizes at the third
    assert len(calls) == (3 if how == "trace" else 6)  # a trace holds a cell's inner operations
    for y in found:
        torch.testing.assert_close(y, expected)
    if how != "freeze":
        found[-1].sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(dict(loaded.named_parameters())[name].grad, p.grad)


@pytest.mark.usefixtures("fused")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_tracing_while_enabled_records_what_torch_records(kind):
    def kinds():
        x = torch.randn(5, 3) if kind is nn.GRUCell else torch.randn(5, 2, 3)
        return [node.kind() for node in torch.jit.trace(kind(3, 4), (x,)).graph.nodes()]

    expected = kinds()
    with fusedrnn.enable():
        assert kinds() == expected
