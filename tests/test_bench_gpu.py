"""`python -m fusedrnn bench --device cuda`, as far as a machine without a GPU can show it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedrnn
from fusedrnn.__main__ import main
from fusedrnn.backends import select
from fusedrnn.bench import ceilings, command, goals, gpu
from fusedrnn.bench.cases import HEADS, Case
from fusedrnn.bench.device import Call, Cpu, in_turn
from fusedrnn.bench.gpu import SETS, Cuda, GpuCeilings
from fusedrnn.bench.groups import gpu as gpu_grid
from fusedrnn.bench.prepared import Heads, Prepared
from fusedrnn.bench.report import GRAPH_COLUMNS, Result
from fusedrnn.bench.timing import FEWEST, TRIES, Times
from fusedrnn.budget import Row

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
SIZES = ["--hidden", "64", "--batch", "1", "--time", "2", "--seconds", "0"]
SMALL = ["--grid", "gpu", "--cell", "gru", *SIZES, "--backend", "reference"]


@pytest.fixture(autouse=True)
def ceilings_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_SECONDS", 0.0)


# ---- a device without hardware -----------------------------------------------------------------


class Fake(Cpu):
    """The CPU, as a device that has graphs: a capture of a call is the call, and is counted."""

    graphs = True

    def __init__(self, failing: Sequence[int] = ()) -> None:
        self.captures = self.samples = self.released = 0
        self.failing = failing

    def sample(self, call: Call, repeats: int) -> float:
        self.samples += 1
        return Cpu.sample(call, repeats)

    def sets(self, size: int) -> int:
        return 3

    def capture(self, call: Call) -> Call:
        self.captures += 1
        if self.captures in self.failing:
            raise RuntimeError("it waits for the device\nand more")
        return call

    def release(self) -> None:
        self.released += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    device = Fake()
    monkeypatch.setitem(gpu.DEVICES, "cpu", lambda: device)
    return device


def test_a_device_with_graphs_adds_replays(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = [*SMALL, "--mode", "inference", "--dtype", "fp32"]
    assert main(["bench", *arguments, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    (record,) = report["results"]
    assert fake.captures == 2 * 3, "a graph per side and input"
    assert fake.released == 1
    uncounted = TRIES + record["rounds"]  # a turn begins with one
    assert fake.samples == 4 * (uncounted + record["rounds"])
    assert record["rounds"] >= FEWEST
    for times in (record["seconds"], record["graph_seconds"]):
        assert set(times) == {"torch", "fused"}
    replayed = record["graph_seconds"]
    assert record["graph_ratio"] == replayed["torch"]["p50"] / replayed["fused"]["p50"]
    assert record["step_seconds"] == replayed["fused"]["p50"] / 2
    assert record["no_graph"] == {}
    assert report["left_out"] == []
    assert {goal["measure"] for goal in report["goals"]} == {"torch", "graph"}
    head = capsys.readouterr().out.splitlines()[0]
    assert all(column in head for column in GRAPH_COLUMNS)


def test_what_cannot_be_captured_is_timed_all_the_same(fake: Fake, tmp_path: Path) -> None:
    fake.failing = (4,)  # the first of the fused side
    file = tmp_path / "out.json"
    arguments = [*SMALL, "--mode", "inference", "--dtype", "fp32"]
    assert main(["bench", *arguments, "--json", str(file)]) == 0
    (record,) = json.loads(file.read_text())["results"]
    assert record["no_graph"] == {"fused": "RuntimeError: it waits for the device"}
    assert set(record["graph_seconds"]) == {"torch"}
    assert record["graph_ratio"] is None
    assert record["step_seconds"] == record["seconds"]["fused"]["p50"] / 2


def test_a_case_that_raises_is_red_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = Prepared.calls

    def broken(self: Prepared) -> dict[str, Call]:
        if self.case.mode == "inference":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return calls(self)

    monkeypatch.setattr(Prepared, "calls", broken)
    file = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--dtype", "fp32", "--json", str(file)]) == 1
    red, green = json.loads(file.read_text())["results"]
    assert (red["mode"], red["seconds"]) == ("inference", {})
    assert red["parity"]["note"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert green["parity"]["ok"]
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "RED run: RuntimeError: CUDA error" in captured.out


def test_a_deadline_leaves_the_rest_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 1.0, 9.0])
    monkeypatch.setattr(command, "perf_counter", lambda: next(now))
    file = tmp_path / "out.json"
    assert main(["bench", *SMALL, "--deadline", "5", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert [result["dtype"] for result in report["results"]] == ["bf16"]
    assert len(report["left_out"]) == 5
    assert "left out, as time ran out: 5 of 6 cases" in capsys.readouterr().out


def test_every_case_is_saved_as_soon_as_it_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    found: list[int] = []
    run = command.run

    def spy(*arguments: Any) -> Result:
        found.append(len(json.loads(file.read_text())["results"]) if file.exists() else 0)
        return run(*arguments)

    monkeypatch.setattr(command, "run", spy)
    assert main(["bench", *SMALL, "--dtype", "fp32", "--json", str(file)]) == 0
    assert found == [0, 1]


@needs_no_gpu
@pytest.mark.parametrize("argv", [["bench"], ["parity"], ["bench", "--grid", "gpu"]])
def test_without_a_gpu_cuda_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--device", "cuda"])
    assert stop.value.code == 2
    assert f"--device cuda: torch {torch.__version__} " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--full", "--one-step", "--memory", "--loaded"])
def test_what_measures_a_cpu_is_refused_on_a_gpu(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--device", "cuda", option])
    assert stop.value.code == 2
    assert f"{option}: measures the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["on", "off", "strict"])
def test_tf32_is_set_for_both_sides_and_put_back(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32

    def spy(self: Prepared) -> str:
        seen.append((matmul.allow_tf32, cudnn.allow_tf32, cudnn.rnn.fp32_precision))
        return "-"

    monkeypatch.setattr(Prepared, "backend", spy)
    assert main(["bench", *SMALL, "--mode", "inference", "--dtype", "fp32", "--tf32", wanted]) == 0
    precision = {"on": "tf32", "off": "none", "strict": "ieee"}[wanted]
    assert seen == [(wanted == "on", wanted == "on", precision)]
    assert (matmul.allow_tf32, cudnn.allow_tf32) == before


# ---- timing on a GPU, its clock and stream replaced --------------------------------------------


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is enqueued, in order; every call takes 3 ms of the stream's time, the filler 100."""
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 3.0 * queue.count("call") + 100.0 * queue.count("fill")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    filler = SimpleNamespace(zero_=lambda: queue.append("fill"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Cuda, "_filler", filler)
    monkeypatch.setattr(Cuda, "_l2", 50 << 20)
    return queue


def test_events_enclose_the_calls_and_nothing_else(stream: list[str]) -> None:
    assert Cuda().sample(lambda: stream.append("call"), 4) == pytest.approx(3e-3)
    assert stream == ["fill", "call", "call", "call", "call", "wait"]


def test_the_filler_can_be_written_in_either_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "name", "cpu")
    monkeypatch.setattr(Cuda, "_l2", 8)
    with torch.inference_mode():
        filler = Cuda()._filler
        filler.zero_()
    assert filler.zero_().nbytes == 16


