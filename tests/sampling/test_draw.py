"""One draw: the inverse of the cumulative distribution, and what is recorded with it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from esrl.algorithm.log_probs import Projection
from esrl.sampling.draw import Drawn, Temperature, Truncation, draw_tokens, invert_cumulative

LAST = 1 - 2.0**-53  # the largest uniform number there is; in float32 it rounds to 1


def drawn(weights: list[float], uniforms: list[float], dtype: torch.dtype = torch.float64) -> list[int]:
    rows = torch.tensor([weights] * len(uniforms), dtype=dtype)
    return invert_cumulative(rows, torch.tensor(uniforms, dtype=torch.float64))[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_of_the_unit_interval(dtype):
    # cumulative .25 .75 1: a boundary belongs to the token behind it
    assert drawn([1, 2, 1], [0.0, 0.249, 0.25, 0.749, 0.75, LAST], dtype) == [0, 0, 1, 1, 2, 2]
    # zeros at the start, in the middle and at the end are never drawn
    assert drawn([0, 0, 3, 0, 5, 0, 0], [0.0, 0.374, 0.375, LAST], dtype) == [2, 2, 4, 4]
    assert drawn([0, 1, 0], [0.0, 0.5, LAST], dtype) == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1e-30, 1e-8, 1e-3])
def test_the_last_uniform_draws_no_zero_whatever_the_total(dtype, smallest):
    """u * total rounds up to the total here, which no cumulative weight exceeds; zeros stand at the end."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(500, 300, generator=generator, dtype=torch.float64) + smallest
    weights[:, 200:] = 0
    weights = weights.to(dtype)
    uniforms = torch.full((500,), LAST, dtype=torch.float64)
    tokens, log_total = invert_cumulative(weights, uniforms)
    assert bool((tokens < 200).all())
    assert bool((weights.gather(1, tokens[:, None]) > 0).all())
    torch.testing.assert_close(log_total, weights.double().sum(1).log().to(dtype))


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any),
    st.one_of(st.integers(0, 2**20 - 1), st.just(2**20 - 1), st.just(0)),
)
@settings(max_examples=400, deadline=None)
def test_inverse_is_exact_on_integers(weights, numerator):
    """Integer weights and u = n / 2**20: all sums and products are exact, so plain fractions give the answer."""
    target = Fraction(numerator, 2**20) * sum(weights)
    total, expected = 0, -1
    for token, weight in enumerate(weights):
        total += weight
        if total > target:
            expected = token
            break
    assert drawn(weights, [numerator / 2**20]) == [expected]
    assert weights[expected] > 0


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=2, max_size=30).filter(any),
    st.lists(st.floats(0, LAST), min_size=2, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=300, deadline=None)
def test_inverse_rises_with_u_and_has_weight(weights, uniforms, dtype):
    tokens = drawn(weights, sorted(uniforms), dtype)
    assert tokens == sorted(tokens)
    assert all(weights[token] > 0 for token in tokens)


