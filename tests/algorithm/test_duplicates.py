"""Which rows count as the same sample, and what is left of them (method.md, section 5)."""

from __future__ import annotations

import pytest
import torch

from esrl.algorithm.duplicates import handle_duplicates, num_unique, select_rows
from esrl.types import Rollouts

#    prompt  tokens        length
ROWS = [
    (0, [5, 6, 7], 3),
    (0, [5, 6, 9], 2),  # a prefix of the row above: another sample
    (0, [5, 6, 7], 3),  # = row 0
    (0, [5, 6, 8], 2),  # = row 1: what stands beyond the end does not count
    (0, [7, 6, 5], 3),  # another order of the same tokens
    (1, [5, 6, 7], 3),  # the same tokens, for another prompt
    (1, [0, 0, 0], 2),  # a policy can sample token 0: lengths tell these two apart
    (1, [0, 0, 0], 3),
    (3, [5, 6, 7], 3),
    (3, [5, 6, 7], 3),  # = row 8
    (3, [5, 6, 7], 3),  # = row 8
]


def rollouts() -> Rollouts:
    number = torch.arange(len(ROWS), dtype=torch.float64)
    return Rollouts(
        prompt_index=torch.tensor([prompt for prompt, _, _ in ROWS]),
        sample_index=torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2]),
        tokens=torch.tensor([tokens for _, tokens, _ in ROWS]),
        mask=torch.tensor([[t < length for t in range(3)] for _, _, length in ROWS]),
        finished=number % 2 == 0,
        log_probs=-number[:, None].expand(-1, 3),
        sampling_log_probs=-2 * number[:, None].expand(-1, 3),
        texts=tuple(f"text {i}" for i in range(len(ROWS))),
        records={"entropy": 3 * number[:, None].expand(-1, 3)},
    )


def test_merge_keeps_the_first_of_each_and_counts():
    merged, counts = handle_duplicates(rollouts(), "merge")
    kept = [0, 1, 4, 5, 6, 7, 8]
    assert counts.tolist() == [2, 2, 1, 1, 1, 1, 3]
    assert num_unique(rollouts()) == num_unique(merged) == len(kept)
    assert int(counts.sum()) == len(ROWS)
    # every field is that of the kept row, in the old order
    assert merged.texts == tuple(f"text {i}" for i in kept)
    assert merged.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 3]
    assert merged.sample_index.tolist() == [0, 1, 4, 0, 1, 2, 0]
    assert merged.tokens.tolist() == [ROWS[i][1] for i in kept]
    assert merged.lengths.tolist() == [ROWS[i][2] for i in kept]
    assert merged.finished.tolist() == [i % 2 == 0 for i in kept]
    assert (-merged.log_probs[:, 0]).tolist() == kept
    assert (-merged.sampling_log_probs[:, 2] / 2).tolist() == kept
    assert (merged.records["entropy"][:, 1] / 3).tolist() == kept


def test_drop_counts_each_once_and_keep_leaves_everything():
    dropped, counts = handle_duplicates(rollouts(), "drop")
    assert (counts.tolist(), dropped.texts) == ([1] * 7, handle_duplicates(rollouts(), "merge")[0].texts)
    everything = rollouts()
    same, counts = handle_duplicates(everything, "keep")
    assert same is everything and counts.tolist() == [1] * len(ROWS)


@pytest.mark.parametrize("rule", ["merge", "drop", "keep"])
def test_no_rows(rule: str):
    empty, counts = handle_duplicates(select_rows(rollouts(), []), rule)
    assert (empty.num_rows, empty.texts, counts.tolist()) == (0, (), [])
