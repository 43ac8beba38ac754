"""The CPU kernels on every instruction set: parity, awkward shapes, poisoned memory, the pack table."""

import functools

import pytest
import torch

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.backends.native import cuda, layer
from fusedrnn.backends.reference import layer as reference
from fusedrnn.budget import ROUNDED_RUNS, compare
from fusedrnn.testing import assert_parity, draw_inputs

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
_C = native._C

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 4, "gru": 3}
LEVELS = _C.isa_levels()


@pytest.fixture(params=LEVELS)
def bf16_level(request):
    """Also the levels that differ in products of bf16 only."""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")


def problem(
    cell, hidden, batch, time, *, inputs=5, directions=1, proj=0, ragged=False, bias=True, dtype=torch.float32
):
    """The arguments of `forward` between cell and save."""
    torch.manual_seed(hidden * 1000 + batch * 10 + time)
    # gates that saturate in every element would leave gradients that are rounding errors alone
    scale, out, gates = (hidden + inputs) ** -0.5, proj or hidden, GATES[cell] * hidden
    weights = []
    for _ in range(directions):
        weights += [torch.randn(gates, inputs) * scale, torch.randn(gates, out) * scale]
        weights += [torch.randn(gates) * scale, torch.randn(gates) * scale] if bias else []
        weights += [torch.randn(proj, hidden) * scale] if proj else []
    states = [torch.randn(directions, batch, out) * 0.5]
    states += [torch.randn(directions, batch, hidden) * 0.5] if cell == "lstm" else []
    sizes = None
    if ragged:
        lengths = torch.randint(1, time + 1, (batch,)).sort(descending=True).values
        lengths[0] = time
        sizes = torch.stack([(lengths > t).sum() for t in range(time)])
        x = torch.randn(int(sizes.sum()), inputs)
    else:
        x = torch.randn(time, batch, inputs)
    return x.to(dtype), sizes, [w.to(dtype) for w in weights], [s.to(dtype) for s in states], directions


