"""replace(): every stock recurrent module of a model becomes a fused one, in place and reversibly."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import fusedrnn
from fusedrnn.testing import assert_parity, draw_inputs

PAIRS = [
    (getattr(nn, n), getattr(fusedrnn, n)) for n in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
]
pytestmark = pytest.mark.usefixtures("fused")


class Last(nn.Module):
    """What people put behind a recurrent module in nn.Sequential."""

    def forward(self, outputs):
        return outputs[0][:, -1]


class Tacotron(nn.Module):
    """A decoder in the style of Tacotron: cells stepped by hand, states carried, a tied encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 6), nn.LSTM(6, 4, batch_first=True, bidirectional=True))
        self.tied = self.encoder[1]
        self.prenet = nn.ModuleDict({"rnn": nn.GRU(8, 5, batch_first=True)})
        self.cells = nn.ModuleList([nn.LSTMCell(5, 7), nn.LSTMCell(7, 7)])
        self.gate = nn.GRUCell(7, 2)

    def forward(self, x):
        memory = self.prenet["rnn"](self.encoder(x)[0])[0]
        states = [None, None]
        gate = None
        frames = []
        for frame in memory.unbind(1):
            for i, cell in enumerate(self.cells):
                states[i] = cell(frame, states[i])
                frame = states[i][0]
            gate = self.gate(frame, gate)
            frames.append(gate)
        return torch.stack(frames, 1)


