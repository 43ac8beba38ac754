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


LIST = [[0.0]]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("query: expected a tensor, got list", lambda q, m: BAHDANAU(Q, M, H)(LIST, m)),
        ("query: expected a tensor, got NoneType", lambda q, m: CALL_PROJECTED(None, m)),
        ("query: expected a tensor, got list", lambda q, m: CALL_PROJECTED(LIST, m)),
        ("memory: expected a tensor or Memory, got list", lambda q, m: BAHDANAU(Q, M, H)(q, LIST)),
        ("memory: expected a tensor or Memory, got tuple", lambda q, m: BAHDANAU(Q, M, H)(q, (m, m))),
        ("mask: expected a tensor or None, got list", lambda q, m: BAHDANAU(Q, M, H)(q, m, None, LIST)),
        ("mask: expected a tensor or None, got list", lambda q, m: CALL_PROJECTED(q, m, None, LIST)),
        ("query: expected a tensor, got list", lambda q, m: STEP(LIST, m, ZEROS)),
        ("memory: expected a tensor or Memory, got list", lambda q, m: STEP(q, LIST, ZEROS)),
        ("state: expected Alignments, got tuple", lambda q, m: STEP(q, m, tuple(ZEROS))),
        (
            "state.previous: expected a tensor, got list",
            lambda q, m: STEP(q, m, ZEROS._replace(previous=LIST)),
        ),
        ("mask: expected a tensor or None, got list", lambda q, m: STEP(q, m, ZEROS, None, LIST)),
        ("memory: expected a tensor or Memory, got list", lambda q, m: fusedrnn.Alignments.zeros(LIST)),
        ("query: expected a tensor, got list", lambda q, m: TACOTRON(LIST, m)),
        ("memory: expected a tensor, got list", lambda q, m: TACOTRON(q, LIST)),
        ("processed_memory: expected a tensor, got list", lambda q, m: TACOTRON(q, m, LIST)),
        ("attention_weights_cat: expected a tensor, got list", lambda q, m: TACOTRON(q, m, None, LIST)),
        ("mask: expected a tensor or None, got list", lambda q, m: TACOTRON(q, m, mask=LIST)),
        ("query: expected a tensor, got list", lambda q, m: fusedrnn.AdditiveAttention(M)([LIST, m])),
        ("value: expected a tensor, got list", lambda q, m: fusedrnn.AdditiveAttention(M)([m, LIST])),
        ("key: expected a tensor, got list", lambda q, m: fusedrnn.AdditiveAttention(M)([m, m, LIST])),
        (
            r"inputs: expected \[query, value\] or .*, got Tensor",
            lambda q, m: fusedrnn.AdditiveAttention(M)(m),
        ),
        ("v: expected a tensor, got list", lambda q, m: fusedrnn.attend("additive", *[m[None]] * 3, LIST)),
        ("mask: expected a tensor, got list", lambda q, m: fusedrnn.attend("dot", *[m[None]] * 3, mask=LIST)),
    ],
)
def test_what_is_no_tensor_is_named(message, call, grad):
    with torch.set_grad_enabled(grad), pytest.raises(TypeError, match=message):
        call(torch.zeros(B, Q), torch.zeros(B, Tk, M))


ZEROS = fusedrnn.Alignments.zeros(torch.zeros(B, Tk, M))


def CALL_PROJECTED(query, memory, *options):
    module = BAHDANAU(Q, M, H)
    return module(query, module.project_memory(memory), *options)


def STEP(*arguments):
    """Of both forms, which have to say the same."""
    errors = []
    for make in (fusedrnn.ForwardAttention, fusedrnn.CoverageAttention):
        with pytest.raises(TypeError) as error:
            make(Q, M, H)(*arguments)
        errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    raise errors[0]


def TACOTRON(query, memory, processed=None, cat=None, mask=None):
    module = fusedrnn.LocationSensitiveAttention(Q, M, H, 4, 3)
    processed = torch.zeros(B, Tk, H) if processed is None else processed
    return module(query, memory, processed, ZEROS.cat() if cat is None else cat, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_tacotrons_mask_is_of_bool(dtype):
    mask = torch.zeros(B, Tk, dtype=dtype)
    with pytest.raises(ValueError, match=f"mask: expected dtype torch.bool, True at padding, got {dtype}"):
        TACOTRON(torch.zeros(B, Q), torch.zeros(B, Tk, M), mask=mask)


@pytest.mark.parametrize(
    ("query", "mask", "expected"),
    [
        ((B, Tq, Q), (B, Tq + 1, Tk), "[3 or 1, 4 or 1, 7]"),
        ((B, Tq, Q), (B, 2, Tq, Tk), "[3 or 1, 1 or 1, 4 or 1, 7]"),
        ((B, 2, Tq, Q), (B, 3, Tq, Tk), "[3 or 1, 2 or 1, 4 or 1, 7]"),
        ((B, 2, Tq, Q), (B, 2, Tk), "[3 or 1, 4 or 1, 7]"),
        ((B, Q), (B, Tq, Tk), "[3 or 1, 1 or 1, 7]"),
        ((B, Tq, Q), (B, Tk + 1), "[3 or 1, 7]"),
        ((B, Tq, Q), (2, Tk), "[3 or 1, 7]"),
        ((B, Tq, Q), (B, Tq, 1), "[3 or 1, 4 or 1, 7]"),
    ],
)
def test_a_mask_of_another_shape_is_named(query, mask, expected):
    message = re.escape(f"mask: expected shape {expected}, got {[*mask]}")
    memory = torch.zeros(B, Tk, M)
    for module in (BAHDANAU(Q, M, H), LUONG(Q, M), LUONG(Q, M, "concat", H)):
        for given in (memory, module.project_memory(memory)):
            with pytest.raises(RuntimeError, match=message):
                module(torch.zeros(query), given, mask=torch.ones(mask) > 0)


@pytest.mark.parametrize("make", [fusedrnn.CoverageAttention, fusedrnn.ForwardAttention])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [((B, 3, Tk), "[3 or 1, 2 or 1, 7]"), ((B, Tk + 1), "[3 or 1, 7]"), ((2, 2, Tk), "[3 or 1, 2 or 1, 7]")],
)
def test_a_mask_of_another_shape_is_named_in_a_step(make, mask, expected):
    memory = torch.zeros(B, Tk, M)
    with pytest.raises(RuntimeError, match=re.escape(f"mask: expected shape {expected}, got {[*mask]}")):
        make(Q, M, H)(
            torch.zeros(B, 2, Q), memory, fusedrnn.Alignments.zeros(memory, 2), mask=torch.ones(mask) > 0
        )
