"""Losses with a clipped ratio, and of values: against their published formulas, worked token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esrl.algorithm.advantages import group_shares
from esrl.algorithm.clipped import num_tokens, ratio_sums, row_weights, value_coefficients, value_loss
from esrl.algorithm.objective_config import CriticConfig
from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, denominator, objective_loss

LOW, HIGH, MAX_TOKENS = 0.2, 0.28, 7
LENGTHS = [3, 1, 4, 2, 2, 4]
INDEX = [0, 0, 0, 1, 2, 2]  # groups of three, one and two


def step(
    make_samples: Any, counts: list[int] | None = None, seed: int = 0, far: float = 0.4
) -> tuple[Tensor, RewardedSamples]:
    """New log-probabilities, and samples whose old ones lie ``far`` from them."""
    generator = torch.Generator().manual_seed(seed)
    counts = counts or [1] * len(INDEX)
    samples = make_samples(INDEX, [0.0] * len(INDEX), lengths=LENGTHS, counts=counts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_probs = -draw(6, 4).abs()
    return log_probs, replace(
        samples,
        advantages=draw(6),
        old_log_probs=log_probs + far * draw(6, 4),
        reference_log_probs=log_probs + 0.5 * draw(6, 4),
        old_values=draw(6, 4),
        returns=draw(6, 4),
        max_tokens=MAX_TOKENS,
    )


def config_of(kind: str, **more: Any) -> ObjectiveConfig:
    return ObjectiveConfig(kind=kind, clip_low=LOW, clip_high=HIGH, **more)  # type: ignore[arg-type]


def clip(ratio: float, advantage: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - LOW), 1 + HIGH) * advantage)


def plain_loss(
    log_probs: Tensor, samples: RewardedSamples, kind: str, normalise: str | None = None
) -> tuple[float, float]:
    """The formulas of the papers, in plain Python: (numerator, denominator)."""
    assert samples.advantages is not None and samples.old_log_probs is not None
    counts, total, below = samples.counts.tolist(), 0.0, 0.0
    for prompt in sorted(set(INDEX)):
        rows = [row for row, owner in enumerate(INDEX) if owner == prompt]
        number = sum(counts[row] for row in rows)
        for row in rows:
            advantage, length = float(samples.advantages[row]), LENGTHS[row]
            logs = [float(log_probs[row, t] - samples.old_log_probs[row, t]) for t in range(length)]
            if kind == "rloo":
                total -= counts[row] / number * clip(math.exp(math.fsum(logs)), advantage)
                continue
            terms = math.fsum(clip(math.exp(log), advantage) for log in logs)
            if normalise == "token":
                total -= counts[row] * terms
                below += counts[row] * length
            else:
                total -= counts[row] / number * terms / (length if normalise == "sequence" else MAX_TOKENS)
    return total, below if normalise == "token" else 3.0


CASES = [("grpo", "sequence"), ("grpo", "token"), ("grpo", "constant"), ("ppo", "token"), ("rloo", None)]


@pytest.mark.parametrize("counts", [[1] * 6, [2, 1, 3, 4, 1, 2]])
@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_losses_are_the_papers_formulas(make_samples: Any, kind: str, normalise: str, counts: list[int]):
    log_probs, samples = step(make_samples, counts)
    config = config_of(kind, normalise=normalise)
    total, below = plain_loss(log_probs, samples, kind, normalise)
    assert float(objective_loss(log_probs, samples, config)) == pytest.approx(total)
    assert denominator(samples, config, 3.0) == below


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_coefficients_are_difference_quotients(make_samples: Any, kind: str, normalise: str):
    log_probs, samples = step(make_samples)
    config = config_of(kind, normalise=normalise, kl_coefficient=0.3, kl_place="loss")
    samples = replace(samples, kl_coefficient=0.3)
    loss, found = coefficients(log_probs, samples, config)
    assert float(loss) == pytest.approx(float(objective_loss(log_probs, samples, config)))
    for row in range(6):
        for t in range(4):
            moved = [log_probs.clone(), log_probs.clone()]
            for sign, other in zip((1, -1), moved, strict=True):
                other[row, t] += sign * 1e-6
            ahead, behind = (float(objective_loss(other, samples, config)) for other in moved)
            assert float(found[row, t]) == pytest.approx((ahead - behind) / 2e-6, abs=1e-8)
            assert t < LENGTHS[row] or float(found[row, t]) == 0


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_the_first_update_is_the_plain_policy_gradient(make_samples: Any, kind: str, normalise: str):
    """At ratio 1 nothing is clipped: c = -w A, REINFORCE with the objective's weights."""
    log_probs, samples = step(make_samples)
    samples = replace(samples, old_log_probs=log_probs)
    config = config_of(kind, normalise=normalise)
    _, found = coefficients(log_probs, samples, config)
    assert samples.advantages is not None
    expected = -(row_weights(samples, config) * samples.advantages)[:, None] * samples.mask
    torch.testing.assert_close(found, expected)
    sums = ratio_sums(log_probs, samples, config).figures()
    assert sums == {"ratio_mean": 1, "clip_low_share": 0, "clip_high_share": 0, "approx_kl": 0}


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.29, 1.0, False),
        (1.27, 1.0, True),
        (0.1, 1.0, True),
        (0.79, -1.0, False),
        (0.81, -1.0, True),
        (5.0, -1.0, True),
    ],
)
def test_bounds_are_one_sided_and_asymmetric(make_samples: Any, kind: str, ratio: float, advantage: float, moves: bool):
    """A good sample is held above 1 + .28, a bad one below 1 - .2; on the other side the gradient stays."""
    log_probs = torch.full((1, 1), -1.0, dtype=torch.float64)
    samples = replace(
        make_samples([0], [0.0]),
        advantages=torch.tensor([advantage], dtype=torch.float64),
        old_log_probs=log_probs - math.log(ratio),
    )
    _, found = coefficients(log_probs, samples, config_of(kind))
    assert float(found) == pytest.approx(-ratio * advantage if moves else 0)
    figures = ratio_sums(log_probs, samples, config_of(kind)).figures()
    assert figures["clip_high_share"] == (not moves and advantage > 0)
    assert figures["clip_low_share"] == (not moves and advantage < 0)
    assert figures["ratio_mean"] == pytest.approx(ratio)
    assert figures["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_a_merged_row_is_its_copies(make_samples: Any, kind: str, normalise: str):
    config = config_of(kind, normalise=normalise, kl_coefficient=0.2, kl_place="loss")
    log_probs, merged = step(make_samples, [2, 1, 1, 3, 1, 2])
    merged = replace(merged, kl_coefficient=0.2)
    copies = torch.repeat_interleave(torch.arange(6), merged.counts)
    kept = replace(merged.select(copies), counts=torch.ones(len(copies), dtype=torch.int64))
    assert float(objective_loss(log_probs, merged, config)) == pytest.approx(
        float(objective_loss(log_probs[copies], kept, config))
    )
    assert denominator(merged, config, 3.0) == denominator(kept, config, 3.0)
    a, b = (ratio_sums(*pair, config).figures() for pair in ((log_probs, merged), (log_probs[copies], kept)))
    assert a == pytest.approx(b)
    assert float(value_loss(merged.returns * 0.5, merged, config)) == pytest.approx(  # type: ignore[operator]
        float(value_loss(kept.returns * 0.5, kept, config))  # type: ignore[operator]
    )


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_truncated_samples_are_counted_but_not_learnt_from(make_samples: Any, kind: str, normalise: str):
    log_probs, samples = step(make_samples)
    config = config_of(kind, normalise=normalise, kl_coefficient=0.2, kl_place="loss")
    learnt = torch.tensor([True, False, True, True, True, False])
    masked = replace(samples, learnt=learnt, kl_coefficient=0.2)
    _, found = coefficients(log_probs, masked, config)
    _, whole = coefficients(log_probs, replace(samples, kl_coefficient=0.2), config)
    # prompts' shares stay what they were; only the tokens that divide are fewer (TRL's rule)
    torch.testing.assert_close(found, torch.where(learnt[:, None], whole, 0.0))
    assert num_tokens(masked) == 3 + 4 + 2 + 2 and num_tokens(samples) == 16
    assert ratio_sums(log_probs, masked, config).number == (4 if kind == "rloo" else 11)


@pytest.mark.parametrize(("kind", "normalise"), CASES)
def test_parts_of_a_batch_sum_to_the_batch(make_samples: Any, kind: str, normalise: str):
    """Minibatches of samples: shares are those of the whole batch, so losses, gradients and denominators add up."""
    log_probs, samples = step(make_samples, [1, 2, 1, 1, 3, 1])
    samples = replace(samples, shares=group_shares(samples.groups, samples.counts))
    config = config_of(kind, normalise=normalise)
    loss, whole = coefficients(log_probs, samples, config)
    halves = [torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5])]
    total, found, below = 0.0, torch.zeros_like(whole), 0.0
    for rows in halves:
        part = samples.select(rows)
        part_loss, found[rows] = coefficients(log_probs[rows], part, config)
        assert part.shares is not None
        total += float(part_loss)
        below += denominator(part, config, float(part.shares.sum()))
    assert total == pytest.approx(float(loss)) and below == pytest.approx(denominator(samples, config, 3.0))
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("bound", [0.2, None])
@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_value_loss_by_hand(make_samples: Any, bound: float | None, normalise: str):
    _, samples = step(make_samples, [1, 2, 1, 1, 3, 1])
    assert samples.returns is not None and samples.old_values is not None
    values = samples.old_values + 0.3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).double()
    config = config_of("ppo", normalise=normalise, critic=CriticConfig(value_clip=bound, value_coefficient=0.5))
    total = 0.0
    sizes = samples.groups.sum(samples.counts).tolist()
    for row, length in enumerate(LENGTHS):
        terms = []
        for t in range(length):
            value, old, goal = (float(x[row, t]) for x in (values, samples.old_values, samples.returns))
            near = value if bound is None else old + min(max(value - old, -bound), bound)
            terms.append(max((value - goal) ** 2, (near - goal) ** 2) / 2)
        count = int(samples.counts[row])
        weight = count if normalise == "token" else count / sizes[INDEX[row]] / length
        total += 0.5 * weight * math.fsum(terms)
    loss, found = value_coefficients(values, samples, config)
    assert float(loss) == pytest.approx(total)
    moved = values.clone()
    moved[2, 1] += 1e-6
    assert float(found[2, 1]) == pytest.approx((float(value_loss(moved, samples, config)) - total) / 1e-6, abs=1e-5)
    assert bool((found[~samples.mask] == 0).all())


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("ahead", [1e3, -1e3])
def test_absurd_ratios_stay_finite(make_samples: Any, kind: str, advantage: float, ahead: float):
    log_probs = torch.zeros(1, 2)
    samples = replace(
        make_samples([0], [0.0], lengths=[2]),
        advantages=torch.tensor([advantage]),
        old_log_probs=log_probs - ahead,
    )
    loss, found = coefficients(log_probs, samples, config_of(kind))
    assert bool(loss.isfinite()) and bool(found.isfinite().all())
    assert all(map(math.isfinite, ratio_sums(log_probs, samples, config_of(kind)).figures().values()))


