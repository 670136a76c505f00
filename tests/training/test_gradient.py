"""Stage two: micro-batches give the gradient of the whole graph, whatever memory allows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from causal_models import make_ending
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esrl.algorithm.baselines import RewardQueue, baseline_values
from esrl.algorithm.duplicates import handle_duplicates
from esrl.algorithm.groups import Groups
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, objective_loss
from esrl.errors import OutOfMemoryError
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.sampling.graph import sample_with_graph
from esrl.training.gradient import GradientConfig, StageTwo
from esrl.types import Prompts, Rollouts, SamplingPlan

Gradient = dict[str, Tensor]

OBJECTIVES = {
    "reinforce": ObjectiveConfig(kind="reinforce"),
    "reinforce-sum": ObjectiveConfig(kind="reinforce", reinforce_reduction="sum"),
    "reinforce-weighted": ObjectiveConfig(kind="reinforce", importance_weights=True),
    "mrt": ObjectiveConfig(kind="mrt", alpha=0.1),
    "mrt-weighted": ObjectiveConfig(kind="mrt", alpha=0.1, importance_weights=True, group_correction=True),
    "mrt-normalised": ObjectiveConfig(kind="mrt", alpha=1.0, length_normalise=True, mrt_scale="none"),
    "fused": ObjectiveConfig(kind="fused"),
    "fused-sampling": ObjectiveConfig(kind="fused", alpha=0.1, score_temperature="sampling"),
}


class Step:
    """A sampled step: rollouts, rewards, and everything an objective needs."""

    def __init__(
        self, policy: MarianPolicy | CausalPolicy, prompts: Prompts, plan: SamplingPlan, merge: bool = False
    ) -> None:
        self.policy, self.prompts, self.plan = policy, prompts, plan
        self.sampler = EngineSampler(policy, SamplingConfig(max_new_tokens=16), 5)
        rollouts = self.sampler.sample(prompts, plan)
        self.rollouts, self.counts = handle_duplicates(rollouts, "merge" if merge else "keep")

    def samples(self, rollouts: Rollouts | None = None, counts: Tensor | None = None) -> RewardedSamples:
        rollouts = self.rollouts if rollouts is None else rollouts
        counts = self.counts if counts is None else counts
        # a reward that is a function of the text, so copies of a sample have the same
        rewards = torch.tensor([(sum(map(ord, text)) % 17) / 17 for text in rollouts.texts], dtype=torch.float64)
        groups = Groups(rollouts.prompt_index, len(self.prompts))
        queue = RewardQueue(100)
        queue.push(rewards.repeat_interleave(counts).tolist())
        return RewardedSamples(
            mask=rollouts.mask,
            groups=groups,
            counts=counts,
            rewards=rewards,
            baseline=baseline_values("fifo", rewards, groups, counts, queue),
            sampling_log_probs=rollouts.sampling_log_probs,
            planned=self.plan.num_samples,
        )

    def temperature(self, config: ObjectiveConfig) -> Tensor | None:
        at_sampling = config.score_temperature == "sampling"
        return self.plan.temperature[self.rollouts.prompt_index] if at_sampling else None

    def coefficients(self, config: ObjectiveConfig) -> Tensor:
        at_sampling = config.score_temperature == "sampling"
        log_probs = self.rollouts.sampling_log_probs if at_sampling else self.rollouts.log_probs
        return coefficients(log_probs, self.samples(), config)[1]

    def backward(self, objective: ObjectiveConfig, **memory: Any) -> StageTwo:
        stage_two = StageTwo(self.policy, GradientConfig(**memory))
        stage_two.backward(self.prompts, self.rollouts, self.coefficients(objective), self.temperature(objective), 0)
        return stage_two


@pytest.fixture(scope="module")
def step(random64, prompts, uneven_plan) -> Step:
    return Step(random64, prompts, uneven_plan)


@pytest.fixture(scope="module")
def whole_graph(reference_logits) -> Callable[[Step, ObjectiveConfig], None]:
    """The reference: Hugging Face's model over all rows at once, full logits, plain autograd through the objective."""

    def backward(step: Step, config: ObjectiveConfig) -> None:
        logits = reference_logits(step.policy, step.prompts, step.rollouts)
        temperature = step.temperature(config)
        if temperature is not None:
            logits = logits / temperature[:, None, None]
        log_probs = torch.log_softmax(logits, -1).gather(-1, step.rollouts.tokens[..., None])[..., 0]
        # what lies beyond the mask may be a suppressed token
        log_probs = torch.where(step.rollouts.mask, log_probs, 0.0)
        objective_loss(log_probs, step.samples(), config).backward()

    return backward


