"""Every kernel that `plan` can pick, as a compiler needs it: no GPU, no tensors (benchmarks/offline)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from . import plan
from .attend_kernels import ANY as ANY_ROWS
from .attend_kernels import (
    attend_fwd_kernel,
    attend_pairs_bwd_kernel,
    attend_rows_bwd_kernel,
    attend_scores_bwd_kernel,
    attend_scores_fwd_kernel,
)
from .attend_launch import CONTEXT, GRADIENTS, NUM_STAGES, PAIRS, PRODUCT, VALUES, Tiles, forward_tiles
from .cells import CELLS, Cell
from .scan_kernels import ANY, scan_bwd_kernel, scan_fwd_kernel
from .scores import SCORES
from .step_kernels import activate_kernel, step_fwd_kernel

_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
_HIDDEN = (16, 32, 64, 80, 128, 256, 512, 1024, 2048)


class Instance(NamedTuple):
    """A kernel to compile; pointers are aligned to 16 bytes, H and the strides multiples of 16."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    maxnreg: int | None
    cooperative: bool
    matrix: bool  # its products must be matrix instructions


def instances() -> Iterator[Instance]:
    """Each once, but for those whose machine code differs from another's in a type or in an activation.

    Four gates, which need the most registers, come in every dtype and precision; of rnn_tanh and rnn_relu,
    and of fp16 and bf16 with fewer gates, one shows what both have. Ragged input with resets is the larger
    kernel, dense input the faster one. Other GPUs pick among the same (tests/test_plans.py).
    """
    yield from _of("lstm", "bf16", "", (False, True))
    yield from _of("lstm", "fp16", "", (True,))
    yield from _of("lstm", "fp32", "ieee", (True,))
    yield from _of("lstm", "fp32", "tf32", (True,))
    yield from _of("gru", "bf16", "", (True,))
    yield from _of("gru", "fp32", "ieee", (True,))
    yield from _of("gru", "fp32", "tf32", (True,))
    yield from _of("rnn_tanh", "fp16", "", (True,))
    yield from _of("rnn_tanh", "fp32", "ieee", (True,))
    yield from _of("rnn_relu", "fp32", "tf32", (True,))
    for score in SCORES:
        for dtype in ("bf16", "fp32"):
            yield from _attends(score, dtype)


def _of(cell: str, dtype: str, precision: str, layouts: tuple[bool, ...]) -> Iterator[Instance]:
    gates, size = CELLS[cell].gates, _SIZES[dtype]
    steps = {plan.one_step(batch, size): None for batch in (16, 32)}
    for backward in (False, True):
        plans = {
            plan.choose(gates, hidden, size, batch, 1, backward, machine): None
            for machine in (plan.H100, plan.RTX4090)
            for hidden in _HIDDEN
            for batch in (16, 32)
        }
        for p in plans | steps:
            for ragged in layouts:
                yield _instance(cell, dtype, p, precision, ragged, backward)
    for p in steps:
        yield _step(cell, dtype, p, precision)
    if precision == "tf32":  # of what follows none has a product
        return
    if CELLS[cell].saved:
        yield _again(cell, dtype)


def _instance(cell: str, dtype: str, p: plan.Plan, precision: str, ragged: bool, backward: bool) -> Instance:
    spec = CELLS[cell]
    pass_ = "backward" if backward else "forward"
    tiles = f"{p.schedule} {p.BB}x{p.BU}x{p.BK}" + (f" held x{p.NK}" if p.hold else "")
    layout = "ragged" if ragged else "dense"
    name = f"{pass_} {cell} {dtype} {precision} {tiles} {layout}"
    persistent = p.schedule == "persistent"
    kernel = scan_bwd_kernel if backward else scan_fwd_kernel
    pointers = (_backward if backward else _forward)(spec, f"*{dtype}")
    constants: dict[str, object] = {
        **(_backward_constants(spec) if backward else _forward_constants(spec)),
        "G": spec.gates,
        "S": spec.states,
        "RESETS": ragged,
        "RAGGED": ragged,
        "RESIDENT": p.schedule == "resident",
        "PERSISTENT": persistent,
        "HOLD": p.hold,
        "PRECISION": precision or "ieee",
        "BB": p.BB,
        "BU": p.BU,
        "BK": p.BK,
        "NK": p.NK,
    }
    if ragged:
        pointers |= {"resets_ptr": "*u8", "offsets_ptr": "*i64", "lengths_ptr": "*i64"}
    if persistent:
        pointers["counters_ptr"] = "*i32"
    signature, constants = _signature(kernel, pointers, constants)
    return Instance(
        " ".join(name.split()),
        kernel,
        signature,
        constants,
        p.num_warps,
        p.num_stages,
        p.maxnreg,
        persistent,
        precision != "ieee",
    )


