"""Attention over real tokens alone against PyTorch's over padded rows (the slow twin), in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esrl.kernels import kernels, operations, why_not
from esrl.models.attention import PackedAttention, PaddedAttention
from esrl.models.policy import PromptState
from esrl.models.seq2seq import Preset, new_policy
from esrl.sampling.engine import EngineSampler, SamplingConfig
from esrl.training.gradient import GradientConfig, StageTwo

native = kernels()
pytestmark = pytest.mark.skipif(native is None, reason=f"no compiled kernels: {why_not()}")

HEADS = 2
LENGTHS = torch.tensor([1, 9, 4, 6, 13, 2, 1])
PROMPT_INDEX = torch.tensor([3, 0, 0, 3, 1, 0, 0])  # nobody reads prompt 2
SOURCE = 11


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_state(width: int, dtype: torch.dtype, *, padded: bool) -> PromptState:
    """4 prompts; with padding behind some."""
    shape = (4, HEADS, SOURCE, width // HEADS)
    lengths = torch.tensor([SOURCE, 1, 5, 8]) if padded else torch.full((4,), SOURCE)
    mask = torch.arange(SOURCE) < lengths[:, None]
    keys, values = (random(*shape, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    return PromptState((keys,), (values,), mask)


def states(width: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of the real tokens, and queries to the prompts."""
    return [random(int(LENGTHS.sum()), width, seed=seed).to(dtype).requires_grad_() for seed in range(3, 7)]


def packed(state: PromptState, parts: list[Tensor]) -> list[Tensor]:
    attention = PackedAttention(native, state, PROMPT_INDEX, LENGTHS)
    return [attention.own(*parts[:3]), attention.prompts(0, parts[3])]


def padded(state: PromptState, parts: list[Tensor]) -> list[Tensor]:
    mask = torch.arange(int(LENGTHS.max())) < LENGTHS[:, None]

    def spread(tokens: Tensor) -> Tensor:
        return tokens.new_zeros(*mask.shape, tokens.shape[1]).masked_scatter(mask[:, :, None], tokens)

    attention = PaddedAttention(state, PROMPT_INDEX, mask.shape[1])
    return [
        attention.own(*(spread(part) for part in parts[:3]))[mask],
        attention.prompts(0, spread(parts[3]))[mask],
    ]


# heads of one, two and four vectors of the processor
@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("with_padding", [False, True])
def test_values_and_gradients_equal_the_padded_ones(vectors, with_padding):
    width = HEADS * vectors * native.vector
    outcomes = []
    for function, dtype in ((packed, torch.float32), (padded, torch.float64)):
        state, parts = prompt_state(width, dtype, padded=with_padding), states(width, dtype)
        results = function(state, parts)
        outer = [random(*result.shape, seed=10 + i).to(dtype) for i, result in enumerate(results)]
        torch.autograd.backward(results, outer)
        outcomes.append([*results, *(part.grad for part in (*parts, *state.tensors))])
    for found, expected in zip(*outcomes, strict=True):
        assert float(expected.detach().abs().max()) > 0.5
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    of_keys, of_values = outcomes[0][-2:]
    mask = prompt_state(width, torch.float32, padded=with_padding).mask
    for gradient in (of_keys, of_values):
        assert not gradient[2].any()  # nobody's
        assert not gradient.transpose(1, 2)[~mask].any()


def test_rows_do_not_depend_on_the_others_to_the_bit():
    width = HEADS * native.vector
    state, parts = prompt_state(width, torch.float32, padded=True), states(width, torch.float32)
    together = packed(state, parts)
    ends = LENGTHS.cumsum(0).tolist()
    for row, (end, length) in enumerate(zip(ends, LENGTHS.tolist(), strict=True)):
        alone = PackedAttention(native, state, PROMPT_INDEX[row : row + 1], LENGTHS[row : row + 1])
        own = [part[end - length : end] for part in parts]
        assert torch.equal(alone.own(*own[:3]), together[0][end - length : end])
        assert torch.equal(alone.prompts(0, own[3]), together[1][end - length : end])