def assert_equal(found: Gradient, expected: Gradient, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


MEMORY = [
    {"micro_batch_tokens": 1},  # a row at a time
    {"micro_batch_tokens": 37, "max_prompt_tokens": 50, "max_logits": 700},
    {"micro_batch_tokens": 64, "max_prompt_tokens": 1, "max_logits": 1},  # a prompt and a token at a time
    {"micro_batch_tokens": 10**9, "max_prompt_tokens": 10**9},  # everything at once
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_give_the_gradient_of_the_whole_graph(step, whole_graph, gradients, name):
    config = OBJECTIVES[name]
    expected = gradients(step.policy.model, lambda: whole_graph(step, config))
    for memory in MEMORY:
        assert_equal(gradients(step.policy.model, lambda memory=memory: step.backward(config, **memory)), expected)


@pytest.mark.parametrize("micro_batch_tokens", [1, 10, 48, 200])
def test_every_micro_batch_size(step, whole_graph, gradients, micro_batch_tokens):
    config = OBJECTIVES["fused"]
    expected = gradients(step.policy.model, lambda: whole_graph(step, config))
    found = gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=micro_batch_tokens))
    assert_equal(found, expected)


@pytest.mark.parametrize("name", ["reinforce", "mrt-weighted", "fused", "fused-sampling"])
def test_merged_duplicates_give_the_gradient_of_all_copies(trained64, prompts, make_plan, whole_graph, gradients, name):
    plan = make_plan([6, 8, 1, 8, 8, 1, 8, 8, 2, 8], [0.6, 1.0] * 5)
    merged, kept = Step(trained64, prompts, plan, merge=True), Step(trained64, prompts, plan)
    assert kept.rollouts.num_rows == 58 and merged.rollouts.num_rows < 40
    assert int(merged.counts.sum()) == 58 and int(merged.counts.max()) > 3
    config = OBJECTIVES[name]
    expected = gradients(trained64.model, lambda: whole_graph(kept, config))
    assert_equal(gradients(trained64.model, lambda: whole_graph(merged, config)), expected)
    assert_equal(gradients(trained64.model, lambda: merged.backward(config, micro_batch_tokens=40)), expected)
    assert_equal(gradients(trained64.model, lambda: kept.backward(config, micro_batch_tokens=40)), expected)


@pytest.mark.parametrize("name", ["reinforce-weighted", "mrt", "fused", "fused-sampling"])
def test_two_stages_give_the_gradient_of_the_conventional_step(step, gradients, name):
    """Same draws, so the same samples; the graph kept through sampling gives what stage two computes afterwards."""
    config = OBJECTIVES[name]
    at_sampling = config.score_temperature == "sampling"

    def conventional() -> None:
        rollouts, log_probs = sample_with_graph(step.policy, step.prompts, step.plan, step.sampler, 0, at_sampling)
        assert torch.equal(rollouts.tokens, step.rollouts.tokens)
        assert torch.equal(rollouts.mask, step.rollouts.mask)
        objective_loss(
            log_probs, step.samples(rollouts, torch.ones(rollouts.num_rows, dtype=torch.int64)), config
        ).backward()

    expected = gradients(step.policy.model, conventional)
    assert_equal(gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=50)), expected)


def test_gradient_is_a_derivative(step, gradients):
    """Central differences of sum c * l along a random direction: nothing here knows autograd."""
    constants = step.coefficients(OBJECTIVES["fused"])
    stage_two = StageTwo(step.policy, GradientConfig(micro_batch_tokens=60))
    policy = step.policy
    found = gradients(policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 0))
    assert (
        directional(policy, found, lambda: stage_two.log_probs(step.prompts, step.rollouts, None, 0), constants) < 1e-6
    )


