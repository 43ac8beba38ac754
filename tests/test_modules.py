"""The drop-in contract of the six modules, line by line, against torch.nn."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import rnn as torch_rnn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.modules import forward
from fusedrnn.testing import assert_parity, compare, draw_inputs

STACKS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
ALL = STACKS + CELLS


def pair(name: str, *args: Any, **kw: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    ours = getattr(fusedrnn, name)(*args, **kw)
    torch.manual_seed(0)
    return ours, getattr(nn, name)(*args, **kw)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [result.data] if isinstance(result, PackedSequence) else [t for part in result for t in flat(part)]


def assert_close(ours: Any, theirs: Any) -> None:
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b)


def cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree.to(dtype) if isinstance(tree, Tensor) else tuple(cast(t, dtype) for t in tree)


# ---- constructor -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_is_a_subclass_whose_instances_differ_in_class_alone(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    assert type(ours).__bases__[-1] is type(theirs)
    assert ours.__dict__.keys() == theirs.__dict__.keys()
    assert repr(ours) == repr(theirs)
    theirs.__class__ = type(ours)
    x = draw_inputs(ours)
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(*x)), flat(theirs(*x))))


@pytest.mark.parametrize(
    ("name", "args", "kw"),
    [
        ("LSTM", (3, 5, 2, False, True, 0.5, True, 4), {}),
        ("GRU", (3, 5, 2, False, True, 0.5, True), {}),
        ("RNN", (3, 5, 2, "relu", False, True, 0.5, True), {}),
        ("RNN", (3,), {"hidden_size": 5, "nonlinearity": "relu", "dtype": torch.float64}),
        ("LSTM", (), {"input_size": 3, "hidden_size": 5, "device": "meta"}),
        ("RNNCell", (3, 5, False, "relu"), {}),
        ("LSTMCell", (3, 5, False), {}),
        ("GRUCell", (3, 5), {"bias": False, "dtype": torch.bfloat16}),
    ],
)
def test_arguments_names_and_initial_values(name: str, args: Any, kw: Any) -> None:
    ours, theirs = pair(name, *args, **kw)
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert a.dtype == b.dtype
        assert a.device == b.device
        assert a.is_meta or torch.equal(a, b)


BAD_ARGUMENTS = [
    *[(name, (3, 5), {"bias": 1}) for name in STACKS],
    *[(name, (3, 5), {"batch_first": 1}) for name in STACKS],
    *[(name, (3.0, 5), {}) for name in STACKS],
    *[(name, (3, "5"), {}) for name in STACKS],
    *[(name, (0, 5), {}) for name in STACKS],
    *[(name, (3, -1), {}) for name in STACKS],
    *[(name, (3, 5, 0), {}) for name in STACKS],
    *[(name, (3, 5), {"dropout": p}) for name in STACKS for p in (-0.1, 1.5, True, "0.5")],
    *[(name, (3, 5), {"proj_size": p}) for name in STACKS for p in (0, -1, 5, 6)],
    *[(name, (3,), {}) for name in ALL],
    *[(name, (3, 5), {"unknown": 1}) for name in ALL],
    ("RNN", (3, 5), {"nonlinearity": "gelu"}),
    ("RNN", (3, 5, 1, "gelu"), {}),
    ("RNNCell", (3, 5), {"nonlinearity": "gelu"}),
]


@pytest.mark.parametrize(("name", "args", "kw"), BAD_ARGUMENTS)
def test_bad_arguments(name: str, args: Any, kw: Any) -> None:
    outcomes = []
    for package in (fusedrnn, nn):
        try:
            outcomes.append(repr(getattr(package, name)(*args, **kw)))
        except (TypeError, ValueError) as error:
            outcomes.append(f"{type(error)} {error}")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", STACKS)
def test_dropout_with_one_layer_warns(name: str) -> None:
    seen = []
    for package in (fusedrnn, nn):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(package, name)(3, 5, dropout=0.5)
        seen.append([(w.category, str(w.message), w.filename, w.lineno) for w in caught])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 1


# ---- forward -----------------------------------------------------------------------------------


def test_borrowed_code_finds_its_names() -> None:
    for name in ALL:
        used = set(getattr(nn, name).forward.__code__.co_names)
        missing = {n for n in used if hasattr(torch_rnn, n) and not hasattr(forward, n)}
        assert not missing


@pytest.mark.parametrize("lengths", [None, [4, 3, 3, 1], [2, 4, 1, 3]])
@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "dropout": 0.5, "batch_first": True},
        {"bidirectional": True, "dtype": torch.float64},
        {"num_layers": 2, "dtype": torch.bfloat16},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", STACKS)
def test_stack_parity(name: str, kw: dict[str, Any], lengths: list[int] | None) -> None:
    module = getattr(fusedrnn, name)(3, 5, **kw)
    inputs = draw_inputs(module, time=4, batch=4, lengths=lengths)
    assert_parity(module, inputs=inputs)
    assert_parity(module, inputs=inputs[:1])


@pytest.mark.parametrize("lengths", [None, [2, 4, 1, 3]])
def test_projection_parity(lengths: list[int] | None) -> None:
    module = fusedrnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2)
    assert_parity(module, inputs=draw_inputs(module, lengths=lengths))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_cell_parity(name: str, bias: bool) -> None:
    module = getattr(fusedrnn, name)(3, 5, bias)
    inputs = draw_inputs(module)
    assert_parity(module, inputs=inputs)
    assert_parity(module, inputs=inputs[:1])
    unbatched = inputs[0][0], tuple(h[0] for h in inputs[1]) if name == "LSTMCell" else inputs[1][0]
    assert_parity(module, inputs=unbatched)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_unbatched(name: str, batch_first: bool) -> None:
    ours, theirs = pair(name, 3, 5, 2, batch_first=batch_first, bidirectional=True)
    x, h = torch.randn(6, 3), torch.randn(4, 5)
    hx = (h, torch.randn(4, 5)) if name == "LSTM" else h
    for args in ((x,), (x, hx)):
        assert_close(ours(*args), theirs(*args))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_packed_input_stays_packed(name: str, enforce_sorted: bool) -> None:
    ours, theirs = pair(name, 3, 5)
    lengths = torch.tensor([4, 2, 1] if enforce_sorted else [1, 4, 2])
    packed = pack_padded_sequence(torch.randn(4, 3, 3), lengths, enforce_sorted=enforce_sorted)
    h = torch.randn(1, 3, 5)
    for args in ((packed,), (packed, (h, h) if name == "LSTM" else h)):
        (a, a_last), (b, b_last) = ours(*args), theirs(*args)
        assert type(a) is PackedSequence
        assert_close(a_last, b_last)
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y)


def test_each_packed_sequence_runs_as_if_alone() -> None:
    module = fusedrnn.LSTM(3, 5, bidirectional=True)
    lengths = [6, 4, 1]
    rows = [torch.randn(n, 3) for n in lengths]
    output, (h, c) = module(nn.utils.rnn.pack_sequence(rows))
    padded, _ = nn.utils.rnn.pad_packed_sequence(output)
    for i, row in enumerate(rows):
        alone, (h_alone, c_alone) = module(row)
        for name, ours, exact in (
            ("output", padded[: len(row), i], alone),
            ("h", h[:, i], h_alone),
            ("c", c[:, i], c_alone),
        ):
            assert compare(name, ours.detach(), exact.detach(), exact.detach().double()).ok


@pytest.mark.parametrize("name", STACKS)
def test_dropout_is_torchs_and_leaves_its_random_state(name: str) -> None:
    ours, theirs = pair(name, 3, 5, 3, dropout=0.5)
    x = torch.randn(4, 2, 3)
    torch.manual_seed(7)
    a, a_next = ours(x), torch.rand(1)
    torch.manual_seed(7)
    b, b_next = theirs(x), torch.rand(1)
    assert_close(a, b)
    assert torch.equal(a_next, b_next)
    ours.eval(), theirs.eval()
    assert_close(ours(x), theirs(x))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", STACKS)
def test_last_states_are_their_own_memory(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5)
    for x in (torch.randn(1, 2, 3), torch.randn(4, 2, 3), torch.randn(1, 3)):
        output, last = module(x)
        before = output.clone()
        for state in flat(last):
            state.detach().fill_(9.0)
        assert torch.equal(output, before)


@pytest.mark.parametrize("name", STACKS)
def test_backward_in_eval_mode_and_twice(name: str) -> None:
    module = getattr(fusedrnn, name)(2, 3, dtype=torch.float64).eval()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", ALL)
def test_autocast_returns_its_dtype_everywhere(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5)
    inputs = draw_inputs(module)
    with torch.autocast("cpu", torch.bfloat16):
        outs = flat(module(*inputs))
    assert all(out.dtype is torch.bfloat16 for out in outs)
    expected = flat(module.bfloat16()(*cast(inputs, torch.bfloat16)))
    assert all(torch.equal(a, b) for a, b in zip(outs, expected))


BAD_INPUTS = [
    ((torch.randn(4, 2, 2),), STACKS),
    ((torch.randn(4),), STACKS),
    ((torch.randn(4, 2, 3, 3),), [*STACKS, *CELLS]),
    ((torch.randn(0, 2, 3),), STACKS),
    ((torch.randn(4, 2, 3).double(),), STACKS),
    ((torch.randn(4, 2, 3).long(),), STACKS),
    ((torch.randn(4, 2, 3, device="meta"),), STACKS),
    ((torch.randn(4, 2, 3), "hx 2-D"), STACKS),
    ((torch.randn(4, 3), "hx 3-D"), STACKS),
    ((torch.randn(4, 2, 3), "hx batch"), STACKS),
    ((torch.randn(4, 2, 3), "hx width"), STACKS),
    ((torch.randn(4, 2, 3), "hx dtype"), STACKS),
    ((torch.randn(4, 2, 3), "hx device"), STACKS),
    ((torch.randn(2, 2),), CELLS),
    ((torch.randn(2, 3).double(),), CELLS),
    ((torch.randn(2, 3, device="meta"),), CELLS),
    ((torch.randn(2, 3), "cell batch"), CELLS),
    ((torch.randn(2, 3), "cell 1-D"), CELLS),
    ((torch.randn(3), "cell 2-D"), CELLS),
]
STATES = {
    "hx 2-D": torch.randn(1, 5),
    "hx 3-D": torch.randn(1, 1, 5),
    "hx batch": torch.randn(1, 3, 5),
    "hx width": torch.randn(1, 2, 4),
    "hx dtype": torch.randn(1, 2, 5).double(),
    "hx device": torch.randn(1, 2, 5, device="meta"),
    "cell batch": torch.randn(3, 5),
    "cell 1-D": torch.randn(5),
    "cell 2-D": torch.randn(2, 5),
}


@pytest.mark.parametrize(("name", "args"), [(name, args) for args, names in BAD_INPUTS for name in names])
def test_bad_input_is_refused_in_torchs_words(name: str, args: tuple[Any, ...]) -> None:
    ours, theirs = pair(name, 3, 5)
    if len(args) == 2:
        h = STATES[args[1]]
        args = args[0], (h, h) if "LSTM" in name else h
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as expected:
        theirs(*args)
    with pytest.raises(type(expected.value)) as got:
        ours(*args)
    assert str(got.value) == str(expected.value)


def test_unknown_nonlinearity_of_a_cell() -> None:
    module = fusedrnn.RNNCell(3, 5, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
        module(torch.randn(2, 3))


@pytest.mark.parametrize("name", STACKS)
def test_empty_batch(name: str) -> None:
    ours, theirs = pair(name, 3, 5, 2, bidirectional=True)
    x = torch.randn(4, 0, 3)
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(theirs(x))]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("name", ALL)
def test_nan_spreads_as_in_torch(name: str) -> None:
    ours, theirs = pair(name, 3, 5)
    x = torch.randn(4, 3) if name in CELLS else torch.randn(6, 4, 3)
    x.view(-1, 4, 3)[-1 if name in CELLS else 2, 1, 0] = torch.nan
    for a, b in zip(flat(ours(x)), flat(theirs(x))):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("name", STACKS)
def test_overlapping_and_strided_input(name: str) -> None:
    module = getattr(fusedrnn, name)(3, 5)
    row = torch.randn(12)
    for x in (
        torch.randn(3, 1).expand(4, 3, 3),
        row.as_strided((4, 2, 3), (2, 1, 1)),
        torch.randn(3, 2, 8).permute(2, 1, 0)[::2],
        torch.randn(4, 2, 6)[..., ::2],
    ):
        assert_parity(module, inputs=(x,))


@pytest.mark.parametrize("name", STACKS)
def test_a_hundred_thousand_steps(name: str) -> None:
    ours, theirs = pair(name, 2, 3, dtype=torch.float64)
    x = torch.randn(100_000, 1, 2, dtype=torch.float64)
    with torch.no_grad():
        assert_close(ours(x), theirs(x))
