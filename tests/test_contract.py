"""Drop-in, drawn at random: any constructor, any input, good or bad, gives what torch.nn gives."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.backends import select
from fusedrnn.testing import parity

STACKS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
BACKEND = "reference" if select.get("native").unavailable() else "native"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "overlapping"]
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError)

# Not shrunk: sizes are small as drawn, and one failure would take minutes
ALWAYS_THE_SAME = settings(derandomize=True, deadline=None, database=None, phases=(Phase.generate,))
# 12 tests of 125 examples and 12 of 50: 2,100
STACK_EXAMPLES = settings(ALWAYS_THE_SAME, max_examples=125)
CELL_EXAMPLES = settings(ALWAYS_THE_SAME, max_examples=50)


def mostly(draw: st.DrawFn, good: Any, bad: Any, share: int = 10) -> Any:
    """A good value, or one time in ``share`` one of the bad."""
    return draw(bad if draw(st.integers(1, share)) == share else good)


def laid_out(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random numbers of a shape, in one of the memory layouts that a tensor may have."""
    make = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make).to(dtype)

    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "transposed":
        return randn(*shape[::-1]).permute(*reversed(range(len(shape))))
    if layout == "strided":
        return randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "expanded":
        return randn(*shape[:-2], 1, shape[-1]).expand(shape) if len(shape) > 1 else randn(1).expand(shape)
    if layout == "overlapping":
        return randn(sum(shape) + 1).as_strided(shape, (1,) * len(shape))
    return randn(*shape)


def spoiled(draw: st.DrawFn, tensor: Tensor) -> Any:
    """The tensor with one thing wrong, or with a number in it that is none."""
    kind = draw(
        st.sampled_from(
            ["rank", "unrank", "width", "batch", "double", "long", "complex", "meta", "nan", "inf"]
        )
    )
    if kind == "rank":
        return tensor.unsqueeze(0)
    if kind == "unrank":
        return tensor[0] if tensor.shape[0] else tensor.flatten()
    if kind == "width":
        return torch.cat([tensor, tensor[..., :1]], -1)
    if kind == "batch":
        return torch.cat([tensor, tensor], -2) if tensor.dim() > 1 else tensor
    if kind in ("double", "long"):
        return getattr(tensor, kind)()
    if kind == "complex":
        return tensor.to(torch.complex64)
    if kind == "meta":
        return tensor.to("meta")
    tensor = tensor.clone()
    if tensor.numel():
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = float(kind)
    return tensor