@pytest.mark.parametrize("how", ["k2", "k1"])
@pytest.mark.parametrize("kind", ["fused", "mrt", "reinforce"])
def test_the_divergence_joins_any_loss(make_samples: Any, kind: str, how: str):
    """beta times the mean over a prompt's samples of the sum over tokens; k1 and k3 times the ratio."""
    log_probs, samples = step(make_samples)
    samples = replace(samples, rewards=torch.arange(6).double() / 6, kl_coefficient=0.7)
    plain = ObjectiveConfig(kind=kind)  # type: ignore[arg-type]
    with_kl = ObjectiveConfig(kind=kind, kl_coefficient=0.7, kl_place="loss", kl_estimator=how)  # type: ignore[arg-type]
    assert samples.reference_log_probs is not None and samples.old_log_probs is not None
    log_ratio = samples.reference_log_probs - log_probs
    tokens = log_ratio.square() / 2 if how == "k2" else -log_ratio * (log_probs - samples.old_log_probs).exp()
    rows = torch.where(samples.mask, tokens, 0.0).sum(1)
    expected = 0.7 * float(samples.groups.mean(rows).sum())
    difference = float(objective_loss(log_probs, samples, with_kl)) - float(objective_loss(log_probs, samples, plain))
    assert difference == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "grpo", "clip_low": 0.0}, "clip_low is 0.0"),
        ({"kind": "grpo", "clip_low": 1.5}, "clip_low is 1.5"),
        ({"kind": "grpo", "clip_high": 0.0}, "clip_high is 0.0"),
        ({"kind": "grpo", "normalise": "tokens"}, "normalise is 'tokens'; choose one of sequence, token, constant"),
        ({"kind": "grpo", "std_normalise": "x"}, "std_normalise is 'x'; choose one of group, batch, none"),
        ({"kind": "grpo", "importance_weights": True}, "objective 'grpo' has its own ratio"),
        ({"kind": "grpo", "kl_place": "token"}, r'kl_place is "token", which needs rewards of tokens'),
        ({"kind": "rloo", "normalise": "token"}, "rloo takes a sequence as one action"),
        ({"kind": "ppo", "std_normalise": "group"}, "ppo takes its advantages from the critic"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'; choose one of k1, k2, k3"),
        ({"kl_coefficient": -0.1}, "kl_coefficient is -0.1"),
        ({"kl_coefficient": math.nan}, "kl_coefficient is nan"),
        ({"kl_target": 6.0}, "kl_target is 6.0 and kl_coefficient 0.0"),
        ({"kl_horizon": 0}, "kl_horizon is 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("gamma", 1.1), ("gae_lambda", -0.1), ("value_clip", 0.0), ("reward_clip", -1.0), ("value_coefficient", math.inf)],
)
def test_the_critic_s_settings_are_checked(name: str, value: float):
    with pytest.raises(ValueError, match=rf"critic.{name} is {value}"):
        CriticConfig(**{name: value})


def test_unset_settings_follow_the_method():
    resolved = {
        kind: (config.length_norm, config.std_norm, config.place, config.estimator)
        for kind in ("grpo", "rloo", "ppo", "fused")
        for config in [ObjectiveConfig(kind=kind)]  # type: ignore[arg-type]
    }
    assert resolved == {
        "grpo": ("sequence", "group", "loss", "k3"),
        "rloo": ("sequence", "none", "sequence", "k1"),
        "ppo": ("token", "none", "token", "k1"),
        "fused": ("sequence", "none", "sequence", "k1"),
    }
