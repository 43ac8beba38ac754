"""One step at a time, for input that arrives while the answer is wanted.

    stepper = fusedrnn.streaming(torch.nn.LSTMCell(40, 128).eval())
    for frame in microphone:  # [40]
        h = stepper.step(frame)  # [128]

See docs/streaming.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from . import functional
from .backends import native, select
from .backends.native import layer as kernels
from .stored import STORAGES, Pack, forget, parameters, pointer, rounded, shared_pack, spec_of, stride


def streaming(module: nn.Module, batch: int | None = None, weights: str = "fp32") -> Stepper:
    """A stepper of a recurrent module: it keeps the state and takes one time step a call.

    Args:
        module: ``RNN``, ``LSTM``, ``GRU`` (any number of layers, ``proj_size``) or ``RNNCell``,
            ``LSTMCell``, ``GRUCell``, of torch.nn or fusedrnn, with fp32 parameters. It is read, never
            changed. Streaming is inference: dropout between layers and forward hooks do not run.
        batch: B, the number of independent streams; None for one stream without a batch dimension.
        weights: what a copy of the weights is stored as: ``"fp32"``, ``"bf16"`` (rounded to nearest) or
            ``"int8"`` (round(w / scale), one scale = max|row| / 127 for each row of each weight).
            States, biases and sums are fp32. Steppers of one module with the same storage share one copy.

    Raises:
        TypeError: ``module`` is none of these, or computes something else in a forward of its own.
        ValueError: it is bidirectional, a parameter is not fp32, is replaced by a parametrization or a
            hook, or (int8) is not finite; ``batch`` is below 1 or ``weights`` unknown.
        BackendError: the backend asked for by name cannot run it.
    """
    return Stepper(module, batch, weights)


class Stepper:
    """Made by :func:`streaming`. Shapes below are without B where there is no batch dimension.

    One thread at a time may use a stepper; steppers of one module may run in different threads at once.
    A deep copy or an unpickled copy goes on from the state of the original, with the copy of its module.
    """

    def __init__(self, module: nn.Module, batch: int | None = None, weights: str = "fp32") -> None:
        if weights not in STORAGES:
            raise ValueError(f"weights: expected one of {', '.join(STORAGES)}, got {weights!r}")
        if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
            raise ValueError(f"batch: expected None or an int of at least 1, got {batch!r}")
        self._module, self._batch, self._weights = module, batch, weights
        self._spec = spec = spec_of(module)
        device = parameters(module, spec)[0].device
        lead = () if batch is None else (batch,)
        self._input_shape = (*lead, spec.inputs)
        with torch.inference_mode(False), torch.no_grad():  # buffers that any later code may use
            self._output = _zeros(*lead, spec.proj, device=device)
            self._buffers = [
                _zeros(spec.layers, batch or 1, stride(width), device=device) for width in spec.widths
            ]
        self._states = [buffer[..., :width] for buffer, width in zip(self._buffers, spec.widths)]
        self._written = (self._output,)
        self._bind()

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Take one time step of every stream.

        Args:
            x: ``[B, I]``, fp32, any strides.
            out: ``[B, P]``, fp32: receives the output and is returned instead of the stepper's buffer.

        Returns:
            The output of the last layer, ``[B, P]`` (P = H without ``proj_size``). It is the stepper's own
            buffer, the same tensor every time, and the next step overwrites it: clone what is to stay.
            No gradient is recorded; autograd notices if a tensor that it saved has been overwritten.

        Raises:
            TypeError: ``x`` is no tensor.
            ValueError: its dtype is not fp32.
            RuntimeError: its shape or device is wrong, ``out`` cannot be written, the module has moved to
                another device, or the stepper is running in another thread.
            ValueError: the module's parameters are no longer what :func:`streaming` takes.

        After an error the state is what it was.
        """
        if out is not None:
            _check("out", out, tuple(self._output.shape), self._output.device)
            _check_writable("out", out)
        if not self._run(x, torch.get_num_threads(), False):
            self._run_changed(x)
        increment_version(self._written)
        return self._output if out is None else out.copy_(self._output)

    def reset(self, mask: Tensor | None = None) -> None:
        """Set the state of all streams, or those where ``mask`` (bool, ``[B]``) is true, to zero."""
        if mask is None:
            for state in self._states:
                state.zero_()
            return
        _check("mask", mask, self._input_shape[:-1], self._output.device, torch.bool)
        for state in self._states:
            state.masked_fill_(mask.reshape(-1, 1), 0)

    @property
    def state(self) -> Any:
        """A copy of the state, shaped as the module's ``hx``: h ``[L, B, P]``, for LSTM in a tuple with c
        ``[L, B, H]``; for cells without L. Setting it copies."""
        copies = tuple(self._shaped(state).clone() for state in self._states)
        return copies if len(copies) == 2 else copies[0]

    @state.setter
    def state(self, value: Any) -> None:
        values = value if isinstance(value, (tuple, list)) else (value,)
        if len(values) != len(self._states):
            raise TypeError(
                f"state: expected {'(h, c)' if len(self._states) == 2 else 'h'}, got {len(values)} values"
            )
        into = [self._shaped(state) for state in self._states]
        for name, new, old in zip(("state h", "state c"), values, into):
            _check(name, new, tuple(old.shape), old.device)
        with torch.no_grad():
            for new, old in zip(values, into):
                old.copy_(new)

    def refresh(self) -> None:
        """Make all steppers of the module read its parameters again; only a write that leaves no trace needs
        it, as through ``.data`` or shared memory."""
        forget([self._module])

    def __reduce__(self) -> Any:
        return _restored, (self._module, self._batch, self._weights, self.state)

    def _shaped(self, state: Tensor) -> Tensor:
        """A state [L, B, ...] as the module's hx has it."""
        if self._batch is None:
            state = state.squeeze(1)
        return state.squeeze(0) if self._spec.is_cell else state

    def _bind(self) -> None:
        """Find what runs a step, for the parameters as they are."""
        spec = self._spec
        device = parameters(self._module, spec)[0].device
        if device != self._output.device:
            raise RuntimeError(
                f"module: its parameters went from {self._output.device} to {device}: stream it again"
            )
        request = select.Request(spec.cell, torch.float32, self._output.device.type)
        wanted = select.requested()
        reason = select.no_kernel(request)
        if wanted in ("reference", "torch"):
            reason = f"{wanted!r} was asked for"
        elif request.device_type != "cpu":
            reason = f"its stepper runs on a CPU, got device {request.device_type}"
        if reason is None:
            pack = shared_pack(self._module, spec, self._weights)
            self._run = self._native_run(pack)
            self._pack: Pack | None = pack
            return
        if wanted == "native":
            select.choose(request)  # raises
        select.say_once(f"fusedrnn.streaming runs the module's own forward, which is slow ({reason})")
        self._run, self._pack = self._plain_run, None

    def _native_run(self, pack: Pack) -> Callable[[Any, int, bool], bool | None]:
        spec, batch = self._spec, self._batch or 1
        strides = [stride(spec.hidden), stride(spec.proj)]
        with torch.inference_mode(False):
            new = _zeros(spec.layers, batch, strides[1])
            raw = _zeros(batch, strides[0]) if spec.proj != spec.hidden else None
        states = [*self._buffers, None][:2]
        layers = []
        for k, fields in enumerate(pack.layers):
            scratch = [None if t is None else t[k] for t in (states[0], new, states[1])]
            layers.append((*fields, *map(pointer, scratch), pointer(raw)))
        memory = (pack, self._buffers, new, raw, self._output)
        number, storage = kernels._CELLS[spec.cell].number, STORAGES.index(self._weights)
        shape = (batch, spec.hidden, spec.proj, *strides)
        return native._C.stepper(
            pack.watch,
            memory,
            number,
            storage,
            self._batch is not None,
            shape,
            pointer(self._output),
            layers,
        )

    def _run_changed(self, x: Any) -> None:
        """A step that could not run at once: x is wrong or unusual, or the parameters have changed."""
        _check("x", x, self._input_shape, self._output.device)
        if self._pack is not None and self._pack.watch.changed():
            self._bind()
        threads = torch.get_num_threads()
        # The parameters may have changed once more: the step is one of the moment when they were read.
        if not self._run(x, threads, True) and not self._run(x.detach().clone(), threads, True):
            raise RuntimeError(f"x: expected a tensor with memory of its own, got {type(x).__name__}")

    def _plain_run(self, x: Any, threads: int, anyway: bool) -> bool:
        """The module's own forward, as torch or the backend in force has it, without dropout."""
        _check("x", x, self._input_shape, self._output.device)
        spec = self._spec
        weights = [rounded(p.detach(), self._weights) for p in parameters(self._module, spec)]
        with torch.no_grad():
            x = x.detach().view(-1, spec.inputs)
            hx = self._states[0] if len(self._states) == 1 else tuple(self._states)
            if spec.is_cell:
                hx = hx[0] if len(self._states) == 1 else tuple(s[0] for s in self._states)
                new = getattr(functional, f"{spec.cell}_cell")(x, hx, *weights)
                last = [s[None] for s in (new if isinstance(new, tuple) else (new,))]
                output = last[0]
            else:
                bias = "bias_ih_l0" in spec.names[0]
                call = getattr(functional, spec.cell)
                output, *last = call(x[None], hx, weights, bias, spec.layers, 0.0, False, False, False)
            for state, new in zip(self._states, last):
                state.copy_(new)
            self._output.copy_(output.view_as(self._output))
        return True


def _zeros(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """What kernels read: of fp32 and on that device, whatever torch's defaults are."""
    return torch.zeros(shape, dtype=torch.float32, device=device)


def _restored(module: nn.Module, batch: int | None, weights: str, state: Any) -> Stepper:
    stepper = Stepper(module, batch, weights)
    stepper.state = state
    return stepper


def _check(
    name: str, value: Any, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    if tuple(value.shape) != tuple(shape):
        raise RuntimeError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    if value.layout is not torch.strided:
        raise RuntimeError(f"{name}: expected a strided tensor, got {value.layout}")
    if value.dtype is not dtype:
        raise ValueError(f"{name}: expected {dtype}, got {value.dtype}")
    if value.device != device:
        raise RuntimeError(f"{name}: expected device {device}, got {value.device}")


def _check_writable(name: str, value: Tensor) -> None:
    """What ``copy_`` would refuse, when the step is done already."""
    if value.requires_grad and value.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(f"{name}: expected a tensor to write to, got a leaf that requires grad")
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name}: expected a tensor to write to, got one made in inference mode")
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride())):
        raise RuntimeError(f"{name}: expected a tensor to write to, got an expanded one")
