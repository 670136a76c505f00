"""The joint byte-pair encoding."""

from __future__ import annotations

import pytest

from esrl.models.tokenizer import train_tokenizer

TEXTS = ["Der Hund läuft, der Hund bellt.", "The dog runs; the dog barks!"]


def test_text_survives_the_round_trip():
    tokenizer = train_tokenizer(TEXTS, 60, 40)
    for text in [*TEXTS, "Der dog, the Hund!"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # NFKC: the ligature and the full-width exclamation mark are the plain letters
    assert tokenizer("ﬁ！")["input_ids"] == tokenizer("fi!")["input_ids"]


def test_merges_follow_frequency():
    """▁abab three times and ▁ab once: (a, b) comes 7 times and is merged first, then (▁, ab) 4 times, (ab, ab) 3."""
    tokenizer = train_tokenizer(["abab abab abab ab"], 8, 40)  # three special pieces, ▁, a, b, two merges
    assert tokenizer.tokenize("abab") == ["▁ab", "ab"]
    assert len(tokenizer) == 8


def test_special_pieces_have_fixed_places():
    tokenizer = train_tokenizer(TEXTS, 60, 40)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("語")["input_ids"][-2] == 2
    assert tokenizer.model_max_length == 40


def test_too_large_a_vocabulary_names_the_largest():
    # a, b, metaspace and three special pieces, then the merges "ab", "▁ab" (in some order): eight pieces at most
    with pytest.raises(
        ValueError, match=r"vocab_size is 50, but the training text has only 8 pieces; set vocab_size = 8"
    ):
        train_tokenizer(["ab ab"], 50, 40)
