"""LoRA: few weights trained, the start kept as reference, adapters alone saved, and merged into a plain folder."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from causal_models import LENGTHS, PROMPT_INDEX, make_causal, make_prompts, not_suppressed, plain_logits, random_answers
from causal_models import decoder_inputs as causal_inputs
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from esrl.models.adapters import LoraSettings, add_adapter, has_adapter, load_adapter, merge_adapter, reference
from esrl.models.causal import CausalPolicy
from esrl.models.causal_decoder import FrozenCausalDecoder
from esrl.models.load import load_policy
from esrl.models.quantized import load_quantized
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, SamplingPlan


def adapted(policy: Any, **settings: Any) -> Any:
    """With adapters that change something: PEFT starts them at 0."""
    result = add_adapter(policy, LoraSettings(rank=2, alpha=4.0, **settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in result.model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return result


def marian(random64: MarianPolicy) -> MarianPolicy:
    return MarianPolicy(copy.deepcopy(random64.model), random64.tokenizer)


def scores(policy: Any, prompts: Prompts) -> Tensor:
    index = torch.arange(len(prompts)).repeat_interleave(2)
    answers = random_answers(len(index), 7)
    inputs = torch.cat([policy.start_tokens(prompts)[index, None], answers[:, :-1]], 1)
    with torch.no_grad():
        logits = policy.projection().logits(policy.hidden_states(policy.encode(prompts), index, inputs))
    return torch.log_softmax(not_suppressed(policy, logits), -1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_stages_are_the_adapted_models(family, tokenizer):
    policy = adapted(make_causal(family, tokenizer))
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 9)
    inputs = causal_inputs(policy, prompts, PROMPT_INDEX, answers)
    with torch.no_grad():
        state = policy.encode(prompts)
        two = policy.projection().logits(policy.hidden_states(state, PROMPT_INDEX, inputs))
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
    torch.testing.assert_close(not_suppressed(policy, two), not_suppressed(policy, expected), rtol=0, atol=1e-9)
    for frozen in (policy.frozen_decoder(), FrozenCausalDecoder(policy.body, policy.projection(), 48)):
        decoder = frozen.start(state, PROMPT_INDEX)
        one = torch.stack([frozen.projection.logits(decoder.step(inputs[:, t])) for t in range(9)], 1)
        torch.testing.assert_close(not_suppressed(policy, one), not_suppressed(policy, expected), rtol=0, atol=1e-9)


def test_an_encoder_decoders_stages_agree(random64, prompts):
    """Stage one reads merged weights, stage two runs PEFT's layers."""
    start, policy = scores(random64, prompts), adapted(marian(random64))
    rollouts = EngineSampler(policy, SamplingConfig(max_new_tokens=12), 0).sample(prompts, SamplingPlan.greedy(10))
    inputs = torch.cat([torch.full((10, 1), policy.start_token), rollouts.tokens[:, :-1]], 1)
    with torch.no_grad():
        logits = policy.projection().logits(policy.hidden_states(policy.encode(prompts), torch.arange(10), inputs))
        theirs = policy.model(input_ids=prompts.input_ids, attention_mask=prompts.mask, decoder_input_ids=inputs).logits
    torch.testing.assert_close(not_suppressed(policy, logits), not_suppressed(policy, theirs), rtol=0, atol=1e-9)
    chosen = torch.log_softmax(logits, -1).gather(-1, rollouts.tokens[..., None])[..., 0]
    torch.testing.assert_close(rollouts.log_probs, torch.where(rollouts.mask, chosen, 0.0), rtol=0, atol=1e-9)
    assert float((scores(policy, prompts) - start).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["marian", "llama", "gpt2"])
