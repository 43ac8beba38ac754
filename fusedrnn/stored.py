"""What a stepper reads of a module: its sizes, and its weights as they are stored for a step."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import modules
from .backends import native
from .cells import CELLS

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
STORAGES = tuple(_DTYPES)  # numbered as in csrc/cpu/step.h
# For each of torch's classes, the cell, and ours.
_CLASSES: dict[type[nn.Module], tuple[str, type[nn.Module]]] = {
    nn.RNN: ("rnn", modules.RNN),
    nn.LSTM: ("lstm", modules.LSTM),
    nn.GRU: ("gru", modules.GRU),
    nn.RNNCell: ("rnn", modules.RNNCell),
    nn.LSTMCell: ("lstm", modules.LSTMCell),
    nn.GRUCell: ("gru", modules.GRUCell),
}


class Spec(NamedTuple):
    cell: str
    is_cell: bool
    inputs: int
    hidden: int
    proj: int
    names: tuple[tuple[str, ...], ...]  # of the parameters, per layer, in torch's order

    @property
    def layers(self) -> int:
        return len(self.names)

    @property
    def widths(self) -> tuple[int, ...]:
        """The last dimension of each state."""
        return (self.proj, self.hidden)[: len(CELLS[self.cell].states)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters by name, in the order of names."""
        rows = len(CELLS[self.cell].gates) * self.hidden
        found: dict[str, tuple[int, ...]] = {}
        for k, names in enumerate(self.names):
            inputs = self.proj if k else self.inputs
            kinds = {
                "weight_ih": (rows, inputs),
                "weight_hh": (rows, self.proj),
                "weight_hr": (self.proj, self.hidden),
            }
            found |= {name: kinds.get(name[:9], (rows,)) for name in names}
        return found


def spec_of(module: nn.Module) -> Spec:
    cls = next((cls for cls in _CLASSES if isinstance(module, cls)), None)
    if cls is None:
        names = ", ".join(cls.__name__ for cls in _CLASSES)
        raise TypeError(f"module: expected {names} of torch.nn or fusedrnn, got {type(module).__name__}")
    cell, ours = _CLASSES[cls]
    if type(module).forward not in (cls.forward, ours.forward) or "forward" in vars(module):
        raise TypeError(
            f"module: expected {cls.__name__}'s forward, got {type(module).__name__} with its own"
        )
    own: Any = module
    if cell == "rnn":
        cell = f"rnn_{own.nonlinearity}"
        if cell not in CELLS:
            raise ValueError(f"module: expected nonlinearity tanh or relu, got {own.nonlinearity!r}")
    kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * own.bias
    if isinstance(module, nn.RNNCellBase):
        return Spec(cell, True, own.input_size, own.hidden_size, own.hidden_size, (tuple(kinds),))
    if own.bidirectional:
        raise ValueError(
            "module: expected one direction, got bidirectional=True, which needs the whole sequence"
        )
    kinds += ["weight_hr"] * (own.proj_size > 0)
    layers = tuple(tuple(f"{kind}_l{k}" for kind in kinds) for k in range(own.num_layers))
    return Spec(cell, False, own.input_size, own.hidden_size, own.proj_size or own.hidden_size, layers)


def parameters(module: nn.Module, spec: Spec) -> list[Tensor]:
    """The module's parameters in the order of spec.names, flat: kernels read raw memory by their shapes."""
    found: list[Tensor] = []
    for name, shape in spec.shapes().items():
        parameter = module._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"module: {name} is computed by a parametrization or a hook; make it a parameter again "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove)"
            )
        if parameter.dtype is not torch.float32:
            raise ValueError(
                f"module: expected fp32 parameters, got {name} of {parameter.dtype}; use module.float(), "
                'with weights="bf16" for weights that are bf16'
            )
        if type(parameter) not in (nn.Parameter, Tensor) or tuple(parameter.shape) != shape:
            raise ValueError(
                f"module: expected {name} to be a parameter of shape {list(shape)}, "
                f"got {type(parameter).__name__} of {list(parameter.shape)}"
            )
        if found and parameter.device != found[0].device:
            raise ValueError(
                f"module: expected parameters on one device, got {found[0].device}, {parameter.device}"
            )
        found.append(parameter)
    return found


# ---- packed weights ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pack:
    """The weights of a module in the order in which a step reads them; never changed once made."""

    watch: Any  # _C.Watch
    isa: str
    layers: list[tuple[int, ...]]  # the first fields of StepLayer in csrc/cpu/step.h
    weights: list[Tensor]
    others: list[Tensor]  # scales and biases


# Packs live as long as steppers of them: a pack keeps its parameters, and one may refer to the module.
_packs: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Pack]] = WeakKeyDictionary()
_packing = threading.Lock()


def shared_pack(module: nn.Module, spec: Spec, storage: str) -> Pack:
    _watch_optimizers()
    with _packing:
        mine = _packs.setdefault(module, WeakValueDictionary())
        pack = mine.get(storage)
        if pack is not None and pack.watch.changed():
            pack.watch.spoil()  # for good: nobody looks after it from here on
            pack = None
        if pack is None or pack.isa != native.isa():
            with torch.inference_mode(False), torch.no_grad():
                pack = mine[storage] = _pack(module, spec, storage)
        return pack


