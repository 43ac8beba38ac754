"""How large teams of threads are beside other work, and what they compute there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.bench.loaded import burning

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
_C = native._C

MS = 1_000_000  # in nanoseconds
CALL, TURN = 5 * MS, 3 * MS  # a call's length, and a turn of the scheduler within it


def crowded(now: int = 0):
    """A crowd that has had trouble at a time."""
    crowd = _C.Crowd()
    crowd.away(now, CALL, TURN)
    return crowd


def test_everybody_at_first():
    crowd = _C.Crowd()
    assert [crowd.size(n, 0) for n in (1, 2, 64)] == [1, 2, 64]
    assert not crowd.is_careful()


def test_waiting_alone_is_no_crowd():
    """Shares of unequal size make threads wait too."""
    crowd = _C.Crowd()
    for _ in range(100):
        crowd.waited(CALL, TURN)
        assert crowd.is_careful()
        crowd.away(0, CALL, 0)
        assert crowd.size(2, 0) == 2


def test_who_has_waited_looks_closely_for_some_calls():
    crowd = _C.Crowd()
    crowd.waited(CALL, TURN)
    calls = 0
    while crowd.is_careful():
        crowd.away(0, CALL, 0)
        calls += 1
    assert 1 < calls < 100


@pytest.mark.parametrize(("length", "away"), [(CALL, CALL // 10), (MS // 10, MS // 10)])
def test_little_waiting_does_not_count(length, away):
    crowd = _C.Crowd()
    crowd.waited(length, away)
    assert not crowd.is_careful()
    crowd.away(0, length, away)
    assert crowd.size(2, 0) == 2


def test_teams_are_halved_for_a_pause():
    crowd = crowded()
    assert [crowd.size(n, 1) for n in (1, 2, 3, 64)] == [1, 1, 1, 32]
    assert crowd.is_careful()
    later = 1000 * MS
    assert crowd.size(64, later) == 64, "it tries the size before"
    crowd.away(later, CALL, 0)
    assert crowd.size(64, later) == 64
    assert not crowd.is_careful()


def test_large_teams_are_halved_again():
    crowd = crowded()
    for times in range(2, 8):
        crowd.away(times, CALL, TURN)
        assert crowd.size(64, times) == max(1, 64 >> times)


def test_pauses_grow_while_trying_fails_and_trouble_is_forgotten():
    crowd, now, pauses = crowded(), 0, []
    for _ in range(10):
        start = now
        while crowd.size(2, now) == 1:
            now += MS
        pauses.append(now - start)
        crowd.away(now, CALL, TURN)
        assert crowd.size(2, now) == 1
    assert pauses == sorted(pauses)
    assert pauses[-1] == pauses[-2] <= 1000 * MS
    now += 10_000 * MS
    crowd.away(now, CALL, 0)
    assert crowd.size(2, now) == 2
    crowd.away(now, CALL, TURN)
    assert crowd.size(2, now + pauses[0]) == 2, "as short a pause as the first"


@pytest.fixture
def threads():
    """Sets their number, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "projected", "both ways", "bf16"])
@pytest.mark.parametrize("hidden", [16, 33, 112, 256])
def test_the_same_digits_whatever_the_number_of_threads(kind, hidden, ragged, threads):
    torch.manual_seed(hidden)
    make = {"gru": fusedrnn.GRU, "rnn": fusedrnn.RNN}.get(kind, fusedrnn.LSTM)
    options = {"projected": {"proj_size": 7}, "both ways": {"bidirectional": True}}.get(kind, {})
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    layers = make(13, hidden, 2, **options).to(dtype)

    def run(x, lengths):
        output, _ = layers(pack_padded_sequence(x, lengths) if ragged else x)
        output = output.data if ragged else output
        grad = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output)
        return [output, *torch.autograd.grad(output, [x, *layers.parameters()], grad)]

    for batch in (1, 3, 8, 35):
        x = torch.randn(24, batch, 13, dtype=dtype, requires_grad=True)
        lengths = torch.randint(1, 25, (batch,)).sort(descending=True).values
        lengths[0] = 24
        threads(1)
        expected = run(x, lengths)
        for n in (2, 3):
            threads(n)
            for ours, wanted in zip(run(x, lengths), expected):
                assert torch.equal(ours, wanted)


@pytest.mark.parametrize("kind", [fusedrnn.LSTM, fusedrnn.GRU])
@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_a_stepper_has_the_same_digits_too(kind, weights, threads):
    torch.manual_seed(1)
    layer = kind(176, 176, 2)
    rows = torch.randn(20, 176)
    found = []
    for n in (1, 2, 3):
        threads(n)
        step = fusedrnn.streaming(layer, weights=weights)
        found.append(torch.stack([step.step(row) for row in rows]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_right_beside_busy_processes(threads):
    torch.manual_seed(0)
    layer = fusedrnn.LSTM(64, 64, 2)
    inputs = [torch.randn(32, batch, 64) for batch in (1, 3, 16)]
    step = fusedrnn.streaming(fusedrnn.GRU(256, 256))
    row = torch.randn(256)

    def run():
        out = []
        for x in inputs:
            y, (h, _) = layer(x)
            out += [y, h, *torch.autograd.grad(y.sum(), layer.parameters())]
        step.reset()
        return [*out, *(step.step(row) for _ in range(50))]

    threads(2)
    expected = run()
    with burning(2):
        found = [run() for _ in range(10)]
    for each in found:
        for ours, wanted in zip(each, expected):
            assert torch.equal(ours, wanted)


def test_many_callers_with_teams_of_their_own():
    torch.manual_seed(0)
    layer = fusedrnn.GRU(96, 96)
    x = torch.randn(40, 4, 96)
    with torch.no_grad():
        expected = layer(x)[0]

    def run(_):
        torch.set_num_threads(2)
        with torch.no_grad():
            return [layer(x)[0] for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        for outputs in pool.map(run, range(8)):
            assert all(torch.equal(y, expected) for y in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("make", "hidden", "batch", "time", "options"),
    [
        (fusedrnn.LSTM, 64, 1, 300, {}),
        (fusedrnn.GRU, 96, 3, 200, {}),  # 85 steps of three rows are a chunk
        (fusedrnn.RNN, 130, 20, 40, {}),
        (fusedrnn.LSTM, 80, 2, 150, {"proj_size": 32}),
        (fusedrnn.LSTM, 48, 64, 30, {"batch_first": True}),
    ],
)
def test_stacks_in_pieces_of_time_have_the_digits_of_one_thread(
    make, hidden, batch, time, options, dtype, threads
):
    torch.manual_seed(hidden)
    layers = make(9, hidden, 4, **options).to(dtype)
    shape = (batch, time) if options.get("batch_first") else (time, batch)
    x = torch.randn(*shape, 9, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape, options.get("proj_size", hidden), dtype=dtype)

    def run():
        output, _ = layers(x)
        return [output, *torch.autograd.grad(output, [x, *layers.parameters()], grad)]

    threads(1)
    expected = run()
    for n in (2, 3, 5):
        threads(n)
        for _ in range(5):
            assert all(map(torch.equal, run(), expected))
