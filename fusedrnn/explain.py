"""Which backend a module's call runs on, and why not each of the others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .backends import hand_over, select
from .modules import AdditiveAttention
from .modules.attention import Attention
from .modules.forward import Fused

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION = (nn.MultiheadAttention, Attention, AdditiveAttention)


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
    given, grad = _looked_at(module, inputs)
    request = _request(module, given, resets is not None)
    if select.requested() is not None:
        return _asked_for(request)
    reason = None
    if not isinstance(module, _RECURRENT):
        reason = hand_over.attend_reason(request, *_asked(module, inputs, grad))
    elif given and resets is None:
        function = request.kind + ("_cell" if isinstance(module, nn.RNNCellBase) else "")
        sizes = *_sizes(module, inputs[0]), request.hidden or 0
        index = request.device_index
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


def _handed_over(request: select.Request, reason: str) -> select.Choice:
    against = {name: select.passed_over(name, request) for name in select.ORDER}
    return select.Choice(
        "torch", reason, {name: why or "slower, as measured" for name, why in against.items()}
    )


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


def _looked_at(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[Tensor], bool]:
    """The first input, if it is there, and whether a gradient is recorded."""
    tensors = [t.data if isinstance(t, PackedSequence) else t for t in inputs[:1]]
    if tensors and isinstance(tensors[0], (list, tuple)):  # Keras's inputs
        tensors = list(tensors[0][:1])
    given = [t for t in tensors if isinstance(t, Tensor)]
    return given, torch.is_grad_enabled() and any(t.requires_grad for t in (*given, *module.parameters()))


def _request(module: nn.Module, given: list[Tensor], resets: bool) -> select.Request:
    like = next(iter([*given, *module.parameters()]), torch.empty(0))
    device_type, index, dtype = like.device.type, like.device.index, like.dtype
    if torch.is_autocast_enabled(device_type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    if not isinstance(module, _RECURRENT):
        score = getattr(module, "score", "additive")
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


def _asked(module: nn.Module, inputs: tuple[Any, ...], grad: bool) -> tuple[bool, bool, bool, bool]:
    """What `hand_over.attend_reason` wants to know of a call."""
    given = inspect.signature(module.forward).bind_partial(*inputs)
    given.apply_defaults()
    asked = given.arguments
    masked = any(asked.get(name) is not None for name in ("mask", "attn_mask", "key_padding_mask"))
    # forms that carry their weights from step to step have no such argument
    weights = asked.get("need_weights", asked.get("return_attention_scores", True))
    plain, ragged = not weights and not grad, asked.get("lengths") is not None
    size: Any = getattr(module, "memory_size", 0)
    if isinstance(module, nn.MultiheadAttention):
        plain, size = not weights and not (masked and grad), module.head_dim
    return plain, masked, ragged, size <= hand_over.SMALL_HEAD