def test_numbers_that_lie_apart():
    """Queries, keys and values that are parts of one product's result."""
    width = HEADS * native.vector
    state, parts = prompt_state(width, torch.float32, padded=False), states(width, torch.float32)
    attention = PackedAttention(native, state, PROMPT_INDEX, LENGTHS)
    wide = torch.cat([part.detach() for part in parts[:3]], 1)
    assert torch.equal(attention.own(*wide.split(width, 1)), attention.own(*parts[:3]))


def test_what_is_not_a_number_is_not_hidden():
    width = HEADS * native.vector
    state, parts = prompt_state(width, torch.float32, padded=False), states(width, torch.float32)
    parts[1].detach()[5, 3] = torch.nan  # a key of the second row, read by its tokens from the fifth on
    own, _ = packed(state, parts)
    bad = own.isnan().any(1).nonzero()[:, 0].tolist()
    assert bad == [5, 6, 7, 8, 9]


def test_operations_are_counted():
    width = HEADS * native.vector
    state, parts = prompt_state(width, torch.float32, padded=False), states(width, torch.float32)
    before = operations()
    results = packed(state, parts)
    pairs = int((LENGTHS * (LENGTHS + 1) // 2).sum() + LENGTHS.sum() * SOURCE)
    assert operations() - before == 4 * width * pairs
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    assert operations() - before == (4 + 10) * width * pairs


@pytest.fixture
def policies(tokenizer):
    """The same model in float32, whose heads fit the kernels, and in float64, which is computed with padding."""
    preset = Preset(width=HEADS * native.vector, layers=2, heads=HEADS, inner_width=80)
    made = [new_policy(preset, tokenizer, 32, seed=5) for _ in range(2)]
    for policy in made:
        policy.model.final_logits_bias[0, tokenizer.eos_token_id] += 3  # samples of different lengths
    made[1].model.to(torch.float64)
    return made


def batch(policy, prompts, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's prompt, decoder inputs and mask; rows of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(prompts), (12,), generator=generator)
    inputs = torch.randint(3, policy.vocabulary, (12, 7), generator=generator)
    inputs[:, 0] = policy.start_token
    return index, inputs, torch.arange(7) < torch.randint(1, 8, (12, 1), generator=generator)


def test_states_of_real_tokens_are_those_of_padded_rows(policies, prompts):
    plain, twin = policies
    assert plain.packs and not twin.packs
    index, inputs, mask = batch(plain, prompts)
    with torch.no_grad():
        found = plain.token_states(plain.encode(prompts), index, inputs, mask)
        expected = twin.hidden_states(twin.encode(prompts), index, inputs)[mask]
        assert torch.equal(expected, twin.token_states(twin.encode(prompts), index, inputs, mask))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)
    plain.precision = "bfloat16"
    assert not plain.packs
    with torch.no_grad():
        found = plain.token_states(plain.encode(prompts), index, inputs, mask)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.2)


def test_stage_two_is_the_same_without_padding(policies, prompts, make_plan, gradients):
    """Scores and gradients; and micro-batches are filled with real tokens."""
    rollouts = EngineSampler(policies[0], SamplingConfig(max_new_tokens=9), seed=1).sample(
        prompts, make_plan([4] * len(prompts), 1.0)
    )
    coefficients = torch.randn(rollouts.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollouts.mask
    outcomes, sizes = [], []
    for policy in policies:
        stage_two = StageTwo(policy, GradientConfig(micro_batch_tokens=50))
        scores = stage_two.log_probs(prompts, rollouts, None, 0)
        plain = policy.token_states

        def seen(state, index, inputs, mask, plain=plain):
            sizes.append(int(mask.sum()))
            return plain(state, index, inputs, mask)

        policy.token_states = seen

        def work(stage_two=stage_two) -> None:
            stage_two.backward(prompts, rollouts, coefficients, None, 0)

        outcomes.append({"scores": scores, **gradients(policy.model, work)})
        sizes.append(0)
    found, expected = outcomes
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].to_dense().double(), value.to_dense().double(), rtol=0, atol=2e-4, msg=name
        )
    end = sizes.index(0)
    packed_sizes, padded_sizes = sizes[:end], sizes[end + 1 : -1]
    assert sum(packed_sizes) == sum(padded_sizes) == int(rollouts.mask.sum())
    assert all(size <= 50 for size in packed_sizes)
    assert packed_sizes == sorted(packed_sizes, reverse=True)
    assert len(packed_sizes) < len(padded_sizes)
