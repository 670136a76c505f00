"""Causal models with shared prompts against Hugging Face's plain forward of prompt and answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from causal_models import (
    FAMILIES,
    LENGTHS,
    POSITIONS,
    PROMPT_INDEX,
    VOCABULARY,
    assert_plain,
    configs,
    decoder_inputs,
    make_causal,
    make_model,
    make_prompts,
    norms_in_float64,
    not_suppressed,
    plain_logits,
    random_answers,
    side_by_side,
    stage_one,
    stage_two,
    tolerance,
)
from transformers import LlamaConfig, MixtralConfig, OPTConfig, Phi3Config, Qwen2Config

from esrl.models.causal import CausalPolicy
from esrl.models.causal_attention import attending
from esrl.models.causal_decoder import FrozenCausalDecoder
from esrl.models.causal_llama import FrozenLlamaDecoder
from esrl.models.causal_support import CannotShareError, fault_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_forward_is_the_plain_one(family, dtype, tokenizer):
    policy = make_causal(family, tokenizer, dtype)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 14)
    with torch.no_grad():
        ours = stage_two(policy, prompts, PROMPT_INDEX, answers)
        theirs = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    assert float(theirs.std()) > 0.5  # the tolerance means something
    assert policy.suppressed == [0] and bool((ours[..., 0] == -torch.inf).all())
    torch.testing.assert_close(
        not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=tolerance(family, dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("generic", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_is_the_plain_forward(family, generic, dtype, tokenizer):
    """Through growth of the cache (8 and 16 positions), rows that leave, and prompts all of whose rows have left."""
    policy = make_causal(family, tokenizer, dtype)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 19)
    keep_at = {3: [0, 10, 2, 3, 4, 9, 6, 7, 8], 9: [0, 8, 2, 7], 12: [7], 17: [7]}
    frozen = FrozenCausalDecoder(policy.body, policy.projection(), POSITIONS) if generic else policy.frozen_decoder()
    seen = stage_one(frozen, policy, prompts, answers, keep_at)
    with torch.no_grad():
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    assert (7, 18) in seen and (0, 12) not in seen
    assert_plain(policy, seen, expected, tolerance(family, dtype))


@pytest.mark.parametrize("generic", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_waves_side_by_side_are_the_plain_forward(family, generic, tokenizer):
    policy = make_causal(family, tokenizer)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 14)
    frozen = FrozenCausalDecoder(policy.body, policy.projection(), POSITIONS) if generic else policy.frozen_decoder()
    with torch.no_grad():
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    assert_plain(policy, side_by_side(frozen, policy, prompts, answers), expected, tolerance(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [1], [6, 6], [20, 1]])
def test_prompts_of_one_token_and_of_equal_length(family, lengths, tokenizer):
    policy = make_causal(family, tokenizer)
    prompts, index = make_prompts(lengths), torch.arange(len(lengths)).repeat_interleave(2)
    answers = random_answers(len(index), 9)
    with torch.no_grad():
        ours = stage_two(policy, prompts, index, answers)
        theirs = plain_logits(policy.model, prompts, index, answers)
    torch.testing.assert_close(not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prefix_is_an_unshared_one(family, tokenizer):
    """Each row with a copy of its prompt's state for itself; and one very uneven batch, which shares by copies."""
    policy = make_causal(family, tokenizer)
    prompts = make_prompts(LENGTHS)
    for index in (PROMPT_INDEX, torch.tensor([3] * 20 + [0, 1, 4, 5])):
        inputs = decoder_inputs(policy, prompts, index, random_answers(len(index), 11))
        with torch.no_grad():
            state = policy.encode(prompts)
            shared = policy.hidden_states(state, index, inputs)
            alone = policy.hidden_states(state.select(index), torch.arange(len(index)), inputs)
        torch.testing.assert_close(shared, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_through_the_cut_is_the_plain_one(family, tokenizer, gradients):
    """Two micro-batches add up their gradient at the cut, and one way back goes through the prompts."""
    policy = make_causal(family, tokenizer)
    norms_in_float64(policy.model)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 10)
    weights = torch.randn(len(PROMPT_INDEX), 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def weighted(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        log_probs = torch.log_softmax(not_suppressed(policy, logits), -1)
        return (log_probs.gather(-1, answers[rows, :, None] - 1)[..., 0] * weights[rows]).sum()

    def plain() -> None:
        weighted(plain_logits(policy.model, prompts, PROMPT_INDEX, answers), slice(None)).backward()

    def cut() -> None:
        state = policy.encode(prompts)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in state.tensors)
        inputs = decoder_inputs(policy, prompts, PROMPT_INDEX, answers)
        for rows in (slice(0, 4), slice(4, None)):
            hidden = policy.hidden_states(state.with_tensors(leaves), PROMPT_INDEX[rows], inputs[rows])
            weighted(policy.projection().logits(hidden), rows).backward()
        reached = [i for i, leaf in enumerate(leaves) if leaf.grad is not None]
        torch.autograd.backward([state.tensors[i] for i in reached], [leaves[i].grad for i in reached])

    assert policy.suppressed == [0]  # so token n is column n - 1 of those left
    expected, found = gradients(policy.model, plain), gradients(policy.model, cut)
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-2
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].to_dense(), value, rtol=tolerance(family), atol=tolerance(family), msg=name
        )


