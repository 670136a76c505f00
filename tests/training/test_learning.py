"""GRPO, RLOO and PPO in the step: both kinds of gradient, several updates from a batch, the reference, the critic."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from causal_models import norms_in_float64
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from esrl.algorithm.allocation import AllocationConfig
from esrl.algorithm.baselines import BaselineConfig
from esrl.algorithm.capability import CapabilityConfig
from esrl.algorithm.kl import steered
from esrl.algorithm.objective_config import CriticConfig
from esrl.algorithm.objectives import ObjectiveConfig, objective_loss
from esrl.data.encoding import Encoder, PromptConfig
from esrl.evaluation.decode import DecodingConfig
from esrl.evaluation.development import Development
from esrl.models.causal import CausalPolicy
from esrl.rewards.calling import RewardConfig, build_reward
from esrl.sampling.engine import SamplingConfig
from esrl.training.experience import pack_experience, unpack_experience
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.training.method import Method, StepConfig
from esrl.training.optimization import Optimizer, OptimizerConfig
from esrl.training.reference import frozen_reference, switched_reference
from esrl.training.rl import RLTask

BASELINES = {
    "grpo": "prompt_mean",
    "rloo": "leave_one_out",
    "ppo": "none",
    "mrt": "none",
    "reinforce": "fifo",
    "fused": "fifo",
}
MakeTask = Callable[..., RLTask]


@pytest.fixture
def make_task(make_policy, examples) -> MakeTask:
    """An RL step in float64 over 16 prompts in batches of 6; the critic, where there is one, is no longer 0."""

    def make(
        kind: str,
        *,
        k: int = 4,
        step: Any = None,
        gradient: Any = None,
        reference: Any = None,
        start: Any = None,
        **more: Any,
    ) -> RLTask:
        policy = make_policy(layers=1) if start is None else copy.deepcopy(start)
        task = RLTask(
            policy,
            examples,
            Method(
                # eq. 8 with a large beta: groups of 1 to k samples
                allocation=AllocationConfig(max_samples=k, elimination_ratio=0.7, temperature_rule="fixed"),
                capability=CapabilityConfig(),
                objective=ObjectiveConfig(kind=kind, **more),  # type: ignore[arg-type]
                baseline=BaselineConfig(kind=BASELINES[kind], queue_size=50),  # type: ignore[arg-type]
            ),
            StepConfig(batch_size=6, **({"duplicates": "keep"} | (step or {}))),
            SamplingConfig(max_new_tokens=8),
            GradientConfig(micro_batch_tokens=30, **(gradient or {})),
            build_reward(RewardConfig(names=("chrf",))),
            Development([], (), DecodingConfig()),
            seed=3,
            reference=reference,
            encoder=Encoder(policy.tokenizer, PromptConfig()) if isinstance(policy, CausalPolicy) else None,
        )
        if task.stage_two.critic is not None:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in task.stage_two.critic.parameters():
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        return task

    return make


@pytest.fixture(scope="session")
def causal64(tokenizer) -> CausalPolicy:
    """A random Llama over the same tokenizer, sharp and with many end tokens: some of its samples are equal."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(2)
    model = LlamaForCausalLM(config).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 6
        model.lm_head.weight *= 6
    model.generation_config.eos_token_id = [1, *range(40, 100)]
    return CausalPolicy(model, tokenizer)


