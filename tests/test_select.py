"""Which backend runs: the table, explicit requests, the warning, and explain."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import explain
from fusedrnn.backends import hand_over, select

LSTM = select.Request("lstm", torch.float32, "cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No request in force and nothing remembered, before and after."""

    def forget() -> None:
        select._table.cache_clear()
        select.say_once.cache_clear()
        select.no_kernel.cache_clear()
        fusedrnn.straight._kernels.cache_clear()

    forget()
    with select.use_backend("auto"):
        yield
    forget()


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select.get("native"), "unavailable", lambda: "it is not built")


@pytest.fixture
def native_of_sorts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A native backend that can run everything but GRUs, whether it is built or not."""
    native = select.get("native")
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(
        select.kernels("native", "layer"),
        "unsupported",
        lambda cell, *_: "has no GRU" if cell == "gru" else None,
    )


# ---- the table ---------------------------------------------------------------------------------


def test_the_first_that_can_run_is_chosen(native_of_sorts: None) -> None:
    choice = select.choose(LSTM)
    assert (choice.backend, choice.why_not) == ("native", {})


@pytest.mark.filterwarnings("ignore:fusedrnn runs its reference path")
def test_the_reference_takes_what_no_kernel_does(native_of_sorts: None) -> None:
    choice = select.choose(select.Request("gru", torch.float32, "cpu"))
    assert (choice.backend, list(choice.why_not)) == ("reference", ["native", "triton"])
    assert choice.why_not["native"] == "has no GRU"
    assert str(choice).splitlines()[1] == "  not native: has no GRU"


def test_nothing_can_run_an_integer() -> None:
    with pytest.raises(select.BackendError, match=r"reference: torch.int32 is not a floating dtype"):
        select.choose(select.Request("lstm", torch.int32, "cpu"))


def test_the_fallback_is_said_once_per_reason(no_native: None) -> None:
    with pytest.warns(UserWarning, match=r"reference path, which is slow \(native: it is not built"):
        select.choose(LSTM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            select.choose(LSTM)
            select.choose(select.Request("rnn_tanh", torch.float64, "cpu"))


def test_a_module_without_a_kernel_says_what_runs(no_native: None) -> None:
    lstm, x = fusedrnn.LSTM(2, 3), torch.zeros(4, 1, 2)
    with pytest.warns(UserWarning, match="torch's own path runs.*it is not built"):
        eager = lstm(x)[0]
    with pytest.warns(UserWarning, match="reference path.*it is not built"):
        transformed = torch.func.vmap(lambda x: lstm(x)[0])(x[None])[0]
    torch.testing.assert_close(eager, transformed)


# ---- explicit requests -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuda", "", "Native"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of native, triton, reference, torch or auto, got"):
        select.use_backend(name)
    assert select.requested() is None


def test_a_request_never_falls_back(no_native: None) -> None:
    module = fusedrnn.LSTM(2, 3)
    with (
        fusedrnn.use_backend("native"),
        pytest.raises(fusedrnn.BackendError, match="'native' was asked for and cannot run this: it is not"),
    ):
        module(torch.zeros(1, 1, 2))


def test_a_request_that_the_kernels_lack_never_falls_back(native_of_sorts: None) -> None:
    with (
        fusedrnn.use_backend("native"),
        pytest.raises(fusedrnn.BackendError, match="has no GRU"),
    ):
        fusedrnn.GRU(2, 3)(torch.zeros(1, 1, 2))


def test_requests_warn_about_nothing() -> None:
    with fusedrnn.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedrnn.LSTM(2, 3)(torch.zeros(1, 1, 2))


def test_requests_nest_and_end() -> None:
    with fusedrnn.use_backend("reference"):
        with fusedrnn.use_backend("torch"):
            assert select.requested() == "torch"
            with fusedrnn.use_backend("auto"):
                assert select.requested() is None
        assert select.requested() == "reference"
        with pytest.raises(KeyError), fusedrnn.use_backend("torch"):
            raise KeyError
        assert select.requested() == "reference"
    assert select.requested() is None


def test_a_request_without_with_stays() -> None:
    fusedrnn.use_backend("reference")
    assert select.requested() == "reference"
    fusedrnn.use_backend("auto")
    assert select.requested() is None


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_the_request_is_what_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    layer = fusedrnn.ops.layer
    monkeypatch.setattr(fusedrnn.ops, "layer", lambda *args: seen.append(args[6]) or layer(*args))
    with fusedrnn.use_backend(name):
        fusedrnn.GRU(2, 3, num_layers=2)(torch.zeros(4, 1, 2))
    assert seen == ([name] * 2 if name != "torch" else [])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "'reference'"),
        ("torch", "'torch'"),
        ("auto", "None"),
        ("", "None"),
        ("gpu", "ValueError: FUSEDRNN_BACKEND: expected one of native, triton, reference, torch or auto"),
    ],
)
def test_the_environment_asks_too(value: str, expected: str) -> None:
    code = "from fusedrnn.backends import select; print(repr(select.requested()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FUSEDRNN_BACKEND": value, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert expected in done.stdout + done.stderr


# ---- explain -----------------------------------------------------------------------------------


def test_explain_gives_a_reason_for_every_backend(
    native_of_sorts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusedrnn.backends.triton.unavailable", lambda: None)
    choice = explain(fusedrnn.LSTM(2, 3), torch.zeros(4, 1, 2))
    assert choice.backend == "native"
    assert choice.why_not == {
        "triton": "has CUDA kernels only, got device cpu",
        "reference": "native comes first and can run this",
        "torch": "not measured faster at this size",
    }
    assert str(choice).splitlines()[0] == "native: the first of the table that can run this"


def test_explain_says_why_kernels_are_not_used(native_of_sorts: None) -> None:
    choice = explain(fusedrnn.GRUCell(2, 3), torch.zeros(1, 2))
    assert choice.backend == "torch"
    assert choice.why_not["native"] == "has no GRU"


def test_explain_follows_a_request(native_of_sorts: None) -> None:
    with fusedrnn.use_backend("torch"):
        choice = explain(fusedrnn.LSTM(2, 3), torch.zeros(4, 1, 2))
    assert (choice.backend, choice.why_not["native"]) == ("torch", "another was asked for by name")
    with fusedrnn.use_backend("native"), pytest.raises(fusedrnn.BackendError, match="has no GRU"):
        explain(fusedrnn.GRU(2, 3))


@pytest.mark.parametrize(
    ("module", "input", "sizes"),
    [
        (fusedrnn.LSTM(2, 3), torch.zeros(4, 5, 2), ("lstm", 4, 5, 3)),
        (fusedrnn.GRU(2, 3, batch_first=True), torch.zeros(4, 5, 2), ("gru", 5, 4, 3)),
        (fusedrnn.RNN(2, 3, nonlinearity="relu"), torch.zeros(4, 2), ("rnn_relu", 4, 1, 3)),
        (fusedrnn.RNNCell(2, 3), torch.zeros(6, 2), ("rnn_tanh_cell", 1, 6, 3)),
        (fusedrnn.GRUCell(2, 3), torch.zeros(2), ("gru_cell", 1, 1, 3)),
        (
            fusedrnn.LSTM(2, 3),
            nn.utils.rnn.pack_sequence([torch.zeros(n, 2) for n in (7, 4, 1)]),
            ("lstm", 7, 3, 3),
        ),
    ],
)
def test_explain_asks_where_torch_is_faster(
    module: Any, input: Any, sizes: tuple[str, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def reason(cell: str, device_type: str, dtype: torch.dtype, *rest: Any, **_: Any) -> str:
        seen.append((cell, *rest[:4]))  # without the device's index
        return "torch is faster here"

    monkeypatch.setattr(hand_over, "reason", reason)
    monkeypatch.setattr(fusedrnn.straight, "one_step", lambda *args, **options: None)  # asks nobody
    choice = explain(module, input)
    with torch.no_grad():
        assert explain(module, input) == choice
        module(input)  # the call asks the same
    assert (choice.backend, choice.why) == ("torch", "torch is faster here")
    assert set(choice.why_not) == set(select.ORDER)
    assert seen == [(*sizes, True), (*sizes, False), (*sizes, False)]


def test_explain_leaves_the_warnings_to_the_calls(no_native: None) -> None:
    lstm, x = fusedrnn.LSTM(2, 3), torch.zeros(4, 1, 2)
    attention, query, memory = fusedrnn.BahdanauAttention(2, 2, 3), torch.zeros(1, 2), torch.zeros(1, 4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(lstm, x).backend == "torch"
        assert explain(lstm).backend == "reference"
        assert explain(attention, query, memory).backend == "torch"
    with pytest.warns(UserWarning, match="torch's own path runs"):
        lstm(x)
    with pytest.warns(UserWarning, match="plain torch code runs"):
        attention(query, memory)
    with pytest.warns(UserWarning, match="reference path"):
        torch.func.vmap(lambda x: lstm(x)[0])(x[None])


def test_explain_a_stock_module_and_what_is_none() -> None:
    choice = explain(nn.LSTM(2, 3), torch.zeros(4, 1, 2))
    assert choice.backend == "torch"
    assert "stock LSTM" in choice.why
    with pytest.raises(TypeError, match="module: expected a recurrent or attention module, got Linear"):
        explain(nn.Linear(2, 2))


def test_explain_knows_autocast(native_of_sorts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    native = select.kernels("native", "layer")
    monkeypatch.setattr(native, "unsupported", lambda cell, dtype, *_: f"no {dtype}")
    with torch.autocast("cpu", torch.bfloat16), fusedrnn.use_backend("native"):
        with pytest.raises(fusedrnn.BackendError, match=r"no torch.bfloat16"):
            explain(fusedrnn.LSTM(2, 3), torch.zeros(4, 1, 2))
        with pytest.raises(fusedrnn.BackendError, match=r"no torch.float64"):
            explain(fusedrnn.LSTM(2, 3, dtype=torch.float64), torch.zeros(4, 1, 2, dtype=torch.float64))


def test_explain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"additive": None, "dot": None}
    monkeypatch.setattr(select, "against", lambda name, request: kernels[request.kind])
    query, memory = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    modules = fusedrnn.BahdanauAttention(4, 4, 6), fusedrnn.CoverageAttention(4, 4, 6)
    for module in modules:
        assert explain(module, query, memory).backend == explain(module).backend == "native"
    dot, lengths = fusedrnn.LuongAttention(4, 4, "dot"), torch.ones(2)
    assert "scaled_dot_product_attention" in explain(dot, query, memory).why
    assert "matrix products" in explain(dot, query.clone().requires_grad_(), memory).why
    assert explain(dot, query, memory, lengths).backend == "native"
    assert explain(dot, query, memory, None, query > 0, True).backend == "native"
    wide = torch.zeros(2, 3, 96)
    assert explain(fusedrnn.LuongAttention(96, 96, "dot"), wide, wide, None, None, True).backend == "native"
    multihead = fusedrnn.MultiheadAttention(4, 2)
    padding = torch.zeros(3, 2, dtype=torch.bool)
    assert explain(multihead, query, query, query, padding).backend == "native"
    assert explain(multihead, query, query, query, padding > 0, False).backend == "native"
    with torch.no_grad():
        assert "scaled_dot_product" in explain(multihead, query, query, query, padding, False).why
    assert "matrix products" in explain(multihead, query, query, query).why
    with torch.no_grad():
        assert explain(multihead, query, query, query, None, False).backend == "torch"
    assert explain(multihead, query, query, query, None, False).backend == "torch"
    assert explain(fusedrnn.AdditiveAttention(4), [query, memory]).backend == "native"
    assert "stock" in explain(nn.MultiheadAttention(4, 2)).why
    kernels["additive"] = "has no attend kernels"
    select.no_kernel.cache_clear()
    choice = explain(fusedrnn.BahdanauAttention(4, 4, 6), query, memory)
    assert (choice.backend, choice.why_not["native"]) == ("torch", "has no attend kernels")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backend of every attend that ran; torch.nn's own forward of MultiheadAttention counts as torch."""
    seen: list[str] = []
    module = importlib.import_module("fusedrnn.attend")
    chosen, forward = module._chosen, nn.MultiheadAttention.forward
    monkeypatch.setattr(
        nn.MultiheadAttention, "forward", lambda *args: seen.append("torch") or forward(*args)
    )

    def spy(*args: Any) -> str:
        seen.append(chosen(*args))
        return seen[-1]

    monkeypatch.setattr(module, "_chosen", spy)
    return seen


