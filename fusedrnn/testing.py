"""Parity with PyTorch as public API: one error budget, for outputs and every gradient.

    from fusedrnn.testing import assert_parity
    print(assert_parity(fusedrnn.LSTM(64, 128)))

For tensors computed some other way there are :func:`check` and, for a single one, :func:`compare`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_map

from .backends.select import use_backend
from .budget import Parity, Row, check, compare, rounding

__all__ = [
    "Parity", "Row", "assert_parity", "check", "compare", "draw_inputs", "parity", "poison", "rounding",
    "stock",
]  # fmt: skip

Found = dict[str, Tensor | None]

STOCK = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention)


@contextmanager
def poison() -> Iterator[None]:
    """Fill what torch.empty and its kin allocate with NaN (integers: their largest value).

    A kernel that reads a buffer before writing it, or leaves part of its output unwritten, then
    yields NaN. Rests on ``torch.utils.deterministic.fill_uninitialized_memory``.
    """
    settings: Any = torch.utils.deterministic
    before = (
        settings.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1], warn_only=before[2])


def stock(module: nn.Module) -> nn.Module:
    """The torch.nn module that ``module`` stands for: a deep copy of it, under torch's own class.

    Raises:
        TypeError: ``module`` is no recurrent module or MultiheadAttention of torch nor of a subclass, or it
            is parametrized, which ties its class to its weights.
    """
    for cls in type(module).__mro__:
        if cls in STOCK:
            break
    else:
        expected = ", ".join(c.__name__ for c in STOCK)
        raise TypeError(
            f"module: expected a subclass of {expected}, got {type(module).__name__}; give a reference"
        )
    if is_parametrized(module):
        raise TypeError(f"module: {type(module).__name__} is parametrized; give a reference")
    twin = copy.deepcopy(module)
    twin.__class__ = cls
    return twin


def draw_inputs(
    module: nn.Module, *, time: int = 7, batch: int = 5, lengths: Sequence[int] | None = None, seed: int = 0
) -> tuple[Any, ...]:
    """Random ``(input, hx)`` for a recurrent module of torch.nn or a subclass, in its dtype and device.

    Args:
        time: T; ignored for cells.
        batch: B.
        lengths: one per sequence, in any order: the input is then a PackedSequence; they stand for T and B.
        seed: of the values, which depend on nothing else but the shapes, and on whether the device is a GPU.

    Returns:
        The input ``[T, B, I]``, ``[B, T, I]`` if the module has it so, ``[B, I]`` for a cell; and hx, a
        tensor, or for an LSTM a tuple: ``[L*D, B, P]`` and ``[L*D, B, H]``, ``[B, H]`` for a cell.

    Raises:
        TypeError: ``module`` is no recurrent module of torch.nn nor of a subclass.
    """
    like = next(module.parameters())
    # a benchmark's input takes seconds to draw on the CPU
    where = like.device if like.is_cuda else torch.device("cpu")
    make = torch.Generator(where).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64, device=where).to(like)

    if isinstance(module, nn.RNNCellBase):
        h = draw(batch, module.hidden_size)
        hx = (h, draw(batch, module.hidden_size)) if isinstance(module, nn.LSTMCell) else h
        return draw(batch, module.input_size), hx
    if not isinstance(module, nn.RNNBase):
        raise TypeError(
            f"module: expected a recurrent module of torch.nn, got {type(module).__name__}; give inputs"
        )
    if lengths is not None:
        time, batch = max(lengths), len(lengths)
    input: Any = draw(*((batch, time) if module.batch_first else (time, batch)), module.input_size)
    if lengths is not None:
        input = pack_padded_sequence(input, torch.tensor(lengths), module.batch_first, enforce_sorted=False)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h = draw(rows, batch, module.proj_size or module.hidden_size)
    return input, (h, draw(rows, batch, module.hidden_size)) if isinstance(module, nn.LSTM) else h


def parity(
    module: nn.Module,
    reference: nn.Module | None = None,
    inputs: Any = None,
    *,
    gradients: bool = True,
    second_order: bool = False,
    seed: int = 0,
) -> Parity:
    """Compare ``module`` with ``reference`` under the budget of :func:`check`.

    Compared are the outputs (tensors, or tuples, lists, dicts and dataclasses of them) and with ``gradients``
    the gradient of every floating input and of every parameter that requires one, for random gradients of all
    outputs. ``module`` runs on poisoned buffers (:func:`poison`). Each run has inputs of its own; one that
    ``module`` overwrites and ``reference`` does not is red. Neither module is changed, nor are the inputs or
    the random state.

    Args:
        module: the module under test, on the backend in force.
        reference: PyTorch's own path, with the same parameter names and values, in the dtype of
            ``module``; by default ``stock(module)``. The oracle is its deep copy in fp64, on the CPU:
            cuDNN's layer is a single operation, which :class:`fusedrnn.budget.Rounded` cannot look into.
        inputs: the positional arguments as a tuple, or the only one; by default :func:`draw_inputs`.
        gradients: compare gradients.
        second_order: compare also the gradient of the norm of all those gradients; cuDNN has none, so
            torch's own run is then without it.
        seed: of the inputs that are drawn, of the output gradients, and of each run (dropout).

    Raises:
        TypeError: ``module`` is not a recurrent module, and ``reference`` or ``inputs`` is missing; or an
            output is none of the above, or holds no tensor.
    """
    reference = stock(module) if reference is None else reference
    inputs = draw_inputs(module, seed=seed) if inputs is None else inputs
    if not isinstance(inputs, tuple) or isinstance(inputs, PackedSequence):
        inputs = (inputs,)
    named = _by_name(reference, inputs)

    exact, widened = copy.deepcopy(reference).double().cpu(), _map(_on_cpu(named), _widened)

    def own(which: nn.Module, arguments: dict[str, Any]) -> tuple[Found, set[str]]:
        # also under enable(), which sends stock modules to the kernels
        with use_backend("torch"), warnings.catch_warnings(), _cudnn(not second_order):
            warnings.simplefilter("ignore")  # of torch about its own path, such as lacking oneDNN
            return _run(which, arguments, gradients, second_order, seed)

    with torch.random.fork_rng(devices={p.device for p in module.parameters() if p.is_cuda}):
        with poison():
            ours, written = _run(module, named, gradients, second_order, seed)
        theirs, written_too = own(reference, named)
        rows = check(ours, theirs, lambda: own(exact, widened)[0]).rows
    note = "overwritten by the call, as torch's is not"
    changed = [Row(name, math.inf, 0.0, 0.0, note=note) for name in sorted(written - written_too)]
    return Parity((*rows, *changed))


def assert_parity(
    module: nn.Module, reference: nn.Module | None = None, inputs: Any = None, **options: Any
) -> Parity:
    """:func:`parity`, with its arguments; returns the rows if all are within budget.

    Raises:
        AssertionError: a row is not; it names the tensor, the error, where, and the budget.
        TypeError: as :func:`parity`.
    """
    result = parity(module, reference, inputs, **options)
    if not result.ok:
        lines = [f"{type(module).__name__} is not at parity with torch:", *map(str, result.failures)]
        raise AssertionError("\n  ".join(lines))
    return result


def _run(
    module: nn.Module, given: dict[str, Any], gradients: bool, second_order: bool, seed: int
) -> tuple[Found, set[str]]:
    """Every tensor to compare, by name, and the names of the inputs that the run has overwritten."""
    wanted = gradients or second_order
    inputs = _map(given, lambda t: _copied(t).requires_grad_(wanted and t.is_floating_point()))
    with _buffers_kept(module):
        found = _computed(module, inputs, gradients, second_order, seed)
    pairs = zip(_leaves(inputs), _leaves(given))
    return found, {name for (name, after), (_, before) in pairs if not _same(after, before)}


def _computed(
    module: nn.Module, inputs: dict[str, Any], gradients: bool, second_order: bool, seed: int
) -> Found:
    torch.manual_seed(seed)
    wanted = gradients or second_order
    with torch.set_grad_enabled(wanted):
        result = module(*inputs.values())
    outputs = dict(_named(result, "output", strict=True))
    if not outputs:
        raise TypeError(f"output: expected a tensor, or some in a container, got {type(result).__name__}")
    found: Found = {**outputs}
    if not wanted:
        return found

    leaves = [(name, t) for name, t in _leaves(inputs) if t.is_floating_point()]
    leaves += [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    tensors = [leaf for _, leaf in leaves]
    make = torch.Generator().manual_seed(seed + 2)
    # small integers are exact in every dtype: the oracle sees the same numbers
    pull = [torch.randint(-4, 5, t.shape, generator=make).to(t) for t in outputs.values()]
    kept = [(t, g) for t, g in zip(outputs.values(), pull) if t.requires_grad]
    first: Sequence[Tensor | None] = [None] * len(tensors)
    if kept:
        first = torch.autograd.grad(
            [t for t, _ in kept], tensors, [g for _, g in kept], create_graph=second_order, allow_unused=True
        )
    if gradients:
        found |= {f"grad {name}": g for (name, _), g in zip(leaves, first)}
    if second_order:
        squares = [g.double().square().sum() for g in first if g is not None and g.requires_grad]
        second: Sequence[Tensor | None] = [None] * len(tensors)
        if squares:
            second = torch.autograd.grad(torch.stack(squares).sum().sqrt(), tensors, allow_unused=True)
        found |= {f"second {name}": g for (name, _), g in zip(leaves, second)}
    return found


def _named(tree: Any, name: str, strict: bool = False) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested value, each with its path; ``strict`` refuses what might hide one."""
    parts: dict[str, Any] = {}
    if isinstance(tree, PackedSequence):
        parts = {".data": tree.data}
    elif isinstance(tree, Tensor):
        if strict and tree.is_complex():
            raise TypeError(f"{name}: expected a tensor of real numbers, got {tree.dtype}")
        yield name, tree
    elif isinstance(tree, dict):
        parts = {f"[{key!r}]": value for key, value in tree.items()}
    elif isinstance(tree, (tuple, list)):
        parts = {f"[{i}]": value for i, value in enumerate(tree)}
    elif _is_dataclass(tree):
        parts = {f".{field.name}": getattr(tree, field.name) for field in dataclasses.fields(tree)}
    elif strict and not isinstance(tree, (type(None), bool, int, float, str)):
        expected = "a tensor, or tuples, lists, dicts or dataclasses of them"
        raise TypeError(f"{name}: expected {expected}, got {type(tree).__name__}")
    for path, value in parts.items():
        yield from _named(value, name + path, strict)


