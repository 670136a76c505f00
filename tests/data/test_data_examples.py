from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esrl.data.examples import Example, content_digest, fixed_subset, limit_lengths, number_examples

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
RECORDS = st.dictionaries(TEXT, TEXT, max_size=4)


def test_digest_is_blake2b_of_length_prefixed_names_and_values():
    # name "a" (1 byte), value "xy" (2 bytes), lengths as 8 little-endian bytes
    encoded = b"\x01" + bytes(7) + b"a" + b"\x02" + bytes(7) + b"xy"
    assert content_digest({"a": "xy"}) == blake2b(encoded, digest_size=10).hexdigest()


def test_digest_ignores_column_order_and_empty_columns_but_not_where_text_stands():
    assert content_digest({"a": "1", "b": "2"}) == content_digest({"b": "2", "a": "1", "c": ""})
    different = [{"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"a": "12"}, {"a1": "2"}, {"a": "1b2"}, {}]
    assert len({content_digest(columns) for columns in different}) == len(different)


@given(RECORDS, RECORDS)
def test_equal_digests_mean_equal_content(left, right):
    same = {k: v for k, v in left.items() if v} == {k: v for k, v in right.items() if v}
    assert (content_digest(left) == content_digest(right)) == same


def test_equal_records_are_numbered_from_zero_in_order():
    ids = [example.id for example in number_examples([{"source": t} for t in ("a", "b", "a", "a")])]
    digest_a, digest_b = content_digest({"source": "a"}), content_digest({"source": "b"})
    assert ids == [f"{digest_a}-0", f"{digest_b}-0", f"{digest_a}-1", f"{digest_a}-2"]


def test_examples_cannot_be_changed():
    with pytest.raises(AttributeError):
        Example("x", {}).id = "y"  # type: ignore[misc]


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.integers(1, 50), st.randoms())
def test_the_subset_is_in_file_order_and_does_not_depend_on_it(texts, limit, random):
    examples = list(number_examples({"source": text} for text in texts))
    chosen = fixed_subset(examples, limit)
    positions = [examples.index(example) for example in chosen]
    assert positions == sorted(positions)
    assert len(chosen) == min(limit, len(texts))
    random.shuffle(texts)
    again = fixed_subset(list(number_examples({"source": text} for text in texts)), limit)
    assert sorted(e.id for e in again) == sorted(e.id for e in chosen)


def test_the_subset_ranks_occurrences_as_numbers():
    # occurrence 10 comes after 2, though "10" < "2" as text
    examples = list(number_examples({"source": "a"} for _ in range(12)))
    assert [e.id.split("-")[1] for e in fixed_subset(examples, 3)] == ["0", "1", "2"]


def words(texts: list[str]) -> list[list[int]]:
    return [[0] * len(text.split()) for text in texts]


LENGTHS = [Example("a", {"source": "1 2", "reference": "1 2 3 4"}), Example("b", {"source": "1 2 3", "reference": "1"})]
LENGTHS += [Example("c", {"source": "1 2", "reference": "1 2"}), Example("d", {"source": "1"})]


def test_over_long_examples_are_skipped_and_counted():
    # a: reference of 4 > 3; b: source of 3 > 2; c: both at the limit; d: no reference to be too long
    kept, report = limit_lengths(LENGTHS, words, max_source_tokens=2, max_target_tokens=3, rule="skip")
    assert [example.id for example in kept] == ["c", "d"]
    assert (report.long_sources, report.long_references, report.skipped, report.read) == (1, 1, 2, 4)
    assert str(report) == (
        "1 sources over 2 tokens and 1 references over 3 tokens: 2 examples skipped; 2 of 4 examples left"
    )


def test_over_long_examples_are_kept_and_counted_when_cut():
    kept, report = limit_lengths(LENGTHS, words, max_source_tokens=2, max_target_tokens=3, rule="cut")
    assert kept == tuple(LENGTHS)
    assert (report.long_sources, report.long_references, report.skipped) == (1, 1, 0)


def test_without_a_target_limit_references_are_not_tokenized():
    seen: list[str] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        seen.extend(texts)
        return words(texts)

    kept, _ = limit_lengths(LENGTHS, tokenize, max_source_tokens=2, max_target_tokens=None, rule="skip")
    assert [example.id for example in kept] == ["a", "c", "d"]
    assert seen == ["1 2", "1 2 3", "1 2", "1"]


def test_many_examples_keep_their_order_over_batches_of_tokenization():
    # 2,500 examples are tokenized in three goes; example i has i % 5 + 1 words, so 4 in 5 have at most 4
    examples = [Example(str(i), {"source": "w " * (i % 5 + 1)}) for i in range(2500)]
    kept, report = limit_lengths(examples, words, max_source_tokens=4, max_target_tokens=None, rule="skip")
    assert [example.id for example in kept] == [str(i) for i in range(2500) if i % 5 != 4]
    assert report.long_sources == 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_source_tokens": 0}, "max_source_tokens is 0"),
        ({"max_target_tokens": 0}, "max_target_tokens is 0"),
        ({"rule": "drop"}, "'drop'"),
        ({"max_target_tokens": 1, "max_source_tokens": 1, "examples": LENGTHS[:3]}, "0 of 3 examples left"),
        ({"tokenize": lambda texts: [[1]]}, "1 rows for 4 texts"),
    ],
)
def test_limit_lengths_refuses(changes, message):
    arguments = {"examples": LENGTHS, "tokenize": words, "max_source_tokens": 2, "max_target_tokens": 3, "rule": "skip"}
    with pytest.raises(ValueError, match=message):
        limit_lengths(**(arguments | changes))