def forget(modules: Iterable[nn.Module]) -> None:
    """Every stepper of these modules reads the parameters again."""
    with _packing:
        for module in modules:
            for pack in list(_packs.get(module, {}).values()):
                pack.watch.spoil()


@cache
def _watch_optimizers() -> None:
    """torch's fused optimizers write parameters without a new version, which steppers would not notice."""

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        written = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
        if written:
            forget(m for m in list(_packs) if any(id(p) in written for p in m._parameters.values()))

    register_optimizer_step_post_hook(after_step)


def _pack(module: nn.Module, spec: Spec, storage: str) -> Pack:
    # before the weights are read, so that no change is missed
    watch = native._C.Watch(module._parameters, list(spec.shapes()))
    found = dict(zip(spec.shapes(), (p.detach().contiguous() for p in parameters(module, spec))))
    gates = len(CELLS[spec.cell].gates)
    no_bias = torch.zeros(gates * spec.hidden, dtype=torch.float32, device="cpu")
    layers, weights, others = [], [], []
    for k, names in enumerate(spec.names):
        own = {name.split("_l")[0]: name for name in names}
        packed: list[Tensor | None] = [None] * 3
        scales: list[Tensor | None] = [None] * 3
        for i, kind in enumerate(("weight_ih", "weight_hh", "weight_hr")):
            if kind in own:
                packed[i], scales[i] = _stored(own[kind], found[own[kind]], 1 if i == 2 else gates, storage)
        biases = [
            _in_blocks((found[own[kind]] if kind in own else no_bias)[:, None], gates)
            for kind in ("bias_ih", "bias_hh")
        ]
        inputs = spec.proj if k else spec.inputs
        layers.append((inputs, *map(pointer, (*packed, *scales, *biases))))
        weights += [t for t in packed if t is not None]
        others += [t for t in (*scales, *biases) if t is not None]
    return Pack(watch, native.isa(), layers, weights, others)


def _stored(name: str, weight: Tensor, gates: int, storage: str) -> tuple[Tensor, Tensor | None]:
    """A weight [gates*n, k] and its scales, as csrc/cpu/storage.h and step_digits.h want them."""
    scale = None
    together = native._C.step_together(STORAGES.index(storage))
    if storage == "int8":
        if not weight.isfinite().all():
            raise ValueError(f"weights: int8 has no value for what {name} holds, which is not finite")
        scale = _scale(weight)
        weight = _whole(weight, scale)
        in_fours = together == 4
        scale = _in_blocks(scale if in_fours else scale / 65536, gates)
    packed = _in_blocks(weight, gates)
    if storage != "fp32":
        k = weight.shape[1]
        packed = packed.to(_DTYPES[storage]).flatten(2)
        groups = nn.functional.pad(packed, (0, 0, 0, -k % together)).unflatten(1, (-1, together))
        packed = groups.transpose(2, 3).contiguous()  # [ceil(n/W), ceil(k/together), G*W, together]
    if storage == "int8" and in_fours:
        packed = (packed.short() + 128).to(torch.uint8)
    return packed, scale


def _in_blocks(weight: Tensor, gates: int) -> Tensor:
    """[gates*n, k] as blocks of W units, [ceil(n/W), k, gates, W]; units that are not there are zeros."""
    width = native._C.width(0)
    by_gate = weight.unflatten(0, (gates, -1))
    whole = nn.functional.pad(by_gate, (0, 0, 0, -by_gate.shape[1] % width))
    return whole.unflatten(1, (-1, width)).permute(1, 3, 0, 2).contiguous()


def _scale(weight: Tensor) -> Tensor:
    """One scale per row, [n, 1]; int8 values are round(weight / scale)."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(scale == 0, 1, scale)


def rounded(parameter: Tensor, storage: str) -> Tensor:
    """A parameter as a stepper with that storage computes with it."""
    if storage == "fp32" or parameter.dim() == 1:
        return parameter
    if storage == "bf16":
        return parameter.bfloat16().float()
    scale = _scale(parameter)
    return _whole(parameter, scale) * scale


def _whole(weight: Tensor, scale: Tensor) -> Tensor:
    """The int8 values; the largest is more than 127 scales where those are too small to be exact."""
    return (weight / scale).round().clamp(-127, 127)


def pointer(tensor: Tensor | None) -> int:
    """Where kernels find a tensor's values."""
    if tensor is None:
        return 0
    if type(tensor) not in (Tensor, nn.Parameter):
        raise RuntimeError(f"streaming: expected tensors with memory, got {type(tensor).__name__}")
    return tensor.data_ptr()


def stride(columns: int) -> int:
    """Rows of 64 bytes times an odd number: whole vectors, spread over the sets of the cache."""
    return (-(-columns // 16) | 1) * 16