def directional(
    policy: MarianPolicy | CausalPolicy, gradient: Gradient, log_probs: Callable[[], Tensor], constants: Tensor
) -> float:
    """|difference quotient - gradient . direction| / |difference quotient|."""
    parameters = dict(policy.model.named_parameters())
    generator = torch.Generator().manual_seed(4)
    # along the gradient, disturbed: the slope is large, and no part of it is left out but the embedding of PAD, which
    # Marian starts with and never learns
    direction = {
        name: value + 0.3 * float(value.std()) * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in gradient.items()
    }
    if isinstance(policy, MarianPolicy):
        direction["model.shared.weight"][policy.pad_token] = 0
    # the weights are large and the slope steep: the error falls with size ** 2 down to rounding at about 1e-8
    size = 1e-8 / float(torch.stack([d.norm() for d in direction.values()]).norm())

    def moved(sign: float) -> float:
        with torch.no_grad():
            for name, value in direction.items():
                parameters[name] += sign * size * value
        return float((constants * log_probs()).sum())

    original = {name: parameters[name].detach().clone() for name in direction}
    try:
        ahead = moved(1.0)
        behind = moved(-2.0)
    finally:
        with torch.no_grad():
            for name, value in original.items():
                parameters[name].copy_(value)
    slope = (ahead - behind) / (2 * size)
    expected = sum(float((gradient[name] * direction[name]).sum()) for name in direction)
    assert abs(slope) > 1e-3
    return abs(slope - expected) / abs(slope)


@pytest.fixture(params=["marian", "gpt2"])
def dropout_step(request, make_policy, tokenizer, prompts, uneven_plan) -> Step:
    policy = make_policy() if request.param == "marian" else make_ending("gpt2", tokenizer)
    step = Step(policy, prompts, uneven_plan)
    policy.set_dropout(0.3)
    return step


def test_dropout_is_replayed(dropout_step, gradients):
    """The derivative of what ``log_probs`` gives under a seed is what ``backward`` adds under it: the same masks, in
    the encoder (a causal model: in the prompts) and in every micro-batch, although half of the rows have no coefficient
    at all."""
    step = dropout_step
    constants = step.coefficients(OBJECTIVES["fused"])
    constants[::2] = 0
    config = GradientConfig(dropout=0.3, micro_batch_tokens=40, max_prompt_tokens=60)
    stage_two = StageTwo(step.policy, config)

    def log_probs() -> Tensor:
        return stage_two.log_probs(step.prompts, step.rollouts, None, 9)

    first = log_probs()
    torch.manual_seed(12345)
    assert torch.equal(first, log_probs())
    assert float((first - step.rollouts.log_probs).abs().max()) > 0.1
    other = stage_two.log_probs(step.prompts, step.rollouts, None, 10)
    assert float((first - other).abs().max()) > 0.1
    found = gradients(step.policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 9))
    assert directional(step.policy, found, log_probs, constants) < 1e-6
    wrong = gradients(step.policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 10))
    assert directional(step.policy, wrong, log_probs, constants) > 1e-3


def test_no_dropout_is_deterministic(step, gradients):
    config = OBJECTIVES["fused"]
    first = gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=40))
    torch.manual_seed(99)
    second = gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=40))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stage_ones_log_probs_serve_unless_numerics_differ(random64, random32):
    assert not StageTwo(random64, GradientConfig()).rescores
    assert not StageTwo(random32, GradientConfig()).rescores
    assert StageTwo(random32, GradientConfig(dropout=0.1)).rescores
    assert StageTwo(random32, GradientConfig(rescore=True)).rescores
    assert not StageTwo(random32, GradientConfig(dropout=0.1, rescore=False)).rescores
    half = MarianPolicy(copy.deepcopy(random32.model).to(torch.bfloat16), random32.tokenizer)
    assert StageTwo(half, GradientConfig()).rescores


def test_gradient_takes_the_place_of_what_was_there(step, gradients):
    config = OBJECTIVES["mrt"]
    once = gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=40))
    twice = gradients(step.policy.model, lambda: [step.backward(config, micro_batch_tokens=40) for _ in range(2)])
    assert_equal(twice, once, 1e-12)


