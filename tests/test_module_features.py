"""What users do with modules: copies, parametrizations, functional_call, DDP, FSDP2, jit, fx."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_modules import ALL, CELLS, STACKS, assert_close, cast, flat, pair
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusedrnn
from fusedrnn.modules import Tracer
from fusedrnn.testing import draw_inputs


@pytest.mark.parametrize("name", ALL)
def test_state_dict_both_ways(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    assert ours.load_state_dict(theirs.state_dict()) == theirs.load_state_dict(ours.state_dict())
    fresh = getattr(fusedrnn, name)(3, 5, device="meta")
    fresh.load_state_dict(theirs.state_dict(), assign=True)
    x = draw_inputs(theirs)
    assert_close(fresh(*x), theirs(*x))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ALL)
def test_copies(name: str, how: Any) -> None:
    ours, _ = pair(name, 3, 5)
    x = draw_inputs(ours)
    expected = flat(ours(*x))
    twin = how(ours)
    assert type(twin) is type(ours)
    assert all(torch.equal(a, b) for a, b in zip(flat(twin(*x)), expected))


def test_torch_save() -> None:
    ours, _ = pair("GRU", 3, 5)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert_close(twin(torch.ones(2, 1, 3)), ours(torch.ones(2, 1, 3)))


def test_old_pickles() -> None:
    ours, _ = pair("LSTM", 3, 5, 2, bidirectional=True)
    state = {k: v for k, v in ours.__dict__.items() if k not in ("proj_size", "_flat_weight_refs")}
    # before torch 1.4 weights were saved where their names are now
    state["_all_weights"] = [[getattr(ours, n) for n in names] for names in ours._all_weights]
    state.pop("_flat_weights_names")
    twin = fusedrnn.LSTM.__new__(fusedrnn.LSTM)
    twin.__setstate__(state)
    x = torch.randn(4, 2, 3)
    assert_close(twin(x), ours(x))


@pytest.mark.parametrize("name", ALL)
def test_to_half_share_memory_and_flatten(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    for m in (ours, theirs):
        m.double().share_memory()
        if name in STACKS:
            m.flatten_parameters()
    x = cast(draw_inputs(ours), torch.float64)
    assert_close(ours(*x), theirs(*x))
    x = cast(x, torch.bfloat16)
    for a in flat(ours.bfloat16()(*x)):
        assert a.dtype is torch.bfloat16


@pytest.mark.parametrize("name", STACKS)
def test_weights_are_read_by_name(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    x = torch.randn(4, 2, 3)
    for m in (ours, theirs):
        m.weight_hh_l0 = nn.Parameter(torch.full_like(m.weight_hh_l0, 0.1))
        m._parameters["bias_hh_l0"] = nn.Parameter(torch.ones_like(m.bias_hh_l0))
    assert_close(ours(x), theirs(x))
    assert ours._flat_weights[3] is ours.bias_hh_l0
    assert not ours._weights_have_changed()


@pytest.mark.parametrize("name", ALL)
def test_functional_call_leaves_no_trace(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    x = draw_inputs(ours)
    other = {k: torch.randn_like(p) for k, p in ours.named_parameters()}
    before = flat(ours(*x))
    call = torch.func.functional_call
    assert_close(call(ours, other, x), call(theirs, other, x))
    assert_close(ours(*x), before)
    call(ours, other, x)
    ours.__class__ = type(theirs)  # torch's forward must not find the weights of the call
    assert_close(ours(*x), before)


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight.tanh()


@pytest.mark.parametrize("name", ALL)
def test_a_parametrization_is_evaluated_once(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    weight = "weight_hh" if name in CELLS else "weight_hh_l0"
    count = Count()
    parametrize.register_parametrization(ours, weight, count)
    parametrize.register_parametrization(theirs, weight, Count())
    x = draw_inputs(theirs)
    for _ in range(2):
        count.calls = 0
        assert_close(ours(*x), theirs(*x))
        assert count.calls == 1


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda m, n: prune.l1_unstructured(m, n, 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "pruning"],
)
def test_parametrizations_train_as_in_torch(name: str, wrap: Any) -> None:
    results = []
    for m in pair(name, 3, 5, dtype=torch.float64):
        torch.manual_seed(1)
        wrap(m, "weight_hh_l0")
        m.eval()  # spectral_norm iterates per access in training: torch's four, ours one
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            m(torch.ones(4, 2, 3, dtype=torch.float64))[0].square().sum().backward()
            optimizer.step()
        results.append([p.detach() for p in m.parameters()])
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm() -> None:
    results = []
    for m in pair("GRU", 3, 5):
        nn.utils.weight_norm(m, "weight_hh_l0")
        m(torch.ones(4, 2, 3))[0].sum().backward()
        results.append([m.weight_hh_l0_g.grad, m.weight_hh_l0_v.grad])
    assert_close(*results)


def test_hooks_run() -> None:
    ours, _ = pair("LSTM", 3, 5)
    seen = []
    ours.register_forward_pre_hook(lambda *a: seen.append("pre"))
    ours.register_forward_hook(lambda *a: seen.append("post"))
    ours.register_full_backward_hook(lambda *a: seen.append("backward"))
    ours(torch.randn(2, 1, 3, requires_grad=True))[0].sum().backward()
    assert seen == ["pre", "post", "backward"]


def test_weights_are_not_kept_alive() -> None:
    ours, _ = pair("GRU", 3, 5)
    old = weakref.ref(ours.weight_hh_l0)
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    ours(torch.randn(2, 1, 3))
    assert old() is None


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", STACKS)
def test_ddp_and_fsdp2(name: str) -> None:
    from torch.distributed.fsdp import fully_shard

    ours, theirs = pair(name, 3, 5, 2)
    x = torch.randn(4, 2, 3)
    theirs(x)[0].sum().backward()
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(ours))
    ddp(x)[0].sum().backward()
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    sharded = fully_shard(copy.deepcopy(ours), mesh=mesh)
    sharded(x)[0].sum().backward()
    for p, q, r in zip(theirs.parameters(), ddp.parameters(), sharded.parameters()):
        torch.testing.assert_close(q.grad, p.grad)
        torch.testing.assert_close(r.grad.full_tensor(), p.grad)


# ---- compilers of old --------------------------------------------------------------------------

torch_says_jit_is_old = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


@torch_says_jit_is_old
@pytest.mark.parametrize("name", ALL)
def test_jit_script_and_trace_record_torchs_own_operators(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5)
    model = nn.Sequential(module)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(4, 2, 3)
    for compiled in (torch.jit.script(model), torch.jit.trace(module, (x,), check_trace=False)):
        graph = str(compiled.inlined_graph)
        assert "aten::" in graph
        assert "^" not in graph  # a call back into Python
        assert "fusedrnn::" not in graph
        assert_close(compiled(x), model(x))
    assert type(module) is getattr(fusedrnn, name)


@torch_says_jit_is_old
def test_a_scripted_model_shares_its_parameters() -> None:
    model = nn.Sequential(fusedrnn.LSTM(3, 5))
    scripted = torch.jit.script(model)
    with torch.no_grad():
        model[0].weight_hh_l0.zero_()
    assert_close(scripted(torch.ones(2, 1, 3)), model(torch.ones(2, 1, 3)))


@pytest.mark.parametrize("name", ALL)
def test_fx_tracer_keeps_modules_whole(name: str) -> None:
    model = nn.Sequential(getattr(fusedrnn, name)(3, 5))
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x = torch.randn(2, 3) if name in CELLS else torch.randn(4, 2, 3)
    assert_close(traced(x), model(x))


def test_quantize_dynamic_skips_the_fused_class() -> None:
    """As documented: it goes by exact type."""
    model = nn.Sequential(fusedrnn.LSTM(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert type(quantized[0]) is fusedrnn.LSTM
