"""What a reward model reads."""

from __future__ import annotations

import pytest
from tokenizer_helpers import bert_like, byte_level

from esrl.data.encoding import PromptConfig
from esrl.data.examples import Example, number_examples
from esrl.data.preferences import CausalInputs, PairInputs, collate, limit_pairs, margins, score_encoder


def pair(source: str, chosen: str, rejected: str, **more: str) -> Example:
    return next(number_examples([{"source": source, "reference": chosen, "rejected": rejected, **more}]))


def test_a_causal_classifier_reads_what_the_policy_writes():
    tokenizer = byte_level(bos=True)
    encoder = score_encoder(tokenizer, PromptConfig())
    assert isinstance(encoder, CausalInputs)
    (row,) = encoder.encode([pair("Say hello.", "Hello", "No")], ["Hello there!"])
    assert tokenizer.decode(row["input_ids"]) == "<bos>Say hello.Hello there!<eos>"
    assert encoder.lengths([pair("Say", "Hello", "No")], [""])[1] == [0]  # the end token does not count


def test_an_encoders_classifier_reads_a_pair():
    encoder = score_encoder(bert_like(), PromptConfig(max_source_tokens=3))
    assert isinstance(encoder, PairInputs)
    short, long = encoder.encode([pair("a b", "c", "d"), pair("a b c d", "c", "d")], ["g h", "[SEP] h"])
    # [CLS] a b [SEP] g h [SEP]
    assert short == {"input_ids": [2, 4, 5, 3, 10, 11, 3], "token_type_ids": [0, 0, 0, 0, 1, 1, 1]}
    # the prompt loses its beginning; a written [SEP] is text, three unknown words here
    assert long["input_ids"] == [2, 5, 6, 7, 3, 1, 1, 1, 11, 3]
    assert encoder.encode([], []) == []


def test_rows_are_padded_on_the_right():
    batch = collate([{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [7], "token_type_ids": [0]}], 9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [0, 0]]
    assert "token_type_ids" not in collate([{"input_ids": [5]}], 9)


def test_pairs_beyond_the_limits_are_counted():
    encoder = score_encoder(bert_like(), PromptConfig(max_source_tokens=2, max_target_tokens=2))
    pairs = [pair("a", "b c", "d"), pair("a b c", "d", "e"), pair("a", "b", "c d e"), pair("a", "c d e", "b")]
    kept, report = limit_pairs(pairs, encoder)
    assert kept == (pairs[0],) and (report.long_sources, report.long_references, report.skipped) == (1, 2, 3)


def test_margins_are_numbers():
    assert margins([pair("a", "b", "c", gap="1.5"), pair("a", "c", "b", gap="0")], "gap") == [1.5, 0.0]
    with pytest.raises(ValueError, match='margin_column names "gap", but the data have source'):
        margins([pair("a", "b", "c")], "gap")
    for value in ("-1", "nan", "wide", ""):
        with pytest.raises(ValueError, match="preference 1 has"):
            margins([pair("a", "b", "c", gap=value)], "gap")
