"""The compiled module: raw pointers as integers, or tensors, which it reads through DLPack."""

from collections.abc import Callable
from typing import Any

def layer_forward(
    cell: int,
    threads: int,
    directions: int,
    layers: int,
    save: int,
    input: object,
    batch_sizes: object,
    weights: object,
    states: object,
    resets: object,
) -> tuple[list[Any], list[Any], list[Any]]: ...
def layer_backward(
    cell: int,
    threads: int,
    directions: int,
    layers: int,
    input: object,
    batch_sizes: object,
    weights: object,
    states: object,
    outputs: object,
    saved: object,
    grad_output: object,
    grad_last: object,
    needs: tuple[bool, object, object],
    resets: object,
) -> tuple[list[Any], list[Any], list[Any]]: ...
def layers(
    cell: int,
    threads: int,
    input: object,
    batch_sizes: object,
    hx: object,
    params: object,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    watched: bool,
) -> tuple[Any, ...] | bool | None: ...
def linear_forward(threads: int, input: object, weight: object, bias: object, keep: bool) -> Any: ...
def linear_backward(
    threads: int,
    grad: object,
    input: object,
    weight: object,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Any, Any, Any] | None: ...
def forget_packs(weight: object) -> None: ...
def packs() -> list[tuple[int, str, int]]: ...
def share_layer(
    gates: int, time: int, batch: int, hidden: int, inputs: int, directions: int, threads: int
) -> tuple[int, bool]: ...
def math(f64: bool, function: int, input: int, output: int, n: int) -> None: ...
def fingerprint(data: int, bytes: int) -> int: ...
def read(data: int, bytes: int, repeats: int, threads: int) -> int: ...
def width(storage: int) -> int: ...

class Watch:
    def __init__(self, parameters: dict[str, Any], names: list[str]) -> None: ...
    def changed(self) -> bool: ...
    def spoil(self) -> None: ...

def stepper(
    watch: Watch,
    memory: object,
    cell: int,
    storage: int,
    batched: bool,
    shape: tuple[int, ...],
    output: int,
    layers: list[tuple[int, ...]],
) -> Callable[[object, int, bool], bool | None]: ...
def attend_forward(
    threads: int,
    score: int,
    scale: float,
    dropout: float,
    seed: int,
    query: object,
    key: object,
    value: object,
    v: object,
    lengths: object,
    mask: object,
    need_weights: bool,
    save: bool,
) -> Any: ...
def attend_backward(
    threads: int,
    score: int,
    scale: float,
    dropout: float,
    seed: int,
    query: object,
    key: object,
    value: object,
    v: object,
    lengths: object,
    probabilities: object,
    grad_context: object,
    grad_weights: object,
    needs_query: bool,
    needs_key: bool,
    needs_value: bool,
    needs_v: bool,
) -> Any: ...
def step_together(storage: int) -> int: ...
def attend_keys(versioned: bool) -> object: ...
def attend_step(
    keys: object,
    threads: int,
    need_weights: bool,
    scale: float,
    query: object,
    weight: object,
    bias: object,
    v: object,
    g: object,
    key: object,
    value: object,
    lengths: object,
    mask: object,
) -> tuple[Any, Any] | None: ...
def one_step(
    cell: int,
    threads: int,
    is_layer: bool,
    input: object,
    h: object,
    c: object,
    weight_ih: object,
    weight_hh: object,
    bias_ih: object,
    bias_hh: object,
) -> tuple[Any, ...] | None: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def isa_levels() -> list[str]: ...
def cpu_features() -> list[str]: ...

class Crowd:
    def __init__(self) -> None: ...
    def size(self, threads: int, now: int) -> int: ...
    def is_careful(self) -> bool: ...
    def waited(self, length: int, lost: int) -> None: ...
    def away(self, now: int, length: int, away: int) -> None: ...

class cuda:
    architectures: list[str]
    missing: str | None
    @staticmethod
    def scan_fits(cell: int, storage: int, schedule: int, hidden: int, backward: bool) -> bool: ...
    @staticmethod
    def scan_forward(fields: tuple[int, ...], stream: int) -> None: ...
    @staticmethod
    def scan_backward(fields: tuple[int, ...], stream: int) -> None: ...
    @staticmethod
    def sync_capacity(mechanism: int, threads: int, cluster: int, bytes: int) -> int: ...
    @staticmethod
    def sync_rounds(
        mechanism: int,
        blocks: int,
        threads: int,
        cluster: int,
        bytes: int,
        rounds: int,
        scratch: int,
        result: int,
        stream: int,
    ) -> None: ...
