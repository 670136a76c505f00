"""From samples to gradients: what is fixed when a batch of samples is new, and each update that learns from it.

A batch gives ``StepConfig.num_updates`` optimizer updates. Before the first of them everything is taken from the policy
that has sampled: its log-probabilities, its values, the reference's, and the advantages. So the ratio of the first
update is exactly 1, and later ones are measured against that policy, not against the update before.

Old log-probabilities are stage one's where a batch has one update and numerics agree. With several updates they are
scored by stage two, like the later ones they are compared with: the ratio then shows the policy's change alone, not the
sampler's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esrl.algorithm.advantages import (
    generalised_advantages,
    group_advantages,
    group_shares,
    token_rewards,
    whitened,
)
from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.clipped import RatioSums, ratio_sums, value_coefficients, value_loss
from esrl.algorithm.duplicates import select_rows
from esrl.algorithm.groups import Groups
from esrl.algorithm.kl import kl_estimates, steered
from esrl.algorithm.objectives import RewardedSamples, coefficients, denominator, objective_loss
from esrl.algorithm.streams import seed_of
from esrl.sampling.engine import check_log_probs
from esrl.training.experience import Experience
from esrl.training.gradient import StageTwo
from esrl.training.method import Method, StepConfig
from esrl.training.planning import Rewards
from esrl.training.processes import Processes
from esrl.training.reference import Reference
from esrl.types import Prompts, Rollouts, SamplingPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """What the conventional step keeps of sampling."""

    log_probs: Tensor  # (R, T)
    states: Tensor | None = None  # (R, T, D), where a critic reads them


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A new batch of samples."""

    epoch: int
    batch: int
    prompts: Prompts
    plan: SamplingPlan
    rollouts: Rollouts
    rewards: Rewards
    graph: Graph | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """An experience, and what follows from it once."""

    experience: Experience
    metrics: dict[str, float]
    kl_coefficient: float  # beta for the next batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Learnt:
    """One update's loss, summed over this process, its denominator, and its figures."""

    loss: float
    denominator: float
    metrics: dict[str, float]


