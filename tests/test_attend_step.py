"""The step of a decoder over a projected memory: parity, who takes it, and that nothing is out of date."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from attend_kernels import INF
from torch import Tensor, nn

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.backends.native import attend as kernels
from fusedrnn.budget import check
from fusedrnn.modules import Memory

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)

FORMS = {
    "bahdanau": lambda Q, M, H, **more: fusedrnn.BahdanauAttention(Q, M, H, **more),
    "normalized": lambda Q, M, H, **more: fusedrnn.BahdanauAttention(Q, M, H, True, **more),
    "nobias": lambda Q, M, H, **more: fusedrnn.BahdanauAttention(Q, M, H, bias=False, **more),
    "concat": lambda Q, M, H, **more: fusedrnn.LuongAttention(Q, M, "concat", H, **more),
}
every_form = pytest.mark.parametrize("form", FORMS)
# B, queries of a sequence, Tk, Q, M, H
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 100, 64, 48, 96),
    (3, 1, 7, 5, 6, 17),
    (2, 5, 33, 17, 70, 33),
    (1, 16, 9, 40, 3, 250),
]


@pytest.fixture
def steps(monkeypatch):
    """How many calls the kernel of a step has answered."""
    answered = []
    whole = kernels.step

    def step(*args):
        found = whole(*args)
        answered.extend([] if found is None else [found])
        return found

    monkeypatch.setattr(kernels, "step", step)
    return answered


def formula(module, query, key, value, lengths=None, mask=None) -> tuple[Tensor, Tensor]:
    """[B, R, Q], [B, Tk, H], [B, Tk, M]"""
    e = (module._project_query(query)[:, :, None] + key[:, None]).tanh() @ module._v() / module.temperature
    if mask is not None:
        e = e.masked_fill(~mask[:, None], -INF) if mask.dtype is torch.bool else e + mask[:, None]
    if lengths is not None:
        e = e.masked_fill(torch.arange(key.shape[1]) >= lengths[:, None, None], -INF)
    whole = (e == -INF).all(-1, keepdim=True)
    weights = e.masked_fill(whole, 0).softmax(-1).masked_fill(whole, 0)
    return weights @ value, weights


def wide(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


@torch.no_grad()
def assert_parity(module, query, memory, **options):
    rows = query.flatten(1, -2) if query.dim() > 2 else query[:, None]
    exact = copy.deepcopy(module).double()
    theirs = formula(module, rows, *memory, **options)
    oracle = formula(exact, *map(wide, (rows, *memory)), **{k: wide(t) for k, t in options.items()})
    ours = module(query, memory, **options, need_weights=True)
    shaped = [t.view_as(o) for t, o in zip(ours, theirs)]
    named = [dict(zip(("context", "weights"), each)) for each in (shaped, theirs, oracle)]
    parity = check(*named[:2], lambda: named[2])
    assert parity, f"\n{parity}"
    for _ in range(2):  # exponentials of the keys are not kept yet, made, met again: the digits are the same
        assert torch.equal(module(query, memory, **options, need_weights=True)[1], ours[1])
        context, none = module(query, memory, **options)
        assert none is None
        assert torch.equal(context, ours[0])


def problem(form, shape, size=1.0, **more):
    torch.manual_seed(sum(shape))
    B, R, Tk, Q, M, H = shape
    module = FORMS[form](Q, M, H, **more)
    query = torch.randn(B, Q) if R == 1 else torch.randn(B, R, Q)
    return module, query * size, Memory(torch.randn(B, Tk, H) * size, torch.randn(B, Tk, M))


@every_form
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(form, shape, level, poisoned, steps):
    module, query, memory = problem(form, shape, temperature=1.5)
    B, _, Tk, *_ = shape
    lengths, mask = torch.randint(0, Tk + 1, (B,)), torch.rand(B, Tk) < 0.6
    mask[-1] = False  # a row masked whole
    both = {"mask": mask, "lengths": lengths}
    for options in ({}, {"lengths": lengths}, {"mask": mask}, {"mask": mask[:1]}, both):
        assert_parity(module, query, memory, **options)
    assert len(steps) == 25


@pytest.mark.parametrize("size", [1e-3, 0.05, 6.0, 19.0, 300.0, 1e4])
def test_small_and_large_inputs(size, level, poisoned, steps):
    """Where an exponential of each element would lose digits, and where it would overflow."""
    module, query, memory = problem("nobias", (2, 1, 20, 33, 8, 33), size)
    with torch.no_grad():
        module.query_layer.weight.copy_(torch.eye(33))
    assert_parity(module, query, memory)
    assert_parity(module, query.round() + size, Memory(memory.key.round() - size, memory.value))
    assert len(steps) == 10


def test_values_that_are_not_finite(level):
    module, query, memory = problem("bahdanau", (2, 3, 9, 5, 6, 17))
    hole = memory.key.clone()
    hole[1, 7:] = torch.nan
    lengths = torch.tensor([9, 7])
    with torch.no_grad():
        expected = module(query, memory, lengths)[0]
        for _ in range(3):  # keys beyond a length are not looked at
            torch.testing.assert_close(module(query, Memory(hole, memory.value), lengths)[0], expected)
        query[0, 1, 2] = torch.nan
        for _ in range(3):
            broken = module(query, memory, lengths)[0].isnan()
            assert broken[0, 1].all()
            assert broken.sum() == broken[0, 1].numel()


@every_form
def test_ways_to_lay_out_the_same_step(form, steps):
    module, query, memory = problem(form, (3, 4, 9, 5, 6, 17))
    lengths = torch.tensor([9, 0, 4])
    with torch.no_grad():
        expected = module(query, memory, lengths)[0]
        across = query.transpose(0, 1).contiguous().transpose(0, 1)  # one step of [T, B, Q] after the other
        padded = torch.stack([memory.value, -memory.value], 2)[:, :, 0]
        for value in (memory.value, padded, memory.value.transpose(1, 2).contiguous().transpose(1, 2)):
            again = Memory(memory.key, value)
            for t in range(4):
                for each in (query[:, t], across[:, t]):
                    torch.testing.assert_close(module(each, again, lengths)[0], expected[:, t])
            for shape in ((3, 4, 1, 5), (3, 1, 4, 5), (3, 2, 2, 5)):
                beams = module(query.view(shape), again, lengths)[0]
                torch.testing.assert_close(beams.view_as(expected), expected)
            torch.testing.assert_close(module(across, again, lengths)[0], expected)
    # all but the transposed query of several rows, and the transposed value
    assert len(steps) == 1 + 2 * (8 + 3)


@pytest.mark.parametrize("beams", [None, 3])
def test_forward_attention_asks_for_weights_alone(beams, level, poisoned, steps):
    torch.manual_seed(0)
    module = fusedrnn.ForwardAttention(5, 6, 17)
    exact = copy.deepcopy(module).double()
    query, memory = torch.randn(4, 2, *([beams] if beams else []), 5), torch.randn(2, 9, 6)
    mask = torch.rand(2, 9) < 0.7
    mask[1] = False
    with torch.no_grad():
        found = []
        for each, queries, values in ((module, query, memory), (exact, query.double(), memory.double())):
            projected, state, outputs = each.project_memory(values), each.initial_state(values, beams), []
            for q in queries:
                context, weights, state = each(q, projected, state, mask=mask)
                outputs += [context, weights]
            found.append(outputs)
    for ours, oracle in zip(*found):
        torch.testing.assert_close(ours, oracle.float())
    assert len(steps) == 4


def test_memory_in_inference_mode(steps):
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17))
    with torch.no_grad():
        projected = module.project_memory(memory.value)
        expected = module(query, projected)[0]
    with torch.inference_mode():
        projected = module.project_memory(memory.value)
        assert not projected.key.is_inference()
        for _ in range(3):
            torch.testing.assert_close(module(query, projected)[0], expected)
    assert len(steps) == 4


@every_form
def test_what_changes_is_noticed(form):
    module, query, memory = problem(form, (2, 1, 9, 5, 6, 17))

    @torch.no_grad()
    def assert_fresh():
        for _ in range(3):
            expected = formula(module, query[:, None], *memory)[0][:, 0]
            torch.testing.assert_close(module(query, memory)[0], expected)

    assert_fresh()
    for change in (
        lambda: [p.add_(0.1) for p in module.parameters()],
        lambda: [setattr(p, "data", p.data - 0.3) for p in module.parameters()],
        lambda: [p.data.mul_(1.1) for p in module.parameters()],
        lambda: module.load_state_dict(FORMS[form](5, 6, 17).state_dict()),
        lambda: memory.key.mul_(2),
        lambda: memory.key[1, 3].neg_(),
        lambda: setattr(memory.key, "data", memory.key.data / 2),
        lambda: memory.value.mul_(2),
        lambda: memory.key.set_(torch.randn(2, 9, 17)),
        lambda: query.add_(1),
    ):
        with torch.no_grad():
            change()
        assert_fresh()
    for isa in native._C.isa_levels():
        native._C.set_isa(isa)
        assert_fresh()
    native._C.set_isa("")
    with torch.inference_mode():
        key = memory.key.clone()  # has no version
        for factor in (1, 2, 0.5):
            key.mul_(factor)
            expected = formula(module, query[:, None], key, memory.value)[0][:, 0]
            for _ in range(3):
                torch.testing.assert_close(module(query, Memory(key, memory.value))[0], expected)


def test_a_negated_view_is_seen():
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17))

    def negated(t):
        return torch.complex(torch.zeros_like(t), -t).conj().imag

    assert negated(query).is_neg()
    with torch.no_grad():
        expected = module(query, memory)[0]
        for _ in range(3):
            torch.testing.assert_close(module(negated(query), memory)[0], expected)
            torch.testing.assert_close(module(query, Memory(negated(memory.key), memory.value))[0], expected)
            torch.testing.assert_close(module(query, Memory(memory.key, negated(memory.value)))[0], expected)


def test_what_is_kept_goes_with_the_keys():
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17))
    before = len(kernels._keys._entries)
    with torch.no_grad():
        module(query, memory)
        assert len(kernels._keys._entries) == before + 1
        again = pickle.loads(pickle.dumps(memory))
        copied = copy.deepcopy(memory)
    del memory
    assert len(kernels._keys._entries) == before
    assert len(again) == len(copied) == 2


def test_who_takes_the_ordinary_way(steps):
    """Each of these has to be right, and none can be a step of the kernel."""
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17), dropout=0.5)
    module.eval()
    with torch.no_grad():
        expected = module(query, memory)[0]
    assert len(steps) == 1
    steps.clear()

    context = module(query, memory)[0]  # a gradient may be asked for
    assert context.requires_grad
    torch.testing.assert_close(context, expected)
    with torch.no_grad():
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            twin = copy.deepcopy(module).to(dtype)
            context = twin(query.to(dtype), Memory(*(t.to(dtype) for t in memory)))[0]
            assert context.dtype is dtype
            tolerance = 1e-6 if dtype is torch.float64 else 0.1
            torch.testing.assert_close(context.float(), expected, rtol=0, atol=tolerance)
        for name in ("torch", "reference"):
            with fusedrnn.use_backend(name):
                torch.testing.assert_close(module(query, memory)[0], expected)
        added = torch.zeros(2, 9)
        for mask in (added, added[:, None], (added == 0)[:, None]):
            torch.testing.assert_close(module(query, memory, mask=mask)[0], expected)
        torch.testing.assert_close(module(query, memory, torch.tensor([9, 9]).int())[0], expected)
        mapped = torch.vmap(lambda q: module(q[None], Memory(memory.key[:1], memory.value[:1]))[0][0])
        torch.testing.assert_close(mapped(query)[0], expected[0])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(query, torch.ones_like(query))
            found = torch.autograd.forward_ad.unpack_dual(module(dual, memory)[0])
            assert found.tangent.any()
        with torch.autocast("cpu", torch.bfloat16):
            assert module(query, memory)[0].dtype is torch.bfloat16
    assert not steps
    with torch.no_grad():
        module.train()
        assert (module(query, memory, need_weights=True)[1] == 0).any()
        module.eval()
        handle = module.query_layer.register_forward_hook(lambda *_: torch.zeros(2, 17))
        assert not torch.allclose(module(query, memory)[0], expected)
        handle.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
        torch.testing.assert_close(module(query, memory)[0], expected)
        everywhere.remove()
        nn.utils.parametrizations.weight_norm(module.query_layer)
        torch.testing.assert_close(module(query, memory)[0], expected)
    assert not steps


@pytest.mark.parametrize("form", ["bahdanau", "concat"])
def test_compiled(form, steps):
    module, query, memory = problem(form, (2, 1, 9, 5, 6, 17))
    with torch.no_grad():
        expected = module(query, memory)[0]
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(query, memory)[0], expected)
    assert len(steps) == 1


def test_more_keys_than_are_kept(steps):
    module, query, memory = problem("bahdanau", (1, 1, 2**20 // 64 + 1, 8, 3, 64))
    assert_parity(module, query, memory)
    assert len(steps) == 5


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same(threads, steps):
    module, query, memory = problem("bahdanau", (4, 8, 70, 96, 40, 256))
    with torch.no_grad():
        for _ in range(3):
            alone = module(query, memory)[0]
        torch.set_num_threads(threads)
        for _ in range(3):
            assert torch.equal(module(query, memory)[0], alone)
    assert len(steps) == 6


def test_errors_are_those_of_a_call_with_gradients():
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17))
    double = Memory(memory.key.double(), memory.value)
    narrow, short = Memory(memory.key[..., :3], memory.value), Memory(memory.key, memory.value[:, :3])
    for error, message, call in (
        (RuntimeError, "query: expected 5 features, got 4", lambda: module(query[:, :4], memory)),
        (ValueError, "query: expected 2 to 4 dimensions", lambda: module(query[0], memory)),
        (ValueError, "key: expected dtype torch.float32 of query", lambda: module(query, double)),
        (RuntimeError, "key: expected shape", lambda: module(query, narrow)),
        (RuntimeError, "value: expected shape", lambda: module(query, short)),
        (RuntimeError, "key: expected shape", lambda: module(query[:1], memory)),
        (RuntimeError, "lengths: expected shape", lambda: module(query, memory, torch.ones(3).long())),
        (ValueError, "lengths: expected integers", lambda: module(query, memory, torch.ones(2))),
        (TypeError, "lengths: expected a tensor", lambda: module(query, memory, [1, 2])),
        (RuntimeError, "mask: expected shape", lambda: module(query, memory, mask=torch.ones(2, 3).bool())),
    ):  # fmt: skip
        with torch.no_grad(), pytest.raises(error, match=message):
            call()


def test_empty():
    module, query, memory = problem("bahdanau", (2, 1, 9, 5, 6, 17))
    with torch.no_grad():
        assert module(query[:0], Memory(*(t[:0] for t in memory)))[0].shape == (0, 6)
        nothing = module(query, Memory(*(t[:, :0] for t in memory)), need_weights=True)
        assert not nothing[0].any()
        assert nothing[1].shape == (2, 0)


def test_without_v_it_is_an_error(level):
    module = fusedrnn.BahdanauAttention(4, 5, 6)
    memory = module.project_memory(torch.randn(2, 3, 5))
    module.v = None
    for _ in range(3):
        with torch.no_grad(), pytest.raises(ValueError, match="v: expected"):
            module(torch.randn(2, 4), memory)
