"""What no comparison of numbers at one size shows: `python -m benchmarks.gpu.checks NAME`.

Each check prints a line per backend and cell; the exit status is 0 if all hold, 1 if not, 77 if there was
nothing to check. On a CPU everything runs that needs no graph and no stream.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedrnn import stack
from fusedrnn.backends import select
from fusedrnn.bench.device import Call, Device
from fusedrnn.bench.gpu import DEVICES
from fusedrnn.budget import Parity, check, raised
from fusedrnn.cells import CELLS
from fusedrnn.testing import draw_inputs, stock
from fusedrnn.tools import DTYPES, make_module, no_gpu, tf32

from .driver import SKIPPED


class Sizes(NamedTuple):
    hidden: int
    batch: int
    time: int
    long: int
    waves: int


# 65,535 is what a grid dimension can be, and where cuDNN ends; `waves` are several chunks of a wavefront.
SIZES = Sizes(hidden=64, batch=16, time=64, long=65_600, waves=4 * stack.STEPS + 3)
TINY = Sizes(hidden=5, batch=3, time=4, long=9, waves=5)
STEPS, RATE = 3, 0.1  # of training
RUNS = 5

Named = dict[str, Tensor]
Checked = Callable[[Device, str, str, Sizes], str]  # device, cell, dtype, sizes -> what is wrong, or ""


def backends(device: Device) -> list[str]:
    """Every fused backend that can run an fp32 LSTM on a device, or the reference where there is none."""
    request = select.Request("lstm", torch.float32, device.name)
    *fused, last = (name for name in select.ORDER if select.against(name, request) is None)
    return fused or [last]


def _module(cell: str, dtype: str, hidden: int, device: Device, layers: int = 1) -> nn.RNNBase:
    return make_module(cell, hidden, hidden, num_layers=layers, dtype=DTYPES[dtype]).to(device.name)


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> Named:
    """Outputs, and the gradients of the input and of every weight."""
    input = inputs[0].detach().requires_grad_()
    names, weights = zip(*module.named_parameters())
    output, last = module(input, *inputs[1:])
    last = last if isinstance(last, tuple) else (last,)
    tensors = [input, *weights]
    grads = torch.autograd.grad([output, *last], tensors, [torch.ones_like(t) for t in (output, *last)])
    outputs = {f"last[{i}]": t.detach() for i, t in enumerate(last)}
    return {"output": output.detach(), **outputs, **dict(zip(("grad input", *names), grads))}


def _train(module: nn.Module, inputs: tuple[Any, ...], times: int) -> None:
    step = _training_step(module, inputs)
    for _ in range(times):
        step()


def _training_step(module: nn.Module, inputs: tuple[Any, ...]) -> Call:
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        module(*inputs)[0].square().mean().backward()
        optimizer.step()

    return step


def _weights(module: nn.Module) -> Named:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def _on(device: str, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def to(value: Any) -> Any:
        return tuple(map(to, value)) if isinstance(value, tuple) else value.to(device, dtype)

    return tuple(map(to, inputs))


def _red(parity: Parity) -> str:
    return "; ".join(map(str, parity.failures))


def _differs(ours: Named, again: Named) -> str:
    """The tensors that are not the same to the bit."""
    return ", ".join(
        name for name, tensor in ours.items() if not torch.equal(_bits(tensor), _bits(again[name]))
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# ---- the checks --------------------------------------------------------------------------------


def graphs(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """Weights after a few replays of a captured training step, under the error budget."""
    module = _module(cell, dtype, sizes.hidden, device)
    theirs, exact = stock(module), stock(module).double().cpu()
    before = copy.deepcopy(module.state_dict())
    inputs = draw_inputs(module, time=sizes.time, batch=sizes.batch)
    step = _training_step(module, inputs)
    replay = device.capture(step) if device.graphs else step
    with torch.no_grad():  # capturing has run some steps
        for name, weight in module.named_parameters():
            weight.copy_(before[name])
    for _ in range(STEPS):
        replay()
    device.synchronize()
    _train(theirs, inputs, STEPS)

    def oracle() -> Named:
        trained = copy.deepcopy(exact)
        _train(trained, _on("cpu", inputs, torch.float64), STEPS)
        return _weights(trained)

    return _red(check(_weights(module), _weights(theirs), oracle))


def sync(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """A forward and backward in which torch's own calls may not wait for the device.

    What waits without torch's knowledge cannot be captured, which the check `graphs` would show.
    """
    module = _module(cell, dtype, sizes.hidden, device)
    inputs = draw_inputs(module, time=sizes.time, batch=sizes.batch)
    _run(module, inputs)
    with _no_waiting(device):
        _run(module, inputs)
    return ""


@contextmanager
def _no_waiting(device: Device) -> Iterator[None]:
    if device.name != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def long(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """More steps than 65,535; torch's side runs on the CPU, as cuDNN refuses."""
    module = _module(cell, dtype, 4, device)
    inputs = draw_inputs(module, time=sizes.long, batch=2)
    ours = _run(module, inputs)

    def own(dtype: torch.dtype) -> Named:
        return _run(stock(module).to("cpu", dtype), _on("cpu", inputs, dtype))

    return _red(check(ours, own(DTYPES[dtype]), lambda: own(torch.float64)))