def _by_name(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by their names; those of ``*args`` by number."""
    signature = inspect.signature(module.forward)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*inputs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{i}]": each for i, each in enumerate(value)}
        else:
            named[name] = value
    return named


def _is_dataclass(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _leaves(inputs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [leaf for name, value in inputs.items() for leaf in _named(value, name)]


def _copied(tensor: Tensor) -> Tensor:
    """A detached copy: strides, overlaps and alignment are part of the input."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided or not tensor.numel():
        return tensor.clone()
    size, stride, offset = tensor.shape, tensor.stride(), tensor.storage_offset()
    lead = offset % 64
    span = 1 + sum((n - 1) * step for n, step in zip(size, stride))
    flat = tensor.as_strided((lead + span,), (1,), offset - lead).clone()
    return flat.as_strided(size, stride, lead)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a run makes of buffers, such as the statistics of BatchNorm."""
    before = [
        (part, name, buffer, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, values in before:
            if not _same(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)
            if part._buffers.get(name) is not buffer:
                part._buffers[name] = buffer


@contextmanager
def _cudnn(allowed: bool) -> Iterator[None]:
    """Torch's own path with cuDNN where it would use it, or without."""
    settings: Any = torch.backends.cudnn
    before = settings.enabled
    settings.enabled = before and allowed
    try:
        yield
    finally:
        settings.enabled = before


def _on_cpu(tree: Any) -> Any:
    moved = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, PackedSequence) else leaf, tree)
    return _map(moved, Tensor.cpu)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _map(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors of a nested value."""
    if isinstance(tree, PackedSequence):
        return tree._replace(data=_map(tree.data, function))
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _map(value, function) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        mapped = [_map(value, function) for value in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    if _is_dataclass(tree):
        made = copy.copy(tree)
        for field in dataclasses.fields(tree):  # a frozen one too
            object.__setattr__(made, field.name, _map(getattr(tree, field.name), function))
        return made
    return tree