def hidden(draw: st.DrawFn, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Any:
    """None or the initial states, one of them perhaps spoiled, or their number wrong."""
    if not draw(st.booleans()):
        return None
    states = [laid_out(draw, shape, dtype) for shape in shapes]
    if draw(st.integers(1, 6)) == 6:
        at = draw(st.integers(0, len(states) - 1))
        states[at] = spoiled(draw, states[at])
    one = len(states) == 1
    if draw(st.integers(1, 20)) == 20:
        one = not one
    return states[0] if one else tuple(states)


@st.composite
def stack_arguments(draw: st.DrawFn, name: str) -> tuple[tuple[int, int], dict[str, Any]]:
    sizes = (
        mostly(draw, st.integers(1, 4), st.sampled_from([0, -1, 2.0, "3"]), 30),
        mostly(draw, st.integers(1, 5), st.sampled_from([0, -2, 2.0, None]), 30),
    )
    optional = {
        "num_layers": mostly(draw, st.integers(1, 3), st.sampled_from([0, -1]), 30),
        "bias": mostly(draw, st.booleans(), st.sampled_from([1, None]), 30),
        "batch_first": mostly(draw, st.booleans(), st.sampled_from([0, "yes"]), 30),
        "dropout": mostly(draw, st.sampled_from([0.0, 0.5, 1.0, 0]), st.sampled_from([-0.1, 2, True]), 30),
        "bidirectional": draw(st.booleans()),
    }
    if name == "RNN":
        optional["nonlinearity"] = mostly(draw, st.sampled_from(["tanh", "relu"]), st.just("gelu"), 30)
    if name == "LSTM" or draw(st.integers(1, 30)) == 30:
        optional["proj_size"] = mostly(draw, st.integers(0, 2), st.sampled_from([-1, 5, 9]), 20)
    return sizes, {k: v for k, v in optional.items() if draw(st.booleans())}


def stack_call(draw: st.DrawFn, m: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    """An input and hx for a stack: dense, unbatched or packed, one of them perhaps spoiled."""
    kind = draw(st.sampled_from(["dense", "unbatched", "packed"]))
    time = mostly(draw, st.integers(1, 5), st.just(0))
    batch = mostly(draw, st.integers(1, 4), st.just(0))
    rows = m.num_layers * (2 if m.bidirectional else 1)
    widths = [m.proj_size or m.hidden_size, m.hidden_size][: 2 if m.mode == "LSTM" else 1]
    if kind == "unbatched":
        input = laid_out(draw, (time, m.input_size), dtype)
        states = [(rows, w) for w in widths]
    else:
        batch_first = m.batch_first and kind == "dense"
        input = laid_out(
            draw, (batch, time, m.input_size) if batch_first else (time, batch, m.input_size), dtype
        )
        states = [(rows, batch, w) for w in widths]
    if draw(st.integers(1, 8)) == 8:
        input = spoiled(draw, input)
    if kind == "packed" and time and batch and input.dim() == 3 and input.shape[:2] == (time, batch):
        lengths = draw(st.lists(st.integers(1, time), min_size=batch, max_size=batch))
        ordered = draw(st.booleans())
        lengths = sorted(lengths, reverse=True) if ordered else lengths
        input = pack_padded_sequence(input, torch.tensor(lengths), enforce_sorted=ordered)
    return input, hidden(draw, states, dtype)


@st.composite
def cell_arguments(draw: st.DrawFn, name: str) -> tuple[tuple[int, int], dict[str, Any]]:
    optional = {"bias": draw(st.booleans())}
    if name == "RNNCell":
        optional["nonlinearity"] = mostly(draw, st.sampled_from(["tanh", "relu"]), st.just("gelu"))
    return (draw(st.integers(1, 4)), draw(st.integers(1, 5))), optional


def cell_call(draw: st.DrawFn, m: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    lead = draw(st.sampled_from([(), (0,), (1,), (3,)]))
    input = laid_out(draw, (*lead, m.input_size), dtype)
    if draw(st.integers(1, 8)) == 8:
        input = spoiled(draw, input)
    states = 2 if isinstance(m, nn.LSTMCell) else 1
    return input, hidden(draw, [(*lead, m.hidden_size)] * states, dtype)


def outcome(function: Any, *args: Any, **kw: Any) -> tuple[Any, str | None]:
    """The result, or the error's type and text."""
    try:
        return function(*args, **kw), None
    except REFUSALS as error:
        return None, f"{type(error).__name__}: {error}"


def check(name: str, arguments: tuple[Any, Any], dtype: torch.dtype, draw: st.DrawFn, call: Any) -> None:
    sizes, optional = arguments
    torch.manual_seed(0)
    ours, our_error = outcome(getattr(fusedrnn, name), *sizes, **optional, dtype=dtype)
    torch.manual_seed(0)
    theirs, error = outcome(getattr(nn, name), *sizes, **optional, dtype=dtype)
    assert our_error == error
    if error is not None:
        return
    inputs = call(draw, theirs, dtype)
    _, error = outcome(theirs, *inputs)
    _, our_error = outcome(ours, *inputs)
    assert our_error == error
    tensors = _tensors(inputs)
    mixed = {t.dtype for t in tensors} != {dtype}  # which torch takes where a batch of nothing is computed
    if any(t.is_meta or t.is_complex() for t in tensors) or (error is None and mixed):
        return  # nothing but torch runs these
    with fusedrnn.use_backend(BACKEND):  # by choice, small steps would be torch's own
        if error is None:
            result = parity(ours, theirs, tuple(i for i in inputs if i is not None))
            assert result.ok, f"\n{ours}\n{result}"
        else:
            assert outcome(ours, *inputs)[1] == error


def _tensors(tree: Any) -> list[Tensor]:
    """What is computed with: not the sizes and indices of a PackedSequence."""
    if isinstance(tree, PackedSequence):
        return [tree.data]
    if isinstance(tree, Tensor):
        return [tree]
    return [t for part in tree for t in _tensors(part)] if isinstance(tree, tuple) else []


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dropout option adds dropout")
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_stacks(name: str, dtype: torch.dtype) -> None:
    @STACK_EXAMPLES
    @given(stack_arguments(name), st.data())
    def example(arguments: Any, data: st.DataObject) -> None:
        check(name, arguments, dtype, data.draw, stack_call)

    example()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, dtype: torch.dtype) -> None:
    @CELL_EXAMPLES
    @given(cell_arguments(name), st.data())
    def example(arguments: Any, data: st.DataObject) -> None:
        check(name, arguments, dtype, data.draw, cell_call)

    example()