def _step(cell: str, dtype: str, p: plan.Plan, precision: str) -> Instance:
    spec = CELLS[cell]
    names = ["x_ptr", "weight_ih_ptr", "bias_ih_ptr", "h_ptr", "weight_hh_ptr", "bias_hh_ptr", "cell_ptr"]
    names += ["output_ptr", "last_h_ptr", "last_cell_ptr", "saved_ptr"]
    keep = spec.states > 1
    pointers = dict.fromkeys(names, f"*{dtype}") | ({"kept_ptr": "*fp32"} if keep else {})
    scan = _forward_constants(spec)
    constants = {name: scan[name] for name in ("ACTIVATE", "UPDATE", "GP", "SAVED", "HAS_BIAS")} | {
        "G": spec.gates,
        "S": spec.states,
        "KEEP": keep,
        "PRECISION": precision or "ieee",
        "BB": p.BB,
        "BU": p.BU,
        "BK": p.BK,
    }
    name = " ".join(f"step {cell} {dtype} {precision} {p.BB}x{p.BU}x{p.BK}".split())
    signature, constants = _signature(step_fwd_kernel, pointers, constants)
    return Instance(
        name,
        step_fwd_kernel,
        signature,
        constants,
        p.num_warps,
        p.num_stages,
        p.maxnreg,
        False,
        precision != "ieee",
    )


def _again(cell: str, dtype: str) -> Instance:
    """Of `recompute`."""
    spec = CELLS[cell]
    pointers = dict.fromkeys(("x_gates_ptr", "h_gates_ptr", "saved_ptr"), f"*{dtype}")
    rows, units = plan.RECOMPUTED
    constants: dict[str, object] = {"ACTIVATE": spec.activate, "G": spec.gates, "SAVED": spec.saved}
    constants |= {"BB": rows, "BU": units}
    signature, constants = _signature(activate_kernel, pointers, constants)
    name = f"recompute {cell} {dtype}"
    return Instance(name, activate_kernel, signature, constants, 4, 3, None, False, False)


def _forward(cell: Cell, t: str) -> dict[str, str]:
    names = ["x_gates_ptr", "weight_ptr", "bias_ptr", "start_ptr", "h_ptr", "output_ptr"]
    names += ["saved_ptr"] if cell.saved else []
    return dict.fromkeys(names, t) | _fp32(cell, "states_ptr")


def _backward(cell: Cell, t: str) -> dict[str, str]:
    names = ["weight_ptr", "saved_ptr", "cells0_ptr", "h_ptr", "start_ptr", "grad_ptr", "d_x_gates_ptr"]
    return dict.fromkeys([*names, "d_h_gates_ptr"], t) | _fp32(cell, "d_states_ptr")


def _fp32(cell: Cell, states: str) -> dict[str, str]:
    return {states: "*fp32"} | ({"cells_ptr": "*fp32"} if cell.states > 1 else {})


def _forward_constants(cell: Cell) -> dict[str, object]:
    return {
        "ACTIVATE": cell.activate,
        "UPDATE": cell.update,
        "GP": plan.power_of_two(cell.gates),
        "SAVED": cell.saved,
        "HAS_BIAS": True,
        "SAVE": True,
    }


def _backward_constants(cell: Cell) -> dict[str, object]:
    return {
        "BACKWARD": cell.backward,
        "SAVED": max(1, cell.saved),
        "SPLIT": cell.split,
        "READS_H": cell.reads_h,
        "HAS_GRAD": True,
    }


# ---- of the attend -----------------------------------------------------------------------------