def test_the_reference_is_the_start(family, tokenizer, random64, prompts):
    start = random64 if family == "marian" else make_causal(family, tokenizer)
    some = prompts if family == "marian" else make_prompts(LENGTHS)
    policy = adapted(marian(random64) if family == "marian" else make_causal(family, tokenizer))
    one = SamplingPlan.greedy(len(some))

    def sampled(which: Any) -> Tensor:
        return EngineSampler(which, SamplingConfig(max_new_tokens=9), 0).sample(some, one).log_probs

    with reference(policy):
        torch.testing.assert_close(scores(policy, some), scores(start, some), rtol=0, atol=1e-12)
        torch.testing.assert_close(sampled(policy), sampled(start), rtol=0, atol=1e-12)
    assert float((scores(policy, some) - scores(start, some)).abs().max()) > 0.1
    with pytest.raises(ValueError, match="without adapters"), reference(start):
        pass


@pytest.mark.parametrize("family", ["marian", "llama", "gpt2"])
def test_only_adapters_are_trained_and_saved(family, tokenizer, random64, prompts, tmp_path):
    policy = adapted(marian(random64) if family == "marian" else make_causal(family, tokenizer))
    some = prompts if family == "marian" else make_prompts(LENGTHS)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    state = policy.encode(some)
    inputs = random_answers(len(some), 5)
    policy.hidden_states(state, torch.arange(len(some)), inputs).pow(2).sum().backward()
    reached = {name for name, p in policy.model.named_parameters() if p.grad is not None}
    assert reached == trained
    policy.save(tmp_path / "adapters")
    files = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    base = marian(random64) if family == "marian" else make_causal(family, tokenizer)
    again = load_adapter(tmp_path / "adapters", base)
    assert has_adapter(again) and torch.equal(scores(again, some), scores(policy, some))


@pytest.mark.parametrize("family", ["marian", "qwen3", "gpt2"])
def test_merged_folders_are_plain(family, tokenizer, make_policy, prompts, tmp_path):
    start = make_policy(torch.float32) if family == "marian" else make_causal(family, tokenizer, torch.float32)
    some = prompts if family == "marian" else make_prompts(LENGTHS)
    start.save(tmp_path / "base")
    policy = adapted(load_policy(tmp_path / "base"))
    policy.save(tmp_path / "adapters")
    merge_adapter(load_policy(tmp_path / "base"), tmp_path / "adapters", tmp_path / "merged")
    merged = load_policy(tmp_path / "merged")
    assert not has_adapter(merged) and type(merged) is type(policy)
    torch.testing.assert_close(scores(merged, some), scores(policy, some), rtol=0, atol=1e-3)
    assert float((scores(merged, some) - scores(start, some)).abs().max()) > 0.1
    found = load_policy(tmp_path / "adapters")  # which names its base
    assert has_adapter(found) and torch.equal(scores(found, some), scores(policy, some))
    if family != "marian":
        assert (
            AutoModelForCausalLM.from_pretrained(tmp_path / "merged").num_parameters() == start.model.num_parameters()
        )


def test_modules_to_save_are_trained_whole(tokenizer):
    policy = adapted(make_causal("llama", tokenizer), target_modules=("q_proj",), modules_to_save=("lm_head",))
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in trained)
    assert policy.projection().weight.requires_grad
    prompts, answers = make_prompts([4, 1]), random_answers(2, 5)
    before = scores(policy, prompts)
    with torch.no_grad():
        policy.projection().weight.mul_(1.5)
        inputs = causal_inputs(policy, prompts, torch.arange(2), answers)
        ours = policy.projection().logits(policy.hidden_states(policy.encode(prompts), torch.arange(2), inputs))
        theirs = plain_logits(policy.model, prompts, torch.arange(2), answers)
    torch.testing.assert_close(not_suppressed(policy, ours), not_suppressed(policy, theirs), rtol=0, atol=1e-9)
    with reference(policy):
        assert not torch.allclose(scores(policy, prompts), before)


