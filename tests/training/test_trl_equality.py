"""Our GRPO and RLOO against TRL's own trainers: on the samples, rewards and masks that they made, advantages, losses
and gradients are equal. The models are random and small; k is equal for all prompts, which TRL needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from esrl.algorithm.advantages import group_advantages
from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.groups import Groups
from esrl.algorithm.kl import kl_estimates
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, denominator, objective_loss
from esrl.data.batching import pad
from esrl.models.causal import CausalPolicy
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

K, PROMPTS, MAX_TOKENS = 4, 3, 6
WORDS = [f"w{i}" for i in range(40)]
SIZES: dict[str, Any] = {
    "vocab_size": 43,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}


def make_model(family: str, folder: Path) -> Any:
    """From a saved folder, so that TRL can load its reference model from there."""
    torch.manual_seed(5)
    model: Any
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 8
        model.lm_head.weight[1] *= 2  # answers of different lengths, some of them cut
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def make_tokenizer() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [(sum(row) % 11) / 11 for row in completion_ids]


def make_trainer(method: str, family: str, folder: Path, **settings: Any) -> Any:
    trainer_class, config_class = {
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[method]
    rows = [{"prompt": prompt} for prompt in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9")]
    arguments = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=K * PROMPTS,
        num_generations=K,
        max_completion_length=MAX_TOKENS,
        use_cpu=True,
        report_to=[],
        bf16=False,
        seed=1,
        **settings,
    )
    return trainer_class(
        model=make_model(family, folder / family),
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )


class Rolled:
    """What the trainer sampled and rewarded, and our view of it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        prompts = [prompt for prompt in ("w1 w2 w3", "w4", "w5 w6 w7 w8 w9") for _ in range(K)]
        trainer.model.train()
        torch.manual_seed(11)
        self.inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
        if "num_items_in_batch" in self.inputs:
            self.inputs["num_items_in_batch"] = torch.as_tensor(self.inputs["num_items_in_batch"])
        self.tokens = self.inputs["completion_ids"]
        self.mask = self.inputs["completion_mask"].bool()  # all False where a truncated one is masked
        self.groups = Groups(torch.arange(PROMPTS).repeat_interleave(K), PROMPTS)
        self.counts = torch.ones(K * PROMPTS, dtype=torch.int64)

    def prompts(self) -> Prompts:
        """Each once, padded behind."""
        pairs = zip(self.inputs["prompt_ids"][::K], self.inputs["prompt_mask"][::K].bool(), strict=True)
        tokens, mask = pad([row[real].tolist() for row, real in pairs], 0)
        return Prompts(example_ids=tuple(map(str, range(PROMPTS))), input_ids=tokens, mask=mask)

    def rollouts(self, mask: Tensor) -> Rollouts:
        """The samples; ``mask`` has the truncated ones, too."""
        zeros = torch.zeros(mask.shape)
        return Rollouts(
            prompt_index=self.groups.index,
            sample_index=torch.arange(K).repeat(PROMPTS),
            tokens=self.tokens,
            mask=mask,
            finished=(self.tokens == 1).any(1),
            log_probs=zeros,
            sampling_log_probs=zeros,
        )

    def logits(self) -> Tensor:
        """Of the policy, by a plain forward."""
        ids = torch.cat([self.inputs["prompt_ids"], self.tokens], 1)
        attention = torch.cat([self.inputs["prompt_mask"], self.inputs["completion_mask"]], 1)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        positions = (attention.cumsum(1) - 1).clamp_min(0)
        output = model.model(input_ids=ids, attention_mask=attention, position_ids=positions).last_hidden_state
        logits: Tensor = model.lm_head(output[:, -self.tokens.shape[1] - 1 : -1])
        return logits

    def log_probs(self) -> Tensor:
        return torch.log_softmax(self.logits(), -1).gather(2, self.tokens[..., None])[..., 0]


def gradient_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(trainer: Any, rolled: Rolled, samples: RewardedSamples, config: ObjectiveConfig) -> None:
    """TRL's loss and gradient by its own ``_compute_loss``; ours by ``objective_loss`` over a plain forward, and by
    stage two in micro-batches."""
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(trainer.model, rolled.inputs)
    their_gradient = gradient_of(trainer.model, theirs)
    ours = objective_loss(rolled.log_probs(), samples, config) / denominator(samples, config, float(PROMPTS))
    our_gradient = gradient_of(trainer.model, ours)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert their_gradient.keys() == our_gradient.keys()
    assert max(float(value.abs().max()) for value in their_gradient.values()) > 1e-3
    for name, value in their_gradient.items():
        torch.testing.assert_close(our_gradient[name], value, rtol=1e-5, atol=1e-5, msg=name)
    loss, gradient = by_stage_two(rolled, samples, config)
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert gradient.keys() == their_gradient.keys()
    for name, value in their_gradient.items():
        assert float((gradient[name] - value).norm()) <= 1e-5 * float(value.norm()), name