@given(st.integers(1, 700), st.integers(0, 2**32), st.lists(st.floats(0, LAST), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_blocks_give_what_one_cumulative_sum_gives(vocabulary, seed, uniforms):
    """Integer weights below 8: every sum is exact, so the search in blocks must find the very same token."""
    weights = torch.randint(0, 8, (len(uniforms), vocabulary), generator=torch.Generator().manual_seed(seed)).double()
    weights[:, seed % vocabulary] += 1  # not all are 0
    u = torch.tensor(uniforms, dtype=torch.float64)
    tokens, log_total = invert_cumulative(weights, u)
    target = torch.minimum(u * weights.sum(1), torch.nextafter(weights.sum(1), torch.zeros(len(u)).double()))
    expected = (weights.cumsum(1) <= target[:, None]).sum(1)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(log_total, weights.sum(1).log(), rtol=0, atol=1e-14)


def by_hand(logits: list[float], tau: float) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / tau) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


LOGITS = [[0.0, 1.0, -1.0, 2.0], [3.0, 3.0, -50.0, 1.0], [0.5, 0.5, 0.5, -2.0]]


def projection(suppressed: int | None = None, dtype: torch.dtype = torch.float64) -> Projection:
    """hidden = logits: the identity."""
    bias = torch.zeros(4, dtype=dtype)
    if suppressed is not None:
        bias[suppressed] = -torch.inf
    return Projection(torch.eye(4, dtype=dtype), bias)


def draw(
    hidden: torch.Tensor,
    temperature: torch.Tensor,
    uniforms: torch.Tensor,
    records: tuple[str, ...] = (),
    suppressed: int | None = None,
    max_logits: int = 1 << 22,
) -> Drawn:
    project = projection(suppressed, hidden.dtype)
    return draw_tokens(hidden, project, Temperature.of(temperature), uniforms, records, max_logits)


# without records, a draw at temperature 1 goes another way
EACH_RECORDING = pytest.mark.parametrize("records", [("entropy", "max_prob"), ()])


@EACH_RECORDING
@pytest.mark.parametrize("max_logits", [1, 4, 8, 1 << 22])
@pytest.mark.parametrize("temperatures", [[1.0, 1.0, 1.0], [0.6, 0.0, 1.3], [0.0, 0.0, 0.0]])
def test_draws_and_records_by_hand(temperatures, max_logits, records):
    uniforms = [0.1, 0.9, 0.98]  # the second token in the first row, the last and least probable one in the third
    result = draw(
        torch.tensor(LOGITS, dtype=torch.float64),
        torch.tensor(temperatures, dtype=torch.float64),
        torch.tensor(uniforms, dtype=torch.float64),
        records,
        max_logits=max_logits,
    )
    for row, (logits, tau, u) in enumerate(zip(LOGITS, temperatures, uniforms, strict=True)):
        plain = by_hand(logits, 1.0)
        if tau:
            heated, total = by_hand(logits, tau), 0.0
            token = next(i for i, p in enumerate(heated) if (total := total + p) > u)
            expected_sampling = math.log(heated[token])
        else:
            token, expected_sampling = logits.index(max(logits)), 0.0
        assert int(result.tokens[row]) == token
        assert float(result.log_probs[row]) == pytest.approx(math.log(plain[token]), abs=1e-14)
        assert float(result.sampling_log_probs[row]) == pytest.approx(expected_sampling, abs=1e-14)
        assert result.records.keys() == set(records)
        if not records:
            continue
        assert float(result.records["max_prob"][row]) == pytest.approx(max(plain), abs=1e-14)
        entropy = -math.fsum(p * math.log(p) for p in plain if p)
        assert float(result.records["entropy"][row]) == pytest.approx(entropy, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("suppressed", [0, 3])
@EACH_RECORDING
def test_a_suppressed_token_is_never_drawn(records, suppressed, tau, dtype):
    """It would be the most probable one by far; u runs up to 1, where rounding goes over the end."""
    logits = torch.zeros(7, 4, dtype=dtype)
    logits[:, suppressed] = 60
    result = draw(
        logits,
        torch.full((7,), tau, dtype=torch.float64),
        torch.tensor([0.0, 2.0**-53, 0.3, 0.5, 0.999999, 1 - 2.0**-30, LAST], dtype=torch.float64),
        records,
        suppressed,
    )
    assert suppressed not in result.tokens.tolist()
    # three tokens share everything
    assert result.log_probs.tolist() == pytest.approx([-math.log(3)] * 7, abs=1e-6)
    if records:
        assert result.records["entropy"].tolist() == pytest.approx([math.log(3)] * 7, abs=1e-6)
        assert result.records["max_prob"].tolist() == pytest.approx([1 / 3] * 7, abs=1e-6)


def test_low_temperatures_and_large_logits_stay_finite():
    logits = torch.tensor([[800.0, 799.0, -800.0, 0.0]], dtype=torch.float32)
    result = draw(logits, torch.tensor([0.01]), torch.tensor([LAST]), ("entropy",))
    assert result.tokens.tolist() == [0]  # at .01 the second has e^-100
    assert result.log_probs.tolist() == pytest.approx([-math.log(1 + math.exp(-1))], abs=1e-6)
    assert result.sampling_log_probs.tolist() == pytest.approx([0.0], abs=1e-6)
    assert bool(torch.isfinite(result.records["entropy"]).all())


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_logits_that_are_no_numbers_are_reported_as_such(tau):
    """Diverged weights: the draw must not read beyond the vocabulary, and its log-probability must tell."""
    logits = torch.tensor([[math.nan] * 4, [0.0, 1.0, 2.0, 3.0]], dtype=torch.float64)
    result = draw(logits, torch.full((2,), tau, dtype=torch.float64), torch.tensor([0.5, LAST]).double())
    assert 0 <= int(result.tokens[0]) < 4
    assert math.isnan(float(result.log_probs[0]))
    assert int(result.tokens[1]) == 3 and math.isfinite(float(result.log_probs[1]))


CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("tau", [0.7, 1.0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_truncated_draws_are_those_of_hugging_faces_warpers(cut, tau, spread):
    """The tokens that may be drawn, and their log-probabilities: 1,500 tokens, of which a flat distribution keeps more
    than are looked at first."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 1500, generator=generator, dtype=torch.float64) * spread
    scores = logits / tau
    for warper in warpers(**cut):
        scores = warper(torch.zeros(6, 1, dtype=torch.int64), scores)
    expected, plain = torch.log_softmax(scores, 1), torch.log_softmax(logits, 1)
    project = Projection(torch.eye(1500, dtype=torch.float64), None)
    temperature = Temperature.of(torch.full((6,), tau, dtype=torch.float64), Truncation(**cut))
    for u in (0.0, 0.2, 0.5, 0.9, LAST):
        uniforms = torch.full((6,), u, dtype=torch.float64)
        drawn = draw_tokens(logits.clone(), project, temperature, uniforms, ("entropy",), 1 << 22)
        chosen = drawn.tokens[:, None]
        torch.testing.assert_close(drawn.sampling_log_probs, expected.gather(1, chosen)[:, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(drawn.log_probs, plain.gather(1, chosen)[:, 0], rtol=0, atol=1e-12)
        entropy = torch.special.entr(plain.exp()).sum(1)
        torch.testing.assert_close(drawn.records["entropy"], entropy, rtol=0, atol=1e-10)
        before = expected.exp().cumsum(1).gather(1, chosen)[:, 0]
        share = expected.exp().gather(1, chosen)[:, 0]
        assert bool((before >= u - 1e-12).all() and (before - share <= u + 1e-12).all())
    kept = Truncation(**cut).cut(torch.exp(logits / tau)) > 0
    assert torch.equal(kept, torch.isfinite(scores))


def warpers(top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> list[LogitsProcessor]:
    found: list[LogitsProcessor] = []
    if top_k is not None:
        found.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        found.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        found.append(MinPLogitsWarper(min_p))
    return found


def test_a_greedy_row_beside_truncated_ones():
    temperature = Temperature.of(torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64), Truncation(top_k=2))
    hidden = torch.tensor(LOGITS, dtype=torch.float64)
    uniforms = torch.full((3,), LAST, dtype=torch.float64)
    drawn = draw_tokens(hidden, projection(), temperature, uniforms, (), 4)
    # of three equal ones all stay: the last one of them comes last
    assert drawn.tokens.tolist() == [3, 1, 2]
    assert drawn.sampling_log_probs.tolist() == pytest.approx([0.0, math.log(1 / 2), math.log(1 / 3)], abs=1e-12)