def test_rows_without_coefficients_cost_nothing(step, gradients):
    """They are neither encoded nor scored: only the rows of prompts 3 and 8 are left."""
    constants = step.coefficients(OBJECTIVES["reinforce"])
    left = (step.rollouts.prompt_index == 3) | (step.rollouts.prompt_index == 8)
    assert int(left.sum()) == 6
    constants = torch.where(left[:, None], constants, 0.0)
    with Watched(step.policy) as watched:
        stage_two = StageTwo(step.policy, GradientConfig())
        found = gradients(
            step.policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 0)
        )
    assert sum(rows for rows, _ in watched.batches) == 6
    assert watched.encoded == [2]
    # what is left is right: the same as with the other rows scored under coefficients too small to matter
    whole = gradients(
        step.policy.model,
        lambda: stage_two.backward(step.prompts, step.rollouts, constants + 1e-300 * step.rollouts.mask, None, 0),
    )
    assert_equal(found, whole, 1e-12)
    nothing = gradients(
        step.policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, 0 * constants, None, 0)
    )
    assert nothing == {}


def test_no_rows_at_all(random64, prompts, gradients):
    """What a process without a share of the last batch scores."""
    none = prompts.select([])
    rollouts = EngineSampler(random64, SamplingConfig(max_new_tokens=4), 0).sample(none, SamplingPlan.greedy(0))
    stage_two = StageTwo(random64, GradientConfig())
    assert stage_two.log_probs(none, rollouts, None, 0).shape == rollouts.tokens.shape
    assert gradients(random64.model, lambda: stage_two.backward(none, rollouts, rollouts.log_probs, None, 0)) == {}


def test_half_precision_points_the_same_way(make_policy, prompts, uneven_plan, gradients):
    """bfloat16 keeps 8 bits of every number, but the direction of the gradient stays."""
    config = OBJECTIVES["fused"]
    exact, half = (make_policy(dtype, peaked=False, eos_bias=2.0) for dtype in (torch.float64, torch.bfloat16))
    step = Step(exact, prompts, uneven_plan)
    expected = gradients(exact.model, lambda: step.backward(config))
    stage_two = StageTwo(half, GradientConfig(micro_batch_tokens=50))
    constants = step.coefficients(config).float()
    found = gradients(half.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 0))
    assert found.keys() == expected.keys()
    a = torch.cat([found[name].double().flatten() for name in expected])
    b = torch.cat([value.flatten() for value in expected.values()])
    # rounding nothing but the weights already gives .9998
    assert float(a @ b / (a.norm() * b.norm())) > 0.999
    assert float(a.norm() / b.norm()) == pytest.approx(1, abs=0.01)


class Watched:
    """Records every micro-batch and every encoding while it is open."""

    def __init__(self, policy: MarianPolicy) -> None:
        self.policy = policy
        self.batches: list[tuple[int, int]] = []
        self.encoded: list[int] = []

    def __enter__(self) -> Watched:
        hidden_states, encode = self.policy.hidden_states, self.policy.encode

        def watched_hidden(state: Any, index: Tensor, inputs: Tensor) -> Tensor:
            self.batches.append(tuple(inputs.shape))
            return hidden_states(state, index, inputs)

        def watched_encode(prompts: Prompts) -> Any:
            self.encoded.append(len(prompts))
            return encode(prompts)

        self.policy.hidden_states, self.policy.encode = watched_hidden, watched_encode
        return self

    def __exit__(self, *_: object) -> None:
        del self.policy.hidden_states, self.policy.encode