def gradient_of(task: RLTask, epoch: int = 0, batch: int = 0) -> dict[str, Tensor]:
    task.model.zero_grad(set_to_none=True)
    task.compute(epoch, batch)
    return {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys() and max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def move(task: RLTask, size: float = 0.03, seed: int = 0) -> None:
    """As an optimizer would, only further."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in task.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += size * float(parameter.std() if parameter.numel() > 1 else 1.0) * noise


OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo"},
    "grpo by tokens, KL": {"kind": "grpo", "normalise": "token", "kl_coefficient": 0.1},
    "rloo, KL": {"kind": "rloo", "kl_coefficient": 0.05},
    "ppo": {"kind": "ppo"},
    "ppo, KL": {"kind": "ppo", "kl_coefficient": 0.1, "critic": CriticConfig(value_coefficient=0.7)},
    "ppo at tau": {"kind": "ppo", "score_temperature": "sampling"},
    "fused": {"kind": "fused", "alpha": 0.1},
    "mrt": {"kind": "mrt", "alpha": 0.1},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_both_kinds_of_gradient_agree_on_the_same_samples(make_task, name):
    """The critic's gradient, which goes on into the policy, included; and merged copies change nothing."""
    kinds = {
        "graph": make_task(**OBJECTIVES[name], gradient={"kind": "graph"}),
        "two_stage": make_task(**OBJECTIVES[name]),
        "merged": make_task(**OBJECTIVES[name], step={"duplicates": "merge"}),
    }
    found = {}
    for kind, task in kinds.items():
        move(task)  # off the reference
        found[kind] = gradient_of(task)
    assert_same(found["two_stage"], found["graph"])
    assert_same(found["merged"], found["graph"])
    assert ("critic.weight" in found["graph"]) == name.startswith("ppo")


@pytest.mark.parametrize("name", ["grpo by tokens, KL", "rloo, KL", "ppo, KL", "fused", "mrt"])
def test_decoder_only_models_alike(make_task, causal64, name):
    """Both kinds of gradient, and merged copies, of which there are some."""
    kinds: dict[str, dict[str, Any]] = {
        "graph": {"gradient": {"kind": "graph"}},
        "two_stage": {},
        "merged": {"step": {"duplicates": "merge"}},
    }
    found = {}
    for kind, settings in kinds.items():
        task = make_task(**OBJECTIVES[name], start=causal64, k=12, **settings)
        norms_in_float64(task.policy.model)
        move(task)
        found[kind] = gradient_of(task)
    assert_same(found["two_stage"], found["graph"])
    assert_same(found["merged"], found["graph"])
    assert all(float(value.norm()) > 1e-3 for value in found["graph"].values())
    assert int(commit(task, 0, updates=False).samples.counts.max()) > 1


@pytest.mark.parametrize("name", ["grpo by tokens, KL", "rloo, KL", "ppo, KL"])
def test_decoder_only_models_learn_again_from_their_samples(make_task, causal64, name):
    task = make_task(**OBJECTIVES[name], start=causal64, step={"updates_per_batch": 2})
    assert task.compute(0, 0).metrics["ratio_mean"] == 1
    task.compute(0, 0).commit()
    move(task)
    assert task.compute(0, 1).metrics["approx_kl"] > 1e-4


def test_the_critic_s_loss_reaches_the_policy(make_task):
    """Without the value loss the gradient is another."""
    with_it = gradient_of(make_task("ppo", critic=CriticConfig(value_coefficient=5.0)))
    without = gradient_of(make_task("ppo", critic=CriticConfig(value_coefficient=0.0)))
    key = "policy.model.decoder.layers.0.fc1.weight"
    assert float((with_it[key] - without[key]).abs().max()) > 1e-3
    assert float(without["critic.weight"].abs().max()) == 0


def test_values_and_their_gradient_are_those_of_the_whole_sequence(make_task):
    """Stage two in micro-batches against one forward with a graph, for any coefficients."""
    task = make_task("ppo")
    experience = commit(task, 0, updates=False)
    prompts, rollouts = experience.prompts, experience.rollouts
    critic, policy = task.stage_two.critic, task.policy
    assert critic is not None
    generator = torch.Generator().manual_seed(8)
    c, d = (torch.randn(rollouts.mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    c, d = c * rollouts.mask, d * rollouts.mask

    def whole() -> Tensor:
        start = torch.full_like(rollouts.tokens[:, :1], policy.start_token)
        inputs = torch.cat([start, rollouts.tokens[:, :-1]], 1)
        hidden = policy.hidden_states(policy.encode(prompts), rollouts.prompt_index, inputs)
        logs = torch.log_softmax(policy.projection().logits(hidden.flatten(0, 1)), 1).view(*inputs.shape, -1)
        logs = logs.gather(2, rollouts.tokens[..., None])[..., 0]
        values = critic(hidden)[..., 0]
        _, from_stage_two = task.stage_two.scores(prompts, rollouts, None, 0)
        torch.testing.assert_close(from_stage_two, torch.where(rollouts.mask, values.detach(), 0.0))
        return (torch.where(rollouts.mask, c * logs, 0.0) + d * values).sum()

    task.model.zero_grad(set_to_none=True)
    whole().backward()
    expected = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad(set_to_none=True)
    task.stage_two.backward(prompts, rollouts, c, None, 0, d)
    assert_same({name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}, expected)


def commit(task: RLTask, batch: int, *, updates: bool = True) -> Any:
    """Compute an update and commit it; the experience that it left behind, or that it would have left."""
    kept: list[Any] = []
    real = task.learner.fix

    def fix(*args: Any) -> Any:
        kept.append(real(*args))
        return kept[-1]

    task.learner.fix = fix  # type: ignore[method-assign]
    task.model.zero_grad(set_to_none=True)
    task.compute(0, batch).commit()
    task.learner.fix = real  # type: ignore[method-assign]
    return task._experience if updates else kept[-1].experience


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_later_updates_are_measured_against_the_policy_that_has_sampled(make_task, kind):
    task = make_task(kind, step={"updates_per_batch": 3}, clip_low=0.05, clip_high=0.07)
    assert task.num_batches(0) == 3 * task.num_sample_batches == 9
    first = task.compute(0, 0)
    assert first.metrics["ratio_mean"] == 1 and first.metrics["approx_kl"] == 0  # exactly
    assert first.metrics["clip_low_share"] == first.metrics["clip_high_share"] == 0
    first.commit()
    experience = task._experience
    old = experience.samples.old_log_probs.clone()
    for update in (1, 2):
        move(task, seed=update)
        task.model.zero_grad(set_to_none=True)
        later = task.compute(0, update)
        # the same samples, scored anew by the policy as it is now, in the objective written out in algorithm/
        now = task.stage_two.log_probs(experience.prompts, experience.rollouts, None, 0)
        expected = objective_loss(now, experience.samples, task.method.objective)
        if kind != "ppo":
            assert later.loss == pytest.approx(float(expected), rel=1e-9)
        counts, mask = experience.samples.counts, experience.samples.mask
        log_ratio = torch.where(mask, now - old, 0.0)
        ratio = log_ratio.sum(1).exp() if kind == "rloo" else log_ratio.exp()[mask]
        assert bool((counts == 1).all())
        assert later.metrics["ratio_mean"] == pytest.approx(float(ratio.mean()), rel=1e-9)
        assert later.metrics["clip_low_share"] + later.metrics["clip_high_share"] > 0
        assert later.metrics["tokens_sampled"] == 0 and later.metrics["update"] == update
        assert later.commit() == []
    assert torch.equal(old, experience.samples.old_log_probs)
    assert task._experience is None and task.state_dict()["experience"] is None
    assert task.compute(0, 3).metrics["update"] == 0  # the next batch


def test_later_gradients_are_derivatives(make_task):
    """PPO's second update: policy and value loss together, by central differences along the gradient."""
    task = make_task("ppo", step={"updates_per_batch": 2}, critic=CriticConfig(value_coefficient=1.0))
    task.compute(0, 0).commit()
    move(task, 0.01)
    gradient = gradient_of(task, 0, 1)
    parameters = dict(task.model.named_parameters())
    pad = task.policy.pad_token
    direction = {name: value.clone() for name, value in gradient.items()}
    direction["policy.model.shared.weight"][pad] = 0
    size = 1e-7 / math.sqrt(sum(float(d.square().sum()) for d in direction.values()))

    def loss(sign: float) -> float:
        with torch.no_grad():
            for name, value in direction.items():
                parameters[name] += sign * size * value
        task.model.zero_grad(set_to_none=True)
        return task.compute(0, 1).loss

    ahead, behind = loss(1.0), loss(-2.0)
    expected = sum(float((gradient[name] * value).sum()) for name, value in direction.items())
    assert (ahead - behind) / (2 * size) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("of", ["prompts", "samples"])
def test_minibatches_split_each_pass_anew_and_add_up(make_task, kind, of):
    """Without a step in between, the parts' gradients and denominators are those of the whole batch."""
    settings: dict[str, Any] = {"duplicates": "merge", "updates_per_batch": 2}
    whole = make_task(kind, step=settings)
    parts = make_task(kind, step=settings | {"minibatches": 3, "minibatch_of": of})
    assert parts.num_batches(0) == 2 * 3 * 3
    update = whole.compute(0, 0)
    expected = {name: p.grad.clone() for name, p in whole.model.named_parameters() if p.grad is not None}
    splits = []
    for turn in (0, 1):
        loss = below = 0.0
        found: dict[str, Tensor] = {}
        seen = []
        for number in range(3 * turn, 3 * turn + 3):
            parts.model.zero_grad(set_to_none=True)
            part = parts.compute(0, number)
            part.commit()
            own = {name: p.grad for name, p in parts.model.named_parameters() if p.grad is not None}
            found = {name: found.get(name, 0.0) + gradient for name, gradient in own.items()}
            loss, below = loss + part.loss, below + part.denominator
            experience = parts._experience or experience  # noqa: F821 - the last commit lets go of it
            seen.append(parts.learner._minibatch(experience, number)[0].tolist())
        assert sorted(row for rows in seen for row in rows) == list(range(experience.rollouts.num_rows))
        splits.append(seen)
        assert loss == pytest.approx(update.loss) and below == pytest.approx(update.denominator)
        assert_same(found, expected)
    assert splits[0] != splits[1]
    if of == "prompts":
        owners = [set(experience.rollouts.prompt_index[rows].tolist()) for rows in splits[0]]
        assert not owners[0] & owners[1] and not owners[1] & owners[2]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_resumed_batch_goes_on_to_the_bit(make_task, kind):
    """Between two updates: through JSON into a fresh task."""
    settings: dict[str, Any] = {"updates_per_batch": 2, "minibatches": 2, "duplicates": "merge"}
    more: dict[str, Any] = {"kl_coefficient": 0.1, "kl_target": 0.01, "kl_horizon": 50}
    task, resumed = (make_task(kind, step=settings, **more) for _ in range(2))
    move(task)
    task.compute(0, 0).commit()
    assert task.learner.kl_coefficient != 0.1
    move(task, seed=1)
    state = json.loads(json.dumps(task.state_dict()))
    resumed.load_state_dict(state)
    resumed.model.load_state_dict(task.model.state_dict())
    assert resumed.state_dict() == task.state_dict()
    for number in (1, 2, 3, 4):
        found = []
        for each in (task, resumed):
            each.model.zero_grad(set_to_none=True)
            update = each.compute(0, number)
            gradients = {name: p.grad for name, p in each.model.named_parameters() if p.grad is not None}
            seconds = {name for name in update.metrics if name.startswith("seconds")}
            metrics = {name: value for name, value in update.metrics.items() if name not in seconds}
            found.append((update.loss, update.denominator, metrics, gradients, update.commit()))
        assert found[0][:3] == found[1][:3] and found[0][4] == found[1][4]
        assert all(torch.equal(value, found[1][3][name]) for name, value in found[0][3].items())
        assert task.state_dict() == resumed.state_dict()
        for each in (task, resumed):
            move(each, seed=number)


def test_an_experience_survives_packing(make_task):
    task = make_task("ppo", step={"updates_per_batch": 2}, score_temperature="sampling", mask_truncated=True)
    task.compute(0, 0).commit()
    before = task._experience
    after = unpack_experience(json.loads(json.dumps(pack_experience(before))), before.prompts, task.policy.device)
    for a, b in ((before.rollouts, after.rollouts), (before.samples, after.samples)):
        for name in a.__slots__:
            left, right = getattr(a, name), getattr(b, name)
            if isinstance(left, Tensor):
                assert torch.equal(left, right) and left.dtype == right.dtype, name
            elif name != "groups":
                assert left == right, name
    assert torch.equal(before.samples.groups.index, after.samples.groups.index)
    assert before.samples.groups.num_groups == after.samples.groups.num_groups
    assert torch.equal(before.temperature, after.temperature)


def test_a_checkpoint_of_other_processes_between_updates_is_refused(make_task):
    task = make_task("grpo", step={"updates_per_batch": 2})
    task.compute(0, 0).commit()
    state = task.state_dict()
    state["experience"] = state["experience"] * 2
    with pytest.raises(ValueError, match=r"saved by 2 processes between two updates.*there are 1 now; resume with 2"):
        task.load_state_dict(state)


def test_an_update_whose_predecessors_were_skipped_samples_itself(make_task):
    """Nothing was committed, so memory, queue and samples are still to come; the policy is the one that samples."""
    task = make_task("grpo", step={"updates_per_batch": 3})
    update = task.compute(0, 1)
    assert update.metrics["ratio_mean"] == 1 and update.metrics["tokens_sampled"] > 0
    update.commit()
    assert len(task.memory) == 6 and task._experience is not None
    assert task.compute(0, 2).metrics["tokens_sampled"] == 0


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_every_size_of_group_gets_its_advantage(make_task, kind):
    """k_x from 1 to 4 in one batch, in the step itself: nothing is NaN, and single samples have r - b."""
    task = make_task(kind, step={"duplicates": "merge"})
    samples = commit(task, 0, updates=False).samples
    sizes = samples.groups.sum(samples.counts)
    assert int(sizes.min()) == 1 and int(sizes.max()) > 2
    assert bool(torch.isfinite(samples.advantages).all())
    if kind != "ppo":
        single = samples.groups.spread(sizes) == 1
        expected = (samples.rewards - task.queue.mean())[single]
        torch.testing.assert_close(samples.advantages[single], expected)


@pytest.mark.parametrize("how", ["k1", "k2", "k3"])
@pytest.mark.parametrize("kind", ["rloo", "grpo", "reinforce", "mrt"])
def test_a_penalty_comes_off_the_rewards_of_sequences(make_task, kind, how):
    task = make_task(kind, kl_coefficient=0.3, kl_place="sequence", kl_estimator=how)
    start = copy.deepcopy(task.policy)
    move(task)
    before = commit(make_moved(make_task, kind), 0, updates=False).samples
    experience = commit(task, 0, updates=False)
    samples, scorer = experience.samples, StageTwo(start, GradientConfig())
    reference = scorer.log_probs(experience.prompts, experience.rollouts, None, 0)
    torch.testing.assert_close(samples.reference_log_probs, reference)
    log_ratio = torch.where(samples.mask, reference - samples.old_log_probs, 0.0)
    tokens = {"k1": -log_ratio, "k2": log_ratio.square() / 2, "k3": log_ratio.exp() - 1 - log_ratio}[how]
    torch.testing.assert_close(samples.rewards, before.rewards - 0.3 * tokens.sum(1))
    assert float(tokens.sum(1).abs().max()) > 0.01
    if kind == "reinforce":  # the queue's mean, and the mean penalty off it
        shift = -0.3 * float(tokens.sum(1).mean())
        torch.testing.assert_close(samples.baseline, torch.full_like(samples.rewards, task.queue.mean() + shift))


def make_moved(make_task: MakeTask, kind: str) -> RLTask:
    task = make_task(kind)
    move(task)
    return task


def test_ppo_s_rewards_of_tokens(make_task):
    """KL off each token, the score at the last one: with lambda 1 and a critic of 0 the returns are its sums to go."""
    critic = CriticConfig(gae_lambda=1.0, whiten=False, reward_clip=0.05)
    task = make_task("ppo", kl_coefficient=0.3, critic=critic)
    with torch.no_grad():
        for parameter in task.stage_two.critic.parameters():
            parameter.zero_()
    move_policy_only(task)
    samples = commit(task, 0, updates=False).samples
    divergence = torch.where(samples.mask, samples.old_log_probs - samples.reference_log_probs, 0.0)
    assert bool((samples.old_values == 0).all()) and float(divergence.abs().max()) > 0.01
    assert float(samples.rewards.max()) > 0.05
    for row, length in enumerate(samples.mask.sum(1).tolist()):
        score = min(float(samples.rewards[row]), 0.05)
        for t in range(length):
            expected = score - 0.3 * float(divergence[row, t:length].sum())
            assert float(samples.returns[row, t]) == pytest.approx(expected)
    torch.testing.assert_close(samples.advantages, samples.returns)


def move_policy_only(task: RLTask) -> None:
    critic = task.stage_two.critic
    kept = copy.deepcopy(critic.state_dict())
    move(task)
    critic.load_state_dict(kept)


def test_ppo_whitens_over_real_tokens_with_their_copies(make_task):
    raw = commit(make_task("ppo", critic=CriticConfig(whiten=False), step={"duplicates": "merge"}), 0, updates=False)
    white = commit(make_task("ppo", step={"duplicates": "merge"}), 0, updates=False)
    weights = raw.samples.mask * raw.samples.counts[:, None]
    values = raw.samples.advantages.flatten().repeat_interleave(weights.flatten())
    assert int(raw.samples.counts.max()) > 1 and len(values) < raw.samples.mask.numel() * 3
    expected = torch.where(raw.samples.mask, (raw.samples.advantages - values.mean()) / values.std(), 0.0)
    torch.testing.assert_close(white.samples.advantages, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(white.samples.returns, raw.samples.returns)


def test_beta_is_steered_and_remembered(make_task):
    task = make_task("rloo", kl_coefficient=0.2, kl_target=0.5, kl_horizon=100)
    move(task)
    update = task.compute(0, 0)
    assert update.metrics["kl_coefficient"] == 0.2 == task.learner.kl_coefficient  # nothing is committed yet
    number = int(update.metrics["num_samples_mean"] * 6 + 0.5)
    update.commit()
    expected = steered(0.2, update.metrics["kl_mean"], 0.5, number, 100)
    assert task.state_dict()["kl_coefficient"] == pytest.approx(expected) and expected != 0.2
    assert task.compute(0, 1).metrics["kl_coefficient"] == pytest.approx(expected)


def test_the_reference_is_the_model_the_run_began_with(make_task):
    task = make_task("grpo", kl_coefficient=0.1)
    assert task.compute(0, 0).metrics["kl_mean"] == pytest.approx(0, abs=1e-9)
    move(task)
    assert task.compute(0, 0).metrics["kl_mean"] > 0.01


def test_a_reference_may_be_the_model_with_something_switched_off(make_task, make_policy):
    """As adapters are: here a change of the weights that the context takes away."""
    policy = make_policy(layers=1)
    start = copy.deepcopy(policy.model.state_dict())
    moved = {name: value * 1.02 for name, value in start.items()}

    @contextmanager
    def off() -> Any:
        policy.model.load_state_dict(start)
        yield
        policy.model.load_state_dict(moved)

    frozen = frozen_reference(policy, GradientConfig())
    policy.model.load_state_dict(moved)
    experience = commit(make_task("grpo"), 0, updates=False)
    policy.model.train(True)
    switched = switched_reference(policy, GradientConfig(dropout=0.3), off)
    found = switched(experience.prompts, experience.rollouts, None)
    torch.testing.assert_close(found, frozen(experience.prompts, experience.rollouts, None))
    assert policy.model.training and not found.requires_grad
    now = StageTwo(policy, GradientConfig()).log_probs(experience.prompts, experience.rollouts, None, 0)
    assert float((now - found).abs().max()) > 0.01


def test_a_given_reference_is_measured_even_without_a_penalty(make_task):
    asked = []

    def reference(prompts: Any, rollouts: Any, temperature: Any) -> Tensor:
        asked.append(temperature)
        return rollouts.log_probs - rollouts.mask.to(torch.float64)  # a nat less for each token

    update = make_task("grpo", reference=reference).compute(0, 0)
    assert asked == [None] and update.metrics["kl_per_token"] == pytest.approx(1)
    assert update.metrics["kl_mean"] == pytest.approx(update.metrics["length_mean"])


def test_the_critic_is_saved_with_the_model_but_not_exported(make_task):
    task = make_task("ppo")
    assert isinstance(task.model, nn.ModuleDict)
    names = {name for name, _ in task.model.named_parameters()}
    assert {"critic.weight", "critic.bias", "policy.model.shared.weight"} <= names
    assert make_task("grpo").model is not None and "model.shared.weight" in dict(
        make_task("grpo").model.named_parameters()
    )
    assert "model.safetensors" in task.export()


def test_old_log_probs_are_stage_two_s_where_several_updates_follow(make_task, monkeypatch):
    scored = []
    real = StageTwo.scores

    def scores(self: Any, *args: Any) -> Any:
        scored.append(args[1].num_rows)
        return real(self, *args)

    monkeypatch.setattr(StageTwo, "scores", scores)
    for kind, step, expected in (
        ("grpo", {}, 0),
        ("ppo", {}, 1),  # the values
        ("grpo", {"updates_per_batch": 2}, 1),
        ("grpo", {"minibatches": 2}, 1),
    ):
        scored.clear()
        make_task(kind, step=step).compute(0, 0)
        assert len(scored) == expected, (kind, step)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("grpo", {"step": {"updates_per_batch": 2}, "gradient": {"kind": "graph"}}, 'updates_per_batch is 2.*"graph"'),
        (
            "grpo",
            {"step": {"minibatches": 2}, "gradient": {"dropout": 0.1}},
            "minibatches 2, and gradient.dropout is 0.1",
        ),
        ("mrt", {"step": {"updates_per_batch": 2}}, "objective 'mrt' takes samples for the policy's own"),
        (
            "mrt",
            {"step": {"minibatches": 2, "minibatch_of": "samples"}, "importance_weights": True},
            "objective 'mrt' couples the samples of a prompt",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_refused(make_task, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        make_task(kind, **settings)


@pytest.mark.parametrize(("kind", "needed"), [("grpo", "prompt_mean"), ("rloo", "leave_one_out"), ("ppo", "none")])
def test_the_wrong_baseline_is_refused(make_task, monkeypatch, kind, needed):
    monkeypatch.setitem(BASELINES, kind, "fifo")
    with pytest.raises(ValueError, match=f"objective '{kind}' needs baseline.kind '{needed}', but it is 'fifo'"):
        make_task(kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates_per_batch": 0}, "updates_per_batch is 0"),
        ({"minibatches": 0}, "minibatches is 0"),
        ({"minibatch_of": "tokens"}, "minibatch_of is 'tokens'; choose prompts or samples"),
    ],
)
def test_step_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**settings)


def test_mrt_takes_several_updates_with_importance_weights(make_task):
    task = make_task("mrt", step={"updates_per_batch": 2}, importance_weights=True)
    task.compute(0, 0).commit()
    move(task)
    task.model.zero_grad(set_to_none=True)
    assert math.isfinite(task.compute(0, 1).loss)
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in task.model.parameters())


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_every_method_learns(make_task, trained64, kind):
    """A reward that any policy can learn, the share of the letter e: four updates from each batch of six prompts."""
    step = {"updates_per_batch": 2, "minibatches": 2, "duplicates": "merge"}
    beta = 0.0 if kind == "grpo" else 0.01
    task = make_task(kind, k=8, step=step, start=trained64, kl_coefficient=beta)
    real = task.reward.score

    def score(prompts: Any, texts: list[str], *rest: Any) -> Any:
        shares = [text.count("e") / max(1, len(text)) for text in texts]
        return replace(real(prompts, texts, *rest), raw=torch.tensor(shares, dtype=torch.float64))

    task.reward.score = score  # type: ignore[method-assign]
    optimizer = Optimizer(task.model, OptimizerConfig(learning_rate=3e-3))
    rewards = []
    for epoch in range(4):
        for number in range(task.num_batches(epoch)):
            optimizer.zero_grad()
            update = task.compute(epoch, number)
            optimizer.scale_and_clip(update.denominator)
            optimizer.step(3e-3)
            update.commit()
            rewards += [update.metrics["reward_mean"]] if "reward_mean" in update.metrics else []
    assert len(rewards) == 12
    assert sum(rewards[-3:]) > 1.5 * sum(rewards[:3])
