"""Packed weights: what is kept of them, for how long, and that no call takes one of another content."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fusedrnn
from fusedrnn.backends import native
from fusedrnn.backends.native import layer

if native.unavailable():
    pytest.skip(native.unavailable(), allow_module_level=True)
_C = native._C


def problem(hidden, batch, time, directions=1):
    """The arguments of `forward` between cell and save, of an LSTM."""
    gates = 4 * hidden
    shapes = [(gates, 5), (gates, hidden), (gates,), (gates,)] * directions
    states = [torch.randn(directions, batch, hidden) for _ in range(2)]
    return torch.randn(time, batch, 5), None, [torch.randn(s) * 0.1 for s in shapes], states, directions


def run(args):
    return layer.forward("lstm", *args, False)[0]


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(2),
        lambda w: w.data.neg_(),
        lambda w: w.data.copy_(torch.flip(w, [0])),
        lambda w: w.data.view(-1)[-1:].add_(1),
        lambda w: w.detach().numpy().__setitem__((0, 0), 3.0),
        lambda w: setattr(w, "data", torch.ones_like(w)),
    ],
)
def test_a_write_through_data_is_seen(write):
    args = problem(33, 3, 5)
    weights = [torch.nn.Parameter(w) for w in args[2]]
    args = (*args[:2], weights, *args[3:])
    with torch.no_grad():
        before = run(args)
        write(weights[1])
        fresh = (*args[:2], [w.detach().clone() for w in weights], *args[3:])
        after, expected = run(args), run(fresh)
    assert not torch.equal(before, after)
    assert torch.equal(after, expected)


def test_fingerprint_sees_every_word():
    x = torch.randn(200)
    seen = {_C.fingerprint(x.data_ptr(), x.nbytes)}
    for i in range(200):
        for j in (i, (i + 64) % 200):  # pairs in one lane must not cancel
            x[i], x[j] = -x[i], -x[j] if j != i else -x[i]
            seen.add(_C.fingerprint(x.data_ptr(), x.nbytes))
    assert len(seen) >= 390


@pytest.mark.parametrize("level", _C.isa_levels())
@pytest.mark.parametrize("words", [16, 32, 64], ids=lambda words: f"lanes_of_{words}")
def test_fingerprint_of_a_word_and_the_next_in_its_lane(level, words):
    """Signs and exponents of two floats each: what an ordinary change may flip, as from 0 to -2."""
    torch.manual_seed(words)
    bits = [*range(23, 32), *range(55, 64)]
    flips = {(1 << i, 1 << j) for i in range(64) for j in range(64)}
    for picked in torch.randint(0, 2, (5000, 2, len(bits)), dtype=torch.bool).tolist():
        flips.add(tuple(sum(1 << bit for bit, flip in zip(bits, word) if flip) for word in picked))
    _C.set_isa(level)
    try:
        for x in (torch.zeros(160, dtype=torch.int64), torch.randn(320).view(torch.int64)):
            first, second, seen = x[0].item(), x[words].item(), set()
            for one, other in flips:
                x[0], x[words] = signed(first ^ one), signed(second ^ other)
                seen.add(_C.fingerprint(x.data_ptr(), x.nbytes))
            assert len(seen) == len(flips)
    finally:
        _C.set_isa("")


def signed(word):
    """64 bits as a Python int of torch's int64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def test_a_pack_of_what_changed_meanwhile_is_not_kept():
    layer, x = fusedrnn.LSTM(512, 512), torch.randn(2, 1, 512)
    weights = layer.weight_hh_l0.detach()
    other = torch.randn_like(weights)
    start = threading.Barrier(2)

    def write():
        start.wait()
        weights.copy_(other)

    with torch.no_grad():
        for _ in range(20):
            weights.normal_()  # unknown to any pack
            before = weights.clone()
            writer = threading.Thread(target=write)
            writer.start()
            start.wait()
            layer(x)
            writer.join()
            weights.copy_(before)
            assert torch.equal(layer(x)[0], copy.deepcopy(layer)(x)[0])


def test_parameters_that_are_replaced_while_a_call_runs():
    """torch's own list of them changes; what a call has begun with stays."""
    layer, x = fusedrnn.LSTM(128, 128, 3), torch.randn(64, 2, 128)
    state = layer.state_dict()
    end = threading.Event()

    def replace():
        while not end.is_set():
            layer.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)

    other = threading.Thread(target=replace)
    other.start()
    try:
        with torch.no_grad():
            want = layer(x)[0]
            for _ in range(100):
                assert torch.equal(layer(x)[0], want)
    finally:
        end.set()
        other.join()


def test_packs_live_in_a_side_table_and_die_with_the_weight():
    args = problem(33, 3, 5)
    run(args)
    weight = args[2][1]
    number = id(weight)
    kept = [pack for pack in _C.packs() if pack[0] == number]
    assert [kind for _, kind, _ in kept] == ["rows"]
    assert not vars(weight)
    run(args)
    assert [pack for pack in _C.packs() if pack[0] == number] == kept
    del weight, args
    assert number not in {pack[0] for pack in _C.packs()}


def test_inference_tensors():
    with torch.inference_mode():
        args = problem(33, 3, 5)
        first = run(args)
        args[2][1].mul_(2)
        assert not torch.equal(first, run(args))


def test_eight_threads_at_once():
    torch.set_num_threads(2)
    args = problem(65, 4, 50, directions=2)
    expected = run(args)

    def work(_):
        return all(torch.equal(run(args), expected) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.parametrize("make", [fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.GRUCell])
def test_conversions_that_swap_tensors(make):
    module = make(64, 64)
    x = torch.randn(8, 64) if make is fusedrnn.GRUCell else torch.randn(3, 8, 64)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float64, torch.float32):
            made = module(x)
            (made if isinstance(made, torch.Tensor) else made[0]).sum().backward()
            module.zero_grad()
            del made
            module.to(dtype)
            x = x.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    module(x)