class Mine(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


def same_objects(model):
    return [(name, id(p)) for name, p in model.named_parameters()]


# ---- what is swapped ---------------------------------------------------------------------------


@pytest.mark.parametrize(("stock", "fused"), PAIRS)
def test_the_root_itself(stock, fused, calls):
    module = stock(6, 8)
    reference, before = copy.deepcopy(module), same_objects(module)
    report = fusedrnn.replace(module)
    assert type(module) is fused
    assert same_objects(module) == before
    assert [entry.names for entry in report.swapped] == [("",)]
    with fusedrnn.use_backend("reference"):  # left alone, a small cell goes to torch
        assert_parity(module, reference, draw_inputs(reference))
    assert len(calls) == 1


def test_a_whole_model():
    model = Tacotron()
    reference, before = copy.deepcopy(model), same_objects(model)
    keys = list(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = fusedrnn.replace(model)
    assert [(entry.names, entry.cls) for entry in report.entries] == [
        (("encoder.1", "tied"), nn.LSTM),
        (("prenet.rnn",), nn.GRU),
        (("cells.0",), nn.LSTMCell),
        (("cells.1",), nn.LSTMCell),
        (("gate",), nn.GRUCell),
    ]
    assert not report.skipped
    assert model.tied is model.encoder[1]
    assert same_objects(model) == before
    assert list(model.state_dict()) == keys
    assert_parity(model, reference, torch.randn(2, 5, 3))


def test_isinstance_goes_on_to_hold():
    model = nn.Sequential(nn.LSTM(3, 4, batch_first=True), Last())
    x = torch.randn(2, 5, 3)
    expected = model(x)
    fusedrnn.replace(model)
    assert isinstance(model[0], nn.LSTM)
    torch.testing.assert_close(model(x), expected)


def test_tied_parameters_stay_tied():
    model = nn.ModuleList([nn.GRU(4, 4), nn.GRU(4, 4)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    reference = copy.deepcopy(model)
    fusedrnn.replace(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    x = torch.randn(5, 2, 4)
    for m in (model, reference):
        m[1](m[0](x)[0])[0].sum().backward()
    torch.testing.assert_close(model[0].weight_hh_l0.grad, reference[0].weight_hh_l0.grad)


def test_hooks_go_on_firing():
    module, seen = nn.LSTM(3, 4), []
    module.register_forward_pre_hook(lambda *a: seen.append("pre"))
    module.register_forward_hook(lambda *a: seen.append("forward"))
    module.register_full_backward_hook(lambda *a: seen.append("backward"))
    module.register_state_dict_post_hook(lambda *a: seen.append("state_dict"))
    fusedrnn.replace(module)
    module(torch.randn(5, 2, 3, requires_grad=True))[0].sum().backward()
    module.state_dict()
    assert seen == ["pre", "forward", "backward", "state_dict"]


# ---- modules that something else has changed ---------------------------------------------------

CHANGES = {
    "weight_norm": lambda m: weight_norm(m, "weight_hh_l0"),
    "both weights": lambda m: weight_norm(weight_norm(m, "weight_hh_l0"), "weight_ih_l0"),
    "spectral_norm": lambda m: spectral_norm(m, "weight_hh_l0").eval(),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "old weight_norm": lambda m: torch.nn.utils.weight_norm(m, "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ["changed first", "replaced first"])
def test_changed_weights(change, order, calls):
    torch.manual_seed(0)
    plain = nn.GRU(4, 4)
    reference = CHANGES[change](copy.deepcopy(plain))
    if order == "changed first":
        module = CHANGES[change](copy.deepcopy(plain))
        report = fusedrnn.replace(module)
    else:
        module = copy.deepcopy(plain)
        report = fusedrnn.replace(module)
        module = CHANGES[change](module)
    module.load_state_dict(reference.state_dict())
    assert isinstance(module, fusedrnn.GRU)
    assert len(report.swapped) == 1
    x = torch.randn(5, 2, 4)
    for m in (module, reference):
        m(x)[0].sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(module(x), reference(x))
    for (name, p), q in zip(module.named_parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)

    report.revert()
    assert not isinstance(module, fusedrnn.GRU)
    assert type(module).__name__ == type(reference).__name__
    torch.testing.assert_close(module(x), reference(x), rtol=0, atol=0)


def test_a_parametrized_copy_keeps_its_class():
    module = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    twin = copy.deepcopy(module)  # torch gives both the same class
    fusedrnn.replace(module)
    assert isinstance(module, fusedrnn.LSTM)
    assert not isinstance(twin, fusedrnn.LSTM)


def test_removing_parametrizations_keeps_the_swap():
    module = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    report = fusedrnn.replace(module)
    parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert type(module) is fusedrnn.LSTM
    report.revert()
    assert type(module) is nn.LSTM


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_fsdp2(tmp_path, calls):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        x = torch.randn(5, 2, 3)
        expected = model(x)[0]
        with fusedrnn.replace(model):
            assert isinstance(model[0], fusedrnn.LSTM)
            assert isinstance(model[0], FSDPModule)
            found = model(x)[0]
            torch.testing.assert_close(found, expected)
            found.sum().backward()
        assert len(calls) == 1
        assert type(model[0]).__bases__ == (FSDPModule, nn.LSTM)
    finally:
        torch.distributed.destroy_process_group()


# ---- what is skipped ---------------------------------------------------------------------------


def skipped(model, **options):
    report = fusedrnn.replace(model, **options)
    assert not report.swapped
    return [entry.skipped for entry in report.skipped]


def test_a_subclass_is_skipped():
    assert skipped(Mine(3, 4)) == ["its class is not torch's own"]
    assert skipped(weight_norm(Mine(3, 4), "weight_hh_l0")) == ["its class is not torch's own"]


def test_the_fused_are_skipped():
    assert skipped(fusedrnn.LSTM(3, 4)) == ["already fused"]
    assert skipped(weight_norm(fusedrnn.LSTM(3, 4), "weight_hh_l0")) == ["already fused"]


def test_a_replaced_forward_is_skipped():
    module = nn.GRU(3, 4)
    module.forward = module.forward
    assert skipped(module) == ["its forward is replaced on the instance"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_is_skipped():
    scripted = torch.jit.script(nn.Sequential(nn.LSTM(3, 4)))
    assert skipped(scripted) == ["TorchScript runs operators, not classes; fusedrnn.enable() reaches it"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_is_skipped_and_revert_lets_quantize():
    quantize = torch.ao.quantization.quantize_dynamic
    model = nn.Sequential(nn.LSTM(3, 4))
    report = fusedrnn.replace(model)
    assert type(quantize(model, {nn.LSTM})[0]) is fusedrnn.LSTM  # goes by exact type
    report.revert()
    assert skipped(quantize(model, {nn.LSTM})) == ["quantized"]
    assert skipped(torch.ao.nn.quantized.reference.LSTMCell(3, 4)) == ["quantized"]


def test_filter():
    model, asked = Tacotron(), []

    def keep(name, module):
        asked.append((name, type(module)))
        return not name.startswith(("tied", "cells.0"))

    report = fusedrnn.replace(model, keep)
    assert asked[:2] == [("encoder.1", nn.LSTM), ("tied", nn.LSTM)]
    assert [entry.skipped for entry in report.skipped] == [
        "filter_fn refused tied",
        "filter_fn refused cells.0",
    ]
    assert [entry.names[0] for entry in report.swapped] == ["prenet.rnn", "cells.1", "gate"]
    assert skipped(nn.LSTM(3, 4), filter_fn=lambda name, module: name != "") == ["filter_fn refused (model)"]


def test_a_filter_that_raises_changes_nothing():
    model = nn.Sequential(nn.LSTM(3, 4), nn.LSTM(4, 4))
    with pytest.raises(ZeroDivisionError):
        fusedrnn.replace(model, lambda name, module: name == "0" or 1 / 0)
    assert [type(m) for m in model] == [nn.LSTM, nn.LSTM]


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got list$"):
        fusedrnn.replace([nn.LSTM(3, 4)])
    with pytest.raises(TypeError, match=r"^filter_fn: expected a callable, got str$"):
        fusedrnn.replace(nn.LSTM(3, 4), "encoder")


# ---- the report --------------------------------------------------------------------------------


def test_prints_a_table():
    report = fusedrnn.replace(nn.ModuleDict({"encoder": nn.LSTM(3, 4), "head": Mine(3, 4)}))
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "1 swapped, 1 skipped",
        "  encoder  LSTM  swapped",
        "  head     Mine  skipped: its class is not torch's own",
    ]
    assert str(fusedrnn.replace(nn.Linear(3, 4))) == "0 swapped, 0 skipped"
    assert "(model)" in str(fusedrnn.replace(nn.GRU(3, 4)))


def test_revert_touches_only_its_own():
    model = nn.ModuleList([nn.LSTM(3, 4), fusedrnn.LSTM(3, 4), nn.GRU(3, 4), nn.LSTMCell(3, 4)])
    copied_before = copy.deepcopy(model)
    report = fusedrnn.replace(model)
    twin = copy.deepcopy(model)
    model[2].__class__ = type("Other", (nn.GRU,), {})
    model.load_state_dict(copied_before.state_dict())
    model.double()
    report.revert()
    names = ["LSTM", "LSTM", "Other", "LSTMCell"]
    assert [type(m).__name__ for m in model] == names
    assert [isinstance(m, fused) for m, (_, fused) in zip(model, (PAIRS[1], PAIRS[1]))] == [False, True]
    assert type(model[3]) is nn.LSTMCell
    assert [type(m) for m in twin] == [fusedrnn.LSTM, fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.LSTMCell]
    later = fusedrnn.replace(model)
    report.revert()  # has nothing left to do
    assert type(model[0]) is fusedrnn.LSTM
    later.revert()
    assert type(model[0]) is nn.LSTM


def test_context_manager():
    model = nn.Sequential(nn.LSTM(3, 4))
    with fusedrnn.replace(model) as report:
        assert type(model[0]) is fusedrnn.LSTM
    assert len(report.swapped) == 1
    assert type(model[0]) is nn.LSTM
    with pytest.raises(KeyError), fusedrnn.replace(model):
        raise KeyError
    assert type(model[0]) is nn.LSTM


# ---- copies and files --------------------------------------------------------------------------


def test_copies_pickles_and_checkpoints():
    model = Tacotron()
    x = torch.randn(2, 5, 3)
    expected = model(x)
    fusedrnn.replace(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin.encoder[1]) is fusedrnn.LSTM
        assert twin.tied is twin.encoder[1]
        torch.testing.assert_close(twin(x), expected)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    stock = Tacotron()
    stock.load_state_dict(torch.load(file))
    torch.testing.assert_close(stock(x), expected, rtol=0, atol=0)
