"""The contestants of whole optimizer steps: sample, reward, gradient, clipping, AdamW; the same work for all.

``esrl`` is the package's own two stages, with the same k for all prompts like the others; ``esrl-dynamic`` lets eq. 8
choose it. The ``conventional`` ones keep the graph through sampling (the paper's Figure 1, with the restructured batch
of Kiegeland and Kreutzer 2021 that the paper's baselines use). ``naive`` is what two stages look like without this
package: Hugging Face's ``generate``, then one padded forward with all logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.groups import Groups
from esrl.algorithm.objective_config import ObjectiveConfig, ObjectiveKind, RewardedSamples
from esrl.algorithm.objectives import coefficients, objective_loss
from esrl.benchmark.contestants import Generate, Job, load_model, wait
from esrl.benchmark.workloads import as_prompts
from esrl.kernels import operations as kernel_operations
from esrl.models.seq2seq import MarianPolicy
from esrl.rewards.text import BLEU
from esrl.sampling.engine import EngineSampler, SamplingConfig, decode_texts
from esrl.sampling.graph import sample_with_graph
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.optimization import Optimizer, OptimizerConfig
from esrl.types import Prompts, Rollouts, SamplingPlan

# the optimizer does all its work, but the model stays what it is: every step has the same law of lengths
RATE = 1e-12
_GOLDEN = 0.6180339887498949  # its multiples are spread evenly over [0, 1)

Sampled = tuple[Rollouts, Callable[[RewardedSamples], None]]


class StepContestant:
    """An optimizer step around one way of sampling and of getting the gradient.

    ``stages`` holds the seconds of the last run by stage, ``operations`` its counted operations once a counter is set.

    Args:
        way: draws, and says how to add the gradient of the rewarded samples to the parameters.
        kind: of the objective; MRT alone has no gradient at k = 1, for which ours would do nothing.
        spend: k for so many prompts, from the job's; (P,).
    """

    def __init__(
        self,
        job: Job,
        way: Callable[[StepContestant, Prompts, SamplingPlan, int], Sampled],
        kind: ObjectiveKind = "fused",
        spend: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        self.job = job
        self.way = way
        self.spend = spend or _evenly
        self.policy = load_model(job)
        self.objective = ObjectiveConfig(kind=kind)
        self.optimizer = Optimizer(self.policy.model, OptimizerConfig(learning_rate=RATE))
        self.sampler = EngineSampler(self.policy, SamplingConfig(max_new_tokens=job.max_new_tokens), seed=1)
        self.reward = BLEU()
        self.stages: dict[str, float] = {}
        self.operations: dict[str, int] = {}
        self.counter: FlopCounterMode | None = None
        make_room(self.optimizer.parameters)

    def run(self, seed: int, num_prompts: int | None = None) -> Callable[[], list[int]]:
        """One step; returns how to learn the samples' lengths."""
        prompts = as_prompts(self.job.source[:num_prompts])
        plan = SamplingPlan(
            num_samples=self.spend(len(prompts), self.job.samples),
            temperature=torch.ones(len(prompts), dtype=torch.float64),
        )
        with self._clock("sample"):
            rollouts, accumulate = self.way(self, prompts, plan, seed)
        with self._clock("reward"):
            rewarded = self._rewarded(prompts, plan, rollouts)
        with self._clock("score"):
            accumulate(rewarded)
        with self._clock("update"):
            self.optimizer.scale_and_clip(len(prompts))
            self.optimizer.step(RATE)
            for parameter in self.optimizer.parameters:
                assert parameter.grad is not None
                parameter.grad.zero_()
        return rollouts.lengths.tolist

    def _rewarded(self, prompts: Prompts, plan: SamplingPlan, rollouts: Rollouts) -> RewardedSamples:
        references = [" ".join(f"w{token}" for token in row[:-1]) for row in prompts.input_ids.tolist()]
        owners = rollouts.prompt_index.tolist()
        # The time of scoring counts. But samples of a random model score 0, and rows without an advantage would cost
        # ours nothing: numbers in [0, 1) take the scores' place, so that every row has its part in the gradient.
        self.reward(list(rollouts.texts), [references[i] for i in owners])
        spread = torch.arange(rollouts.num_rows, dtype=torch.float64) * _GOLDEN % 1
        return RewardedSamples(
            mask=rollouts.mask.cpu(),
            groups=Groups(rollouts.prompt_index, len(prompts)),
            counts=torch.ones(rollouts.num_rows, dtype=torch.int64),
            rewards=spread,
            baseline=torch.zeros(rollouts.num_rows, dtype=torch.float64),
            sampling_log_probs=rollouts.sampling_log_probs.cpu(),
            planned=plan.num_samples,
        )

    def backward(self, log_probs: Tensor, rewarded: RewardedSamples) -> None:
        objective_loss(log_probs.cpu(), rewarded, self.objective).backward()

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        start, before = time.perf_counter(), self._counted()
        yield
        wait()
        self.stages[stage] = time.perf_counter() - start
        if self.counter is not None:
            self.operations[stage] = self._counted() - before

    def _counted(self) -> int:
        return 0 if self.counter is None else self.counter.get_total_flops() + kernel_operations()