def _attends(score: str, dtype: str) -> Iterator[Instance]:
    """The largest kernels: with a mask, lengths, weights and dropout."""
    spec, t = SCORES[score], f"*{dtype}"
    fixed = {"PRECISION": "ieee", "DROPOUT": True}
    v = {"v_ptr": t} if score == "additive" else {}
    common = dict.fromkeys(("query_ptr", "key_ptr", "mask_ptr"), t) | v
    common |= {"lengths_ptr": "*i64", "energies_ptr": "*fp32"}
    made = dict.fromkeys(("value_ptr", "context_ptr", "weights_ptr"), t) | {"probabilities_ptr": "*fp32"}
    of_score: dict[str, object] = {"START": spec.start, "ADD": spec.add, "PARTS": spec.parts}
    finished = fixed | of_score | {"FINISH": spec.finish, "BT": PRODUCT.others}
    tiles = forward_tiles(score, _SIZES[dtype])
    blocks = {"BQ": tiles.rows, "BK": tiles.others, "BD": tiles.columns}
    constants = finished | blocks | {"BV": VALUES}
    yield _attend("forward", score, dtype, attend_fwd_kernel, tiles, common | made, constants)
    if score == "additive":
        blocks = {"BQ": PAIRS.rows, "BK": PAIRS.others, "BD": PAIRS.columns}
        yield _attend("scores", score, dtype, attend_scores_fwd_kernel, PAIRS, common, of_score | blocks)
        pointers = made | {name: common[name] for name in ("lengths_ptr", "energies_ptr")}
        tiles = CONTEXT[_SIZES[dtype]]
        blocks = {"BQ": tiles.rows, "BK": tiles.others, "BD": tiles.columns, "BV": tiles.columns}
        yield _attend("context", score, dtype, attend_fwd_kernel, tiles, pointers, finished | blocks)
    tiles = PRODUCT if score == "dot" else GRADIENTS
    blocks = {"BO": tiles.rows, "BT": tiles.others, "BD": tiles.columns}
    for keys in (False, True):
        name = f"backward {'keys' if keys else 'queries'}"
        pointers = {"other_ptr": t, "d_own_ptr": t, "lengths_ptr": "*i64", "g_ptr": "*fp32"}
        if score == "dot":
            constants = {"KEYS": keys, "PRECISION": "ieee", **blocks}
            yield _attend(name, score, dtype, attend_rows_bwd_kernel, tiles, pointers, constants)
        else:
            pointers |= {"own_ptr": t, "v_ptr": t} | ({} if keys else {"d_v_ptr": "*fp32"})
            constants = {"PREPARE": spec.prepare, "BACKWARD": spec.backward, "CLOSE": spec.close}
            constants |= {"PARTS": spec.parts, "KEYS": keys} | blocks
            yield _attend(name, score, dtype, attend_pairs_bwd_kernel, tiles, pointers, constants)
    if score == "dot":  # that of the scores is the same for all
        names = ("value_ptr", "grad_context_ptr", "grad_weights_ptr")
        sums = ("probabilities_ptr", "d_scores_ptr", "dropped_ptr")
        pointers = dict.fromkeys(names, t) | dict.fromkeys(sums, "*fp32") | {"lengths_ptr": "*i64"}
        blocks = {"BQ": PRODUCT.rows, "BK": PRODUCT.others, "BV": VALUES}
        yield _attend(
            "backward scores", score, dtype, attend_scores_bwd_kernel, PRODUCT, pointers, fixed | blocks
        )


def _attend(
    pass_: str,
    score: str,
    dtype: str,
    kernel: Any,
    tiles: Tiles,
    pointers: dict[str, str],
    constants: dict[str, object],
) -> Instance:
    signature, constexprs = _signature(kernel, pointers, constants)
    return Instance(
        f"attend {pass_} {score} {dtype} {tiles.rows}x{tiles.others}x{tiles.columns}",
        kernel,
        signature,
        constexprs,
        tiles.num_warps,
        NUM_STAGES,
        None if pass_ == "scores" else plan.MAX_REGISTERS,
        False,
        dtype == "bf16" and (score == "dot" or pass_ in ("forward", "context")),
    )


_TYPES = {"scale": "fp32", "kept": "fp32", "threshold": "i32", "seed": "i64"}


def _signature(
    kernel: Any, pointers: dict[str, str], constants: dict[str, object]
) -> tuple[dict[str, str], dict[str, object]]:
    """The type of every argument, and the constants with those pointers that are None."""
    signature, constants = {}, dict(constants)
    for argument in kernel.arg_names:
        if argument in pointers:
            signature[argument] = pointers[argument]
        elif argument in constants or argument.endswith("_ptr"):
            signature[argument] = "constexpr"
            constants.setdefault(argument, None)
        else:
            anything = "i32" if argument in (*ANY, *ANY_ROWS) else "i32:16"
            signature[argument] = _TYPES.get(argument, anything)
    return signature, constants