def by_stage_two(rolled: Rolled, samples: RewardedSamples, config: ObjectiveConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient as a step of ours computes them, prompts shared by their samples."""
    model, tokenizer = rolled.trainer.accelerator.unwrap_model(rolled.trainer.model), make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # our policies never say a PAD of its own, TRL's do
    policy = CausalPolicy(model, tokenizer)
    stage_two = StageTwo(policy, GradientConfig(micro_batch_tokens=2 * MAX_TOKENS, max_prompt_tokens=10))
    prompts, rollouts = rolled.prompts(), rolled.rollouts(samples.mask)
    log_probs = stage_two.log_probs(prompts, rollouts, None, 0)
    loss, derivative = coefficients(log_probs, samples, config)
    below = denominator(samples, config, float(PROMPTS))
    model.zero_grad()
    stage_two.backward(prompts, rollouts, derivative / below, None, 0)
    return float(loss) / below, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def make_samples(rolled: Rolled, method: str, config: ObjectiveConfig, **more: Any) -> RewardedSamples:
    rewards = more.pop("rewards")
    queue = RewardQueue(10)
    baseline = baseline_values(
        "prompt_mean" if method == "grpo" else "leave_one_out", rewards, rolled.groups, rolled.counts, queue
    )
    spread = float(rewards.std())
    advantages = group_advantages(rewards, baseline, rolled.groups, rolled.counts, config.std_norm, spread)
    torch.testing.assert_close(advantages.float(), rolled.inputs["advantages"], rtol=1e-5, atol=1e-5)
    assert float(advantages.abs().max()) > 0.1
    return RewardedSamples(
        mask=rolled.mask,
        groups=rolled.groups,
        counts=rolled.counts,
        rewards=rewards,
        baseline=baseline,
        sampling_log_probs=torch.zeros_like(rolled.mask, dtype=torch.float32),
        planned=torch.full((PROMPTS,), K),
        advantages=advantages,
        max_tokens=MAX_TOKENS,
        kl_coefficient=config.kl_coefficient,
        **more,
    )


def rewards_of(rolled: Rolled, mask: Tensor) -> Tensor:
    rows = [row[real].tolist() for row, real in zip(rolled.tokens, mask, strict=True)]
    return torch.tensor(reward(rows), dtype=torch.float64)


def far(log_probs: Tensor, seed: int) -> Tensor:
    """Log-probabilities of another policy: far enough for some ratios to be clipped."""
    noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed))
    return log_probs.detach() + 0.3 * noise


GRPO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_type": "grpo"}, {"normalise": "sequence"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"normalise": "token", "clip_high": 0.28}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        {"normalise": "constant", "std_normalise": "none"},
    ),
    "batch": ({"loss_type": "grpo", "scale_rewards": "batch"}, {"normalise": "sequence", "std_normalise": "batch"}),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"normalise": "sequence", "kl_coefficient": 0.3}),
    "kl as it is": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"normalise": "sequence", "kl_coefficient": 0.3, "kl_correction": False},
    ),
    "dapo-kl": ({"loss_type": "dapo", "beta": 0.3}, {"normalise": "token", "kl_coefficient": 0.3}),
    "truncated": (
        {"loss_type": "grpo", "mask_truncated_completions": True},
        {"normalise": "sequence", "mask_truncated": True},
    ),
    "truncated-dapo": (
        {"loss_type": "dapo", "mask_truncated_completions": True},
        {"normalise": "token", "mask_truncated": True},
    ),
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", GRPO)
def test_grpo(name: str, family: str, tmp_path: Path) -> None:
    theirs, own = GRPO[name]
    config = ObjectiveConfig(kind="grpo", **own)
    trainer = make_trainer("grpo", family, tmp_path, **{"beta": 0.0, **theirs})
    rolled = Rolled(trainer)
    # up to and including the first EOS, whatever is masked afterwards
    is_end = rolled.tokens == 1
    whole = (is_end.cumsum(1) - is_end.int()) == 0
    whole &= torch.arange(whole.shape[1]) < MAX_TOKENS
    learnt = is_end.any(1) if config.mask_truncated else None
    assert bool(is_end.any(1).any()) and not bool(is_end.any(1).all())
    assert torch.equal(rolled.mask, whole if learnt is None else whole & learnt[:, None])
    old = far(rolled.log_probs(), 2)
    rolled.inputs["old_per_token_logps"] = old
    more: dict[str, Any] = {"old_log_probs": old, "learnt": learnt, "rewards": rewards_of(rolled, whole)}
    if config.kl_coefficient:
        rolled.inputs["ref_per_token_logps"] = more["reference_log_probs"] = far(rolled.log_probs(), 3)
    samples = make_samples(rolled, "grpo", config, **more)
    if learnt is not None:  # our mask stays; the rows are marked
        samples = RewardedSamples(**{**{n: getattr(samples, n) for n in samples.__slots__}, "mask": whole})
    compare(trainer, rolled, samples, config)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo(beta: float, family: str, tmp_path: Path) -> None:
    config = ObjectiveConfig(kind="rloo", kl_coefficient=beta)
    trainer = make_trainer("rloo", family, tmp_path, beta=beta)
    if beta:  # a reference that differs
        with torch.no_grad():
            for parameter in trainer.ref_model.parameters():
                parameter *= 1.1
    rolled = Rolled(trainer)
    rewards = rewards_of(rolled, rolled.mask)
    if beta:
        reference = Rolled.__new__(Rolled)
        reference.__dict__ |= rolled.__dict__
        policy, trainer.model = trainer.model, trainer.ref_model
        with torch.no_grad():
            reference_log_probs = reference.log_probs()
        trainer.model = policy
        k1 = kl_estimates(rolled.log_probs().detach(), reference_log_probs, rolled.mask, config.estimator)
        assert config.place == "sequence" and float(k1.abs().max()) > 0.01
        rewards = rewards - beta * k1.sum(1).double()
    old = far(rolled.log_probs(), 2) * rolled.mask
    rolled.inputs["old_logps"] = (old * rolled.mask).sum(1)
    compare(trainer, rolled, make_samples(rolled, "rloo", config, rewards=rewards, old_log_probs=old), config)