def make_room(parameters: Iterable[torch.nn.Parameter]) -> None:
    """The gradients' room belongs to the model: what a step needs on top of it is measured."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def _evenly(num_prompts: int, samples: int) -> Tensor:
    return torch.full((num_prompts,), samples)


def _dynamically(num_prompts: int, samples: int) -> Tensor:
    """k from eq. 8 for capabilities spread evenly over [0, 1)."""
    capability = torch.arange(num_prompts, dtype=torch.float64) / num_prompts
    return allocate(capability, AllocationConfig(max_samples=samples)).num_samples


def _two_stages(step: StepContestant, prompts: Prompts, plan: SamplingPlan, seed: int) -> Sampled:
    """Ours."""
    rollouts = step.sampler.sample(prompts, plan, epoch=seed)
    stage_two = StageTwo(step.policy, GradientConfig())

    def accumulate(rewarded: RewardedSamples) -> None:
        _, gradient = coefficients(rollouts.log_probs.cpu(), rewarded, step.objective)
        stage_two.backward(prompts, rollouts, gradient, None, seed)

    return rollouts, accumulate


def _graph_kept(step: StepContestant, prompts: Prompts, plan: SamplingPlan, seed: int) -> Sampled:
    """The conventional way."""
    rollouts, log_probs = sample_with_graph(step.policy, prompts, plan, step.sampler, seed)
    return rollouts, lambda rewarded: step.backward(log_probs, rewarded)


def _naively(step: StepContestant, prompts: Prompts, plan: SamplingPlan, seed: int) -> Sampled:
    """``generate``, then one padded forward over all samples."""
    policy = step.policy
    assert isinstance(policy, MarianPolicy), "it runs the encoder itself"
    tokens = Generate.tokens(policy, prompts, step.job, seed)
    mask = tokens != policy.pad_token  # what stands behind EOS is PAD, which is never sampled
    owner = torch.repeat_interleave(torch.arange(len(prompts)), plan.num_samples)
    rollouts = Rollouts(
        prompt_index=owner,
        sample_index=torch.cat([torch.arange(k) for k in plan.num_samples.tolist()]),
        tokens=tokens,
        mask=mask,
        finished=torch.isin(tokens, torch.tensor(policy.eos_tokens, device=tokens.device)).any(1),
        log_probs=torch.zeros(tokens.shape, device=tokens.device),
        sampling_log_probs=torch.zeros(tokens.shape, device=tokens.device),
        texts=decode_texts(policy, tokens.cpu(), mask.cpu()),
    )
    return rollouts, lambda rewarded: step.backward(score_padded(policy, prompts, rollouts), rewarded)


def score_padded(policy: MarianPolicy, prompts: Prompts, rollouts: Rollouts) -> Tensor:
    """(R, T) log-probabilities with their graph; the encoder runs once for each prompt."""
    device, owner = policy.device, rollouts.prompt_index.to(policy.device)
    mask = prompts.mask.to(device)
    encoded = policy.model.get_encoder()(input_ids=prompts.input_ids.to(device), attention_mask=mask)
    start = policy.start_tokens(prompts).to(device)[owner, None]
    output: Any = policy.model(
        encoder_outputs=(encoded.last_hidden_state[owner],),
        attention_mask=mask[owner],
        decoder_input_ids=torch.cat([start, rollouts.tokens[:, :-1]], 1),
    )
    log_probs = torch.log_softmax(output.logits, 2).gather(2, rollouts.tokens[:, :, None])[:, :, 0]
    return torch.where(rollouts.mask, log_probs, 0.0)


STEPS: dict[str, Callable[[Job], StepContestant]] = {
    "esrl": partial(StepContestant, way=_two_stages),
    "esrl-dynamic": partial(StepContestant, way=_two_stages, spend=_dynamically),
    "conventional-mrt": partial(StepContestant, way=_graph_kept, kind="mrt"),
    "conventional-reinforce": partial(StepContestant, way=_graph_kept, kind="reinforce"),
    "naive": partial(StepContestant, way=_naively),
}