@pytest.fixture
def capturing(stream: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As `stream`, with captures: what is enqueued in one is not run."""

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            stream.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            stream.append("replay")

    @contextmanager
    def within(what: str) -> Iterator[None]:
        stream.append(f"begin {what}")
        yield
        stream.append(f"end {what}")

    current = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: stream.append(f"on {s.name}"))
    monkeypatch.setattr(torch.cuda, "stream", lambda s: within(s.name))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: within(f"graph on {stream.name}"))
    return stream


def test_a_capture_is_of_one_call_after_some_to_warm_up(capturing: list[str]) -> None:
    replay = Cuda().capture(lambda: capturing.append("call"))
    assert capturing == [
        *("side waits for main", "begin side", "call", "call", "call", "end side"),
        *("begin graph on side", "call", "end graph on side", "on main", "main waits for side"),
    ]
    replay()
    assert capturing[-1] == "replay"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(capturing: list[str]) -> None:
    def call() -> None:
        if "begin graph on side" in capturing:
            raise RuntimeError("it waits for the device")

    with pytest.raises(RuntimeError, match="it waits"):
        Cuda().capture(call)
    assert capturing[-1] == "on main"


def test_inputs_take_turns_where_the_cache_would_keep_one(stream: list[str]) -> None:
    assert Cuda().sets(1 << 20) == SETS
    assert Cuda().sets(50 << 20) == 1


def test_calls_in_turn() -> None:
    order: list[int] = []
    calls: list[Callable[[], Any]] = [lambda i=i: order.append(i) for i in range(3)]  # type: ignore[misc]
    turn = in_turn(calls)
    for _ in range(4):
        turn()
    assert order == [0, 1, 2, 0]
    assert in_turn(calls[:1]) is calls[0]


def test_inputs_of_a_case_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = Prepared.of(Case("lstm", 4, 2, 3, "inference", "dense"), Fake())
    assert prepared.turns == 3
    drawn = [inputs[0] for inputs in (prepared.inputs, *prepared.others)]
    assert len({float(x.sum()) for x in drawn}) == 3
    call = prepared.calls()["torch"]
    outputs = [call()[0] for _ in range(4)]
    assert torch.equal(outputs[0], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


# ---- ceilings ----------------------------------------------------------------------------------


@pytest.fixture
def limits() -> GpuCeilings:
    flops = {"bf16": 8e14, "fp16": 7e14, "fp32": 5e13, "fp64": 6e13, "tf32": 4e14}
    return GpuCeilings(flops, 3e12, "tf32")


def test_the_ceiling_of_a_gpu(limits: GpuCeilings) -> None:
    case = Case("lstm", 512, 128, 512, "inference", "dense", "bf16")
    work = case.work()
    assert limits.gemm_seconds(case) == work.flops / 8e14
    assert limits.read_seconds(case) == work.bytes / 3e12
    assert limits.seconds(case) == max(limits.gemm_seconds(case), limits.read_seconds(case))
    single = Case("lstm", 512, 128, 512, "inference", "dense", "fp32")
    assert limits.gemm_seconds(single) == work.flops / 4e14
    other = GpuCeilings({**limits.flops, "bf16": 9e14}, 2e12, "tf32")
    assert limits.best(other) == GpuCeilings({**limits.flops, "bf16": 9e14}, 3e12, "tf32")
    assert str(limits).startswith("GEMM: bf16 800.0, fp16 700.0")


def test_ceilings_are_measured_on_random_data(stream: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cuda, "name", "cpu")
    monkeypatch.setattr(gpu, "_SIZE", 8)
    monkeypatch.setattr(gpu, "_COPY", 64)
    monkeypatch.setattr(Cuda, "sample", lambda self, call, repeats: Cpu.sample(call, repeats))
    found = Cuda().ceilings()
    assert set(found.flops) == {"bf16", "fp16", "fp32", "fp64", "tf32"}
    assert all(rate > 0 for rate in (*found.flops.values(), found.copy))
    assert found.fp32 == ("tf32" if torch.backends.cudnn.allow_tf32 else "fp32")


def test_the_description_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=1, L2_cache_size=2
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    line = "580.159.04, 345 MHz, 1980 MHz, 2619 MHz, 700.00 W, 30\nanother GPU\n"
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=line))
    found = Cuda().describe()
    assert (found["gpu"], found["compute_capability"], found["multiprocessors"]) == (
        "NVIDIA H100",
        "9.0",
        132,
    )
    assert found["state"]["driver_version"] == "580.159.04"
    assert found["state"]["clocks.sm"] == "345 MHz"
    assert set(found["flags"]) >= {"cudnn.allow_tf32", "matmul.allow_tf32"}
    assert set(Cpu().describe()) <= set(found)


# ---- the grid and its goals --------------------------------------------------------------------


def test_the_grid_against_cudnn() -> None:
    plan = gpu_grid()
    assert [group for group, _ in plan[:9]] == ["named"] * 9
    rest = [case for group, case in plan if group != "named"]
    assert len(set(rest)) == len(rest) == 3 * 3 * 6 * 4 * 2
    assert {case.time for case in rest} == {512}
    # what runs before time is out holds every cell, dtype and mode
    early = rest[: len(rest) // 6]
    for axis in ("cell", "dtype", "mode"):
        assert {getattr(case, axis) for case in early} == {getattr(case, axis) for case in rest}


def test_every_goal_of_a_gpu_is_about_cases_of_its_grid(limits: GpuCeilings) -> None:
    row, sides = Row("output[0]", 0.0, 0.0, 1.0), dict.fromkeys(("torch", "fused"), Times(1.0, 1.0, 1.0))
    for backend, other in (("native", "triton"), ("triton", "native")):
        results = [Result(group, case, backend, row, sides, 7, sides) for group, case in gpu_grid()]
        verdicts = goals.verdicts(results, limits, goals.GPU_GOALS)
        assert [v.goal for v in verdicts] == [g for g in goals.GPU_GOALS if g.backend != other]


def test_heads_are_independent_layers() -> None:
    case = Case("lstm", 4, 2, 3, "training", "heads")
    prepared = Prepared.of(case)
    assert isinstance(prepared.fused, Heads)
    layers = prepared.fused.layers
    assert len(layers) == HEADS
    assert not any(isinstance(layer, fusedrnn.LSTM) for layer in prepared.stock.layers)
    input, output = prepared.inputs[0], prepared.fused(*prepared.inputs)[0]
    expected, _ = layers[5](input[..., 20:24])
    torch.testing.assert_close(output[..., 20:24], expected)
    assert prepared.parity().ok
    assert prepared.backend() in select.NAMES
    assert case.work().flops == HEADS * Case("lstm", 4, 2, 3, "training", "dense").work().flops


def test_deep_is_four_bidirectional_layers() -> None:
    assert Case("lstm", 4, 2, 3, "inference", "deep").options() == {"num_layers": 4, "bidirectional": True}