def test_encoding_does_not_depend_on_padding(tokenizer):
    policy = make_causal("llama", tokenizer)
    prompts = make_prompts(LENGTHS)
    with torch.no_grad():
        together = policy.encode(prompts)
        for i, length in enumerate(LENGTHS):
            alone = policy.encode(prompts.select([i]))
            assert int(alone.mask.sum()) == int(together.mask[i].sum()) == length - 1
            for a, b in zip(alone.tensors, together.tensors, strict=True):
                torch.testing.assert_close(a[0, :, : length - 1], b[i, :, : length - 1], rtol=0, atol=1e-12)


def test_start_tokens_and_room(tokenizer):
    policy = make_causal("llama", tokenizer)
    prompts = make_prompts([3, 1, POSITIONS - 1])
    ids = prompts.input_ids
    assert policy.start_tokens(prompts).tolist() == [int(ids[0, 2]), int(ids[1, 0]), int(ids[2, POSITIONS - 2])]
    assert policy.room(prompts).tolist() == [POSITIONS - 3, POSITIONS - 1, 1]
    with pytest.raises(ValueError, match=rf"prompt of example p1 has {POSITIONS} tokens and leaves no room.*positions"):
        policy.room(make_prompts([3, POSITIONS]))
    empty = make_prompts([3, 2])
    empty.mask[1] = False
    with pytest.raises(ValueError, match="prompt of example p1 has no token"):
        policy.start_tokens(empty)
    left = make_prompts([3, 3])
    left.mask[0, 0] = False
    with pytest.raises(ValueError, match="padded on its left side"):
        policy.encode(left)


