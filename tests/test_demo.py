"""The demo: outputs stay equal on trained models, its checks bite, and what is missing is named."""

import importlib.metadata
import importlib.util
import math
import sys

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn import demo
from fusedrnn.demo import LIMIT, activity, compare
from fusedrnn.demo.activity import ActivityLoop
from fusedrnn.demo.compare import MissingPackage, Pair, interleave, largest_difference
from fusedrnn.demo.pinyin import PinyinTagger, PinyinTask
from fusedrnn.demo.voice import VoiceEncoder, VoiceTask, similarity

MODULES = ("g2pM", "resemblyzer", "hsk_sentences_audio", "rich")
MISSING = [module for module in MODULES if importlib.util.find_spec(module) is None]


def needs_packages(test):
    skip = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install 'fusedrnn[demo]'")
    return pytest.mark.demo(skip(test))


@pytest.fixture
def sentences(monkeypatch):
    """Every fifth sentence of the data set, which is then all that the demo sees."""
    package = pytest.importorskip("hsk_sentences_audio")
    some = package.load_sentences()[::5]
    monkeypatch.setattr(package, "load_sentences", lambda: some)
    return some


@pytest.fixture
def wrong_replace(monkeypatch):
    """A replace() that breaks the model by little: one bias of the LSTM off by 1e-3."""

    def replace(model):
        with torch.no_grad():
            model.lstm.bias_ih_l0[0] += 1e-3

    monkeypatch.setattr(fusedrnn, "replace", replace)


@needs_packages
def test_pinyin_is_equal_before_and_after(sentences):
    pair = Pair(PinyinTagger())
    assert type(pair.stock.lstm) is nn.LSTM
    assert type(pair.fused.lstm) is fusedrnn.LSTM
    task = PinyinTask(sentence["chinese"] for sentence in sentences)
    assert task.batches[0].lengths.unique().numel() > 1, "the batches have to be ragged"
    for queries in (task.batches, task.singles):
        before, after = pair.outputs(queries)
        assert largest_difference(before, after) <= demo.LIMIT * float(torch.cat(before).abs().max())
        assert task.pinyin(after) == task.pinyin(before) == task.assemble(task.numpy_network)


@needs_packages
def test_voice_prints_are_equal_before_and_after():
    pair = Pair(VoiceEncoder())
    assert type(pair.stock.lstm) is nn.LSTM
    assert type(pair.fused.lstm) is fusedrnn.LSTM
    task = VoiceTask(["bass", "child"])
    before, after = pair.outputs(task.windows)
    assert largest_difference(before, after) <= demo.LIMIT
    cosines = similarity(task.prints(after))
    assert cosines.diagonal().min() > 0.9 > 0.7 > cosines[0, 1]


@needs_packages
def test_revert_restores_the_outputs_bit_for_bit():
    pair = Pair(VoiceEncoder())
    pair.report.revert()
    assert type(pair.fused.lstm) is nn.LSTM
    before, after = pair.outputs(VoiceTask(["alto"]).windows)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


@needs_packages
def test_main_shows_both_sides(sentences, monkeypatch, capsys):
    monkeypatch.setattr(compare, "LEAST", 2)  # what is printed matters here, not how steady it is
    assert demo.main(["--seconds", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("before") == printed.count("after") >= 5
    assert "✗" not in printed
    assert "fusedrnn.replace(model)" in printed


@needs_packages
@pytest.mark.usefixtures("sentences", "wrong_replace")
def test_main_fails_when_outputs_differ(capsys):
    assert demo.main(["--seconds", "0"]) == 1
    printed = capsys.readouterr().out
    assert "✗" in printed
    assert "p20" not in printed, "no time without equal outputs"


@pytest.mark.parametrize("module", ["rich", "hsk_sentences_audio", "g2pM"])
def test_a_missing_package_is_named(module, monkeypatch, capsys):
    if module == "g2pM" and MISSING:
        pytest.skip(f"stops earlier: {MISSING} not installed")
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main([]) == 2
    printed = capsys.readouterr().err
    assert module.replace("_", "-") in printed
    assert "pip install 'fusedrnn[demo]'" in printed


def test_missing_weights_are_named(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(MissingPackage, match="Resemblyzer"):
        VoiceEncoder()


def test_nan_is_a_difference():
    nan = torch.tensor([1.0, math.nan])
    assert largest_difference([torch.ones(2)], [nan]) == math.inf
    assert largest_difference([nan], [nan]) == math.inf
    assert largest_difference([torch.zeros(3), torch.ones(2)], [torch.zeros(3), torch.zeros(2)]) == 1


def test_interleave_runs_both_sides_alike():
    calls = []

    class Network(nn.Module):
        def forward(self, item):
            calls.append(item)
            if self.training:
                torch.ones(200_000).exp().sum()

    pair = Pair.__new__(Pair)
    pair.stock, pair.fused = Network(), Network().eval()
    timing = interleave(pair, [1, 2], 0.0)
    assert calls.count(1) == calls.count(2) > compare.LEAST
    assert timing.ratio > 1
    assert 0 < timing.low <= timing.high


def test_the_activity_loop_is_equal_before_and_after():
    loop, frames = ActivityLoop(), activity.frames()
    before, after = loop.stock(frames), loop.fused(frames)
    assert before.shape == (len(frames),)
    assert largest_difference([before], [after]) <= LIMIT
    assert torch.equal(loop.fused(frames), after), "each run starts from a state of zeros"
