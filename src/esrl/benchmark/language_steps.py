"""The contestants on a language model: a step of GRPO from sampling to the update, ours and TRL's."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esrl.algorithm.advantages import group_advantages, group_shares
from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients
from esrl.benchmark.contestants import Contestant, Job, load_model, wait
from esrl.benchmark.steps import RATE, make_room
from esrl.benchmark.workloads import as_prompts
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.optimization import Optimizer, OptimizerConfig
from esrl.types import SamplingPlan

_CLASSES = 11


def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """Any number that differs from sample to sample; it costs nothing, so that the step is what is timed."""
    return [sum(row) % _CLASSES / _CLASSES for row in completion_ids]


class OurGRPO:
    """Both stages, GRPO's loss, AdamW."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.policy = load_model(job)
        self.objective = ObjectiveConfig(kind="grpo")
        self.optimizer = Optimizer(self.policy.model, OptimizerConfig(learning_rate=RATE))
        self.sampler = EngineSampler(self.policy, SamplingConfig(max_new_tokens=job.max_new_tokens), seed=1)
        make_room(self.optimizer.parameters)

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        """One step; returns how to learn the samples' lengths."""
        prompts = as_prompts(self.job.source[:num_prompts])
        plan = SamplingPlan(
            num_samples=torch.full((len(prompts),), self.job.samples),
            temperature=torch.ones(len(prompts), dtype=torch.float64),
        )
        rollouts = self.sampler.sample(prompts, plan, epoch=seed)
        lengths: list[int] = rollouts.lengths.tolist()
        rows = [row[:length] for row, length in zip(rollouts.tokens.tolist(), lengths, strict=True)]
        rewards = torch.tensor(reward(rows), dtype=torch.float64)
        groups, counts = Groups(rollouts.prompt_index, len(prompts)), torch.ones(len(rows), dtype=torch.int64)
        baseline = baseline_values("prompt_mean", rewards, groups, counts, RewardQueue(1))
        log_probs = rollouts.log_probs.cpu()
        samples = RewardedSamples(
            mask=rollouts.mask.cpu(),
            groups=groups,
            counts=counts,
            rewards=rewards,
            baseline=baseline,
            sampling_log_probs=rollouts.sampling_log_probs.cpu(),
            planned=plan.num_samples,
            shares=group_shares(groups, counts),
            advantages=group_advantages(rewards, baseline, groups, counts, "group"),
            old_log_probs=log_probs,
            max_tokens=self.job.max_new_tokens,
        )
        _, gradient = coefficients(log_probs, samples, self.objective)
        StageTwo(self.policy, GradientConfig()).backward(prompts, rollouts, gradient, None, seed)
        self.optimizer.scale_and_clip(len(prompts))
        self.optimizer.step(RATE)
        wait()
        return lambda: lengths


class TRLGRPO:
    """TRL's trainer, step by step: what its ``train`` does for a batch, without logging and saving.

    Args:
        checkpointing: compute activations twice instead of keeping them; TRL's default, slower and smaller.

    Raises:
        ImportError: trl is not installed.
    """

    def __init__(self, job: Job, checkpointing: bool) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        self.job = job
        policy = load_model(job)
        self.texts = policy.tokenizer.batch_decode(job.source)
        with tempfile.TemporaryDirectory() as scratch:
            self.trainer = GRPOTrainer(
                model=policy.model,
                reward_funcs=reward,
                processing_class=policy.tokenizer,
                train_dataset=Dataset.from_list([{"prompt": text} for text in self.texts]),
                args=GRPOConfig(
                    output_dir=str(Path(scratch) / "trl"),
                    per_device_train_batch_size=len(job.source) * job.samples,
                    num_generations=job.samples,
                    max_completion_length=job.max_new_tokens,
                    gradient_checkpointing=checkpointing,
                    learning_rate=RATE,
                    loss_type="grpo",
                    beta=0.0,
                    temperature=1.0,
                    use_cpu=not torch.cuda.is_available(),
                    bf16=False,
                    report_to=[],
                ),
            )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.parameters = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        make_room(self.parameters)

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        """One step; returns how to learn the samples' lengths."""
        torch.manual_seed(seed)
        trainer, model = self.trainer, self.trainer.model
        inputs = [{"prompt": text} for text in self.texts[:num_prompts] for _ in range(self.job.samples)]
        trainer.training_step(model, inputs, None)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        trainer.optimizer.step()
        model.zero_grad(set_to_none=False)
        wait()
        made = trainer._buffered_inputs
        assert made is not None
        counts: Callable[[], list[int]] = made[0]["completion_mask"].sum(1).tolist
        return counts


LANGUAGE_STEPS: dict[str, Callable[[Job], Contestant]] = {
    "esrl": OurGRPO,
    "trl": partial(TRLGRPO, checkpointing=False),
    "trl-checkpointing": partial(TRLGRPO, checkpointing=True),
}
