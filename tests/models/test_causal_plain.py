"""Models whose prompts are not shared: both stages against Hugging Face's own forward, and how they are chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import (
    LENGTHS,
    PLAIN,
    POSITIONS,
    PROMPT_INDEX,
    assert_plain,
    decoder_inputs,
    make_model,
    make_plain,
    make_prompts,
    not_suppressed,
    plain_logits,
    random_answers,
    side_by_side,
    stage_one,
    stage_two,
    tolerance,
)
from torch import Tensor

from esrl.models import causal_plain
from esrl.models.adapters import LoraSettings, add_adapter, load_adapter
from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.causal_support import NO_LIMIT
from esrl.models.load import load_policy
from esrl.sampling.generate import generate_texts

EVERY = ["llama", "gpt2", "gemma2", *PLAIN]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", EVERY)
def test_parallel_forward_is_the_plain_one(family, dtype, tokenizer):
    policy = make_plain(family, tokenizer, dtype)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 14)
    with torch.no_grad():
        ours = stage_two(policy, prompts, PROMPT_INDEX, answers)
        theirs = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
        prompts.input_ids[3, 0] = 3 + (prompts.input_ids[3, 0] - 2) % 100
        other = stage_two(policy, prompts, PROMPT_INDEX, answers)
    assert float(theirs.std()) > 0.5 and bool((ours[..., 0] == -torch.inf).all())
    limit = tolerance(family, dtype)
    torch.testing.assert_close(not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=limit)
    # after a prompt of 12 tokens its first one still counts
    assert float((ours - other)[PROMPT_INDEX == 3, 0, 1:].abs().max()) > 10 * limit


@pytest.mark.parametrize("at_a_time", [1, 40, 10**6])
@pytest.mark.parametrize("family", EVERY)
def test_step_by_step_is_the_plain_forward(family, at_a_time, tokenizer, monkeypatch):
    """Rows that leave, prompts all of whose rows have left; rows by the one, a few and all together."""
    monkeypatch.setattr(causal_plain, "_STEP_TOKENS", at_a_time)
    policy = make_plain(family, tokenizer)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 19)
    keep_at = {3: [0, 10, 2, 3, 4, 9, 6, 7, 8], 9: [0, 8, 2, 7], 12: [7], 17: [7]}
    seen = stage_one(policy.frozen_decoder(), policy, prompts, answers, keep_at)
    with torch.no_grad():
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    assert (7, 18) in seen and (0, 12) not in seen
    assert_plain(policy, seen, expected, tolerance(family))


@pytest.mark.parametrize("family", EVERY)
def test_waves_side_by_side_are_the_plain_forward(family, tokenizer):
    policy = make_plain(family, tokenizer)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 14)
    with torch.no_grad():
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    assert_plain(policy, side_by_side(policy.frozen_decoder(), policy, prompts, answers), expected, tolerance(family))


@pytest.mark.parametrize("lengths", [[1, 1, 1], [1], [6, 6], [20, 1]])
def test_prompts_of_one_token_and_of_equal_length(lengths, tokenizer):
    policy = make_plain("mamba", tokenizer)
    prompts, index = make_prompts(lengths), torch.arange(len(lengths)).repeat_interleave(2)
    answers = random_answers(len(index), 9)
    with torch.no_grad():
        ours = stage_two(policy, prompts, index, answers)
        theirs = plain_logits(policy.model, prompts, index, answers)
    torch.testing.assert_close(
        not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=tolerance("mamba")
    )


def test_padding_does_not_go_beyond_the_positions(tokenizer):
    """GPT-2's are a table of 48: a prompt of 45 in a batch with answers of 10 would need 55."""
    policy, prompts, answers = make_plain("gpt2", tokenizer), make_prompts([POSITIONS - 3, 2]), random_answers(2, 10)
    with torch.no_grad():
        ours = not_suppressed(policy, stage_two(policy, prompts, torch.arange(2), answers))
        for row, length in enumerate((3, 10)):
            alone = plain_logits(
                policy.model, prompts.select([row]), torch.tensor([0]), answers[row : row + 1, :length]
            )
            torch.testing.assert_close(ours[row, :length], not_suppressed(policy, alone)[0], rtol=0, atol=1e-9)


def test_a_state_is_the_prompts_tokens_in_the_type_of_what_is_recorded(tokenizer):
    """Half precision would round them: bfloat16 has 8 bits of 160."""
    prompts = make_prompts([5, 1])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        policy = make_plain("llama", tokenizer, dtype)
        state = policy.encode(prompts)
        assert state.keys[0].dtype == wide and not state.keys[0].requires_grad
        assert state.keys[0][0, 0, :, 0].tolist() == prompts.input_ids[0, :4].tolist()
        assert state.mask.tolist() == [[True] * 4, [False] * 4]
        inputs = decoder_inputs(policy, prompts, torch.arange(2), random_answers(2, 3))
        assert policy.hidden_states(state, torch.arange(2), inputs).dtype == dtype


class Mixing(torch.nn.Module):
    """A norm that lets every state see the mean of all along one dimension: of a batch, or of its row's future."""

    def __init__(self, norm: torch.nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.dim = norm, dim

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + hidden.mean(self.dim, keepdim=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_rows_that_see_each_other_or_ahead_are_refused_by_name(dim, tokenizer):
    model = make_model("llama")
    model.model.norm = Mixing(model.model.norm, dim)
    with pytest.raises(ValueError, match="'llama' is not supported: logits differ from its own by"):
        PlainCausalPolicy(model, tokenizer)


def saved(folder: Path, family: str, tokenizer: Any) -> Path:
    make_model(family, torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_folder_is_run_the_plain_way_where_it_must_be(tokenizer, tmp_path):
    policy = load_policy(saved(tmp_path / "mamba", "mamba", tokenizer))
    assert type(policy) is PlainCausalPolicy and policy.max_length == NO_LIMIT
    assert policy.notice is not None and "\n" not in policy.notice
    for part in ("'mamba' cannot share", "layers of the kind linear_attention", "slower"):
        assert part in policy.notice
    shared = load_policy(saved(tmp_path / "gemma2", "gemma2", tokenizer))
    assert type(shared) is CausalPolicy and shared.notice is None


def test_adapters_leave_it_what_it_is(tokenizer, tmp_path):
    base = saved(tmp_path / "base", "mamba", tokenizer)
    policy = add_adapter(load_policy(base), LoraSettings(rank=2, target_modules=("in_proj",)))
    policy.save(tmp_path / "adapters")
    again = load_adapter(tmp_path / "adapters", load_policy(base))
    for found in (policy, again):
        assert type(found) is PlainCausalPolicy and found.notice is not None and "'mamba'" in found.notice


@pytest.mark.parametrize("family", PLAIN)
def test_beam_search_does_not_pad(family, tokenizer):
    """All prompts at once, as each alone; two of them have the same length."""
    policy, prompts = make_plain(family, tokenizer), make_prompts(LENGTHS)
    together = generate_texts(policy, prompts, 8, 3, 1.0)
    assert together == [generate_texts(policy, prompts.select([i]), 8, 3, 1.0)[0] for i in range(len(prompts))]
