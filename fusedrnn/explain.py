"""Which backend a module's call runs on, and why not each of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .backends import hand_over, select
from .modules.forward import Fused


def explain(module: nn.Module, *inputs: Any) -> select.Choice:
    """The backend that ``module(*inputs)`` runs on in eager mode, why, and why not the others.

    Args:
        module: a fused module, or a stock one of torch.nn.
        inputs: the arguments of its forward, ``input`` and maybe ``hx``. Without them the weights'
            dtype and device decide, and no size.

    Raises:
        TypeError: ``module`` is not a recurrent module.
        BackendError: a backend was asked for by name and cannot run the call.
    """
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise TypeError(f"module: expected a recurrent module, got {type(module).__name__}")
    if not isinstance(module, Fused):
        why = f"a stock {type(module).__name__}: torch runs it, except under fusedrnn.enable()"
        return select.Choice(
            "torch", why, dict.fromkeys(select.ORDER, "fusedrnn.replace(model) has not been called")
        )

    weight = next(module.parameters())
    first = inputs[0] if inputs else None
    data = first.data if isinstance(first, PackedSequence) else first
    like = data if isinstance(data, Tensor) else weight
    device_type, dtype = like.device.type, like.dtype
    if torch.is_autocast_enabled(device_type) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device_type)

    request = select.Request(_cell(module), dtype, device_type)
    if select.requested() is not None:
        choice = select.choose(request)
        return select.Choice(choice.backend, choice.why, _others(choice, "another was asked for by name"))
    if isinstance(data, Tensor):
        train = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *module.parameters()))
        sizes = _sizes(module, first)
        function = request.kind + ("_cell" if isinstance(module, nn.RNNCellBase) else "")
        reason = hand_over.reason(function, device_type, dtype, *sizes, module.hidden_size, train)
        if reason is not None:
            against = {name: select.against(name, request) for name in select.ORDER}
            return select.Choice(
                "torch", reason, {name: why or "slower, as measured" for name, why in against.items()}
            )
    choice = select.choose(request)
    others = _others(choice, f"{choice.backend} comes first and can run this")
    slower = "not measured faster at this size" if inputs else "no input was given to take sizes from"
    return select.Choice(choice.backend, choice.why, {**others, "torch": slower})


def _others(choice: select.Choice, reason: str) -> dict[str, str]:
    others = [name for name in select.NAMES if name != choice.backend]
    return {name: choice.why_not.get(name, reason) for name in others}


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