def test_micro_batches_are_packed_by_length(step):
    """Sorted by length, so a batch's padding is small; at most 60 tokens in each, or one row. The largest first."""
    with Watched(step.policy) as watched:
        step.backward(OBJECTIVES["reinforce"], micro_batch_tokens=60)
    step.policy.model.zero_grad(set_to_none=True)
    assert all(rows * width <= 60 or rows == 1 for rows, width in watched.batches)
    sizes = [rows * width for rows, width in watched.batches]
    assert sizes == sorted(sizes, reverse=True)
    useful = int((step.coefficients(OBJECTIVES["reinforce"]) != 0).any(1).sum())
    assert sum(rows for rows, _ in watched.batches) == useful
    # the fewest batches that sorted rows can have: every one but that of the shortest is as full as its longest allows
    shortest = min(width for _, width in watched.batches)
    assert all(rows == max(1, 60 // width) for rows, width in watched.batches if width > shortest)


@pytest.mark.parametrize("limit", [8, 40])
def test_where_only_real_tokens_are_computed_micro_batches_are_full(step, whole_graph, gradients, limit, monkeypatch):
    """Nearly all as large as the limit; the largest first, rows that are longer than it alone; the same gradient."""
    config, sizes = OBJECTIVES["reinforce"], []
    expected = gradients(step.policy.model, lambda: whole_graph(step, config))
    token_states = step.policy.token_states

    def watched(state: Any, index: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        sizes.append((int(mask.sum()), len(inputs)))
        return token_states(state, index, inputs, mask)

    monkeypatch.setattr(MarianPolicy, "packs", True)
    monkeypatch.setattr(step.policy, "token_states", watched)
    assert_equal(gradients(step.policy.model, lambda: step.backward(config, micro_batch_tokens=limit)), expected)
    useful = (step.coefficients(config) != 0).any(1)
    assert sizes == sorted(sizes, key=lambda size: -size[0])
    assert all(tokens <= limit or rows == 1 for tokens, rows in sizes)
    assert sum(rows for _, rows in sizes) == int(useful.sum())
    total = int(step.rollouts.lengths[useful].sum())
    assert sum(tokens for tokens, _ in sizes) == total
    if limit == 40:
        assert sum(tokens == limit for tokens, _ in sizes) >= 0.6 * total / limit
    else:
        assert sizes[0][0] > limit


def failing(policy: MarianPolicy, limit: int, error: Exception) -> Iterator[list[int]]:
    """``hidden_states`` refuses micro-batches of more than ``limit`` rows; yields the sizes it saw."""
    hidden_states, seen = policy.hidden_states, []

    def limited(state: Any, index: Tensor, inputs: Tensor) -> Tensor:
        seen.append(len(inputs))
        if len(inputs) > limit:
            raise error
        return hidden_states(state, index, inputs)

    policy.hidden_states = limited
    try:
        yield seen
    finally:
        del policy.hidden_states


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    MemoryError(),
]


@pytest.mark.parametrize(("error", "limit"), [*((error, 5) for error in OUT_OF_MEMORY), (OUT_OF_MEMORY[1], 1)])
def test_lack_of_memory_halves_the_micro_batch(step, gradients, error, limit):
    """Also when it strikes in the middle: the first micro-batches, of long rows, are small enough, later are not."""
    config = OBJECTIVES["fused"]
    expected = gradients(step.policy.model, lambda: step.backward(config))
    stage_two = StageTwo(step.policy, GradientConfig(micro_batch_tokens=80))
    constants = step.coefficients(config)
    parameter = next(iter(step.policy.model.parameters()))

    def disturbed() -> None:
        parameter.grad = torch.full_like(parameter, 0.25)  # what was there does not count
        for seen in failing(step.policy, limit, error):
            stage_two.backward(step.prompts, step.rollouts, constants, None, 0)
            assert max(seen) > limit
            if limit == 5:
                assert seen[0] <= limit  # it struck when gradients were already there

    found = gradients(step.policy.model, disturbed)
    assert_equal(found, expected)
    # 80 -> 40 -> ...: the size that worked stays; sixteen tokens at most in a row
    assert stage_two.micro_batch_tokens in (40, 20, 10, 5, 2, 1)
    smaller = stage_two.micro_batch_tokens
    for _ in failing(step.policy, limit, error):
        log_probs = StageTwo(step.policy, GradientConfig(micro_batch_tokens=80)).log_probs(
            step.prompts, step.rollouts, None, 0
        )
        torch.testing.assert_close(log_probs, step.rollouts.log_probs, rtol=0, atol=1e-10)
        disturbed_again = gradients(
            step.policy.model, lambda: stage_two.backward(step.prompts, step.rollouts, constants, None, 0)
        )
    assert_equal(disturbed_again, expected)
    assert stage_two.micro_batch_tokens == smaller


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "linux", "python"])
def test_no_memory_for_a_single_row(step, error):
    stage_two = StageTwo(step.policy, GradientConfig(micro_batch_tokens=64))
    constants = step.coefficients(OBJECTIVES["fused"])
    for _ in failing(step.policy, 0, error):
        with pytest.raises(OutOfMemoryError, match="one sample per micro-batch; take a smaller model") as caught:
            stage_two.backward(step.prompts, step.rollouts, constants, None, 0)
        with pytest.raises(OutOfMemoryError):
            stage_two.log_probs(step.prompts, step.rollouts, None, 0)
    assert caught.value.exit_code == 5


