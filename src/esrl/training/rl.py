"""Reinforcement learning: the paper's step (Figure 2), composed of parts that know nothing of each other."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.baselines import BaselineConfig, RewardQueue, baseline_values
from esrl.algorithm.capability import (
    CapabilityConfig,
    CapabilityMemory,
    CapabilityRecord,
    contrast,
    entropy_capability,
    map_capability,
    metric_capability,
)
from esrl.algorithm.duplicates import DuplicateRule, handle_duplicates
from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, mrt_prompts, objective_loss
from esrl.algorithm.streams import plan_uniforms, seed_of
from esrl.data.batching import make_prompts, shuffled_batches
from esrl.data.examples import Example
from esrl.errors import NumericsError, RewardError
from esrl.evaluation.development import Development
from esrl.models.seq2seq import MarianPolicy
from esrl.rewards.calling import RewardFunction
from esrl.sampling.engine import EngineSampler, SamplingConfig, check_log_probs
from esrl.sampling.graph import sample_with_graph
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.loop import Update, export_folder
from esrl.training.processes import Processes
from esrl.types import Prompts, Rollouts, SamplingPlan

MAX_REWARD = 1e30
"""Larger rewards overflow float32 as soon as they are multiplied."""

# what the loop adds to a line of metrics.jsonl
_LOOP_METRICS = {"step", "epoch", "kind", "loss", "grad_norm", "learning_rate", "seconds_total", "peak_memory_mb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepConfig:
    """One step of reinforcement learning, but for what the parts say of themselves."""

    batch_size: int = 64
    """n: prompts in a step, over all processes."""
    duplicates: DuplicateRule = "merge"
    """Identical samples of a prompt: `merge` (scored once, counted), `keep` or `drop`."""
    max_source_tokens: int = 256
    """Longer sources are left out, counted and reported."""
    logged_prompts: int = 20
    """samples.jsonl follows this many prompts through all epochs."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if self.duplicates not in ("merge", "keep", "drop"):
            raise ValueError(f"duplicates is {self.duplicates!r}; choose merge, keep or drop.")
        if self.max_source_tokens < 1 or self.logged_prompts < 0:
            raise ValueError("max_source_tokens must be 1 or more and logged_prompts 0 or more.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method is a plan, an objective and a baseline put together (principle 4)."""

    allocation: AllocationConfig
    capability: CapabilityConfig
    objective: ObjectiveConfig
    baseline: BaselineConfig

    def resolved(self) -> Method:
        """ESRL-Random is an allocator: there is no capability to estimate."""
        if self.capability.estimator != "random":
            return self
        return replace(self, allocation=replace(self.allocation, allocator="random"))


@dataclass(frozen=True, slots=True)
class _Planned:
    """The plan of a step and what it was made from."""

    plan: SamplingPlan
    capability: Tensor  # (P,) as eq. 8 saw it; NaN where the allocator needs none
    first: dict[int, CapabilityRecord]  # greedy first estimates, by prompt
    first_tokens: int
    from_memory: int


@dataclass(frozen=True, slots=True)
class _Rewards:
    """Rewards of the kept rows; an abstained row counts 0."""

    values: Tensor  # (R,) float64, 0 where abstained
    counts: Tensor  # (R,) int64
    metrics: dict[str, float]


class RLTask:
    """The RL step for ``training.loop``.

    Args:
        examples: training prompts; the reward's columns with them.
        development: scored by the loop every so often.
        seed: of the run; every draw is a function of (seed, epoch, example id, sample).
    """

    def __init__(  # noqa: PLR0913 - the composition root hands over every part
        self,
        policy: MarianPolicy,
        examples: Sequence[Example],
        method: Method,
        step: StepConfig,
        sampling: SamplingConfig,
        gradient: GradientConfig,
        reward: RewardFunction,
        development: Development,
        seed: int,
    ) -> None:
        self.policy = policy
        self.model = policy.model
        self.examples = examples
        self.method = method.resolved()
        self.config = step
        self.reward = reward
        self.development = development
        self.seed = seed
        self.processes = Processes()
        self.sampler = EngineSampler(policy, sampling, seed)
        if gradient.kind == "graph" and method.capability.records:
            raise ValueError(
                f'gradient kind "graph" does not record what entropy_form {method.capability.entropy_form!r} needs; '
                'use kind "two_stage", or entropy_form "paper" or "sampled_logp".'
            )
        policy.set_dropout(gradient.dropout)
        self.stage_two = StageTwo(policy, gradient)
        if gradient.kind == "graph" and method.capability.records:
            raise ValueError(
                f'capability.entropy_form = "{method.capability.entropy_form}" needs what only our sampler records; '
                'take gradient.kind = "two_stage" with it, or entropy_form = "paper".'
            )
        self.memory = CapabilityMemory()
        self.queue = RewardQueue(method.baseline.queue_size)
        self.logged = set(sorted(example.id for example in examples)[: step.logged_prompts])
        self._seconds: dict[str, float] = defaultdict(float)
        self._reward_state = reward.state_dict()

    def num_batches(self, epoch: int) -> int:
        return math.ceil(len(self.examples) / self.config.batch_size)

    def compute(self, epoch: int, batch: int) -> Update:
        """One step of the paper, without side effects on memory, queue or parameters."""
        self._seconds = defaultdict(float)
        self.reward.load_state_dict(self._reward_state)  # an interrupted step may have counted already
        prompts = self.prompts(epoch, batch)
        planned = self._plan(prompts, epoch)  # eq. 8, eq. 9
        rollouts, graph = self._sample(prompts, planned.plan, epoch)  # stage one
        rollouts, counts = handle_duplicates(rollouts, self.config.duplicates if graph is None else "keep")
        rewards = self._rewards(prompts, rollouts, counts, epoch)
        queue = self.queue.copy()
        queue.push(self.processes.gather(rewards.values.repeat_interleave(rewards.counts).tolist()))
        samples = self._rewarded(rollouts, rewards, planned.plan, queue)
        records = self._records(rollouts, rewards, samples.groups, epoch)  # eq. 6, eq. 7
        loss = self._accumulate(prompts, rollouts, samples, planned.plan, graph, epoch)  # eq. 3, 4, 5; stage two
        reward_state = self.reward.state_dict()

        def commit() -> list[dict[str, Any]]:
            self.queue = queue
            self._reward_state = reward_state
            ids = self.processes.gather(list(prompts.example_ids))
            best = [record or planned.first.get(i) for i, record in enumerate(records)]
            self.memory.write(ids, self.processes.gather(best))
            return self.processes.gather(self._lines(prompts, rollouts, rewards, planned, epoch))

        metrics = self._metrics(rollouts, rewards, planned, records)
        return Update(loss, float(len(prompts)), metrics, commit)

    def prompts(self, epoch: int, batch: int) -> Prompts:
        """This process's share of a step's prompts."""
        indices = shuffled_batches(len(self.examples), self.config.batch_size, self.seed, epoch)[batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        limit = min(self.config.max_source_tokens, self.policy.max_length)
        return make_prompts([self.examples[i] for i in mine], self.policy.tokenizer, limit)

    def evaluate(self) -> dict[str, float]:
        return self.development.evaluate(self.policy)

    def export(self) -> dict[str, bytes]:
        return export_folder(self.policy.save)

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory.state_dict(),
            "queue": self.queue.state_dict(),
            "reward": self._reward_state,
            "micro_batch_tokens": self.stage_two.config.micro_batch_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.queue.load_state_dict(state["queue"])
        self._reward_state = state["reward"]
        self.stage_two.shrink(state["micro_batch_tokens"])

    def _plan(self, prompts: Prompts, epoch: int) -> _Planned:
        """Look up Cap_x, estimate it greedily where it is not known, and allocate over the whole step."""
        allocation, config = self.method.allocation, self.method.capability
        ids = list(prompts.example_ids)
        first: dict[int, CapabilityRecord] = {}
        tokens, scores = 0, torch.full((len(ids),), math.nan, dtype=torch.float64)
        from_memory = len(ids) - len(self.memory.missing(ids))
        if allocation.needs_capability:
            scores, first, tokens = self._scores(prompts, epoch)
        wide = self.processes if config.scope == "step" else None
        everyone = scores if wide is None else torch.tensor(wide.gather(scores.tolist()), dtype=torch.float64)
        all_ids = ids if wide is None else wide.gather(ids)
        if allocation.needs_capability:
            mapped = map_capability(everyone, config.capability_map, self.queue.mean(), self.queue.std())
            everyone = contrast(mapped, config.contrast)
        plan = allocate(
            torch.nan_to_num(everyone) if not allocation.needs_capability else everyone,
            allocation,
            uniforms=plan_uniforms(self.seed, epoch, all_ids),
            reward_std=self.memory.reward_std(all_ids),
        )
        if wide is not None and wide.active:
            start = sum(wide.gather([len(ids)])[: wide.rank])
            mine = slice(start, start + len(ids))
            plan = SamplingPlan(num_samples=plan.num_samples[mine], temperature=plan.temperature[mine])
            everyone = everyone[mine]
        return _Planned(plan, everyone, first, tokens, from_memory)

    def capability(self, prompts: Prompts, epoch: int) -> tuple[Tensor, int]:
        """(P,) Cap_x as recorded or, never seen, by a greedy decode; and how many were recorded (`esrl plan`)."""
        scores, first, _ = self._scores(prompts, epoch)
        return scores, len(prompts) - len(first)

    def _scores(self, prompts: Prompts, epoch: int) -> tuple[Tensor, dict[int, CapabilityRecord], int]:
        first, tokens = self._first_estimates(prompts, self.memory.missing(prompts.example_ids), epoch)
        records = [first.get(i) or self.memory.records.get(example) for i, example in enumerate(prompts.example_ids)]
        scores = [0.0 if record is None else record.score for record in records]
        return torch.tensor(scores, dtype=torch.float64), first, tokens

    def _first_estimates(
        self, prompts: Prompts, missing: list[int], epoch: int
    ) -> tuple[dict[int, CapabilityRecord], int]:
        """One greedy decode for each prompt never seen, scored as samples are (paper, "Dynamic Sampling")."""
        if not missing:
            return {}, 0
        part = prompts.select(missing)
        with self._clock("sample"):
            greedy = self.sampler.sample(part, SamplingPlan.greedy(len(part)), epoch, self.method.capability.records)
        rewards = self._rewards(part, greedy, torch.ones(len(part), dtype=torch.int64), epoch)
        records = self._records(greedy, rewards, Groups(greedy.prompt_index, len(part)), epoch, greedy=True)
        first = {i: record for i, record in zip(missing, records, strict=True) if record is not None}
        return first, int(greedy.mask.sum())

    def _sample(self, prompts: Prompts, plan: SamplingPlan, epoch: int) -> tuple[Rollouts, Tensor | None]:
        """Stage one; the conventional step also returns the log-probabilities with their graph."""
        with self._clock("sample"):
            if self.stage_two.config.kind == "graph":
                return sample_with_graph(self.policy, prompts, plan, self.sampler, epoch, self._scores_at_sampling)
            return self.sampler.sample(prompts, plan, epoch, self.method.capability.records), None

    def _rewards(self, prompts: Prompts, rollouts: Rollouts, counts: Tensor, epoch: int) -> _Rewards:
        if rollouts.num_rows == 0:  # a process without a share of this batch
            return _Rewards(torch.zeros(0, dtype=torch.float64), counts, {})
        owner = rollouts.prompt_index.tolist()
        columns = {name: [values[i] for i in owner] for name, values in prompts.columns.items()}
        lengths = rollouts.lengths.tolist()
        ids = [row[:length] for row, length in zip(rollouts.tokens.tolist(), lengths, strict=True)]
        with self._clock("reward"):
            result = self.reward.score(columns["source"], list(rollouts.texts), ids, columns, {"epoch": epoch})
        values = torch.where(result.abstained, 0.0, result.values.to(torch.float64))
        if bool((values.abs() > MAX_REWARD).any()):
            row = int((values.abs() > MAX_REWARD).nonzero()[0])
            raise RewardError(
                f"the reward of sample {rollouts.texts[row][:60]!r} is {float(values[row])}; beyond {MAX_REWARD:g} in "
                "size float32 overflows. Scale the reward."
            )
        for name, value in result.metrics.items():
            if not math.isfinite(value):
                raise RewardError(f"a reward function logged {name!r} as {value}; log finite numbers only.")
        return _Rewards(values, torch.where(result.abstained, 0, counts), dict(result.metrics))

    def _rewarded(
        self, rollouts: Rollouts, rewards: _Rewards, plan: SamplingPlan, queue: RewardQueue
    ) -> RewardedSamples:
        groups = Groups(rollouts.prompt_index, len(plan.num_samples))
        baseline = baseline_values(self.method.baseline.kind, rewards.values, groups, rewards.counts, queue)
        return RewardedSamples(
            mask=rollouts.mask.cpu(),
            groups=groups,
            counts=rewards.counts,
            rewards=rewards.values,
            baseline=baseline,
            sampling_log_probs=rollouts.sampling_log_probs.cpu(),
            planned=plan.num_samples,
        )

    def _records(
        self, rollouts: Rollouts, rewards: _Rewards, groups: Groups, epoch: int, *, greedy: bool = False
    ) -> list[CapabilityRecord | None]:
        """Cap_x from these samples, for the next epoch; None for a prompt without a valid one."""
        config = self.method.capability
        if config.estimator == "entropy":
            name = {"full_normalised": "entropy", "max_prob": "max_prob"}.get(config.entropy_form)
            values = rollouts.log_probs if name is None else rollouts.records[name]
            scores = entropy_capability(
                values.cpu(), rollouts.mask.cpu(), groups, rewards.counts, config, self.policy.vocabulary
            )
        else:
            scores = metric_capability(rewards.values, groups, rewards.counts)
        weights = rewards.counts.to(torch.float64)
        number = groups.sum(weights)
        mean = groups.mean(rewards.values, weights)
        squares = groups.sum(weights * (rewards.values - groups.spread(mean)).square())
        std = (squares / (number - 1).clamp_min(1)).sqrt()
        if not bool((torch.isfinite(scores) & torch.isfinite(std)).all()):
            i = int((~(torch.isfinite(scores) & torch.isfinite(std))).nonzero()[0])
            raise NumericsError(
                f"the capability of prompt {i} of the step is {float(scores[i])} with a spread of {float(std[i])}; "
                "nothing was updated. Look at its rewards and log-probabilities."
            )
        return [
            None
            if count == 0
            else CapabilityRecord(score, greedy, epoch, int(count), spread if count > 1 and not greedy else None)
            for score, count, spread in zip(scores.tolist(), number.tolist(), std.tolist(), strict=True)
        ]

    @property
    def _scores_at_sampling(self) -> bool:
        return self.method.objective.score_temperature == "sampling"

    def _accumulate(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        samples: RewardedSamples,
        plan: SamplingPlan,
        graph: Tensor | None,
        epoch: int,
    ) -> float:
        """Add the step's gradient to the parameters (stage two); returns the summed loss."""
        if rollouts.num_rows == 0:
            return 0.0
        with self._clock("score"):
            if graph is not None:
                total = objective_loss(graph, samples, self.method.objective)
                if total.requires_grad:
                    total.backward()
                return float(total.detach())
            temperature = plan.temperature[rollouts.prompt_index] if self._scores_at_sampling else None
            seed = seed_of("stage two", self.seed, epoch, *prompts.example_ids[:1])
            size = self.stage_two.config.micro_batch_tokens
            if self.stage_two.rescores:
                log_probs = self.stage_two.log_probs(prompts, rollouts, temperature, seed).cpu()
                check_log_probs(log_probs, rollouts.prompt_index, prompts)
            else:
                log_probs = (rollouts.sampling_log_probs if self._scores_at_sampling else rollouts.log_probs).cpu()
            loss, gradient = coefficients(log_probs, samples, self.method.objective)
            self.stage_two.backward(prompts, rollouts, gradient, temperature, seed)
        if self.stage_two.config.dropout and self.stage_two.config.micro_batch_tokens != size:
            # memory ran out on the way: other micro-batches, other dropout masks than the coefficients came from
            self.model.zero_grad(set_to_none=True)
            return self._accumulate(prompts, rollouts, samples, plan, graph, epoch)
        return float(loss)

    def _metrics(
        self,
        rollouts: Rollouts,
        rewards: _Rewards,
        planned: _Planned,
        records: list[CapabilityRecord | None],
    ) -> dict[str, Any]:
        """The step's figures over all processes."""
        plan, gather = planned.plan, self.processes.gather
        values = torch.tensor(gather(rewards.values.repeat_interleave(rewards.counts).tolist()), dtype=torch.float64)
        num_samples = gather(plan.num_samples.tolist())
        total = sum(num_samples)
        scores = gather([record.score for record in records if record is not None])
        uses_mrt = mrt_prompts(plan.num_samples, self.method.objective) & (plan.num_samples > 0)
        everyone = len(num_samples)
        number = {
            "rows": rollouts.num_rows,
            "truncated": int((~rollouts.finished.cpu()).sum()),
            "tokens": int(rollouts.mask.sum()) + planned.first_tokens,
            "mrt": int(uses_mrt.sum()),
            "reinforce": int((~uses_mrt & (plan.num_samples > 0)).sum()),
            "abstained": int((rewards.counts == 0).sum()),
            "memory": planned.from_memory,
        }
        sums = {name: sum(gather([value])) for name, value in number.items()}
        # a greedy first estimate is drawn, too, even where its reward abstains
        drawn = total + (everyone - sums["memory"] if self.method.allocation.needs_capability else 0)
        own = {
            "reward_mean": float(values.mean()) if len(values) else 0.0,
            "reward_std": float(values.std(correction=0)) if len(values) else 0.0,
            "num_samples_mean": total / everyone,
            "num_samples_histogram": {str(k): count for k, count in sorted(Counter(num_samples).items())},
            "temperature_mean": sum(gather(plan.temperature.tolist())) / everyone,
            "budget_used": drawn / (everyone * self.method.allocation.max_samples),
            "planned_from_memory": sums["memory"] / everyone,
            "capability_mean": sum(scores) / max(1, len(scores)),
            "unique_share": sums["rows"] / max(1, total),
            "truncated_share": sums["truncated"] / max(1, sums["rows"]),
            "mrt_prompts": sums["mrt"],
            "reinforce_prompts": sums["reinforce"],
            "abstained_rows": sums["abstained"],
            "tokens_sampled": sums["tokens"],
            **{f"seconds_{name}": self._seconds[name] for name in ("sample", "reward", "score")},
        }
        for name in rewards.metrics.keys() & (own.keys() | _LOOP_METRICS):
            raise RewardError(f"a reward function logged {name!r}, a name metrics.jsonl has; choose another one.")
        return own | rewards.metrics

    def _lines(
        self, prompts: Prompts, rollouts: Rollouts, rewards: _Rewards, planned: _Planned, epoch: int
    ) -> list[dict[str, Any]]:
        """samples.jsonl: the followed prompts of this step."""
        lines = []
        for i, example in enumerate(prompts.example_ids):
            if example not in self.logged:
                continue
            rows = (rollouts.prompt_index == i).nonzero()[:, 0].tolist()
            capability = float(planned.capability[i])
            lines.append(
                {
                    "epoch": epoch,
                    "example_id": example,
                    "prompt": prompts.columns["source"][i],
                    "reference": prompts.columns.get("reference", [""] * len(prompts))[i],
                    "num_samples": int(planned.plan.num_samples[i]),
                    "temperature": float(planned.plan.temperature[i]),
                    "capability": None if math.isnan(capability) else capability,
                    "samples": [
                        {"text": rollouts.texts[row], "reward": float(rewards.values[row]), "count": int(count)}
                        for row, count in ((row, rewards.counts[row]) for row in rows)
                    ],
                }
            )
        return lines

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - started