def moved(t, seed):
    """Every element off by one rounding: the error that no method can be without."""
    signs = torch.randint(0, 2, t.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return t * (1 + torch.finfo(t.dtype).eps * signs.to(t.dtype))


def everything(backend, cell, x, sizes, weights, states, directions, grads):
    """Output, last states and all gradients, flat."""
    output, last, saved = backend.forward(cell, x, sizes, weights, states, directions, True)
    copies = [t.clone() for t in saved]
    needs = (True, [True] * len(weights), [True] * len(states))
    args = (cell, x, sizes, weights, states, directions, output, saved, grads[0], grads[1:], needs)
    grad_input, grad_weights, grad_states = backend.backward(*args)
    assert all(torch.equal(a, b) for a, b in zip(saved, copies)), "backward wrote into saved"
    return [output, *last, grad_input, *grad_weights, *grad_states]


@functools.cache
def expected(cell, *shape, dtype=torch.float32, **options):
    """The problem, gradients to send back, the exact results, and those of torch's own precision.

    The latter are on the data and on the data moved by a rounding, several times: one run can be
    right by luck, above all in fp64 where it is the oracle itself.
    """
    args = problem(cell, *shape, dtype=dtype, **options)
    x, sizes, weights, states, directions = args
    width = directions * states[0].shape[-1]
    grads = [torch.randn(*x.shape[:-1], width).to(dtype), *map(torch.randn_like, states)]

    def reference_on(change):
        changed = (change(x), sizes, [change(w) for w in weights], [change(s) for s in states], directions)
        return everything(reference, cell, *changed, [change(g) for g in grads])

    exact = reference_on(torch.Tensor.double)
    runs = [everything(reference, cell, *args, grads)]
    runs += [reference_on(functools.partial(moved, seed=seed)) for seed in range(ROUNDED_RUNS)]
    return args, grads, exact, list(zip(*runs))


def check(cell, *shape, **options):
    args, grads, exact, runs = expected(cell, *shape, **options)
    ours = everything(layer, cell, *args, grads)
    n, s = len(args[2]), len(args[3])
    names = ["output", *(f"last {i}" for i in range(s)), "grad input"]
    names += [*(f"grad weight {i}" for i in range(n)), *(f"grad state {i}" for i in range(s))]
    rows = [compare(*row) for row in zip(names, ours, runs, exact, strict=True)]
    assert all(row.ok for row in rows), "\n".join(f"{shape} {options} {row}" for row in rows if not row.ok)
    pointers = [t.data_ptr() for t in ours if t.numel()]
    assert len(set(pointers)) == len(pointers), "outputs share memory"


# H, B, T: each awkward in its own way (not a multiple of a vector, of a tile, of a thread)
SHAPES = [(1, 33, 1), (1, 33, 7), (17, 1, 7), (17, 33, 2), (64, 3, 2), (64, 33, 7), (96, 1, 2), (96, 3, 7)]
SHAPES += [(200, 1, 7), (200, 33, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("cell", GATES)
def test_parity(cell, dtype, level, poisoned):
    for i, (hidden, batch, time) in enumerate(SHAPES):
        for directions in (1, 2):
            ragged, bias = (i + directions) % 2 == 0, (i + directions) % 3 != 0
            check(cell, hidden, batch, time, directions=directions, ragged=ragged, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_parity_with_projection(dtype, level, poisoned):
    for hidden, proj in [(17, 1), (64, 17), (96, 64), (240, 133)]:
        for batch, time, directions, ragged in [(1, 7, 2, False), (3, 7, 2, True), (33, 2, 1, True)]:
            check("lstm", hidden, batch, time, proj=proj, directions=directions, ragged=ragged, dtype=dtype)
    torch.set_num_threads(2)
    check("lstm", 240, 3, 7, proj=133, directions=2, ragged=True, dtype=dtype)
    check("lstm", 240, 33, 2, proj=133, directions=1, ragged=True, dtype=dtype)


@pytest.mark.parametrize("cell", GATES)
@pytest.mark.parametrize("split", ["rows", "units"])
def test_every_split_over_threads(cell, split, level):
    """Large enough for a parallel region, for rows and for units; more threads than cores."""
    hidden, batch, time = (96, 33, 5) if split == "rows" else (240, 3, 5)
    for directions, ragged in [(1, False), (1, True), (2, True)]:
        shape = {"directions": directions, "ragged": ragged}
        expected(cell, hidden, batch, time, **shape)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            check(cell, hidden, batch, time, **shape)
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cell", GATES)
def test_many_chunks_of_time(cell, ragged, threads, poisoned):
    """More rows than the x_gates, and than the gate gradients, that are made at once, many times over."""
    torch.set_num_threads(threads)
    for _ in range(5):  # threads that share rows run ahead of each other, differently every time
        check(cell, 100, 33, 60, ragged=ragged)
    check(cell, 40, 33, 30, directions=2 if ragged else 1, ragged=ragged, inputs=70)
    check(cell, 24, 600, 3, ragged=ragged)  # a step with more rows than one sum takes


def test_long_sums_stay_within_the_budget():
    for hidden, batch in [(256, 32), (512, 8), (1024, 8)]:
        check("lstm", hidden, batch, 16, inputs=hidden)


@pytest.mark.parametrize("cell", GATES)
def test_fp16_is_fp32_rounded_once(cell):
    args = problem(cell, 33, 3, 5, directions=2, dtype=torch.float16)
    output, last, _ = layer.forward(cell, *args, False)
    wide = [[t.float() for t in tensors] for tensors in ([args[0]], *args[2:4])]
    wide = layer.forward(cell, wide[0][0], None, *wide[1:], 2, False)
    for ours, exact in zip([output, *last], [wide[0], *wide[1]]):
        assert ours.dtype is torch.float16
        assert torch.equal(ours, exact.to(torch.float16))
    check(cell, 33, 3, 5, directions=2, dtype=torch.float16)


BF16 = {"rnn_tanh": {}, "rnn_relu": {"nonlinearity": "relu"}, "lstm": {}, "gru": {}}


def bf16_module(cell, inputs, hidden, **options):
    torch.manual_seed(hidden)
    make = getattr(fusedrnn, cell.split("_")[0].upper())
    return make(inputs, hidden, dtype=torch.bfloat16, **BF16[cell], **options)


@pytest.mark.parametrize("cell", GATES)
def test_bf16_against_torch(cell, bf16_level, poisoned, fused):
    """Factors of products are bf16 and all else is fp32: within the budget of torch's own bf16."""
    for hidden, inputs, batch, time, lengths in [
        (1, 1, 1, 3, None),
        (17, 5, 3, 7, [7, 3, 1]),
        (33, 300, 33, 12, None),  # more than one chunk of rows in the backward, and a half-used pair
        (96, 7, 1, 2, None),
        (200, 64, 3, 4, [4, 4, 2]),
    ]:
        module = bf16_module(cell, inputs, hidden, bidirectional=hidden % 2 == 1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_parity(module, inputs=draw_inputs(module, time=time, batch=batch, lengths=lengths))


def test_bf16_with_projection(bf16_level, fused):
    for hidden, proj in [(17, 5), (96, 33), (64, 16)]:
        module = bf16_module("lstm", 9, hidden, proj_size=proj)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_parity(module, inputs=draw_inputs(module, time=9, batch=35))


def test_saved_has_the_shapes_it_says():
    for cell in GATES:
        for proj in (0, 4) if cell == "lstm" else (0,):
            args = problem(cell, 9, 3, 4, directions=2, proj=proj, ragged=True)
            saved = layer.forward(cell, *args, True)[2]
            expected = layer.saved_tensors(cell, 2, args[0].shape[0], 9, bool(proj), torch.float32, 1, "cpu")
            assert [(tuple(t.shape), t.dtype) for t in saved] == expected
            assert layer.forward(cell, *args, False)[2] == []


def test_what_is_not_needed_is_not_computed():
    args = problem("lstm", 9, 3, 4, directions=2)
    output, last, saved = layer.forward("lstm", *args, True)
    x, sizes, weights, states, _ = args
    needs = (False, [i == 1 for i in range(8)], [False, True])
    found = layer.backward("lstm", x, sizes, weights, states, 2, output, saved, None, [None, last[1]], needs)
    assert found[0] is None
    assert [g is not None for g in found[1]] == needs[1]
    assert [g is not None for g in found[2]] == needs[2]


def test_empty_batch():
    for cell in GATES:
        args = problem(cell, 9, 0, 4)
        output, last, saved = layer.forward(cell, *args, True)
        assert output.shape == (4, 0, 9)
        assert [s.shape for s in last] == [s.shape for s in args[3]]
        needs = (True, [True] * 4, [True] * len(last))
        grads = layer.backward(cell, *args, output, saved, output, last, needs)
        assert all((g == 0).all() for g in grads[1])


@pytest.mark.parametrize("cell", GATES)
def test_nan_and_inf_stay_in_their_row(cell, level):
    x, sizes, weights, states, directions = problem(cell, 33, 7, 5)
    x[1, 2], x[1, 4] = torch.nan, torch.inf
    output = layer.forward(cell, x, sizes, weights, states, directions, False)[0]
    theirs = reference.forward(cell, x, sizes, weights, states, directions, False)[0]
    exact = reference.forward(
        cell,
        x.double(),
        sizes,
        [w.double() for w in weights],
        [s.double() for s in states],
        directions,
        False,
    )[0]
    row = compare("output", output, theirs, exact)
    assert row.ok, row
    assert output[1:, 2].isnan().all()
    others = [b for b in range(7) if b not in (2, 4)]
    assert output[:, others].isfinite().all()


def test_long_sequences():
    """T beyond 65,535, where 16-bit grids end."""
    args = problem("gru", 4, 1, 100_001)
    output, last, _ = layer.forward("gru", *args, False)
    assert output.isfinite().all()
    assert torch.equal(output[-1], last[0][0])
    tail = (args[0][-50:], None, args[2], [output[-51][None]], 1)
    assert torch.equal(layer.forward("gru", *tail, False)[0], output[-50:])


# ---- exp, sigmoid, tanh ------------------------------------------------------------------------


def spacing(exact, dtype):
    info = torch.finfo(dtype)
    return torch.exp2(exact.abs().clamp(min=info.smallest_normal).log2().floor()) * info.eps


def apply_math(function, x):
    y = torch.full_like(x, torch.nan)
    number = ["sigmoid", "tanh"].index(function)
    _C.math(x.dtype is torch.float64, number, x.data_ptr(), y.data_ptr(), x.numel())
    return y


INF = float("inf")
SPECIAL = [0.0, -0.0, INF, -INF, float("nan"), 1e-45, -1e-45, 88.5, -88.5, -104.0, 3e38, -3e38]


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_fp32_functions_over_all_floats(function, level):
    patterns = torch.arange(-(2**31), 2**31 - 1, 1499).to(torch.int32).view(torch.float32)
    x = torch.cat([patterns, torch.linspace(-12, 12, 1_000_001), torch.tensor(SPECIAL)])
    exact = getattr(torch, function)(x.double())
    ours = apply_math(function, x)
    assert torch.equal(ours.isnan(), x.isnan())
    error = ((ours.double() - exact).abs() / spacing(exact, torch.float32))[~x.isnan()]
    # what lies below the normal range may become zero
    assert error[exact[~x.isnan()].abs() >= torch.finfo(torch.float32).smallest_normal].max() < 2.5
    assert (ours - exact)[exact.abs() < 1e-37].abs().max() < 2e-38
    ends = apply_math(function, torch.tensor([float("-inf"), float("inf")]))
    assert ends.tolist() == ([0.0, 1.0] if function == "sigmoid" else [-1.0, 1.0])


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_fp64_functions(function, level):
    x = torch.cat(
        [
            torch.linspace(-40, 40, 200_001, dtype=torch.float64),
            torch.logspace(-320, 2.8, 5001, dtype=torch.float64),
            -torch.logspace(-320, 2.8, 5001, dtype=torch.float64),
            torch.tensor([*SPECIAL, 1e300, -1e300, 709.9, -709.9], dtype=torch.float64),
        ]
    )
    theirs, ours = getattr(torch, function)(x), apply_math(function, x)
    assert torch.equal(ours.isnan(), x.isnan())
    keep = ~x.isnan() & (theirs.abs() > 1e-300)
    # libm's own rounding is in the difference
    assert ((ours - theirs).abs() / theirs.abs())[keep].max() < 1e-15


# ---- the level ---------------------------------------------------------------------------------


def test_levels():
    assert "portable" in LEVELS
    assert native.isa() in LEVELS
    for name in LEVELS:
        _C.set_isa(name)
        assert native.isa() == name
    _C.set_isa("")
    with pytest.raises(ValueError, match=r"isa: expected one of portable.*got 'sse9'"):
        _C.set_isa("sse9")


def test_what_is_unsupported_has_a_reason():
    assert layer.unsupported("lstm", torch.float32, "cpu") is None
    assert "mps" in layer.unsupported("lstm", torch.float32, "mps")
    missing = cuda.kernels.missing
    assert (missing or "float64") in layer.unsupported("lstm", torch.float64, "cuda")
    assert "int" in layer.unsupported("lstm", torch.int32, "cpu")
    assert "slstm" in layer.unsupported("slstm", torch.float32, "cpu")