def test_other_errors_are_not_taken_for_a_lack_of_memory(step):
    stage_two = StageTwo(step.policy, GradientConfig(micro_batch_tokens=64))
    for _ in failing(step.policy, 0, RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            stage_two.log_probs(step.prompts, step.rollouts, None, 0)
    assert stage_two.micro_batch_tokens == 64


def test_a_resumed_run_takes_the_smaller_micro_batch(random64):
    stage_two = StageTwo(random64, GradientConfig(micro_batch_tokens=64))
    stage_two.shrink(16)
    assert stage_two.micro_batch_tokens == 16
    stage_two.shrink(64)
    assert stage_two.micro_batch_tokens == 16


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor made while it is open, weights and their gradients apart."""

    def __init__(self, policy: MarianPolicy) -> None:
        super().__init__()
        self.largest = 0
        self.known = {tuple(p.shape) for p in policy.model.parameters()}
        self.known |= {shape[::-1] for shape in self.known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and tuple(value.shape) not in self.known:
                self.largest = max(self.largest, value.numel())
        return result


class SavedForBackward:
    """The most elements that a graph holds at a time: saved since the last backward pass began, each storage once."""

    def __init__(self, policy: MarianPolicy) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
        self.held: dict[int, int] = {}
        self.largest = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.held[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
            self.largest = max(self.largest, sum(self.held.values()))
        return tensor

    def _unpack(self, tensor: Tensor) -> Tensor:
        self.held.clear()
        return tensor


def test_memory_does_not_grow_with_the_number_of_samples(make_policy, prompts, make_plan):
    """k = 32 against k = 4: eight times the rows, and not one element more in any tensor or in the graph."""
    policy = make_policy(eos_bias=-1000.0)  # all samples have 16 tokens, so a micro-batch of 64 tokens has 4 of them
    measured = {}
    for k in (4, 32):
        step = Step(policy, prompts, make_plan([k] * 10, 1.0))
        constants = step.coefficients(OBJECTIVES["mrt"])
        memory = GradientConfig(micro_batch_tokens=64, max_logits=20 * policy.vocabulary)
        saved = SavedForBackward(policy)
        with LargestTensor(policy) as mode, Watched(policy) as watched, saved.hooks:
            StageTwo(policy, memory).backward(step.prompts, step.rollouts, constants, None, 0)
            StageTwo(policy, memory).log_probs(step.prompts, step.rollouts, None, 0)
        policy.model.zero_grad(set_to_none=True)
        assert watched.batches == [(4, 16)] * (2 * 10 * k // 4)
        measured[k] = (mode.largest, saved.largest)
    assert measured[32] == measured[4]
    # the inner layer of the encoder, 10 prompts * S * 48, is the largest there is; the logits of 320 rows of 16 tokens
    # alone would have 320 * 16 * 160 elements
    largest, graph = measured[32]
    assert largest == 10 * prompts.mask.shape[1] * 48
    assert 0 < graph < 320 * 16 * 160 / 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "both"}, "'both'"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens is 0"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens is 0"),
        ({"max_logits": -3}, "max_logits is -3"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"dropout": 0.1, "kind": "graph"}, 'kind = "two_stage"'),
    ],
)
def test_settings_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        GradientConfig(**values)