class Learner:
    """Turns samples into gradients of the policy, and of the critic where there is one.

    Args:
        stage_two: scores and goes back; it has the critic.
        reference: needed where there is a coefficient for the divergence from it.
        max_tokens: the longest answer allowed.
        seed: of the run.
    """

    def __init__(  # noqa: PLR0913 - the parts of a method, put together by the task
        self,
        method: Method,
        step: StepConfig,
        stage_two: StageTwo,
        reference: Reference | None,
        max_tokens: int,
        seed: int,
        processes: Processes,
    ) -> None:
        self.objective, self.baseline = method.objective, method.baseline
        self.step = step
        self.stage_two = stage_two
        self.critic: nn.Module | None = stage_two.critic
        self.reference = reference
        self.max_tokens = max_tokens
        self.seed = seed
        self.processes = processes
        self.kl_coefficient = method.objective.kl_coefficient

    def fix(self, sampled: Sampled, queue: RewardQueue) -> Fixed:
        """All that is constant in the batch's updates; ``queue`` already holds its rewards."""
        rollouts, counts = sampled.rollouts, sampled.rewards.counts
        temperature = sampled.plan.temperature[rollouts.prompt_index] if self._scores_at_sampling else None
        log_probs, values = self._old_scores(sampled, temperature)
        reference = None
        if self.reference is not None:
            reference = self.reference(sampled.prompts, rollouts, temperature).cpu()
        mask, groups = rollouts.mask.cpu(), Groups(rollouts.prompt_index, len(sampled.plan.num_samples))
        samples = RewardedSamples(
            mask=mask,
            groups=groups,
            counts=counts,
            rewards=sampled.rewards.signal,
            baseline=torch.zeros_like(sampled.rewards.signal),
            sampling_log_probs=rollouts.sampling_log_probs.cpu(),
            planned=sampled.plan.num_samples,
            shares=group_shares(groups, counts),
            old_log_probs=log_probs,
            reference_log_probs=reference,
            learnt=rollouts.finished.cpu() if self.objective.mask_truncated else None,
            old_values=values,
            max_tokens=self.max_tokens,
            kl_coefficient=self.kl_coefficient,
        )
        if sampled.rewards.normalised is not None:  # z-scores have a mean of 0, and the queue holds rewards as scored
            queue = RewardQueue(1)
        metrics, coefficient = self._divergence(samples)
        experience = Experience(
            epoch=sampled.epoch,
            batch=sampled.batch,
            prompts=sampled.prompts,
            rollouts=replace(rollouts, texts=(), records={}),
            samples=self._with_advantages(samples, queue),
            temperature=temperature,
        )
        return Fixed(experience=experience, metrics=metrics, kl_coefficient=coefficient)

    def update(self, experience: Experience, number: int, *, is_new: bool, graph: Graph | None = None) -> Learnt:
        """Leave the gradient of the batch's update ``number`` in the parameters, whose ``grad`` was empty.

        Args:
            is_new: the policy is still the one that has sampled, so its log-probabilities are known.
            graph: of the conventional step, which has one update.
        """
        rows, num_prompts = self._minibatch(experience, number)
        rollouts, samples = experience.rollouts, experience.samples
        if rows is not None:
            rollouts, samples = select_rows(rollouts, rows.tolist()), samples.select(rows)
        below = denominator(samples, self.objective, num_prompts)
        if graph is not None:
            return self._through_graph(graph, samples, below)
        prompts, seed = experience.prompts, self._stage_two_seed(experience.prompts, experience.epoch)
        temperature = experience.temperature if rows is None else _rows(experience.temperature, rows)
        assert samples.old_log_probs is not None
        log_probs, values = samples.old_log_probs, samples.old_values
        if not is_new:
            log_probs, values = self._scored(prompts, rollouts, temperature, seed)
        loss, gradient = coefficients(log_probs, samples, self.objective)
        of_values = None
        figures = self._figures(log_probs, samples, number)
        if values is not None:
            of_critic, of_values = value_coefficients(values, samples, self.objective)
            figures |= self._critic_figures(values, samples, float(of_critic), below)
            loss = loss + of_critic
        self.stage_two.backward(prompts, rollouts, gradient, temperature, seed, of_values)
        return Learnt(loss=float(loss), denominator=below, metrics=figures)

    @property
    def _scores_at_sampling(self) -> bool:
        return self.objective.score_temperature == "sampling"

    def _stage_two_seed(self, prompts: Prompts, epoch: int) -> int:
        return seed_of("stage two", self.seed, epoch, *prompts.example_ids[:1])

    def _old_scores(self, sampled: Sampled, temperature: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(R, T) log-probabilities and values of the policy that has sampled."""
        rollouts, graph = sampled.rollouts, sampled.graph
        if graph is not None:
            values = None if graph.states is None else self._values_of(graph.states)
            return graph.log_probs.detach().cpu(), None if values is None else values.detach().cpu()
        several = self.step.num_updates > 1 and self.stage_two.config.rescore is None
        if self.stage_two.rescores or several or self.critic is not None:
            seed = self._stage_two_seed(sampled.prompts, sampled.epoch)
            return self._scored(sampled.prompts, rollouts, temperature, seed)
        return (rollouts.sampling_log_probs if self._scores_at_sampling else rollouts.log_probs).cpu(), None

    def _scored(
        self, prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        log_probs, values = self.stage_two.scores(prompts, rollouts, temperature, seed)
        log_probs = log_probs.cpu()
        check_log_probs(log_probs, rollouts.prompt_index, prompts)
        return log_probs, None if values is None else values.cpu()

    def _values_of(self, states: Tensor) -> Tensor:
        """(R, T, D) -> (R, T)."""
        assert self.critic is not None
        values: Tensor = self.critic(states.to(next(self.critic.parameters()).dtype))
        return values[..., 0]

    def _divergence(self, samples: RewardedSamples) -> tuple[dict[str, float], float]:
        """How far the sampling policy is from the reference, per sample and token, and the next beta."""
        if samples.reference_log_probs is None:
            return {}, self.kl_coefficient
        assert samples.old_log_probs is not None
        rows = kl_estimates(samples.old_log_probs, samples.reference_log_probs, samples.mask, "k1").sum(1)
        counts = samples.counts.to(torch.float64)
        tokens = samples.mask.sum(1) * counts
        number, total, num_tokens = self._sum([float(counts.sum()), float((counts * rows).sum()), float(tokens.sum())])
        kl, config = total / max(1.0, number), self.objective
        after = self.kl_coefficient
        if config.kl_target is not None and number:
            after = steered(after, kl, config.kl_target, int(number), config.kl_horizon)
        return {
            "kl_mean": kl,
            "kl_per_token": total / max(1.0, num_tokens),
            "kl_coefficient": self.kl_coefficient,
        }, after

    def _with_advantages(self, samples: RewardedSamples, queue: RewardQueue) -> RewardedSamples:
        """The penalty, the baseline, and whatever the objective weighs samples by."""
        config, groups, counts = self.objective, samples.groups, samples.counts
        penalty = None
        if samples.reference_log_probs is not None and config.place != "loss":
            assert samples.old_log_probs is not None
            divergence = kl_estimates(
                samples.old_log_probs, samples.reference_log_probs, samples.mask, config.estimator
            )
            penalty = self.kl_coefficient * divergence.to(torch.float64)
        if config.kind == "ppo":
            return self._with_critic(samples, penalty)
        rewards, shift = samples.rewards, 0.0
        if penalty is not None:
            taken = penalty.sum(1)
            rewards = rewards - taken
            number, total = self._sum([float(counts.sum()), float((counts * taken).sum())])
            shift = -total / max(1.0, number)
        baseline = baseline_values(self.baseline.kind, rewards, groups, counts, queue, shift)
        samples = replace(samples, rewards=rewards, baseline=baseline)
        if not config.is_clipped:
            return samples
        spread = self._spread(rewards, counts) if config.std_norm == "batch" else 0.0
        advantages = group_advantages(rewards, baseline, groups, counts, config.std_norm, spread)
        return replace(samples, advantages=advantages)

    def _with_critic(self, samples: RewardedSamples, penalty: Tensor | None) -> RewardedSamples:
        """Rewards of tokens, GAE, whitening: (R, T) advantages and returns."""
        assert samples.old_values is not None
        config = self.objective
        if penalty is not None and config.place == "sequence":
            last = token_rewards(-penalty.sum(1), samples.mask, None, None)
            rewards = last + token_rewards(samples.rewards, samples.mask, None, config.critic.reward_clip)
        else:
            rewards = token_rewards(samples.rewards, samples.mask, penalty, config.critic.reward_clip)
        advantages, returns = generalised_advantages(rewards, samples.old_values, samples.mask, config.critic)
        if config.critic.whiten:
            counts = samples.counts if samples.learnt is None else torch.where(samples.learnt, samples.counts, 0)
            advantages = whitened(advantages, samples.mask, counts, self._sum)
        return replace(samples, advantages=advantages, returns=returns)

    def _spread(self, rewards: Tensor, counts: Tensor) -> float:
        """The standard deviation of all rewards of the step, copies included; 0 below two."""
        everyone = torch.tensor(self.processes.gather(rewards.repeat_interleave(counts).tolist()), dtype=torch.float64)
        return float(everyone.std()) if len(everyone) > 1 else 0.0

    def _minibatch(self, experience: Experience, number: int) -> tuple[Tensor | None, float]:
        """The rows of an update, None for all, and what they count in prompts; another split in every pass."""
        prompts, owner = len(experience.prompts), experience.rollouts.prompt_index
        parts = self.step.minibatches
        if parts == 1:
            return None, float(prompts)
        turn, part = divmod(number, parts)
        key = seed_of("minibatches", self.seed, experience.epoch, experience.batch, turn, self.processes.rank)
        generator = torch.Generator().manual_seed(key)
        size = prompts if self.step.minibatch_of == "prompts" else len(owner)
        order = torch.randperm(size, generator=generator)
        chosen = order[part * size // parts : (part + 1) * size // parts]
        if self.step.minibatch_of == "prompts":
            return torch.isin(owner, chosen).nonzero()[:, 0], float(len(chosen))
        rows = chosen.sort().values
        assert experience.samples.shares is not None
        return rows, float(experience.samples.shares[rows].sum())

    def _through_graph(self, graph: Graph, samples: RewardedSamples, below: float) -> Learnt:
        """The conventional way back, through the graph of sampling."""
        total = objective_loss(graph.log_probs.cpu(), samples, self.objective)  # where the samples are
        figures = self._figures(graph.log_probs.detach().cpu(), samples, 0)
        if graph.states is not None:
            values = self._values_of(graph.states).cpu()
            of_critic = value_loss(values, samples, self.objective)
            figures |= self._critic_figures(values.detach(), samples, float(of_critic.detach()), below)
            total = total + of_critic
        if total.requires_grad:
            total.backward()
        return Learnt(loss=float(total.detach()), denominator=below, metrics=figures)

    def _figures(self, log_probs: Tensor, samples: RewardedSamples, number: int) -> dict[str, float]:
        found: dict[str, float] = {"update": number} if self.step.num_updates > 1 else {}
        if self.objective.is_clipped:
            own = ratio_sums(log_probs, samples, self.objective)
            parts = [own.number, own.ratio, own.below, own.above, own.divergence]
            found |= RatioSums(*self._sum(parts)).figures()
        return found

    def _critic_figures(self, values: Tensor, samples: RewardedSamples, loss: float, below: float) -> dict[str, float]:
        """The value loss, and the share of the variance of returns that the values explain."""
        assert samples.returns is not None
        weights = samples.mask * samples.counts.to(torch.float64)[:, None]
        errors = samples.returns - values.to(torch.float64)
        parts = [weights, weights * samples.returns, weights * samples.returns.square(), weights * errors]
        sums = self._sum([loss, below, *(float(part.sum()) for part in (*parts, weights * errors.square()))])
        total, divisor, number, first, second, error, squared = sums
        number = max(1.0, number)
        spread, rest = second / number - (first / number) ** 2, squared / number - (error / number) ** 2
        return {
            "value_loss": total / max(divisor, 1e-12),
            "explained_variance": 1 - rest / spread if spread > 1e-12 else 0.0,
        }

    def _sum(self, values: Sequence[float]) -> list[float]:
        """Sums over processes, place by place."""
        parts: list[Any] = self.processes.gather([list(values)])
        return [float(sum(column)) for column in zip(*parts, strict=True)]


def _rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
