"""Which backend a module's call runs on, and why not each of the others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .attend import differentiated
from .backends import hand_over, select
from .modules import AdditiveAttention, MultiheadAttention
from .modules.attention import Attention
from .modules.forward import Fused

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = (nn.MultiheadAttention, Attention, AdditiveAttention)
_HANDED = "torch's own forward is as fast for this call, or has to say what is wrong with it"


def explain(module: nn.Module, *inputs: Any, resets: Any = None) -> select.Choice:
    """The backend that ``module(*inputs)`` runs on in eager mode, why, and why not the others.

    Args:
        module: a fused module, or a stock one of torch.nn.
        inputs: the arguments of its forward. Without them the weights' dtype and device decide, and no size.
        resets: those of a layer's forward, which rule out torch's own path.

    Raises:
        TypeError: ``module`` is neither a recurrent nor an attention module.
        BackendError: a backend was asked for by name and cannot run the call.
    """
    if not isinstance(module, (*_RECURRENT, *_ATTENTION)):
        raise TypeError(f"module: expected a recurrent or attention module, got {type(module).__name__}")
    if not isinstance(module, (Fused, Attention, AdditiveAttention)):
        return _stock(module)
    request = _request(module, inputs, resets is not None)
    handed = isinstance(module, MultiheadAttention) and _is_for_torch(module, inputs)
    if handed:
        return _handed_over(request, _HANDED, "such a call is torch's")
    if select.requested() is not None:
        return _asked_for(request)
    reason = None
    if not isinstance(module, _RECURRENT):
        reason = hand_over.attend_reason(request, *_asked(module, inputs))
    elif inputs and resets is None and _tensors(inputs[:1]):
        function = request.kind + ("_cell" if isinstance(module, nn.RNNCellBase) else "")
        sizes = *_sizes(module, inputs[0]), request.hidden or 0
        index, grad = request.device_index, differentiated((*_tensors(inputs), *module.parameters()))
        reason = hand_over.reason(function, request.device_type, request.dtype, *sizes, grad, index)
    if reason is not None:
        return _handed_over(request, reason)
    return _chosen(request, sized=bool(inputs))


# ---- the cases ---------------------------------------------------------------------------------


def _stock(module: nn.Module) -> select.Choice:
    why = f"a stock {type(module).__name__}: torch runs it, except under fusedrnn.enable()"
    why_not = dict.fromkeys(select.ORDER, "fusedrnn.replace(model) has not been called")
    return select.Choice("torch", why, why_not)


def _asked_for(request: select.Request) -> select.Choice:
    choice = select.answer(request)
    others = _others(request, choice, "another was asked for by name")
    return select.Choice(choice.backend, choice.why, others)


def _handed_over(request: select.Request, reason: str, slower: str = "slower, as measured") -> select.Choice:
    against = {name: select.passed_over(name, request) for name in select.ORDER}
    return select.Choice("torch", reason, {name: why or slower for name, why in against.items()})


def _chosen(request: select.Request, sized: bool) -> select.Choice:
    choice = select.answer(request)
    others = _others(request, choice, f"{choice.backend} comes first and can run this")
    slower = "not measured faster at this size" if sized else "no input was given to take sizes from"
    refused = select.against("torch", request)
    return select.Choice(choice.backend, choice.why, {**others, "torch": refused or slower})


def _others(request: select.Request, choice: select.Choice, reason: str) -> dict[str, str]:
    others = [name for name in select.NAMES if name != choice.backend]
    return {name: select.passed_over(name, request) or reason for name in others}


# ---- what a call is ----------------------------------------------------------------------------


def _request(module: nn.Module, inputs: tuple[Any, ...], resets: bool) -> select.Request:
    like = next(iter([*_tensors(inputs[:1]), *module.parameters()]), torch.empty(0))
    device_type, index, dtype = like.device.type, like.device.index, like.dtype
    if torch.is_autocast_enabled(device_type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    if not isinstance(module, _RECURRENT):
        score: Any = getattr(module, "score", "additive")
        if isinstance(module, Attention) and module._calls_a_layer():
            score = "dot"  # what is left: the energies are its mask
        return select.Request(score, dtype, device_type, "attend", device_index=index).located()
    hidden: Any = module.hidden_size
    return select.Request(_cell(module), dtype, device_type, "layer", hidden, resets, index).located()


def _cell(module: Any) -> str:
    if isinstance(module, nn.RNNBase):
        return module.mode.lower()
    if isinstance(module, nn.RNNCell):
        return f"rnn_{module.nonlinearity}"
    return "lstm" if isinstance(module, nn.LSTMCell) else "gru"


def _sizes(module: Any, input: Any) -> tuple[int, int]:
    """T and B of a call."""
    if isinstance(input, PackedSequence):
        return int(input.batch_sizes.shape[0]), int(input.batch_sizes[0])
    if isinstance(module, nn.RNNCellBase):
        return 1, int(input.shape[0]) if input.dim() == 2 else 1
    if input.dim() == 2:
        return int(input.shape[0]), 1
    time, batch = input.shape[:2]
    return (int(batch), int(time)) if module.batch_first else (int(time), int(batch))


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, PackedSequence):
        return [tree.data]
    if isinstance(tree, (tuple, list)):
        return [tensor for each in tree for tensor in _tensors(each)]
    return [tree] if isinstance(tree, Tensor) else []


def _arguments(module: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Any]:
    given = inspect.signature(module.forward).bind_partial(*inputs)
    given.apply_defaults()
    return given.arguments


def _is_for_torch(module: MultiheadAttention, inputs: tuple[Any, ...]) -> bool:
    """What its forward asks first."""
    asked = _arguments(module, inputs)
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "is_causal")
    return len(inputs) >= 3 and module._is_for_torch(*(asked[name] for name in names))


def _asked(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[bool, bool, bool, bool]:
    """What `hand_over.attend_reason` wants to know of a call."""
    asked = _arguments(module, inputs)
    masked = any(asked.get(name) is not None for name in ("mask", "attn_mask", "key_padding_mask"))
    masked = masked or (isinstance(module, Attention) and module._calls_a_layer())
    # forms that carry their weights from step to step have no such argument
    weights = asked.get("need_weights", asked.get("return_attention_scores", True))
    # the projection behind the attend is none of its tensors
    own = [p for name, p in module.named_parameters() if not name.startswith("out_proj.")]
    plain = not weights and not differentiated((*_tensors(inputs), *own))
    size: Any = (
        module.head_dim if isinstance(module, MultiheadAttention) else getattr(module, "memory_size", 0)
    )
    return plain, masked, asked.get("lengths") is not None, size <= hand_over.SMALL_HEAD
