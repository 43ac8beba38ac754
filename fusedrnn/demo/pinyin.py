"""g2pM: Chinese characters to pinyin (Park and Lee, 2020, https://arxiv.org/abs/2004.03136).

A bidirectional LSTM chooses between the readings of characters that have more than one.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from .compare import require

BATCH = 64
SHOWN = "乐行觉"  # characters with two common readings


class Query(NamedTuple):
    """Characters whose reading is asked for."""

    ids: Tensor  # [B, T]
    lengths: Tensor | None  # [B]; None when every row is T long
    rows: Tensor  # [Q]
    columns: Tensor  # [Q]


class PinyinTagger(nn.Module):
    """g2pM's network under its own weight names; the package itself evaluates it in numpy."""

    def __init__(self) -> None:
        super().__init__()
        package = Path(require("g2pM", "g2pM").__file__).parent
        # A pickle runs code, but this one is part of a package whose code runs anyway.
        weights = pickle.loads((package / "np_ckpt.pkl").read_bytes())
        chars, width = weights["embedding.weight"].shape
        hidden = weights["lstm.weight_hh_l0"].shape[1]
        readings, inner = weights["logit_layer.2.weight"].shape
        self.embedding = nn.Embedding(chars, width)
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
        self.logit_layer = nn.Sequential(nn.Linear(2 * hidden, inner), nn.ReLU(), nn.Linear(inner, readings))
        self.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        self.eval()

    def forward(self, query: Query) -> Tensor:
        """Logits [Q, readings]."""
        embedded = self.embedding(query.ids)
        if query.lengths is None:
            hidden, _ = self.lstm(embedded)
        else:
            packed = pack_padded_sequence(embedded, query.lengths, batch_first=True, enforce_sorted=False)
            hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.logit_layer(hidden[query.rows, query.columns])


class PinyinTask:
    """Sentences for g2pM: its own dictionary and text assembly around any network."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self.package = require("g2pM", "g2pM").G2pM()
        self.numpy_network = self.package.predict
        self.sentences = list(sentences)
        self.singles: list[Query] = []
        self.assemble(self._record)
        self.batches = [
            self._merge(self.singles[at : at + BATCH]) for at in range(0, len(self.singles), BATCH)
        ]

    def assemble(self, predict: Callable[[Any, Any], Any]) -> list[list[str]]:
        """One syllable per character and sentence; `predict` chooses where there is a choice."""
        self.package.predict = predict
        return [self.package(sentence, char_split=True) for sentence in self.sentences]

    def pinyin(self, logits: Sequence[Tensor]) -> list[list[str]]:
        """The same from the logits of `batches`."""
        choices = iter(torch.cat(list(logits)).argmax(1).tolist())
        return self.assemble(lambda _, places: [next(choices) for _ in places])

    def _record(self, ids: Any, places: list[int]) -> list[int]:
        columns = torch.tensor(places)
        self.singles.append(Query(torch.from_numpy(ids).long(), None, torch.zeros_like(columns), columns))
        return [0] * len(places)

    @staticmethod
    def _merge(queries: Sequence[Query]) -> Query:
        ids = [query.ids[0] for query in queries]
        return Query(
            pad_sequence(ids, batch_first=True),
            torch.tensor([len(row) for row in ids]),
            torch.cat([query.rows + row for row, query in enumerate(queries)]),
            torch.cat([query.columns for query in queries]),
        )


def spoken(syllables: Iterable[str]) -> list[str]:
    """Without punctuation: what ends in the digit of a tone."""
    return [syllable for syllable in syllables if len(syllable) > 1 and syllable[-1].isdigit()]


def heteronyms(sentences: Sequence[dict[str, Any]], pinyin: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Per character of SHOWN two sentences that read it differently, as (sentence, place in it).

    Only sentences whose pinyin is that of the data set throughout.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {character: {} for character in SHOWN}
    for number, (sentence, syllables) in enumerate(zip(sentences, pinyin)):
        if spoken(syllables) != sentence["pinyin_numbered"].split():
            continue
        for place, (character, syllable) in enumerate(zip(sentence["chinese"], syllables)):
            if character in found:
                found[character].setdefault(syllable, (number, place))
    return [where for readings in found.values() for where in list(readings.values())[:2]]


def agreement(sentences: Sequence[dict[str, Any]], pinyin: Sequence[Sequence[str]]) -> float:
    """Share of the data set's syllables that `pinyin` has."""
    equal = total = 0
    for sentence, syllables in zip(sentences, pinyin):
        expected = sentence["pinyin_numbered"].split()
        total += len(expected)
        equal += sum(a == b for a, b in zip(spoken(syllables), expected))
    return equal / total