def test_a_tokenizer_without_pad_and_several_end_tokens(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    model = make_model("llama")
    model.generation_config.eos_token_id = [1, 7]
    policy = CausalPolicy(model, bare)
    assert (policy.pad_token, policy.eos_tokens, policy.suppressed) == (1, (1, 7), [])
    assert policy.projection().bias is None
    prompts, index, answers = make_prompts([5, 2]), torch.tensor([0, 1, 1]), random_answers(3, 6)
    with torch.no_grad():
        ours = stage_two(policy, prompts, index, answers)
        torch.testing.assert_close(ours, plain_logits(model, prompts, index, answers), rtol=0, atol=1e-9)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a PAD nor an EOS"):
        CausalPolicy(model, bare)


def test_dropout_is_off_unless_asked_for(tokenizer):
    policy = make_causal("gpt2", tokenizer)
    prompts, answers = make_prompts([5, 2]), random_answers(2, 6)
    one, two = (stage_two(policy, prompts, torch.arange(2), answers) for _ in range(2))
    assert torch.equal(one, two) and not policy.model.training
    policy.set_dropout(0.3)
    rates = {name: module.p for name, module in policy.model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert all(rate == (0.0 if "attn_dropout" in name else 0.3) for name, rate in rates.items())
    assert not torch.equal(one, stage_two(policy, prompts, torch.arange(2), answers))
    policy.set_dropout(0.0)
    assert torch.equal(one, stage_two(policy, prompts, torch.arange(2), answers))
    with pytest.raises(ValueError, match=r"'llama' has no dropout outside.*set dropout = 0"):
        make_causal("llama", tokenizer).set_dropout(0.1)


def test_the_model_is_left_as_it_was(tokenizer):
    """Hugging Face's own forward and its attention work as before, also after an error on the way."""
    policy = make_causal("llama", tokenizer)
    before = policy.model.config._attn_implementation
    policy.encode(make_prompts([4]))
    policy.frozen_decoder()
    assert policy.model.config._attn_implementation == before == "sdpa"
    with pytest.raises(IndexError):
        state = policy.encode(make_prompts([4]))
        policy.hidden_states(state, torch.tensor([0]), torch.tensor([[VOCABULARY + 5]]))
    assert policy.model.config._attn_implementation == before


def test_checkpointed_layers_are_refused_in_training(tokenizer):
    policy = make_causal("gpt2", tokenizer)
    policy.model.gradient_checkpointing_enable()
    policy.encode(make_prompts([4]))  # not in effect outside training
    policy.model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        policy.encode(make_prompts([4]))


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def test_families_without_tests_of_their_own_are_compared_and_taken(tokenizer):
    opt = OPTConfig(**{**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32})
    for config in (opt, MixtralConfig(num_local_experts=3, num_key_value_heads=2, **SMALL)):
        policy = make_causal(config, tokenizer, torch.float32)
        prompts, index, answers = make_prompts([9, 1]), torch.tensor([0, 0, 1]), random_answers(3, 12)
        with torch.no_grad():
            ours = stage_two(policy, prompts, index, answers)
            theirs = plain_logits(policy.model, prompts, index, answers)
        torch.testing.assert_close(not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=1e-4)
    windowed = Phi3Config(sliding_window=16, num_key_value_heads=4, **SMALL)
    assert make_causal(windowed, tokenizer, torch.float32).max_length == 16


class Shifted:
    """A projection that is off: what the comparison is there to find."""

    def __init__(self, policy: CausalPolicy) -> None:
        self.real = policy.projection

    def __call__(self) -> Any:
        projection = self.real()
        return type(projection)(projection.weight * 1.05, projection.bias)


def test_the_comparison_finds_a_model_that_differs(tokenizer):
    policy = make_causal("llama", tokenizer)
    assert fault_of(policy) is None
    policy.projection = Shifted(policy)
    fault = fault_of(policy)
    assert fault is not None and fault.startswith("logits differ from its own by")


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mamba", "'mamba' cannot share a prompt among its samples: it has layers of the kind linear_attention"),
        ("gpt_oss", "'gpt_oss' cannot share a prompt among its samples: its attention asks for s_aux"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(family, message, tokenizer):
    """Here; folders are loaded with `PlainCausalPolicy` then (test_causal_plain.py)."""
    with pytest.raises(CannotShareError, match=message):
        CausalPolicy(make_model(family, torch.float32), tokenizer)


def test_a_cap_that_the_model_does_not_have_is_found(tokenizer):
    model = make_model("qwen3")
    model.config.final_logit_softcapping = 2.0
    with pytest.raises(CannotShareError, match=r"'qwen3' cannot share .* logits differ from its own"):
        CausalPolicy(model, tokenizer)


def test_scaled_logits_are_refused_by_name(tokenizer):
    model = make_model("llama")
    model.config.logits_scaling = 8.0
    with pytest.raises(ValueError, match="'llama' is not supported: logits_scaling changes its logits"):
        CausalPolicy(model, tokenizer)


def test_dynamic_positions_are_shared_up_to_where_they_change(tokenizer):
    """To the last position, in a batch whose padding goes beyond: that must not change the frequencies."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    policy = make_causal(LlamaConfig(rope_parameters=rope, **SMALL), tokenizer)
    assert policy.max_length == POSITIONS
    prompts, index = make_prompts([POSITIONS - 6, 2, POSITIONS - 12]), torch.tensor([0, 1, 2])
    answers = random_answers(3, 12)
    with torch.no_grad():
        ours = not_suppressed(policy, stage_two(policy, prompts, index, answers))
        shorter = [prompts.select([0]), prompts.select([1, 2])]
        first = plain_logits(policy.model, shorter[0], torch.tensor([0]), answers[:1, :6])
        others = plain_logits(policy.model, shorter[1], torch.tensor([0, 1]), answers[1:])
    torch.testing.assert_close(ours[:1, :6], not_suppressed(policy, first), rtol=0, atol=1e-9)
    torch.testing.assert_close(ours[1:], not_suppressed(policy, others), rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_llamas_layout_has_a_decoder_of_its_own(family, tokenizer):
    """Or the tests of `frozen_decoder` above would run the generic one twice."""
    policy = make_causal(family, tokenizer)
    kind = FrozenLlamaDecoder if family in ("llama", "qwen2", "qwen3", "mistral") else FrozenCausalDecoder
    assert type(policy.frozen_decoder()) is kind
    if kind is FrozenLlamaDecoder:
        policy.body.layers[1].mlp.up_proj = torch.nn.Sequential(
            policy.body.layers[1].mlp.up_proj
        )  # not a plain product
        assert type(policy.frozen_decoder()) is FrozenCausalDecoder


def test_layers_that_do_not_attend_here_are_refused(tokenizer):
    policy = make_causal("llama", tokenizer)
    with (
        pytest.raises(CannotShareError, match=r"'llama' .* of its 2 layers 0 attend through"),
        attending(policy.model.config),
    ):
        pass
    assert policy.model.config._attn_implementation == "sdpa"


def test_half_precision(tokenizer):
    """Both stages and the plain forward within bfloat16's rounding, 2 ** -8 of the logits' size."""
    policy = make_causal("qwen3", tokenizer, torch.bfloat16)
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 8)
    with torch.no_grad():
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers).float()
        two = stage_two(policy, prompts, PROMPT_INDEX, answers)
    one = stage_one(policy.frozen_decoder(), policy, prompts, answers, {})
    one = torch.stack([torch.stack([one[row, t] for t in range(8)]) for row in range(len(PROMPT_INDEX))])
    assert two.dtype == one.dtype == torch.float32
    size = float(expected.abs().max())
    for found in (one, two):
        difference = not_suppressed(policy, found) - not_suppressed(policy, expected)
        assert float(difference.square().mean().sqrt()) < 0.02 * size


def test_grouped_heads_and_windows_are_in_these_tests():
    """Or the tests above would not mean what they say."""
    known = configs()
    assert known["llama"].num_key_value_heads == 2 and known["gemma3"].num_key_value_heads == 1
    assert max(LENGTHS) > known["gemma3"].sliding_window and max(LENGTHS) > known["mistral"].sliding_window
    assert Qwen2Config().sliding_window is None  # switched off unless use_sliding_window
