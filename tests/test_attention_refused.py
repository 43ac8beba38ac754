"""What the attention modules refuse, each by the name of the argument."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import fusedrnn

B, Tq, Tk, Q, M, H = 3, 4, 7, 5, 6, 17
BAHDANAU, LUONG = fusedrnn.BahdanauAttention, fusedrnn.LuongAttention


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "query_size: expected a size greater than zero, got 0", lambda: BAHDANAU(0, 1, 1)),
        (TypeError, "memory_size: expected an int, got float", lambda: BAHDANAU(1, 1.0, 1)),
        (ValueError, "hidden_size: expected a size", lambda: BAHDANAU(1, 1, -1)),
        (ValueError, "temperature: expected a positive", lambda: BAHDANAU(1, 1, 1, temperature=0)),
        (ValueError, r"dropout: expected a probability in \[0, 1\)", lambda: BAHDANAU(1, 1, 1, dropout=1)),
        (ValueError, "score: expected one of dot, general, concat", lambda: LUONG(1, 1, "cosine")),
        (ValueError, "query_size: expected memory_size 2 for score 'dot', got 1", lambda: LUONG(1, 2, "dot")),
        (ValueError, "hidden_size: expected a size for score 'concat'", lambda: LUONG(1, 2, "concat")),
        (ValueError, "hidden_size: expected None for score 'dot'", lambda: LUONG(2, 2, "dot", 3)),
        (ValueError, "scale: expected False for", lambda: LUONG(1, 2, "concat", 3, scale=True)),
        (
            ValueError,
            "expected an odd size, got 4",
            lambda: fusedrnn.LocationSensitiveAttention(1, 1, 1, 1, 4),
        ),
        (ValueError, "query: expected 2 to 4 dimensions", lambda: CALL(torch.zeros(Q))),
        (RuntimeError, f"query: expected {Q} features, got 2", lambda: CALL(torch.zeros(B, 2))),
        (ValueError, r"memory: expected 3 dimensions \[B, Tk, M\]", lambda: CALL(memory=torch.zeros(B, M))),
        (RuntimeError, f"memory: expected {M} features, got 2", lambda: CALL(memory=torch.zeros(B, Tk, 2))),
        (RuntimeError, "key: expected shape", lambda: CALL(memory=torch.zeros(B + 1, Tk, M))),
        (ValueError, "mask: expected 2 to 4 dimensions", lambda: CALL(mask=torch.ones(Tk).bool())),
        (RuntimeError, "lengths: expected shape", lambda: CALL(lengths=torch.ones(2).long())),
    ],
)
def test_errors_name_the_argument(error, message, make):
    with pytest.raises(error, match=message):
        make()


def CALL(query: Tensor | None = None, memory: Tensor | None = None, **options):
    query = torch.zeros(B, Q) if query is None else query
    return BAHDANAU(Q, M, H)(query, torch.zeros(B, Tk, M) if memory is None else memory, **options)


@pytest.mark.parametrize("make", [fusedrnn.CoverageAttention, fusedrnn.ForwardAttention])
@pytest.mark.parametrize(
    ("query", "state"),
    [
        ((B,), (B, 1, Tk)),
        ((B,), (B, 2, Tk)),
        ((B, 1), (B, Tk)),
        ((B, 2), (B, 1, Tk)),
        ((B, 2), (B, Tk)),
        ((B,), (1, Tk)),
        ((B,), (B, 1)),
        ((B, 2), (B, 2, 1)),
        ((B, 2), (1, 2, Tk)),
    ],
)
def test_a_state_of_another_shape_is_refused(make, query, state):
    """Even where it could be broadcast: [B, B, Tk] would mix the sequences."""
    module, memory = make(Q, M, H), torch.zeros(B, Tk, M)
    message = f"expected shape {[*query, Tk]} for query {[*query, Q]} and memory {[B, Tk, M]}, got {[*state]}"
    wrong, right = torch.zeros(state), torch.zeros(*query, Tk)
    for given in (memory, module.project_memory(memory)):
        with pytest.raises(RuntimeError, match=re.escape(f"state.previous: {message}")):
            module(torch.zeros(*query, Q), given, fusedrnn.Alignments(wrong, wrong))
        with pytest.raises(RuntimeError, match=re.escape(f"state.cumulative: {message}")):
            module(torch.zeros(*query, Q), given, fusedrnn.Alignments(right, wrong))


def test_a_step_takes_no_more_than_beams():
    module, memory = fusedrnn.CoverageAttention(Q, M, H), torch.zeros(B, Tk, M)
    with pytest.raises(ValueError, match=r"query: expected \[B, Q\] or \[B, beams, Q\], got shape"):
        module(torch.zeros(B, 1, 1, Q), memory, fusedrnn.Alignments.zeros(memory, 1))


def test_keras_errors():
    x = torch.zeros(B, Tq, M)
    with pytest.raises(ValueError, match=r"inputs: expected \[query, value\]"):
        fusedrnn.AdditiveAttention(M)([x])
    with pytest.raises(ValueError, match="value: expected 3 dimensions"):
        fusedrnn.AdditiveAttention(M)([x, x[0]])


@pytest.mark.parametrize(
    ("error", "message", "mask"),
    [
        (ValueError, "query_mask: expected dtype torch.bool, got torch.float32", [torch.ones(B, Tq), None]),
        (ValueError, "value_mask: expected dtype torch.bool, got torch.float32", [None, torch.ones(B, Tk)]),
        (
            ValueError,
            "value_mask: expected dtype torch.bool, got torch.int64",
            [None, torch.ones(B, Tk).long()],
        ),
        (TypeError, "value_mask: expected a tensor or None, got list", [None, [[True] * Tk] * B]),
        (RuntimeError, rf"query_mask: expected shape \[{B}, {Tq}\], got", [torch.ones(B, Tk) > 0]),
        (RuntimeError, rf"value_mask: expected shape \[{B}, {Tk}\], got", [None, torch.ones(2, Tk) > 0]),
        (TypeError, r"mask: expected \[query_mask, value_mask\], got Tensor", torch.ones(B, Tk) > 0),
        (ValueError, r"mask: expected \[query_mask, value_mask\], got 3", [None, None, None]),
    ],
)
def test_keras_masks_are_of_bool(error, message, mask):
    """It casts them; added to the scores, ones and zeros would mask nothing."""
    with pytest.raises(error, match=message):
        fusedrnn.AdditiveAttention(M)([torch.zeros(B, Tq, M), torch.zeros(B, Tk, M)], mask)