X, CAUSAL = torch.randn(3, 6, 160), nn.Transformer.generate_square_subsequent_mask(6)
PADDING = torch.zeros(3, 6, dtype=torch.bool)
CALLS = {
    "memory needs a gradient": ("dot", X, X.clone().requires_grad_()),
    "no gradient": ("dot", X, X),
    "query needs one": ("dot", X.clone().requires_grad_(), X),
    "a mask needs one": ("dot", X, X, None, torch.zeros(3, 6, requires_grad=True)),
    "a mask": ("dot", X, X, None, PADDING),
    "lengths": ("dot", X, X, torch.tensor([6, 2, 3])),
    "projected": ("dot", X, fusedrnn.modules.Memory(X, X.clone().requires_grad_())),
    "causal": ("multihead", X, X, X, None, False, CAUSAL, True, True),
    "causal by mask": ("multihead", X, X, X, None, False, CAUSAL, True, False),
    "mixed masks": ("multihead", X, X, X, torch.zeros(3, 6), True, PADDING[:1].expand(6, 6)),
    "two masks": ("multihead", X, X, X, PADDING, True, PADDING[:1].expand(6, 6)),
    "padding": ("multihead", X, X, X, PADDING, False),
    "weights": ("multihead", X, X, X),
    "nothing": ("multihead", X, X, X, None, False),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", ["", "all", "all but the last"])
@pytest.mark.parametrize("call", CALLS)
def test_explain_says_what_runs(
    call: str, frozen: str, grad: bool, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "against", lambda name, request: None)
    monkeypatch.setattr(
        fusedrnn.ops, "attend", lambda score, query, key, value, *_: (query @ key.mT @ value, query @ key.mT)
    )
    form, *inputs = CALLS[call]
    module = fusedrnn.LuongAttention(160, 160, "dot")
    if form == "multihead":
        module = fusedrnn.MultiheadAttention(160, 2, batch_first=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or (frozen != "all" and name.startswith("out_proj")))
    with torch.set_grad_enabled(grad):
        choice = explain(module, *inputs)
        module(*inputs)
    assert [choice.backend] == ran


def test_what_waits_for_its_proof_runs_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = select.Request("lstm", torch.float32, "cuda")
    monkeypatch.setattr(select.kernels("native", "layer"), "unsupported", lambda *_: None)
    monkeypatch.setattr(select.get("native"), "unavailable", lambda: None)
    assert select.passed_over("native", LSTM) is None
    assert "use_backend('native') asks for it" in (select.passed_over("native", on_gpu) or "")
    monkeypatch.setattr("fusedrnn.backends.triton.unavailable", lambda: None)
    assert "use_backend('triton') asks for it" in (select.passed_over("triton", on_gpu) or "")
    assert select.against("triton", on_gpu) is None
    assert "triton: waits for its proof" in (select.no_kernel(on_gpu) or "")
    with fusedrnn.use_backend("triton"):
        assert select.choose(on_gpu).backend == "triton"


# ---- several GPUs ------------------------------------------------------------------------------


class Gpus:
    """In place of torch.cuda: which is current. The second one holds nothing larger than H = 100."""

    def __init__(self) -> None:
        self.current = 0
        self.asked: list[int] = []

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def unsupported(self, cell: str, dtype: torch.dtype, device_type: str, hidden: int = 1) -> str | None:
        self.asked.append(self.current)
        return "too large" if device_type == "cuda" and self.current == 1 and hidden > 100 else None


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    made = Gpus()
    monkeypatch.setattr(select, "UNPROVEN", {("triton", "cuda")})
    monkeypatch.setattr(select.get("native"), "unavailable", lambda: None)
    monkeypatch.setattr(select.kernels("native", "layer"), "unsupported", made.unsupported)
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", made.device)
    return made


def test_the_gpu_of_the_tensors_is_asked(gpus: Gpus) -> None:
    """Not the current one, and each once."""
    large = select.Request("lstm", torch.float32, "cuda", hidden=1000)
    with select.use_backend("native"):
        for _ in range(2):
            assert select.choose(large._replace(device_index=0)).backend == "native"
            with pytest.raises(select.BackendError, match="too large"):
                select.choose(large._replace(device_index=1))
    assert gpus.asked[:2] == [0, 1]
    assert gpus.current == 0
    for index, why_not in ((0, None), (1, "no fused kernel can run it (native: too large"), (0, None)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = hand_over.reason("lstm", "cuda", torch.float32, 5, 3, 1000, True, index)
        assert reason is None if why_not is None else why_not in (reason or "")


def test_without_an_index_it_is_the_current_gpu(gpus: Gpus) -> None:
    large = select.Request("lstm", torch.float32, "cuda", hidden=1000)
    with select.use_backend("native"):
        assert select.choose(large).backend == "native"
        gpus.current = 1
        with pytest.raises(select.BackendError, match="too large"):
            select.choose(large)
        assert select.choose(large._replace(device_index=0)).backend == "native"
    assert gpus.asked == [0, 1]
    assert large.located().device_index == 1


def test_requests_of_a_cpu_are_equal(gpus: Gpus) -> None:
    tensors = torch.zeros(1), torch.zeros(1, device="cpu"), torch.zeros(1, device="cpu:0")
    assert {LSTM._replace(device_index=x.device.index).located() for x in tensors} == {LSTM}


def test_explain_asks_of_the_gpu_of_its_input(gpus: Gpus) -> None:
    class OnTheSecond(torch.Tensor):
        device = torch.device("cuda:1")  # type: ignore[assignment]

    x = torch.zeros(4, 1, 2).as_subclass(OnTheSecond)
    assert explain(fusedrnn.LSTM(2, 100), x).backend == "native"
    choice = explain(fusedrnn.LSTM(2, 1000), x)
    assert (choice.backend, choice.why_not["native"]) == ("torch", "too large")
