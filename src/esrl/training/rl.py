"""Reinforcement learning: the paper's step (Figure 2), composed of parts that know nothing of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from esrl.algorithm.allocation import AllocationConfig, allocate
from esrl.algorithm.baselines import RewardQueue
from esrl.algorithm.capability import CapabilityMemory, CapabilityRecord
from esrl.algorithm.duplicates import handle_duplicates
from esrl.algorithm.groups import Groups
from esrl.algorithm.streams import plan_uniforms
from esrl.data.batching import make_prompts, shuffled_batches
from esrl.data.encoding import Encoder, make_causal_prompts
from esrl.data.examples import Example
from esrl.evaluation.development import Development
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy
from esrl.rewards.calling import RewardFunction, RewardResult, StepCounts
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.graph import sample_with_graph
from esrl.sampling.stops import cut_at_stops
from esrl.training.critic import keeping_states, trained_modules, value_head
from esrl.training.ends import take_ends
from esrl.training.experience import Experience, pack_experience, unpack_experience
from esrl.training.figures import Outcome, Stopwatch, sample_lines, step_metrics
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.learning import Fixed, Graph, Learner, Learnt, Sampled
from esrl.training.method import Method, StepConfig, check_parts
from esrl.training.planning import (
    Planned,
    Rewards,
    capability_records,
    capability_scores,
    mapped_capability,
    rewards_of,
)
from esrl.training.processes import Processes
from esrl.training.reference import Reference, frozen_reference
from esrl.training.restore import frozen_digest
from esrl.training.task import Update, export_folder
from esrl.types import Prompts, Rollouts, SamplingPlan


class RLTask:
    """The RL step for ``training.loop``.

    Args:
        examples: training prompts; the reward's columns with them.
        development: scored by the loop every so often.
        seed: of the run; every draw is a function of (seed, epoch, example id, sample).
        reference: the policy to stay close to; None: a frozen copy of this one as it is now, where
            ``objective.kl_coefficient`` is above 0.
        encoder: makes token ids of a causal model's prompts; None for an encoder-decoder.

    Raises:
        ValueError: parts that do not go together.
    """

    def __init__(  # noqa: PLR0913 - the composition root hands over every part
        self,
        policy: MarianPolicy | CausalPolicy,
        examples: Sequence[Example],
        method: Method,
        step: StepConfig,
        sampling: SamplingConfig,
        gradient: GradientConfig,
        reward: RewardFunction,
        development: Development,
        seed: int,
        reference: Reference | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        take_ends(policy, encoder)
        self.policy = policy
        self.encoder = encoder
        self.examples = examples
        self.method = method.resolved()
        check_parts(self.method, step, gradient, reward.names, reward.weights)
        self.config = step
        self.reward = reward
        self.development = development
        self.seed = seed
        self.processes = Processes()
        self.sampler = EngineSampler(policy, sampling, seed)
        policy.set_dropout(gradient.dropout)
        critic = value_head(policy) if method.objective.kind == "ppo" else None
        self.model = trained_modules(policy, critic)
        self.stage_two = StageTwo(policy, gradient, critic)
        self.identity = reward.identity()
        if reference is None and method.objective.kl_coefficient > 0:
            reference = frozen_reference(policy, gradient)
            self.identity["reference.weights"] = str(frozen_digest(policy.model, ()))
        limit = sampling.max_new_tokens
        self.learner = Learner(self.method, step, self.stage_two, reference, limit, seed, self.processes)
        self.memory = CapabilityMemory()
        self.queue = RewardQueue(method.baseline.queue_size)
        self.logged = set(sorted(example.id for example in examples)[: step.logged_prompts])
        self._clock = Stopwatch(policy.device)
        self._reward_state = reward.state_dict()
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._experience: Experience | None = None  # of the batch that further updates learn from
        self._packed: list[dict[str, Any]] | None = None  # the same of every process, for the checkpoint

    def num_batches(self, epoch: int) -> int:
        """Optimizer updates in an epoch."""
        return self.num_sample_batches * self.config.num_updates

    @property
    def num_sample_batches(self) -> int:
        """Batches of prompts in an epoch."""
        return math.ceil(len(self.examples) / self.config.batch_size)

    def compute(self, epoch: int, batch: int) -> Update:
        """One update: of a new batch of samples, or one more of the batch before; without side effects on memory, queue
        or parameters."""
        self._clock = Stopwatch(self.policy.device)
        batch, update = divmod(batch, self.config.num_updates)
        if update and self._experience is not None and self._experience.is_of(epoch, batch):
            return self._learn_again(self._experience, update)
        return self._sample_and_learn(epoch, batch, update)

    def _sample_and_learn(self, epoch: int, batch: int, update: int) -> Update:
        """One step of the paper. ``update`` is above 0 where the batch's earlier ones were skipped."""
        self.reward.load_state_dict(self._reward_state)  # an interrupted step may have counted already
        prompts = self.prompts(epoch, batch)
        planned = self._plan(prompts, epoch, batch)  # eq. 8, eq. 9
        drawn, graph = self._draw(prompts, planned.plan, epoch)  # stage one
        rollouts, counts = handle_duplicates(drawn, self.config.duplicates if graph is None else "keep")
        rewards = self._rewards(prompts, rollouts, counts, epoch, batch)
        self._end_reward_step()
        queue = self.queue.copy()
        queue.push(self.processes.gather(rewards.values.repeat_interleave(rewards.counts).tolist()))
        records = self._records(prompts, rollouts, rewards, epoch)  # eq. 6, eq. 7
        sampled = Sampled(
            epoch=epoch,
            batch=batch,
            prompts=prompts,
            plan=planned.plan,
            rollouts=rollouts,
            rewards=rewards,
            graph=graph,
        )
        fixed, learnt = self._learn(sampled, queue, update)  # eq. 3, 4, 5; stage two
        outcome = Outcome(
            prompts=prompts,
            planned=planned,
            drawn=drawn,
            rollouts=rollouts,
            rewards=rewards,
            records=records,
            seconds=self._clock.seconds,
        )
        metrics = step_metrics(outcome, self.method.allocation, self.method.objective, self.processes)
        metrics |= fixed.metrics | learnt.metrics
        left = fixed.experience if update + 1 < self.config.num_updates else None
        committing = self._committing(outcome, queue, epoch, fixed.kl_coefficient, left)
        return Update(learnt.loss, learnt.denominator, metrics, committing)

    def prompts(self, epoch: int, batch: int) -> Prompts:
        """This process's share of a batch of prompts; ``batch`` counts those, not the updates from them."""
        if self._epoch[0] != epoch:
            self._epoch = (epoch, shuffled_batches(len(self.examples), self.config.batch_size, self.seed, epoch))
        indices = self._epoch[1][batch]
        mine = [indices[i] for i in self.processes.shard(len(indices))]
        examples = [self.examples[i] for i in mine]
        if self.encoder is not None:
            return make_causal_prompts(examples, self.encoder)
        limit = min(self.config.max_source_tokens, self.policy.max_length)
        return make_prompts(examples, self.policy.tokenizer, limit)

    def evaluate(self) -> dict[str, float]:
        return self.development.evaluate(self.policy)

    def export(self) -> dict[str, bytes]:
        return export_folder(self.policy.save)

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": self.memory.state_dict(),
            "queue": self.queue.state_dict(),
            "reward": self._reward_state,
            "micro_batch_tokens": self.stage_two.micro_batch_tokens,
            "kl_coefficient": self.learner.kl_coefficient,
            "experience": self._packed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.queue.load_state_dict(state["queue"])
        self._reward_state = state["reward"]
        self.stage_two.shrink(state["micro_batch_tokens"])
        self.learner.kl_coefficient = state.get("kl_coefficient", self.learner.kl_coefficient)
        self._packed = state.get("experience")
        self._experience = self._unpacked()

    def _unpacked(self) -> Experience | None:
        """This process's part of the samples that the run was learning from."""
        if self._packed is None:
            return None
        if len(self._packed) != self.processes.size:
            raise ValueError(
                f"the checkpoint was saved by {len(self._packed)} processes between two updates from one batch of "
                f"samples, and there are {self.processes.size} now; resume with {len(self._packed)}."
            )
        packed = self._packed[self.processes.rank]
        return unpack_experience(packed, self.prompts(packed["epoch"], packed["batch"]), self.policy.device)

    def capability(self, prompts: Prompts, epoch: int, batch: int) -> tuple[Tensor, int]:
        """(P,) Cap_x before any mapping, as recorded or, not known, by a greedy decode (NaN where its reward abstains);
        and how many were recorded."""
        scores, _, _ = self._scores(prompts, epoch, batch)
        return scores, self._from_memory(prompts, epoch)

    def plan_of(
        self, example_ids: Sequence[str], scores: Tensor, epoch: int, allocation: AllocationConfig | None = None
    ) -> tuple[SamplingPlan, Tensor]:
        """Eq. 8 and eq. 9 over the whole step, or over this process alone (``capability.scope``).

        Args:
            scores: (P,) of this process's prompts, as ``capability`` gives them.
            allocation: another one than the method's, to compare with.

        Returns:
            The plan of this process's prompts, and their (P,) capability as eq. 8 saw it; it is ``scores`` where the
            allocator needs none.

        Raises:
            RewardError: a capability is negative.
        """
        allocation, config = allocation or self.method.allocation, self.method.capability
        ids, everyone, start = list(example_ids), scores, 0
        if config.scope == "step":
            gather = self.processes.gather
            start = sum(gather([len(ids)])[: self.processes.rank])
            everyone = torch.tensor(gather(scores.tolist()), dtype=torch.float64)
            ids = gather(ids)
        if allocation.needs_capability:
            everyone = mapped_capability(everyone, ids, config, self.queue)
        plan = allocate(
            everyone if allocation.needs_capability else torch.zeros_like(everyone),
            allocation,
            uniforms=plan_uniforms(self.seed, epoch, ids),
            reward_std=self.memory.reward_std(ids),
        )
        mine = slice(start, start + len(scores))
        own = SamplingPlan(num_samples=plan.num_samples[mine], temperature=plan.temperature[mine])
        return own, everyone[mine]

    def _committing(
        self, outcome: Outcome, queue: RewardQueue, epoch: int, kl_coefficient: float, left: Experience | None
    ) -> Callable[[], list[dict[str, Any]]]:
        """What commits a step; whatever can fail, the other processes included, is done by now.

        Args:
            left: the samples, if further updates are to learn from them.
        """
        gather, first = self.processes.gather, outcome.planned.first
        ids = gather(list(outcome.prompts.example_ids))
        records = gather([record or first.get(i) for i, record in enumerate(outcome.records)])
        lines = gather(sample_lines(outcome, self.logged, epoch))
        reward_state = self.reward.state_dict()
        packed = None if left is None else gather([pack_experience(left)])

        def commit() -> list[dict[str, Any]]:
            self.queue = queue
            self.learner.kl_coefficient = kl_coefficient
            self._experience, self._packed = left, packed
            self._reward_state = reward_state
            self.memory.write(ids, records)
            return lines

        return commit

    def _end_reward_step(self) -> None:
        """Close the step for the reward's counters and cache, which are the same on every process."""
        parts = self.processes.gather([(self.reward.counts, self.reward.fresh_scores)])
        counts = StepCounts(*(sum(column) for column in zip(*(own for own, _ in parts), strict=True)))
        self.reward.end_step(counts, [fresh for _, fresh in parts])

    def _plan(self, prompts: Prompts, epoch: int, batch: int) -> Planned:
        """Look up Cap_x, estimate it greedily where it is not known, and allocate over the whole step."""
        first: dict[int, CapabilityRecord] = {}
        tokens, scores = 0, torch.full((len(prompts),), math.nan, dtype=torch.float64)
        if self.method.allocation.needs_capability:
            scores, first, tokens = self._scores(prompts, epoch, batch)
        plan, capability = self.plan_of(prompts.example_ids, scores, epoch)
        return Planned(plan, capability, first, tokens, self._from_memory(prompts, epoch))

    def _from_memory(self, prompts: Prompts, epoch: int) -> int:
        return len(prompts) - len(self.memory.missing(prompts.example_ids, epoch))

    def _scores(self, prompts: Prompts, epoch: int, batch: int) -> tuple[Tensor, dict[int, CapabilityRecord], int]:
        """(P,) Cap_x, NaN where even the greedy decode's reward abstains; first estimates; tokens decoded for them."""
        first, tokens = self._first_estimates(prompts, self.memory.missing(prompts.example_ids, epoch), epoch, batch)
        records = [first.get(i) or self.memory.records.get(example) for i, example in enumerate(prompts.example_ids)]
        scores = [math.nan if record is None else record.score for record in records]
        return torch.tensor(scores, dtype=torch.float64), first, tokens

    def _first_estimates(
        self, prompts: Prompts, missing: list[int], epoch: int, batch: int
    ) -> tuple[dict[int, CapabilityRecord], int]:
        """One greedy decode for each prompt not known, scored as samples are (paper, "Dynamic Sampling")."""
        if not missing:
            return {}, 0
        part = prompts.select(missing)
        with self._clock("sample"):
            greedy = self._sample(part, SamplingPlan.greedy(len(part)), epoch)
        once = torch.ones(len(part), dtype=torch.int64)
        if self.method.capability.estimator == "entropy":  # eq. 7 asks for no reward
            rewards = Rewards(torch.zeros(len(part), dtype=torch.float64), once)
        else:
            rewards = rewards_of(self._score(part, greedy, epoch, batch), once, greedy.texts)
        records = self._records(part, greedy, rewards, epoch, greedy=True)
        first = {i: record for i, record in zip(missing, records, strict=True) if record is not None}
        return first, int(greedy.mask.sum())

    def _draw(self, prompts: Prompts, plan: SamplingPlan, epoch: int) -> tuple[Rollouts, Graph | None]:
        """Stage one; the conventional step also returns what it keeps with its graph."""
        at_sampling = self.method.objective.score_temperature == "sampling"
        with self._clock("sample"):
            if self.stage_two.config.kind == "two_stage":
                return self._sample(prompts, plan, epoch), None
            if self.stage_two.critic is None:
                drawn, log_probs = sample_with_graph(self.policy, prompts, plan, self.sampler, epoch, at_sampling)
                return drawn, Graph(log_probs=log_probs)
            watched, states = keeping_states(self.policy)
            drawn, log_probs = sample_with_graph(watched, prompts, plan, self.sampler, epoch, at_sampling)
            width = self.policy.projection().weight.shape[1]
            kept = torch.stack(states, 1) if states else log_probs.new_zeros(*log_probs.shape, width)
            return drawn, Graph(log_probs=log_probs, states=kept)

    def _sample(self, prompts: Prompts, plan: SamplingPlan, epoch: int) -> Rollouts:
        rollouts = self.sampler.sample(prompts, plan, epoch, self.method.capability.records)
        return cut_at_stops(rollouts, self.policy.tokenizer, self.config.stop_strings)

    def _rewards(self, prompts: Prompts, rollouts: Rollouts, counts: Tensor, epoch: int, batch: int) -> Rewards:
        """Of this process's samples; normalised, where they are, over those of all processes."""
        if rollouts.num_rows:
            result = self._score(prompts, rollouts, epoch, batch)
            rewards, scores = rewards_of(result, counts, rollouts.texts), result.scores
        else:  # a process without a share of this batch
            rewards = Rewards(torch.zeros(0, dtype=torch.float64), counts)
            scores = torch.zeros(0, len(self.reward.weights), dtype=torch.float64)
        if not self.reward.is_normalised:
            return rewards
        own = self.reward.combined(scores, rewards.counts == 0, rewards.counts, self.processes.gather)
        return replace(rewards, normalised=own)

    def _score(self, prompts: Prompts, rollouts: Rollouts, epoch: int, batch: int) -> RewardResult:
        owner = rollouts.prompt_index.tolist()
        columns = {name: [values[i] for i in owner] for name, values in prompts.columns.items()}
        lengths = rollouts.lengths.tolist()
        ids = [row[:length] for row, length in zip(rollouts.tokens.tolist(), lengths, strict=True)]
        step = (epoch * self.num_sample_batches + batch) * self.config.num_updates
        state = {"global_step": step, "epoch": epoch}
        with self._clock("reward"):
            return self.reward.score(columns["source"], list(rollouts.texts), ids, columns, state)

    def _records(
        self, prompts: Prompts, rollouts: Rollouts, rewards: Rewards, epoch: int, *, greedy: bool = False
    ) -> list[CapabilityRecord | None]:
        """Cap_x from these samples, for the next epoch; None for a prompt without a valid one."""
        groups = Groups(rollouts.prompt_index, len(prompts))
        scores = capability_scores(rollouts, rewards, groups, self.method.capability, self.policy.vocabulary)
        return capability_records(prompts.example_ids, scores, rewards, groups, epoch, greedy=greedy)

    def _learn(self, sampled: Sampled, queue: RewardQueue, update: int) -> tuple[Fixed, Learnt]:
        """Fix what the batch's updates have in common, and add the gradient of the first one (stage two)."""
        with self._clock("score"):
            size = self.stage_two.micro_batch_tokens
            fixed = self.learner.fix(sampled, queue)
            learnt = self.learner.update(fixed.experience, update, is_new=True, graph=sampled.graph)
        if self.stage_two.config.dropout and self.stage_two.micro_batch_tokens != size:
            # memory ran out on the way: other micro-batches, other dropout masks than the coefficients came from
            self.model.zero_grad(set_to_none=True)
            return self._learn(sampled, queue, update)
        return fixed, learnt

    def _learn_again(self, experience: Experience, update: int) -> Update:
        """Another update from samples that are there."""
        with self._clock("score"):
            learnt = self.learner.update(experience, update, is_new=False)

        def commit() -> list[dict[str, Any]]:
            if update + 1 == self.config.num_updates:
                self._experience, self._packed = None, None
            return []

        metrics = {**learnt.metrics, "tokens_sampled": 0, "seconds_score": self._clock.seconds["score"]}
        return Update(learnt.loss, learnt.denominator, metrics, commit)
