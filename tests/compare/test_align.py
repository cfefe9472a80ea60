"""Losses on the characters of a text: nothing is lost, nothing is divided, whatever the tokenizers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compared import TEXTS, measured
from extendable import TOKENIZERS
from loadstone.compare.align import TokenBits, pieces, ranked, scored_by_all, token_bits
from loadstone.compare.repetition import distinct, repetition
from loadstone.load import load


def cut(text: str, lengths: list[int]) -> list[bytes]:
    """The bytes of a text in tokens of these lengths, which may end within a character."""
    raw, ends = text.encode(), [0, *itertools.accumulate(lengths)]
    tokens = [raw[a:b] for a, b in itertools.pairwise(ends)] + [raw[ends[-1] :]]
    return [token for token in tokens if token] or [raw]


LENGTHS = st.lists(st.integers(1, 6), max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40), LENGTHS, LENGTHS, st.integers(0, 9))
def test_pieces_cover_the_text_and_add_up_to_each_loss(text: str, one: list[int], two: list[int], seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = [cut(text, one), cut(text, two)]
    nats = [random.exponential(3, len(each)) for each in tokens]
    models = [token_bits(text, each, loss) for each, loss in zip(tokens, nats, strict=True)]
    found = pieces(models)
    assert "".join(text[piece.begin : piece.end] for piece in found) == text
    assert all(piece.begin < piece.end for piece in found)
    for i in range(2):
        assert sum(piece.bits[i] for piece in found) == pytest.approx(nats[i].sum() / math.log(2))
    # As fine as it can be: a piece ends wherever both have a token that completes the same character.
    between = list(itertools.accumulate(len(char.encode()) for char in text))
    ends = [{min(b for b in between if b >= end) for end in itertools.accumulate(map(len, each))} for each in tokens]
    assert len(found) == len(ends[0] & ends[1])


def test_pieces_by_hand() -> None:
    one = token_bits("aé b", [b"a", b"\xc3", b"\xa9", b" b"], np.log([2, 4, 8, 16]))
    two = token_bits("aé b", [b"a\xc3\xa9", b" ", b"b"], np.log([2, 2, 2]))
    assert [(p.begin, p.end) for p in pieces([one, two])] == [(0, 2), (2, 4)]
    assert [p.bits for p in pieces([one, two])] == [pytest.approx((6, 1)), pytest.approx((4, 2))]
    assert [p.difference for p in ranked(pieces([one, two]), 1)] == [pytest.approx(5)]
    assert [(p.begin, p.end) for p in pieces([one])] == [(0, 1), (1, 2), (2, 4)]


def test_a_first_token_without_a_score_spoils_its_own_piece_only() -> None:
    one = token_bits("abc", [b"a", b"b", b"c"], np.log([2, 4]))
    found = pieces([one, token_bits("abc", [b"a", b"bc"], np.log([2, 2]))])
    assert math.isnan(found[0].bits[0])
    assert [piece.bits for piece in scored_by_all(found)] == [pytest.approx((3, 1))]


def test_sentencepieces_first_space_and_tokenizers_that_change_the_text() -> None:
    assert token_bits("ab", [b" a", b"b"], np.ones(2)).ends.tolist() == [1, 2]
    assert token_bits("ab", [b"", b" a", b"b"], np.ones(3)).ends.tolist() == [0, 1, 2]
    assert token_bits("Ab", [b"a", b"b"], np.ones(2)).ends.tolist() == [2, 2]  # lower case: it counts to the whole
    whole = pieces([token_bits("Ab", [b"a", b"b"], np.ones(2)), TokenBits(np.array([1, 2]), np.ones(2))])
    assert [(piece.begin, piece.end, piece.bits[1]) for piece in whole] == [(0, 2, 2.0)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_models_bits_are_its_loss_with_every_kind_of_tokenizer(tmp_path: Path, kind: str) -> None:
    found = measured(tmp_path, ["byte level", kind])
    for name in TEXTS:
        for model, index in zip(found.models, (0, 1), strict=True):
            bits = model.scores[name].bits
            assert np.nansum(bits.bits) * math.log(2) == pytest.approx(model.scores[name].nats)
            total = sum(piece.bits[index] for piece in scored_by_all(found.pieces(1, name)))
            unscored = [p for p in found.pieces(1, name) if any(map(math.isnan, p.bits))]
            if not unscored:
                assert total * math.log(2) == pytest.approx(model.scores[name].nats)
            assert len(unscored) <= 1
        covered = "".join(TEXTS[name][piece.begin : piece.end] for piece in found.pieces(1, name))
        assert covered == TEXTS[name]


def test_the_loss_is_that_of_the_plainest_loop(tmp_path: Path) -> None:
    """Token by token, each given the context that its window leaves it."""
    found = measured(tmp_path, ["byte level", "byte level"], plain=TEXTS["plain"])
    model, _ = load(tmp_path / "byte level")
    tokenizer = TOKENIZERS["byte level"]()
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXTS["plain"])]
    nats = 0.0
    model.requires_grad_(False)
    for i in range(1, len(ids)):
        if i <= 32:
            begin = 0
        else:  # windows of 32 tokens of context that score 16 each, and the last ends with the text
            end = min(len(ids), 33 + 16 * -(-(i - 32) // 16))
            begin = end - 33
        nats -= float(model(torch.tensor([ids[begin:i]]))[0, -1].log_softmax(-1)[ids[i]])
    assert found.models[0].scores["plain"].nats == pytest.approx(nats, rel=1e-5)


def test_distinct_and_repetition_by_hand() -> None:
    samples = ["the cat The dog", "the cat"]
    assert distinct(samples, 1) == 3 / 6  # the, cat, dog
    assert distinct(samples, 2) == 3 / 4  # the cat, cat the, the dog; no pair from one sample to the next
    assert distinct(["one"], 2) is None
    assert distinct([""], 1) is None
    assert repetition(["a b c d a b c d a b c d"]) == 5 / 9  # 9 sequences of four, 4 different
    assert repetition(["a b c d", "a b c d"]) == 0.0  # again, and in another sample
    assert repetition(["a b c"]) is None