def streams(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """Two calls at once, each on a stream of its own, give what they give one after the other."""
    pairs = []
    for seed in range(2):
        module = _module(cell, dtype, sizes.hidden, device)
        pairs.append((module, draw_inputs(module, time=sizes.time, batch=sizes.batch, seed=seed)))
    alone = [_run(*pair) for pair in pairs]
    device.synchronize()
    contexts = [device.side_stream() if device.graphs else nullcontext() for _ in pairs]
    for _ in range(RUNS):
        together = []
        for context, pair in zip(contexts, pairs):
            with context:
                together.append(_run(*pair))
        device.synchronize()
        if wrong := ", ".join(filter(None, map(_differs, alone, together))):
            return f"not the same on two streams: {wrong}"
    return ""


def wavefront(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """A stack whose layers run beside each other: the same bits each time, within the error budget."""
    module = _module(cell, dtype, sizes.hidden, device, layers=3)
    inputs = draw_inputs(module, time=sizes.waves, batch=sizes.batch)
    ours = _run(module, inputs)
    for _ in range(RUNS):
        if wrong := _differs(ours, _run(module, inputs)):
            return f"not the same from run to run: {wrong}"

    def own(dtype: torch.dtype) -> Named:
        return _run(stock(module).to("cpu", dtype), _on("cpu", inputs, dtype))

    return _red(check(ours, own(DTYPES[dtype]), lambda: own(torch.float64)))


def determinism(device: Device, cell: str, dtype: str, sizes: Sizes) -> str:
    """Outputs and gradients are the same to the bit, run to run."""
    module = _module(cell, dtype, sizes.hidden, device)
    inputs = draw_inputs(module, time=sizes.time, batch=sizes.batch)
    first = _run(module, inputs)
    for _ in range(RUNS):
        if wrong := _differs(first, _run(module, inputs)):
            return f"not the same from run to run: {wrong}"
    return ""


CHECKS: dict[str, Checked] = {c.__name__: c for c in (graphs, sync, long, streams, wavefront, determinism)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one check for every backend, cell and dtype asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="default: cuda")
    parser.add_argument("--backend", nargs="+", choices=select.ORDER, help="default: the fused ones")
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS), help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the check works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and (why_not := no_gpu()):
        parser.error(why_not)
    device = DEVICES[arguments.device]()
    if not device.graphs and arguments.check in ("graphs", "streams"):
        print(f"on {device.name} without graphs and streams: calls run one after the other")
    names = arguments.backend or backends(device)
    rows = []
    for name in names:
        for cell in arguments.cell:
            for dtype in arguments.dtype:
                reason = select.against(name, select.Request(cell, DTYPES[dtype], device.name))
                if reason is not None:
                    print(f"{name} {cell} {dtype}: not checked: {reason}", flush=True)
                    continue
                wrong = _guarded(arguments, name, device, cell, dtype)
                rows.append({"backend": name, "cell": cell, "dtype": dtype, "wrong": wrong})
                print(f"{name} {cell} {dtype}: {f'RED {wrong}' if wrong else 'ok'}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))
    red = [f"{row['backend']} {row['cell']} {row['dtype']}" for row in rows if row["wrong"]]
    print(f"{arguments.check}: {len(rows)} checked, {len(red)} red {' '.join(red)}".rstrip())
    return (1 if red else 0) if rows else SKIPPED


def _guarded(arguments: argparse.Namespace, name: str, device: Device, cell: str, dtype: str) -> str:
    """What is wrong, an error included: those after it are still checked."""
    sizes = TINY if arguments.tiny else SIZES
    try:
        with select.use_backend(name), tf32("off"):
            return CHECKS[arguments.check](device, cell, dtype, sizes)
    except Exception as error:
        return _red(raised(error))


if __name__ == "__main__":
    sys.exit(main())