class ByteLinear(nn.Linear):
    """Weights in 8 bits and a scale per row, as quantized layers have them: ``weight`` is not what is multiplied by."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, dtype=layer.weight.dtype, device="meta")
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


@pytest.mark.parametrize("on_top", [False, True])
def test_quantized_layers_run_as_they_are(on_top, tokenizer):
    """Neither stage may read such a weight: both fall back to the layer itself, under adapters, too."""
    policy = make_causal("llama", tokenizer)
    start = copy.deepcopy(policy.model)
    for layer in policy.model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, part in [(n, p) for n, p in block.named_children() if isinstance(p, nn.Linear)]:
                setattr(block, name, ByteLinear(part))
    if on_top:
        policy = adapted(policy)
        policy.model.double()  # PEFT makes float32 of bytes, whose sums depend on the batch with some libraries
    prompts, answers = make_prompts(LENGTHS), random_answers(len(PROMPT_INDEX), 9)
    inputs = causal_inputs(policy, prompts, PROMPT_INDEX, answers)
    frozen = policy.frozen_decoder()
    assert type(frozen) is FrozenCausalDecoder  # Llama's own reads weights
    with torch.no_grad():
        state = policy.encode(prompts)
        two = policy.projection().logits(policy.hidden_states(state, PROMPT_INDEX, inputs))
        decoder = frozen.start(state, PROMPT_INDEX)
        one = torch.stack([frozen.projection.logits(decoder.step(inputs[:, t])) for t in range(9)], 1)
        expected = plain_logits(policy.model, prompts, PROMPT_INDEX, answers)
        unquantized = plain_logits(start, prompts, PROMPT_INDEX, answers)
    for found in (one, two):
        torch.testing.assert_close(not_suppressed(policy, found), not_suppressed(policy, expected), rtol=0, atol=1e-9)
    assert float((expected - unquantized).abs().max()) > 1e-3
    assert StageTwo(policy, GradientConfig()).rescores  # its numbers are not exact


def test_four_bits_are_refused_where_they_cannot_be(tokenizer, tmp_path):
    make_causal("llama", tokenizer, torch.float32).save(tmp_path)
    missing = [] if find_spec("bitsandbytes") else ["bitsandbytes"]
    missing += [] if torch.cuda.is_available() else ["a CUDA device"]
    if not missing:
        assert has_adapter(add_adapter(load_quantized(str(tmp_path)), LoraSettings(rank=2)))
        return
    with pytest.raises(ValueError, match=r"load_in_4bit needs .*" + ".*".join(missing) + ".*set load_in_4bit = false"):
        load_quantized(str(tmp_path))


def test_dropout_reaches_the_adapters(tokenizer):
    policy = adapted(make_causal("llama", tokenizer))
    prompts = make_prompts([4, 1])
    assert torch.equal(scores(policy, prompts), scores(policy, prompts))
    policy.set_dropout(0.2)  # Llama has none of its own
    assert not torch.equal(scores(policy, prompts), scores(policy, prompts))


def test_wrong_adapters_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="lora rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(ValueError, match="lora alpha is 0"):
        LoraSettings(alpha=0)
    with pytest.raises(ValueError, match="modules_to_save"):
        LoraSettings(target_modules=("q_proj", "lm_head"))
    policy = make_causal("llama", tokenizer)
    with pytest.raises(ValueError, match="'nothing_here', and this llama model has no such module"):
        add_adapter(policy, LoraSettings(target_modules=("nothing_here",)))
    with pytest.raises(ValueError, match=r"no adapter_config.json here"):
        load_adapter(tmp_path, policy)
    adapted(make_causal("llama", tokenizer)).save(tmp_path / "adapters")
    (tmp_path / "adapters" / "adapter_model.safetensors").rename(tmp_path / "adapters" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no adapter_model.safetensors here"):
        load_adapter(tmp_path / "adapters", policy)
    twice = adapted(make_causal("llama", tokenizer))
    with pytest.raises(ValueError, match="adapters already"):
        add_adapter(twice, LoraSettings())
    assert isinstance(twice, CausalPolicy)


def test_weights_that_others_share_are_not_trained_apart(tokenizer, make_policy):
    """PEFT would train a copy, which a model with tied embeddings could not be saved with."""
    for policy, name in (
        (make_causal("qwen3", tokenizer), "lm_head"),
        (make_causal("qwen3", tokenizer), "embed_tokens"),
        (make_policy(), "shared"),
        (make_policy(), "lm_head"),
    ):
        with pytest.raises(ValueError, match=rf"modules_to_save names .*{name}, whose weight .* uses, too"):
            add_adapter(policy, LoraSettings(modules_to_save=(name,)))
