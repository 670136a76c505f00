"""Stop strings: the text before them, the tokens up to the one that completes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esrl.data.stops import cut_text, stop_rows, tokens_until_stop

PIECES = ["a", "b", "ab", "\n", "\n\n", "#", "##", "# Q", "ba#"]


def decode(ids: list[int]) -> str:
    return "".join(PIECES[i] for i in ids)


def test_the_earliest_stop_string_cuts_the_text():
    assert cut_text("one##two#three", ["#t", "##"]) == ("one", True)
    assert cut_text("one", ["##"]) == ("one", False)
    assert cut_text("one", []) == ("one", False)


def test_the_token_that_completes_the_stop_string_counts_and_those_after_it_do_not():
    ids = [0, 5, 1, 8, 5, 0]  # a # b ba# # a: "##" is complete with the fifth token
    assert decode(ids) == "a#bba##a"
    assert tokens_until_stop(ids, decode, ["##"]) == 5
    assert tokens_until_stop(ids, decode, ["##", "#b"]) == 3  # the first to be completed, not the longest
    assert tokens_until_stop(ids, decode, ["\n"]) is None
    assert tokens_until_stop([], decode, ["a"]) is None


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=30), st.lists(st.text("ab#\n Q", min_size=1), max_size=3))
def test_bisection_finds_what_a_walk_finds(ids, stops):
    walk = next((n for n in range(1, len(ids) + 1) if any(stop in decode(ids[:n]) for stop in stops)), None)
    assert tokens_until_stop(ids, decode, stops) == walk


def test_rows_are_masked_behind_their_stop():
    tokens = torch.tensor([[0, 6, 1, 1], [0, 1, 0, 1], [0, 5, 6, 6]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    kept, stopped, texts = stop_rows(tokens, mask, decode, ["##"])
    # the third row's "##" stands where there is no token any more
    assert kept.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert stopped.tolist() == [True, False, False]
    assert texts == ["a", "aba", "a#"]
    assert mask.sum() == 9  # the caller's is untouched


@pytest.mark.parametrize("stops", ["##", ["a", ""]])
def test_an_empty_stop_string_is_refused(stops):
    with pytest.raises(ValueError, match="none of them empty"):
        stop_rows(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool(), decode, stops)
